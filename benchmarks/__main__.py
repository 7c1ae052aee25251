"""What DEFT costs here, in PEFT, as LoRA, and at this machine's limit: every peer in one run, by one command.

    python -m benchmarks                                  # minutes, on any machine; --size full measures everything
    python -m benchmarks --suite layer,models --peers PEFT,LyCORIS
    python -m benchmarks --compare 0123abc 4567def        # two commits or devices: what changed beyond noise
    python -m benchmarks --readme                         # README's figures, anew from benchmarks/results

Nothing is timed whose results have not been compared with the reference first, operations, layers and models' verbs in
float64, whole denoisers in their own type (OFT's by their start alone): what is wrong says RED, and the exit status is 1.
A figure is the median over rounds, each of which times every peer once, in turn, and the machine's own copy and matrix
products besides; a ratio is the median over the rounds of the ratio in each.

Results, tables and plots go to benchmarks/results/<device>/<commit>.{json,md} and <commit>-*.{png,svg}; suites that
are measured one by one come together there. With some --peers, or in size tiny, they go to outputs/benchmarks.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import measure, report
from benchmarks.suite import SIZES, SUITES, Options, rows_of


def run(suite: str, options: Options) -> Iterator[list[dict]]:
    """The rows of each bench, told as they come."""
    for bench in importlib.import_module(f"benchmarks.{suite}").benches(options):
        found = list(rows_of(bench, options))
        print(report.table(found), flush=True)
        yield found


def earlier(out: Path, found: dict, suites: list[str]) -> dict:
    """What a file holds of other suites: their names, as far as they are whole, and rows. ValueError where it is of another
    setting, and would be lost."""
    if not out.is_file():
        return {"suites": [], "rows": []}
    before = json.loads(out.read_text())
    if unlike := [name for name, value in found.items() if name != "date" and before.get(name, value) != value]:
        was = ", ".join(f"{name} {before[name]}" for name in unlike)
        raise ValueError(f"{out} holds a result of {was}: name another file by --output, or remove it")
    rows = [row for row in before["rows"] if row["suite"] not in suites]
    measured = before.get("suites", {row["suite"] for row in rows})
    return {"suites": [suite for suite in SUITES if suite in measured and suite not in suites], "rows": rows}


def text(result: dict) -> str:
    """A result in JSON, a line for each row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return json.dumps(result | {"rows": ["ROWS"]}, indent=1).replace('  "ROWS"', rows) + "\n"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    for flag, help, more in (
        ("--suite", f"comma-separated, of: {', '.join(SUITES)}; default all", {"type": commas, "default": SUITES}),
        ("--size", "tiny: to try the code; full: every shape, rank and peer; default small", {"choices": SIZES}),
        ("--device", "default %(default)s here", {"choices": ("cpu", "cuda"), "default": here}),
        ("--peers", "comma-separated parts of names, such as PEFT,LyCORIS; what is here and the floor always run",
         {"type": commas, "default": ()}),
        ("--threads", "of a CPU; default torch's own choice", {"type": int}),
        ("--output", "FILE.json, in place of <device>/<commit>.json there", {"type": Path}),
        ("--compare", "measure nothing: compare two results (files or commits), or one with this device's newest",
         {"nargs": "+", "metavar": "REV"}),
        ("--readme", "measure nothing: write README's figures anew from the results", {"action": "store_true"}),
    ):  # fmt: skip
        made.add_argument(flag, help=help, **more)
    made.set_defaults(size="small")
    return made


def commas(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> int:
    command = parser()
    given = command.parse_args()
    if unknown := set(given.suite) - set(SUITES):
        command.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.compare:
        return report.compare(given.compare, given.device)
    if given.readme:
        return report.write_readme()
    if given.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch.cuda.is_available() is False here")
    torch.manual_seed(0)
    options = Options(torch.device(given.device), given.size, given.peers)
    found = measure.environment(given.device, ("peft", "diffusers", "lycoris"))
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    if given.device == "cpu":
        print("These are CPU figures. The Triton kernels are not in them: their interpreter is never timed.\n")
    found |= {"clean": not found["commit"].endswith(("-dirty", "unknown")), "size": given.size, "peers": list(given.peers)}
    out = given.output or measure.result_file(found)
    try:
        result, red = found | earlier(out, found, given.suite), False
    except ValueError as error:
        command.error(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    for suite in given.suite:
        for rows in run(suite, options):
            red |= any("red" in row for row in rows)
            result["rows"] += rows
            out.write_text(text(result))  # of each bench: what stops a run costs no figures
        result["suites"].append(suite)
    out.write_text(text(result))
    out.with_suffix(".md").write_text(report.markdown(out))
    report.plot(out)
    print(f"\nwritten to {out}, its tables to {out.with_suffix('.md').name} and its plots beside it")
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
