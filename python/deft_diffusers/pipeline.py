"""diffusers' own verbs for adapters, on these layers: after `enable_deft(pipe)`, `pipe.load_lora_weights` and its kin load,
weigh, fuse and delete DEFT and LoRA adapters alike."""

import functools
import math

import torch

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers
from deft_kernels.adapters.pipeline import components as parts_of

SCALED_BY_CALL = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def enable_deft(pipe):
    """Give a diffusers pipeline object the verbs of `DeftVerbs`, and return it. Its class keeps its name and is a subclass
    of what it was, so that all else works as before, `save_pretrained` included."""
    kind = type(pipe)
    if isinstance(pipe, DeftVerbs):
        return pipe

    @functools.wraps(kind.__call__)
    def call(self, *args, **kwargs):
        for name in SCALED_BY_CALL:
            if (kwargs.get(name) or {}).get("scale") is not None:
                raise ValueError(f"{name}['scale'] does not reach these adapters: set_adapters(names, weights) does")
        return kind.__call__(self, *args, **kwargs)

    own = {"__call__": call, "__doc__": kind.__doc__, "__module__": kind.__module__}
    pipe.__class__ = type(kind)(kind.__name__, (DeftVerbs, kind), own)
    return pipe


class DeftVerbs:
    """diffusers' verbs with diffusers' arguments (`diffusers.loaders.lora_base.LoraBaseMixin`), over deft_kernels'. A
    pipeline is changed in all its parts or, on an error, in none."""

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **kwargs):
        """Load an adapter from a folder, file or hub id, by `deft_kernels.load_adapter`, whose options `kwargs` are; with
        `hotswap`, merge it in place of what is merged, by `deft_kernels.hotswap`."""
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            raise TypeError("expected a folder, a file or a hub id, not a state dict: save it to a safetensors file first")
        if hotswap:
            dk.hotswap(self, pretrained_model_name_or_path_or_dict, **kwargs)
            return
        known = {name for names in dk.list_adapters(self).values() for name in names}
        name = f"default_{len(known)}" if adapter_name is None else adapter_name  # diffusers' own numbering
        dk.load_adapter(self, pretrained_model_name_or_path_or_dict, name, **kwargs)

    def save_lora_weights(self, save_directory, adapter_name=None):
        """Write an adapter, None: the active one, to `pytorch_deft_weights.safetensors` (`deft_kernels.export_lora` writes
        LoRA files)."""
        if adapter_name is None:
            active = self.get_active_adapters()
            if len(active) != 1:
                raise ValueError(f"the active adapters are {', '.join(active) or 'none'}: say which by adapter_name")
            adapter_name = active[0]
        dk.save_adapter(self, save_directory, adapter_name)

    def set_adapters(self, adapter_names, adapter_weights=None):
        """Make exactly these active. A weight may be a dict, {part: weight}, with 1 for a part that it does not name."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(names) != len(weights):
            raise ValueError(f"{len(names)} adapter names but {len(weights)} weights")
        listed = {part: held for part, held in dk.list_adapters(self).items() if held}
        by_part = {part: [_weight(w, part, listed) for w in weights] for part in listed}
        dk.set_adapters(self, names)
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
        """Remove adapters from every part."""
        for name in [adapter_names] if isinstance(adapter_names, str) else list(adapter_names):
            dk.delete_adapter(self, name)

    def fuse_lora(self, components=None, lora_scale=1.0, safe_fusing=False, adapter_names=None):
        """Merge the active adapters, or those named, into the weights of the parts `components` (None: all). `safe_fusing`
        is always so: values that are not finite are refused."""
        parts, listed = self._parts(components), dk.list_adapters(self)
        if adapter_names is None and lora_scale == 1:
            dk.merge(parts)
            return
        names = self.get_active_adapters() if adapter_names is None else adapter_names
        weights = []
        for name in [names] if isinstance(names, str) else names:
            held = {listed[part][name] for part in parts if name in listed[part]} - {None} or {1.0}
            if len(held) > 1:
                raise ValueError(f"{name!r} has strengths {sorted(held)} in different parts: fuse these one by one")
            weights.append(lora_scale * held.pop())
        dk.merge(parts, names, weights)

    def unfuse_lora(self, components=None):
        """Put the pristine weights back, to the bit."""
        dk.unmerge(self._parts(components))

    def disable_lora(self):
        """Make all adapters inactive, until `enable_lora` or `set_adapters`."""
        if self.get_active_adapters():
            self._deft_disabled = dk.list_adapters(self)
            dk.set_adapters(self, [])

    def enable_lora(self):
        """Make active again what `disable_lora` made inactive, at its strengths."""
        disabled, now = self.__dict__.pop("_deft_disabled", {}), dk.list_adapters(self)
        for part, names in disabled.items():
            active = {name: w for name, w in names.items() if w is not None and name in now[part]}
            if active:
                dk.set_adapters({part: getattr(self, part)}, list(active), list(active.values()))

    def unload_lora_weights(self):
        """Take all adapters out: the original modules are back."""
        if self.get_list_adapters():
            dk.eject(self)

    def set_lora_device(self, adapter_names, device):
        """Move adapters' tensors to a device, say to the CPU while they are inactive, and back before they act."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for group in dk.adapter_parameters(self, name).values():
                for p in group:
                    p.data = p.data.to(torch.device(device))

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
        return {name: part for name, part in parts.items() if not names or name in names}


def _weight(weight, part, listed):
    """The strength in one part that a number, None or {part: number} stands for."""
    if isinstance(weight, dict):
        unknown = [name for name in weight if name not in listed]
        if unknown:
            raise ValueError(f"a weight is for {', '.join(unknown)}, but the parts with adapters are {', '.join(listed)}")
        weight = weight.get(part)
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"the weight for {part} is {weight!r}, expected a finite number (weights by block are not served)")
    return float(weight)
