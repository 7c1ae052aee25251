"""A comparison as one HTML page that needs no network: tables, plots, figures, every picture, costs, and what is missing.

It is made of `results.json`, the figures beside it, and the jobs' folders; `report.html` is its template. A plan may ask for
the same pictures at several weights of what was learned, as it asks for a figure, one strip for each line and prompt:

    strengths: {subjects: [dog], rows: [DEFT (rank=8), LoRA (rank=8)], prompts: ["a photo of {} on the beach"]}
"""

import base64
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from statistics import fmean

import jinja2
import markupsafe
import yaml
from PIL import Image

from .. import UserError, read_json
from ..data import read_image
from ..options import SampleOptions
from ..sweep import BASE
from ..writing import replacing
from . import tables
from .figures import DPI, FIGURES, SCORES, find_job, heading, photographs, plots, read_figure, read_figures, read_samples
from .metrics import t_quantile

REPORT = "report.html"  # in the comparison's folder; the template beside this file has the same name
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
STRENGTH, STRENGTHS = "strength", "strengths"  # a job's folder, and key of the plan
TINY = 128  # a picture no wider is shown in squares
FIGURE_SIDE, SCREEN = 2000, 120  # pixels of a figure, at most, and per inch on the page
FILTERS = ("subject", "row", "seed", "prompt")
BUDGET = 40e6  # bytes of all embedded pictures: what browsers open without a wait
SIDES = (None, 1024, 512, 256, 128, 64)  # pixels, the first that keeps to the budget; None leaves files as they are
WEB = {f"image/{kind}" for kind in ("png", "jpeg", "webp", "gif", "avif", "bmp")}  # what every browser shows
WEBP = {"quality": 80, "use_sharp_yuv": True}  # half of what a JPEG takes whose colours are as sharp
PROBES = 24  # pictures that are encoded to foresee the size of all


# strength -------------------------------------------------------------------------------------------------------------


def draw_strengths(root, results, plan):
    """Draws what the plan's `strengths` asks for, a figure's subjects, rows and prompts, at several weights.

    What cannot be drawn is named on stderr and returned, a list of texts. The base model and new words (textual inversion)
    have no strength.
    """
    spec, missing = read_figure(STRENGTHS, plan[STRENGTHS]) if plan.get(STRENGTHS) else None, []
    for subject, label in itertools.product(spec["subjects"], spec["rows"]) if spec else ():
        job = find_job(results, subject, label, spec.get("seed"))
        try:
            if job is None or job["status"] != "done":
                raise UserError("the job is not done" if job else "there is no such job")
            draw_strength(Path(root) / job["folder"], spec["prompts"])
        except UserError as error:
            missing.append(f"{STRENGTHS}: {subject}, {label}: {error}")
    for text in missing:
        print(f"warning: {text}", file=sys.stderr)
    return missing


def draw_strength(folder, templates, weights=WEIGHTS):
    """Draws a job's prompts again at several weights of what it has learned, to `strength/<weight>/`, as `deft sample` does,
    with the settings and the first seed of its samples. What is there already stays, unless the samples are newer. UserError
    if it has no strength, or no picture of one of the templates.
    """
    from ..sample import RECORD, sample  # imports diffusers

    if (method := read_json(folder / "job.json")["method"]) in (BASE, "textual_inversion"):
        raise UserError(f"{method} has no strength")
    prompts = {s["template"]: s["prompt"] for s in read_samples(folder)}
    if unknown := [template for template in templates if template not in prompts]:
        raise UserError(f"{folder} has no picture of {unknown[0]!r}")
    texts = [prompts[template] for template in templates]
    samples = folder / "samples" / RECORD
    settings = read_json(samples)["settings"]
    settings |= {"prompt": texts, "prompts_file": None, "num_images_per_prompt": 1, "overwrite_output_dir": True,
                 "adapter": [str(folder)]}  # fmt: skip
    for weight in weights:
        target = folder / STRENGTH / f"{weight:g}"
        record = target / RECORD
        fresh = record.is_file() and record.stat().st_mtime_ns >= samples.stat().st_mtime_ns
        drawn = read_json(record)["samples"] if fresh else []
        if [(s["prompt"], s["seed"]) for s in drawn] != [(text, settings["seed"]) for text in texts]:
            sample(SampleOptions(**settings | {"adapter_weight": [weight], "output_dir": str(target)}))


# pictures -------------------------------------------------------------------------------------------------------------


def encode(file, side):
    """A picture as a data URI: its file as it is, or, with `side`, a WebP at most so many pixels wide and high where that
    takes less. A file that browsers do not show becomes a WebP too. UserError if it is no picture."""
    with Image.open(file) as found:
        kind, data = found.get_format_mimetype(), Path(file).read_bytes()
    if side or kind not in WEB:
        image, webp = read_image(file), io.BytesIO()
        image.thumbnail((side, side) if side else image.size, Image.LANCZOS)
        image.save(webp, "WEBP", **WEBP)
        if kind not in WEB or webp.tell() < len(data):
            kind, data = "image/webp", webp.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def choose_side(files, budget=BUDGET):
    """The first of `SIDES` with which all pictures stay within the budget, as some of them foretell; else the last."""
    probes = files[:: max(1, len(files) // PROBES)]
    for side in SIDES:
        if not files or fmean(len(encode(file, side)) for file in probes) * len(files) <= budget:
            return side
    return SIDES[-1]


# what the page says ---------------------------------------------------------------------------------------------------


def _scores(scores):
    """The scores of a job or of a picture, in words."""
    said = []
    for key, name in SCORES.items():
        value = scores.get(key)
        if isinstance(value, bool):
            said.append(f"{name}: {'yes' if value else 'no'}")
        elif value is not None:
            said.append(f"{name} {value:.4g}")
    return " · ".join(said)


def _shot(root, file, title, facts, **filters):
    """What the template shows of a picture. Of `filters` (subject, row, seed, prompt) what is left out fits every choice."""
    return {"path": file, "file": os.path.relpath(file, root), "title": title, "label": title, "facts": facts} | filters


def _sample(root, row, folder, sample):
    seeds = (_seed(row), f"picture seed {sample['seed']}")
    unrelated = "unrelated to the subject" if sample.get("unrelated") else ""
    facts = (row["called"], row["row"], *seeds, unrelated, _scores(sample))
    filters = {} if row["method"] == BASE else {"seed": row["seed"]}
    return _shot(root, folder / sample["file"], sample["prompt"], " · ".join(filter(None, facts)), subject=row["subject"],
                 row=row["row"], prompt=sample.get("template") or sample["prompt"], **filters)  # fmt: skip


def _seed(row):
    return "" if row["method"] == BASE else f"training seed {row['seed']}"


def _title(row):
    return " · ".join(filter(None, (row["called"], row["row"], _seed(row))))


def _jobs(root, results, missing):
    """The photographs of each subject, then its jobs. Adds to `missing` what jobs have not done."""
    jobs = []
    for subject in dict.fromkeys(row["subject"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["subject"] == subject]
        photos, called = next(filter(None, (photographs(root / row["folder"]) for row in rows)), []), rows[0]["called"]
        if not photos:
            missing.append((f"photographs of {subject}", "they are not where they were when it was trained"))
        shots = [_shot(root, file, file.name, f"{called} · photograph", subject=subject) for file in photos]
        jobs.append({"title": f"{called} · photographs", "shots": shots})
        jobs += [_job(root, row, missing) for row in rows]
    return jobs


def _job(root, row, missing):
    shots = [_sample(root, row, root / row["folder"] / "samples", sample) for sample in read_samples(root / row["folder"])]
    if row["status"] != "done":
        missing.append((row["job"], f"{row['status']}. {row['said']}"))
    elif not row["scores"]:
        missing.append((f"scores of {row['job']}", "nothing has scored it"))
    missing += [(f"{row['job']}, {one['what']}", one["why"]) for one in row["missing"]]
    return {"title": _title(row), "scores": _scores(row["scores"]), "shots": shots}


def _strips(root, results):
    """A strip for each job and prompt that has been drawn at several weights."""
    strips = []
    for row in results["rows"]:
        drawn = {}
        for record in (root / row["folder"] / STRENGTH).glob("*/samples.json"):
            told = read_json(record)
            (weight,) = told["settings"]["adapter_weight"]
            for sample in told["samples"]:
                shot = _sample(root, row, record.parent, sample) | {"label": f"{weight:g}"}
                shot["facts"] += f" · weight {weight:g}"
                drawn.setdefault(sample["prompt"], []).append((weight, shot))
        for prompt, shots in drawn.items():
            shots = [shot for _, shot in sorted(shots, key=lambda pair: pair[0])]
            strips.append({"title": _title(row), "scores": prompt, "shots": shots})
    return strips


def _figures(root, results):
    found = []
    for name, spec in read_figures(results["plan"]).items():
        file = root / FIGURES / f"{name}.png"
        title = heading(results, name, spec)
        facts = f"lines: {', '.join(spec['rows'])}; columns: {', '.join(spec['prompts'])}".replace("{}", "[V]")
        found.append(_shot(root, file, title, facts) | {"kind": "figure"})
    return found


def _plots(root, results):
    """The plots that there are, as SVG in the page's colours."""
    found = []
    for name in plots(results):
        file = root / FIGURES / f"{name}.svg"
        if file.is_file():
            svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
            svg = re.sub(r' id="[^"]*[_-][^"]*"', "", svg)  # of groups, which are the same in every plot
            svg = re.sub(r'(id="|#)(?=[mp][0-9a-f]{10}\b)', rf"\1{name}-", svg)  # and those of shapes, which are referred to
            found.append(markupsafe.Markup(svg.replace("#000000", "currentColor")))
    return found


def _settings(results):
    """What everything was made with: (heading, [(name, text) …]) each."""
    say = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    told = lambda facts: "; ".join(f"{key.replace('_', ' ')}: {say(value)}" for key, value in facts.items())
    known = lambda entry: {"commit": "not recorded"} | {key: value for key, value in entry.items() if value is not None}
    made = {name: " · ".join(told(known(entry)) for entry in entries) for name, entries in results["made"].items()}
    made["tables, figures and this page"] = made.pop("tables")
    made |= {"device": results["device"]} | results["settings"]
    found = [("This comparison", made), ("Versions", results["versions"])]
    for name, part in results["parts"].items():
        subjects = [f"{shown} ({subject})" if shown else subject for subject, shown in part["subjects"].items()]
        facts = {"subjects": ", ".join(subjects), "base model": part["model"], "protocol": part["protocol"]}
        if "scale" in part:
            facts["similarities"] = f"cosines times {part['scale']:g}"
        facts |= {encoder: told(about) for encoder, about in part.get("encoders", {}).items()}
        found.append((f"Scores of {name}" if name else "Scores", facts))
    own = {}
    for row in results["rows"]:
        if row["options"]:
            own.setdefault(row["row"], {})[row["part"]] = row["options"]
    own = {label: told if len(set(map(say, told.values()))) > 1 else told.popitem()[1] for label, told in own.items()}
    found.append(("Options of training, where they are not the defaults", own))
    return [(heading, [(key, say(value)) for key, value in facts.items()]) for heading, facts in found if facts]


def _noise(results):
    """What the figures do not know, in sentences."""
    trained, seeds = [row for row in results["rows"] if row["method"] != BASE], {}
    for row in trained:
        if row["scores"]:
            seeds.setdefault((row["part"], row["subject"], row["row"]), set()).add(row["seed"])
    counts = sorted(map(len, seeds.values())) or [0]
    least, most = counts[0], counts[-1]
    subjects = list(dict.fromkeys(row["called"] for row in results["rows"]))
    every = sorted({row["seed"] for row in trained})
    named = f"training seed{'s' * (len(every) != 1)} ({', '.join(map(str, every))})"
    if most > 1:
        factor = t_quantile(most - 1) / most**0.5
        count = f"{most}" if least == most else f"{least} to {most}"
        first = (
            f"A row is, for each subject, a mean over {count} {named}; ± is half the width of the 95 % t-interval, which is "
            f"{factor:.2f} standard deviations with {most} seeds{'' if least > 1 else ', and is not known with one'}. Where "
            "the intervals of two rows overlap, this comparison does not tell which is better."
        )
    else:
        first = f"No row has more than one of the {named}: no interval can be given, and no difference told from chance."
    return [
        first,
        "The intervals tell how much another training seed would change, and nothing else: subjects "
        f"({', '.join(subjects)}), photographs, prompts and encoders are the same throughout, and others may order the "
        "methods otherwise. Many rows are compared at once, so that some differences will look sure by chance.",
        "Printed figures are the supplement's, from other base models, data and pictures: what may be compared is their "
        "order, not their size.",
    ]


def _embed(shots, missing, budget=BUDGET):
    """Puts the pictures' data into `shots`, and returns how, in words."""
    for shot in shots:
        try:
            size = read_image(shot["path"]).size  # all of it, since a browser shows no half of a file
            shot |= {"tiny": max(size) <= TINY, "width": round(size[0] * SCREEN / DPI)}
        except UserError:
            missing.append((shot["file"], "it is no picture" if shot["path"].is_file() else "it is not there"))
            shot["path"] = None
    there = [shot for shot in shots if shot["path"]]
    side = choose_side([shot["path"] for shot in there if "kind" not in shot], budget)
    for shot in there:
        shot["uri"] = encode(shot["path"], FIGURE_SIDE if "kind" in shot else side)
    if side is None:
        return "The pictures are here as they were drawn."
    size = sum(len(shot["uri"]) for shot in there) / 1e6
    return (
        f"So that this page stays small, its pictures are WebP and at most {side} pixels wide and high, {size:.0f} MB in "
        "all; each tells its file, which lies beside the page where that was made."
    )


def write(root, results):
    """Writes `report.html` into a comparison's folder and returns its path. What is missing is told on the page."""
    root, missing, called = Path(root), [], tables.names(results)
    results = results | {"rows": [row | {"called": called[row["subject"]]} for row in results["rows"]]}
    jobs, strips, figures = _jobs(root, results, missing), _strips(root, results), _figures(root, results)
    drawn = [shot for job in jobs for shot in job["shots"]]
    embedded = _embed([*drawn, *(shot for strip in strips for shot in strip["shots"]), *figures], missing)
    made = tables.build(results)
    costs = made.pop("costs")
    said = {
        "noise": ("How far to trust it", _noise(results)),
        "tables": ("Tables", made),
        "plots": ("Plots", _plots(root, results)),
        "figures": ("Figures", figures),
        "pictures": ("Pictures", jobs),
        "strength": ("Strength", strips),
        "costs": ("Costs", {"costs": costs}),
        "settings": ("Settings and versions", _settings(results)),
        "missing": (f"What is missing ({len(missing)})", missing),
    }
    model = (results["plan"] | results["settings"]).get("pretrained_model_name_or_path", "several models")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template(REPORT).stream(
        title=f"Comparison on {model}",
        parts={name: heading for name, (heading, content) in said.items() if content or name == "missing"},
        filters={name: list(dict.fromkeys(shot[name] for shot in drawn if name in shot)) for name in FILTERS},
        called=called,
        embedded=embedded,
        plan=yaml.safe_dump(results["plan"], sort_keys=False, allow_unicode=True),
        **{name: content for name, (_, content) in said.items()},
    )
    with replacing(root / REPORT) as part:
        page.dump(str(part), encoding="utf-8")  # piece by piece: the pictures are in memory once
    return root / REPORT
