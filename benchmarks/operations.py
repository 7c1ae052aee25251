"""Every operation beside its peers, and beside what the device could do: `python -m benchmarks.operations --help`.

A row of the table gives the median time on the device (its queue kept full), the time by the clock on the wall (the host
included), the share of the copy bandwidth and of the matrix rate that were measured in the same run, and the ratio to the
operation's floor. Bytes and flops are counted, not measured (benchmarks/cases.py). No row is timed before its values have
been compared with the reference in float64: one that is wrong says RED, and the exit status is 1.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import deft_kernels as dk
from benchmarks import cases, measure, shapes
from benchmarks.cases import COPY, FROZEN, PLAIN, Case, Draw
from deft_kernels import reference

OURS, PEERS = 2, 8  # how often plain torch's own error is allowed: peers round in other places than the reference
HAS_PEFT = find_spec("peft") is not None


def layer(features: int, tokens: int, draw: Draw, method: str, r: int = shapes.RANK) -> Case:
    """A whole adapted layer, forward + backward, as modules: DEFT by QR, which prepares its factors itself, or LoRA."""
    T, d, size, lora = tokens, features, draw.dtype.itemsize, method == "LoRA"
    (W,), bias = draw.weights([(d, d)]), draw(d)
    P, R = (draw(*shape, scale=0.02, dtype=torch.float32) for shape in ((d, r), (r, d)))
    base = nn.Linear(d, d, device=draw.device, dtype=draw.dtype).requires_grad_(False)
    base.load_state_dict({"weight": W, "bias": bias})
    ours = dk.DeftLinear(base, dk.LoraConfig(r=r) if lora else dk.DeftConfig(r=r))
    ours.deft_P["default"].data.copy_(P)
    ours.deft_R["default"].data.copy_(R)

    def plain(x, dy, W, bias, P, R):
        factors = (P, R) if lora else reference.factors(W.to(P.dtype), P, R)
        y = reference.lowrank_linear(x, W, bias, *(t.to(x.dtype) for t in factors))
        return [y, *torch.autograd.grad(y, (x, P, R), dy)]

    def step(module, parameters):
        def outputs(x, dy, *_):
            os.environ["DEFT_KERNELS_BACKEND"] = "auto"
            y = module(x)
            return [y, *torch.autograd.grad(y, (x, *parameters), dy)]

        return cases.calling(outputs)

    peers = {FROZEN: step(base, ()), f"deft_kernels {method}": step(ours, (ours.deft_P["default"], ours.deft_R["default"]))}
    peers[f"PEFT {method}"] = None
    if HAS_PEFT:
        theirs, parameters = peft_layer(base, P, R, lora)
        peers[f"PEFT {method}"] = step(theirs, parameters)
        if draw.device.type == "cuda":
            torch.compiler.reset()  # or it would stop compiling after eight shapes
            peers[f"PEFT {method}, torch.compile"] = step(torch.compile(theirs, dynamic=False), parameters)
    once = cases.lowrank_linear(features, tokens, draw, backward=True, r=r)
    extra = 0 if lora else 2 * size * d * d + 4 * 14 * d * r  # project and orthonormalize, and back
    return Case(
        f"{method} layer, forward + backward", f"{d}x{d}, T {T}", draw.dtype, once.bytes + extra,
        once.flops + (0 if lora else 4 * d * d * r + 11 * d * r**2),
        inputs=lambda: (draw(T, d).requires_grad_(), draw(T, d), W, bias, P.requires_grad_(), R.requires_grad_()),
        plain=plain, op=None, peers=peers, floor=FROZEN,
    )  # fmt: skip


# PEFT ----------------------------------------------------------------------------------------------------------------


def peft_layer(base: nn.Linear, P: Tensor, R: Tensor, lora: bool = False):
    """PEFT's layer and its two parameters. LoRA's are in the base layer's type, PEFT's fastest way; DEFT computes in
    float32 whatever they are."""
    import peft
    from peft.tuners.deft.layer import DeftLinear
    from peft.tuners.lora.layer import Linear

    r = P.shape[1]
    if lora:
        module = Linear(base, "default", peft.LoraConfig(r=r, lora_alpha=r), r=r, lora_alpha=r)
        parameters = module.lora_B["default"].weight, module.lora_A["default"].weight
    else:
        config = peft.DeftConfig(r=r, decomposition_method="qr", init_weights=False)
        module = DeftLinear(base, "default", config, r=r)
        parameters = module.deft_P["default"], module.deft_R["default"]
    for parameter, value in zip(parameters, (P, R)):
        parameter.data.copy_(value)
    return module, parameters


def peft_merge(W, P, Q, R, out) -> Callable:
    """PEFT's merge of every layer, one after the other. Each call merges into what the last one has left."""
    modules = []
    for w, p, r in zip(W, P, R):
        base = nn.Linear(*reversed(w.shape), bias=False, device="meta").requires_grad_(False)
        base.weight = nn.Parameter(w, requires_grad=False)
        modules.append(peft_layer(base, p, r)[0])

    def call():
        for module in modules:
            module.merge()
            module.merged_adapters.clear()
        return [module.base_layer.weight.data for module in modules]

    return call


# Comparing and timing -------------------------------------------------------------------------------------------------


def by(backend: str, op: Callable) -> Callable:
    def make(*inputs):
        def call():
            os.environ["DEFT_KERNELS_BACKEND"] = backend
            return op(*inputs)

        return call

    return make


def serving(operation: str) -> str:
    """The backend that serves an operation here."""
    os.environ["DEFT_KERNELS_BACKEND"] = "auto"
    row = next(row for name, row in dk.backends().items() if name.startswith(operation.split()[0]))
    return next(backend for backend, what in row.items() if what == "serves")


def forced_cuda(case: Case) -> dict[str, Callable]:
    """csrc's CUDA kernel for an operation, which serves only where it is forced, beside the backend that `auto` takes."""
    os.environ["DEFT_KERNELS_BACKEND"] = "cuda"
    what = dk.backends().get(case.operation, {}).get("cuda")
    takes = case.operation == "orthonormalize" or case.dtype == torch.bfloat16
    return {"deft_kernels (cuda)": by("cuda", case.op)} if what == "serves" and takes else {}


def rows_of(case: Case, device: torch.device, rates: dict[str, float]) -> Iterator[dict]:
    """A row for each who can do it: what is counted, and either times or why there are none."""
    makers = dict(case.peers)
    if case.op is not None:
        backend = serving(case.operation)
        ours = {} if backend == "reference" else {f"deft_kernels ({backend})": by(backend, case.op)}
        ours |= forced_cuda(case)
        makers = ours | {PLAIN: by("reference", case.op)} | makers
    makers = {case.floor: makers[case.floor]} | makers
    inputs = [case.inputs() for _ in range(measure.copies(case.bytes, device))]
    plain, truth = cases.compared(case, inputs[0])
    shared = {"operation": case.operation, "layers": case.layers, "type": str(case.dtype).removeprefix("torch."),
              "bytes": case.bytes, "flops": case.flops}  # fmt: skip
    times = {}
    for name, make in makers.items():
        if name.startswith("PEFT") and not HAS_PEFT:
            yield shared | {"who": name, "note": "peft not installed"}
            continue
        reason = None
        if name not in (FROZEN, COPY):  # which do less: nothing to compare
            outputs = cases.flat(make(*inputs[0])(), case.members)
            reason = cases.wrong(outputs, plain, truth, OURS if name.startswith("deft_kernels") else PEERS)
        if reason:
            yield shared | {"who": name, "note": f"RED: {reason}", "red": True}
            continue
        calls = [make(*one) for one in inputs]
        times[name] = measure.device_seconds(calls, device)
        ratio = times[name] / times[case.floor] if case.floor in times else None  # where the floor itself is wrong
        yield shared | {
            "who": name, "seconds": times[name], "wall_seconds": measure.wall_seconds(calls, device), "ratio": ratio,
            "copy_share": case.bytes / times[name] / rates["copy"],
            "matrix_share": case.flops / times[name] / rates[shared["type"]],
        }  # fmt: skip
        del calls  # a model's merged weights, before the next peer makes its own


def every_case(device: torch.device, quick: bool) -> Iterator[Case]:
    tiny = quick and device.type != "cuda"
    types = [torch.bfloat16, torch.float32] if device.type == "cuda" else [torch.float32]
    linear = shapes.TINY_LINEAR if tiny else shapes.LINEAR
    model = {"tiny": shapes.TINY} if tiny else {"SDXL, 560 layers": shapes.SDXL}
    single = {f"{d}x{d}": {(d, d): 1} for d, _ in linear}
    groups = {label: shapes.each(layers) for label, layers in (model | single).items()}
    for build in (cases.orthonormalize, cases.orthonormalize_backward):
        for label, layers in groups.items():
            yield build(layers, label, Draw(device, torch.float32))
    for dtype in types[:1] if quick else types:
        draw = Draw(device, dtype)
        for build in (cases.project, cases.project_backward, cases.merge):
            tall = {} if tiny or build is not cases.merge else {"8 of FLUX's 12288x3072": shapes.each(shapes.TALL)}
            for label, layers in (groups | tall).items():
                case = build(layers, label, draw)
                yield case._replace(peers=case.peers | {"PEFT DEFT": peft_merge}) if build is cases.merge else case
        for features, tokens in linear:
            for backward in (False, True):
                yield cases.lowrank_linear(features, tokens, draw, backward)
            for method in ("DEFT", "LoRA"):
                yield layer(features, tokens, draw, method)


def device_rates(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and flops per second of a large square product by type."""
    side, big = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    source = torch.ones(big, dtype=torch.uint8, device=device)
    rates = {"copy": 2 * big / measure.device_seconds([functools.partial(torch.empty_like(source).copy_, source)], device)}
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        matrix = torch.randn(side, side, device=device).to(dtype)
        seconds = measure.device_seconds([functools.partial(torch.mm, matrix, matrix)], device)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    return rates


def line(row: dict) -> str:
    what = f"| {row['operation']} | {row['layers']} | {row['type']} | {row['who']} | "
    if "note" in row:
        return what + f"{row['note']} | | | | |"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    shares = f"{row['copy_share']:.1%} | {row['matrix_share']:.1%}"
    return what + f"{row['seconds'] * 1e3:.3f} | {row['wall_seconds'] * 1e3:.3f} | {shares} | {ratio} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one type; on a CPU tiny layers, to try the code")
    parser.add_argument("--device-json", type=Path, metavar="OUT",
                        help="write the figures here (default on a GPU: benchmarks/results/<device>/<commit>.json; on a CPU "
                        "they are only printed)")  # fmt: skip
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    found = measure.environment()
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    if device.type == "cpu":
        print("These are CPU figures: no GPU here. The Triton kernels are not in them (their interpreter is never timed).")
    rates = device_rates(device)
    print(", ".join(f"{k} {v / 1e9:.0f} {'GB/s' if k == 'copy' else 'Gflop/s'}" for k, v in rates.items()), "\n")
    columns = "operation|layers|type|who|ms on the device|ms by the wall|of the copy|of the matrix rate|x floor".split("|")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    rows = []
    for case in every_case(device, options.quick):
        for row in rows_of(case, device, rates):
            rows.append(row)
            print(line(row), flush=True)
    if options.device_json or device.type == "cuda":
        print(f"\nwritten to {measure.save(found, options.device_json, rates=rates, rows=rows)}")
    return int(any("red" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
