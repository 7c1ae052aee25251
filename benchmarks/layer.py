"""Suite: one adapted linear layer beside its peers, all on the same weights, adapter and inputs.

"forward" is without gradients, as in sampling; "forward + backward" has a dense incoming gradient and gradients of x and of
all that trains. Who is said to have been given rank r has it in DEFT's and LoRA's sense; OFT's is `OFTConfig(r=r)`, r blocks
of n/r by n/r, whose count of parameters is another (`trained` tells it). What comes from float32 masters here is in the
weight's type in PEFT's and LyCORIS' layers, their fastest way.

`saved`: bytes that a forward keeps for its backward beside x and the layer's own tensors, which are there anyway.
`factors`: of those, at most, what LoRA has as parameters and DEFT has to make, `Place.factors`; so DEFT's `saved` may be
that of PEFT's LoRA and `factors`. `memory`: the peak of one call beside all that was there before it, on a GPU, whose
allocator counts it.
"""

import contextlib
import copy
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deft_kernels as dk
from benchmarks import measure, peers, shapes
from benchmarks.cases import OURS, PEERS, Draw, double, wrong
from benchmarks.suite import Bench, Options, Peer
from deft_kernels import reference
from deft_kernels.ops.lowrank_linear import activation_is_cheaper

HERE = (peers.DEFT, peers.PARA, peers.LORA)
ON_CURVES = (peers.FROZEN, peers.DEFT, peers.LORA, peers.FACTORS,
             peers.PEFT_DEFT, peers.PEFT_LORA, peers.PEFT_OFT, peers.LYCORIS)  # fmt: skip
LONG = 2.5  # seconds for each peer where all are measured on a CPU


class Place(NamedTuple):
    """W (m, n), T rows of x, rank r."""

    T: int
    m: int
    n: int
    r: int = shapes.RANK

    def __str__(self):
        return f"{self.m}x{self.n}, T {self.T}, r {self.r}"

    @property
    def room(self) -> int:
        """Bytes that its comparison in float64 takes, about: inputs, outputs, their gradients, and as much for the way."""
        T, m, n, _ = self
        return 8 * 4 * (T * (m + n) + m * n)

    def bytes(self, dtype: torch.dtype, backward: bool) -> int:
        """Of x, W, bias, P, R and y; and of dy, x, W, dx, P, R, dP and dR again."""
        T, m, n, r = self
        forward = dtype.itemsize * (T * (m + n) + m * n + m) + 4 * (m + n) * r
        return forward + backward * (dtype.itemsize * (T * (m + 2 * n) + m * n) + 8 * (m + n) * r)

    def factors(self, dtype: torch.dtype) -> int:
        """Of B and A (in the activation form B, K and R), float32's B where they are of another type, and two scales."""
        T, m, n, r = self
        made = (2 * m + n if activation_is_cheaper(*self) else m + n) * r * dtype.itemsize
        return made + (dtype != torch.float32) * 4 * m * r + 2 * 4

    def flops(self, backward: bool) -> int:
        """Of a DEFT layer, P's decomposition included, in the cheaper of the forms in factors and in W'."""
        T, m, n, r = self
        frozen, ready = 2 * T * m * n, 2 * m * n * r + 4 * m * r**2
        if not backward:
            return frozen + ready + min(2 * T * r * (m + n), 2 * m * n * r)
        return 2 * (frozen + ready) + 3 * m * r**2 + min(6 * T * r * (m + n), 4 * T * r * (m + n) + 4 * m * n * r)


def benches(options: Options) -> Iterator[Bench]:
    on_gpu = options.device.type == "cuda"
    first, side = headline(options)
    for dtype in [torch.bfloat16, torch.float32] if on_gpu else [torch.float32]:
        for place, names in places(options).items():
            if on_gpu and dtype == torch.float32 and place not in first:  # a GPU trains and samples in halves
                continue
            budget = 0.02 if options.size == "tiny" else 0.3 if on_gpu or names is ON_CURVES else LONG
            for backward in (True, False) if names is not ON_CURVES else (True,):
                yield Bench(
                    "layer", "forward + backward" if backward else "forward", str(place), dtype, peers.FROZEN,
                    functools.partial(peers_at, place, dtype, backward, names, options),
                    bytes=place.bytes(dtype, backward), flops=place.flops(backward), budget=budget,
                    at={"features": side, "rank": place.r, "tokens": place.T} if place.m == place.n == side else {},
                )  # fmt: skip


def headline(options: Options) -> tuple[list[Place], int]:
    """The layers that come first, and the features of the one whose cost is drawn against rank and tokens."""
    if options.size == "tiny":
        return [Place(T, d, d) for d, T in shapes.TINY_LINEAR], shapes.TINY_LINEAR[0][0]
    if options.device.type == "cuda":
        return [Place(T, d, d) for d, T in shapes.LINEAR], 1280
    return [Place(*shape) for shape in shapes.SMALL_PROJECTIONS], 640


def places(options: Options) -> dict[Place, tuple[str, ...]]:
    """The layers, and who is measured on each."""
    full, (layers, side) = options.size == "full", headline(options)
    ranks, tokens = ((4, 8), ()) if options.size == "tiny" else (shapes.SMALL_RANKS, shapes.SMALL_TOKENS)
    if full:
        layers = layers + [Place(*shape) for shape in (*shapes.PROJECTIONS, *shapes.MORE_PROJECTIONS)]
        ranks, tokens = shapes.RANKS, shapes.TOKENS
    most = max(place.T for place in layers if place.m == side)
    curves = [Place(most, side, side, r) for r in ranks] + [Place(T, side, side) for T in tokens]
    crowd = tuple(who for who in MAKERS if options.size != "tiny" or who != peers.PEFT_COMPILED)
    return dict.fromkeys(layers, crowd) | {place: ON_CURVES for place in curves if place not in layers}


# The peers ------------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What every peer gets: a frozen layer with weight and bias, x (T, n), dy (T, m), and adapters in numbers that the
    layer's type holds."""

    base: nn.Linear
    x: Tensor
    dy: Tensor
    P: Tensor  # (m, r), float32
    R: Tensor  # (r, n), float32
    angles: Tensor  # (r, b (b - 1) / 2), float32, OFT's, with b = n / r


def given(place: Place, draw: Draw, backward: bool) -> Given:
    T, m, n, r = place
    base = nn.Linear(n, m, device=draw.device, dtype=draw.dtype).requires_grad_(False)
    base.weight.copy_(*draw.weights([(m, n)]))
    block = n // r
    return Given(
        base, draw(T, n).requires_grad_(backward), draw(T, m), *draw.tall([(m, n)], r), *draw.wide([(m, n)], r),
        draw(r, block * (block - 1) // 2, scale=0.02, dtype=torch.float32),
    )  # fmt: skip


def put(parameters: tuple[nn.Parameter, ...], values: tuple[Tensor, ...]) -> tuple[nn.Parameter, ...]:
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)
    return parameters


def frozen(it: Given):
    return it.base, ()


def merged(it: Given):
    layer = copy.deepcopy(it.base)
    layer.weight.copy_(reference.merged_weight(it.base.weight.float(), it.P, it.R))
    return layer, ()


def here(config_class: type, it: Given, **options):
    layer = dk.DeftLinear(it.base, config_class(r=it.P.shape[1], **options))
    parameters = tuple(layer.adapter_tensors("default").values())
    return layer, put(parameters, (it.P, it.R)[: len(parameters)])


def written(function: Callable, it: Given):
    """A formula on W, bias, P and R, differentiated by autograd."""
    P, R = (t.clone().requires_grad_() for t in (it.P, it.R))
    return lambda x: function(x, it.base.weight, it.base.bias, P, R), (P, R)


def projected(x: Tensor, W: Tensor, bias: Tensor, P: Tensor, R: Tensor) -> Tensor:
    """W' = (I - Q Q^T) W + Q R, as DEFT's paper and its authors' code write it, in W's type."""
    Q = torch.linalg.qr(P).Q.to(W.dtype)
    rest = torch.eye(len(Q), dtype=W.dtype, device=W.device) - Q @ Q.mT
    return F.linear(x, rest @ W + Q @ R.to(W.dtype), bias)


def factored(x: Tensor, W: Tensor, bias: Tensor, P: Tensor, R: Tensor) -> Tensor:
    """y = x W^T + b + (x A^T) Q^T with A = R - Q^T W, in W's type, by the library's products."""
    Q = torch.linalg.qr(P).Q.to(W.dtype)
    A = torch.addmm(R.to(W.dtype), Q.mT, W, alpha=-1)
    return torch.addmm(F.linear(x, W, bias), x @ A.mT, Q.mT)


def peft_deft(it: Given, **compiled):
    import peft
    from peft.tuners.deft.layer import DeftLinear

    r = it.P.shape[1]
    config = peft.DeftConfig(r=r, decomposition_method="qr", init_weights=False)
    layer = DeftLinear(it.base, "default", config, r=r)
    parameters = put((layer.deft_P["default"], layer.deft_R["default"]), (it.P, it.R))
    return torch.compile(layer, **compiled) if compiled else layer, parameters


def peft_lora(it: Given):
    import peft
    from peft.tuners.lora.layer import Linear

    r = it.P.shape[1]
    layer = Linear(it.base, "default", peft.LoraConfig(r=r, lora_alpha=r), r=r, lora_alpha=r)
    return layer, put((layer.lora_B["default"].weight, layer.lora_A["default"].weight), (it.P, it.R))


def peft_oft(it: Given):
    import peft
    from peft.tuners.oft.layer import Linear

    r = it.P.shape[1]
    layer = Linear(it.base, "default", peft.OFTConfig(r=r, oft_block_size=0), r=r)
    return layer, put((layer.oft_R["default"].weight,), (it.angles,))


def lycoris_locon(it: Given, bypass: bool):
    from lycoris import LoConModule

    r = it.P.shape[1]
    layer = LoConModule("layer", it.base, 1.0, r, r, bypass_mode=bypass).to(it.base.weight)
    return layer, put((layer.lora_up.weight, layer.lora_down.weight), (it.P, it.R))


# What they compute, in any type: float64 makes it the truth. (x, W, bias, parameters) -> y -----------------------------


def deft_formula(x: Tensor, W: Tensor, bias: Tensor, P: Tensor, R: Tensor | None = None) -> Tensor:
    factors = reference.factors(W.to(P.dtype), P, R)
    return reference.lowrank_linear(x, W, bias, *(t.to(x.dtype) for t in factors))


def lora_formula(x: Tensor, W: Tensor, bias: Tensor, P: Tensor, R: Tensor) -> Tensor:
    return reference.lowrank_linear(x, W, bias, P.to(x.dtype), R.to(x.dtype))


def oft_formula(x: Tensor, W: Tensor, bias: Tensor, angles: Tensor) -> Tensor:
    """y = (x O) W^T + b: O has r blocks on its diagonal, Cayley's (I + S)(I - S)^-1 of a skew S by the first five terms of
    its series, I + 2 (S + S^2 + S^3) + S^4, as PEFT has it (Orthogonal Finetuning Made Scalable, arXiv 2506.19847)."""
    r, block = len(angles), x.shape[-1] // len(angles)
    above = torch.ones(block, block, dtype=torch.bool, device=x.device).triu(1)
    half = torch.zeros(r, block, block, dtype=angles.dtype, device=x.device).masked_scatter(above, angles)
    S = half - half.mT
    S2 = S @ S
    O = torch.eye(block, dtype=S.dtype, device=x.device) + 2 * (S + S2 + S2 @ S) + S2 @ S2
    turned = torch.einsum("trb,rbc->trc", x.view(len(x), r, block), O.to(x.dtype))
    return F.linear(turned.reshape(x.shape), W, bias)


FORMULAS = {  # and what of `Given` they take as parameters
    "deft": (deft_formula, ("P", "R")), "para": (deft_formula, ("P",)), "lora": (lora_formula, ("P", "R")),
    "oft": (oft_formula, ("angles",)),
}  # fmt: skip


class Maker(NamedTuple):
    """How a peer comes by its layer."""

    make: Callable[[Given], tuple[Callable, tuple]]  # -> x -> y, and what trains, in the order of its formula
    formula: str | None  # of FORMULAS; None: nothing to compare
    library: str | None = None


MAKERS = {
    peers.FROZEN: Maker(frozen, None),
    peers.MERGED: Maker(merged, "deft"),
    peers.DEFT: Maker(functools.partial(here, dk.DeftConfig), "deft"),
    peers.PARA: Maker(functools.partial(here, dk.DeftConfig, para=True), "para"),
    peers.LORA: Maker(functools.partial(here, dk.LoraConfig), "lora"),
    peers.FACTORS: Maker(functools.partial(written, factored), "deft"),
    peers.PROJECTOR: Maker(functools.partial(written, projected), "deft"),
    peers.PEFT_DEFT: Maker(peft_deft, "deft", "peft"),
    peers.PEFT_COMPILED: Maker(functools.partial(peft_deft, dynamic=False), "deft", "peft"),
    peers.PATCHED: Maker(peft_deft, "deft", "peft"),
    peers.PEFT_LORA: Maker(peft_lora, "lora", "peft"),
    peers.PEFT_OFT: Maker(peft_oft, "oft", "peft"),
    peers.LYCORIS: Maker(functools.partial(lycoris_locon, bypass=False), "lora", "lycoris"),
    peers.LYCORIS_BYPASS: Maker(functools.partial(lycoris_locon, bypass=True), "lora", "lycoris"),
}


def peers_at(place: Place, dtype: torch.dtype, backward: bool, names: tuple[str, ...], options: Options) -> dict[str, Peer]:
    """Those who are wanted, compared with what they compute in float64."""
    half = memory_of(options.device) / 2
    if place.room > half:
        return {peers.FROZEN: Peer(note=f"needs some {place.room / 1e9:.0f} GB, more than half of this machine's memory")}
    draw = Draw(options.device, dtype)
    sets = [given(place, draw, backward) for _ in range(measure.copies(place.bytes(dtype, backward), options.device))]

    @functools.cache
    def compared(formula: str) -> tuple[list[Tensor], list[Tensor]]:
        """Its outputs in the layer's type, and the truth."""
        function, roles = FORMULAS[formula]
        base, x, dy, *_ = it = sets[0]
        parameters = [getattr(it, role).clone().requires_grad_(backward) for role in roles]
        inputs = [parameters, x, dy, base.weight, base.bias]
        return tuple(
            step(lambda x, p=parameters, W=W, bias=bias: function(x, W, bias, *p), parameters, x, dy)
            for parameters, x, dy, W, bias in (inputs, double(inputs))
        )

    chosen = [who for who in names if who == peers.FROZEN or peers.is_here(who) or options.wants(who)]
    return {who: peer_of(who, place, sets, compared) for who in chosen}


def peer_of(who: str, place: Place, sets: list[Given], compared: Callable[[str], tuple]) -> Peer:
    """One of them, right or red or unable, with all that is measured of it but time."""
    make, formula, library = MAKERS[who]
    x = sets[0].x
    if library and find_spec(library) is None:
        return Peer(note=f"{library} is not installed")
    if who == peers.PEFT_COMPILED:
        torch.compiler.reset()  # or it would stop compiling after eight shapes
        if reason := cannot_compile(x.device):
            return Peer(note=reason)
    squares = 4 * x.itemsize * place.m * (place.m + place.n)  # two of m x m, two of W's size, and their gradients
    if who == peers.PROJECTOR and squares > memory_of(x.device) / 2:
        return Peer(note=f"its m x m matrices need some {squares / 1e9:.0f} GB")
    layers = [make(it) for it in sets]
    calls = [functools.partial(step, *layer, it.x, it.dy) for layer, it in zip(layers, sets)]
    around = functools.partial(patched, calls) if who == peers.PATCHED else contextlib.nullcontext
    with around():
        outputs, more = calls[0](), figures(sets[0], *layers[0], calls[0])
    if formula:
        pair = compared(formula)
        if who == peers.MERGED:  # which has no gradients of P and R
            pair = [some[: len(outputs)] for some in pair]
        if reason := wrong(outputs, *pair, OURS if who in HERE else PEERS):
            return Peer(note=f"RED: {reason}", red=True)
    if who in (peers.DEFT, peers.PARA) and x.requires_grad:
        more["factors"] = place.factors(x.dtype)
    captured = who != peers.PATCHED and graphs_fit(place, x.device)
    return Peer(calls, more=more, around=None if captured else around)


def step(function: Callable, parameters: tuple[Tensor, ...], x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and, where x asks for gradients, those of x and of the parameters."""
    if not x.requires_grad:
        with torch.no_grad():
            return [function(x)]
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)]


@contextlib.contextmanager
def patched(calls: list[Callable], model: nn.Module | None = None):
    """PEFT on these kernels, of the whole process, with what a patch keeps beside the layers of these calls (of a model)."""
    dk.patch_peft(model)
    try:
        for call in calls:
            call()
        yield
    finally:
        dk.unpatch_peft()


def figures(it: Given, function: Callable, parameters: tuple[Tensor, ...], call: Callable) -> dict[str, int]:
    more = {}
    if it.x.requires_grad:
        modules = [it.base, function] if isinstance(function, nn.Module) else [it.base]
        own = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        more = {"saved": saved(function, it.x, own, parameters), "trained": sum(p.numel() for p in parameters)}
    if it.x.is_cuda:
        with measure.peak("cuda") as peak:
            call()
        more["memory"] = peak.bytes
    return more


def saved(function: Callable, x: Tensor, *there: Iterable[Tensor]) -> int:
    """Bytes of all storages that y = function(x) keeps for its backward, but for those of x and of tensors that are there
    anyway."""
    kept = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no other one gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(x)
    for t in itertools.chain([x], *there):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def memory_of(device: torch.device) -> int:
    """Bytes that it has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cannot_compile(device: torch.device) -> str | None:
    """Why `torch.compile` makes no code here, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if device.type == "cuda" or shutil.which(compiler) else f"torch.compile needs a C++ compiler: no {compiler}"


def graphs_fit(place: Place, device: torch.device) -> bool:
    """Whether everyone's CUDA graph, which holds the memory of a call for as long as it lives, fits the device."""
    return device.type == "cpu" or len(MAKERS) * place.room / 2 < memory_of(device) / 2  # in float32
