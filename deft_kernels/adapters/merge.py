"""merge, unmerge, hot-swap: adapters into the weights, in the storage that the weights have, from a pristine snapshot."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn.layers import DeftLayer, refuse_fused, writes
from ..nn.prepare import Factors, beside, combined, decompose
from ..nn.quantised import Quantised, is_hooked, quantised
from .files import Adapter, attach_adapter, read_adapter
from .inject import check_combination, named_weights, outer_modules, require_layers, wrap

SNAPSHOTS = ("device", "host")
NO_UPDATE = 1e-5  # share of W' that rounding in float32 alone may make of W' - W: an adapter at its start


def merge(
    model: nn.Module,
    names=None,
    weights=None,
    snapshot: str = "device",
    combine: str | None = None,
    requantize: bool = False,
) -> None:
    """Write W' into the base weights, in place: their storage, and so any compiled or captured graph, stays valid, and
    sampling costs what the base model costs. Factors are taken from the pristine W.

    Args:
        names: adapters to merge, one or several; None: the active ones at their strengths.
        weights: strengths, any real numbers; None: 1 (or the active strengths where `names` is None).
        snapshot: where the pristine weights wait for `unmerge`: "device" (beside the weights) or "host" (main memory,
            pinned where the weights are on a GPU).
        combine: how several adapters act together, as `set_adapters` explains; None: "sum", or how the active ones do where
            `names` is None.
        requantize: merge into quantised weights too, by quantising W' anew as W was. Unlike the adapter unmerged, it rounds:
            a warning tells how much, of W' and of the update W' - W. `unmerge` is exact all the same.

    Raises:
        RuntimeError: something is merged already (use `hotswap`).
        ValueError: unknown adapter or combination, samples routed to adapters of their own, parameters with NaN, a weight
        that another layer shares, one that is neither dense nor quantised, or one that is quantised where `requantize` is
        not set or the type cannot be made.
        The model is then as it was. Where writing itself fails (no memory, an interrupt), the pristine weights are put back.
    """
    if snapshot not in SNAPSHOTS:
        raise ValueError(f"snapshot {snapshot!r}: expected one of {', '.join(SNAPSHOTS)}")
    layers = require_layers(model)
    if any(layer.is_merged for layer in layers.values()):
        raise RuntimeError("adapters are merged already: call deft_kernels.unmerge(model), or hotswap to change them")
    if names is None:
        if any(layer.routes is not None for layer in layers.values()):
            raise ValueError("samples are routed to adapters of their own: name the adapters that are to be merged")
        combine = combine or next(layer.combination for layer in layers.values())
    if names is None and weights is None:
        chosen = {key: dict(layer.strengths) for key, layer in layers.items() if layer.strengths}
    else:
        everywhere = named_weights(list(_active(layers)) if names is None else names, weights)
        require_layers(model, everywhere)
        chosen = spread(layers, everywhere)
    if not any(chosen.values()):
        raise ValueError("nothing to merge: no adapter is active and none was named")
    _check_mergeable(model, {key: layers[key] for key in chosen}, requantize)
    combine = combine or "sum"
    for key, weights in chosen.items():
        check_combination({key: layers[key]}, weights, combine)
    _write(layers, chosen, snapshot, combine)


def unmerge(model: nn.Module, force: bool = False) -> None:
    """Put the pristine weights back, bit for bit.

    Raises RuntimeError when nothing is merged, when a weight is offloaded, so that its pristine values cannot be put back,
    or when a weight was written to while an adapter was merged into it: what was written would be lost. In this last case
    `force` puts the snapshot back all the same. (Writes through `.data` are not seen: torch does not count them.)
    """
    layers = require_layers(model)
    if not any(layer.is_merged for layer in layers.values()):
        raise RuntimeError("nothing is merged: call deft_kernels.merge(model) first")
    _check_unfused(model, layers)
    _check_reachable(model, layers)
    if not force:
        _check_untouched(layers)
    for layer in layers.values():
        _restore(layer)
        layer.is_merged = False


def hotswap(
    model: nn.Module, path_or_name: str | Path | Adapter, weight: float = 1.0, requantize: bool = False
) -> None:
    """Merge another adapter in place of what is merged now, from the pristine weights: no drift, no recompilation.

    Args:
        path_or_name: an adapter of the model by name, or a folder or file to load one from (or what `read_adapter` made of
            it); it replaces the one that the last hot-swap loaded, under the name "hotswap".
        weight: its strength.
        requantize: into quantised weights too, as `merge` does.

    Raises as `merge` and `load_adapter` do.
    """
    layers = require_layers(model)
    _check_reachable(model, layers)
    _check_untouched(layers)
    on_host = any(layer.merged and _kept(layer)[0].device != layer.weight.device for layer in layers.values())
    name = None if isinstance(path_or_name, Adapter) else str(path_or_name)
    if any(name in layer.configs for layer in layers.values()):
        chosen = spread(layers, named_weights(name, weight))
        _check_mergeable(model, {key: layers[key] for key in chosen}, requantize)
    else:
        name, everywhere = "hotswap", named_weights("hotswap", weight)
        loaded = path_or_name  # all that can be wrong with a file is found when it is read
        if not isinstance(loaded, Adapter):
            loaded = read_adapter(model, path_or_name)
        modules = outer_modules(model)
        _check_mergeable(model, {key: wrap(key, modules[key]) for key in loaded.tensors}, requantize)
        for layer in layers.values():
            if name in layer.configs:
                layer.delete_adapter(name)
        attach_adapter(model, loaded, name, activate=False)
        layers = require_layers(model)
        chosen = spread(layers, everywhere)
    _write(layers, chosen, "host" if on_host else "device")


def _active(layers: dict[str, DeftLayer]) -> dict[str, None]:
    return {name: None for layer in layers.values() for name in layer.active}


def spread(layers: dict[str, DeftLayer], weights: dict[str, float]) -> dict[str, dict[str, float]]:
    """The same strengths for every layer that has any of the adapters."""
    chosen = {key: {name: w for name, w in weights.items() if name in layer.configs} for key, layer in layers.items()}
    return {key: names for key, names in chosen.items() if names}


def _check_unfused(model: nn.Module, layers: dict[str, DeftLayer]) -> None:
    """What is written to weights would not reach the fused copies of them."""
    for name in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        refuse_fused(name, model.get_submodule(name))


def _check_reachable(model: nn.Module, layers: dict[str, DeftLayer]) -> None:
    """What is written to an offloaded weight is lost: when the layer is called, its values come from elsewhere."""
    for name, layer in layers.items():
        if layer.merged and (is_hooked(layer.base_layer) or _on_disk(model, name)):
            raise RuntimeError(
                f"{name}: its weight was offloaded while an adapter was merged into it, where the pristine one cannot be "
                "put back: unmerge before offloading, or take the hooks off first"
            )


def _on_disk(model: nn.Module, name: str) -> bool:
    """Whether diffusers' group offloading keeps the layer's weight on disk: it hooks the block, not the layer."""
    path = name.split(".")
    hooks = [getattr(model.get_submodule(".".join(path[:i])), "_diffusers_hook", None) for i in range(len(path))]
    groups = [hook.get_hook("group_offloading") for hook in hooks if hook is not None]
    return any(group is not None and group.group.offload_to_disk_path is not None for group in groups)


def _check_mergeable(model: nn.Module, targets: dict[str, DeftLayer], requantize: bool) -> None:
    _check_unfused(model, targets)
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    for name, layer in targets.items():
        if _on_disk(model, name):
            raise ValueError(f"{name}: its weight is offloaded to disk, what is written to it would be lost: merge first")
        if layer.pristine_weight() is None:
            try:
                held = quantised(layer.base_layer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if held is None or is_hooked(layer.base_layer):
                raise ValueError(
                    f"{name}: cannot merge into this layer: its weight is quantised in an unknown way, sharded or hooked"
                )
            if not held.requantises:
                raise ValueError(
                    f"{name}: its weight is quantised ({held.name}), to which no matrix can be converted here: keep the "
                    "adapter unmerged, or merge before quantising"
                )
            if not requantize:
                raise ValueError(
                    f"{name}: its weight is quantised ({held.name}), and a merged one would have to be rounded to that "
                    "again: keep the adapter unmerged, which is exact, or merge with requantize=True, which tells the loss"
                )
        if owners[id(layer.weight)] > 1:
            raise ValueError(
                f"{name}: another layer shares its weight, and would be changed with it; exclude it from the targets"
            )


@torch.no_grad()
def _write(layers: dict[str, DeftLayer], chosen: dict[str, dict[str, float]], snapshot: str, how: str = "sum") -> None:
    """Merge `chosen` (layer -> adapter -> strength) from the pristine weights, whatever is merged now."""
    targets = {name: layers[name] for name in chosen}
    check_finite(targets, chosen)
    B, K, R = factors_of(targets, chosen, how)
    pristine = {name: layer._pristine for name, layer in targets.items()}
    for name, layer in targets.items():
        if pristine[name] is None:
            kept = [_snapshot(t, snapshot) for t in _stored(layer)]
            pristine[name] = kept if quantised(layer.base_layer) else kept[0]
    try:
        losses = _write_from(pristine, targets, B, K, R)
    except BaseException:  # out of memory, an interrupt: no half-merged model
        for name, layer in targets.items():
            layer.merged, layer._pristine = chosen[name], pristine[name]
        for layer in layers.values():
            _restore(layer)
            layer.is_merged = False
        raise
    for name, layer in layers.items():
        layer.is_merged = True
        if name in targets:
            layer._pristine, layer.merged = pristine[name], chosen[name]
            layer._merged_version = writes(layer.weight)
        else:
            _restore(layer)
    if losses:
        _tell(losses, {name: quantised(targets[name].base_layer).name for name in losses})


def _write_from(pristine, targets: dict[str, DeftLayer], B, K, R) -> dict[str, Tensor]:
    """W' of every target layer into its weight's storage, all dense ones of a device in one call. Returns what requantising
    has lost."""
    losses, dense = {}, {}
    for (name, layer), *factors in zip(targets.items(), B, K, R):
        held = quantised(layer.base_layer)
        if held is None:
            dense[name] = factors
        else:
            losses[name] = _requantise(held, [kept.to(layer.weight.device) for kept in pristine[name]], *factors)
    for group in _by_device({name: targets[name] for name in dense}):
        _write_dense(pristine, group, *map(list, zip(*(dense[name] for name in group))))
    return losses


def _by_device(layers: dict[str, DeftLayer]) -> list[dict[str, DeftLayer]]:
    """Layers by the device that they are on: one call of an operation serves one device."""
    groups: dict[torch.device, dict[str, DeftLayer]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.weight.device, {})[name] = layer
    return list(groups.values())


def _requantise(held: Quantised, pristine: list[Tensor], B, K, R) -> Tensor:
    """Quantise W' into one layer. Returns the norms of Q(W') - W', W' and W' - W."""
    W = held.dequantise(pristine)
    (merged,) = torch.ops.deft_kernels.merge([W], [B], [K], [R])
    for stored, new in zip(held.tensors, held.quantise(merged)):
        stored.copy_(new)
    return torch.stack([(held.dequantise() - merged).norm(), merged.norm(), (merged - W).norm()])


def _tell(losses: dict[str, Tensor], kinds: dict[str, str]) -> None:
    """Warn of what requantising has cost: over all layers, and in the layer where the update suffers most."""

    def shares(norms: Tensor) -> str:
        lost, whole, update = norms.tolist()
        of_update = f"{lost / update:.1%} of the update W' - W" if update > NO_UPDATE * whole else "and there is no update"
        return f"{lost / max(whole, 1e-30):.1%} of W', {of_update}"

    norms = torch.stack([n.cpu() for n in losses.values()])
    worst = int((norms[:, 0] / torch.maximum(norms[:, 2], NO_UPDATE * norms[:, 1]).clamp_min(1e-30)).argmax())
    name = list(losses)[worst]
    warnings.warn(
        f"merging into {len(losses)} quantised layers ({', '.join(sorted(set(kinds.values())))}) has rounded their weights "
        f"anew: the error is {shares(norms.square().sum(0).sqrt())}; worst in {name}: {shares(norms[worst])}. Unmerged, the "
        "adapter is exact",
        stacklevel=5,
    )


def _write_dense(pristine: dict[str, Tensor], targets: dict[str, DeftLayer], B, K, R) -> None:
    out, source = [], []
    for name, layer in targets.items():
        stored, kept = layer.weight.detach(), pristine[name]
        if layer.merged and (kept.device, kept.dtype) != (stored.device, stored.dtype):
            kept = stored.copy_(kept)  # back onto the device first
        source.append(layer.matrix(kept if layer.merged else stored))
        out.append(layer.matrix(stored))
    torch.ops.deft_kernels.merge_into(out, source, B, K, R)
    for layer, written in zip(targets.values(), out):
        stored = layer.weight.detach()
        if written.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
            stored.copy_(written.view(stored.shape))  # strides of which (out, in*kh*kw) cannot be a view


def factors_of(targets: dict[str, DeftLayer], chosen, how: str = "sum") -> tuple[list[Tensor | None], ...]:
    """B, K and R of every layer, its adapters side by side along r, with strengths and scales folded into K and R."""
    entries, bases, removals = [], [], []
    for group in _by_device(targets):
        found = [(key, name, weight) for key in group for name, weight in chosen[key].items()]
        P = [targets[key].masters(name)["P"] for key, name, _ in found]
        B, K, _ = decompose(P, [targets[key].configs[name].method for key, name, _ in found])
        entries, bases, removals = entries + found, bases + B, removals + K
    parts: dict[str, list[Factors]] = {key: [] for key in targets}
    for (key, name, weight), b, k in zip(entries, bases, removals):
        tensors = targets[key].masters(name)
        r = tensors.get("R")
        if r is not None:
            r = r * (weight * targets[key].configs[name].scale(b.shape[1]))
            r = r * torch.sigmoid(tensors["gate"]) if "gate" in tensors else r
        parts[key].append(Factors(b, None, None if k is None else k * weight, r))
    parts = {key: combined(f, [g.K for g in f], how) for key, f in parts.items()}
    return tuple([beside(f, role, targets[key].shape[1]) for key, f in parts.items()] for role in "BKR")


def check_finite(layers: dict[str, DeftLayer], chosen: dict[str, dict[str, float]]) -> None:
    named = [
        (f"{name}.deft_{role}.{adapter}", p.detach())
        for name, layer in layers.items() for adapter in chosen[name] for role, p in layer.adapter_tensors(adapter).items()
    ]  # fmt: skip
    norms = torch._foreach_norm([p for _, p in named], float("inf"))
    norms = torch.stack([n.to(norms[0].device, torch.float32) for n in norms])  # to be waited for once
    bad = [key for (key, _), finite in zip(named, norms.isfinite().tolist()) if not finite]
    if bad:
        raise ValueError(f"{bad[0]} has values that are not finite ({len(bad)} such tensors)")


def _stored(layer: DeftLayer) -> list[Tensor]:
    """What the layer's weight consists of, as it is stored."""
    held = quantised(layer.base_layer)
    return [layer.weight.detach()] if held is None else held.tensors


def _kept(layer: DeftLayer) -> list[Tensor]:
    """What `_stored` was before the merge."""
    return [layer._pristine] if isinstance(layer._pristine, Tensor) else layer._pristine


def _snapshot(weight: Tensor, where: str) -> Tensor:
    if where == "device" or weight.device.type == "cpu":
        return weight.detach().clone()
    host = torch.empty_like(weight, device="cpu", pin_memory=weight.device.type == "cuda", requires_grad=False)
    return host.copy_(weight.detach())


@torch.no_grad()
def _restore(layer: DeftLayer) -> None:
    if layer.merged:
        for stored, kept in zip(_stored(layer), _kept(layer)):
            stored.copy_(kept)
    layer.merged, layer._pristine, layer._merged_version = {}, None, None


def _check_untouched(layers: dict[str, DeftLayer]) -> None:
    for name, layer in layers.items():
        if layer.merged and layer._merged_version != writes(layer.weight):
            raise RuntimeError(
                f"{name}: the weight was written to while an adapter was merged into it, and putting the pristine "
                "one back would undo that: deft_kernels.unmerge(model, force=True) does so all the same"
            )
