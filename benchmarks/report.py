"""What is told of results: tables, plots, README's figures, and what changed between two of them.

All of it comes from the rows of benchmarks/results/<device>/<commit>.json and from nothing else.
"""

import importlib
import json
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.cases import LOOP
from benchmarks.peers import COPY, DEFT, FACTORS, FROZEN, MERGED, PEFT_DEFT, PEFT_LORA, QR_ALONE, READY, is_here
from benchmarks.shapes import RANK
from benchmarks.suite import SUITES, Options

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PLOTS = "bars-*", "roofline", "curves"
SAME = 0.03  # so much faster or slower is neither
MARKERS = "os^vDP*X<>hdp"
DOES_LESS = FROZEN, MERGED, COPY, QR_ALONE  # than the work whose bytes and flops are counted
TIMES = "\N{MULTIPLICATION SIGN}"
MERGE_TOO = "`DEFT here` merges as PEFT does, from P and R, and keeps the pristine weights besides"
BEGIN, END = "<!-- written by python -m benchmarks --readme: begin -->", "<!-- end -->"
METHOD = f"""Times are medians over rounds, each of which times every peer once, in turn; ratios the medians of those in each
round. {TIMES} limit: the time as a multiple of what the bytes take at the copy rate or the flops at the matrix rate,
whichever is more, both from the same rounds; the matrix rate is the best of some products'. On a GPU, training steps, draws
and what is done to whole models are timed with the host.
"""


def seconds(value: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


# key -> title, how it is said. A column stands where a row has it.
COLUMNS: dict[str, tuple[str, Callable]] = {
    "seconds": ("time", seconds),
    "spread": ("20 % to 80 %", lambda pair: f"{seconds(pair[0])} to {seconds(pair[1])}"),
    "wall_seconds": ("with the host", seconds),
    "graph_seconds": ("in a CUDA graph", seconds),
    "device_seconds": ("without the host", seconds),
    "ratio": (TIMES + " {floor}", lambda v: f"{v:.2f}"),
    "limits": (TIMES + " limit", lambda v: f"{v:.2f}"),
    "images_per_second": ("images/s", lambda v: f"{v:.3g}"),
    "saved": ("saved for the backward", size),
    "memory": ("peak memory", size),
    "trained": ("parameters", "{:,}".format),
    "changed": ("weights changed by a cycle", lambda v: f"{v:.2%}"),
    "kept": ("kept while merged", size),
}


def key(row: dict) -> tuple:
    """What of a row says which bench it is of."""
    return row["suite"], row["what"], row["where"], row["type"]


def by_bench(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def told(row: dict) -> dict:
    """A row, with what is worked out from it."""
    more = {}
    if "seconds" in row:
        more["spread"] = row["low"], row["high"]
        if "limit_seconds" in row:
            more["limits"] = row["seconds"] / row["limit_seconds"]
        if "batch" in row["at"]:
            more["images_per_second"] = row["at"]["batch"] / row["seconds"]
    return row | more


def markdown_table(head: list[str], lines: Iterable[list[str]]) -> str:
    text = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in text) + "\n"


def table(rows: list[dict]) -> str:
    """The rows of some benches, a table for each."""
    text = []
    for (_, what, where, kind), some in by_bench(rows).items():
        some = [told(row) for row in some]
        used = [name for name in COLUMNS if any(name in row for row in some)]
        floor = next((row["floor"] for row in some), "")
        lines = []
        for row in some:
            if "note" in row:
                lines.append([row["who"], row["note"], *[""] * (len(used) - 1)])
            else:
                lines.append([row["who"], *(COLUMNS[name][1](row[name]) if name in row else "" for name in used)])
        head = ["", *(COLUMNS[name][0].format(floor=floor) for name in used)]
        text.append(f"**{what}**, {where}, {kind}\n\n{markdown_table(head, lines)}")
    return "\n".join(text)


def markdown(file: Path) -> str:
    """The whole of a result: where it comes from, its tables, and design's targets."""
    found = json.loads(file.read_text())
    text = [f"{setting(found)}\n", METHOD, checked([found])]
    for suite in dict.fromkeys(row["suite"] for row in found["rows"]):
        text += [f"## {suite}\n", table([row for row in found["rows"] if row["suite"] == suite])]
    return "\n".join(text)


def setting(found: dict) -> str:
    said = ("device", "processor", "driver", "torch", "triton", "peft", "lycoris", "diffusers", "commit", "date", "size")
    return ", ".join(f"{name} {found[name]}" for name in said if found.get(name, "none") != "none")


# Targets --------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A figure that design asks for: what `who` takes, as a multiple of what `over` takes ("limit": the machine's; "":
    nothing's), is at most `most`."""

    device: str  # cpu or cuda
    bench: tuple[str, str, str, str]  # suite, what, where, type
    who: str
    over: str
    most: float
    of: str = "seconds"  # or "device_seconds", "saved", less the factors, "memory", "changed"

    def told(self) -> str:
        _, what, where, kind = self.bench
        more = {"saved": ", saved but for the factors", "memory": ", memory", "changed": ", weights changed by a cycle"}
        against = f" against {self.over}" if self.over else ""
        return f"{what}, {where}, {kind}{more.get(self.of, '')}: {self.who}{against}"

    def said(self, value: float) -> str:
        """A multiple, or where a good part of the time is to go, how much faster that is."""
        if not self.over:
            return f"{value:.2%}"
        return f"{1 / value:.3g} {TIMES} faster" if self.most < 0.5 else f"{value:.2f} {TIMES}"

    def value(self, rows: Iterable[dict]) -> float | None:
        by = {row["who"]: told(row) for row in rows if key(row) == self.bench and self.of in row}
        if self.who not in by or (self.over not in ("limit", "") and self.over not in by):
            return None
        mine = by[self.who]
        if self.over == "limit":
            return mine.get("limits")
        if not self.over:
            return mine[self.of]
        if self.of == "seconds":
            return ratio(mine, by[self.over])
        return (mine[self.of] - (mine["factors"] if self.of == "saved" else 0)) / by[self.over][self.of]

    @property
    def why(self) -> str:
        """Why it is missed, where that is known, and what to try next."""
        mine = {self.device, *self.bench, self.over, self.of}
        return next((why for about, why in MISSED.items() if mine.issuperset(about)), "not known; next: a profile")


def ratio(row: dict, other: dict) -> float:
    """What one takes over what another of the same bench does: round by round, where they were kept."""
    if "times" in row and "times" in other:
        return measure.ratio(row["times"], other["times"])
    return row["ratio"] / other["ratio"]


def _targets() -> Iterator[Target]:
    for device, kind, layers in (
        ("cpu", "float32", {"640x640, T 4096, r 16": 1.25, "1280x1280, T 1024, r 16": 1.12}),
        ("cuda", "bfloat16", {"1280x1280, T 4096, r 16": 1.25, "3072x3072, T 4608, r 16": 1.10}),
    ):
        for where, most in layers.items():
            bench = "layer", "forward + backward", where, kind
            for over, limit in ((FROZEN, most), (PEFT_DEFT, 1), (PEFT_LORA, 1)):
                yield Target(device, bench, DEFT, over, limit)
            yield Target(device, bench, DEFT, PEFT_LORA, 1, "saved")
    for device, many, backend, loop in (
        ("cpu", "a tenth of SDXL, 56 layers", "cpp", 5),
        ("cuda", "SDXL, 560 layers", "triton", 100),
    ):
        yield Target(device, ("operations", "orthonormalize", many, "float32"), f"deft_kernels ({backend})", LOOP, 1 / loop)
        for kind, peft in (("bfloat16", 6), ("float32", 4)):
            merge = "models", "merge", many, kind
            limit = ("limit", 2, "seconds") if device == "cpu" else (COPY, 1.2, "device_seconds")
            yield Target(device, merge, READY, *limit)
            yield Target(device, merge, DEFT, PEFT_DEFT, 1 / peft)
            yield Target(device, ("models", "unmerge", many, kind), DEFT, "", 0, "changed")
    for device, where, kind in (
        ("cpu", "the embedded UNet, 64 x 64, batch 1", "float32"),
        ("cuda", "SDXL's UNet, 1024 x 1024, batch 1", "bfloat16"),
    ):
        for of in ("seconds", "memory"):
            yield Target(device, ("training", "a training step", where, kind), DEFT, PEFT_LORA, 1, of)


TARGETS = list(_targets())

# What names a target -> why it is missed, and what is next
MISSED = {
    ("cpu", "forward + backward", "1280x1280, T 1024, r 16"): "DEFT makes its factors anew in every step, which LoRA has: "
    "two passes over W, r/T of the layer's own flops, and some 0.2 ms of calls; next: QᵀW in the pass that reads W for y",
    ("cpu", "merge", PEFT_DEFT): "the flops alone are a good part of PEFT's time, and the pristine "
    "weights are copied besides, to memory that is new, where PEFT reuses that of the layer before (a hot-swap, which has "
    "the copy, shows by how much); next: that copy in the pass that reads W for A",
    ("cpu", "orthonormalize", LOOP): "56 small layers on two cores, one job each; next: several layers of one shape side by "
    "side in a vector",
}


def checked(results: list[dict]) -> str:
    """Each target, the figure, and whether it is met; and of each that is missed, why."""
    lines, missed = [], {}
    for target in TARGETS:
        values = [target.value(found["rows"]) for found in results if on(found) == target.device]
        if values:
            value = next((value for value in reversed(values) if value is not None), None)
            verdict = "not measured" if value is None else "met" if value <= target.most else "**missed**"
            if verdict == "**missed**":
                missed[target.told()] = target.why
            asked = "≤ " * (target.most >= 0.5) + target.said(target.most)
            lines.append([target.told(), asked, "" if value is None else target.said(value), verdict])
    if not lines:
        return ""
    said = markdown_table(["", "asked", "seen", ""], lines)
    said += "".join(f"\n- Missed, {what}: {why}." for what, why in missed.items()) + "\n" * bool(missed)
    return f"Asked of this device ({MERGE_TOO}):\n\n{said}"


def on(found: dict) -> str:
    return "cpu" if found["driver"] == "none" else "cuda"


# Plots ----------------------------------------------------------------------------------------------------------------


def plot(file: Path) -> list[Path]:
    """Bars of every peer, a roofline, and curves of what costs grow with, as PNG and SVG beside a result."""
    from matplotlib.figure import Figure

    found = json.loads(file.read_text())
    benches = by_bench(told(row) for row in found["rows"] if "seconds" in row)
    drawn = {}
    for suite in dict.fromkeys(row["suite"] for row in found["rows"]):
        some = {k: rows for k, rows in benches.items() if k[0] == suite and len(rows) > 1}
        if bars := {k: rows for k, rows in some.items() if all("ratio" in row for row in rows)}:
            drawn[f"bars-{suite}"] = _bars(Figure, bars)
    counted = [row for rows in benches.values() for row in rows if row.get("flops") and row["who"] not in DOES_LESS]
    if counted:
        drawn["roofline"] = _roofline(Figure, counted)
    if curves := curves_of(benches):
        drawn["curves"] = _curves(Figure, curves)
    files = []
    for name, figure in drawn.items():
        figure.supxlabel(f"{found['device']}, torch {found['torch']}, commit {found['commit']}", fontsize=7, color="0.4")
        for kind in ("png", "svg"):
            files.append(file.with_name(f"{file.stem}-{name}.{kind}"))
            figure.savefig(files[-1], dpi=150, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
    return files


def colour(who: str) -> str:
    """Of what is measured here, of PEFT's, of floors and of the rest."""
    if is_here(who):
        return "#0b6e4f"
    return "#c8553d" if "PEFT" in who or "LyCORIS" in who else "#8d99ae"


def _bars(figure_class, benches: dict[tuple, list[dict]]):
    columns = min(3, len(benches))
    height = max(len(rows) for rows in benches.values())
    lines = -(-len(benches) // columns)
    figure = figure_class(figsize=(4.4 * columns, lines * (0.24 * height + 0.9)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for (_, what, where, kind), rows in benches.items():
        ax, names = next(axes), [row["who"] for row in rows]
        ax.barh(names, [row["ratio"] for row in rows], color=[colour(who) for who in names])
        ax.axvline(1, color="0.3", linewidth=0.8)
        for at, row in enumerate(rows):
            ax.text(row["ratio"], at, f" {row['ratio']:.2f}", va="center", fontsize=6)
        ax.set_title(f"{what}\n{where}, {kind}", fontsize=7)
        ax.set_xlabel(f"time, {rows[0]['floor']} = 1", fontsize=6)
        ax.tick_params(labelsize=6)
        ax.margins(x=0.15)
        ax.invert_yaxis()
    for ax in axes:
        ax.axis("off")
    return figure


def _roofline(figure_class, rows: list[dict]):
    kinds, works = (list(dict.fromkeys(row[name] for row in rows)) for name in ("type", "what"))
    figure = figure_class(figsize=(6 * len(kinds), 5), layout="constrained")
    for ax, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        some = [row for row in rows if row["type"] == kind]
        copy, matrix = (statistics.median(row[name] for row in some) for name in ("copy_rate", "matrix_rate"))
        intensities = [row["flops"] / row["bytes"] for row in some]
        ends = [min(*intensities, matrix / copy) / 2, max(*intensities, matrix / copy) * 2]
        ax.plot([ends[0], matrix / copy, ends[1]], [ends[0] * copy, matrix, matrix], color="0.3")
        for row in some:
            ax.scatter(row["flops"] / row["bytes"], row["flops"] / row["seconds"], s=14, alpha=0.7,
                       color=colour(row["who"]), marker=MARKERS[works.index(row["what"]) % len(MARKERS)])  # fmt: skip
        for work in works:
            ax.scatter([], [], s=14, color="0.3", marker=MARKERS[works.index(work) % len(MARKERS)], label=work)
        ax.legend(fontsize=6)
        ax.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="flops per second")
        ax.tick_params(which="both", labelsize=6)
        ax.set_title(f"{kind}: copy {copy / 1e9:.0f} GB/s, matrix {matrix / 1e9:.0f} Gflop/s", fontsize=9)
    figure.suptitle("green: here; red: PEFT, LyCORIS; grey: plain torch", fontsize=8)
    return figure


def curves_of(benches: dict[tuple, list[dict]]) -> dict[tuple, dict[str, list[tuple[float, float]]]]:
    """{(suite, what, what else is the same, type, what grows): {who: [(how large, seconds)]}}, of three points or more."""
    grouped: dict[tuple, dict[str, list]] = {}
    for (suite, what, _, kind), rows in benches.items():
        at = rows[0]["at"]
        for grows in at:
            same = ", ".join(f"{name} {value}" for name, value in at.items() if name != grows)
            lines = grouped.setdefault((suite, what, same, kind, grows), {})
            for row in rows:
                lines.setdefault(row["who"], []).append((at[grows], row["seconds"]))
    grown = {k: {who: sorted(points) for who, points in lines.items() if len(points) > 2} for k, lines in grouped.items()}
    return {k: lines for k, lines in grown.items() if lines}


def _curves(figure_class, curves: dict):
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = figure_class(figsize=(4.6 * columns, 3.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for (_, what, same, kind, grows), peers in curves.items():
        ax = next(axes)
        for i, (who, points) in enumerate(peers.items()):
            ax.plot(*zip(*points), marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1, color=colour(who), label=who,
                    alpha=1 - 0.07 * i)  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel=grows, ylabel="seconds")
        ax.set_title(f"{what}, {kind}\n{same}", fontsize=8)
        values = sorted({value for points in peers.values() for value, _ in points})
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.set_xticks([], minor=True)
        ax.tick_params(which="both", labelsize=6)
        ax.legend(fontsize=5)
    for ax in axes:
        ax.axis("off")
    return figure


# README ---------------------------------------------------------------------------------------------------------------

# (suite, what, at most so many places, or at how many tokens): what README shows, a table each; all the rest stands in
# the results
SHOWN = [
    ("layer", "forward + backward", 2),
    ("layer", "forward + backward", (77, 1024)),
    ("layer", "forward", 2),
    ("models", "prepare, forward + backward", 1),
    ("models", "merge", 1),
    ("models", "unmerge", 1),
    ("models", "hot-swap", 1),
    ("models", "load", 1),
    ("training", "a training step", 3),
    ("models", "a training step of layers", 2),
    ("models", "a forward of layers", 2),
    ("sampling", "a denoiser's forward", 2),
    ("sampling", "a draw", 1),
    ("operations", "orthonormalize", 1),
]


def write_readme() -> int:
    """Replace README's figures by those of the newest results of each device."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{section(newest())}{END}{after}")
    return 0


def newest(to_show: bool = True) -> list[dict]:
    """Of each device the newest result; `to_show`: of all suites and peers, on a clean tree."""
    found: dict[str, dict] = {}
    for file in sorted(RESULTS.glob("*/*.json")):
        one = json.loads(file.read_text()) | {"file": f"benchmarks/results/{file.parent.name}/{file.name}"}
        one["plots"] = sorted(plot for name in PLOTS for plot in file.parent.glob(f"{file.stem}-{name}.png"))
        whole = set(SUITES) <= set(one.get("suites", [row["suite"] for row in one["rows"]])) and not one.get("peers")
        newer = one["date"] > found.get(one["device"], {"date": ""})["date"]
        if newer and (not to_show or (whole and one["clean"] and one["size"] != "tiny")):
            found[one["device"]] = one
    return list(found.values())


def section(results: list[dict]) -> str:
    text = []
    for found in results:
        command = "make bench" if found["size"] == "small" else f"python -m benchmarks --size {found['size']}"
        stem = Path(found["file"]).with_suffix("")
        plots = {file.stem.removeprefix(f"{stem.name}-"): f"{stem.parent}/{file.name}" for file in found["plots"]}
        links = {"all tables": f"{stem}.md", "rows": f"{stem}.json"} | plots
        versions = setting({k: v for k, v in found.items() if k not in ("device", "commit", "date", "size")})
        text.append(f"### {found['device']}\n\n`{command}` at commit {found['commit']}, {found['date'][:10]}: {versions}. "
                    f"{', '.join(f'[{name}]({where})' for name, where in links.items())}.\n")  # fmt: skip
        tables = shown(by_bench(told(row) for row in found["rows"]))
        text.append(summary([rows for _, some in tables for rows in some.values()]))
        text += [pivot(what, kind, some) for (what, kind), some in tables]
        text.append(checked([found]))
        absent = {row["who"]: row["note"] for row in found["rows"] if "note" in row}
        if absent:
            text.append("Not measured there: " + "; ".join(f"{who} ({why})" for who, why in absent.items()) + ".\n")
        if lacking := unmeasured(found):
            text.append(f"Not measured there, but by `--size full`, in some way: {'; '.join(lacking)}.\n")
    unseen = [name for name, kind in (("CPU", "cpu"), ("GPU", "cuda")) if kind not in map(on, results)]
    text += [f"**Not measured on any {name}**: nothing is claimed of it.\n" for name in unseen]
    return "\n".join(text)


def shown(benches: dict[tuple, list[dict]]) -> list[tuple[tuple[str, str], dict[str, list[dict]]]]:
    """README's tables: ((what, type), {where: rows})."""
    tables = []
    for suite, what, places in SHOWN:
        those = {k: rows for k, rows in benches.items() if k[0] == suite and f"{k[1]},".startswith(f"{what},")}
        for named, kind in dict.fromkeys((k[1], k[3]) for k in those):
            some = {k[2]: rows for k, rows in those.items() if (k[1], k[3]) == (named, kind)}
            if isinstance(places, int):
                some = dict(list(some.items())[:places])
            else:
                at = {where: rows[0]["at"] for where, rows in some.items()}
                some = {w: some[w] for w, a in at.items() if a.get("rank") == RANK and a.get("tokens") in places}
            tables.append(((named, kind), some))
    return tables


def summary(benches: list[list[dict]]) -> str:
    """In words: in what DEFT here is faster than a rival, as fast, and slower, of all that README shows."""
    text = []
    for rival in (PEFT_DEFT, PEFT_LORA, FACTORS):
        said: dict[str, dict[str, list[tuple[float, str]]]] = {"faster": {}, "as fast": {}, "slower": {}}
        for rows in benches:
            by = {row["who"]: row for row in rows if "seconds" in row}
            if DEFT in by and rival in by:
                row, times = by[DEFT], ratio(by[rival], by[DEFT])
                verdict = "faster" if times > 1 + SAME else "slower" if times < 1 - SAME else "as fast"
                work = "a layer's " * (row["suite"] == "layer") + row["what"]
                said[verdict].setdefault(work, []).append((times if times > 1 else 1 / times, row["where"]))
        parts = [f"{verdict} in {', '.join(in_words(verdict, *work) for work in works.items())}"
                 for verdict, works in said.items() if works]  # fmt: skip
        if parts:
            text.append(f"- {DEFT} against **{rival}**: {'; '.join(parts)}.")
    return f"What is within {SAME:.0%} is called as fast.\n\n{chr(10).join(text)}\n" if text else ""


def in_words(verdict: str, what: str, found: list[tuple[float, str]]) -> str:
    """By how much, from the least to the most; and where, if it is slower."""
    times = list(dict.fromkeys(f"{value:.2f}" for value, _ in sorted(found)))
    often = "" if verdict == "as fast" else f" ({' to '.join(dict.fromkeys((times[0], times[-1])))} {TIMES})"
    where = f" at {' and '.join(dict.fromkeys(where for _, where in found))}" if verdict == "slower" else ""
    return f"{what}{where}{often}"


def unmeasured(found: dict) -> list[str]:
    """What size full has on this kind of device and a result lacks: of each suite the models, or the layers' shapes."""
    there = {key(row)[:3] for row in found["rows"]}
    options, more = Options(torch.device(on(found)), "full"), []
    for suite in SUITES:
        benches = importlib.import_module(f"benchmarks.{suite}").benches(options)
        lacking = dict.fromkeys(b.where.partition(",")[0] for b in benches if (suite, b.what, b.where) not in there)
        more += [f"{suite}: {', '.join(lacking)}"] if lacking else []
    return more


def pivot(what: str, kind: str, benches: dict[str, list[dict]]) -> str:
    """A line for each peer, a column for each place."""
    whos = dict.fromkeys(row["who"] for rows in benches.values() for row in rows)
    shown = [name for name in ("seconds", "ratio", "limits", "memory", "saved", "changed", "kept")
             if any(name in row for rows in benches.values() for row in rows)]  # fmt: skip
    lines = []
    for who in whos:
        line = [f"**{who}**" if is_here(who) else who]
        for rows in benches.values():
            row = next((row for row in rows if row["who"] == who), {})
            line += [COLUMNS[name][1](row[name]) if name in row else "" for name in shown]
        lines.append(line)
    if all(not any(line[1:]) for line in lines):
        return ""
    head = [f"{what}, {kind}"]
    for where, rows in benches.items():
        titles = [COLUMNS[name][0].format(floor=rows[0]["floor"]) for name in shown]
        head += [f"{where}: {titles[0]}", *titles[1:]]
    return markdown_table(head, lines)


# Comparing ------------------------------------------------------------------------------------------------------------


def find(name: str, device: str | None = None) -> dict:
    """A result by its file, its commit, or what git calls that commit."""
    if Path(name).is_file():
        return json.loads(Path(name).read_text())
    git = subprocess.run(["git", "rev-parse", name], capture_output=True, text=True, check=False)
    commit = git.stdout.strip() or name
    files = [file for file in RESULTS.glob("*/*.json") if file.stem == name]
    files = files or [file for file in RESULTS.glob("*/*.json") if commit.startswith(file.stem)]
    found = [one for one in (json.loads(file.read_text()) for file in files) if device in (None, one["device"])] or [
        json.loads(file.read_text()) for file in files
    ]
    if len(found) != 1:
        known = ", ".join(sorted(f"{file.parent.name}/{file.stem}" for file in RESULTS.glob("*/*.json"))) or "none"
        raise SystemExit(f"benchmarks: {len(found)} results are of {name!r}; give its file, or one of: {known}")
    return found[0]


def unit(row: dict) -> float:
    """What a row's seconds are to be multiplied with to be a multiple of the floor's, and the floor's of the limit."""
    multiple = row.get("limits", row.get("ratio")) if row["who"] == row["floor"] else row.get("ratio")
    return 1.0 if multiple is None else multiple / row["seconds"]


def beyond(low: dict, high: dict, low_unit: float, high_unit: float) -> bool:
    """Whether all of one's spread lies below all of the other's."""
    return low["high"] * low_unit < high["low"] * high_unit


def compare(names: list[str], device: str) -> int:
    """Print what changed from the first result to the second, and what of that is beyond noise: on one device, what has 20 %
    to 80 % that do not overlap, as a time and as a multiple of the floor's or the limit's, which the machine's other work
    moves too; between devices nothing is, and the multiples of the limit are shown. 1 where something of ours got slower,
    or has no time any more."""
    here = measure.environment(device)["device"]
    before = find(names[0], here)
    after = find(names[1], here) if len(names) > 1 else next((r for r in newest(to_show=False) if r["device"] == here), None)
    if after is None:
        raise SystemExit(f"benchmarks: no result of this device ({here}) to compare with; python -m benchmarks makes one")
    if before["rows"] == after["rows"]:
        raise SystemExit(f"benchmarks: {names[0]} is this device's newest result; python -m benchmarks makes another")
    same = all(before.get(name) == after.get(name) for name in ("device", "processor"))
    print(f"before: {setting(before)}\nafter:  {setting(after)}\n")
    old = {(*key(row), row["who"]): told(row) for row in before["rows"] if "seconds" in row}
    lines, slower = [], False
    for row in map(told, after["rows"]):
        was = old.get((*key(row), row["who"]))
        if was is None:
            continue
        if "seconds" not in row:
            slower |= is_here(row["who"])
            lines.append([", ".join(key(row)[1:]), row["who"], seconds(was["seconds"]), "", "", row["note"], "", ""])
            continue
        change = row["seconds"] / was["seconds"]
        apart = same and (beyond(was, row, 1, 1) or beyond(row, was, 1, 1)) and (
            beyond(was, row, unit(was), unit(row)) or beyond(row, was, unit(row), unit(was))
        )
        slower |= apart and change > 1 and is_here(row["who"])
        limits = [f"{r['limits']:.2f}" if "limits" in r else "" for r in (was, row)]
        lines.append([", ".join(key(row)[1:]), row["who"], seconds(was["seconds"]), seconds(row["seconds"]), f"{change:.2f}",
                      ("slower" if change > 1 else "faster") if apart else "", *limits])  # fmt: skip
    head = ["", "who", "before", "after", "after / before", "beyond noise", f"{TIMES} limit before", "after"]
    print(markdown_table(head, lines) if lines else "Nothing was measured in both.")
    return int(slower)
