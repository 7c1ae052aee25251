"""Suite: every operation by each backend that serves here, beside plain torch, the library's products and the least that the
work takes (benchmarks/cases.py)."""

import os
from collections.abc import Callable, Iterator

import torch

import deft_kernels as dk
from benchmarks import cases, measure, peers, shapes
from benchmarks.cases import OURS, PEERS, Case, Draw
from benchmarks.suite import Bench, Options, Peer


def benches(options: Options) -> Iterator[Bench]:
    before = os.environ.get("DEFT_KERNELS_BACKEND", "auto")
    for case in every_case(options):
        yield Bench(
            "operations", case.operation, case.layers, case.dtype, case.floor,
            peers=lambda case=case: made(case, options), bytes=case.bytes, flops=case.flops, at=case.at or {},
        )  # fmt: skip
    os.environ["DEFT_KERNELS_BACKEND"] = before  # for the suites that come next


def every_case(options: Options) -> Iterator[Case]:
    device, full = options.device, options.size == "full"
    on_gpu = device.type == "cuda"
    linear = shapes.TINY_LINEAR if options.size == "tiny" else shapes.LINEAR if full or on_gpu else shapes.LINEAR[:1]
    if options.size == "tiny":
        models = {"tiny": shapes.each(shapes.TINY)}
    elif on_gpu:
        models = {"SDXL, 560 layers": shapes.each(shapes.SDXL)}
    else:
        models = {"a tenth of SDXL, 56 layers": shapes.each(shapes.SDXL_TENTH)}
    single = {f"{d}x{d}": [(d, d)] for d, _ in linear}
    tall = {"8 of FLUX's 12288x3072": shapes.each(shapes.TALL)} if on_gpu else {}
    for build in (cases.orthonormalize, cases.orthonormalize_backward):
        for label, layers in (models | single).items():
            yield build(layers, label, Draw(device, torch.float32))
    for dtype in [torch.bfloat16, torch.float32] if on_gpu else [torch.float32]:
        draw = Draw(device, dtype)
        for build in (cases.project, cases.project_backward, cases.merge):
            for label, layers in (models | single | (tall if build is cases.merge else {})).items():
                yield build(layers, label, draw)
        for features, tokens in linear:
            for backward in (False, True):
                yield cases.lowrank_linear(features, tokens, draw, backward)
    if full:
        yield from curves(device, torch.bfloat16 if on_gpu else torch.float32)


def curves(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Each operation against rank; those on many layers against their number, lowrank_linear against tokens."""
    draw, builders = Draw(device, dtype), (cases.orthonormalize, cases.project, cases.merge)
    layers = shapes.each(shapes.SDXL_TENTH)
    for build in builders:
        for r in shapes.RANKS:
            yield build(layers, f"56 layers, r {r}", draw, r)._replace(at={"rank": r, "layers": len(layers)})
        for count in (1, 4, 16, 56):
            some = layers[:: len(layers) // count][:count]
            yield build(some, f"{count} layers, r {shapes.RANK}", draw)._replace(at={"rank": shapes.RANK, "layers": count})
    for r in shapes.RANKS:
        yield cases.lowrank_linear(1280, 1024, draw, True, r)._replace(
            layers=f"1280x1280, T 1024, r {r}", at={"rank": r, "tokens": 1024}
        )
    for tokens in shapes.TOKENS:
        case = cases.lowrank_linear(1280, tokens, draw, True)
        yield case._replace(at={"rank": shapes.RANK, "tokens": tokens})


# Who takes part -------------------------------------------------------------------------------------------------------


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


def made(case: Case, options: Options) -> dict[str, Peer]:
    """All who can do it, their results compared with float64's."""
    backend = serving(case.operation)
    ours = {} if backend == "reference" else {f"deft_kernels ({backend})": by(backend, case.op)}
    ours |= forced_cuda(case)
    others = {peers.PLAIN: by("reference", case.op)} | case.peers
    makers = {case.floor: others[case.floor]} | ours | {who: make for who, make in others.items() if options.wants(who)}
    inputs = [case.inputs() for _ in range(measure.copies(case.bytes, options.device))]
    plain, truth = cases.compared(case, inputs[0])
    found = {}
    for who, make in makers.items():
        reason = None
        if who not in (peers.FROZEN, peers.COPY):  # which do less: nothing to compare
            outputs = cases.flat(make(*inputs[0])(), case.members)
            reason = cases.wrong(outputs, plain, truth, OURS if who in ours else PEERS)
        found[who] = Peer(note=f"RED: {reason}", red=True) if reason else Peer([make(*one) for one in inputs])
    return found
