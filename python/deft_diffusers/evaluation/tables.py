"""The tables of a comparison, made of its `results.json` alone: Markdown, CSV and LaTeX.

Table 1 and table 2 have the rows and columns of the supplement's, with what it printed in columns of their own; `scores` has
every score of every row, a table for each part of the plan, since protocols differ in their scale; `costs` what a row took.
A figure is the mean over seeds with its 95 % t-interval; what is missing is a dash with the reason below.
"""

import csv
import io
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..sweep import BASE, CAPTIONS
from ..writing import replacing
from .metrics import ENCODER_OF, mean_interval

SIMILARITIES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dinov1": "DINOv1", "dinov2": "DINOv2"}  # have the protocol's scale
OTHERS = {"diversity": "diversity", "drift": "drift", "individual": "this individual", "scene": "that scene"}
COSTS = {  # of result.json: what they are called, digits
    "parameters": ("parameters", 0),
    "size_mb": ("MB on disk", 3),
    "steps": ("steps", 0),
    "seconds": ("training s", 0),
    "images_per_second": ("images/s", 1),
    "memory_gb": ("memory GB", 2),
}
SCALES = {1: "0 to 1", 100: "times 100"}
BETTER = dict.fromkeys((*SIMILARITIES, "individual", "scene"), max) | {"drift": min}
PRINTED = "printed "  # before a column of the supplement's
ALL = "all"  # in a subject's place: the mean over the subjects, seed by seed
FACTS = ("base model", "protocol", "scale", "encoders")  # without which no score can be compared
BOLD = "Bold: the best of those with an interval, where it overlaps with no other's."
UNMOVED = "0 by construction: a new word changes no weight, and these prompts do not say it"
TEX_WIDTH, TEX_LINES = 130, 46  # letters and lines that a page holds in footnotesize
TEX_SEPARATOR = 2  # letters that the room between two columns takes
TEX_RULE = r"\hline\noalign{\vskip .4ex}"  # else it touches what is below


@dataclass
class Cell:
    """A figure: a mean over n seeds with half its interval, or a text as it was printed; a dash if it is neither."""

    mean: float | None = None
    half: float | None = None
    n: int = 0
    pictures: int | None = None  # of all seeds and subjects, None where that is not known
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
    facts: dict[str, str] = field(default_factory=dict)  # what its figures cannot be compared without

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
    """{name: `Table`} of what the plan was for: table1, table2, scores (`scores-<part>` of several parts), and costs."""
    made = {}
    for name, part in results["parts"].items():
        # a plan without parts is of the table whose protocol it has
        which = name or ("table1" if part["protocol"] == "dreambooth" else "table2")
        if which in MAKERS:
            rows = [row for row in results["rows"] if row["part"] == name]
            made[which] = MAKERS[which](part, rows, results["published"][which], results["published"]["source"])
    several = len(results["parts"]) > 1
    made |= {f"scores-{name}" if several else "scores": _scores(results, name) for name in results["parts"]}
    return made | {"costs": _costs(results)}


def write(root, results):
    """Writes `table1.md`, `.csv` and `.tex` and so on, and removes those of another plan; returns the files."""
    written, made = [], build(results)
    for stem, (kind, how) in itertools.product((*MAKERS, "scores", "costs"), FILES.items()):
        own = {name: table for name, table in made.items() if name.partition("-")[0] == stem}
        file = Path(root) / f"{stem}.{kind}"
        if not own:
            file.unlink(missing_ok=True)
            continue
        with replacing(file) as part:
            part.write_text(how(own), encoding="utf-8")
        written.append(file)
    return written


# what is in them ----------------------------------------------------------------------------------------------------


def _over_seeds(rows, key, digits, absent, prompt=None):
    """The `Cell` of a score, of a prompt where there is one, of some jobs that differ in their seed alone."""
    values = [(row["by_prompt"].get(prompt, {}) if prompt else row["scores"]).get(key) for row in rows]
    why = [_why(row, found, absent) for row, found in zip(rows, values)] if rows else ["not in this plan"]
    scored = [(found, _counts(row, prompt).get(key)) for row, found in zip(rows, values) if found is not None]
    return _cell([found for found, _ in scored], digits, why, [count for _, count in scored])


def _cell(values, digits, why, counts=()):
    note = "; ".join(dict.fromkeys(filter(None, why)))
    if not values:
        return Cell(note=note)
    mean, half = mean_interval(values)
    return Cell(mean, half, len(values), None if None in counts else sum(counts), digits, note=note)


def _why(row, value, absent):
    """Why a job has no figure, or not all of it: it failed, or has not run, or what scored it says why; else nothing."""
    if row["status"] != "done":
        return f"{row['job']} {row['status']}" + (f": {row['said']}" if row["said"] else "")
    if row["missing"]:
        return f"{row['job']}: " + "; ".join(f"{entry['what']}: {entry['why']}" for entry in row["missing"])
    return absent if value is None else ""


def _digits(part):
    return 2 if part.get("scale") == 100 else 4


def said_scale(part):
    """A part's scale in words: of its similarities, all other scores being 0 to 1."""
    return SCALES.get(part.get("scale"), "unknown")


def said_encoder(part, score):
    """What a score's encoder is called; nothing where that is not known."""
    return part.get("encoders", {}).get(ENCODER_OF[score], {}).get("id", "")


def _counts(row, prompt=None):
    """{score: of how many pictures it is} of a job, or of one of its prompts."""
    return row.get("counts_by_prompt", {}).get(prompt, {}) if prompt else row.get("counts", {})


def _about(part, rows, keys, prompt=None):
    """What a reader of these scores of a part has to know."""
    scale = f"scale {said_scale(part)}" if "scale" in part else "scale unknown, nothing is scored"
    encoders = ", ".join(f"{name} {facts['id']}" for name, facts in part.get("encoders", {}).items()) or "none"
    said = [f"Base model {part['model']}; protocol {part['protocol']}, {scale}; encoders: {encoders}."]
    printed = {subject: name for subject, name in part["subjects"].items() if name}
    if printed and "judge" in part.get("encoders", {}):  # which looks at drawings alone
        own, theirs = ", ".join(printed), ", ".join(printed.values())
        said.append(f"The subjects are drawings of the embedded world ({own}), stand-ins for the printed ones ({theirs}).")
    return " ".join([*said, _of_pictures(rows, keys, prompt), "Mean ± 95 % t-interval over n seeds."])


def _of_pictures(rows, keys, prompt):
    """Of how many pictures a job's figures are: what most scores have, and which have others."""
    scores = {}  # span -> names
    for key in keys:
        numbers = {_counts(row, prompt).get(key) for row in rows if row["scores"].get(key) is not None}
        known = sorted(numbers - {None})
        span = [" to ".join(dict.fromkeys(map(str, (known[0], known[-1]))))] if known else []
        if numbers:
            name = (SIMILARITIES | OTHERS)[key] + " on unrelated prompts" * (key == "drift")
            scores.setdefault(" or ".join(span + ["an unknown number"] * (None in numbers)), []).append(name)
    if not scores:
        return "Nothing is scored."
    most = max(scores, key=lambda span: len(scores[span]))
    others = [f"{' and '.join(names)} of {span}" for span, names in scores.items() if span != most]
    pictures = f"{most}{' of' * ('unknown' in most)} pictures"
    return f"A job's figures are of {', '.join([pictures, *others])}."


def _facts(part):
    """`Table.facts` of a part's scores."""
    encoders = "; ".join(f"{name} {facts['id']}" for name, facts in part.get("encoders", {}).items())
    return dict(zip(FACTS, (part["model"], part["protocol"], f"{part.get('scale', '')}", encoders)))


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
    ours = [row for row in rows if row["method"] != BASE]
    caption = (
        f"CLIP-I of {said} by method and subject, and what the supplement printed (its table 1, of "
        f"“{published['prompt']}”). {_about(part, ours, ['clip_i'], prompt)} {BOLD} Printed: {source}."
    )
    shown = [name or subject for subject, name in part["subjects"].items()]
    columns = [*shown, *(PRINTED + name for name in published["columns"])]
    table = Table(caption, ["method", "n"], columns, facts=_facts(part))
    for name in _order(rows, printed):
        cells = []
        for subject in subjects:
            its = [row for row in rows if (row["row"], row["subject"]) == (name, subject)]
            cells.append(_over_seeds(its, "clip_i", _digits(part), "no CLIP-I", prompt))
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
    ours = [row for row in rows if row["method"] != BASE]
    for row in ours:
        methods.setdefault(row["row"].split(" (rank=")[0], {})[row["row"]] = None
    printed = {(entry["row"], entry["image"]): entry["values"] for entry in published["rows"]}
    caption = (
        f"{', '.join(published['columns'])} by method and image, and what the supplement printed (its table 2, which tells "
        f"no rank). {_about(part, ours, keys)} {BOLD} Printed: {source}."
    )
    columns = [*published["columns"], *(PRINTED + name for name in published["columns"])]
    table = Table(caption, ["method", "image", "n"], columns, facts=_facts(part))
    for method in dict.fromkeys([*(entry["row"] for entry in published["rows"]), *methods]):
        for name, image in itertools.product(methods.get(method, {method: None}), images):
            its = [row for row in rows if (row["row"], row["subject"]) == (name, own.get(image))]
            cells = [_over_seeds(its, key, _digits(part), f"no {SIMILARITIES[key]}") for key in keys]
            printed_cells = _printed(published, printed.get((method, image)), rows=method, images=image)
            if its or (method, image) in printed:
                table.lines.append(([name, image, str(table.seeds(cells) or "")], cells + printed_cells))
    for image, k in itertools.product({labels[1] for labels, _ in table.lines}, range(len(keys))):
        table.mark([cells[k] for labels, cells in table.lines if labels[1] == image], max)
    return table


MAKERS = {"table1": _table1, "table2": _table2}


def _scores(results, name):
    """Every row of a part of the plan: the mean over its subjects, seed by seed, then each subject."""
    part, called = results["parts"][name], names(results)
    rows = [row for row in results["rows"] if row["part"] == name]
    known = {key: title for key, title in (SIMILARITIES | OTHERS).items() if any(key in row["scores"] for row in rows)}
    subjects = list(part["subjects"])
    mean = f" ({ALL}: mean over the subjects, of the seeds that all of them have)" * (len(subjects) > 1)
    caption = (
        f"All scores{f' of {name}' * bool(name)} by subject{mean} and method; drift: less is better. "
        f"{_about(part, rows, known)} {BOLD}"
    )
    table = Table(caption, ["subject", "method", "n"], list(known.values()), facts=_facts(part))
    blocks = [(ALL, subjects)] * (len(subjects) > 1) + [(called[subject], [subject]) for subject in subjects]
    for shown, among in blocks:
        start = len(table.lines)
        for label in dict.fromkeys(row["row"] for row in rows):
            own = [row for row in rows if row["row"] == label and row["subject"] in among]
            if {row["subject"] for row in own} != set(among):
                continue  # a row of some subjects alone
            cells = [_mean_of_subjects(own, "scores", key, _digits(part) if key in SIMILARITIES else 4) for key in known]
            table.lines.append(([shown, label, str(table.seeds(cells) or "")], cells))
        for k, key in enumerate(known):
            if key in BETTER:
                table.mark([cells[k] for _, cells in table.lines[start:]], BETTER[key])
    return table


def _costs(results):
    """What every trained row took: the mean over its subjects, seed by seed."""
    rows = [row for row in results["rows"] if row["method"] != BASE]
    kinds = {key: kind for key, kind in COSTS.items() if any(row["training"].get(key) is not None for row in rows)}
    head = ["part"] * (len(results["parts"]) > 1)
    caption = (
        "What a training of each row took, as it has told: the mean over a row's subjects and over n seeds, with the 95 % "
        "t-interval where they differ."
    )
    table = Table(caption, [*head, "method", "n"], [title for title, _ in kinds.values()])
    for part, label in dict.fromkeys((row["part"], row["row"]) for row in rows):
        own = [row for row in rows if (row["part"], row["row"]) == (part, label)]
        cells = [_mean_of_subjects(own, "training", key, digits) for key, (_, digits) in kinds.items()]
        table.lines.append(([*[part] * len(head), label, str(table.seeds(cells) or "")], cells))
    return table


def _mean_of_subjects(rows, kind, key, digits):
    """The `Cell` of a figure whose value for a seed is the mean over the subjects, all of which must have it."""
    whole, counts, why = [], [], []
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
            counts += [_counts(row).get(key) for row in same]
    cell = _cell(whole, digits, why, counts)
    if kind == "training" and cell.half == 0:  # the same by construction, not by chance
        cell.half = None
    if key == "drift" and whole and rows[0]["method"] == "textual_inversion" and round(cell.mean, digits) == 0:
        cell.half, cell.note = None, "; ".join(filter(None, [UNMOVED, cell.note]))  # it is no best that was reached
    return cell


# how they are written -----------------------------------------------------------------------------------------------


def _shown(table, labels, cell):
    """A cell's text, with n where it is not the line's."""
    own = f" (n={cell.n})" if cell.mean is not None and str(cell.n) != labels[-1] else ""
    return cell.shown + own


def _markdown(tables):
    return "\n".join(_one_markdown(name, table) for name, table in tables.items())


def _one_markdown(name, table):
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


def _csv(tables):
    """Figures with two digits more than are shown, of how many seeds and pictures they are, and on every line what they
    cannot be compared without. Of several tables each line names its own, and their columns are those of all."""
    several, lines = len(tables) > 1, []
    number = lambda value, digits: "" if value is None else f"{round(value, digits + 2):.15g}"
    for name, table in tables.items():
        head = [*table.labels, *(text for column in table.columns for text in _csv_columns(table, column)), *table.facts]
        lines += [dict.fromkeys(["table"] * several + head, "")] if not table.lines else []  # whatever is there
        for labels, cells in table.lines:
            line = ({"table": name.partition("-")[2]} if several else {}) | dict(zip(table.labels, labels))
            for column, cell in zip(table.columns, cells):
                figures = [number(cell.mean, cell.digits), number(cell.half, cell.digits), cell.n or "", cell.pictures or ""]
                line |= zip(_csv_columns(table, column), [cell.text] if column.startswith(PRINTED) else figures)
            notes = [f"{column}: {cell.note}" for column, cell in zip(table.columns, cells) if cell.note]
            lines.append(line | table.facts | {"notes": "; ".join(notes)})
    file = io.StringIO()
    columns = dict.fromkeys(column for line in lines for column in line if column not in (*FACTS, "notes"))
    columns |= dict.fromkeys(column for line in lines for column in line)
    rows = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    rows.writeheader()
    rows.writerows(line for line in lines if any(line.values()))
    return file.getvalue()


def _csv_columns(table, column):
    if column.startswith(PRINTED):
        return [column]
    return [column, f"{column} ±", f"{column} n", *([f"{column} pictures"] if table.facts else [])]  # costs are of none


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


def _latex(tables):
    return "\n".join(_one_latex(name, table) for name, table in tables.items())


def _one_latex(name, table):
    """A `table*` to be \\input, and others that go on with it where it would be too wide or too long to be read."""
    notes, found = table.notes(), []
    pieces = list(itertools.product(_tex_columns(table), _tex_lines(table)))
    for k, (columns, lines) in enumerate(pieces):
        label = f"tab:{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}" + f"-{k + 1}" * (k > 0)
        where = f" Piece {k + 1} of {len(pieces)}." * (len(pieces) > 1)
        caption = table.caption if k == 0 else f"What {name} shows, continued: see the caption of its first piece."
        found.append(_tex_table(table, lines, columns, notes, label, caption + where))
    return "\n".join(found)


def _tex_columns(table):
    """Which columns stand side by side: all, or as many in each piece as fit its width."""
    width = lambda texts: max(map(len, texts)) + TEX_SEPARATOR
    labels = sum(width([head, *(line[0][k] for line in table.lines)]) for k, head in enumerate(table.labels))
    columns = [
        width([*column.split(), *(_shown(table, labels, cells[k]) for labels, cells in table.lines)])
        for k, column in enumerate(table.columns)
    ]
    pieces = max(1, math.ceil(sum(columns) / max(1, TEX_WIDTH - labels)))
    size = math.ceil(len(columns) / pieces) or 1
    return [range(k, min(k + size, len(columns))) for k in range(0, len(columns), size)] or [range(0)]


def _tex_lines(table):
    """The lines of each piece, a block of the same first label whole where it fits."""
    pieces = [[]]
    for _, block in itertools.groupby(table.lines, key=lambda line: line[0][0] if len(table.labels) > 2 else None):
        block = list(block)
        for part in (block[k : k + TEX_LINES] for k in range(0, len(block), TEX_LINES)):
            if pieces[-1] and len(pieces[-1]) + len(part) > TEX_LINES:
                pieces.append([])
            pieces[-1] += part
    return pieces


def _tex_table(table, lines, columns, notes, label, caption):
    heads = [*map(tex, table.labels), *(rf"\shortstack[r]{{{_tex_head(table.columns[k])}}}" for k in columns)]
    text = [
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        r"\setlength{\belowcaptionskip}{1ex}",  # else the caption touches the first line
        rf"\caption{{{tex(caption)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{% of the package graphicx",
        rf"\begin{{tabular}}{{{'l' * len(table.labels)}{'r' * len(columns)}}}",
        TEX_RULE,
        " & ".join(heads) + r" \\",
        TEX_RULE,
    ]
    used = {}
    for labels, cells in lines:
        said = []
        for cell in (cells[k] for k in columns):
            shown = tex(_shown(table, labels, cell))
            number = notes.get(cell.note)
            said.append((rf"\textbf{{{shown}}}" if cell.best else shown) + (f"$^{{{number}}}$" if number else ""))
            used |= {number: cell.note} if number else {}
        text.append(" & ".join([*map(tex, labels), *said]) + r" \\")
    text += [r"\hline", r"\end{tabular}}"]
    text += [rf"\par\raggedright $^{{{number}}}$ {tex(note)}" for number, note in sorted(used.items())]
    return "\n".join([*text, r"\end{table*}"]) + "\n"


def _tex_head(column):
    """What was printed says so in a line of its own."""
    return tex(column) if not column.startswith(PRINTED) else rf"{PRINTED.strip()}\\{tex(column.removeprefix(PRINTED))}"


FILES = {"md": _markdown, "csv": _csv, "tex": _latex}
