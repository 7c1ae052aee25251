"""What DEFT costs here, in PEFT, as LoRA, and at this machine's limit: every peer in one run, by one command.

    python -m benchmarks                                  # minutes, on any machine; --size full measures everything
    python -m benchmarks --suite layer,models --peers PEFT,LyCORIS
    python -m benchmarks --compare 0123abc 4567def        # two commits or devices: what changed beyond noise
    python -m benchmarks --readme                         # README's figures, anew from benchmarks/results

Nothing is timed whose results have not been compared with the reference in float64 first: what is wrong says RED, and the
exit status is 1. A figure is the median over rounds, each of which times every peer once, in turn, and the machine's own copy
and matrix product besides; a ratio is the median over the rounds of the ratio in each.

Results, a table and plots go to benchmarks/results/<device>/<commit>.{json,md} and <commit>-*.{png,svg}.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import measure, report
from benchmarks.suite import SIZES, Options, rows_of

SUITES = ("operations", "layer", "models", "sampling", "training")


def run(suites: list[str], options: Options) -> list[dict]:
    """All rows, told as they come."""
    rows = []
    for suite in suites:
        for bench in importlib.import_module(f"benchmarks.{suite}").benches(options):
            found = list(rows_of(bench, options))
            rows += found
            print(report.table(found), flush=True)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--suite", type=lambda s: s.split(","), default=list(SUITES), metavar="NAMES",
                      help=f"comma-separated, of: {', '.join(SUITES)}; default all")  # fmt: skip
    made.add_argument("--size", choices=SIZES, default="small",
                      help="tiny: layers of no interest, to try the code; full: every shape, rank and peer (default small)")  # fmt: skip
    made.add_argument("--device", choices=("cpu", "cuda"), default=here, help="default %(default)s here")
    made.add_argument("--peers", type=lambda s: tuple(s.split(",")), default=(), metavar="NAMES",
                      help="comma-separated parts of names, such as PEFT,LyCORIS; what is measured here and the floor always run")  # fmt: skip
    made.add_argument("--threads", type=int, help="of a CPU; default: torch's own choice here")
    made.add_argument("--output", type=Path, metavar="FILE.json", help="instead of benchmarks/results/<device>/<commit>.json")
    made.add_argument("--compare", nargs="+", metavar="REV",
                      help="measure nothing; compare results: two of FILE.json or commits, or one with the newest of this device")  # fmt: skip
    made.add_argument("--readme", action="store_true", help="measure nothing; write README's figures anew from the results")
    return made


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
    rows = run(given.suite, options)
    out = measure.save(found, given.output, size=given.size, suites=given.suite, rows=rows)
    out.with_suffix(".md").write_text(report.markdown(out))
    report.plot(out)
    print(f"\nwritten to {out}, its tables to {out.with_suffix('.md').name} and its plots beside it")
    return int(any("red" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
