"""What the benchmarks measure: each operation's inputs, its bytes and flops by count, who else can do it, and the gate.

Each input is read once, each output written once, and a multiply-add is two flops.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.peers import COPY, FROZEN, PLAIN
from deft_kernels import reference

deft = torch.ops.deft_kernels
OURS, PEERS = 2, 8  # how often plain torch's own error is allowed: peers round in other places than the reference
LOOP, CHAIN = "torch.linalg.qr, a loop", "library chain"


class Case(NamedTuple):
    """One operation on some layers. Functions take the inputs one by one and return tensors, or lists with one for each
    layer; a maker takes them and returns the call that is timed."""

    operation: str
    layers: str
    dtype: torch.dtype
    bytes: int
    flops: int
    inputs: Callable[[], tuple]
    plain: Callable  # the maths in plain torch, in any type: float64 makes it the truth
    op: Callable | None  # the same by whatever backend serves
    peers: dict[str, Callable]  # makers
    floor: str  # the row that counts as 1
    members: list[int] | None = None  # of operations on lists: the layers whose values are compared
    at: dict[str, int] | None = None  # along what its cost is drawn


class Draw:
    """Random inputs on a device, in numbers that the weights' type holds."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).to(dtype or self.dtype)

    def weights(self, layers) -> list[Tensor]:
        return [self(m, n, scale=n**-0.5) for m, n in layers]

    def tall(self, layers, rank: int) -> list[Tensor]:
        return [self(m, rank, scale=0.02, dtype=torch.float32) for m, _ in layers]

    def wide(self, layers, rank: int) -> list[Tensor]:
        return [self(rank, n, scale=0.02, dtype=torch.float32) for _, n in layers]


def some_of_each(layers) -> list[int]:
    """The first and the last layer of every shape."""
    last = {shape: i for i, shape in enumerate(layers)}
    return sorted({layers.index(shape) for shape in last} | set(last.values()))


def calling(function: Callable) -> Callable:
    return lambda *inputs: functools.partial(function, *inputs)


# The operations -------------------------------------------------------------------------------------------------------
# Each takes the layers' (m, n), a label, where and in what type to draw, and the rank.


def orthonormalize(layers, label: str, draw: Draw, r: int = shapes.RANK) -> Case:
    return Case(
        "orthonormalize", label, torch.float32,
        bytes=sum(4 * 2 * m * r for m, _ in layers), flops=sum(4 * m * r**2 - 4 * r**3 // 3 for m, _ in layers),
        inputs=lambda: (draw.tall(layers, r),),
        plain=reference.orthonormalize, op=deft.orthonormalize,
        peers={LOOP: calling(lambda P: [torch.linalg.qr(p).Q for p in P])}, floor=LOOP, members=some_of_each(layers),
    )  # fmt: skip


def orthonormalize_backward(layers, label: str, draw: Draw, r: int = shapes.RANK) -> Case:
    def inputs():
        P = draw.tall(layers, r)
        return draw.tall(layers, r), [torch.linalg.qr(p).Q for p in P], P

    def autograd(dQ, Q, P):
        P = [p.clone().requires_grad_() for p in P]
        Q = [torch.linalg.qr(p).Q for p in P]
        return lambda: torch.autograd.grad(Q, P, dQ, retain_graph=True)

    return Case(
        "orthonormalize_backward", label, torch.float32,
        bytes=sum(4 * 4 * m * r for m, _ in layers), flops=sum(7 * m * r**2 for m, _ in layers),
        inputs=inputs, plain=reference.orthonormalize_backward, op=deft.orthonormalize_backward,
        peers={f"{LOOP}, autograd": autograd}, floor=f"{LOOP}, autograd", members=some_of_each(layers),
    )  # fmt: skip


def project(layers, label: str, draw: Draw, r: int = shapes.RANK) -> Case:
    ones = functools.partial(torch.ones, len(layers), device=draw.device)
    return Case(
        "project", label, draw.dtype,
        bytes=sum(draw.dtype.itemsize * m * n + 4 * (m + 2 * n) * r for m, n in layers),
        flops=sum(2 * m * n * r for m, n in layers),
        inputs=lambda: (draw.tall(layers, r), draw.weights(layers), draw.wide(layers, r), ones(), ones()),
        plain=reference.project, op=deft.project,
        peers={CHAIN: calling(
            lambda K, W, R, *_: [torch.addmm(r, k.mT, w.float(), alpha=-1) for k, w, r in zip(K, W, R)]
        )}, floor=PLAIN, members=some_of_each(layers),
    )  # fmt: skip


def project_backward(layers, label: str, draw: Draw, r: int = shapes.RANK) -> Case:
    ones = functools.partial(torch.ones, len(layers), device=draw.device)
    return Case(
        "project_backward", label, draw.dtype,
        bytes=sum(draw.dtype.itemsize * m * n + 4 * (m + 2 * n) * r for m, n in layers),
        flops=sum(2 * m * n * r for m, n in layers),
        inputs=lambda: (draw.wide(layers, r), draw.weights(layers), ones(), ones()),
        plain=reference.project_backward, op=deft.project_backward,
        peers={CHAIN: calling(
            lambda dA, W, *_: ([(w.float() @ da.mT).neg_() for da, w in zip(dA, W)], [da.clone() for da in dA])
        )}, floor=PLAIN, members=some_of_each(layers),
    )  # fmt: skip


def merge(layers, label: str, draw: Draw, r: int = shapes.RANK) -> Case:
    """Into other storage than W's, as from a snapshot."""

    def inputs():
        W, P = draw.weights(layers), draw.tall(layers, r)
        return W, P, [torch.linalg.qr(p).Q for p in P], draw.wide(layers, r), [torch.empty_like(w) for w in W]

    def op(W, P, Q, R, out):
        deft.merge_into(out, W, Q, Q, R)
        return out

    def chain(W, P, Q, R, out):  # in the weights' own type
        Q, R = ([t.to(w.dtype) for t, w in zip(tensors, W)] for tensors in (Q, R))
        return lambda: [torch.addmm(w, q, torch.addmm(r, q.mT, w, alpha=-1), out=o) for w, q, r, o in zip(W, Q, R, out)]

    def copy(W, *_):
        flat = torch.cat([w.flatten() for w in W])
        return functools.partial(torch.empty_like(flat).copy_, flat)

    return Case(
        "merge", label, draw.dtype,
        bytes=sum(2 * draw.dtype.itemsize * m * n + 4 * (m + n) * r for m, n in layers),
        flops=sum(4 * m * n * r for m, n in layers),
        inputs=inputs, plain=lambda W, P, Q, R, out: reference.merge(W, Q, Q, R), op=op,
        peers={COPY: copy, CHAIN: chain}, floor=COPY, members=some_of_each(layers),
    )  # fmt: skip


def lowrank_linear(features: int, tokens: int, draw: Draw, backward: bool, r: int = shapes.RANK) -> Case:
    T, d, size = tokens, features, draw.dtype.itemsize

    def inputs():
        factors = [draw(d, r, scale=d**-0.5), draw(r, d, scale=d**-0.5)]
        x, B, A = (t.requires_grad_(backward) for t in (draw(T, d), *factors))
        return x, *draw.weights([(d, d)]), draw(d), B, A, draw(T, d)

    def through(function):
        def outputs(x, W, bias, B, A, dy):
            y = function(x, W, bias, B, A)
            wanted = [t for t in (x, B, A) if t.requires_grad]
            return [y, *torch.autograd.grad(y, wanted, dy)] if wanted else [y]

        return outputs

    elements, flops = 2 * T * d + d * d + (T + 2 * d) * r, 2 * T * d * d + 4 * T * d * r
    if backward:
        elements, flops = elements + 3 * T * d + d * d + (T + 4 * d) * r, flops + 2 * T * d * d + 8 * T * d * r
    chain = through(reference.lowrank_linear)

    def frozen(x, W, bias, B, A, dy):
        y = F.linear(x, W, bias)
        return [y, *torch.autograd.grad(y, x, dy)] if backward else [y]

    return Case(
        f"lowrank_linear forward{' + backward' if backward else ''}", f"{d}x{d}, T {T}", draw.dtype, size * elements, flops,
        inputs, plain=chain, op=through(deft.lowrank_linear),
        peers={FROZEN: calling(frozen), CHAIN: calling(chain)}, floor=FROZEN,
    )  # fmt: skip


# lowrank_linear's parts, whose forms are Triton's ---------------------------------------------------------------------


def product(T: int, m: int, n: int, draw: Draw, r: int, dx: bool) -> Case:
    """y = x W^T + (x A^T) B^T of a layer, or dx = dy W + (dy B) A."""
    from deft_kernels.triton.lowrank_linear import product as function

    def inputs():
        (W,), B, A = draw.weights([(m, n)]), draw(m, r, scale=m**-0.5), draw(r, n, scale=n**-0.5)
        return (draw(T, m), W, B, A) if dx else (draw(T, n), W.t(), A.t(), B.t())

    def plain(left, M, D, E):
        return [left @ M + (left @ D) @ E, left @ D]

    return Case(
        "product", f"{m}x{n}, T {T}", draw.dtype, draw.dtype.itemsize * (T * (m + n) + m * n), 2 * T * m * n,
        inputs, plain, lambda left, M, D, E: function(left, M, None, D, E), peers={}, floor="",
    )  # fmt: skip


def thin(T: int, m: int, n: int, draw: Draw, r: int) -> Case:
    """dB = dy^T h and dA = dh^T x."""
    from deft_kernels.triton.lowrank_linear import thin_products

    return Case(
        "thin", f"{m}x{n}, T {T}", draw.dtype, draw.dtype.itemsize * T * (m + n), 2 * T * (m + n) * r,
        lambda: (draw(T, m), draw(T, r), draw(T, n), draw(T, r)),
        lambda dy, h, x, dh: [dy.t() @ h, dh.t() @ x], thin_products, peers={}, floor="",
    )  # fmt: skip


# The gate ------------------------------------------------------------------------------------------------------------


def subset(value, members: list[int] | None):
    """Of some layers' inputs, those of the members."""
    if members is None:
        return value
    return value[members] if isinstance(value, Tensor) else [value[i] for i in members]


def double(value):
    if isinstance(value, list):
        return [double(t) for t in value]
    return value.detach().double().requires_grad_(value.requires_grad)


def flat(outputs, members: list[int] | None = None) -> list[Tensor]:
    """Tensors from an operation's outputs, a list or a tuple of lists; of the members' alone."""
    lists = outputs if isinstance(outputs[0], (list, tuple)) else [outputs]
    return [t.detach() for list_ in lists for t in subset(list(list_), members)]


def wrong(outputs, plain, truth, times: float) -> str | None:
    """Why outputs are too far from the truth, or None: the distance may be `times` that of plain torch, and half a unit
    in the last place of the outputs' type."""
    for i, (got, beside, exact) in enumerate(zip(outputs, plain, truth, strict=True)):
        size = exact.norm().item()
        error, allowed = (got.double() - exact).norm().item(), (beside.double() - exact).norm().item()
        if not error <= times * allowed + size * torch.finfo(got.dtype).eps / 2:
            return f"output {i} is {error / size:.1e} from float64, plain torch {allowed / size:.1e}"
    return None


def compared(case: Case, inputs: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """The plain outputs and the truth for a case's members."""
    some = [subset(value, case.members) for value in inputs]
    return flat(case.plain(*some)), flat(case.plain(*map(double, some)))
