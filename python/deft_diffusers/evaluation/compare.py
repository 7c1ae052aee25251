"""Trains, draws and scores the jobs of a plan, and shows them in tables, figures and a report.

Training and drawing are `deft sweep`'s; `results.json` is all that tables, figures and report are made of, besides the
pictures.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .. import UserError, data, read_json, sweep
from ..options import EvaluateOptions
from ..origin import origin
from ..sample import RECORD
from ..sweep import BASE, CLAIM, SAMPLES, TABLE, claimed, is_done, outcome, status
from ..toyworld.world import INDIVIDUALS
from ..train import RESULTS as WEIGHTS
from ..train import SETTINGS
from ..writing import replacing
from . import figures, report, tables
from .encoders import load_encoders
from .evaluate import SCORES, device_of, score, write_scores
from .protocols import DREAMBOOTH

RESULTS, FEATURES = "results.json", ".features"
BATCH_SIZE = EvaluateOptions.batch_size
PUBLISHED = Path(__file__).with_name("published.json")
NAMES = {  # of methods, as the supplement writes them
    "deft": "DEFT",
    "para": "PaRa",
    "lora": "LoRA",
    "svdiff": "SVDiff",
    "dreambooth": "DreamBooth",
    "textual_inversion": "Textual Inversion",
}
ENCODERS = ("encoders", "clip", "dinov1", "dinov2", "protocol")  # options of `deft evaluate` that choose them


def title(job):
    """A row's name in tables and figures: "DEFT (rank=8)"."""
    return NAMES.get(job.row, job.row) + ("" if job.rank is None else f" (rank={job.rank})")


def compare(options):
    """Runs `deft compare`: takes `CompareOptions`, returns the number of jobs that have failed.

    Any number of processes may work on one comparison; the last of them to finish writes tables, figures and report.
    """
    plan = sweep.read_plan(options)
    root = Path(options.output_dir).expanduser()
    for job in plan.jobs:
        if not plan.scored(job):
            raise UserError(f"{options.plan}: there is nothing to score without `prompts`")
    figures.read_figures(plan.given)
    if report.STRENGTHS in plan.given:
        figures.read_figure(report.STRENGTHS, plan.given[report.STRENGTHS])
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output_dir {root}: {error}") from error
    facts = {}
    for name, part in plan.parts.items():  # what cannot be is said before hours of work
        _check_evaluate(part.evaluate)
        _own_device(part)
        facts[name] = _encoders(part, root, torch.device("cpu")).facts
    with open(root / CLAIM, "a") as work:
        sweep.lock(work, fcntl.LOCK_SH)
        failed = sweep.run(plan, root)
        _score_jobs(plan, root, facts)
        # Whoever lets go of the folder last finds nobody else in it.
        sweep.lock(work, fcntl.LOCK_UN)
        if sweep.lock(work, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _score_jobs(plan, root, facts)  # of another, what it has left, or what it drew too late for those who scored
            failed = _write(plan, root, options)
        else:
            print("the other processes go on; the last one writes tables, figures and report", file=sys.stderr)
    sweep.finish(failed, len(plan.jobs), root / TABLE)
    return failed


# scoring ------------------------------------------------------------------------------------------------------------


def _check_evaluate(given):
    """UserError if an option of the plan's `evaluate` is not of its kind."""
    for name, value in given.items():
        number = name == "batch_size"
        if not (type(value) is int and value > 0 if number else isinstance(value, str | None)):
            raise UserError(f"`evaluate`: {name} is {value!r}, expected a {'number from 1 up' if number else 'text'}")


@functools.lru_cache(maxsize=1)
def _load(asked, device, batch_size, cache_dir):
    return load_encoders(**dict(asked), device=device, batch_size=batch_size, cache_dir=cache_dir)


def _encoders(part, root, device):
    """Those of a part of the plan; the last ones stay in memory. UserError if one is not here."""
    asked = tuple((name, part.evaluate[name]) for name in ENCODERS if name in part.evaluate)
    return _load(asked, device, part.evaluate.get("batch_size", BATCH_SIZE), root / FEATURES)


def _own_device(part):
    """Where this process scores: on its own GPU, if there is one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return device_of(part.evaluate.get("device") or (f"cuda:{local}" if local < torch.cuda.device_count() else None))


def _score_jobs(plan, root, facts):
    """Writes `scores.json` for every job that has been drawn since it had one, or was scored by other means than `facts`."""
    todo = [job for job in plan.jobs if not _is_scored(job, plan, root, facts)]
    for job in tqdm(todo, desc="scoring", unit="job", disable=not todo or int(os.environ.get("RANK", 0)) > 0):
        folder = root / job.name
        with claimed(folder) as claim:
            ready = claim is not None and is_done(outcome(folder), job, plan)
            if ready and not _is_scored(job, plan, root, facts):
                _score(job, plan, root)


def _is_scored(job, plan, root, facts):
    """Whether it has scores of what is drawn and wanted now, all of them, by the encoders of `facts`."""
    file = root / job.name / SCORES
    if not file.is_file():
        return False
    drawn = [root / name / SAMPLES / RECORD for name in (job.name, _base(job).name)]
    if any(record.is_file() and record.stat().st_mtime > file.stat().st_mtime for record in drawn):
        return False
    found = read_json(file)
    which = lambda samples: [(s["file"], s.get("template")) for s in samples]
    return (
        found["protocol"] == _protocol(plan.parts[job.part])
        and found["encoders"] == facts[job.part]
        and which(found["samples"]) == which(_samples_to_score(job, plan, root))
        and (not found["missing"] or found.get("seen") == _seen(job, plan, root))  # nothing that could make it whole
    )


def _seen(job, plan, root):
    """A digest of the files that a job's scores are of, as they are now."""
    base = _base(job)
    files = [root / name / SAMPLES / s["file"] for name, own in ((job.name, job), (base.name, base))
             for s in _read_samples(root / name, own, plan)]  # fmt: skip
    with contextlib.suppress(UserError):  # there may be no references
        files += data.find_pictures(job.subject.instance_data_dir)
    told = [(file.name, *((stat.st_size, stat.st_mtime_ns) if (stat := _stat(file)) else ())) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _stat(file):
    with contextlib.suppress(OSError):
        return file.stat()


def _samples_to_score(job, plan, root):
    wanted, drifts = plan.scored(job), job.method != BASE  # the drift is from the base model's pictures
    samples = _read_samples(root / job.name, job, plan)
    return [s for s in samples if s.get("template") in wanted or ("unrelated" in s and drifts)]


def _score(job, plan, root):
    """Scores one job. What cannot be is told in its `scores.json`, and stops nothing else."""
    folder, part, base = root / job.name, plan.parts[job.part], _base(job)
    made, seen = origin(), _seen(job, plan, root)
    samples, references, missing = _samples_to_score(job, plan, root), [], []
    try:
        references = data.find_pictures(job.subject.instance_data_dir)
    except UserError as error:
        missing.append({"what": "references", "why": str(error)})
    before = _read_samples(root / base.name, base, plan) if job.method != BASE else []
    names = [job.subject.name, part.published.get(job.subject.name, "").casefold().replace(" ", "_")]
    drawn = next((name for name in names if name in INDIVIDUALS), None) if "encoders" in part.evaluate else None
    result = score(
        [folder / SAMPLES / sample["file"] for sample in samples],
        [sample["prompt"] for sample in samples],
        references,
        _encoders(part, root, _own_device(part)),
        _protocol(part),
        about=[{key: value for key, value in sample.items() if key != "prompt"} for sample in samples],
        base_images={(s["prompt"], s["seed"]): root / base.name / SAMPLES / s["file"] for s in before},
        subject=job.subject.words,
        class_name=job.subject.class_name,
        individual=drawn,
        progress=False,
    )
    result["missing"] = missing + result["missing"]
    write_scores(folder, result | {"made": made, "seen": seen})


def _base(job):
    return dataclasses.replace(job, method=BASE, row=BASE, rank=None)


def _protocol(part):
    return part.evaluate.get("protocol", DREAMBOOTH)


def _read_samples(folder, job, plan):
    """What was drawn of a job, each picture with its template, or with `unrelated`; [] if nothing was."""
    if not is_done(outcome(folder), job, plan):
        return []
    record, templates = read_json(folder / SAMPLES / RECORD), plan.prompts(job)
    templates = dict(zip(record["settings"]["prompt"], templates + [None] * len(plan.parts[job.part].unrelated)))
    more = lambda template: {"template": template} if template else {"unrelated": True}
    return [sample | more(templates[sample["prompt"]]) for sample in record["samples"]]


# results ------------------------------------------------------------------------------------------------------------


def _write(plan, root, options):
    """Writes all that the folder has to show in the place of what it showed, and returns how many jobs are not done."""
    results = _results(plan, root, options)
    if (root / RESULTS).is_file():
        figures.remove_all(root, read_json(root / RESULTS))
    for name, text in ((RESULTS, json.dumps(results, indent=2) + "\n"), (TABLE, sweep.table(root, plan))):
        with replacing(root / name) as part:
            part.write_text(text, encoding="utf-8")
    print("\n".join(path.read_text(encoding="utf-8") for path in tables.write(root, results) if path.suffix == ".md"))
    figures.draw_all(root, results, results["plan"])
    report.draw_strengths(root, results, results["plan"])
    report.write(root, results)
    print(f"tables, figures and report.html in {root}")
    return sum(row["status"] != "done" for row in results["rows"])


def _results(plan, root, options):
    """What `results.json` holds: every job with what came of it, and all that it takes to read the scores."""
    rows, parts, versions = [], {}, {}
    for name, part in plan.parts.items():
        subjects = dict.fromkeys(job.subject for job in plan.jobs if job.part == name)
        parts[name] = {
            "model": part.model,
            "protocol": _protocol(part),
            "subjects": {s.name: part.published.get(s.name) for s in subjects},
            "prompts": part.prompts,
            "unrelated": part.unrelated,
        }
    for job in plan.jobs:
        row, scored = _row(job, plan, root)
        rows.append(row)
        for key in ("scale", "encoders"):
            if key in scored:
                parts[job.part][key] = scored[key]
        versions = scored.get("versions", versions)
    return {
        "plan": plan.given,
        "settings": {k: v for k, v in vars(options).items() if v and k != "output_dir"},
        "parts": parts,
        "versions": versions,
        "device": _device(),
        "made": _made(rows) | {"tables": [origin()]},
        "rows": rows,
        "published": read_json(PUBLISHED),
    }


def _row(job, plan, root):
    """A job's entry, and its `scores.json`."""
    folder = root / job.name
    found = outcome(folder)
    state, training = status(found, job, plan), found.get("training", {})
    scored = read_json(folder / SCORES) if state == "done" and (folder / SCORES).is_file() else {}
    if training:
        weights = [path for name in WEIGHTS for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
        training |= {"size_mb": round(sum(path.stat().st_size for path in weights) / 1e6, 3)}
        steps = read_json(folder / SETTINGS)["max_train_steps"]
        if training["steps"] != steps:  # it was stopped and went on, and tells of its last process alone
            training |= {"steps": steps, "seconds": None, "images_per_second": None, "memory_gb": None}
    made = found.get("made", {}) | ({"scored": scored.get("made")} if scored else {})
    by_prompt, counts_by_prompt = _by_prompt(scored.get("samples", []))
    row = {
        "job": job.name,
        "part": job.part,
        "subject": job.subject.name,
        "row": title(job),
        "method": job.method,
        "rank": job.rank,
        "seed": job.seed,
        "status": state,
        "said": "" if state in ("done", "waiting") else found["said"],
        "scores": scored.get("scores", {}),
        "counts": scored.get("counts", {}),  # of pictures, each score's
        "by_prompt": by_prompt,
        "counts_by_prompt": counts_by_prompt,
        "missing": scored.get("missing", []),
        "training": training,
        "options": found.get("options", {}),
        "made": made,
        "folder": job.name,
    }
    return row, scored


def _made(rows):
    """{"trained", "drawn", "scored"}: the commits that have done so, how many jobs of each, and when the first and the last
    were begun; null where a job has no record of it."""
    found = {}
    for step in ("trained", "drawn", "scored"):
        own = [row for row in rows if row["status"] == "done" and not (step == "trained" and row["method"] == BASE)]
        own = [row["made"].get(step) or {} for row in own if step != "scored" or row["scores"]]
        for commit in dict.fromkeys(made.get("commit") for made in own):
            same = [made for made in own if made.get("commit") == commit]
            times = sorted(made["time"] for made in same if made) or [None]
            entry = {"commit": commit, "jobs": len(same), "first": times[0], "last": times[-1]}
            found.setdefault(step, []).append(entry)
    return found


def _by_prompt(samples):
    """{template: {score: mean}} of the pictures of the subject, and {template: {score: number of pictures}}."""
    found = {}
    for sample in samples:
        if not sample.get("unrelated"):
            for name in tables.SIMILARITIES:
                if name in sample:
                    found.setdefault(sample["template"], {}).setdefault(name, []).append(sample[name])
    of_each = lambda what: {t: {name: what(values) for name, values in scores.items()} for t, scores in found.items()}
    return of_each(lambda values: math.fsum(values) / len(values)), of_each(len)


def _device():
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them seen"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} threads"
