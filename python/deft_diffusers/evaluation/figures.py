"""Figures and plots of a comparison, from nothing but its `results.json` and the jobs' folders.

The plan says which figures. Each is a grid: a line for each subject and row, a column for each prompt, and the concept's
photograph before them (figures 1 to 5 of the supplement to arXiv 2509.22793 are such grids):

    figures:
      figure1:
        title: Fine-tuning strategies in six environments   # optional
        subjects: [dog]                                     # as their folders are called
        rows: [base, LoRA (rank=4), DEFT (rank=8)]          # as `row` in results.json says them
        prompts: ["a photo of {} on the beach"]             # as the plan's prompts say them
        seed: 0                                             # of training; else the first that a row has

What a figure asks for and no job has drawn is an empty cell that says so.
"""

import html
import itertools
import re
import sys
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageFont

from .. import UserError, near, read_json
from ..data import find_pictures, read_image
from ..grid import wrap
from ..sweep import BASE
from ..writing import replacing
from .metrics import mean_interval
from .tables import ALL, OTHERS, SIMILARITIES, names, said_encoder, said_scale

FIGURES = "figures"  # folder in the comparison's, and key of the plan
SPEC = {"title": str, "subjects": list, "rows": list, "prompts": list, "seed": int}
NEEDED = ("subjects", "rows", "prompts")

DPI = 300
SETTINGS = {  # what the note under a title says
    "pretrained_model_name_or_path": "base model {}",
    "steps": "{} training steps",  # where rows differ, beside each
    "num_inference_steps": "{} denoising steps",
    "guidance_scale": "guidance {}",
    "training": "training seed {}",
    "picture": "picture seed {}",
}
CELL, GAP = 320, 24  # pixels: a cell is five for each of a 64-pixel picture
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
SAVED = {
    "png": {"dpi": DPI},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}, "transparent": True},
}

SCORES = SIMILARITIES | OTHERS
FIDELITY = ("dinov2", "dinov1", "clip_i")
SHARES = ("individual", "scene")  # scores that are shares of pictures
PLOTS = {  # file -> scores to put on x and y, the first that any job has, and the title
    "fidelity_prompt": (("clip_t",), FIDELITY, "Fidelity against following the prompt"),
    "fidelity_drift": (("drift",), FIDELITY, "Fidelity against forgetting"),
    "individual_scene": (("scene",), ("individual",), "Share of pictures that show this individual, and that scene"),
}
AXES = {"drift": "drift on unrelated prompts, less is better", "individual": "share that shows this individual",
        "scene": "share that shows that scene"}  # fmt: skip
COLOURS = {  # of methods: Okabe and Ito's, told apart by colour-blind eyes too
    "deft": "#d55e00",
    "para": "#009e73",
    "lora": "#0072b2",
    "svdiff": "#cc79a7",
    "dreambooth": "#e69f00",
    "textual_inversion": "#56b4e9",
    "base": "#777777",
}
MARKERS = "osD^vP*X"  # of subjects
FILLS = ("full", "none", "bottom", "top")  # of a method's rows


# what there is to show ------------------------------------------------------------------------------------------------


def read_samples(folder):
    """The records of a job's pictures, as `scores.json` has them or, not scored, `samples.json`; [] if none is there.

    Each has file, prompt, seed and, where it is known, template: the prompt with {} for the subject.
    """
    folder = Path(folder)
    record = folder / "samples" / "samples.json"
    if not record.is_file():
        return []
    record = read_json(record)
    samples, templates = record["samples"], {}
    if (folder / "job.json").is_file():
        drawn = read_json(folder / "job.json").get("drawn", {})
        drawn = [*drawn.get("prompt", []), *drawn.get("unrelated", [])]
        templates = dict(zip(record["settings"].get("prompt", []), drawn))
    scored = read_json(folder / "scores.json")["samples"] if (folder / "scores.json").is_file() else []
    which = lambda sample: (sample["file"], sample["prompt"], sample["seed"])  # files are drawn over
    scored = {which(sample): sample for sample in scored}
    return [{"template": templates.get(sample["prompt"])} | sample | scored.get(which(sample), {}) for sample in samples]


def photographs(folder):
    """The files that a job has learned its subject from; [] if they are not there any more."""
    job = Path(folder) / "job.json"
    where = Path(read_json(job)["subject"]["instance_data_dir"]) if job.is_file() else None
    try:
        return find_pictures(where) if where else []
    except UserError:
        return []


def _read(file):
    """A picture, or None if it is not there or is none."""
    try:
        return read_image(file) if file and file.is_file() else None
    except UserError:
        return None


def read_figures(plan):
    """The plan's figures, {name: what to show}; a number stands for `figure<number>`. UserError says what is wrong."""
    figures = plan.get(FIGURES) or {}
    if not isinstance(figures, dict):
        raise UserError(f"`{FIGURES}` is {figures!r}, expected names with {', '.join(SPEC)}")
    return {name: read_figure(name, spec) for name, spec in _by_file(figures).items()}


def _by_file(figures):
    return {f"figure{name}" if str(name).isdigit() else str(name): spec for name, spec in figures.items()}


def read_figure(name, spec):
    """What one of them shows, as it is. UserError says what is wrong."""
    if not isinstance(spec, dict):
        raise UserError(f"{name} is {spec!r}, expected {', '.join(SPEC)}")
    for key, value in spec.items():
        if key not in SPEC:
            raise UserError(f"{name} has unknown {key}{near(key, SPEC)}; expected {', '.join(SPEC)}")
        if not isinstance(value, SPEC[key]):
            raise UserError(f"{name}: `{key}` is {value!r}, expected a {SPEC[key].__name__}")
        if SPEC[key] is list and (wrong := [one for one in value if not isinstance(one, str)]):
            raise UserError(f"{name}: `{key}` has {wrong[0]!r}, expected texts")
    if lacking := [key for key in NEEDED if not spec.get(key)]:
        raise UserError(f"{name} says no {lacking[0]}")
    return spec


def find_job(results, subject, label, seed=None):
    """The entry of `results["rows"]` for a subject, a row and a training seed (else the first); None if there is none."""
    jobs = [row for row in results["rows"] if (row["subject"], row["row"]) == (subject, label)]
    jobs = [row for row in jobs if row["method"] == BASE or seed in (None, row["seed"])]
    return min(jobs, key=lambda row: row["seed"], default=None)


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

    def text(self, x, y, lines, size=TEXT, **how):
        """Lines one by one, their first one's top at y: matplotlib's own spacing depends on the letters."""
        for n, line in enumerate(lines):
            baseline = y + (n + 0.5) * _line(size) + 0.36 * size * DPI / 72
            self.figure.text(x / self.width, 1 - baseline / self.height, line, fontsize=size, **how)

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


def _line(points):
    """Height of a line of text in pixels."""
    return round(points * 1.25 * DPI / 72)


def _font(points):
    return ImageFont.truetype(font_manager.findfont(STYLE["font.family"]), points * DPI / 72)


def draw_grid(lines, columns, title, note):
    """A matplotlib figure of labelled pictures.

    `lines` is a list of (subject, photograph, [(label, [picture …]) …]) with PIL images, None for one that is missing;
    `columns` are the texts above the pictures. `title` and `note` stand on top.
    """
    font, bold, step = _font(TEXT), _font(TITLE), _line(TEXT)
    labels = [[wrap(font, label, CELL) for label, _ in rows] for _, _, rows in lines]
    heads = [wrap(font, text, CELL) for text in columns]
    names = [wrap(font, subject.replace("_", " "), CELL) for subject, _, _ in lines]
    first = CELL + 3 * GAP + max(round(font.getlength(text)) for group in labels for label in group for text in label)
    width = first + len(heads) * (CELL + GAP)
    titles, notes = wrap(bold, title, 0.94 * (width - 2 * GAP)), wrap(font, note, width - 2 * GAP)
    body = 3 * GAP + len(titles) * _line(TITLE) + (len(notes) + max(map(len, (*heads, names[0])))) * step
    between = GAP + (max(map(len, names)) - 1) * step  # a name that takes two lines stands above its photograph too
    page = _Page(width, body + sum(len(rows) * (CELL + GAP) for _, _, rows in lines) + len(lines) * between)
    page.text(GAP, GAP, titles, TITLE, weight="bold")
    page.text(GAP, GAP + len(titles) * _line(TITLE), notes, color="#555555")
    for k, text in enumerate(heads):
        page.text(first + k * (CELL + GAP) + CELL / 2, body - GAP / 3 - len(text) * step, text, ha="center")
    y = body
    for (_, photograph, rows), name, group in zip(lines, names, labels):
        middle = y + (len(rows) * (CELL + GAP) - GAP - CELL) // 2
        page.cell(GAP, middle, photograph and at_print_size(photograph))
        page.text(GAP + CELL / 2, middle - GAP / 3 - len(name) * step, name, ha="center")
        for (_, pictures), label in zip(rows, group):
            page.text(CELL + 2 * GAP, y + (CELL - len(label) * step) / 2, label)
            for k, picture in enumerate(pictures):
                page.cell(first + k * (CELL + GAP), y, picture and at_print_size(picture))
            y += CELL + GAP
        y += between
    return page.figure


def draw_figure(root, results, name, spec):
    """The matplotlib figure that `spec` of the plan asks for, as the module says, and what is missing in it, as texts."""
    lines, said, missing = [], {key: [] for key in SETTINGS}, []
    for subject in spec["subjects"]:
        photograph, rows = None, []
        for label in spec["rows"]:
            job = find_job(results, subject, label, spec.get("seed"))
            pictures = [None] * len(spec["prompts"])
            if job:
                folder = Path(root) / job["folder"]
                photograph = photograph or _read(next(iter(photographs(folder)), None))
                pictures = _pictures(folder, job, spec["prompts"], said)
                missing += [f"{name}: {job['job']} has no picture of {prompt!r}"
                            for prompt, picture in zip(spec["prompts"], pictures) if picture is None]  # fmt: skip
            else:
                missing.append(f"{name}: there is no job of {subject}, {label}")
            rows.append((label, pictures, job and job["training"].get("steps")))
        if photograph is None:
            missing.append(f"{name}: there is no photograph of {subject}")
        lines.append((names(results).get(subject, subject), photograph, rows))
    if differ := len(said["steps"]) > 1:
        said["steps"].clear()
    beside = lambda label, steps: f"{label}, {steps} training steps" if differ and steps else label
    lines = [(name, photograph, [(beside(label, steps), pictures) for label, pictures, steps in rows])
             for name, photograph, rows in lines]  # fmt: skip
    note = ", ".join(text.format(" and ".join(said[key])) for key, text in SETTINGS.items() if said[key])
    columns = [prompt.replace("{}", "[V]") for prompt in spec["prompts"]]
    return draw_grid(lines, columns, heading(results, name, spec), note), missing


def heading(results, name, spec):
    """A figure's title."""
    called, number = names(results), name.removeprefix("figure")
    title = spec.get("title", ", ".join(called.get(subject, subject) for subject in spec["subjects"]))
    return f"Figure {number}. {title}" if number.isdigit() else title


def _pictures(folder, job, prompts, said):
    """The job's first picture of each prompt, None where there is none; adds to what is said of all."""
    samples = {}
    for sample in read_samples(folder):
        samples.setdefault(sample["template"], sample)
    files = [folder / "samples" / samples[prompt]["file"] if prompt in samples else None for prompt in prompts]
    pictures = [_read(file) for file in files]
    if any(pictures):
        settings = read_json(folder / "samples" / "samples.json")["settings"]
        settings |= {"steps": job["training"].get("steps"), "picture": [samples[p]["seed"] for p in prompts if p in samples]}
        settings["training"] = None if job["method"] == BASE else job["seed"]
        for key, values in said.items():
            value = settings.get(key)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and str(one) not in values:
                    values.append(str(one))
    return pictures


# plots ----------------------------------------------------------------------------------------------------------------


def points(rows, x, y):
    """Where each row and subject stands: a list of {row, subject, method, rank, n, x, y, dx, dy}.

    `rows` are jobs of one part. x and y are means over seeds, dx and dy half the widths of their 95 % t-intervals, None
    for a single seed. Where there are more subjects than `MARKERS`, a point is of all of them: their mean, seed by seed.
    """
    subjects, groups, found = {row["subject"] for row in rows}, {}, []
    several = len(subjects) > len(MARKERS)
    for row in rows:
        scores = row["scores"].get(x), row["scores"].get(y)
        if None not in scores:
            group = groups.setdefault((row["row"], ALL if several else row["subject"]), (row, {}))
            group[1].setdefault(row["seed"], []).append(scores)
    for (label, subject), (row, seeds) in groups.items():
        whole = [pairs for pairs in seeds.values() if len(pairs) == (len(subjects) if several else 1)]
        if whole:
            (mx, dx), (my, dy) = (mean_interval([fmean(pair[k] for pair in pairs) for pairs in whole]) for k in (0, 1))
            found.append({"row": label, "subject": subject, "method": row["method"], "rank": row["rank"], "n": len(whole),
                          "x": mx, "y": my, "dx": dx, "dy": dy})  # fmt: skip
    return found


def said_axis(score, part):
    """What stands beside an axis: a part's score, its encoder and, of a similarity, its scale."""
    encoder = said_encoder(part, score)
    scale = f", {said_scale(part)}" if score in SIMILARITIES else ""
    return AXES.get(score, SCORES[score]) + (f" ({encoder})" if encoder else "") + scale


def draw_plot(found, x, y, title, part):
    """A matplotlib figure of `points` of a part of the plan, as `results["parts"]` has it: colours for rows, shapes for
    subjects, bars for the intervals.

    Of several rows of a method the one of the highest rank is filled, the next hollow, then what it is called otherwise.
    The group id of point k is `point-k`.
    """
    markers = dict(zip(dict.fromkeys(p["subject"] for p in found), itertools.cycle(MARKERS)))
    called = list(dict.fromkeys(p["row"].partition(" (rank=")[0] for p in found))
    rows = {p["row"]: (p["method"], called.index(p["row"].partition(" (rank=")[0]), -(p["rank"] or 0)) for p in found}
    faces = {}
    for method, labels in itertools.groupby(sorted(rows, key=rows.get), lambda label: rows[label][0]):
        for label, fill in zip(labels, itertools.cycle(FILLS)):
            faces[label] = {"color": COLOURS.get(method, "#000000"), "fillstyle": fill}
    figure = Figure((6.4, 3.6))
    axes = figure.add_axes((0.09, 0.13, 0.6, 0.77))
    axes.set_title(title, loc="left", fontsize=TITLE, weight="bold")
    axes.set_xlabel(said_axis(x, part))
    axes.set_ylabel(said_axis(y, part))
    how = {"markersize": 5.5, "markeredgewidth": 1.2}
    for k, p in enumerate(found):
        bars = axes.errorbar(p["x"], p["y"], p["dy"], p["dx"], marker=markers[p["subject"]], elinewidth=0.7,
                             **how, **faces[p["row"]])  # fmt: skip
        bars.lines[0].set_gid(f"point-{k}")
    for score, set_limits in ((x, axes.set_xlim), (y, axes.set_ylim)):
        if score in SHARES:  # an interval of few seeds may reach further than a share can
            set_limits(-0.04, 1.04)
    handles = [Line2D([], [], marker="o", ls="", label=label, **how, **faces[label]) for label in rows]
    axes.add_artist(axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0)))
    handles = [Line2D([], [], marker=m, ls="", label=name, color="#777777", **how) for name, m in markers.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(1.02, 0.0))
    return figure


def tip(point, x, y):
    """What there is to say of one of `points`."""
    said = []
    for score, mean, half in ((x, point["x"], point["dx"]), (y, point["y"], point["dy"])):
        said.append(f"{SCORES[score]} {mean:.4g}" + ("" if half is None else f" ± {half:.2g}"))
    return f"{point['row']}, {point['subject']}: {', '.join(said)}; {point['n']} seed{'s' * (point['n'] != 1)}"


def plots(results):
    """What can be plotted: {file's name: (points, score on x, on y, title, part)}, each part of the plan by itself, since
    protocols differ in their scale."""
    found, called = {}, names(results)
    for part, (name, (xs, ys, title)) in itertools.product(results["parts"], PLOTS.items()):
        rows = [row for row in results["rows"] if row["part"] == part]
        scored = {key for row in rows for key in row["scores"]}
        x, y = (next((score for score in scores if score in scored), None) for scores in (xs, ys))
        where = points(rows, x, y) if x and y else []
        if sum(point["method"] != BASE for point in where) > 1:  # one alone shows nothing
            where = [point | {"subject": called.get(point["subject"], point["subject"])} for point in where]
            title = f"{title} ({part})" if part else title
            found[f"{part}-{name}" if part else name] = where, x, y, title, results["parts"][part]
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
        for name, (found, x, y, title, part) in plots(results).items():
            figure = draw_plot(found, x, y, title, part)
            _save(figure, folder / name, ("png", "pdf", "svg"), [tip(point, x, y) for point in found])
    for text in missing:
        print(f"warning: {text}", file=sys.stderr)
    return missing


def remove_all(root, results):
    """Removes what `draw_all` has written of other results."""
    drawn = [f"{part}-{name}" if part else name for part, name in itertools.product(results["parts"], PLOTS)]
    for name, kind in itertools.product((*_by_file(results["plan"].get(FIGURES) or {}), *drawn), SAVED):
        (Path(root) / FIGURES / f"{name}.{kind}").unlink(missing_ok=True)


def _save(figure, stem, formats, tips=()):
    for kind in formats:
        with replacing(stem.with_suffix(f".{kind}")) as part:
            figure.savefig(part, format=kind, **SAVED[kind])
            if kind == "svg":  # a title is what a browser shows when a point is pointed at
                titled = lambda found: f"{found[0]}<title>{html.escape(tips[int(found[1])])}</title>"
                part.write_text(re.sub(r'<g id="point-(\d+)">', titled, part.read_text(encoding="utf-8")), encoding="utf-8")
