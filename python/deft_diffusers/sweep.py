"""Trains many subjects by many methods, and draws each of them: one folder a job, what is done is not done again."""

import contextlib
import dataclasses
import fcntl
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
from .options import METHODS, SampleOptions, TrainOptions
from .writing import replacing

RESULT, CLAIM, OUTPUT, SAMPLES, TABLE = "job.json", ".claim", "output.txt", "samples", "sweep.md"
TRAINING, CARD = "result.json", "README.md"  # of `deft train`, which writes the card last
ADAPTERS = ("deft", "para", "lora")  # the methods that have a rank
BASE = "base"  # in a method's place: nothing is trained, the base model draws the class
PLAN = {  # what a plan may hold: kinds, and what is expected
    "pretrained_model_name_or_path": (str, "a model"),
    "subjects": ((str, dict), "a folder, or names with instance_data_dir and instance_prompt"),
    "methods": ((list, dict), "a list of methods, or methods with options of their own"),
    "ranks": (list, "a list of numbers"),
    "seeds": (list, "a list of numbers"),
    "train": (dict, "options of `deft train`"),
    "prompts": (list, "a list of texts"),
    "sample": (dict, "options of `deft sample`"),
}
SUBJECT = ("instance_data_dir", "instance_prompt", "class_name")
OPTIONS = {"train": TrainOptions, "sample": SampleOptions}
# What a job decides itself; the plan's `train` and `sample` set the other options of these commands.
OWN = {"method", "rank", "seed", "output_dir", "overwrite_output_dir", "instance_data_dir", "resume_from_checkpoint",
       "adapter", "adapter_weight", "prompt", "prompts_file", "pretrained_model_name_or_path",
       "placeholder_token"}  # fmt: skip
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


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    subject: Subject
    method: str
    rank: int | None
    seed: int

    @property
    def label(self):
        """For people."""
        return self.method + ("" if self.rank is None else f", rank {self.rank}")

    @property
    def name(self):
        """Its folder's."""
        if self.method == BASE:
            return f"{self.subject.name}/{BASE}"
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.subject.name}/{self.method}{rank}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a sweep does: jobs, options of every `deft train`, of those of a method, and of every `deft sample`, and what
    to draw, {} for the subject."""

    model: str
    jobs: list[Job]
    train: dict
    methods: dict[str, dict]
    sample: dict
    prompts: list[str]

    def training(self, job):
        """What its training is asked for beyond the job itself."""
        options = {} if job.method == BASE else self.train | self.methods.get(job.method, {})
        return {"pretrained_model_name_or_path": self.model} | options

    @property
    def drawing(self):
        """What every run is drawn with; empty if none is."""
        return self.sample | {"prompt": self.prompts} if self.prompts else {}


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
        subjects.append(Subject(path.name, str(path), f"a photo of {token} {kind}", kind, f"{token} {kind}"))
    return subjects


def dreambench_plus_subjects(folder, token="sks"):
    """Subjects of DreamBench++: `images/**/NN.jpg`, one picture each, and `captions/**/NN.txt`, which name them first."""
    folder, subjects = Path(folder), []
    for image in sorted(p for p in (folder / "images").rglob("*") if p.suffix.lower() in data.SUFFIXES):
        inner = image.relative_to(folder / "images").with_suffix("")
        lines = read_text(folder / "captions" / inner.with_suffix(".txt")).splitlines()
        if not lines or not lines[0].strip():
            raise UserError(f"{folder / 'captions' / inner}.txt does not name its subject in its first line")
        kind = lines[0].strip()
        name = "_".join((*inner.parts, kind.replace(" ", "_")))
        subjects.append(Subject(name, str(image), f"a photo of {token} {kind}", kind, f"{token} {kind}"))
    return subjects


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
    if not isinstance(plan, dict):
        raise UserError(f"{file}: expected {', '.join(PLAN)}")
    plan = {name: value for name, value in plan.items() if value is not None}
    for name, value in plan.items():
        if name not in PLAN:
            raise UserError(f"{file}: unknown {name}{near(name, PLAN)}; expected {', '.join(PLAN)}")
        kinds, expected = PLAN[name]
        if not isinstance(value, kinds):
            raise UserError(f"{file}: `{name}` is {value!r}, expected {expected}")
    methods = plan.get("methods", [])
    own = {method: given or {} for method, given in methods.items()} if isinstance(methods, dict) else {}
    for method, given in own.items():
        _check_options(f"{file}: `{method}`", "train", given)
    for command in OPTIONS:
        _check_options(f"{file}: `{command}`", command, plan.get(command, {}))
    return plan | {"methods": own or methods} if methods else plan


def _check_options(where, command, given):
    if not isinstance(given, dict):
        raise UserError(f"{where} is {given!r}, expected options of `deft {command}`")
    known = {field.name for field in dataclasses.fields(OPTIONS[command])}
    for name in given:
        if name not in known:
            raise UserError(f"{where} has unknown {name}{near(name, known - OWN)}; expected options of `deft {command}`")
        if name in OWN:
            raise UserError(f"{where} cannot set {name}: every job has its own")


def read_plan(options):
    """The `Plan` of the YAML file, or of the folder of subjects and the flags."""
    plan = _read_yaml(options.plan) if options.plan else {}
    model = options.pretrained_model_name_or_path or plan.get("pretrained_model_name_or_path")
    if not model:
        raise UserError("which base model? --pretrained_model_name_or_path, or the same in the plan")
    wanted = options.subjects or plan.get("subjects")
    if not wanted:
        raise UserError("which subjects? --subjects FOLDER, or `subjects` in the plan")
    here = Path(options.plan).parent if options.plan and not options.subjects else Path()
    if isinstance(wanted, str):
        subjects = find_subjects(here / Path(wanted).expanduser(), options.token)
    else:
        subjects = [_subject(name, entry, here, options.token) for name, entry in wanted.items()]
    names = [s.name for s in subjects]
    if unknown := [name for name in options.subject if name not in names]:
        raise UserError(f"there is no subject {unknown[0]}{near(unknown[0], names)}; there are {', '.join(names)}")
    subjects = [s for s in subjects if s.name in (options.subject or names)]
    said = plan.get("methods", ["deft"])
    methods = options.method or list(said)
    ranks, seeds = options.rank or plan.get("ranks", [8]), options.seed or plan.get("seeds", [0])
    if wrong := [m for m in (*methods, *said) if m not in METHODS]:
        raise UserError(f"unknown method {wrong[0]}{near(wrong[0], METHODS)}; expected one of {', '.join(METHODS)}")
    for name, values, least in (("rank", ranks, 1), ("seed", seeds, 0)):
        if not all(type(v) is int and v >= least for v in values):
            raise UserError(f"{name}s are {values!r}, expected a list of numbers from {least} up")
    prompts = options.prompt or plan.get("prompts", [])
    if wrong := [text for text in prompts if not (isinstance(text, str) and "{}" in text)]:
        raise UserError(f"the prompt {wrong[0]!r} has no {{}}, which stands for the subject")
    for s in subjects if prompts or "textual_inversion" in methods else ():
        if s.words not in s.instance_prompt:
            why = "to draw it" if prompts else "for textual_inversion"
            raise UserError(f"{s.name}: {why}, its prompt must say {s.words!r} (--token, class_name): {s.instance_prompt!r}")
    jobs = [
        Job(subject, method, rank, seed)
        for seed, subject, method in itertools.product(seeds, subjects, methods)
        for rank in (ranks if method in ADAPTERS else [None])
    ]
    if prompts:
        jobs = [*(Job(subject, BASE, None, seeds[0]) for subject in subjects), *jobs]
    own = said if isinstance(said, dict) else {}
    return Plan(model, jobs, plan.get("train", {}), own, plan.get("sample", {}), prompts)


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
    words = {"pretrained_model_name_or_path": plan.model, "output_dir": folder / SAMPLES, "overwrite_output_dir": True}
    subject = job.subject.class_name if job.method == BASE else job.subject.words
    words["prompt"] = [_say(prompt, subject) for prompt in plan.prompts]
    if job.method != BASE:
        words["adapter"] = folder
    return _command("sample", words | plan.sample)


def _say(prompt, subject):
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


def _found(folder):
    """What came of a job; {} if it has not run."""
    return read_json(folder / RESULT) if (folder / RESULT).is_file() else {}


def _has_run(folder, since):
    """Whether another process has failed in it already, or has stopped, since this one began."""
    return (folder / RESULT).is_file() and (folder / RESULT).stat().st_mtime >= since


def _is_done(result, plan):
    return result.get("status") == "done" and result["drawn"] == plan.drawing


@contextlib.contextmanager
def _claim(folder):
    """Yields a locked file if this process may run the folder's job, else None. The system unlocks it when this process and
    those it has started for the job are gone, however they went."""
    with open(folder / CLAIM, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file = None
        except OSError as error:
            raise UserError(f"{folder / CLAIM} cannot be locked ({error.strerror}): choose another --output_dir") from error
        yield file


def _call(command, environment, output, claim):
    """Exit code of a process. A signal to stop is passed on to it, which saves first, and it is waited for."""
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=[claim.fileno()], process_group=0
    )
    asked = []

    def pass_on(number, frame):
        asked.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        return INTERRUPTED if asked else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(job, plan, root, claim):
    """Trains and draws one job in processes of its own, writes what came of it, and returns that."""
    folder = root / job.name
    before = _found(folder)
    has_trained = lambda: job.method == BASE or (folder / CARD).is_file()
    trained = has_trained()
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    devices, local = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", 0))
    if "LOCAL_RANK" in os.environ:  # one GPU for each process of the launcher
        environment["CUDA_VISIBLE_DEVICES"] = devices.split(",")[local] if devices else str(local)
    start, code = time.perf_counter(), 0
    with open(folder / OUTPUT, "a" if trained else "w", encoding="utf-8") as output:
        if not trained:
            code = _call(_train_command(job, plan, folder), environment, output, claim)
        seconds = before.get("seconds", 0.0) if trained else round(time.perf_counter() - start, 1)
        if code == 0 and plan.prompts:
            code = _call(_sample_command(job, plan, folder), environment, output, claim)
    last = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    result = dataclasses.asdict(job) | {
        "status": "done" if code == 0 else "stopped" if code in STOPPED else "failed",
        "trained": has_trained(),
        "seconds": seconds,  # of training, from start to end of the process
        "training": read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {},
        "options": plan.training(job),
        "drawn": plan.drawing if code == 0 else {},
        "said": last[-1] if last else "",
    }
    with replacing(folder / RESULT) as part:
        part.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(root, jobs):
    """What has become of every job, in Markdown."""
    lines = ["| job | status | parameters | seconds | images/s | |", "|---|---|---:|---:|---:|---|"]
    for job in jobs:
        found = _found(root / job.name) or {"status": "waiting", "seconds": "", "training": {}, "said": ""}
        said = found["said"].replace("|", "/") if found["status"] != "done" else ""
        parameters, rate = (found["training"].get(key, "") for key in ("parameters", "images_per_second"))
        lines.append(f"| {job.name} | {found['status']} | {parameters} | {found['seconds']} | {rate} | {said} |")
    return "\n".join(lines) + "\n"


def _draw_figures(root, plan):
    """A page for each subject: a row for each method, a column for each prompt, its own pictures on top."""
    for subject, group in itertools.groupby(sorted(plan.jobs, key=lambda job: job.subject.name), lambda job: job.subject):
        jobs = [job for job in group if _is_done(_found(root / job.name), plan)]
        if not jobs:
            continue
        own = data.find_pictures(subject.instance_data_dir)[: len(plan.prompts)]
        rows = [[data.read_image(path) for path in own]]
        for job in jobs:
            samples = read_json(root / job.name / SAMPLES / "samples.json")["samples"]
            files = samples[:: len(samples) // len(plan.prompts)]  # the first of each prompt
            rows.append([data.read_image(root / job.name / SAMPLES / sample["file"]) for sample in files])
        several = len({job.seed for job in jobs}) > 1
        labels = [f"{job.label}, seed {job.seed}" if several and job.method != BASE else job.label for job in jobs]
        page = grid(rows, [prompt.replace("{}", "…") for prompt in plan.prompts], [subject.name, *labels])
        with replacing(root / f"{subject.name}.png") as part:
            page.save(part, "PNG")


def sweep(options):
    """Runs `deft sweep`: takes `SweepOptions`, returns the number of jobs that have failed.

    Every process of a launcher, on every machine that shares the folder, takes the next job that nobody has taken.
    """
    plan = read_plan(options)
    jobs = plan.jobs
    root = Path(options.output_dir).expanduser()
    for job in jobs:
        found, asked = _found(root / job.name), plan.training(job)
        used = found["options"] if found.get("trained") else asked
        if other := [name for name in asked | used if asked.get(name) != used.get(name)]:
            raise UserError(f"{root / job.name} is done, with another {other[0]}: delete it, or choose another --output_dir")
    for job in jobs:
        (root / job.name).mkdir(parents=True, exist_ok=True)
    failed, started = 0, time.time()
    with tqdm(jobs, desc="jobs", unit="job", disable=int(os.environ.get("RANK", 0)) > 0) as bar:
        for job in bar:
            folder = root / job.name
            with _claim(folder) as claim:
                if claim is None or _is_done(_found(folder), plan) or _has_run(folder, started):
                    continue
                bar.set_postfix_str(job.name)
                result = _run(job, plan, root, claim)
            if result["status"] == "stopped":
                raise KeyboardInterrupt(f"stopped in {job.name}; the same command goes on")
            failed += result["status"] == "failed"
    report = table(root, jobs)
    with replacing(root / TABLE) as part:
        part.write_text(report)
    print(report, end="")
    if plan.prompts:
        _draw_figures(root, plan)
    if failed:
        message = f"{failed} of {len(jobs)} jobs failed: see {root / TABLE} and each job's {OUTPUT}"
        if "RANK" not in os.environ:
            raise UserError(message)
        print(message, file=sys.stderr)  # a launcher would stop the others for an exit code
    return failed
