"""The tables of a comparison, made of its `results.json` alone: Markdown, CSV and LaTeX.

Table 1 and table 2 have the rows and columns of the supplement's, with what it printed in columns of their own; `scores` has
every score of every row, and what it cost. A figure is the mean over seeds with its 95 % t-interval; what is missing is a
dash with the reason below.
"""

import csv
import io
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..sweep import BASE, CAPTIONS
from ..writing import replacing
from .metrics import mean_interval

SIMILARITIES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dinov1": "DINOv1", "dinov2": "DINOv2"}  # have the protocol's scale
OTHERS = {"diversity": "diversity", "drift": "drift", "individual": "this individual", "scene": "that scene"}
COSTS = {  # of result.json: what they are called, digits
    "parameters": ("parameters", 0),
    "size_mb": ("MB on disk", 2),
    "seconds": ("training s", 0),
    "memory_gb": ("memory GB", 2),
}
BETTER = dict.fromkeys((*SIMILARITIES, "individual", "scene"), max) | {"drift": min}
PRINTED = "printed "  # before a column of the supplement's
ALL = "all"  # in a subject's place: the mean over the subjects, seed by seed
FACTS = ("protocol", "scale", "encoders")  # without which no score can be compared
BOLD = "Bold: the best of those with an interval, where it overlaps with no other's."


@dataclass
class Cell:
    """A figure: a mean over n seeds with half its interval, or a text as it was printed; a dash if it is neither."""

    mean: float | None = None
    half: float | None = None
    n: int = 0
    digits: int = 4
    text: str = ""
    note: str = ""  # why it is missing, or what there is to say
    best: bool = False

    @property
    def shown(self):
        """As a reader sees it, without its note; ± and — are Unicode's."""
        if self.mean is None:
            return self.text or "—"
        said = f"{self.mean:,.{self.digits}f}"
        return said if self.half is None else f"{said} ± {self.half:,.{self.digits}f}"


@dataclass
class Table:
    """Lines of labels and cells under a caption. `labels` and `columns` are the heads of the two."""

    caption: str
    labels: list[str]
    columns: list[str]
    lines: list[tuple[list[str], list[Cell]]] = field(default_factory=list)
    facts: dict[str, list[str]] = field(default_factory=dict)  # of each part: `FACTS`

    def facts_of(self, labels):
        """`FACTS` of a line, whose first label is the part where there are several."""
        return self.facts[labels[0] if len(self.facts) > 1 else next(iter(self.facts))]

    def mark(self, cells, better):
        """Marks the best of some cells, where no other's interval reaches its own."""
        known = [cell for cell in cells if cell.half is not None]
        if len(known) < 2:
            return
        best = better(known, key=lambda cell: cell.mean)
        rest = [cell for cell in known if cell is not best]
        best.best = all(abs(best.mean - cell.mean) > best.half + cell.half for cell in rest)

    def notes(self):
        """The different notes, numbered from 1 in the order in which they are met."""
        said = [cell.note for _, cells in self.lines for cell in cells if cell.note]
        return {note: number for number, note in enumerate(dict.fromkeys(said), 1)}

    def seeds(self, cells):
        """How many seeds a line's figures are means of."""
        return max((cell.n for cell in cells), default=0)


def names(results):
    """{subject: what readers are shown}: its name in the published tables, or else its own."""
    return {subject: name or subject for part in results["parts"].values() for subject, name in part["subjects"].items()}


def build(results):
    """{name: `Table`} of what the plan was for: table1, table2, and scores."""
    made = {}
    for name, part in results["parts"].items():
        # a plan without parts is of the table whose protocol it has
        which = name or ("table1" if part["protocol"] == "dreambooth" else "table2")
        if which in MAKERS:
            rows = [row for row in results["rows"] if row["part"] == name]
            made[which] = MAKERS[which](part, rows, results["published"][which], results["published"]["source"])
    return made | {"scores": _scores(results)}


def write(root, results):
    """Writes `table1.md`, `.csv` and `.tex` and so on, and removes those of another plan; returns the files."""
    written, made = [], build(results)
    for name, (kind, how) in itertools.product((*MAKERS, "scores"), FILES.items()):
        file = Path(root) / f"{name}.{kind}"
        if name not in made:
            file.unlink(missing_ok=True)
            continue
        with replacing(file) as part:
            part.write_text(how(name, made[name]), encoding="utf-8")
        written.append(file)
    return written


# what is in them ----------------------------------------------------------------------------------------------------


def _over_seeds(rows, value, digits, absent):
    """The `Cell` of one figure of some jobs that differ in their seed alone. `value(row)` is None where a job has none."""
    values = [value(row) for row in rows]
    why = [_why(row, found, absent) for row, found in zip(rows, values)] if rows else ["not in this plan"]
    return _cell([found for found in values if found is not None], digits, why)


def _cell(values, digits, why):
    note = "; ".join(dict.fromkeys(filter(None, why)))
    if not values:
        return Cell(note=note)
    mean, half = mean_interval(values)
    return Cell(mean, half, len(values), digits, note=note)


def _why(row, value, absent):
    """Why a job has no figure, or not all of it: it failed, or has not run, or what scored it says why; else nothing."""
    if row["status"] != "done":
        return f"{row['job']} {row['status']}" + (f": {row['said']}" if row["said"] else "")
    if row["missing"]:
        return f"{row['job']}: " + "; ".join(f"{entry['what']}: {entry['why']}" for entry in row["missing"])
    return absent if value is None else ""


def _digits(part):
    return 2 if part.get("scale") == 100 else 4


def _about(parts):
    """What a reader of any score has to know."""
    by_protocol, scales = {}, {1: "0 to 1", 100: "times 100"}
    for name, part in parts.items():
        scale = scales.get(part.get("scale"), "unknown, nothing is scored")
        by_protocol.setdefault(f"protocol {part['protocol']}, scale {scale}", []).append(name)
    said = [f"{', '.join(names)}: {how}" if len(by_protocol) > 1 else how for how, names in by_protocol.items()]
    every = [f"{name} {facts['id']}" for part in parts.values() for name, facts in part.get("encoders", {}).items()]
    encoders = ", ".join(dict.fromkeys(every)) or "none"
    said = f"{'; '.join(said)}; encoders: {encoders}; mean ± 95 % t-interval over n seeds."
    return said[0].upper() + said[1:] if len(by_protocol) == 1 else said


def _facts(parts):
    """`Table.facts` of parts."""
    id_of = lambda part: "; ".join(f"{name} {facts['id']}" for name, facts in part.get("encoders", {}).items())
    return {name: [part["protocol"], f"{part.get('scale', '')}", id_of(part)] for name, part in parts.items()}


def _order(rows, published):
    """Names of rows: the supplement's in its order, then the others in the plan's."""
    ours = [row["row"] for row in rows if row["method"] != BASE]
    return list(dict.fromkeys([*published, *ours]))


def _printed(published, values, **where):
    """The cells of what was printed, each with the notes that are about it."""
    cells = []
    for column, value in itertools.zip_longest(published["columns"], values or ()):
        said = [
            note["note"]
            for note in published["notes"]
            if column in note["columns"] and all(one in note[key] for key, one in where.items() if key in note)
        ]
        cells.append(Cell(text=value or "", note="; ".join(said) if value else "not in the supplement"))
    return cells


def _table1(part, rows, published, source):
    """Rows × subjects, CLIP-I of the first prompt; of all prompts where they are the data set's."""
    subjects, prompts = list(part["subjects"]), part["prompts"]
    prompt = None if prompts == CAPTIONS else prompts[0]
    printed = {entry["row"]: entry["values"] for entry in published["rows"]}
    said = f"“{prompt.replace('{}', '[V]')}”" if prompt else "all the data set's prompts"
    caption = (
        f"CLIP-I of {said} by method and subject, and what the supplement printed (its table 1). {_about({'': part})} "
        f"{BOLD} Printed: {source}."
    )
    shown = [name or subject for subject, name in part["subjects"].items()]
    columns = [*shown, *(PRINTED + name for name in published["columns"])]
    table = Table(caption, ["method", "n"], columns, facts=_facts({"": part}))
    for name in _order(rows, printed):
        cells = []
        for subject in subjects:
            its = [row for row in rows if (row["row"], row["subject"]) == (name, subject)]
            value = lambda row: (row["by_prompt"].get(prompt, {}) if prompt else row["scores"]).get("clip_i")
            cells.append(_over_seeds(its, value, _digits(part), "no CLIP-I"))
        n = table.seeds(cells)
        table.lines.append(([name, str(n or "")], cells + _printed(published, printed.get(name), rows=name)))
    for k in range(len(subjects)):
        table.mark([cells[k] for _, cells in table.lines], max)
    return table


def _table2(part, rows, published, source):
    """Method and image × DINOv1, DINOv2, CLIP-I and CLIP-T."""
    keys = [key for title in published["columns"] for key, name in SIMILARITIES.items() if name == title]
    own = {name or subject: subject for subject, name in part["subjects"].items()}
    images = list(dict.fromkeys([*(entry["image"] for entry in published["rows"]), *own]))
    methods = {}  # ours, by the supplement's name, which tells no rank
    for row in rows:
        if row["method"] != BASE:
            methods.setdefault(row["row"].split(" (rank=")[0], {})[row["row"]] = None
    printed = {(entry["row"], entry["image"]): entry["values"] for entry in published["rows"]}
    caption = (
        f"{', '.join(published['columns'])} by method and image, and what the supplement printed (its table 2, which tells "
        f"no rank). {_about({'': part})} {BOLD} Printed: {source}."
    )
    columns = [*published["columns"], *(PRINTED + name for name in published["columns"])]
    table = Table(caption, ["method", "image", "n"], columns, facts=_facts({"": part}))
    for method in dict.fromkeys([*(entry["row"] for entry in published["rows"]), *methods]):
        for name, image in itertools.product(methods.get(method, {method: None}), images):
            its = [row for row in rows if (row["row"], row["subject"]) == (name, own.get(image))]
            cells = [
                _over_seeds(its, lambda row, key=key: row["scores"].get(key), _digits(part), f"no {SIMILARITIES[key]}")
                for key in keys
            ]
            printed_cells = _printed(published, printed.get((method, image)), rows=method, images=image)
            if its or (method, image) in printed:
                table.lines.append(([name, image, str(table.seeds(cells) or "")], cells + printed_cells))
    for image, k in itertools.product({labels[1] for labels, _ in table.lines}, range(len(keys))):
        table.mark([cells[k] for labels, cells in table.lines if labels[1] == image], max)
    return table


MAKERS = {"table1": _table1, "table2": _table2}


def _scores(results):
    """Every row of every part: the mean over its subjects, seed by seed, then each subject."""
    rows = results["rows"]
    scored = {key for row in rows for key in row["scores"]}
    known = {key: name for key, name in (SIMILARITIES | OTHERS).items() if key in scored}
    costs = {key: kind for key, kind in COSTS.items() if any(row["training"].get(key) is not None for row in rows)}
    parts, called = results["parts"], names(results)
    head = ["part"] * (list(parts) != [""])  # a plan without parts has one, without a name
    caption = (
        f"All scores by {'part, ' * len(head)}subject ({ALL}: mean over the {'part' if head else 'plan'}'s subjects, of the "
        f"seeds that all of them have) and method; drift: less is better. {_about(parts)} {BOLD}"
    )
    columns = [*known.values(), *(title for title, _ in costs.values())]
    table = Table(caption, [*head, "subject", "method", "n"], columns, facts=_facts(parts))
    for name, part in parts.items():
        its, where = [row for row in rows if row["part"] == name], [name] * len(head)
        labels = list(dict.fromkeys(row["row"] for row in its))
        subjects = list(part["subjects"])
        blocks = [(ALL, subjects)] * (len(subjects) > 1) + [(called[subject], [subject]) for subject in subjects]
        for shown, among in blocks:
            start = len(table.lines)
            for label in labels:
                own = [row for row in its if row["row"] == label and row["subject"] in among]
                if {row["subject"] for row in own} != set(among):
                    continue  # a row of some subjects alone
                cells = [_mean_of_subjects(own, "scores", key, _digits(part) if key in SIMILARITIES else 4) for key in known]
                cells += [_mean_of_subjects(own, "training", key, digits) for key, (_, digits) in costs.items()]
                table.lines.append(([*where, shown, label, str(table.seeds(cells) or "")], cells))
            for k, key in enumerate(known):
                if key in BETTER:
                    table.mark([cells[k] for _, cells in table.lines[start:]], BETTER[key])
    return table


def _mean_of_subjects(rows, kind, key, digits):
    """The `Cell` of a figure whose value for a seed is the mean over the subjects, all of which must have it."""
    if kind == "training" and all(row["method"] == BASE for row in rows):
        return Cell(note="nothing is trained")
    whole, why = [], []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        same = [row for row in rows if row["seed"] == seed]
        values = [row[kind].get(key) for row in same]
        for row, value in zip(same, values):
            if kind == "scores":
                why.append(_why(row, value, "does not apply"))
            elif value is None:  # whatever its pictures lack
                why.append(_why(row | {"missing": []}, value, f"{row['job']}: not known, as it was stopped and went on"))
        if None not in values:
            whole.append(sum(values) / len(values))
    cell = _cell(whole, digits, why)
    if kind == "training" and cell.half == 0:  # the same by construction, not by chance
        cell.half = None
    return cell


# how they are written -----------------------------------------------------------------------------------------------


def _shown(table, labels, cell):
    """A cell's text, with n where it is not the line's."""
    own = f" (n={cell.n})" if cell.mean is not None and str(cell.n) != labels[-1] else ""
    return cell.shown + own


def _markdown(name, table):
    notes = table.notes()
    lines = [f"**{name}.** {table.caption}", ""]
    lines.append("| " + " | ".join([*table.labels, *table.columns]) + " |")
    lines.append("|" + "---|" * len(table.labels) + "---:|" * len(table.columns))
    for labels, cells in table.lines:
        said = []
        for cell in cells:
            text = _shown(table, labels, cell)
            said.append((f"**{text}**" if cell.best else text) + (f" [{notes[cell.note]}]" if cell.note else ""))
        lines.append("| " + " | ".join(text.replace("|", "/") for text in (*labels, *said)) + " |")
    lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def _csv(name, table):
    """Figures with two digits more than are shown, and on every line what they cannot be compared without."""
    printed = [column.startswith(PRINTED) for column in table.columns]
    head = list(table.labels)
    for column, plain in zip(table.columns, printed):
        head += [column] if plain else [column, f"{column} ±", f"{column} n"]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([*head, *FACTS, "notes"])
    number = lambda value, digits: "" if value is None else f"{round(value, digits + 2):.15g}"
    for labels, cells in table.lines:
        line = list(labels)
        for cell, plain in zip(cells, printed):
            line += [cell.text] if plain else [number(cell.mean, cell.digits), number(cell.half, cell.digits), cell.n or ""]
        notes = [f"{column}: {cell.note}" for column, cell in zip(table.columns, cells) if cell.note]
        rows.writerow([*line, *table.facts_of(labels), "; ".join(notes)])
    return file.getvalue()


_TEX = {
    "--": "-{}-", "[": "{[}", "*": "{*}",  # the last two could belong to a line's end
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "—": "---", "…": r"\ldots{}", "→": r"$\to$", "“": "``", "”": "''", "`": r"\textasciigrave{}",
}  # fmt: skip


def tex(text):
    """Text for LaTeX, every special character escaped, and no flag's -- a dash. Signs that pdflatex stops at, such as those
    of a progress bar, become a question mark."""

    def one(found):
        sign = found[0]
        known = sign < "ƀ" or sign.isalpha()  # letters of other scripts are for LaTeX that has them
        return _TEX.get(sign, " " if not sign.isprintable() else sign if known else "?")

    return re.sub("(?s)--|.", one, text)


def _latex(name, table):
    """A `table*` to be \\input, no wider than the page."""
    notes = table.notes()
    lines = [
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\belowcaptionskip}{1ex}",  # else the caption touches the first line
        rf"\caption{{{tex(table.caption)}}}",
        rf"\label{{tab:{name}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{% of the package graphicx",
        rf"\begin{{tabular}}{{{'l' * len(table.labels)}{'r' * len(table.columns)}}}",
        r"\hline",
        " & ".join(tex(text) for text in (*table.labels, *table.columns)) + r" \\",
        r"\hline",
    ]
    for labels, cells in table.lines:
        said = []
        for cell in cells:
            text = tex(_shown(table, labels, cell))
            said.append((rf"\textbf{{{text}}}" if cell.best else text) + (f"$^{{{notes[cell.note]}}}$" if cell.note else ""))
        lines.append(" & ".join([*map(tex, labels), *said]) + r" \\")
    lines += [r"\hline", r"\end{tabular}}"]
    lines += [rf"\par\raggedright $^{{{number}}}$ {tex(note)}" for note, number in notes.items()]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


FILES = {"md": _markdown, "csv": _csv, "tex": _latex}
