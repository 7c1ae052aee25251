"""Measure the kernels' launch configurations on this GPU: `python -m benchmarks.tune --help`.

For every kernel, type and rank, a small grid of block sizes, warps and stages is tried. First each candidate has to be
right: on small layers of even and odd sizes, compared with the reference in float64 (the checks compile the candidates, in
several processes). Those that are go through the layers of real models, one after the other, and the one with the smallest
median wins (where there are several workloads: the smallest product of the medians). With the winners in place, the forms of
lowrank_linear are timed at the projections of SD 1.5, SDXL and FLUX, forward and dx.

The result is deft_kernels/triton/configs/<device>.json, which the kernels read on such a device from then on. Entries that
were not measured this time stay, if they were measured with the same device, driver, versions and commit.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import cases, measure, shapes
from benchmarks.cases import Case, Draw

CONFIGS = Path(__file__).parent.parent / "deft_kernels/triton/configs"
RANKS = (16, 32, 64, 128)
TYPES = {"half": (torch.bfloat16, torch.float16), "float32": (torch.float32,)}  # the first is timed, each is checked
CHECKED = [(144, 272), (400, 96)], [(131, 257), (136, 72)]  # (m, n) read in vectors, and not; none fills its blocks
CHECKED_TOKENS = 144, 131


def grid(**values: Iterable[int]) -> list[dict[str, int]]:
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


STREAM = grid(BM=(32, 64, 128), BN=(32, 64, 128), num_warps=(4, 8), num_stages=(3, 4))
PANELS = grid(PANEL=(16, 32), BM=(32, 64, 128), num_warps=(2, 4, 8), num_stages=(1,))
GRIDS = {
    "project": STREAM,
    "project_backward": STREAM,
    "merge": STREAM,
    "orthonormalize": PANELS,
    "orthonormalize_backward": PANELS,
    "lowrank_linear expand": grid(BM=(16, 32, 64), BN=(64, 128), BK=(64, 128), num_warps=(4, 8), num_stages=(2, 3)),
    "lowrank_linear fused": grid(BM=(64, 128), BN=(64, 128, 256), BK=(32, 64), num_warps=(4, 8), num_stages=(3, 4)),
    "lowrank_linear thin": grid(BM=(32, 64, 128), BN=(32, 64, 128), num_warps=(4, 8), num_stages=(3, 4)),
}
FORMS = {"product": ("chain", "expand", "fused"), "thin": ("chain", "kernel")}


# What is run ------------------------------------------------------------------------------------------------------------


def linear_cases(kernel: str, layers: list[tuple[int, int, int]], draw: Draw, r: int) -> Iterator[Case]:
    """One of lowrank_linear's kernels on (T, m, n)."""
    for T, m, n in layers:
        if kernel.endswith("thin"):
            yield cases.thin(T, m, n, draw, r)
        else:
            yield from (cases.product(T, m, n, draw, r, dx) for dx in (False, True))


def checked(kernel: str, draw: Draw, r: int, scattered: bool) -> list[Case]:
    """Small layers on which a candidate has to be right."""
    if kernel.startswith("lowrank_linear"):
        layers = [(T, m, n) for T in CHECKED_TOKENS for m, n in CHECKED[scattered]]
        return list(linear_cases(kernel, layers, draw, r))
    layers = [(max(m, r), n) for m, n in CHECKED[scattered]]
    return [getattr(cases, kernel)(layers, "small", draw, r - scattered)]


def timed(kernel: str, draw: Draw, r: int, scattered: bool) -> Iterator[Case]:
    """What a candidate is timed on. An odd size, or an odd rank, is what keeps kernels from reading in vectors here."""
    if kernel.startswith("lowrank_linear"):
        yield from linear_cases(kernel, [(T, d - scattered, d - scattered) for d, T in shapes.LINEAR], draw, r)
        return
    for layers in (shapes.SDXL, shapes.TALL)[: 2 if kernel == "merge" else 1]:
        yield getattr(cases, kernel)(shapes.each(layers), "real", draw, r - scattered)


# Candidates -----------------------------------------------------------------------------------------------------------


def tables(device: torch.device) -> dict:
    """The configurations and choices that launches read, to be changed in place."""
    from deft_kernels.triton import launch

    return launch.tuned(torch.cuda.get_device_name(device) if device.type == "cuda" else "default")


def forget() -> None:
    """What launches remember of the tables."""
    from deft_kernels.triton import launch

    launch.configuration.cache_clear()
    launch.choice.cache_clear()


def install(device: torch.device, kernel: str, key: str, candidate: dict) -> None:
    """From here on launches of a kernel use a candidate; lowrank_linear's take the form that has it."""
    os.environ["DEFT_KERNELS_BACKEND"] = "triton"
    tables(device)["kernels"][kernel][key] = candidate
    forget()
    if kernel.startswith("lowrank_linear"):
        form = kernel.split()[1]
        choose(device, *(("thin", "kernel") if form == "thin" else ("product", form)))


def choose(device: torch.device, what: str, form: str) -> None:
    tables(device)["choices"][what] = {kind: [{"shape": [1, 1, 1, 1], "form": form}] for kind in TYPES}
    forget()


def check(device: torch.device, kernel: str, key: str, candidate: dict) -> str | None:
    """Why a candidate cannot be used, or None."""
    from triton.runtime.errors import OutOfResources, PTXASError

    kind, rank, *scattered = key.split()
    install(device, kernel, key, candidate)
    torch.manual_seed(0)
    for dtype in TYPES[kind]:
        if dtype == torch.bfloat16 and device.type != "cuda":  # which the interpreter does not round as a GPU does
            continue
        for case in checked(kernel, Draw(device, dtype), int(rank), bool(scattered)):
            inputs = case.inputs()
            try:
                outputs = cases.flat(case.op(*inputs), case.members)
            except (OutOfResources, PTXASError) as error:
                return f"{type(error).__name__}: {error}"
            if reason := cases.wrong(outputs, *cases.compared(case, inputs), times=2):
                return f"{dtype}, {case.layers}: {reason}"
    return None


def fastest(device: torch.device, kernel: str, key: str, candidates: list[dict], seconds: Callable) -> dict:
    """The candidate with the smallest product of the medians over the workloads, which is left installed."""
    kind, rank, *scattered = key.split()
    scores = [0.0] * len(candidates)
    for case in timed(kernel, Draw(device, TYPES[kind][0]), int(rank), bool(scattered)):
        inputs = [case.inputs() for _ in range(measure.copies(case.bytes, device))]
        for i, candidate in enumerate(candidates):
            install(device, kernel, key, candidate)
            scores[i] += math.log(seconds([functools.partial(case.op, *one) for one in inputs], device))
    best = candidates[scores.index(min(scores))]
    install(device, kernel, key, best)
    return best


def fastest_form(device: torch.device, what: str, shape: tuple, layers: list[Case], seconds: Callable) -> dict:
    """The form with the smallest sum of medians over the cases that have this (rows, width, columns, r)."""
    times = dict.fromkeys(FORMS[what], 0.0)
    for case in layers:
        inputs = [case.inputs() for _ in range(measure.copies(case.bytes, device))]
        for form in times:
            choose(device, what, form)
            times[form] += seconds([functools.partial(case.op, *one) for one in inputs], device)
    return {"shape": list(shape), "form": min(times, key=times.get)}


def by_shape(what: str, draw: Draw, ranks: Iterable[int], projections: list) -> dict[tuple, list[Case]]:
    """The cases at each shape as `launch.choice` is asked for it: a square layer's forward and dx share one."""
    found: dict[tuple, list[Case]] = {}
    for r, (T, m, n) in itertools.product(ranks, projections):
        if what == "thin":
            found.setdefault((T, m, n, r), []).append(cases.thin(T, m, n, draw, r))
        else:
            found.setdefault((T, n, m, r), []).append(cases.product(T, m, n, draw, r, dx=False))
            found.setdefault((T, m, n, r), []).append(cases.product(T, m, n, draw, r, dx=True))
    return found


# The command ------------------------------------------------------------------------------------------------------------


def keys(kernel: str, ranks: Iterable[int], scattered: bool) -> list[str]:
    kinds = ["float32"] if kernel.startswith("orthonormalize") else list(TYPES)
    return [f"{kind} {r}{way}" for kind in kinds for r in ranks for way in ("", " scattered")[: 1 + scattered]]


def progress(items: Iterable, total: int, title: str) -> Iterator:
    if find_spec("tqdm"):
        from tqdm import tqdm

        yield from tqdm(items, title, total)
        return
    for i, item in enumerate(items):
        print(f"{title}: {i} of {total}", file=sys.stderr)
        yield item


def pretty(value, indent: str = "") -> str:
    """JSON in which what fits on a line takes one."""
    text, inner = json.dumps(value), indent + " "
    if len(text) <= 100 or not isinstance(value, (dict, list)):
        return text
    if isinstance(value, list):
        parts, ends = [pretty(v, inner) for v in value], "[]"
    else:
        parts, ends = [f"{json.dumps(k)}: {pretty(v, inner)}" for k, v in value.items()], "{}"
    return f"{ends[0]}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{ends[1]}"


def write(file: Path, header: dict[str, str], kernels: dict, choices: dict) -> None:
    """Overlay what was measured on what the file holds, if that is of the same device, versions and commit."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    if any(before.get(k) != v for k, v in header.items()):
        before = {"kernels": {}, "choices": {}}
    kernels = before["kernels"] | {k: before["kernels"].get(k, {}) | found for k, found in kernels.items()}
    file.write_text(pretty(header | {"kernels": kernels, "choices": before["choices"] | choices}) + "\n")


def tune(device, kernels, ranks, quick: bool, jobs: int, seconds: Callable) -> tuple[dict, list[str]]:
    """The best configuration of each kernel and key; and what was wrong."""
    plan, wrong, best = {}, [], {kernel: {} for kernel in kernels}
    for kernel in kernels:
        found = tables(device)["kernels"][kernel]
        for key in keys(kernel, ranks, scattered=not quick):
            now = found.get(key) or found[key.removesuffix(" scattered")]
            plan[kernel, key] = [now, *(c for c in GRIDS[kernel][:: 4 if quick else 1] if c != now)]
    tasks = [(device, kernel, key, candidate) for (kernel, key), some in plan.items() for candidate in some]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        reasons = list(progress(pool.map(check, *zip(*tasks)), len(tasks), "compile and check"))
    right: dict[tuple, list[dict]] = {}
    for (_, kernel, key, candidate), reason in zip(tasks, reasons):
        if reason is None:
            right.setdefault((kernel, key), []).append(candidate)
        elif not reason.startswith("OutOfResources"):
            wrong.append(f"{kernel}, {key}, {candidate}: {reason}")
    for kernel, key in progress(plan, len(plan), "time"):
        if (kernel, key) in right:
            best[kernel][key] = fastest(device, kernel, key, right[kernel, key], seconds)
        else:
            wrong.append(f"{kernel}, {key}: no candidate can be used")
    return best, wrong


def tune_choices(device, quick: bool, seconds: Callable) -> dict:
    """The fastest form at each shape, by the configurations that are installed."""
    ranks, projections = ((16,), shapes.PROJECTIONS[::4]) if quick else ((16, 64), shapes.PROJECTIONS)
    best = {what: {kind: [] for kind in TYPES} for what in FORMS}
    for what, kind in progress(list(itertools.product(FORMS, TYPES)), 2 * len(FORMS), "forms"):
        for shape, layers in by_shape(what, Draw(device, TYPES[kind][0]), ranks, projections).items():
            best[what][kind].append(fastest_form(device, what, shape, layers, seconds))
    return best


def main() -> int:
    names = [*GRIDS, "choices"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=lambda s: s.split(","), default=names, metavar="NAMES",
                        help=f"comma-separated, of: {', '.join(names)} (lowrank_linear's forms); default all")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="rank 16 alone, read in vectors, a quarter of the candidates and of the shapes")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: deft_kernels/triton/configs/<device>.json")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1),
                        help="processes that compile, each with half a GB on the GPU (default %(default)s)")  # fmt: skip
    options = parser.parse_args()
    if unknown := set(options.kernels) - set(names):
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("tune: no GPU here (torch.cuda.is_available() is False), and only a GPU can be tuned for", file=sys.stderr)
        return 2
    device, seconds = torch.device("cuda"), functools.partial(measure.device_seconds, budget=0.03)
    header = measure.environment()
    kernels = [name for name in options.kernels if name != "choices"]
    best, wrong = tune(device, kernels, RANKS[:1] if options.quick else RANKS, options.quick, options.jobs, seconds)
    choices = tune_choices(device, options.quick, seconds) if "choices" in options.kernels else {}
    out = options.out or CONFIGS / f"{measure.file_name(header['device'])}.json"
    write(out, header, best, choices)
    print(f"written to {out}", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
