"""Trains many subjects by many methods, and draws each of them: one folder a job, what is done is not done again."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from . import UserError, data, read_json, read_text
from .grid import grid
from .options import METHODS, SampleOptions, TrainOptions

RESULT, CLAIM, OUTPUT, SAMPLES, TABLE = "job.json", ".claim", "output.txt", "samples", "sweep.md"
ADAPTERS = ("deft", "para", "lora")  # the methods that have a rank
BASE = "base"  # in a method's place: nothing is trained, the base model draws the class
PLAN = {"pretrained_model_name_or_path", "subjects", "methods", "ranks", "seeds", "train", "prompts", "sample"}
# What a job decides itself; the plan's `train` and `sample` set the other options of these commands.
OWN = {"method", "rank", "seed", "output_dir", "overwrite_output_dir", "instance_data_dir", "resume_from_checkpoint",
       "adapter", "adapter_weight", "prompt", "prompts_file", "pretrained_model_name_or_path"}  # fmt: skip
NEW_WORD = TrainOptions.__dataclass_fields__["placeholder_token"].default
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
    """All that a sweep does: jobs, options of every `deft train` and `deft sample`, and what to draw, {} for the subject."""

    model: str
    jobs: list[Job]
    train: dict
    sample: dict
    prompts: list[str]


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
        kind = classes.get(path.name, path.name.rstrip("0123456789").replace("_", " ").strip())
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


def read_plan(options):
    """The `Plan` of the YAML file, or of the folder of subjects and the flags."""
    plan = {}
    if options.plan:
        try:
            plan = yaml.safe_load(read_text(options.plan))
        except yaml.YAMLError as error:
            raise UserError(f"{options.plan} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(plan, dict):
            raise UserError(f"{options.plan}: expected {', '.join(sorted(PLAN))}")
        if unknown := sorted(set(plan) - PLAN):
            raise UserError(f"{options.plan}: unknown {', '.join(unknown)}; expected {', '.join(sorted(PLAN))}")
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
        raise UserError(f"there is no subject {unknown[0]}; there are {', '.join(names)}")
    subjects = [s for s in subjects if s.name in (options.subject or names)]
    methods = options.method or plan.get("methods", ["deft"])
    ranks, seeds = options.rank or plan.get("ranks", [8]), options.seed or plan.get("seeds", [0])
    if wrong := [m for m in methods if m not in METHODS]:
        raise UserError(f"unknown method {wrong[0]}; expected one of {', '.join(METHODS)}")
    for name, values in (("rank", ranks), ("seed", seeds)):
        if not isinstance(values, list) or not all(type(v) is int and v >= (name == "rank") for v in values):
            raise UserError(f"{name}s are {values!r}, expected a list of numbers")
    more = {}
    for part, known in (("train", TrainOptions), ("sample", SampleOptions)):
        more[part] = plan.get(part) or {}
        if unknown := sorted(set(more[part]) - ({field.name for field in dataclasses.fields(known)} - OWN)):
            raise UserError(f"{options.plan}: `{part}` has unknown {', '.join(unknown)}: expected options of `deft {part}`")
    prompts = options.prompt or plan.get("prompts", [])
    if wrong := [text for text in prompts if "{}" not in text]:
        raise UserError(f"the prompt {wrong[0]!r} has no {{}}, which stands for the subject")
    if wrong := [s for s in subjects if prompts and s.words not in s.instance_prompt]:
        raise UserError(f"{wrong[0].name}: to draw it, its prompt must say {wrong[0].words!r}: {wrong[0].instance_prompt!r}")
    jobs = [
        Job(subject, method, rank, seed)
        for seed, subject, method in itertools.product(seeds, subjects, methods)
        for rank in (ranks if method in ADAPTERS else [None])
    ]
    if prompts:
        jobs = [*(Job(subject, BASE, None, seeds[0]) for subject in subjects), *jobs]
    return Plan(model, jobs, more["train"], more["sample"], prompts)


def _subject(name, entry, here, token):
    try:
        where, prompt = entry["instance_data_dir"], entry["instance_prompt"]
    except (KeyError, TypeError) as error:
        raise UserError(f"subject {name}: expected instance_data_dir and instance_prompt") from error
    kind = entry.get("class_name", prompt.split()[-1])
    return Subject(str(name), str(here / Path(where).expanduser()), prompt, kind, f"{token} {kind}")


# running ------------------------------------------------------------------------------------------------------------


def _train_command(job, plan, folder):
    words = {
        "pretrained_model_name_or_path": plan.model, "instance_data_dir": job.subject.instance_data_dir,
        "instance_prompt": job.subject.instance_prompt, "output_dir": folder, "method": job.method, "seed": job.seed,
        "report_to": "none",
    }  # fmt: skip
    if job.rank is not None:
        words["rank"] = job.rank
    if job.method == "textual_inversion":  # the word is all there is to say of the subject
        words["instance_prompt"] = f"a photo of {NEW_WORD}"
        words["initializer_token"] = job.subject.class_name.split()[-1]
    words |= plan.train
    if any(folder.glob("checkpoint-[0-9]*")):
        words["resume_from_checkpoint"] = "latest"
    return _command("train", words)


def _sample_command(job, plan, folder):
    words = {"pretrained_model_name_or_path": plan.model, "output_dir": folder / SAMPLES, "overwrite_output_dir": True}
    subject = {BASE: job.subject.class_name, "textual_inversion": NEW_WORD}.get(job.method, job.subject.words)
    words["prompt"] = [_say(prompt, subject) for prompt in plan.prompts]
    if job.method != BASE:
        words["adapter"] = folder
    return _command("sample", words | plan.sample)


def _say(prompt, subject):
    """The prompt with the subject in the place of {}, and "a" or "an" before it as it wants."""
    vowel = subject[0] in "aeiou"
    return prompt.replace("a {}", "an {}" if vowel else "a {}").replace("{}", subject)


def _command(name, words):
    command = [sys.executable, "-m", "deft_diffusers", name]
    for name, value in words.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        else:
            command += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return command


def _found(folder):
    """What came of a job; {} if it has not run."""
    return read_json(folder / RESULT) if (folder / RESULT).is_file() else {}


def _is_done(result, plan):
    return result.get("status") == "done" and result["drawn"] == plan.prompts


def _claim(folder, plan):
    """Takes a job for this process; False if another one has it, or has finished it."""
    if _is_done(_found(folder), plan):
        return False
    claim, mine = folder / CLAIM, f"{socket.gethostname()} {os.getpid()}"
    try:
        with open(claim, "x") as file:
            file.write(mine)
    except FileExistsError:
        host, _, pid = claim.read_text().partition(" ")
        if host != socket.gethostname() or not pid.isdigit() or _alive(int(pid)):
            return False
        claim.write_text(mine)  # of a process that was killed
    return True


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _run(job, plan, root):
    """Trains and draws one job in processes of its own, writes what came of it, and returns that."""
    folder = root / job.name
    before = _found(folder)
    trained = job.method == BASE or before.get("trained", False)
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    devices, local = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", 0))
    if "LOCAL_RANK" in os.environ:  # one GPU for each process of the launcher
        environment["CUDA_VISIBLE_DEVICES"] = devices.split(",")[local] if devices else str(local)
    start, code = time.perf_counter(), 0
    with open(folder / OUTPUT, "a" if trained else "w", encoding="utf-8") as output:
        run = lambda command: subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        if not trained:
            code = run(_train_command(job, plan, folder))
            trained = code == 0
        seconds = before.get("seconds", 0.0) if before.get("trained") else round(time.perf_counter() - start, 1)
        if trained and plan.prompts:
            code = run(_sample_command(job, plan, folder))
    last = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    result = dataclasses.asdict(job) | {
        "status": "done" if code == 0 else "stopped" if code in (130, -2, -15) else "failed",
        "trained": trained,
        "seconds": seconds,  # of training
        "drawn": plan.prompts if code == 0 else [],
        "said": last[-1] if last else "",
    }
    part = folder / f".{RESULT}"
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, folder / RESULT)
    return result


def table(root, jobs):
    """What has become of every job, in Markdown."""
    lines = ["| job | status | seconds | |", "|---|---|---|---|"]
    for job in jobs:
        found = _found(root / job.name) or {"status": "waiting", "seconds": "", "said": ""}
        said = found["said"].replace("|", "/") if found["status"] != "done" else ""
        lines.append(f"| {job.name} | {found['status']} | {found['seconds']} | {said} |")
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
        page.save(root / f"{subject.name}.png")


def sweep(options):
    """Runs `deft sweep`: takes `SweepOptions`, returns the number of jobs that have failed.

    Every process of a launcher, on every machine that shares the folder, takes the next job that nobody has taken.
    """
    plan = read_plan(options)
    jobs = plan.jobs
    root = Path(options.output_dir).expanduser()
    for job in jobs:
        (root / job.name).mkdir(parents=True, exist_ok=True)
    failed = 0
    with tqdm(jobs, desc="jobs", unit="job", disable=int(os.environ.get("RANK", 0)) > 0) as bar:
        for job in bar:
            folder = root / job.name
            if not _claim(folder, plan):
                continue
            bar.set_postfix_str(job.name)
            try:
                result = _run(job, plan, root)
            finally:
                (folder / CLAIM).unlink(missing_ok=True)
            if result["status"] == "stopped":
                raise KeyboardInterrupt(f"stopped in {job.name}; the same command goes on")
            failed += result["status"] == "failed"
    report = table(root, jobs)
    part = root / f".{TABLE}.{os.getpid()}"
    part.write_text(report)
    os.replace(part, root / TABLE)
    print(report, end="")
    if plan.prompts:
        _draw_figures(root, plan)
    if failed:
        message = f"{failed} of {len(jobs)} jobs failed: see {root / TABLE} and each job's {OUTPUT}"
        if "RANK" not in os.environ:
            raise UserError(message)
        print(message, file=sys.stderr)  # a launcher would stop the others for an exit code
    return failed
