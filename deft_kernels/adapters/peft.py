"""PEFT's own DEFT layers on these operations: `patch_peft` and `unpatch_peft`.

PEFT's classes, objects and files stay what they are; methods of `peft.tuners.deft` are exchanged. Beside each PEFT layer
a `PeftView` (a `DeftLinear` on its base layer and parameters) computes, and a `PeftBank` prepares the views of one model
together. Both belong to the process: a copy or a pickle of a PEFT layer has none, and loads without this package.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.bank import Bank
from ..nn.layers import DeftLinear, Routes, is_conv1d, prepare_layers, writes
from ..nn.prepare import decompose
from ..reference import DECOMPOSITIONS

BASE = "__base__"  # PEFT's name in `adapter_names` for no adapter at all
VIEW = "_deft_kernels_view"  # key in a PEFT layer's __dict__
PRISTINE = "deft_pristine"  # buffer of a merged PEFT layer: the base weight before the merge
# What is relied on, by class; checked before anything is patched.
NEEDED = {
    "DeftLayer": "scale_layer unscale_layer reset_deft_parameters update_layer adapter_layer_names other_param_names",
    "DeftLinear": "forward merge unmerge get_delta_weight",
    "DeftModel": "inject_adapter _check_merge_allowed",
    "PeftModel": "_enable_peft_forward_hooks",
}
STATE = {"deft_decomposition", "deft_para", "deft_scaling", "deft_dropout", "_cached_merge_factor"}

_ops = torch.ops.deft_kernels
_originals: dict[tuple[type, str], object] = {}  # (class, name) -> what its __dict__ held; absent -> _ABSENT
_ABSENT = object()
_touched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # PEFT layers that carry a view or a pristine weight
_banks: weakref.WeakKeyDictionary[nn.Module, "PeftBank"] = weakref.WeakKeyDictionary()  # injected model -> its bank


def patch_peft(model: nn.Module | None = None) -> dict[str, str]:
    """Run PEFT's DEFT layers (relu, qr, PaRa; Linear and Conv1D) on these kernels: forward, backward, merge, unmerge.

    Every model of the process is served, whether built before or after, through `get_peft_model`, diffusers' or
    transformers' `add_adapter`. Results, files and classes stay PEFT's. Different while patched:

    - adapter strength counts: `set_scale`, `scale_layer`, `unscale_layer` (which diffusers' `set_adapters`, `fuse_lora`
      and `attention_kwargs={"scale": w}` call) give W' = W + w B A;
    - `adapter_names=[...]`, one per sample or "__base__", routes each sample of a batch, as for PEFT's LoRA;
    - merging writes into the weight's storage and keeps the pristine weight (as much memory again), so that unmerging is
      exact to the bit. A weight that was written to while merged keeps what was written: there PEFT subtracts;
    - quantised bases start at the identity, and merging into them is refused by name.

    Args:
        model: also have this model, adapted before `patch_peft`, prepare its layers together (a `PeftModel` always does).

    Returns {layer name: reason} of the layers of `model` that keep PEFT's code; {} without a model.

    Raises:
        ImportError: no PEFT, or one without DEFT. RuntimeError: a PEFT whose DEFT classes lack what is relied on; nothing
        is patched then. Calling it again changes nothing.
    """
    if not _originals:
        _patch()
    if model is None:
        return {}
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    _bank(root).gather()
    _, linear, *_ = _classes()
    reasons = {name: unserved(m) for name, m in model.named_modules() if isinstance(m, linear)}
    return {name: reason for name, reason in reasons.items() if reason}


def unpatch_peft() -> None:
    """Put PEFT's own methods back. Does nothing where `patch_peft` was not called.

    Models go on working. One that is merged stays so, and PEFT's `unmerge` takes it back as exactly as PEFT can, strengths
    included; unmerge first to have the weights to the bit.
    """
    for (cls, name), original in _originals.items():
        if original is _ABSENT:
            delattr(cls, name)
        else:
            setattr(cls, name, original)
    _originals.clear()
    for layer in list(_touched):
        layer.__dict__.pop(VIEW, None)
        if PRISTINE in layer._buffers:
            delattr(layer, PRISTINE)
    _touched.clear()
    for bank in _banks.values():
        bank.unhook()
    _banks.clear()


def _classes() -> tuple[type, type, type, type]:
    """PEFT's DeftLayer, DeftLinear, DeftModel and PeftModel."""
    try:
        layer = importlib.import_module("peft.tuners.deft.layer")
        model = importlib.import_module("peft.tuners.deft.model")
    except ImportError as error:
        raise ImportError(f"patch_peft needs a PEFT that has DEFT (0.21 or later): {error}") from None
    return layer.DeftLayer, layer.DeftLinear, model.DeftModel, importlib.import_module("peft").PeftModel


def _patch() -> None:
    layer, linear, model, _ = classes = _classes()
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in zip(classes, NEEDED.values()) for name in names.split() if not hasattr(cls, name)
    ]  # fmt: skip
    missing += [f"DeftLayer.{name}" for name in sorted(STATE - set(getattr(layer, "other_param_names", ())))]
    if tuple(getattr(layer, "adapter_layer_names", ())) != ("deft_P", "deft_R"):
        missing.append("DeftLayer.adapter_layer_names == ('deft_P', 'deft_R')")
    if missing:
        version = importlib.metadata.version("peft")
        raise RuntimeError(
            f"PEFT {version} differs from the one that patch_peft knows (0.21.2): missing {', '.join(missing)}; nothing is "
            "patched. Install peft==0.21.2, or use deft_kernels.inject_adapter"
        )
    # Closures over the originals, so that a method called while unpatching cannot meet half a patch.
    patches = {
        layer: {
            "deft_strength": {},  # adapter -> strength where that is not 1; never written to, always replaced
            "other_param_names": (*layer.other_param_names, "deft_strength"),  # delete_adapter forgets it too
            "set_scale": _set_scale,
            "scale_layer": _scale_layer,
            "unscale_layer": _unscale_layer,
            "reset_deft_parameters": _with_original(layer.reset_deft_parameters, _reset_deft_parameters),
        },
        linear: {
            "forward": _with_original(linear.forward, _forward),
            "merge": _with_original(linear.merge, _merge),
            "unmerge": _with_original(linear.unmerge, _unmerge),
            "get_delta_weight": _with_original(linear.get_delta_weight, _get_delta_weight),
            "__getstate__": _getstate,
            "__setstate__": _setstate,
        },
        model: {
            "inject_adapter": _with_original(model.inject_adapter, _inject_adapter),
            "_enable_peft_forward_hooks": contextlib.contextmanager(_enable_peft_forward_hooks),
            "_check_merge_allowed": _with_original(model._check_merge_allowed, _check_merge_allowed),
        },
    }
    for cls, methods in patches.items():
        for name, method in methods.items():
            _originals[cls, name] = cls.__dict__.get(name, _ABSENT)
            setattr(cls, name, method)


def _with_original(original, replacement):
    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return replacement(self, original, *args, **kwargs)

    return method


# The view of one layer ------------------------------------------------------------------------------------------------


class _Adapter(NamedTuple):
    """What `DeftLinear` asks of an adapter's configuration."""

    method: str
    injection: float

    def scale(self, r: int) -> float:
        return self.injection


class PeftView(DeftLinear):
    """A PEFT layer seen as a `DeftLinear`: the same base layer and parameters, the state of one call.

    `follow` takes over what PEFT's layer says is active now; everything else is `DeftLinear`'s.
    """

    def __init__(self, layer: nn.Module):
        super().__init__(layer.base_layer)
        self.deft_P, self.deft_R, self.deft_dropout = layer.deft_P, layer.deft_R, layer.deft_dropout
        self.home: PeftBank | None = None
        self.unserved: str | None = None  # why the layer keeps PEFT's code
        self.left: tuple | None = None  # how the last merge left weight and cached factors
        self._followed: tuple = ()

    def follow(self, layer: nn.Module, names=None) -> "PeftView":
        """Be what the layer is now, with its active adapters or those named."""
        weight = self.base_layer.weight
        names = list(layer.active_adapters if names is None else names)
        state = layer.deft_scaling, layer.deft_strength, layer.deft_decomposition
        if (names, *state, weight.device, weight.dtype) != self._followed:
            self._followed = names, *map(dict, state), weight.device, weight.dtype
            self.unserved = unserved(layer)
            self.active = [name for name in names if name in self.deft_P]
            self.configs = {k: _Adapter(layer.deft_decomposition[k], layer.deft_scaling[k]) for k in self.active}
            self.strengths = {k: layer.deft_strength.get(k, 1.0) for k in self.active}
            self._factors = self._passing = None
            self._scales = torch.empty(0)  # so that a new one is made: a backward still to come may have saved the old
            self._write_scales()
        return self

    def dropout(self, name: str) -> float:
        module = self.deft_dropout[name]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def unserved(layer: nn.Module) -> str | None:
    """Why a PEFT layer keeps PEFT's code, or None."""
    base = layer.base_layer
    if not _linear(base):
        return f"its base layer is a {type(base).__name__}"
    replaced = layer.__dict__.get("forward")
    called = layer.__dict__.get("_old_forward", replaced)  # accelerate keeps there what its hooks call
    if replaced is not None and getattr(called, "__func__", None) is not type(layer).forward:
        return "its forward was replaced on the object itself before patch_peft"
    for name, method in layer.deft_decomposition.items():
        if method not in DECOMPOSITIONS:
            return f"adapter {name!r} has decomposition_method {method!r}"
    if any(type(p) is not nn.Parameter for store in (layer.deft_P, layer.deft_R) for p in store.values()):
        return "its P or R is no plain parameter (sharded?)"
    return None


def _linear(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) or is_conv1d(base)


def _view(layer: nn.Module) -> PeftView:
    view = layer.__dict__.get(VIEW)
    if view is None or view.base_layer is not layer.base_layer:
        view = layer.__dict__[VIEW] = PeftView(layer)
        _touched.add(layer)
    return view


def _getstate(self) -> dict:
    return {key: value for key, value in self.__dict__.items() if key != VIEW}


def _setstate(self, state: dict) -> None:
    nn.Module.__setstate__(self, state)
    _touched.add(self)


# The views of one model, prepared together ----------------------------------------------------------------------------


class PeftBank(Bank):
    """The bank of one injected model. A `PeftModel` opens it by itself (`_enable_peft_forward_hooks`); a model that is
    called without one has hooks from its second forward on."""

    def __init__(self, root: nn.Module):
        super().__init__()
        self._root, self._members, self._depth = weakref.ref(root), [], 0

    def gather(self) -> None:
        """Take in every DEFT layer that the model has now."""
        _, linear, *_ = _classes()
        members = [m for m in self._root().modules() if isinstance(m, linear) and unserved(m) is None]
        self._members = [weakref.ref(m) for m in members]
        for member in members:
            _view(member).home = self

    def enter(self, *call) -> None:
        self._depth += 1
        if self._depth == 1 and not torch.compiler.is_compiling():  # what is compiled prepares layer by layer
            members = [member for member in (ref() for ref in self._members) if member is not None]
            views = [_view(m).follow(m) for m in members if not (m.merged or m.disable_adapters)]
            self.layers = [view for view in views if not view.unserved]
            super().enter()

    def leave(self, *call) -> None:
        if self._depth == 0:  # hooked while the model was being called
            return
        self._depth -= 1
        if self._depth == 0:
            super().leave()
            self.layers = []

    def hook(self) -> None:
        """Open with the model's own calls, from the next one on."""
        root = self._root()
        if root is not None:  # gone, where a layer has outlived its model
            self._hooks = (
                root.register_forward_pre_hook(_Door(self.enter)),
                root.register_forward_hook(_Door(self.leave), always_call=True),
            )

    def unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()

    def notice(self) -> None:
        """A layer was called: if that was outside, the model is called without a `PeftModel` around it."""
        if not self._depth and not self._hooks and torch._C._current_graph_task_id() == -1:
            self.hook()


class _Door:
    """A bank's hook on a model; in a copy or a pickle of the model, a hook that does nothing and needs nothing from here."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args) -> None:
        self.call()

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


def _bank(root: nn.Module) -> PeftBank:
    if root not in _banks:
        _banks[root] = PeftBank(root)
    return _banks[root]


# Methods of PEFT's layers ---------------------------------------------------------------------------------------------


def _forward(self, original, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
    if adapter_names is not None:
        return _routed(self, original, x, adapter_names, args, kwargs)
    if self.disable_adapters or self.merged or not _linear(self.base_layer):
        return original(self, x, *args, **kwargs)
    view = _view(self).follow(self)
    if view.unserved or not view.active:
        return original(self, x, *args, **kwargs)
    if view.home is not None and not torch.compiler.is_compiling():
        view.home.notice()
    return view.forward(x, *args, **kwargs).to(x.dtype)


def _routed(self, original, x: Tensor, names: list[str], args, kwargs) -> Tensor:
    """Every sample of the batch through its own adapter."""
    if len(names) != len(x):
        raise ValueError(f"adapter_names has {len(names)} entries for a batch of {len(x)} samples: expected one for each")
    if self.disable_adapters or not names:
        return original(self, x, *args, **kwargs)
    if self.merged:
        raise ValueError(
            f"adapter_names cannot route while {', '.join(self.merged_adapters)} is merged: call unmerge_adapter() first"
        )
    view = _view(self).follow(self, dict.fromkeys(names))
    if not view.active:
        return self.base_layer(x, *args, **kwargs)
    view.routes = Routes("adapter_names", [(name if name in view.active else None, 1.0) for name in names])
    try:
        view._write_routes()
        (factors,) = prepare_layers([view], view._rows(x))
        return view._routed(x, factors, args, kwargs).to(x.dtype)
    finally:
        view.routes = None


def _reset_deft_parameters(self, original, adapter_name: str, init_weights: bool = True) -> None:
    """PEFT's start; where the base weight is no dense one (quantised), R from the layer's own products instead."""
    # By the layer: with a second adapter, PEFT gives every layer what suited the one that the first adapter saw last.
    self.fan_in_fan_out = is_conv1d(self.get_base_layer())
    identity = adapter_name in self.deft_P and init_weights and not self.deft_para[adapter_name]
    if not identity or self.get_base_layer().weight.is_meta or unserved(self) or not unmergeable(self):
        return original(self, adapter_name, init_weights=init_weights)
    original(self, adapter_name, init_weights=False)
    with torch.no_grad():
        P = self.deft_P[adapter_name].to(self.get_base_layer().weight.device, torch.float32)
        _, (K,), _ = decompose([P], [self.deft_decomposition[adapter_name]])
        self.deft_R[adapter_name].copy_(_view(self)._removed(K) / self.deft_scaling[adapter_name])


# Strength


def _set_scale(self, adapter: str, scale: float) -> None:
    """W' = W + scale B A for one adapter, as PEFT's LoRA layers have it; nothing where this layer lacks the adapter."""
    if not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale of adapter {adapter!r} is {scale!r}, expected a finite number")
    if adapter in self.deft_P:
        if scale != 1 and unserved(self):
            reason = unserved(self)
            raise ValueError(f"scale of adapter {adapter!r} is {scale}, but this layer keeps PEFT's code, without: {reason}")
        strengths = {**self.deft_strength, adapter: float(scale)}
        self.deft_strength = {name: w for name, w in strengths.items() if w != 1}


def _scale_layer(self, scale: float) -> None:
    """Multiply the strength of every active adapter."""
    for name in self.active_adapters:
        self.set_scale(name, self.deft_strength.get(name, 1.0) * scale)


def _unscale_layer(self, scale: float | None = None) -> None:
    """Divide it, or set it to 1 (None)."""
    if scale == 0:
        raise ValueError("unscale_layer(0): a strength multiplied by 0 cannot be divided back; use set_scale(adapter, 1.0)")
    for name in self.active_adapters:
        self.set_scale(name, 1.0 if scale is None else self.deft_strength.get(name, 1.0) / scale)


# Merge


def unmergeable(layer: nn.Module) -> str | None:
    """Why adapters cannot be merged into a layer's weight, or None."""
    weight = layer.get_base_layer().weight
    if not weight.is_floating_point() or type(weight) is not nn.Parameter:
        return f"its weight is no plain one (quantised? sharded?): {type(weight).__name__}, {weight.dtype}"
    return None


def _require_mergeable(layer: nn.Module) -> None:
    reason = unmergeable(layer)
    if reason:
        raise ValueError(f"a {type(layer.get_base_layer()).__name__} cannot take an adapter into its weight: {reason}")


def _pairs(layer: nn.Module, names: list[str], W: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per adapter, at its strength w: B (m, r), A = w (s R - K^T W) (r, n), and s R (0 for PaRa)."""
    view = _view(layer).follow(layer, names)
    masters = [view.masters(name) for name in names]
    bases, removals, _ = decompose([t["P"] for t in masters], [view.configs[name].method for name in names])
    R = [t.get("R") for t in masters]
    injection, removal = view._scales
    A = _ops.project(removals, [W] * len(names), R, injection, removal)
    scaled = [torch.zeros_like(a) if r is None else r * view.configs[k].injection for k, a, r in zip(names, A, R)]
    return bases, A, scaled


@torch.no_grad()
def _merge(self, original, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    _require_mergeable(self)
    pristine = self._buffers.get(PRISTINE)
    if unserved(self) or (self.merged and not _untouched(self)):
        return original(self, safe_merge=safe_merge, adapter_names=adapter_names)
    names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.deft_P]
    if not names:
        return None
    together = [*(name for name in self.merged_adapters if name in self.deft_P), *names]  # each from the pristine weight
    weight = self.get_base_layer().weight.detach()
    view = _view(self)
    source = view.matrix(weight if pristine is None else pristine)
    B, A, R = _pairs(self, together, source)
    factors = ([torch.cat(B, 1)], [None], [torch.cat(A)])
    if safe_merge:
        (merged,) = _ops.merge([source], *factors)
        if not torch.isfinite(merged).all():
            broken = [k for k, b, a in zip(together, B, A) if not (b.isfinite().all() and a.isfinite().all())]
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {(broken or names)[-1]} seems to be broken; the weight "
                "is as it was"
            )
    if pristine is None:
        pristine = weight.clone()
        self.register_buffer(PRISTINE, pristine, persistent=False)
        _touched.add(self)
    try:
        if safe_merge:
            view.matrix(weight).copy_(merged)
        else:
            _ops.merge_into([view.matrix(weight)], [view.matrix(pristine)], *factors)
    except BaseException:  # an interrupt: no half-merged weight
        _restore(self)
        raise
    for name, a, r in zip(together, A, R):
        self._cached_merge_factor[name] = r - a  # PEFT's unmerge takes B (s R - factor) away: B A, whatever the strength
    self.merged_adapters.extend(names)
    view.left = (writes(weight), dict(self._cached_merge_factor.items()))


def _untouched(layer: nn.Module) -> bool:
    """Whether weight and cached factors are as our merge has left them. (In a copy or a pickle nobody can tell: yes.)"""
    if PRISTINE not in layer._buffers:
        return False
    left = _view(layer).left
    if left is None:
        return True
    version, factors = left
    cached = layer._cached_merge_factor
    return writes(layer.get_base_layer().weight) == version and all(
        name not in cached or torch.equal(cached[name], factor.to(cached[name])) for name, factor in factors.items()
    )


def _restore(layer: nn.Module) -> None:
    layer.get_base_layer().weight.detach().copy_(getattr(layer, PRISTINE))
    layer.merged_adapters.clear()
    layer._cached_merge_factor.clear()
    delattr(layer, PRISTINE)


@torch.no_grad()
def _unmerge(self, original) -> None:
    if self.merged and _untouched(self):
        return _restore(self)
    original(self)  # PEFT warns, or subtracts
    if PRISTINE in self._buffers:
        delattr(self, PRISTINE)


@torch.no_grad()
def _get_delta_weight(self, original, adapter_name: str) -> Tensor:
    """w B A in the base weight's layout and dtype, from the pristine weight also while merged."""
    _require_mergeable(self)
    if unserved(self):
        return original(self, adapter_name)
    weight = self.get_base_layer().weight.detach()
    view = _view(self)
    (B,), (A,), _ = _pairs(self, [adapter_name], view.matrix(self._buffers.get(PRISTINE, weight)))
    return view.matrix(B @ A).to(weight.dtype)


# Methods of PEFT's model ----------------------------------------------------------------------------------------------


def _inject_adapter(self, original, *args, **kwargs) -> None:
    original(self, *args, **kwargs)
    _bank(self.model).gather()


def _check_merge_allowed(self, original) -> None:
    original(self)
    _, linear, *_ = _classes()
    refused = {name: unmergeable(m) for name, m in self.model.named_modules() if isinstance(m, linear)}
    refused = {name: reason for name, reason in refused.items() if reason}
    if refused:
        name, reason = next(iter(refused.items()))
        raise ValueError(f"cannot merge: {name}: {reason}; {len(refused)} such layers: {', '.join(list(refused)[:8])}")


def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
    """Around every forward and generate of a `PeftModel`: the bank, or the routes of `adapter_names`."""
    if adapter_names is None:
        bank = _bank(self.model)
        if not bank._members:
            bank.gather()
        try:
            bank.enter()
            yield
        finally:
            bank.leave()
        return
    layer, *_ = _classes()
    if self.training:
        raise ValueError("adapter_names routes at inference only, and the model is in training mode: call model.eval()")
    known = {name for module in self.modules() if isinstance(module, layer) for name in module.deft_P}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"adapter_names has non-existing adapter(s) {', '.join(unknown)}: the model has {', '.join(sorted(known))}, and "
            f"{BASE!r} for none"
        )
    kept = {name: unserved(m) for name, m in self.model.named_modules() if isinstance(m, layer) and unserved(m)}
    if kept:
        name, reason = next(iter(kept.items()))
        raise ValueError(f"adapter_names cannot route through {name}, which keeps PEFT's code ({len(kept)} such): {reason}")
    from peft.utils.other import AuxiliaryTrainingWrapper

    beams = kwargs.get("num_beams") or 1
    encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
    once = set() if encoder is None or encoder is self.model else set(encoder.modules())  # beams begin after the encoder
    handles = []
    try:
        for module in self.modules():
            if isinstance(module, (layer, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in once else [n for n in adapter_names for _ in range(beams)]
                route = functools.partial(_route, names)
                handles.append(module.register_forward_pre_hook(route, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _route(names: list[str], module, args, kwargs):
    return args, {**kwargs, "adapter_names": names}
