"""The layouts of DreamBooth's data set and of DreamBench++'s samples and scores, and of plain folders of pictures."""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .. import UserError, data, near, read_json, read_text
from ..options import PROTOCOLS
from ..sample import RECORD
from ..writing import remove, replacing

DREAMBOOTH, DREAMBENCH_PLUS = PROTOCOLS
SCALE = {DREAMBOOTH: 1.0, DREAMBENCH_PLUS: 100.0}  # of cosines, as each protocol prints them
LIVE = ("cat", "dog")  # DreamBooth's live subjects; the others have its prompts for objects
SOURCE, TARGET, TEXT = "src_image", "tgt_image", "text"  # DreamBench++'s folders below a method's
# DreamBench++'s own files, each {"<collection_id>-<i>_<j>": score of a picture}
SCORES = {"clip_scores_image.json": "clip_i", "clip_scores_text.json": "clip_t", "dino_scores_v1.json": "dinov1",
          "dino_scores_v2.json": "dinov2"}  # fmt: skip


@dataclass
class Samples:
    """Generated pictures with what is known of each.

    `prompts` has None for a picture without a text; `about` has for each what its record shall say beyond the scores (file,
    seed, …); `references` is None, or has for each its own; `missing` tells what was expected and is not there.
    """

    images: list = field(default_factory=list)
    prompts: list = field(default_factory=list)
    about: list = field(default_factory=list)
    references: list | None = None
    missing: list = field(default_factory=list)

    def add(self, image, prompt, **about):
        self.images.append(image)
        self.prompts.append(prompt)
        self.about.append(about)

    def miss(self, what, why):
        self.missing.append({"what": str(what), "why": why})


def scale_of(protocol):
    """What a protocol multiplies cosines by. UserError if there is none of this name."""
    if protocol not in SCALE:
        raise UserError(f"unknown protocol {protocol!r}{near(protocol, SCALE)}: {', '.join(SCALE)}")
    return SCALE[protocol]


def read_samples(folder, prompts_file=None):
    """The `Samples` of a folder: what `deft sample` wrote (`samples.json`), a method's folder of DreamBench++'s samples, or
    plain pictures, in natural order, with texts from `prompts_file` (a line each, or one of DreamBench++'s captions) or .txt
    files beside them.

    UserError if there is no picture at all, or none of a kind that is known.
    """
    folder = Path(folder).expanduser()
    for name, exists, read in ((TARGET, Path.is_dir, _read_dreambench_plus), (RECORD, Path.is_file, _read_record)):
        if exists(folder / name):
            if prompts_file:
                raise UserError(f"--prompts_file does not apply to {folder}: {name} there tells the texts")
            return read(folder)
    return _read_plain(folder, prompts_file)


def _read_record(folder):
    record, samples = read_json(folder / RECORD), Samples()
    try:
        for entry in record["samples"]:
            more = {key: entry[key] for key in ("seed", "template", "unrelated") if key in entry}
            samples.add(folder / entry["file"], entry["prompt"], file=entry["file"], **more)
    except (KeyError, TypeError) as error:
        expected = '{"samples": [{"file": …, "prompt": …, "seed": …}]}'
        raise UserError(f"{folder / RECORD} is no record of samples: expected {expected}") from error
    if not samples.images:
        raise UserError(f"{folder / RECORD} records no samples")
    return samples


def _read_plain(folder, prompts_file):
    paths, samples = data.find_pictures(folder), Samples()
    if prompts_file:
        lines = [line.strip() for line in read_text(prompts_file).splitlines() if line.strip()]
        if lines[:1] == ["Classes"]:
            raise UserError(f"{prompts_file} lists what to draw: expected a line for each picture of {folder}")
        lines = lines[_are_captions(prompts_file) :]
        for line in lines[len(paths) :]:
            samples.miss(line, f"a prompt of {prompts_file} that {folder} has no picture of")
        prompts = lines + [None] * (len(paths) - len(lines))
    else:
        beside = [path.with_suffix(".txt") for path in paths]
        prompts = [" ".join(read_text(file).split()) or None if file.is_file() else None for file in beside]
        for file in sorted(set(folder.glob("*.txt")) - set(beside)):
            samples.miss(file.name, "a prompt without a picture")
    for path, prompt in zip(paths, prompts):
        samples.add(path, prompt, file=path.name)
    for name in data._folders_of_pictures(folder) if folder.is_dir() else ():
        samples.miss(f"{name}/", "folders below are not searched: its pictures have no scores")
    return samples


def read_prompts_and_classes(file):
    """({subject: class}, prompts for objects, prompts for live subjects) of DreamBooth's `prompts_and_classes.txt`; in a
    prompt {} stands for token and class. A list that the file lacks is empty. UserError if it names neither."""
    classes, prompts, kind = {}, {"object": [], "live": []}, None
    for line in map(str.strip, read_text(file).splitlines()):
        name, comma, said = line.partition(",")
        if line.lower() in ("object prompts", "live subject prompts"):
            kind = line.lower().split()[0]
        elif kind is None and comma and line != "subject_name,class":
            classes[name.strip()] = said.strip()
        elif kind and (prompt := re.match(r"""(['"])(.*)\1""", line)):
            prompts[kind].append(prompt[2].replace("{0} {1}", "{}"))
    if not classes and not any(prompts.values()):
        raise UserError(f"{file} is no prompts_and_classes.txt: expected lines of 'subject,class', and lists of prompts")
    return classes, prompts["object"], prompts["live"]


def read_prompts(file, class_name=None):
    """The prompts that a file asks for, {} for the subject: a line each; those that DreamBooth's `prompts_and_classes.txt`
    has for this class; or those of a file below DreamBench++'s `captions`, whose first line is the subject, and the nine
    others prompts (0–3 photorealistic, 4–6 in a style, 7–8 imaginative). UserError if there are none."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if lines and lines[0] == "Classes":
        if not class_name:
            raise UserError(f"which prompts of {file}? --class_name tells, with --subject")
        _, objects, live = read_prompts_and_classes(file)
        lines = live if class_name in LIVE else objects
    elif _are_captions(file):
        name, *told = lines or [""]
        lines = [re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "{}", line, flags=re.IGNORECASE) for line in told]
        if without := [repr(line) for line in lines if "{}" not in line]:
            print(f"warning: prompts of {file} do not say {name!r}: {data._some(without)}", file=sys.stderr)
    if not lines:
        raise UserError(f"{file} has no prompts" + (f" for {class_name}" if class_name else ""))
    return lines


def _are_captions(file):
    """Whether a file is one of DreamBench++'s, whose first line names the subject and is no prompt."""
    return any(folder.name == "captions" and (folder.parent / "images").is_dir() for folder in Path(file).resolve().parents)


def collection_id(image, subject):
    """DreamBench++'s name of one of its pictures: `images/live_subject/animal/00.jpg` of a kitten is
    `live_subject_animal_00_kitten`."""
    category = Path(image).parent.name
    category = f"live_subject_{category}" if category in ("animal", "human") else category
    return f"{category}_{Path(image).stem}_{subject.lower().replace(' ', '_')}"


def _below(folder, suffixes, samples):
    """{path below the folder without suffix: file}, in natural order of their names; of two with one name the first."""
    files, found = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.name[0] != "."], {}
    for file in sorted(files, key=lambda path: data.natural(path.as_posix())):
        inner = file.relative_to(folder)
        first = found.setdefault(inner.with_suffix("").as_posix(), file)
        if first is not file:
            samples.miss(f"{folder.name}/{inner.as_posix()}", f"{first.name} has the same name, and is taken alone")
    return found


def _read_dreambench_plus(folder):
    """Samples of DreamBench++'s layout: `{src_image,tgt_image,text}/<collection_id>/<i>_<j>.{jpg,txt}`, j being the picture
    of prompt i. Each picture has one reference, the file of the same name."""
    samples = Samples(references=[])
    sources, targets = (_below(folder / name, data.SUFFIXES, samples) for name in (SOURCE, TARGET))
    texts = _below(folder / TEXT, (".txt",), samples)
    if not targets:
        raise UserError(f"{folder / TARGET} holds no pictures: expected <collection_id>/<i>_<j>.jpg")
    for name, image in targets.items():
        prompt = read_text(texts[name]).strip() if name in texts else None
        samples.add(image, prompt, file=image.relative_to(folder / TARGET).as_posix())
        samples.references.append([sources[name]] if name in sources else [])
    for name in dict.fromkeys((*sources, *texts)):
        if name not in targets:
            has = " and ".join(part for part, found in ((SOURCE, sources), (TEXT, texts)) if name in found)
            samples.miss(f"{TARGET}/{name}", f"there is {has} of it, but no picture")
    return samples


def write_dreambench_plus(folder, collection, images, prompts, reference, negative_prompt=""):
    """Adds one subject's pictures to a method's folder in DreamBench++'s layout, as its own `generate_images.py` does: JPEG,
    the reference beside each, the n-th different prompt being prompt n. Returns the names, `<i>_<j>`.

    `images` are paths, or None for one that is not there, so that the others keep their numbers, by which DreamBench++ tells
    kinds of prompts; `reference` is one; the prompts must not have the token, since they are what CLIP-T asks for.
    UserError if it cannot be written.
    """
    folder, counts, names = Path(folder).expanduser(), {}, []
    source = data.read_image(reference)
    try:
        for part in (SOURCE, TARGET, TEXT):
            (folder / part / collection).mkdir(parents=True, exist_ok=True)
        (folder / "negative_prompt.txt").write_text(negative_prompt or "", encoding="utf-8")
        for image, prompt in zip(images, prompts, strict=True):
            counts[prompt] = counts.get(prompt, -1) + 1
            if image is None:
                continue
            names.append(f"{list(counts).index(prompt)}_{counts[prompt]}")
            data.read_image(image).save(folder / TARGET / collection / f"{names[-1]}.jpg")
            source.save(folder / SOURCE / collection / f"{names[-1]}.jpg")
            (folder / TEXT / collection / f"{names[-1]}.txt").write_text(prompt, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write DreamBench++'s layout to {folder}: {error}") from error
    return names


def write_dreambench_plus_scores(folder, result):
    """Writes DreamBench++'s own JSON of the scores that `evaluate.score` gave for its layout; a picture without one is not
    in it, and an older file of a score that no picture has is removed. Returns the files."""
    written = []
    for file, score in SCORES.items():
        found = {Path(s["file"]).with_suffix("").as_posix().replace("/", "-"): s[score]
                 for s in result["samples"] if score in s}  # fmt: skip
        if found:
            with replacing(Path(folder) / file) as part:
                part.write_text(json.dumps(found, indent=4) + "\n")
            written.append(Path(folder) / file)
        else:
            remove(Path(folder) / file)
    return written
