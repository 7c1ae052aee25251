"""Adapters in files and back: PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`.

DEFT and PaRa: `base_model.model.<module>.deft_P` (m, r), `.deft_R` (r, n), `.deft_gate` (scalar; PEFT knows none).
LoRA: `base_model.model.<module>.lora_A.weight` (r, n), `.lora_B.weight` (m, r); convolutions keep their kernel's shape.
"""

import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DeftConfig, LoraConfig
from ..nn.layers import DeftConv2d
from ..nn.quantised import quantised
from .inject import adaptable, attach, match_targets, outer_modules, require_layers, wrap

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PIPELINE_WEIGHTS = "pytorch_deft_weights.safetensors"  # a pipeline's adapter, keys `<part>.<module>.deft_P`
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name for a LoRA, and for what save_lora_adapter writes
FOUND = (PIPELINE_WEIGHTS, WEIGHTS_NAME, LORA_WEIGHTS)  # in a folder, in this order
PREFIX = "base_model.model."
# suffix of a key in a file -> role in a layer
DEFT_ROLES = {"deft_P": "P", "deft_R": "R", "deft_gate": "gate"}
LORA_ROLES = {"lora_B.weight": "P", "lora_A.weight": "R"}
# Keys of PEFT's configurations that are understood here, or that change nothing about what an adapter computes.
UNDERSTOOD = set(
    "peft_type r alpha lora_alpha decomposition_method para deft_dropout lora_dropout gate init_weights init_scale "
    "init_lora_weights target_modules exclude_modules fan_in_fan_out layers_to_transform layers_pattern inference_mode "
    "base_model_name_or_path revision task_type peft_version auto_mapping megatron_core qalora_group_size".split()
)
INITIALISATIONS = (True, False, "gaussian", None)  # of a LoRA; the others change the base weights as well
OTHER_BASE = 0.005  # relative distance of fingerprints; half-precision copies of one base differ by 0.001
OTHER_QUANTISATION = 0.25  # of one base quantised in two ways: nf4 is 0.09 away from what it was made of
SKETCHED, SAMPLED = 16, 16  # layers of a fingerprint, and weights of each


class Adapter(NamedTuple):
    """An adapter as read from files and checked against a model."""

    config: DeftConfig | dict[str, DeftConfig]  # of all its layers, or of each
    tensors: dict[str, dict[str, Tensor]]  # layer -> role ("P", "R", "gate") -> tensor


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, float32, on the CPU. ValueError for one with NaN or infinity."""
    state = {}
    for name, layer in require_layers(model, [adapter_name]).items():
        lora = isinstance(layer.configs.get(adapter_name), LoraConfig)
        for role, p in layer.masters(adapter_name).items():
            suffix = next(k for k, v in (LORA_ROLES if lora else DEFT_ROLES).items() if v == role)
            t = p.detach().cpu().clone()
            if not torch.isfinite(t).all():
                raise ValueError(f"{role} of {name} has values that are not finite: adapter {adapter_name!r} is not saved")
            if lora and isinstance(layer, DeftConv2d):
                t = t[:, :, None, None] if role == "P" else t.view(-1, *layer.weight.shape[1:])
            state[f"{PREFIX}{name}.{suffix}"] = t.contiguous()
    return state


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors` in `folder`.

    Each file is replaced atomically, and the tensors' file carries the configuration too, so that two files of different
    adapters are never taken for one. PEFT reads them back for the methods that it has (qr, relu, PaRa on linear layers;
    LoRA). A fingerprint of the base weights goes with them.
    """
    from safetensors.torch import save

    folder = Path(folder)
    written, metadata = describe(model, adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_NAME, save(adapter_state_dict(model, adapter_name), {"format": "pt"} | metadata))
    replace_file(folder / CONFIG_NAME, (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())


def describe(model: nn.Module, adapter_name: str) -> tuple[dict, dict[str, str]]:
    """An adapter's configuration in PEFT's words, and what a file's metadata says: that, and the base's fingerprint."""
    layers = {k: v for k, v in require_layers(model, [adapter_name]).items() if adapter_name in v.configs}
    config = next(layer.configs[adapter_name] for layer in layers.values())
    written, fingerprint = _to_peft(config, model, list(layers)), base_fingerprint(layers)
    metadata = {"adapter_config": json.dumps(written)}
    return written, metadata | ({"base_fingerprint": fingerprint} if fingerprint else {})


def attach_adapter(model, loaded: Adapter, adapter_name: str, trainable: bool = False, activate: bool = True):
    """Put an adapter that `read_adapter` has checked on the model."""
    return attach(model, loaded.config, adapter_name, list(loaded.tensors), loaded.tensors, trainable, activate)


def read_adapter(model: nn.Module, path: str | os.PathLike, any_base: bool = False, part: str = "") -> Adapter:
    """Read an adapter and check everything about it against the model, which is not touched; `part` is the prefix of its
    keys in a pipeline's file."""
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    state, metadata = read_safetensors(file)
    if part:
        state, metadata = (
            {key.removeprefix(f"{part}."): value for key, value in held.items() if key.startswith(f"{part}.")}
            for held in (state, metadata)
        )
    raw, source = _read_config(file, metadata)
    config = _from_peft(raw, source)

    modules = outer_modules(model)
    tensors, unknown = _by_layer(file, state, modules, LORA_ROLES if isinstance(config, LoraConfig) else DEFT_ROLES)
    if unknown:
        where = f"fit no adaptable layer of {type(model).__name__}, or are none of a {raw['peft_type']} adapter"
        raise ValueError(f"{file}: {len(unknown)} of {len(state)} keys {where}: {_some(unknown)}")
    if config.target_modules and not raw.get("layers_to_transform"):
        absent = [name for name in match_targets(model, config) if name not in tensors]
        if tensors and absent:
            raise ValueError(f"{file}: {len(absent)} layers are targeted but missing: {_some(absent)}")
    _check_shapes(file, tensors, modules, config)
    for name, roles in tensors.items():
        for role, t in roles.items():
            if not (t.is_floating_point() and torch.isfinite(t.float()).all()):
                raise ValueError(f"{file}: {role} of {name} has values that are not finite")
    _check_base(file, metadata.get("base_fingerprint"), {k: modules[k] for k in tensors}, any_base)
    return Adapter(config, tensors)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected a folder with {WEIGHTS_NAME}, or a safetensors file")
    try:
        with safe_open(file, "pt") as opened:  # memory-mapped
            keys = opened.keys()
            return {key: opened.get_tensor(key) for key in keys}, dict(opened.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated or corrupt?): {error}") from None


def _read_config(file: Path, metadata: dict[str, str]) -> tuple[dict, Path]:
    """PEFT's JSON beside the tensors, or, for a file alone, the copy that it carries (ours, or diffusers'
    `save_lora_adapter`'s); and where it was found."""
    beside, raw = file.parent / CONFIG_NAME, None
    carried = metadata.get("adapter_config", metadata.get("lora_adapter_metadata"))
    carried = None if carried is None else json.loads(carried)
    if beside.is_file():
        try:
            raw = json.loads(beside.read_text())
        except ValueError as error:
            raise ValueError(f"{beside} is not readable JSON: {error}") from None
        if carried is not None and isinstance(raw, dict):
            differ = [key for key in carried if key in raw and raw[key] != carried[key]]
            if differ:
                raise ValueError(f"{beside} and {file.name} are not of one adapter: they differ in {', '.join(differ)}")
        return raw, beside
    if carried is None:
        raise FileNotFoundError(f"{beside} is missing, and {file.name} carries no configuration of its own")
    return carried, file


def _by_layer(file: Path, state: dict[str, Tensor], modules: dict[str, nn.Module], roles: dict[str, str]):
    """Keys sorted by layer and role, and the keys that fit nothing. PEFT's prefix may be absent (diffusers writes none);
    a convolution's kernel is flattened to (r, in*kh*kw)."""
    tensors: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        bare = key.removeprefix(PREFIX)
        for suffix, role in roles.items():
            name = bare.removesuffix(f".{suffix}")
            if name != bare and name in modules and adaptable(modules[name]):
                if role in tensors.setdefault(name, {}):
                    raise ValueError(f"{file}: {role} of {name} is there twice, with and without the prefix {PREFIX}")
                tensors[name][role] = value.flatten(1) if value.dim() == 4 else value
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
        m, n = wrap(name, modules[name]).shape
        r = config.r if isinstance(config, LoraConfig) else min(config.r, m)
        for role, expected in (("P", (m, r)), ("R", (r, n)), ("gate", ())):
            if role in found and tuple(found[role].shape) != expected:
                wrong.append(f"{name} ({role}: {tuple(found[role].shape)}, expected {expected})")
    for what, names in (("are missing", missing), ("are extra", extra), ("have wrong shapes", wrong)):
        if names:
            raise ValueError(f"{file}: {len(names)} tensors {what}: {_some(names)}")
    if not tensors:
        raise ValueError(f"{file}: holds no adapter tensors")


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


# Configuration, to PEFT's JSON and back ------------------------------------------------------------------------------


def _to_peft(config: DeftConfig, model: nn.Module, names: list[str]) -> dict:
    written = {
        "base_model_name_or_path": str(getattr(getattr(model, "config", None), "_name_or_path", None) or "") or None,
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
    used = [key for key, value in raw.items() if key not in UNDERSTOOD and value and (key, value) != ("bias", "none")]
    start = raw.get("init_lora_weights")
    if start not in INITIALISATIONS:
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise ValueError(f"{file}: options that these layers do not have: {', '.join(used)}")
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


def base_fingerprint(layers: dict[str, nn.Module]) -> str | None:
    """A sketch of base weights that survives a change of dtype, as JSON: a few weights of each of a few layers, spread
    evenly; those of a quantised layer under the name of its type. None where no layer's weight can be read."""
    names = [name for name in sorted(layers) if _is_readable(layers[name])]
    if len(names) > SKETCHED:
        names = [names[i * len(names) // SKETCHED] for i in range(SKETCHED)]
    return json.dumps({name: _sketch(layers[name]) for name in names}) if names else None


def _dense(layer: nn.Module) -> Tensor | None:
    pristine = getattr(layer, "_pristine", None)
    weight = pristine if isinstance(pristine, Tensor) else layer.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    return weight if plain else None


def _is_readable(layer: nn.Module) -> bool:
    return _dense(layer) is not None or quantised(getattr(layer, "base_layer", layer)) is not None


def _sketch(layer: nn.Module) -> list[float] | dict[str, list[float]] | None:
    """Weights spread evenly over a layer's pristine weight, float32, by the name of its type where that is quantised; None
    where the weight cannot be read."""
    weight, held = _dense(layer), None
    if weight is None:
        held = quantised(getattr(layer, "base_layer", layer))
        weight = None if held is None else held.dequantise(getattr(layer, "_pristine", None))
        if weight is None:
            return None
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLED, dtype=torch.float64).long().to(flat.device)
    values = flat[index].float().cpu().tolist()
    return values if held is None else {held.name: values}


def _unfold(sketch) -> tuple[str, Tensor]:
    """The type ("" where dense) and the weights of a sketch."""
    ((kind, values),) = sketch.items() if isinstance(sketch, dict) else [("", sketch)]
    return kind, torch.tensor(values, dtype=torch.float32)


def _check_base(file: Path, recorded: str | None, layers: dict[str, nn.Module], any_base: bool) -> None:
    if recorded is None:
        return
    try:
        made = {name: _unfold(sketch) for name, sketch in json.loads(recorded).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its base_fingerprint cannot be read: {error}") from None
    here = {name: _sketch(layers[name]) for name in made if name in layers}
    here = {name: _unfold(sketch) for name, sketch in here.items() if sketch is not None}
    pairs = [(made[name], now) for name, now in here.items() if now[1].shape == made[name][1].shape]
    if not pairs:
        return
    then, now = (torch.cat([values for _, values in side]) for side in zip(*pairs))
    kinds = [", ".join(sorted({kind or "dense" for kind, _ in side})) for side in zip(*pairs)]
    distance = float((now - then).norm() / then.norm().clamp_min(1e-12))
    if distance <= OTHER_BASE:
        return
    if kinds[0] != kinds[1] and distance <= OTHER_QUANTISATION:
        warnings.warn(
            f"{file}: this adapter was made for {kinds[0]} base weights, and these are {kinds[1]}, which differ by "
            f"{distance:.1%}: by their rounding, if they are of one base",
            stacklevel=4,
        )
        return
    message = f"{file}: this adapter was made for another base model (weights differ by {distance:.1%})"  # or by nan
    if not any_base:
        raise ValueError(f"{message}; load_adapter(..., any_base=True) loads it all the same")
    warnings.warn(message, stacklevel=4)


def replace_file(path: Path, content: bytes) -> None:
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
