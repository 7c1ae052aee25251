"""Suite: what is done to a whole model's layers at once: their factors prepared for a step, adapters merged, unmerged,
swapped and loaded; and PEFT's own models, patched and not.

A merge starts from P and R, as users have them; where bases are ready, it says so. Files come from the page cache.
"""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deft_kernels as dk
from benchmarks import cases, measure, shapes
from benchmarks.cases import CHAIN, COPY, LOOP, OURS, PEERS, Draw
from benchmarks.layer import patched
from benchmarks.peers import DEFT, FROZEN, LORA, LYCORIS, PATCHED, PEFT_DEFT, PEFT_LORA, QR_ALONE, READY, is_here
from benchmarks.suite import Bench, Options, Peer
from deft_kernels import reference
from deft_kernels.nn.layers import prepare_layers

SWAPPED = "DEFT, hot-swapped from its file, here"
READ = "safetensors, the tensors alone"
LIBRARIES = {PEFT_DEFT: "peft", PEFT_LORA: "peft", PATCHED: "peft", QR_ALONE: "peft", LYCORIS: "lycoris"}
VERBS = ("merge", "unmerge", "hot-swap")
RATE = 1e-6  # of learning: what is timed moves next to nothing


def benches(options: Options) -> Iterator[Bench]:
    on_gpu, tiny = options.device.type == "cuda", options.size == "tiny"
    models = {"tiny": shapes.TINY} if tiny else {"SDXL": shapes.SDXL} if on_gpu else {"a tenth of SDXL": shapes.SDXL_TENTH}
    first = shapes.each(next(iter(models.values())))
    if options.size == "full":
        models |= shapes.MODELS
    fast = Draw(options.device, torch.bfloat16 if on_gpu else torch.float32)
    for name, counted in models.items():
        layers = shapes.each(counted)
        where = f"{name}, {len(layers)} layers"
        for backward in (False, True):
            yield preparing(layers, where, fast, options, backward)
        # the first model ends the curve against layers; the others have layers of other sizes
        at = {"rank": shapes.RANK, "layers": len(layers)} if layers == first else {}
        for dtype in (torch.float32, torch.bfloat16):
            for verb in VERBS:
                yield merging(verb, layers, where, Draw(options.device, dtype), options, at=at)
        yield loading(layers, where, fast, options)
    few = first[:: -(-len(first) // 14)]
    counts = [(first[:: len(first) // n][:n], shapes.RANK) for n in (1, 4, 28, 140, 280) if n < len(first)]
    for layers, r in counts + [(few, r) for r in (shapes.RANKS[:2] if tiny else shapes.RANKS)]:
        where, at = f"{len(layers)} layers, r {r}", {"rank": r, "layers": len(layers)}
        yield merging("merge", layers, where, fast, options, r, at, budget=0.1)
    for stack in shapes.TINY_STACKS if tiny else shapes.STACKS:
        for train in (True, False):
            yield stacked(*stack, fast, options, train)


# Who takes part -------------------------------------------------------------------------------------------------------


def taking_part(whos: tuple[str, ...], options: Options, found: dict[str, Peer]) -> Iterator[str]:
    """Those who are asked for, and can; `found` gets a note for each who cannot."""
    for who in whos:
        library = LIBRARIES.get(who)
        if who != FROZEN and not is_here(who) and not options.wants(who):
            continue
        if library and find_spec(library) is None:
            found[who] = Peer(note=f"{library} is not installed")
        else:
            yield who


def peer(reason: str | None, calls: list[Callable], **more) -> Peer:
    """One who is timed, unless there is a reason against it."""
    return Peer(note=f"RED: {reason}", red=True) if reason else Peer(calls, **more)


class TransformerLayers(nn.Module):
    """Linear layers on some weights. (LoRA files name a model's layers by its class: this is a "transformer".)"""

    def __init__(self, W: list[Tensor]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*reversed(w.shape), bias=False, device="meta") for w in W)
        for layer, w in zip(self.layers, W):
            layer.weight = nn.Parameter(w, requires_grad=False)

    @property
    def names(self) -> list[str]:
        return [f"layers.{i}" for i in range(len(self.layers))]


def adapt(model: nn.Module, names: list[str], who: str, r: int) -> nn.Module:
    """Put an adapter at random into these layers. Returns what its library's verbs are called on."""
    if who in (DEFT, LORA):
        kind = dk.LoraConfig if who == LORA else dk.DeftConfig
        dk.inject_adapter(model, kind(r=r, target_modules=names, init_weights=False))
        return model
    if who == LYCORIS:
        from lycoris import create_lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        return create_lycoris(model, linear_dim=r, linear_alpha=r, algo="lora").to(next(model.parameters()).device)
    import peft

    if who == PEFT_LORA:
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=names)
    else:
        config = peft.DeftConfig(r=r, decomposition_method="qr", init_weights=False, target_modules=names)
    return peft.get_peft_model(model, config)


def factors(model: nn.Module, names: list[str], name: str = "default") -> tuple[list[Tensor], list[Tensor]]:
    """P and R of an adapter in these layers, or what LoRA has in their place, whoever put them in."""
    layers = [model.get_submodule(layer) for layer in names]
    if hasattr(layers[0], "lora_B"):
        return [layer.lora_B[name].weight for layer in layers], [layer.lora_A[name].weight for layer in layers]
    return [layer.deft_P[name] for layer in layers], [layer.deft_R[name] for layer in layers]


def adapted(W: list[Tensor], who: str, P: list[Tensor], R: list[Tensor]):
    """Layers on these weights with an adapter of P and R (of LoRA's: B and A). Returns them, what the library's verbs are
    called on, and where it holds P and R."""
    base = TransformerLayers(W)
    model = adapt(base, base.names, who, P[0].shape[1])
    if who == LYCORIS:
        held = [m.lora_up.weight for m in model.loras], [m.lora_down.weight for m in model.loras]
    else:
        held = factors(base, base.names)
    put(held, (P, R))
    return base, model, held


@torch.no_grad()
def put(held, values) -> None:
    for parameters, tensors in zip(held, values, strict=True):
        for parameter, t in zip(parameters, tensors, strict=True):
            parameter.copy_(t)


# Prepare --------------------------------------------------------------------------------------------------------------


def by_reference(P, R, W) -> tuple[list[Tensor], list[Tensor]]:
    """B and A of every layer; without any R, B alone."""
    made = [reference.factors(w.to(p.dtype), p, r) for p, r, w in zip(P, R or [None] * len(P), W)]
    return [B for B, _ in made], [A for _, A in made] if R else []


def by_loop(P, R, W) -> tuple[list[Tensor], list[Tensor]]:
    Q = [torch.linalg.qr(p).Q for p in P]
    A = [torch.addmm(r, q.mT.contiguous(), w.to(q.dtype), alpha=-1) for q, r, w in zip(Q, R, W)]
    return [q.to(w.dtype) for q, w in zip(Q, W)], [a.to(w.dtype) for a, w in zip(A, W)]


def through(make: Callable, P, R, W, given=None) -> list[list[Tensor]]:
    """B and A, and where their gradients are given, P's and R's."""
    with torch.set_grad_enabled(given is not None):
        B, A = make(P, R, W)
        if given is None:
            return [B, A] if A else [B]
        dB_dA = [g.to(t.dtype) for gs, ts in zip(given, (B, A)) for g, t in zip(gs, ts)]
        dP_dR = torch.autograd.grad([*B, *A], [*P, *R], dB_dA)
    return [block for block in (B, A, dP_dR[: len(P)], dP_dR[len(P) :]) if block]


def preparing(layers, where: str, draw: Draw, options: Options, backward: bool, r: int = shapes.RANK) -> Bench:
    """P, R and W to B and A, of all layers; and their gradients back to P's and R's. PEFT's own part of that, before it sees
    x, is the QR."""
    size, some = draw.dtype.itemsize, cases.some_of_each(layers)
    weights, small = sum(size * m * n for m, n in layers), sum((4 + size) * (m + n) * r for m, n in layers)
    flops = sum(2 * m * n * r + 4 * m * r**2 + backward * (2 * m * n * r + 7 * m * r**2) for m, n in layers)

    def made() -> dict[str, Peer]:
        if note := measure.lacking(3 * weights + 8 * small, options.device):
            return {DEFT: Peer(note=f"{where}: {note}")}
        W, P, R = draw.weights(layers), draw.tall(layers, r), draw.wide(layers, r)
        given = (draw.tall(layers, r), draw.wide(layers, r)) if backward else None
        source = flat(W)
        found = {COPY: Peer([functools.partial(torch.empty_like(source).copy_, source)])}
        for t in (*P, *R):
            t.requires_grad_()
        for who in taking_part((DEFT, LOOP, QR_ALONE), options, found):
            make, held = by_loop, (P, R)
            if who != LOOP:
                base, _, held = adapted(W, DEFT if who == DEFT else PEFT_DEFT, P, R)
                make = functools.partial(by_bank if who == DEFT else by_peft, list(base.layers))
            if who == QR_ALONE:
                held = (held[0], [])
            call = functools.partial(through, make, *held, W, given)
            members = [cases.subset(each, some) if each else [] for each in (P, R if held[1] else [], W)]
            gradients = [cases.subset(each, some) for each in given or ()]
            truth = through(by_reference, *map(cases.double, members), list(map(cases.double, gradients)) or None)
            plain = through(by_reference, *members, gradients or None)
            reason = cases.wrong(cases.flat(call(), some), *map(cases.flat, (plain, truth)), OURS if who == DEFT else PEERS)
            found[who] = peer(reason, [call])
        return found

    return Bench(
        "models", "prepare, forward + backward" if backward else "prepare", where, draw.dtype, COPY, made,
        bytes=(1 + backward) * (weights + small), flops=flops,
    )  # fmt: skip


def by_bank(layers, P, R, W) -> tuple[list[Tensor], list[Tensor]]:
    prepared = [f for (f,) in prepare_layers(layers)]
    return [f.B for f in prepared], [f.A for f in prepared]


def by_peft(layers, P, R, W) -> tuple[list[Tensor], list[Tensor]]:
    return [layer._project(p, "default")[0] for layer, p in zip(layers, P)], []


# Merge, unmerge, hot-swap ---------------------------------------------------------------------------------------------


class Verbs(NamedTuple):
    """How a library merges all layers of a model, and takes that back."""

    merge: Callable[[], None]
    unmerge: Callable[[], None]
    swap: Callable[[], None]
    weights: list[nn.Parameter]  # that it merges into
    reset: Callable[[], None]  # the pristine weights are back, whatever unmerging left
    base: nn.Module  # the layers

    def of(self, verb: str) -> Callable[[], None]:
        return {"merge": self.merge, "unmerge": self.unmerge, "hot-swap": self.swap}[verb]

    @contextlib.contextmanager
    def around(self, verb: str):
        """What has to be so before a verb, and after it is undone."""
        if verb != "merge":
            self.merge()
        yield
        if verb != "unmerge":
            self.unmerge()
        self.reset()


def verbs_of(who: str, W: list[Tensor], place: list[Tensor], P: list[Tensor], R: list[Tensor]) -> Verbs:
    """Those of a library, in layers on weights in `place`, which are W whenever nothing is merged."""
    base, model, _ = adapted(place, who, P, R)
    weights = [layer.base_layer.weight if hasattr(layer, "base_layer") else layer.weight for layer in base.layers]
    if who in (DEFT, LORA):
        merge, unmerge = functools.partial(dk.merge, model), functools.partial(dk.unmerge, model)
    elif who == LYCORIS:
        merge, unmerge = functools.partial(model.merge_to, 1.0), functools.partial(model.merge_to, -1.0)
    else:
        merge, unmerge = model.merge_adapter, model.unmerge_adapter

    def again():
        unmerge()
        merge()

    def reset():
        for weight, home, w in zip(weights, place, W):
            if who in (PEFT_DEFT, PEFT_LORA):
                weight.data = home  # which it leaves as it was, for new tensors
            else:
                home.copy_(w)

    swap = functools.partial(dk.hotswap, model, "default") if who in (DEFT, LORA) else again
    return Verbs(merge, unmerge, swap, weights, reset, base)


def merging(
    verb, layers, where: str, draw: Draw, options: Options, r=shapes.RANK, at: dict | None = None, budget=1.0
) -> Bench:
    """All layers' W to W' = W + B A, or back. Unmerging tells which share of the weights it does not bring back, the others
    what more is kept as long as something is merged."""
    case, weights = cases.merge(layers, where, draw, r), sum(m * n for m, n in layers)

    def made() -> dict[str, Peer]:
        # W, two places for W', what was there before; and PEFT keeps W and what it adds in float32
        if note := measure.lacking((4 * draw.dtype.itemsize + 8) * weights, options.device):
            return {DEFT: Peer(note=f"{where}: {note}")}
        source, P, R = flat(draw.weights(layers)), draw.tall(layers, r), draw.wide(layers, r)
        target = torch.empty_like(source)
        W, out, place = (parts(t, layers) for t in (source, target, source.clone()))
        members = [cases.subset(each, case.members) for each in (W, P, R)]
        merged = {lora: [whole(*given, lora) for given in (members, map(cases.double, members))] for lora in (False, True)}
        found = {COPY: Peer([functools.partial(target.copy_, source)])}
        for who in taking_part((READY, CHAIN) if verb == "merge" else (), options, found):
            inputs = (W, P, reference.orthonormalize(P), R, out)
            call = functools.partial(case.op, *inputs) if who == READY else case.peers[CHAIN](*inputs)
            reason = cases.wrong(cases.subset(call(), case.members), *merged[False], OURS if who == READY else PEERS)
            found[who] = peer(reason, [call])
        for who in taking_part((DEFT, LORA, PEFT_DEFT, PEFT_LORA, LYCORIS), options, found):
            verbs, ours, lora = verbs_of(who, W, place, P, R), who in (DEFT, LORA), who in (LORA, PEFT_LORA, LYCORIS)
            before = held(verbs.base)
            verbs.merge()
            if verb == "hot-swap":
                verbs.swap()
            kept = held(verbs.base) - before
            got = [verbs.weights[i].detach().clone() for i in case.members]
            verbs.unmerge()
            changed = share_changed(verbs.weights, W)
            verbs.reset()
            reason = cases.wrong(got, *merged[lora], OURS if ours else PEERS)
            if ours and changed:
                reason = f"unmerging leaves {changed:.1g} of the weights changed"
            more = {"changed": changed} if verb == "unmerge" else {"kept": kept}
            if lora and verb != "unmerge":
                more["flops"] = case.flops // 2  # of W + B A: DEFT's projects W first
            found[who] = peer(reason, [verbs.of(verb)], around=functools.partial(verbs.around, verb), more=more)
        return found

    moved = {"bytes": 2 * draw.dtype.itemsize * weights} if verb == "unmerge" else {"bytes": case.bytes, "flops": case.flops}
    return Bench("models", verb, where, draw.dtype, COPY, made, at=at or {}, budget=budget, clock="wall", **moved)


def flat(W: list[Tensor]) -> Tensor:
    return torch.cat([w.flatten() for w in W])


def parts(row: Tensor, layers) -> list[Tensor]:
    """The weights of all layers, one after the other in one row of memory."""
    return [part.view(shape) for shape, part in zip(layers, row.split([m * n for m, n in layers]))]


def whole(W, P, R, lora: bool) -> list[Tensor]:
    """W' of every layer by the reference."""
    Q = P if lora else reference.orthonormalize(P)
    return reference.merge(W, Q, [None] * len(P) if lora else Q, R)


def held(model: nn.Module) -> int:
    """Bytes of all tensors that its modules hold, by whatever names."""
    storages, values = {}, [vars(module) for module in model.modules()]
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (dict, list, tuple)):
            values += value.values() if isinstance(value, dict) else value
    return sum(storages.values())


def share_changed(after: list[Tensor], before: list[Tensor]) -> float:
    """Which share of the weights differs in any bit."""
    bits = {2: torch.int16, 4: torch.int32}[before[0].itemsize]
    changed = sum((a.detach().view(bits) != b.view(bits)).sum().item() for a, b in zip(after, before, strict=True))
    return changed / sum(b.numel() for b in before)


# Loading --------------------------------------------------------------------------------------------------------------


def loading(layers, where: str, draw: Draw, options: Options, r: int = shapes.RANK) -> Bench:
    """An adapter of all layers from a file, where another one is already; and forgotten again, untimed."""

    def made() -> dict[str, Peer]:
        if note := measure.lacking(3 * draw.dtype.itemsize * sum(m * n for m, n in layers), options.device):
            return {DEFT: Peer(note=f"{where}: {note}")}
        W, P, R = draw.weights(layers), draw.tall(layers, r), draw.wide(layers, r)
        folder = tempfile.TemporaryDirectory()
        path = written(Path(folder.name), W, P, R)
        device = str(options.device)

        def read(folder=folder):  # which keeps it
            from safetensors.torch import load_file

            return load_file(path / "deft" / "adapter_model.safetensors", device=device)

        found = {READ: Peer([read])}
        for who in taking_part((DEFT, LORA, SWAPPED, PEFT_DEFT, PEFT_LORA, LYCORIS), options, found):
            loader = loader_of(who, path, W, P, R)
            with loader.around():
                loader.load()
                held = loader.held()
                wrong = any(not torch.equal(got, t) for side in zip(held, (P, R)) for got, t in zip(*side, strict=True))
            found[who] = peer("not what was written" if wrong else None, [loader.load], around=loader.around)
        return found

    size = sum(4 * (m + n) * r for m, n in layers)
    return Bench("models", "load", f"{where}, {size / 1e6:.3g} MB", torch.float32, READ, made)


def written(folder: Path, W: list[Tensor], P: list[Tensor], R: list[Tensor]) -> Path:
    """One adapter in files: `deft` and `lora` as PEFT has them, `diffusers.safetensors`, and LyCORIS's own."""
    for name, who in (("deft", DEFT), ("lora", LORA)):
        base, *_ = adapted(W, who, P, R)
        dk.save_adapter(base, folder / name)
    dk.export_lora(base, folder / "diffusers.safetensors")
    if find_spec("lycoris"):
        _, network, _ = adapted(W, LYCORIS, P, R)
        network.apply_to()  # without which it has nothing to save
        network.save_weights(folder / "lycoris.safetensors", None, None)
    return folder


class Loader(NamedTuple):
    """How a library reads an adapter from its file into a model, and forgets it."""

    load: Callable[[], object]
    forget: Callable[[], object]
    held: Callable[[], tuple[list[Tensor], list[Tensor]]]  # P and R as they were read
    before: Callable[[], object] = lambda: None

    @contextlib.contextmanager
    def around(self):
        self.before()
        yield
        self.forget()


def loader_of(who: str, folder: Path, W: list[Tensor], P: list[Tensor], R: list[Tensor]) -> Loader:
    """That of a library, into layers that have an adapter already, for one called "loaded"."""
    if who == SWAPPED:
        base, *_ = adapted([w.clone() for w in W], DEFT, P, R)
        held = functools.partial(factors, base, base.names, "hotswap")
        return Loader(lambda: dk.hotswap(base, folder / "deft"), lambda: dk.unmerge(base), held, lambda: dk.merge(base))
    if who == LYCORIS:
        return lycoris_loader(str(folder / "lycoris.safetensors"), TransformerLayers(W))
    base, model, _ = adapted(W, who, P, R)
    held = functools.partial(factors, base, base.names, "loaded")
    if who in (PEFT_DEFT, PEFT_LORA):
        file = str(folder / ("deft" if who == PEFT_DEFT else "lora"))
        return Loader(lambda: model.load_adapter(file, "loaded"), lambda: model.delete_adapter("loaded"), held)
    load, file = (dk.load_adapter, "deft") if who == DEFT else (dk.import_lora, "diffusers.safetensors")
    return Loader(lambda: load(base, folder / file, "loaded"), lambda: dk.delete_adapter(base, "loaded"), held)


def lycoris_loader(file: str, base: nn.Module) -> Loader:
    from lycoris import create_lycoris_from_weights

    networks = []

    def load():
        network, _ = create_lycoris_from_weights(1.0, file, base)
        network.apply_to()
        networks.append(network.to(base.layers[0].weight.device))

    def held():
        loras = sorted(networks[-1].loras, key=lambda lora: int(lora.lora_name.rpartition("_")[2]))
        return [lora.lora_up.weight for lora in loras], [lora.lora_down.weight for lora in loras]

    return Loader(load, lambda: networks.pop().restore(), held)


# PEFT's models, patched -----------------------------------------------------------------------------------------------


def stacked(count: int, features: int, tokens: int, draw: Draw, options: Options, train: bool, r=shapes.RANK) -> Bench:
    """A training step, AdamW included, or a forward, of a model of linear layers."""
    names = [str(2 * i) for i in range(count)]

    def made() -> dict[str, Peer]:
        layers = [(features, features)] * count
        W, bias, P, R = draw.weights(layers), [draw(features) for _ in layers], draw.tall(layers, r), draw.wide(layers, r)
        x, target = draw(tokens, features).requires_grad_(train), draw(tokens, features)
        given = [x, target, W, bias, *([t.requires_grad_(train) for t in each] for each in (P, R))]
        exact = list(map(cases.double, given))
        expected = {lora: [by_layers(*each, lora, train) for each in (given, exact)] for lora in (False, True)}
        found = {}
        for who in taking_part((FROZEN, DEFT, LORA, PEFT_DEFT, PATCHED, PEFT_LORA), options, found):
            base = model = stack(W, bias)
            held = ([], [])
            if who != FROZEN:
                model = adapt(base, names, PEFT_DEFT if who == PATCHED else who, r)
                held = factors(base, names)
            optimizer = torch.optim.AdamW([*held[0], *held[1]], RATE, fused=True, capturable=x.is_cuda) if held[0] else None
            call = functools.partial(step, model, x, target, optimizer) if train else functools.partial(forward, model, x)
            around = functools.partial(patched, [call], model) if who == PATCHED else None
            reason = None
            if who != FROZEN:
                with (around or contextlib.nullcontext)():
                    put(held, (P, R))
                    got = outputs(run(model, x) if train else forward(model, x), target, *held, train)
                truths = expected[who in (LORA, PEFT_LORA)]
                reason = cases.wrong(got, *truths, OURS if who in (DEFT, LORA) else PEERS)
            found[who] = peer(reason, [call], around=around)
        return found

    what, where = "a training step" if train else "a forward", f"{count} layers {features}x{features}, T {tokens}"
    return Bench("models", f"{what} of layers", where, draw.dtype, FROZEN, made)


def stack(W: list[Tensor], bias: list[Tensor]) -> nn.Sequential:
    """Frozen linear layers with GELUs between them."""
    made = []
    for w, b in zip(W, bias):
        linear = nn.Linear(*reversed(w.shape), device="meta")
        linear.weight, linear.bias = nn.Parameter(w, requires_grad=False), nn.Parameter(b, requires_grad=False)
        made += [linear, nn.GELU()]
    return nn.Sequential(*made[:-1])


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):  # as half precision is trained
        return model(x)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return run(model, x)


def step(model: nn.Module, x: Tensor, target: Tensor, optimizer) -> None:
    x.grad = None
    if optimizer:
        optimizer.zero_grad()
    distance(run(model, x), target).backward()
    if optimizer:
        optimizer.step()


def distance(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y.to(target.dtype), target)


def outputs(y: Tensor, target: Tensor, P, R, train: bool) -> list[Tensor]:
    """y, and where it trains the gradients of P and R."""
    return [y, *torch.autograd.grad(distance(y, target), [*P, *R])] if train else [y]


def by_layers(x: Tensor, target: Tensor, W, bias, P, R, lora: bool, train: bool) -> list[Tensor]:
    """`outputs` of a stack by the reference."""
    for i, (w, b, p, q) in enumerate(zip(W, bias, P, R)):
        B, A = (p, q) if lora else reference.factors(w.to(p.dtype), p, q)
        x = reference.lowrank_linear(F.gelu(x) if i else x, w, b, B.to(w.dtype), A.to(w.dtype))
    return outputs(x, target, P, R, train)
