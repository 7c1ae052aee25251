"""Figures and plots of a comparison, from nothing but its `results.json` and the jobs' folders.

The plan says which figures. Each is a grid: a line for each subject and row, a column for each prompt, and the concept's
photograph before them (figures 1 to 5 of the supplement to arXiv 2509.22793 are such grids):

    figures:
      figure1:
        title: Fine-tuning strategies in six environments   # optional
        subjects: [dog]                                     # names
        rows: [base, LoRA (rank=4), DEFT (rank=8)]          # as `row` in results.json says them
        prompts: [a photo of {} on the beach]               # as the plan's prompts say them
        seed: 0                                             # of training; else the first that a row has

What a figure asks for and no job has drawn is an empty cell that says so.
"""

import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageFont
from scipy import stats

from .. import UserError, near, read_json
from ..data import find_pictures, read_image
from ..grid import wrap
from ..writing import replacing

FIGURES = "figures"  # folder in the comparison's, and key of the plan
SPEC = {"title": str, "subjects": list, "rows": list, "prompts": list, "seed": int}
NEEDED = ("subjects", "rows", "prompts")

DPI = 300
CELL, GAP = 320, 24  # pixels; five of them for each of a 64-pixel picture's
TEXT, TITLE = 7, 9  # sizes in points
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pages are the same everywhere
    "font.size": TEXT,
    "pdf.fonttype": 42,  # TrueType, which can be searched and edited; matplotlib's own choice is Type 3
    "svg.fonttype": "none",
    "svg.hashsalt": "deft",  # the same file for the same data
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}
SAVED = {"png": {"dpi": DPI}, "pdf": {"metadata": {"CreationDate": None}}, "svg": {"metadata": {"Date": None}}}

SCORES = {  # of a job, and what they are called; fidelity first, in the order of preference for a plot
    "dinov2": "DINOv2",
    "dinov1": "DINOv1",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "individual": "this individual",
    "scene": "that scene",
    "diversity": "diversity",
    "drift": "drift",
}
FIDELITY = ("dinov2", "dinov1", "clip_i")
PLOTS = {  # file -> scores to put on x and y, the first that any job has
    "fidelity_prompt": (("clip_t",), FIDELITY, "Fidelity against following the prompt"),
    "fidelity_drift": (("drift",), FIDELITY, "Fidelity against forgetting"),
    "individual_scene": (("scene",), ("individual",), "Share of pictures that show this individual, and that scene"),
}
AXES = {"drift": "drift on unrelated prompts (less is better)"}
COLOURS = {  # of methods: Okabe and Ito's, told apart by colour-blind eyes too
    "deft": "#d55e00",
    "para": "#009e73",
    "lora": "#0072b2",
    "svdiff": "#cc79a7",
    "dreambooth": "#e69f00",
    "textual_inversion": "#56b4e9",
    "base": "#777777",
}
MARKERS = "osD^vP*X"


# what there is to show ------------------------------------------------------------------------------------------------


def read_samples(folder):
    """The records of a job's pictures, as `scores.json` has them, else, unscored, as `samples.json` has; [] if none is there.

    Each has file, prompt, seed and, where it is known, template: the prompt with {} for the subject.
    """
    folder = Path(folder)
    record = folder / "samples" / "samples.json"
    if not record.is_file():
        return []
    record = read_json(record)
    samples, templates = record["samples"], {}
    if (folder / "job.json").is_file():
        drawn = read_json(folder / "job.json").get("drawn", {}).get("prompt", [])
        templates = dict(zip(record["settings"].get("prompt", []), drawn))
    scored = read_json(folder / "scores.json")["samples"] if (folder / "scores.json").is_file() else []
    scored = {sample["file"]: sample for sample in scored}
    return [
        {"template": templates.get(sample["prompt"])} | sample | scored.get(sample["file"], {}) for sample in samples
    ]


def concept(folder):
    """The subject's first photograph, a PIL image; None if it is not there any more."""
    job = Path(folder) / "job.json"
    where = read_json(job)["subject"]["instance_data_dir"] if job.is_file() else None
    try:
        return read_image(find_pictures(where)[0]) if where else None
    except UserError:
        return None


def read_figures(plan):
    """The plan's figures, {name: what to show}. UserError names what is wrong with one."""
    figures = plan.get(FIGURES) or {}
    if not isinstance(figures, dict):
        raise UserError(f"`{FIGURES}` is {figures!r}, expected names with {', '.join(SPEC)}")
    for name, spec in figures.items():
        if not isinstance(spec, dict):
            raise UserError(f"{FIGURES}: {name} is {spec!r}, expected {', '.join(SPEC)}")
        for key, value in spec.items():
            if key not in SPEC:
                raise UserError(f"{FIGURES}: {name} has unknown {key}{near(key, SPEC)}; expected {', '.join(SPEC)}")
            if not isinstance(value, SPEC[key]):
                raise UserError(f"{FIGURES}: `{key}` of {name} is {value!r}, expected a {SPEC[key].__name__}")
        if lacking := [key for key in NEEDED if not spec.get(key)]:
            raise UserError(f"{FIGURES}: {name} says no {lacking[0]}")
    return figures


# grids ----------------------------------------------------------------------------------------------------------------


def at_print_size(image):
    """A picture as large as fits a cell: small ones by whole factors, each pixel a square, larger ones smoothly reduced."""
    factor = CELL // max(image.size)
    if factor:
        return image.resize((image.width * factor, image.height * factor), Image.NEAREST)
    scale = CELL / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)


class _Page:
    """A figure in pixels at `DPI`, from the top left."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.figure = Figure((width / DPI, height / DPI), dpi=DPI)

    def text(self, x, y, lines, **how):
        self.figure.text(x / self.width, 1 - y / self.height, "\n".join(lines), **{"va": "top", "linespacing": 1.2} | how)

    def cell(self, x, y, image):
        """The picture in the middle of a cell; for None an empty one."""
        width, height = (CELL, CELL) if image is None else image.size
        x, y = x + (CELL - width) // 2, y + (CELL - height) // 2
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.grid(False)
        if image is not None:
            axes.imshow(np.asarray(image), interpolation="none", aspect="auto")
            axes.set_axis_off()
            return
        axes.set(xticks=[], yticks=[], facecolor="#f3f3f1")
        axes.spines[:].set_visible(False)
        axes.text(0.5, 0.5, "missing", ha="center", va="center", color="#6b6b6b", transform=axes.transAxes)


def _font(points):
    return ImageFont.truetype(font_manager.findfont(STYLE["font.family"]), points * DPI / 72)


def draw_grid(lines, columns, title, note):
    """A matplotlib figure of labelled pictures.

    `lines` is a list of (subject, photograph, [(label, [picture …]) …]) with PIL images, None for one that is missing;
    `columns` are the texts above the pictures. `title` and `note` stand on top.
    """
    font, bold = _font(TEXT), _font(TITLE)
    step, high = round(TEXT * 1.2 * DPI / 72), round(TITLE * 1.3 * DPI / 72)
    labels = [[wrap(font, label, CELL) for label, _ in rows] for _, _, rows in lines]
    heads = [wrap(font, text, CELL) for text in ("concept", *columns)]
    left = GAP + max(round(font.getlength(text)) for group in labels for label in group for text in label)
    width = left + GAP + len(heads) * (CELL + GAP)
    titles, notes = wrap(bold, title, 0.94 * (width - 2 * GAP)), wrap(font, note, width - 2 * GAP)
    body = 3 * GAP + len(titles) * high + len(notes) * step + max(map(len, heads)) * step
    height = body + GAP + sum(len(rows) * (CELL + GAP) + GAP for _, _, rows in lines)
    page = _Page(width, height)
    page.text(GAP, GAP, titles, fontsize=TITLE, weight="bold", linespacing=1.3)
    page.text(GAP, GAP + len(titles) * high, notes, color="#555555")
    for k, text in enumerate(heads):
        page.text(left + GAP + k * (CELL + GAP) + CELL / 2, body - GAP / 3, text, ha="center", va="bottom")
    y = body
    for (subject, photograph, rows), group in zip(lines, labels):
        middle = y + (len(rows) * (CELL + GAP) - GAP - CELL) // 2
        page.cell(left + GAP, middle, photograph and at_print_size(photograph))
        page.text(left + GAP + CELL / 2, middle + CELL + GAP / 3, [subject], ha="center", color="#555555")
        for (_, pictures), label in zip(rows, group):
            page.text(GAP, y + CELL / 2, label, va="center")
            for k, picture in enumerate(pictures, 1):
                page.cell(left + GAP + k * (CELL + GAP), y, picture and at_print_size(picture))
            y += CELL + GAP
        y += GAP
    return page.figure


def draw_figure(root, results, name, spec):
    """The matplotlib figure that `spec` of the plan asks for, as the module says, and what is missing in it, as texts."""
    root, lines, settings, missing = Path(root), [], {}, []
    for subject in spec["subjects"]:
        photograph, rows = None, []
        for label in spec["rows"]:
            found = [row for row in results["rows"] if (row["subject"], row["row"]) == (subject, label)]
            wanted = [row for row in found if spec.get("seed") in (None, row["seed"]) or row["method"] == "base"]
            job = min(wanted, key=lambda row: row["seed"], default=None)
            if job is None:
                missing.append(f"{name}: no job of {subject}, {label}")
                rows.append((label, [None] * len(spec["prompts"])))
                continue
            folder = root / job["folder"]
            photograph = photograph or concept(folder)
            samples = {}
            for sample in read_samples(folder):
                samples.setdefault(sample["template"], sample)
            pictures = []
            for prompt in spec["prompts"]:
                file = folder / "samples" / samples[prompt]["file"] if prompt in samples else None
                pictures.append(read_image(file) if file and file.is_file() else None)
                if pictures[-1] is None:
                    missing.append(f"{name}: {job['job']} has no picture of {prompt!r}")
                else:
                    _add(settings, "picture seed", samples[prompt]["seed"])
            if job["method"] != "base":
                _add(settings, "training seed", job["seed"])
            record = folder / "samples" / "samples.json"
            for key, said in (read_json(record)["settings"] if record.is_file() else {}).items():
                if key in SETTINGS:
                    _add(settings, SETTINGS[key], said)
            rows.append((label, pictures))
        lines.append((subject, photograph, rows))
    number = name.removeprefix("figure")
    title = (f"Figure {number}. " if number.isdigit() else "") + spec.get("title", "" if number.isdigit() else name)
    note = ", ".join(f"{key} {' and '.join(map(str, values))}" for key, values in settings.items())
    columns = [prompt.replace("{}", "[V]") for prompt in spec["prompts"]]
    return draw_grid(lines, columns, title.strip(), note), missing


SETTINGS = {"pretrained_model_name_or_path": "model", "num_inference_steps": "denoising steps", "guidance_scale": "guidance"}


def _add(settings, key, value):
    if value not in settings.setdefault(key, []):
        settings[key].append(value)


# plots ----------------------------------------------------------------------------------------------------------------


def interval(values):
    """Mean of some numbers, and half the width of its 95 % t-interval, None for a single one."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
    return float(np.mean(values)), half


def points(results, x, y):
    """Where each row and subject stands: a list of {row, subject, method, rank, n, x, y, dx, dy}.

    x and y are means over seeds, dx and dy half the widths of their 95 % t-intervals, None for a single seed.
    """
    key = lambda row: (row["subject"], row["row"])
    found = []
    for (subject, label), rows in itertools.groupby(sorted(results["rows"], key=key), key):
        rows = list(rows)
        both = [r["scores"] for r in rows if r.get("scores") and None not in (r["scores"].get(x), r["scores"].get(y))]
        if both:
            (mx, dx), (my, dy) = (interval([scores[axis] for scores in both]) for axis in (x, y))
            found.append({"row": label, "subject": subject, "method": rows[0]["method"], "rank": rows[0]["rank"],
                          "n": len(both), "x": mx, "y": my, "dx": dx, "dy": dy})  # fmt: skip
    return found


def draw_plot(results, x, y, title):
    """A matplotlib figure: a point for each row (colour) and subject (shape), bars for the 95 % t-intervals over seeds.

    Of several ranks of a method the highest is filled, the lowest hollow. The points' group ids are `point-0` … in the order
    of `points`.
    """
    order = {label: k for k, label in enumerate(dict.fromkeys(row["row"] for row in results["rows"]))}
    found = sorted(points(results, x, y), key=lambda p: (order[p["row"]], p["subject"]))
    subjects = sorted({p["subject"] for p in found})
    faces = {}
    for p in found:
        ranks = sorted({q["rank"] for q in found if q["method"] == p["method"] and q["rank"] is not None})
        share = ranks.index(p["rank"]) / (len(ranks) - 1) if len(ranks) > 1 else 1.0
        faces[p["row"]] = COLOURS.get(p["method"], "#000000"), share
    figure = Figure((6.4, 3.6))
    axes = figure.add_axes((0.09, 0.13, 0.6, 0.77))
    axes.set_title(title, loc="left", fontsize=TITLE, weight="bold")
    axes.set_xlabel(AXES.get(x, SCORES[x]))
    axes.set_ylabel(AXES.get(y, SCORES[y]))
    how = lambda colour, share: {"color": colour, "markerfacecolor": (colour, share), "markersize": 5.5, "mew": 1.2}
    for k, p in enumerate(found):
        bars = axes.errorbar(p["x"], p["y"], xerr=p["dx"], yerr=p["dy"], fmt=MARKERS[subjects.index(p["subject"]) % len(MARKERS)],
                             elinewidth=0.7, capsize=0, **how(*faces[p["row"]]))  # fmt: skip
        bars.lines[0].set_gid(f"point-{k}")
    handles = [Line2D([], [], marker="o", ls="", label=label, **how(*face)) for label, face in faces.items()]
    axes.add_artist(axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0)))
    handles = [Line2D([], [], marker=MARKERS[k % len(MARKERS)], ls="", label=subject, color="#777777", markersize=5.5)
               for k, subject in enumerate(subjects)]  # fmt: skip
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(1.02, 0.0))
    return figure


def plots(results):
    """What can be plotted: {name: (x, y, title)}, each of them a score that some job has."""
    scored = {key for row in results["rows"] for key in row.get("scores") or {}}
    found = {}
    for name, (xs, ys, title) in PLOTS.items():
        x, y = (next((score for score in scores if score in scored), None) for scores in (xs, ys))
        if x and y and points(results, x, y):
            found[name] = x, y, title
    return found


def draw_all(root, results, plan):
    """Writes `figures/<name>.png` and `.pdf` for each figure of the plan, and the plots, as `.svg` too.

    What is missing is named on stderr and returned, a list of texts; the rest is drawn.
    """
    folder, missing = Path(root) / FIGURES, []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, spec in read_figures(plan).items():
            figure, lacking = draw_figure(root, results, name, spec)
            missing += lacking
            _save(figure, folder / name, ("png", "pdf"))
        for name, (x, y, title) in plots(results).items():
            _save(draw_plot(results, x, y, title), folder / name, ("png", "pdf", "svg"))
    for text in missing:
        print(f"warning: {text}", file=sys.stderr)
    return missing


def _save(figure, stem, formats):
    for kind in formats:
        with replacing(stem.with_suffix(f".{kind}")) as part:
            figure.savefig(part, format=kind, **SAVED[kind])
