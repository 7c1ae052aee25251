"""Trains many subjects by many methods: one folder a job, what is done is not done again."""

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
from .options import METHODS, TrainOptions

RESULT, CLAIM, OUTPUT, TABLE = "job.json", ".claim", "output.txt", "sweep.md"
ADAPTERS = ("deft", "para", "lora")  # the methods that have a rank
PLAN = {"pretrained_model_name_or_path", "subjects", "methods", "ranks", "seeds", "train"}
# What a launcher (accelerate, torchrun) tells its processes; a job is not one of them but a run of its own.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Whom to learn: a name that can be a folder's, pictures, and the text that stands for them."""

    name: str
    instance_data_dir: str
    instance_prompt: str
    class_name: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    subject: Subject
    method: str
    rank: int | None
    seed: int

    @property
    def name(self):
        """Its folder's."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.subject.name}/{self.method}{rank}-seed{self.seed}"


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
        subjects.append(Subject(path.name, str(path), f"a photo of {token} {kind}", kind))
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
        subjects.append(Subject(name, str(image), f"a photo of {token} {kind}", kind))
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
    """(base model, jobs, options of every run) from the YAML file, or from the folder of subjects and the flags."""
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
        subjects = [_subject(name, entry, here) for name, entry in wanted.items()]
    methods = options.method or plan.get("methods", ["deft"])
    ranks, seeds = options.rank or plan.get("ranks", [8]), options.seed or plan.get("seeds", [0])
    if wrong := [m for m in methods if m not in METHODS]:
        raise UserError(f"unknown method {wrong[0]}; expected one of {', '.join(METHODS)}")
    for name, values in (("rank", ranks), ("seed", seeds)):
        if not isinstance(values, list) or not all(type(v) is int and v >= (name == "rank") for v in values):
            raise UserError(f"{name}s are {values!r}, expected a list of numbers")
    more = plan.get("train") or {}
    own = {"method", "rank", "seed", "output_dir", "instance_data_dir"}
    known = {field.name for field in dataclasses.fields(TrainOptions)} - own
    if unknown := sorted(set(more) - known):
        raise UserError(f"{options.plan}: `train` has unknown {', '.join(unknown)}: expected options of `deft train`")
    jobs = [
        Job(subject, method, rank, seed)
        for seed, subject, method in itertools.product(seeds, subjects, methods)
        for rank in (ranks if method in ADAPTERS else [None])
    ]
    return model, jobs, more


def _subject(name, entry, here):
    try:
        where, prompt = entry["instance_data_dir"], entry["instance_prompt"]
    except (KeyError, TypeError) as error:
        raise UserError(f"subject {name}: expected instance_data_dir and instance_prompt") from error
    return Subject(str(name), str(here / Path(where).expanduser()), prompt, entry.get("class_name", prompt.split()[-1]))


# running ------------------------------------------------------------------------------------------------------------


def _command(job, model, more, folder, resume):
    words = {
        "pretrained_model_name_or_path": model, "instance_data_dir": job.subject.instance_data_dir,
        "instance_prompt": job.subject.instance_prompt, "output_dir": folder, "method": job.method, "seed": job.seed,
        "report_to": "none",
    }  # fmt: skip
    if job.rank is not None:
        words["rank"] = job.rank
    if job.method == "textual_inversion":  # the word is all there is to say of the subject
        word = TrainOptions.__dataclass_fields__["placeholder_token"].default
        words["instance_prompt"] = f"a photo of {word}"
        words["initializer_token"] = job.subject.class_name.split()[-1]
    words |= more
    if resume:
        words["resume_from_checkpoint"] = "latest"
    command = [sys.executable, "-m", "deft_diffusers", "train"]
    for name, value in words.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            command += [f"--{name}={one}" for one in value]
        else:
            command.append(f"--{name}={value}")
    return command


def _claim(folder):
    """Takes a job for this process; False if another one has it, or has finished it."""
    if (folder / RESULT).is_file() and read_json(folder / RESULT)["status"] == "done":
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


def _run(job, model, more, root):
    """Trains one job in a process of its own, writes what came of it, and returns that."""
    folder = root / job.name
    checkpoints = any(folder.glob("checkpoint-[0-9]*"))
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    devices, local = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", 0))
    if "LOCAL_RANK" in os.environ:  # one GPU for each process of the launcher
        environment["CUDA_VISIBLE_DEVICES"] = devices.split(",")[local] if devices else str(local)
    start = time.perf_counter()
    with open(folder / OUTPUT, "w", encoding="utf-8") as output:
        command = _command(job, model, more, folder, checkpoints)
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    last = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    result = dataclasses.asdict(job) | {
        "status": "done" if code == 0 else "stopped" if code in (130, -2, -15) else "failed",
        "seconds": round(time.perf_counter() - start, 1),
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
        file = root / job.name / RESULT
        found = read_json(file) if file.is_file() else {"status": "waiting", "seconds": "", "said": ""}
        said = found["said"].replace("|", "/") if found["status"] != "done" else ""
        lines.append(f"| {job.name} | {found['status']} | {found['seconds']} | {said} |")
    return "\n".join(lines) + "\n"


def sweep(options):
    """Runs `deft sweep`: takes `SweepOptions`, returns the number of jobs that have failed.

    Every process of a launcher, on every machine that shares the folder, takes the next job that nobody has taken.
    """
    model, jobs, more = read_plan(options)
    root = Path(options.output_dir).expanduser()
    for job in jobs:
        (root / job.name).mkdir(parents=True, exist_ok=True)
    failed = 0
    with tqdm(jobs, desc="jobs", unit="job", disable=int(os.environ.get("RANK", 0)) > 0) as bar:
        for job in bar:
            folder = root / job.name
            if not _claim(folder):
                continue
            bar.set_postfix_str(job.name)
            try:
                result = _run(job, model, more, root)
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
    if failed:
        message = f"{failed} of {len(jobs)} jobs failed: see {root / TABLE} and each job's {OUTPUT}"
        if "RANK" not in os.environ:
            raise UserError(message)
        print(message, file=sys.stderr)  # a launcher would stop the others for an exit code
    return failed
