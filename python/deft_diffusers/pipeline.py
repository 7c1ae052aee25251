"""diffusers' own verbs for adapters, on these layers: after `enable_deft(pipe)`, `pipe.load_lora_weights` and its kin load,
weigh, fuse and delete DEFT and LoRA adapters alike."""

import functools
import inspect
import math
import numbers

import torch
from torch import nn

import deft_kernels as dk
from deft_kernels.adapters.hub import locate
from deft_kernels.adapters.inject import Parts, adapted_layers, require_layers
from deft_kernels.adapters.pipeline import as_model, read
from deft_kernels.adapters.pipeline import components as parts_of

SCALED_BY_CALL = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def enable_deft(pipe):
    """Give a diffusers pipeline object the verbs of `DeftVerbs`, and return it. Its class keeps its name and is a subclass
    of what it was; without adapters it works as before, is copied and pickled included. What would leave adapters out in
    silence is refused: `save_pretrained` while there are any, and a scale in a call's `cross_attention_kwargs`.

    Raises TypeError for what is no pipeline.
    """
    kind = type(pipe)
    if isinstance(pipe, DeftVerbs):
        return pipe
    if isinstance(pipe, (nn.Module, dict)):
        raise TypeError(f"expected a diffusers pipeline, not a {kind.__name__}: deft_kernels' own verbs take modules too")
    parts_of(pipe)  # TypeError where there are none

    pipe.__class__ = _subclass(kind)
    return pipe


def _subclass(kind):
    @functools.wraps(kind.__call__)
    def call(self, *args, **kwargs):
        given = inspect.signature(kind.__call__).bind_partial(self, *args, **kwargs).arguments
        for name in SCALED_BY_CALL:
            if (given.get(name) or {}).get("scale") not in (None, 1):
                raise ValueError(f"{name}['scale'] does not reach these adapters: set_adapters(names, weights) does")
        if (given.get("num_images_per_prompt") or 1) > 1 and _routed(as_model(self)):
            raise ValueError(
                f"num_images_per_prompt is {given['num_images_per_prompt']}, but adapters are routed by prompt: repeat the "
                "prompts instead, and name an adapter for each in route_adapters"
            )
        return kind.__call__(self, *args, **kwargs)

    def reduce(self, protocol):
        return _enabled, (kind,), self.__dict__

    own = {"__call__": call, "__reduce_ex__": reduce, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind)(kind.__name__, (DeftVerbs, kind), own)


def _enabled(kind):
    """A pipeline of this class with `DeftVerbs`, empty: what unpickling and copying fill."""
    pipe = kind.__new__(kind)
    pipe.__class__ = _subclass(kind)
    return pipe


def _routed(model):
    return any(layer.routes is not None for layer in adapted_layers(model).values())


def _several(names):
    """Names without repetition, from one or several."""
    return list(dict.fromkeys([names] if isinstance(names, str) else names))


class DeftVerbs:
    """diffusers' verbs with diffusers' arguments (`diffusers.loaders.lora_base.LoraBaseMixin`), over deft_kernels'. A
    pipeline is changed in all its parts or, on an error, in none."""

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **kwargs):
        """Load an adapter from a folder, file or hub id, by `deft_kernels.load_adapter`, whose options `kwargs` are; with
        `hotswap`, merge it in place of what is fused, by `deft_kernels.hotswap`, whose `weight` and `requantize` they may
        be besides. It is then named "hotswap"."""
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            raise TypeError("expected a folder, a file or a hub id, not a state dict: save it to a safetensors file first")
        if hotswap:
            if adapter_name is not None or not self.fused_loras:
                given = "nothing is fused" if adapter_name is None else f"adapter_name is {adapter_name!r}"
                raise ValueError(
                    f"hotswap=True replaces what fuse_lora has merged, under the name 'hotswap', but {given}: leave "
                    "adapter_name out and fuse first, or load beside the others and set_adapters"
                )
            how = {key: kwargs.pop(key) for key in ("weight", "requantize") if key in kwargs}
            any_base = kwargs.pop("any_base", False)
            dk.hotswap(self, read(self, locate(pretrained_model_name_or_path_or_dict, **kwargs), any_base), **how)
            self._deft_disabled = {}
            return
        known = {name for names in dk.list_adapters(self).values() for name in names}
        name = f"default_{len(known)}" if adapter_name is None else adapter_name  # diffusers' own numbering
        dk.load_adapter(self, pretrained_model_name_or_path_or_dict, name, **kwargs)
        self._deft_disabled = {}

    def enable_lora_hotswap(self, **kwargs):
        """diffusers pads LoRA here for its own hot-swapping; what is fused needs no padding."""
        raise NotImplementedError(
            "enable_lora_hotswap is not needed: fuse_lora(), then load_lora_weights(file, hotswap=True) writes into the "
            "same storage for any rank, so that nothing is recompiled"
        )

    def save_lora_weights(self, save_directory, adapter_name=None, **layers):
        """Write an adapter, None: the active one, to `pytorch_deft_weights.safetensors` (`deft_kernels.export_lora` writes
        LoRA files). With `layers`, as `unet_lora_layers={...}`, what diffusers' own does with them."""
        if layers:
            super().save_lora_weights(save_directory, **layers)
            return
        if adapter_name is None:
            active = self.get_active_adapters()
            if len(active) != 1:
                raise ValueError(f"the active adapters are {', '.join(active) or 'none'}: say which by adapter_name")
            adapter_name = active[0]
        dk.save_adapter(self, save_directory, adapter_name)

    def set_adapters(self, adapter_names, adapter_weights=None):
        """Make exactly these active. A weight may be a dict, {part: weight}, with 1 for a part that it does not name;
        ValueError for one that the adapter is not in."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(names) != len(weights):
            raise ValueError(f"{len(names)} adapter names but {len(weights)} weights")
        listed = {part: held for part, held in dk.list_adapters(self).items() if held}
        for name, weight in zip(names, weights):
            holding = [part for part, held in listed.items() if name in held]
            lacking = [part for part in weight if part not in holding] if isinstance(weight, dict) and holding else []
            if lacking:
                raise ValueError(
                    f"a weight is for {', '.join(lacking)}, but the parts with adapter {name!r} are {', '.join(holding)}"
                )
        by_part = {part: [_weight(w, part) for w in weights] for part in listed}
        dk.set_adapters(self, names)
        self._deft_disabled = {}
        for part, held in listed.items():
            own = {name: w for name, w in zip(names, by_part[part]) if name in held}
            dk.set_adapters({part: getattr(self, part)}, list(own), list(own.values()))

    def get_active_adapters(self):
        """Names of the adapters that are active in some part."""
        listed = dk.list_adapters(self).values()
        return list(dict.fromkeys(name for names in listed for name, weight in names.items() if weight is not None))

    def get_list_adapters(self):
        """{part: names of its adapters}."""
        return {part: list(names) for part, names in dk.list_adapters(self).items() if names}

    def delete_adapters(self, adapter_names):
        """Remove adapters from every part: all of them, or, where one is unknown or fused, none."""
        names = _several(adapter_names)
        require_layers(as_model(self), names)
        for name in sorted(names, key=lambda name: name not in self.fused_loras):  # a fused one is refused, so it is first
            dk.delete_adapter(self, name)

    def fuse_lora(self, components=None, lora_scale=1.0, safe_fusing=False, adapter_names=None):
        """Merge the active adapters, or those named, into the weights of the parts `components` (None: all). `safe_fusing`
        is always so: values that are not finite are refused. Active ones stay combined as `deft_kernels.set_adapters` has
        combined them; where samples are routed, names have to be given."""
        parts, listed = self._parts(components), dk.list_adapters(self)
        layers = adapted_layers(parts).values()
        active = list(dict.fromkeys(name for layer in layers for name in layer.strengths))  # in the order that they act in
        if adapter_names is None and (lora_scale == 1 or not active or _routed(parts)):
            dk.merge(parts)
            return
        names = active if adapter_names is None else _several(adapter_names)
        combine = next(layer.combination for layer in layers) if set(names) == set(active) else "sum"
        weights = []
        for name in names:
            held = {listed[part][name] for part in parts if name in listed[part]} - {None} or {1.0}
            if len(held) > 1:
                raise ValueError(f"{name!r} has strengths {sorted(held)} in different parts: fuse these one by one")
            weights.append(lora_scale * held.pop())
        dk.merge(parts, names, weights, combine=combine)

    def unfuse_lora(self, components=None):
        """Put the pristine weights back, to the bit."""
        dk.unmerge(self._parts(components))

    def disable_lora(self):
        """Make all adapters inactive, until `enable_lora` or `set_adapters`."""
        if self.get_active_adapters():
            layers = adapted_layers(as_model(self))
            disabled = {key: (layer.strengths, layer.combination, layer.routes) for key, layer in layers.items()}
            dk.set_adapters(self, [])
            self._deft_disabled = disabled

    def enable_lora(self):
        """Make active again what `disable_lora` made inactive, at its strengths, combined or routed as it was; nothing where
        adapters were loaded or set since."""
        disabled = self.__dict__.get("_deft_disabled")
        if disabled and not self.get_active_adapters():
            dk.set_adapters(self, [])  # RuntimeError while something is fused
            for key, layer in adapted_layers(as_model(self)).items():
                if key in disabled:
                    layer.set_adapters(*disabled[key])
        self._deft_disabled = {}

    def unload_lora_weights(self):
        """Take all adapters out: the original modules are back, with what is fused in their weights for good."""
        if adapted_layers(as_model(self)):
            dk.eject(self, keep_merged=True)
        self._deft_disabled = {}

    def save_pretrained(self, *args, **kwargs):
        """As diffusers', for a pipeline without adapters, which its files have no place for."""
        if adapted_layers(as_model(self)):
            raise RuntimeError(
                "save_pretrained would not save the adapters: save_lora_weights does, and fuse_lora() followed by "
                "unload_lora_weights() makes them part of the weights; unload_lora_weights() alone leaves them out"
            )
        return super().save_pretrained(*args, **kwargs)

    def set_lora_device(self, adapter_names, device):
        """Move adapters' tensors to a device, say to the CPU while they are inactive, and back before they act."""
        found = [dk.adapter_parameters(self, name) for name in _several(adapter_names)]
        parameters = [p for groups in found for group in groups.values() for p in group]
        if any(p.is_meta for p in parameters):
            raise RuntimeError(f"adapters {adapter_names} are offloaded with their model, which moves them by itself")
        moved = [p.data.to(torch.device(device)) for p in parameters]
        for p, data in zip(parameters, moved):
            p.data = data

    @property
    def fused_loras(self):
        """Names of the adapters that are merged."""
        return {name for part in parts_of(self).values() for layer in adapted_layers(part).values() for name in layer.merged}

    @property
    def num_fused_loras(self):
        return len(self.fused_loras)

    def _parts(self, names):
        parts = parts_of(self)
        unknown = [name for name in names or () if name not in parts]
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(unknown)}; its parts are {', '.join(parts)}")
        return Parts({name: part for name, part in parts.items() if not names or name in names}, type(self).__name__)


def _weight(weight, part):
    """The strength in one part that a number, None or {part: number} stands for."""
    if isinstance(weight, dict):
        weight = weight.get(part)
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"the weight for {part} is {weight!r}, expected a finite number (weights by block are not served)")
    return float(weight)
