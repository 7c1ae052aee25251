"""Scores pictures against references and prompts, by a published protocol: `scores.json` and a table."""

import importlib.metadata
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .. import UserError, __version__, data, near, read_json
from ..options import EvaluateOptions, SampleOptions
from ..sample import device_of, find_adapter, sample
from ..sweep import say
from ..toyworld import world
from ..writing import replacing
from . import metrics, protocols
from .encoders import load_encoders

SCORES, TABLE = "scores.json", "scores.md"
SIMILARITIES = {name: metrics.ENCODER_OF[name] for name in ("clip_i", "dinov1", "dinov2")}  # of pictures with references
FEATURES = {name: metrics.ENCODER_OF[name] for name in ("diversity", "drift")}
LABELS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dinov1": "DINOv1", "dinov2": "DINOv2", "diversity": "diversity",
          "drift": "drift", "individual": "this individual", "scene": "the scene asked for"}  # fmt: skip
COSTS = {"parameters": "parameters", "steps": "steps", "seconds": "seconds", "memory_gb": "memory (GB)"}  # of result.json


def score(images, prompts, references, encoders, protocol=protocols.DREAMBOOTH, *, about=None, base_images=None,
          subject=None, class_name=None, individual=None, progress=True):  # fmt: skip
    """The scores of generated pictures, as `scores.json` has them.

    Args:
        images: paths. prompts: what each was drawn for, None if that is not known.
        references: paths of the subject's own pictures; or for each picture a list of its own (DreamBench++).
        encoders: of `load_encoders`.
        protocol: "dreambooth" (each picture with all references, 0–1) or "dreambench++" (×100).
        about: for each picture a dict that its record keeps: `file`, `seed`, `template`, and `unrelated`: true for one that
            is not of the subject, which counts for the drift alone.
        base_images: {(prompt, seed): path} of the base model's pictures of the unrelated prompts; None where there is no
            drift to tell, as of the base model itself.
        subject, class_name: "sks dog" and "dog": CLIP-T is asked for the prompt with the second in place of the first.
        individual: name in the drawn world of whom the pictures shall show, where the encoders are that world's.

    A score is over all pictures that have it; what could not be scored, and why, stands in `missing`. No score depends on
    the order of the pictures or on how many go through an encoder at once.
    """
    scale, missing = protocols.scale_of(protocol), []
    miss = lambda what, why: missing.append({"what": str(what), "why": why})
    each = references if references and isinstance(references[0], (list, tuple)) else [references] * len(images)
    pictures = []
    for image, prompt, own, more in zip(images, prompts, each, about or [{}] * len(images), strict=True):
        base = (base_images or {}).get((prompt, more.get("seed"))) if more.get("unrelated") else None
        text = _without_token(prompt, subject, class_name)
        pictures.append(Picture(Path(image), prompt, text, [Path(p) for p in own], more, base and Path(base)))
    paths = dict.fromkeys(path for p in pictures for path in (p.path, *p.references, *filter(None, [p.base])))
    found, verdicts, sizes = _look(list(paths), encoders, miss, progress)
    texts = _read_texts([p.text for p in pictures if p.text], encoders.clip, miss)
    _say_what_is_lacking(pictures, base_images is not None, miss)
    samples = [_score_one(p, found, texts, verdicts, individual, scale) for p in pictures]
    _warn_of_sizes(pictures, sizes)
    scores, counts = _totals(pictures, samples, found)
    return {
        "protocol": protocol,
        "scale": scale,
        "encoders": encoders.facts,
        "features": {name: encoder for name, encoder in FEATURES.items() if name in scores},
        "scores": scores,
        "counts": counts,  # of pictures, each score's
        "real": _real(pictures, found, scale),
        "samples": samples,
        "references": list(dict.fromkeys(path.name for p in pictures for path in p.references)),
        "missing": missing,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "diffusers")}
        | {"deft_kernels": __version__},
    }


@dataclass
class Picture:
    """A generated picture, what it was drawn for, what CLIP-T is asked for, and what it is compared with: `base` is the base
    model's picture of the same prompt and seed, for one whose prompt is unrelated to the subject."""

    path: Path
    prompt: str | None
    text: str | None
    references: list[Path]
    about: dict
    base: Path | None

    @property
    def unrelated(self):
        return bool(self.about.get("unrelated"))

    @property
    def name(self):
        return self.about.get("file", self.path.name)


def _without_token(prompt, subject, class_name):
    return say(prompt.replace(subject, "{}"), class_name) if prompt and subject and class_name else prompt


def _look(paths, encoders, miss, progress):
    """({encoder: {path: feature}}, {path: verdict}, {path: size}) of all pictures that can be read and have finite features;
    each is read once, and but a batch of them is held."""
    found, verdicts, sizes = {name: {} for name in encoders.present}, {}, {}
    size = max(encoder.batch_size for encoder in encoders.present.values())
    with tqdm(total=len(paths), desc="scoring", unit="image", disable=not progress) as bar:
        for start in range(0, len(paths), size):
            read = {}
            for path in paths[start : start + size]:
                try:
                    read[path] = data.read_image(path)
                    sizes[path] = read[path].size
                except UserError as error:
                    why = str(error).replace(f" {path}", "")  # which is said already
                    miss(path, why if path.is_file() else "there is no such picture")
            for name, encoder in encoders.present.items():
                rows = encoder.images(list(read.values()))
                finite = [bool(row.isfinite().all()) for row in rows]
                found[name] |= {path: row for path, row, good in zip(read, rows, finite) if good}
                for path, good in zip(read, finite):
                    if not good:
                        miss(path, f"{name} gives features that are not finite")
            if encoders.judge and read:
                verdicts |= zip(read, encoders.judge(list(read.values())))
            bar.update(len(paths[start : start + size]))
    return found, verdicts, sizes


def _read_texts(texts, clip, miss):
    """{text: feature} of those that have a finite one."""
    texts = list(dict.fromkeys(texts))
    if not (clip and texts):
        return {}
    if cut := [text for text in texts if clip.cut_text(text)]:
        print(f"warning: CLIP sees only the beginning of {data._some([repr(text) for text in cut])}", file=sys.stderr)
    rows = dict(zip(texts, clip.texts(texts)))
    for text, row in rows.items():
        if not row.isfinite().all():
            miss(text, "clip gives features that are not finite")
    return {text: row for text, row in rows.items() if row.isfinite().all()}


def _say_what_is_lacking(pictures, drifts, miss):
    if names := [p.name for p in pictures if not p.prompt]:
        miss(data._some(names), "has no prompt: no CLIP-T, no diversity")
    if names := [p.name for p in pictures if not p.references and not p.unrelated]:
        miss("references", f"there are none for {data._some(names)}: no CLIP-I, DINOv1 and DINOv2")
    if names := [p.name for p in pictures if drifts and p.unrelated and not p.base]:
        miss("base model's pictures", f"there are none of the same prompt and seed for {data._some(names)}: no drift")


def _warn_of_sizes(pictures, sizes):
    """Says on stderr which pictures are of another size than most: every encoder sees its own crop of each."""
    found = Counter(sizes[p.path] for p in pictures if p.path in sizes)
    if len(found) > 1:
        usual = found.most_common(1)[0][0]
        show = "{} ({} x {})".format
        others = [show(p.name, *sizes[p.path]) for p in pictures if sizes.get(p.path, usual) != usual]
        print(f"warning: of another size than most ({usual[0]} x {usual[1]}): {data._some(others)}", file=sys.stderr)


def _score_one(picture, found, texts, verdicts, individual, scale):
    entry = {"file": picture.name, "prompt": picture.prompt} | picture.about | {"unrelated": picture.unrelated}
    if picture.text != picture.prompt:
        entry["text"] = picture.text
    for name, encoder in SIMILARITIES.items():
        features = found.get(encoder, {})
        rows = [features[path] for path in picture.references if path in features]
        if picture.path in features and rows and not picture.unrelated:
            entry[name] = scale * metrics.pairwise(features[picture.path][None], torch.stack(rows)).item()
    if picture.path in found.get("clip", {}) and picture.text in texts:
        entry["clip_t"] = scale * metrics.paired(found["clip"][picture.path][None], texts[picture.text][None]).item()
    if picture.path in verdicts and not picture.unrelated:
        entry |= _judged(verdicts[picture.path], picture.prompt, individual)
    return entry


def _judged(verdict, prompt, individual):
    """What the judge of the drawn world says of a picture: is it this one, is it where it was asked for."""
    from ..toyworld.judge import asked

    wanted = {"individual": individual, "scene": asked(prompt)["scene"] if prompt else None}
    return {what: verdict[what] == name for what, name in wanted.items() if name}


def _totals(pictures, samples, found):
    """Each score, and of how many pictures it is."""
    scores, counts = {}, {}
    for name in LABELS:
        if values := [sample[name] for sample in samples if name in sample and not sample["unrelated"]]:
            scores[name], counts[name] = math.fsum(values) / len(values), len(values)
    features = found.get(FEATURES["diversity"], {})
    kept = [p for p in pictures if p.path in features and p.prompt and not p.unrelated]
    if kept:  # DreamBench++ has a folder for each subject, and two subjects may share a prompt
        groups = [(Path(p.name).parent, p.prompt) for p in kept]
        value = metrics.diversity(torch.stack([features[p.path] for p in kept]), groups)
        if value is not None:
            counts["diversity"] = sum(count for count in Counter(groups).values() if count > 1)
            scores["diversity"] = value
    features = found.get(FEATURES["drift"], {})
    pairs = [(features[p.base], features[p.path]) for p in pictures if p.base in features and p.path in features]
    if pairs:
        scores["drift"], counts["drift"] = metrics.drift(*map(torch.stack, zip(*pairs))), len(pairs)
    return scores, counts


def _real(pictures, found, scale):
    """The references among themselves, where all pictures have the same ones."""
    own = pictures[0].references if pictures else []
    if any(p.references != own for p in pictures):
        return {}
    rows = {name: [found[encoder][path] for path in own if path in found.get(encoder, {})]
            for name, encoder in SIMILARITIES.items()}  # fmt: skip
    values = {name: metrics.similarity_within(torch.stack(kept)) for name, kept in rows.items() if kept}
    return {name: scale * value for name, value in values.items() if value is not None}


# the command --------------------------------------------------------------------------------------------------------


def evaluate(options):
    """Runs `deft evaluate`: takes `EvaluateOptions`, writes `scores.json` and `scores.md`, returns what the first holds."""
    _check(options)
    out = Path(options.output_dir).expanduser()
    for file in (out / name for name in (SCORES, *protocols.SCORES)):
        if file.exists() and not options.overwrite_output_dir:
            raise UserError(f"{file} is there already; choose another --output_dir or add --overwrite_output_dir")
    references = data.find_pictures(options.references) if options.references else []
    collection = _collection(options, references) if options.dreambench_plus_dir else None
    individual, found = _individual(options), _read(options) if options.images else None
    plus = found is not None and found[0].references is not None
    if plus and references:
        raise UserError(f"--references does not apply to {options.images}: it has one beside each picture")
    protocol = options.protocol or (protocols.DREAMBENCH_PLUS if plus else protocols.DREAMBOOTH)
    encoders = load_encoders(
        options.encoders, options.clip, options.dinov1, options.dinov2, protocol=protocol, batch_size=options.batch_size,
        device=device_of(options.device), cache_dir=options.cache_dir,
    )  # fmt: skip
    samples, base = found or _draw(options, out)
    result = score(
        samples.images, samples.prompts, references or samples.references or [], encoders, protocol, about=samples.about,
        base_images=base, subject=options.subject, class_name=options.class_name, individual=individual,
    )  # fmt: skip
    result["missing"] = samples.missing + result["missing"]
    result["cost"] = _cost(options)
    write_scores(out, result)
    own = plus and protocol == protocols.DREAMBENCH_PLUS
    protocols.write_dreambench_plus_scores(out, result if own else {"samples": []})
    if collection:
        _export(options, samples, references, collection, {entry["what"] for entry in result["missing"]})
    print(table(result), end="")
    for entry in result["missing"]:
        print(f"missing: {entry['what']}: {entry['why']}", file=sys.stderr)
    if not result["scores"]:
        raise UserError(f"nothing could be scored: see what is missing in {out / SCORES}")
    print(f"{len(result['samples'])} pictures scored in {out / SCORES}")
    return result


def write_scores(folder, result):
    """Writes `scores.json` and `scores.md`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output_dir {folder}: {error}") from error
    for name, text in ((SCORES, json.dumps(result, indent=2) + "\n"), (TABLE, table(result))):
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def table(result):
    """The scores in Markdown, with the number of pictures behind each and the encoder that it depends on; and what the
    adapters cost, as far as they tell."""
    lines = ["| score | | pictures | the references themselves | encoder |", "|---|---:|---:|---:|---|"]
    for name, value in result["scores"].items():
        digits = 2 if result["scale"] == 100 and name in (*SIMILARITIES, "clip_t") else 4
        real = f"{result['real'][name]:.{digits}f}" if name in result["real"] else ""
        judged = metrics.ENCODER_OF[name] == "judge"
        encoder = "the judge of the drawn world" if judged else result["encoders"][metrics.ENCODER_OF[name]]["id"]
        lines.append(f"| {LABELS[name]} | {value:.{digits}f} | {result['counts'][name]} | {real} | {encoder} |")
    lines += ["", f"protocol {result['protocol']}, scale {result['scale']:g}"]
    if costs := result.get("cost"):
        lines += ["", f"| adapter | bytes | {' | '.join(COSTS.values())} |", "|---|---:" + "|---:" * len(COSTS) + "|"]
        for cost in costs:
            told = (str(cost["training"].get(name, "")) for name in COSTS)
            lines.append(f"| {cost['adapter']} | {cost['bytes']} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def _check(options):
    if bool(options.images) == bool(options.pretrained_model_name_or_path):
        raise UserError("give either --images, a folder of pictures, or --pretrained_model_name_or_path, to draw them first")
    if bool(options.subject) != bool(options.class_name):
        raise UserError("--subject and --class_name go together: CLIP-T is asked for the second in place of the first")
    for name in ("batch_size", "num_images_per_prompt"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    for name in ("adapter", "prompt", "num_images_per_prompt", "num_inference_steps", "guidance_scale", "seed"):
        if options.images and getattr(options, name) != getattr(EvaluateOptions, name, []):
            raise UserError(f"--{name} is for drawing: without --images, with --pretrained_model_name_or_path")
    if options.base_images and not options.images:
        raise UserError("--base_images goes with --images; what is drawn here is drawn by the base model too")
    if options.individual and not options.encoders:
        raise UserError("--individual goes with --encoders toyworld, whose judge knows them")
    if options.dreambench_plus_dir and not options.references:
        raise UserError("--dreambench_plus_dir needs --references: its layout has the reference beside each picture")
    if options.dreambench_plus_dir and not (options.collection_id or options.class_name):
        raise UserError("--dreambench_plus_dir needs --collection_id, or --class_name to tell it")
    if not options.images:
        _templates(options)


def _individual(options):
    """Whom of the drawn world the pictures shall show: who is asked for, or whose name the references' folder bears."""
    if not options.encoders:
        return None
    path = Path(options.references or "").expanduser().absolute()
    name = options.individual or (path if path.is_dir() else path.parent).name
    if options.individual and name not in world.INDIVIDUALS:
        raise UserError(f"--individual {name}{near(name, world.INDIVIDUALS)}: there are {', '.join(world.INDIVIDUALS)}")
    return name if name in world.INDIVIDUALS else None


def _read(options):
    """The `Samples` of --images, and the base model's pictures."""
    samples = protocols.read_samples(options.images, options.prompts_file)
    _check_subject(options, samples.prompts)
    for prompt, more in zip(samples.prompts, samples.about):
        more["unrelated"] = bool(more.get("unrelated")) or prompt in options.unrelated_prompt
    for prompt in options.unrelated_prompt:
        if prompt not in samples.prompts:
            samples.miss(prompt, "an unrelated prompt without a picture")
    if options.base_images and not any(more["unrelated"] for more in samples.about):
        raise UserError("--base_images tells the drift by --unrelated_prompt, and no picture is of one")
    return samples, _by_prompt(options.base_images) if options.base_images else {}


def _templates(options):
    """What to draw: {prompt: what it was before it had the subject in the place of {}}."""
    if bool(options.prompt) == bool(options.prompts_file):
        raise UserError("give the texts to draw either with --prompt or with --prompts_file")
    templates = options.prompt or protocols.read_prompts(options.prompts_file, options.class_name)
    if not options.subject and (wrong := [text for text in templates if "{}" in text]):
        raise UserError(f"the prompt {wrong[0]!r} has {{}}, which stands for the subject: --subject 'sks dog'")
    found = {say(text, options.subject) if options.subject else text: text for text in templates}
    _check_subject(options, found)
    return found


def _check_subject(options, prompts):
    if options.subject and not any(options.subject in (prompt or "") for prompt in prompts):
        texts = data._some([repr(prompt) for prompt in dict.fromkeys(prompts) if prompt], 2) or "there are none"
        raise UserError(f"--subject {options.subject!r} stands in none of the prompts: {texts}")


def _draw(options, out):
    """Draws by `deft sample`: the `Samples` of the adapters, and the base model's pictures of the unrelated prompts."""
    templates = _templates(options)
    names = ("pretrained_model_name_or_path", "num_images_per_prompt", "num_inference_steps", "guidance_scale", "seed",
             "device", "overwrite_output_dir")  # fmt: skip
    same = {name: getattr(options, name) for name in names}
    prompts = [*templates, *options.unrelated_prompt]
    sample(SampleOptions(**same, adapter=options.adapter, prompt=prompts, output_dir=str(out / "samples")))
    samples = protocols.read_samples(out / "samples")
    for image, prompt, more in zip(samples.images, samples.prompts, samples.about):
        more |= {"file": image.relative_to(out).as_posix(), "unrelated": prompt not in templates}
        if prompt in templates:
            more["template"] = templates[prompt]
    if not (options.unrelated_prompt and options.adapter):
        return samples, None
    sample(SampleOptions(**same, prompt=options.unrelated_prompt, output_dir=str(out / "base")))
    return samples, _by_prompt(out / "base")


def _by_prompt(folder):
    """{(prompt, seed): picture} of what `deft sample` wrote. UserError if it is something else, which tells no seeds."""
    samples = protocols.read_samples(folder)
    if any("seed" not in more for more in samples.about):
        raise UserError(f"{folder} does not tell the pictures' seeds: expected a folder that `deft sample` wrote")
    pairs = zip(samples.prompts, samples.about, samples.images)
    return {(prompt, more["seed"]): image for prompt, more, image in pairs}


def _cost(options):
    """What the adapters took to train, where they tell it, and the bytes of their weights."""
    costs = []
    for name in options.adapter:
        path = find_adapter(name)
        files, told = [path] if path.is_file() else path.rglob("*.safetensors"), path / "result.json"
        kept = [f for f in files if not f.relative_to(path).as_posix().startswith("checkpoint-")]
        training = read_json(told) if told.is_file() else {}
        costs.append({"adapter": name, "bytes": sum(f.stat().st_size for f in kept), "training": training})
    return costs


def _collection(options, references):
    """The subject's name in DreamBench++'s layout. UserError if pictures of it are there, to be mixed with these."""
    name = options.collection_id or protocols.collection_id(references[0].resolve(), options.class_name)
    there = Path(options.dreambench_plus_dir).expanduser() / protocols.TARGET / name
    if there.exists():
        raise UserError(f"{there} is there already; remove it, or choose another --dreambench_plus_dir or --collection_id")
    return name


def _export(options, samples, references, collection, missing):
    """Writes the pictures of the subject in DreamBench++'s layout, beside the first reference, and says which it cannot."""
    own = [k for k, more in enumerate(samples.about) if not more["unrelated"]]
    asked = [k for k in own if samples.prompts[k]]
    texts = [_without_token(samples.prompts[k], options.subject, options.class_name) for k in asked]
    images = [None if str(samples.images[k]) in missing else samples.images[k] for k in asked]
    protocols.write_dreambench_plus(options.dreambench_plus_dir, collection, images, texts, references[0])
    written = dict(zip(asked, images))
    if left := [samples.images[k].name for k in own if written.get(k) is None]:
        print(f"warning: not in {options.dreambench_plus_dir}, for want of a prompt or of features: {data._some(left)}",
              file=sys.stderr)  # fmt: skip
