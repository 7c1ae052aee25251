"""Trains many subjects by many methods, and draws each of them: one folder a job, what is done is not done again.

A plan (YAML) says what; `deft compare` reads the same ones, for what is to be scored and shown besides.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from . import UserError, data, near, read_json, read_text
from .grid import grid
from .options import METHODS, EvaluateOptions, SampleOptions, TrainOptions
from .origin import origin
from .writing import replacing

RESULT, CLAIM, OUTPUT, SAMPLES, TABLE = "job.json", ".claim", "output.txt", "samples", "sweep.md"
TRAINING, CARD = "result.json", "README.md"  # of `deft train`, which writes the card last
ADAPTERS = ("deft", "para", "lora")  # the methods that have a rank
BASE = "base"  # in a method's place: nothing is trained, the base model draws the class
PLAN = {  # what a plan may hold: kinds, and what is expected
    "pretrained_model_name_or_path": (str, "a model"),
    "subjects": ((str, dict), "a folder, or names with instance_data_dir and instance_prompt"),
    "only": ((list, dict), "a list of subjects, or subjects with their names in the published tables"),
    "methods": ((list, dict), "a list of methods, or methods with options of their own"),
    "ranks": (list, "a list of numbers"),
    "seeds": (list, "a list of numbers"),
    "train": (dict, "options of `deft train`"),
    "prompts": ((list, str), "a list of texts, or `captions`"),
    "shown": (list, "a list of texts"),
    "unrelated": (list, "a list of texts"),
    "sample": (dict, "options of `deft sample`"),
    "evaluate": (dict, "options of `deft evaluate`"),
}
WHOLE = {  # what only a plan as a whole may hold
    "parts": (dict, "names with what is their own of the above"),
    "figures": (dict, "figures with their subjects, rows and prompts"),
    "strengths": (dict, "subjects, rows and prompts to draw at several weights"),
}
CAPTIONS = "captions"  # in the prompts' place: those that the data set has for each subject
SUBJECT = ("instance_data_dir", "instance_prompt", "class_name")
ROW = {  # what a method of a plan may say, beside options of `deft train`
    "method": (str, f"one of {', '.join(METHODS)}"),
    "ranks": PLAN["ranks"],
    "seeds": PLAN["seeds"],
    "subjects": (list, "a list of subjects"),
}
OPTIONS = {"train": TrainOptions, "sample": SampleOptions, "evaluate": EvaluateOptions}
# What a job decides itself; the plan's `train`, `sample` and `evaluate` set the other options of these commands.
OWN = {
    "train": {"method", "rank", "seed", "output_dir", "overwrite_output_dir", "instance_data_dir", "placeholder_token",
              "resume_from_checkpoint", "pretrained_model_name_or_path"},
    "sample": {"output_dir", "overwrite_output_dir", "adapter", "adapter_weight", "prompt", "prompts_file",
               "pretrained_model_name_or_path"},
    "evaluate": {f.name for f in dataclasses.fields(EvaluateOptions)} - {"protocol", "encoders", "clip", "dinov1", "dinov2",
                                                                        "batch_size", "device"},
}  # fmt: skip
INTERRUPTED = 130  # as a shell says it
STOPPED = (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)
# What a launcher (accelerate, torchrun) tells its processes; a job is not one of them but a run of its own.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Whom to learn: a name that can be a folder's, pictures, and the text that stands for them."""

    name: str
    instance_data_dir: str
    instance_prompt: str
    class_name: str
    words: str  # what stands for it in a text, such as "sks dog"
    captions: str | None = None  # the file in which its data set has prompts for it


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    subject: Subject
    method: str
    rank: int | None
    seed: int
    row: str  # of the plan's methods: the method, or the name that it has there
    part: str = ""  # of the plan

    @property
    def label(self):
        """For people."""
        return self.row + ("" if self.rank is None else f", rank {self.rank}")

    @property
    def words(self):
        """What stands for the subject in its prompts: the base model knows but the class."""
        return self.subject.class_name if self.method == BASE else self.subject.words

    @property
    def name(self):
        """Its folder's."""
        if self.method == BASE:
            return f"{self.subject.name}/{BASE}"
        row = self.row if self.row == self.method else re.sub(r"[^\w.]+", "-", self.row.lower()).strip("-")
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.subject.name}/{row}{rank}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Part:
    """What the jobs of one part of a plan share: options of every `deft train`, of those of a row of its methods, of every
    `deft sample`, and of its scores; what to draw, {} for the subject, scored and only shown, and what to draw that has
    nothing to do with it."""

    model: str
    train: dict
    rows: dict[str, dict]
    sample: dict
    prompts: list[str] | str
    shown: list[str]
    unrelated: list[str]
    evaluate: dict
    published: dict[str, str]  # subject -> its name in the published tables


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a sweep does, and what a comparison shows of it."""

    jobs: list[Job]
    parts: dict[str, Part]
    given: dict  # the plan's file as it was read

    def training(self, job):
        """What its training is asked for beyond the job itself."""
        part = self.parts[job.part]
        options = {} if job.method == BASE else part.train | part.rows[job.row]
        return {"pretrained_model_name_or_path": part.model} | options

    def scored(self, job):
        """The prompts that its scores are of, {} for its subject."""
        prompts = self.parts[job.part].prompts
        return _captions(job.subject) if prompts == CAPTIONS else prompts

    def prompts(self, job):
        """All that is drawn of its subject, each once; empty if nothing is."""
        return list(dict.fromkeys(self.scored(job) + self.parts[job.part].shown))

    def drawing(self, job):
        """What it is drawn with; empty if it is not."""
        part, prompts = self.parts[job.part], self.prompts(job)
        unrelated = {"unrelated": part.unrelated} if part.unrelated else {}
        return part.sample | {"subject": job.words, "prompt": prompts} | unrelated if prompts else {}


# what to train ------------------------------------------------------------------------------------------------------


def dreambooth_subjects(folder, token="sks"):
    """Subjects of the DreamBooth data set: `<subject>/*.jpg` and, for their classes, `prompts_and_classes.txt`."""
    folder = Path(folder)
    classes = {}
    listing = folder / "prompts_and_classes.txt"
    for line in read_text(listing).splitlines() if listing.is_file() else ():
        name, comma, kind = line.partition(",")
        if comma and (folder / name.strip()).is_dir():
            classes[name.strip()] = kind.strip()
    subjects = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
        kind = classes.get(path.name, path.name.rstrip("0123456789").replace("_", " ").strip() or path.name)
        prompts = str(listing) if listing.is_file() else None
        subjects.append(Subject(path.name, str(path), f"a photo of {token} {kind}", kind, f"{token} {kind}", prompts))
    return subjects


def dreambench_plus_subjects(folder, token="sks"):
    """Subjects of DreamBench++: `images/**/NN.jpg`, one picture each, and `captions/**/NN.txt`, which name them first."""
    folder, subjects = Path(folder), []
    for image in sorted(p for p in (folder / "images").rglob("*") if p.suffix.lower() in data.SUFFIXES):
        inner = image.relative_to(folder / "images").with_suffix("")
        captions = folder / "captions" / inner.with_suffix(".txt")
        lines = read_text(captions).splitlines()
        if not lines or not lines[0].strip():
            raise UserError(f"{captions} does not name its subject in its first line")
        kind = lines[0].strip()
        name = "_".join((*inner.parts, kind.replace(" ", "_")))
        subjects.append(Subject(name, str(image), f"a photo of {token} {kind}", kind, f"{token} {kind}", str(captions)))
    return subjects


@functools.cache
def _captions(subject):
    """The prompts that its data set has for a subject. UserError if there are none."""
    from .evaluation.protocols import read_prompts  # imports diffusers

    if not subject.captions:
        raise UserError(f"`prompts` are the captions of the data set, which has none for {subject.name}")
    return read_prompts(subject.captions, subject.class_name)


def find_subjects(folder, token="sks"):
    """The subjects of a folder in DreamBooth's or DreamBench++'s layout. UserError if it has none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such folder of subjects: {folder}")
    plus = (folder / "images").is_dir() and (folder / "captions").is_dir()
    subjects = (dreambench_plus_subjects if plus else dreambooth_subjects)(folder, token)
    if not subjects:
        raise UserError(f"{folder} holds no subjects: expected a folder of pictures for each, or DreamBench++'s layout")
    return subjects


def _read_yaml(file):
    """What a plan says, each part of its kind, options known. UserError names the first that cannot be."""
    try:
        plan = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    plan = _check(file, plan, PLAN | WHOLE)
    for name, part in plan.get("parts", {}).items():
        plan["parts"][name] = _check(f"{file}: `{name}`", part, PLAN)
    return plan


def _check(where, given, known):
    """What is given of `known`. UserError names the first that is not known, or of another kind."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected {', '.join(known)}")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}: unknown {name}{near(name, known)}; expected {', '.join(known)}")
        kinds, expected = known[name]
        if not isinstance(value, kinds):
            raise UserError(f"{where}: `{name}` is {value!r}, expected {expected}")
    methods = given.get("methods", {})
    for row, options in methods.items() if isinstance(methods, dict) else ():
        here, options = f"{where}: `{row}`", options or {}
        own = options.keys() & ROW.keys() if isinstance(options, dict) else ()
        _check(here, {name: options[name] for name in own}, ROW)
        _check_options(here, "train", {k: v for k, v in options.items() if k not in ROW} if own else options)
    for command in OPTIONS:
        _check_options(f"{where}: `{command}`", command, given.get(command, {}))
    return given


def _check_options(where, command, given):
    if not isinstance(given, dict):
        raise UserError(f"{where} is {given!r}, expected options of `deft {command}`")
    known = {field.name for field in dataclasses.fields(OPTIONS[command])}
    for name in given:
        if name not in known:
            hint = near(name, known - OWN[command])
            raise UserError(f"{where} has unknown {name}{hint}; expected options of `deft {command}`")
        if name in OWN[command]:
            raise UserError(f"{where} cannot set {name}: every job has its own")


def read_plan(options):
    """The `Plan` of the YAML file, or of the folder of subjects and the flags."""
    given = _read_yaml(options.plan) if options.plan else {}
    shared = {name: value for name, value in given.items() if name not in WHOLE}
    sections = {}
    for name, own in given.get("parts", {"": {}}).items():
        sections[name] = shared | own | {key: shared.get(key, {}) | own.get(key, {}) for key in OPTIONS}
    found = {name: _find_subjects(section, options) for name, section in sections.items()}
    names = [s.name for subjects in found.values() for s in subjects]
    if unknown := [name for name in options.subject if name not in names]:
        raise UserError(f"there is no subject {unknown[0]}{near(unknown[0], names)}; there are {', '.join(names)}")
    parts, jobs = {}, []
    for name, section in sections.items():
        parts[name], its = _read_part(name, section, found[name], options)
        jobs += its
    folders = [job.name for job in jobs]
    if twice := [name for name in folders if folders.count(name) > 1]:
        raise UserError(f"two jobs would be {twice[0]}: a subject has its place in one part, a row a name of its own")
    return Plan(jobs, parts, given)


def _find_subjects(given, options):
    """All that a part is about."""
    wanted = options.subjects or given.get("subjects")
    if not wanted:
        raise UserError("which subjects? --subjects FOLDER, or `subjects` in the plan")
    here = Path(options.plan).parent if options.plan and not options.subjects else Path()
    if isinstance(wanted, str):
        subjects = find_subjects(here / Path(wanted).expanduser(), options.token)
    else:
        subjects = [_subject(name, entry, here, options.token) for name, entry in wanted.items()]
    names, only = [s.name for s in subjects], given.get("only", [])
    if isinstance(only, dict):
        for name, published in only.items():
            if not isinstance(published, str) or list(only.values()).count(published) > 1:
                raise UserError(f"`only`: {name} is {published!r}, expected a name in the published tables, each its own")
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"`only`: there is no subject {unknown[0]}{near(unknown[0], names)}; there are {', '.join(names)}")
    return [s for s in subjects if s.name in (only or names)]


def _read_part(name, given, subjects, options):
    """One `Part`, and its jobs."""
    model = options.pretrained_model_name_or_path or given.get("pretrained_model_name_or_path")
    if not model:
        raise UserError("which base model? --pretrained_model_name_or_path, or the same in the plan")
    said = given.get("methods", ["deft"])
    rows = {row: (said[row] if isinstance(said, dict) else None) or {} for row in said}
    if wrong := [m for m in (own.get("method", row) for row, own in rows.items()) if m not in METHODS]:
        raise UserError(f"unknown method {wrong[0]}{near(wrong[0], METHODS)}; expected one of {', '.join(METHODS)}")
    rows = {row: rows.get(row, {}) for row in options.method or rows}
    ranks, seeds = options.rank or given.get("ranks", [8]), options.seed or given.get("seeds", [0])
    ranks = {row: options.rank or own.get("ranks", ranks) for row, own in rows.items()}
    seeds = {row: options.seed or own.get("seeds", seeds) for row, own in rows.items()}
    for kind, lists, least in (("rank", ranks, 1), ("seed", seeds, 0)):
        for values in lists.values():
            if not values or not all(type(v) is int and v >= least for v in values):
                raise UserError(f"{kind}s are {values!r}, expected a list of numbers from {least} up")
    names = [s.name for s in subjects]
    for row, own in rows.items():
        if unknown := [one for one in own.get("subjects", ()) if one not in names]:
            raise UserError(f"`{row}`: there is no subject {unknown[0]}{near(unknown[0], names)}")
    prompts, shown, unrelated = (given.get(name, []) for name in ("prompts", "shown", "unrelated"))
    prompts = options.prompt or prompts
    subjects = [s for s in subjects if s.name in (options.subject or names)]
    _check_prompts(prompts, shown, unrelated, subjects)
    for s in subjects:
        by_word = any(own.get("method", row) == "textual_inversion" for row, own in rows.items())
        if s.words not in s.instance_prompt and (prompts or by_word):
            why = "to draw it" if prompts else "for textual_inversion"
            raise UserError(f"{s.name}: {why}, its prompt must say {s.words!r} (--token, class_name): {s.instance_prompt!r}")
    every = dict.fromkeys(seed for values in seeds.values() for seed in values)
    jobs = [Job(s, BASE, None, next(iter(every)), BASE, name) for s in subjects] if prompts else []
    for seed, subject, (row, own) in itertools.product(every, subjects, rows.items()):
        method = own.get("method", row)
        if seed in seeds[row] and subject.name in own.get("subjects", names):
            jobs += [Job(subject, method, r, seed, row, name) for r in (ranks[row] if method in ADAPTERS else [None])]
    return Part(
        model=model,
        train=given["train"],
        rows={row: {name: value for name, value in own.items() if name not in ROW} for row, own in rows.items()},
        sample=given["sample"],
        prompts=prompts,
        shown=shown,
        unrelated=list(dict.fromkeys(unrelated)),
        evaluate=given["evaluate"],
        published=given["only"] if isinstance(given.get("only"), dict) else {},
    ), jobs


def _check_prompts(prompts, shown, unrelated, subjects):
    if prompts == CAPTIONS:
        for subject in subjects:
            _captions(subject)
    elif isinstance(prompts, str):
        raise UserError(f"`prompts` is {prompts!r}, expected {PLAN['prompts'][1]}")
    listed = [*shown, *(prompts if isinstance(prompts, list) else [])]
    if wrong := [text for text in listed if not (isinstance(text, str) and "{}" in text)]:
        raise UserError(f"the prompt {wrong[0]!r} has no {{}}, which stands for the subject")
    if wrong := [text for text in unrelated if not isinstance(text, str) or "{}" in text or not text.strip()]:
        raise UserError(f"the unrelated prompt {wrong[0]!r} is no text without {{}}")


def _subject(name, entry, here, token):
    given = entry if isinstance(entry, dict) else {}
    if not all(isinstance(given.get(key), str) and given[key].strip() for key in SUBJECT[:2]):
        raise UserError(f"subject {name}: expected instance_data_dir and instance_prompt, got {entry!r}")
    for key in given:
        if key not in SUBJECT:
            raise UserError(f"subject {name} has unknown {key}{near(key, SUBJECT)}; expected {', '.join(SUBJECT)}")
    where, prompt = given["instance_data_dir"], given["instance_prompt"]
    kind = given.get("class_name") or prompt.split()[-1]
    return Subject(str(name), str(here / Path(where).expanduser()), prompt, kind, f"{token} {kind}")


# running ------------------------------------------------------------------------------------------------------------


def _train_command(job, plan, folder):
    words = {
        "instance_data_dir": job.subject.instance_data_dir, "instance_prompt": job.subject.instance_prompt,
        "output_dir": folder, "resume_from_checkpoint": "latest", "method": job.method, "seed": job.seed,
        "report_to": "none",
    }  # fmt: skip
    if job.rank is not None:
        words["rank"] = job.rank
    if job.method == "textual_inversion":  # captions say it too; all of it is the new word, "sks" being one already
        words |= {"placeholder_token": job.subject.words, "initializer_token": job.subject.class_name.split()[-1]}
    return _command("train", words | plan.training(job))


def _sample_command(job, plan, folder):
    part = plan.parts[job.part]
    words = {"pretrained_model_name_or_path": part.model, "output_dir": folder / SAMPLES, "overwrite_output_dir": True}
    words["prompt"] = [say(prompt, job.words) for prompt in plan.prompts(job)] + part.unrelated
    if job.method != BASE:
        words["adapter"] = folder
    return _command("sample", words | part.sample)


def say(prompt, subject):
    """The prompt with the subject in the place of {}, and "a" or "an" before it as it wants."""
    article = r"\1n {}" if subject[0].lower() in "aeiou" else r"\1 {}"
    return re.sub(r"\b([Aa])n? \{\}", article, prompt).replace("{}", subject)


def _command(name, words):
    command, fields = [sys.executable, "-m", "deft_diffusers", name], OPTIONS[name].__dataclass_fields__
    for option, value in words.items():
        if value is None or (value is False and fields[option].default is False):
            continue  # as it is without the flag
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        else:
            command += [f"--{option}={one}" for one in (value if isinstance(value, list) else [value])]
    return command


def outcome(folder):
    """What came of a job; {} if it has not run."""
    return read_json(folder / RESULT) if (folder / RESULT).is_file() else {}


def _has_run(folder, since):
    """Whether another process has failed in it already, or has stopped, since this one began."""
    return (folder / RESULT).is_file() and (folder / RESULT).stat().st_mtime >= since


def is_done(result, job, plan):
    """Whether the job has come to all that the plan wants drawn."""
    return result.get("status") == "done" and result["drawn"] == plan.drawing(job)


def status(result, job, plan):
    """In a word; "waiting" too for what has been done for another plan alone."""
    found = result.get("status", "waiting")
    return "waiting" if found == "done" and not is_done(result, job, plan) else found


def lock(file, how):
    """Whether a file could be locked: False if another process has it. UserError where nothing can be."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{file.name} cannot be locked ({error.strerror}): choose another --output_dir") from error
    return True


@contextlib.contextmanager
def claimed(folder):
    """Yields a locked file if this process may run the folder's job, else None. The system unlocks it when this process and
    those it has started for the job are gone, however they went."""
    with open(folder / CLAIM, "w") as file:
        yield file if lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) else None


def _call(command, environment, output, claim):
    """Exit code of a process. A signal to stop is passed on to it, which saves first, and it is waited for."""
    process, asked = None, []

    def pass_on(number, frame):
        asked.append(number)
        if process:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=[claim.fileno()], process_group=0
        )
        for number in asked:  # while it was being started
            process.send_signal(number)
        code = process.wait()
        return INTERRUPTED if asked else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _devices():
    """The GPUs that may be used, as `CUDA_VISIBLE_DEVICES` says them."""
    import torch  # a second or two

    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    return said.split(",") if said else [str(k) for k in range(torch.cuda.device_count())]


def _run(job, plan, root, claim):
    """Trains and draws one job in processes of its own, writes what came of it, and returns that."""
    folder = root / job.name
    before = outcome(folder)
    if before.get("status") == "done":  # for another plan, which must not find it so if this run is killed
        _note(folder, before | {"status": "stopped", "drawn": {}, "said": ""})
    has_trained = lambda: job.method == BASE or (folder / CARD).is_file()
    trained = has_trained()
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    if "LOCAL_RANK" in os.environ and (devices := _devices()):  # one GPU for each process of the launcher, as far as they go
        environment["CUDA_VISIBLE_DEVICES"] = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]
    start, code, made = time.perf_counter(), 0, before.get("made", {}) if trained else {}
    with open(folder / OUTPUT, "a" if trained else "w", encoding="utf-8") as output:
        if not trained:
            made["trained"] = origin()
            code = _call(_train_command(job, plan, folder), environment, output, claim)
        seconds = before.get("seconds", 0.0) if trained else round(time.perf_counter() - start, 1)
        if code == 0 and plan.prompts(job):
            made["drawn"] = origin()
            code = _call(_sample_command(job, plan, folder), environment, output, claim)
    last = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    where = os.path.abspath(job.subject.instance_data_dir)  # as it is found from any folder
    result = dataclasses.asdict(job) | {
        "subject": dataclasses.asdict(job.subject) | {"instance_data_dir": where},
        "status": "done" if code == 0 else "stopped" if code in STOPPED else "failed",
        "trained": has_trained(),
        "seconds": seconds,  # of training, from start to end of the process
        "training": read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {},
        "options": plan.training(job),
        "drawn": plan.drawing(job) if code == 0 else {},
        "made": made,  # by which commit it was trained and drawn, and when that began
        "said": _killed(code) if code < 0 and code not in STOPPED else last[-1] if last else "",
    }
    _note(folder, result)
    return result


def _killed(code):
    """What there is to say of a process that a signal has ended, whose last line is that of a progress bar."""
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")


def _note(folder, result):
    with replacing(folder / RESULT) as part:
        part.write_text(json.dumps(result, indent=2) + "\n")


def table(root, plan):
    """What has become of every job, in Markdown."""
    lines = ["| job | status | parameters | seconds | images/s | |", "|---|---|---:|---:|---:|---|"]
    for job in plan.jobs:
        found = outcome(root / job.name)
        state, training = status(found, job, plan), found.get("training", {})
        said = found["said"].replace("|", "/") if state not in ("done", "waiting") else ""
        parameters, rate = (training.get(key, "") for key in ("parameters", "images_per_second"))
        lines.append(f"| {job.name} | {state} | {parameters} | {found.get('seconds', '')} | {rate} | {said} |")
    return "\n".join(lines) + "\n"


def _draw_figures(root, plan):
    """A page for each subject: a row for each method, a column for each prompt, its own pictures on top."""
    for subject, group in itertools.groupby(sorted(plan.jobs, key=lambda job: job.subject.name), lambda job: job.subject):
        jobs = [job for job in group if is_done(outcome(root / job.name), job, plan)]
        prompts = plan.prompts(jobs[0]) if jobs else []
        if not prompts:
            continue
        count = len(prompts) + len(plan.parts[jobs[0].part].unrelated)
        own = data.find_pictures(subject.instance_data_dir)[: len(prompts)]
        rows = [[data.read_image(path) for path in own]]
        for job in jobs:
            samples = read_json(root / job.name / SAMPLES / "samples.json")["samples"]
            files = samples[:: len(samples) // count][: len(prompts)]  # the first of each prompt
            rows.append([data.read_image(root / job.name / SAMPLES / sample["file"]) for sample in files])
        several = len({job.seed for job in jobs}) > 1
        labels = [f"{job.label}, seed {job.seed}" if several and job.method != BASE else job.label for job in jobs]
        page = grid(rows, [prompt.replace("{}", "…") for prompt in prompts], [subject.name, *labels])
        with replacing(root / f"{subject.name}.png") as part:
            page.save(part, "PNG")


def run(plan, root):
    """Trains and draws every job of the plan in its folder under `root`, and returns the number of those that have failed.

    Every process of a launcher, on every machine that shares the folder, takes the next job that nobody has taken.
    """
    jobs = plan.jobs
    for job in jobs:
        before, asked = outcome(root / job.name), plan.training(job) | {"instance_prompt": job.subject.instance_prompt}
        told = before.get("options", {}) | {"instance_prompt": before.get("subject", {}).get("instance_prompt")}
        used = told if before.get("trained") else asked
        if other := [name for name in asked | used if asked.get(name) != used.get(name)]:
            raise UserError(f"{root / job.name} is done, with another {other[0]}: delete it, or choose another --output_dir")
    for job in jobs:
        (root / job.name).mkdir(parents=True, exist_ok=True)
    failed, started = 0, time.time()
    with tqdm(jobs, desc="jobs", unit="job", disable=int(os.environ.get("RANK", 0)) > 0) as bar:
        for job in bar:
            folder = root / job.name
            with claimed(folder) as claim:
                if claim is None or is_done(outcome(folder), job, plan) or _has_run(folder, started):
                    continue
                bar.set_postfix_str(job.name)
                result = _run(job, plan, root, claim)
            if result["status"] == "stopped":
                raise KeyboardInterrupt(f"stopped in {job.name}; the same command goes on")
            failed += result["status"] == "failed"
    return failed


def finish(failed, jobs, where):
    """Ends a command: UserError if jobs have failed, except under a launcher, which would stop the others."""
    if failed:
        message = f"{failed} of {jobs} jobs failed: see {where} and each job's {OUTPUT}"
        if "RANK" not in os.environ:
            raise UserError(message)
        print(message, file=sys.stderr)


def sweep(options):
    """Runs `deft sweep`: takes `SweepOptions`, returns the number of jobs that have failed."""
    plan = read_plan(options)
    root = Path(options.output_dir).expanduser()
    failed = run(plan, root)
    report = table(root, plan)
    with replacing(root / TABLE) as part:
        part.write_text(report)
    print(report, end="")
    _draw_figures(root, plan)
    finish(failed, len(plan.jobs), root / TABLE)
    return failed
