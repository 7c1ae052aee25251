"""Adapters in files and back: PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`.

DEFT and PaRa: `base_model.model.<module>.deft_P` (m, r), `.deft_R` (r, n), `.deft_gate` (scalar; PEFT knows none).
LoRA: `base_model.model.<module>.lora_A.weight` (r, n), `.lora_B.weight` (m, r); convolutions keep their kernel's shape.
"""

import base64
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DeftConfig, LoraConfig
from ..nn.layers import DeftConv2d, DeftLayer
from .inject import adaptable, attach, require_layers

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# suffix of a key in a file -> role in a layer; order is that of matching
ROLES = {"deft_P": "P", "deft_R": "R", "deft_gate": "gate", "lora_B.weight": "P", "lora_A.weight": "R"}
# options of PEFT's files that change what an adapter computes and that these layers do not have
UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
OTHER_BASE = 0.005  # relative distance of fingerprints; half-precision copies of one base differ by 0.001


class Adapter(NamedTuple):
    """An adapter as read from files and checked against a model."""

    config: DeftConfig
    tensors: dict[str, dict[str, Tensor]]  # layer -> role ("P", "R", "gate") -> tensor


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, float32, on the CPU."""
    state = {}
    for name, layer in require_layers(model, [adapter_name]).items():
        lora = isinstance(layer.configs.get(adapter_name), LoraConfig)
        for role, p in layer.adapter_tensors(adapter_name).items():
            suffix = {"P": "lora_B.weight", "R": "lora_A.weight"}[role] if lora else f"deft_{role}"
            t = p.detach().cpu().clone()
            if lora and isinstance(layer, DeftConv2d):
                t = t[:, :, None, None] if role == "P" else t.view(-1, *layer.weight.shape[1:])
            state[f"{PREFIX}{name}.{suffix}"] = t.contiguous()
    return state


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors` in `folder`.

    Each file is replaced atomically. PEFT reads them back for the methods that it has (qr, relu, PaRa on linear layers;
    LoRA). The safetensors metadata also holds the configuration and a fingerprint of the base weights.
    """
    from safetensors.torch import save

    folder = Path(folder)
    layers = require_layers(model, [adapter_name])
    config = next(layer.configs[adapter_name] for layer in layers.values() if adapter_name in layer.configs)
    written = _to_peft(config, model, [name for name, layer in layers.items() if adapter_name in layer.configs])
    metadata = {"format": "pt", "adapter_config": json.dumps(written)}
    fingerprint = base_fingerprint({k: v for k, v in layers.items() if adapter_name in v.configs})
    if fingerprint:
        metadata["base_fingerprint"] = fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    _replace_file(folder / WEIGHTS_NAME, save(adapter_state_dict(model, adapter_name), metadata))
    _replace_file(folder / CONFIG_NAME, (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())


def load_adapter(
    model: nn.Module,
    folder_or_file: str | os.PathLike,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    any_base: bool = False,
) -> list[str]:
    """Load an adapter from a folder in PEFT's layout or from a safetensors file, and make it the active one.

    Args:
        trainable: whether its parameters require grad, to go on training.
        any_base: load an adapter made for another base of the same shapes, with a warning instead of an error.

    Returns the names of the adapted layers.

    Raises:
        FileNotFoundError: nothing there. ValueError: files that cannot be read, keys that are missing or fit no layer,
        wrong shapes, values that are not finite, another base, options these layers do not have. The model is then as
        it was.
    """
    loaded = read_adapter(model, folder_or_file, any_base=any_base)
    return attach_adapter(model, loaded, adapter_name, trainable=trainable)


def attach_adapter(model, loaded: Adapter, adapter_name: str, trainable: bool = False, activate: bool = True):
    """Put an adapter that `read_adapter` has checked on the model."""
    return attach(model, loaded.config, adapter_name, list(loaded.tensors), loaded.tensors, trainable, activate)


def read_adapter(model: nn.Module, path: str | os.PathLike, any_base: bool = False) -> Adapter:
    """Read an adapter and check everything about it against the model, which is not touched."""
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    state, metadata = _read_safetensors(file)
    config_file = file.parent / CONFIG_NAME
    if config_file.is_file():
        try:
            raw = json.loads(config_file.read_text())
        except ValueError as error:
            raise ValueError(f"{config_file} is not readable JSON: {error}") from None
    elif "adapter_config" in metadata:
        raw = json.loads(metadata["adapter_config"])
    else:
        raise FileNotFoundError(f"{config_file} is missing, and {file.name} carries no configuration of its own")
    config = _from_peft(raw, config_file)

    modules = {k: m for k, m in model.named_modules(remove_duplicate=False) if not _inside_adapted(k, model)}
    tensors, unknown = _by_layer(state, modules)
    if unknown:
        raise ValueError(
            f"{file}: {len(unknown)} of {len(state)} keys fit no adaptable layer of {type(model).__name__}: {_some(unknown)}"
        )
    _check_shapes(file, tensors, modules, config)
    for name, roles in tensors.items():
        for role, t in roles.items():
            if not torch.isfinite(t).all():
                raise ValueError(f"{file}: {role} of {name} has values that are not finite")
    _check_base(file, metadata.get("base_fingerprint"), {k: modules[k] for k in tensors}, any_base)
    return Adapter(config, tensors)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected a folder with {WEIGHTS_NAME}, or a safetensors file")
    try:
        with safe_open(file, "pt") as opened:  # memory-mapped
            keys = opened.keys()
            return {key: opened.get_tensor(key) for key in keys}, dict(opened.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated or corrupt?): {error}") from None


def _inside_adapted(name: str, model: nn.Module) -> bool:
    return ".base_layer" in f".{name}" or any(part in f".{name}." for part in (".deft_P.", ".deft_R.", ".deft_gate."))


def _by_layer(state: dict[str, Tensor], modules: dict[str, nn.Module]):
    """Keys sorted by layer and role, and the keys that fit nothing. PEFT's prefix may be absent (diffusers writes none);
    a convolution's kernel is flattened to (r, in*kh*kw)."""
    tensors: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        bare = key.removeprefix(PREFIX)
        for suffix, role in ROLES.items():
            name = bare.removesuffix(f".{suffix}")
            if name != bare and name in modules and adaptable(modules[name]):
                tensors.setdefault(name, {})[role] = value.flatten(1) if value.dim() == 4 else value
                break
        else:
            unknown.append(key)
    return tensors, unknown


def _check_shapes(file: Path, tensors, modules, config: DeftConfig) -> None:
    roles = {"P"} | ({"R"} if not config.para else set()) | ({"gate"} if config.gate else set())
    missing, extra, wrong = [], [], []
    for name, found in tensors.items():
        missing += [f"{name} ({role})" for role in sorted(roles - set(found))]
        extra += [f"{name} ({role})" for role in sorted(set(found) - roles)]
        m, n = modules[name].shape if isinstance(modules[name], DeftLayer) else _shape(modules[name])
        r = config.r if isinstance(config, LoraConfig) else min(config.r, m)
        for role, expected in (("P", (m, r)), ("R", (r, n)), ("gate", ())):
            if role in found and tuple(found[role].shape) != expected:
                wrong.append(f"{name} ({role}: {tuple(found[role].shape)}, expected {expected})")
    for what, names in (("are missing", missing), ("are extra", extra), ("have wrong shapes", wrong)):
        if names:
            raise ValueError(f"{file}: {len(names)} tensors {what}: {_some(names)}")
    if not tensors:
        raise ValueError(f"{file}: holds no adapter tensors")


def _shape(module: nn.Module) -> tuple[int, int]:
    from ..nn.layers import DeftLinear

    return (DeftConv2d if isinstance(module, nn.Conv2d) else DeftLinear)(module).shape


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


# Configuration, to PEFT's JSON and back ------------------------------------------------------------------------------


def _to_peft(config: DeftConfig, model: nn.Module, names: list[str]) -> dict:
    written = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": config.r,
        "target_modules": names if config.target_modules is None else config.target_modules,
        "exclude_modules": config.exclude_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if isinstance(config, LoraConfig):
        return written | {
            "peft_type": "LORA",
            "lora_alpha": config.r if config.alpha is None else config.alpha,
            "lora_dropout": config.dropout,
            "init_lora_weights": config.init_weights,
        }
    return written | {
        "peft_type": "DEFT",
        "alpha": config.alpha,
        "decomposition_method": config.decomposition_method,
        "para": config.para,
        "deft_dropout": config.dropout,
        "init_weights": config.init_weights,
        "init_scale": config.init_scale,
        **({"gate": True} if config.gate else {}),
    }


def _from_peft(raw: dict, file: Path) -> DeftConfig:
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind not in ("DEFT", "LORA"):
        raise ValueError(f"{file}: peft_type is {kind!r}, expected DEFT or LORA")
    used = [key for key in UNSUPPORTED if raw.get(key)]
    if used or raw.get("bias", "none") != "none":
        raise ValueError(f"{file}: options that these layers do not have: {', '.join(used or ['bias'])}")
    common = {key: raw.get(key) for key in ("target_modules", "exclude_modules")}
    if isinstance(common["target_modules"], list) and not common["target_modules"]:
        common["target_modules"] = None
    try:
        if kind == "LORA":
            return LoraConfig(r=raw["r"], alpha=raw.get("lora_alpha"), dropout=raw.get("lora_dropout", 0.0),
                              init_weights=bool(raw.get("init_lora_weights", True)), **common)  # fmt: skip
        return DeftConfig(
            r=raw["r"], alpha=raw.get("alpha"), decomposition_method=raw.get("decomposition_method", "relu"),
            para=raw.get("para", False), dropout=raw.get("deft_dropout", 0.0), gate=raw.get("gate", False),
            init_weights=raw.get("init_weights", True), init_scale=raw.get("init_scale", 1.0), **common,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


# Which base an adapter was made for ----------------------------------------------------------------------------------


def base_fingerprint(layers: dict[str, nn.Module], count: int = 16, values: int = 16) -> str | None:
    """A sketch of base weights that survives a change of dtype: `values` of each of `count` layers, spread evenly, as
    base64 of float16. None where no layer holds a dense weight."""
    sketch = _sketch(layers, count, values)
    return None if sketch is None else base64.b64encode(sketch.half().numpy().tobytes()).decode()


def _sketch(layers: dict[str, nn.Module], count: int, values: int) -> Tensor | None:
    parts = []
    names = sorted(layers)
    for name in [names[i * len(names) // count] for i in range(count)] if len(names) > count else names:
        layer = layers[name]
        weight = layer._pristine if getattr(layer, "_pristine", None) is not None else layer.weight
        if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
            continue
        flat = weight.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, values, dtype=torch.float64).long().to(flat.device)
        parts.append(flat[index].double().cpu())
    return torch.cat(parts) if parts else None


def _check_base(file: Path, recorded: str | None, layers: dict[str, nn.Module], any_base: bool) -> None:
    if recorded is None:
        return
    made = torch.frombuffer(bytearray(base64.b64decode(recorded)), dtype=torch.float16).double()
    here = _sketch(layers, 16, 16)
    if here is None:
        return
    distance = 1.0 if here.shape != made.shape else float((here - made).norm() / made.norm().clamp_min(1e-12))
    if distance > OTHER_BASE:
        message = f"{file}: this adapter was made for another base model (weights differ by {distance:.1%})"
        if not any_base:
            raise ValueError(f"{message}; load_adapter(..., any_base=True) loads it all the same")
        warnings.warn(message, stacklevel=4)


def _replace_file(path: Path, content: bytes) -> None:
    """Write so that a reader, or a crash, sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
