"""Adapters in files and back: PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`.

DEFT and PaRa: `base_model.model.<module>.deft_P` (m, r), `.deft_R` (r, n), `.deft_gate` (scalar; PEFT knows none).
LoRA: `base_model.model.<module>.lora_A.weight` (r, n), `.lora_B.weight` (m, r); convolutions keep their kernel's shape.
"""

import dataclasses
import json
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DeftConfig, LoraConfig
from ..nn.layers import DeftConv2d
from ..nn.quantised import quantised
from .inject import (
    adaptable,
    adapted_layers,
    attach,
    match_targets,
    outer_modules,
    require_layers,
    wrap,
)

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
UNDERSTOOD_OF_LORA = {"rank_pattern", "alpha_pattern", "use_rslora"}
SWITCHES = ("para", "gate", "init_weights", "use_rslora")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
INITIALISATIONS = (True, False, "gaussian", None)  # of a LoRA; the others change the base weights as well
OTHER_BASE = 0.005  # relative distance of fingerprints; half-precision copies of one base differ by 0.001
OTHER_QUANTISATION = 0.25  # of one base quantised in two ways: nf4 is 0.09 away from what it was made of
LARGEST = 2.0**60  # of a value in an adapter, its scale included: products of two, summed, stay finite in float32
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
            t = p.detach().cpu().clone()
            if not torch.isfinite(t).all():
                raise ValueError(f"{role} of {name} has values that are not finite: adapter {adapter_name!r} is not saved")
            t = lora_shaped(layer, role, t) if lora else t.contiguous()
            state[f"{PREFIX}{name}.{suffix(role, lora)}"] = t
    return state


def suffix(role: str, lora: bool) -> str:
    """The end of the key of "P", "R" or "gate" in a file."""
    return next(k for k, v in (LORA_ROLES if lora else DEFT_ROLES).items() if v == role)


def lora_shaped(layer: nn.Module, role: str, t: Tensor) -> Tensor:
    """B ("P") or A ("R") of a LoRA as files hold it: a convolution's as kernels, (m, r, 1, 1) and (r, in, kh, kw)."""
    if isinstance(layer, DeftConv2d):
        t = t[:, :, None, None] if role == "P" else t.view(-1, *layer.weight.shape[1:])
    return t.contiguous()


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors` in `folder`.

    Each file is replaced atomically, and the tensors' file carries the configuration too, so that two files of different
    adapters are never taken for one. PEFT reads them back for the methods that it has (qr, relu, PaRa on linear layers;
    LoRA). A fingerprint of the base weights goes with them.
    """
    written, fingerprint = describe(model, adapter_name)
    write_adapter(folder, written, adapter_state_dict(model, adapter_name), fingerprint)


def describe(model: nn.Module, adapter_name: str) -> tuple[dict, str | None]:
    """An adapter's configuration in PEFT's words, and the fingerprint of its base."""
    layers = {k: v for k, v in require_layers(model, [adapter_name]).items() if adapter_name in v.configs}
    config = next(layer.configs[adapter_name] for layer in layers.values())
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    written = to_peft(config, {name: layer.rank(adapter_name) for name, layer in layers.items()}, base)
    return written, base_fingerprint(layers)


def write_adapter(folder: str | os.PathLike, written: dict, state: dict[str, Tensor], fingerprint=None, more=None) -> None:
    """Write PEFT's two files: a configuration as `to_peft` gives it, and tensors under PEFT's keys; `more` metadata."""
    from safetensors.torch import save

    folder = Path(folder)
    metadata = metadata_of(written, fingerprint) | (more or {})
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_NAME, save(state, {"format": "pt"} | metadata))
    replace_file(folder / CONFIG_NAME, (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())


def metadata_of(written: dict, fingerprint: str | None) -> dict[str, str]:
    """What a file's metadata says of an adapter: its configuration in PEFT's words, and the base's fingerprint."""
    return {"adapter_config": json.dumps(written)} | ({"base_fingerprint": fingerprint} if fingerprint else {})


def attach_adapter(model, loaded: Adapter, adapter_name: str, trainable: bool = False, activate: bool = True):
    """Put an adapter that `read_adapter` has checked on the model."""
    return attach(model, loaded.config, adapter_name, list(loaded.tensors), loaded.tensors, trainable, activate)


def read_adapter(model: nn.Module, path: str | os.PathLike, any_base: bool = False, part: str = "", held=None) -> Adapter:
    """Read an adapter and check everything about it against the model, which is not touched; `part` is what a pipeline, and
    errors, call the model; `held` the model's share of what `read_safetensors` has read already."""
    path, prefix = Path(path), f"{part}." if part else ""
    file = path / WEIGHTS_NAME if path.is_dir() else path
    state, metadata = held or read_safetensors(file)
    raw, source = _read_config(file, metadata)
    config = from_peft(raw, source)

    modules = outer_modules(model)
    lora = isinstance(config, LoraConfig)
    tensors, unknown = _by_layer(file, state, modules, LORA_ROLES if lora else DEFT_ROLES)
    if unknown:
        where = f"fit no adaptable layer of {type(model).__name__}, or are none of a {raw['peft_type']} adapter"
        raise ValueError(f"{file}: {len(unknown)} of {len(state)} keys {where}: {some([prefix + key for key in unknown])}")
    if config.target_modules and not raw.get("layers_to_transform"):
        try:
            absent = [prefix + name for name in match_targets(model, config) if name not in tensors]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        if tensors and absent:
            raise ValueError(f"{file}: {len(absent)} layers are targeted but missing: {some(absent)}")
    ranks, alphas = peft_ranks(raw, tensors) if lora else (dict.fromkeys(tensors, config.r), {})
    return checked(file, config, tensors, ranks, alphas, modules, metadata.get("base_fingerprint"), any_base, prefix)


def checked(
    file: Path, config, tensors, ranks, alphas, modules, fingerprint: str | None, any_base: bool, prefix: str = ""
) -> Adapter:
    """The adapter, once its shapes, its values and its base are found to be right for the model's modules.

    `tensors` is {layer: {role: tensor}}, `ranks` {layer: r}; `alphas` {layer: alpha} of a LoRA, whose layers may differ in
    both. Its config has one alpha: where that of the file is another in some layer, alpha / r is folded into B instead.
    Errors name the layers with `prefix`, a part's name and a dot.
    """
    _check_shapes(file, tensors, modules, config, ranks, prefix)
    for name, roles in tensors.items():
        for role, t in roles.items():
            if t.dtype not in FLOATS:
                raise ValueError(f"{file}: {role} of {prefix}{name} has values that are {t.dtype}, expected floating dtype")
            if not torch.isfinite(t.float()).all():
                raise ValueError(f"{file}: {role} of {prefix}{name} has values that are not finite")
    lora = isinstance(config, LoraConfig)
    for name, roles in tensors.items():
        r = roles["P"].shape[1]
        scale = alphas[name] / r if lora else config.scale(r)
        for role, t in roles.items():
            largest = float(t.float().abs().max()) * (abs(scale) if role == ("P" if lora else "R") else 1.0)
            if not largest < LARGEST:
                raise ValueError(
                    f"{file}: {role} of {prefix}{name} has values of up to {largest:.3g} (alpha / r is {scale:.3g}), "
                    f"expected below {LARGEST:.3g}: their products overflow"
                )
    _check_base(file, fingerprint, {k: modules[k] for k in tensors}, any_base or lora, prefix)
    if lora:
        one = next(iter(alphas.values()))
        if one > 0 and all(alpha == one for alpha in alphas.values()):
            config = dataclasses.replace(config, alpha=one)
        else:
            config = dataclasses.replace(config, alpha=None)
            scales = {name: alphas[name] / ranks[name] for name in tensors}
            tensors = {name: {**roles, "P": roles["P"].float() * scales[name]} for name, roles in tensors.items()}
    return Adapter(config, tensors)


def read_safetensors(file: Path, tensors: bool = True) -> tuple[dict[str, Tensor | None], dict[str, str]]:
    """Tensors and metadata of a file; without `tensors`, None in their place. Errors name the file."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected a folder with {WEIGHTS_NAME}, or a safetensors file")
    try:
        with safe_open(file, "pt") as opened:  # memory-mapped
            keys = opened.keys()
            state = {key: opened.get_tensor(key) if tensors else None for key in keys}
            return state, dict(opened.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated or corrupt?): {error}") from None


def _read_config(file: Path, metadata: dict[str, str]) -> tuple[dict, Path]:
    """PEFT's JSON beside the tensors, or, for a file alone, the copy that it carries (ours, or diffusers'
    `save_lora_adapter`'s); and where it was found."""
    beside = file.parent / CONFIG_NAME
    carried = metadata.get("adapter_config", metadata.get("lora_adapter_metadata"))
    if carried is not None:
        carried = read_json(carried, f"{file}: the configuration that it carries")
    if beside.is_file() and file.name != PIPELINE_WEIGHTS:  # which is never of one adapter with what lies beside it
        raw = read_json(beside.read_bytes(), beside)
        if carried is not None:
            differ = [key for key in carried if key in raw and raw[key] != carried[key]]
            if differ:
                raise ValueError(f"{beside} and {file.name} are not of one adapter: they differ in {', '.join(differ)}")
        return raw, beside
    if carried is None:
        raise FileNotFoundError(f"{beside} is missing, and {file.name} carries no configuration of its own")
    return carried, file


def peft_type(path: Path) -> str | None:
    """What the configuration of an adapter's folder or file calls it, "DEFT" or "LORA"; None for files without one."""
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        return None
    metadata = read_safetensors(file, tensors=False)[1]
    named = file.name == WEIGHTS_NAME and (file.parent / CONFIG_NAME).is_file()
    return _read_config(file, metadata)[0].get("peft_type") if named or "adapter_config" in metadata else None


def read_json(text: str | bytes, where) -> dict:
    """A JSON object; ValueError names `where` it stands if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


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


def _check_shapes(file: Path, tensors, modules, config: DeftConfig, ranks: dict[str, int], prefix: str) -> None:
    roles = {"P"} | ({"R"} if not config.para else set()) | ({"gate"} if config.gate else set())
    missing, extra, wrong = [], [], []
    for name, found in tensors.items():
        missing += [f"{prefix}{name} ({role})" for role in sorted(roles - set(found))]
        extra += [f"{prefix}{name} ({role})" for role in sorted(set(found) - roles)]
        m, n = wrap(name, modules[name]).shape
        r = ranks[name] if isinstance(config, LoraConfig) else min(ranks[name], m)
        for role, expected in (("P", (m, r)), ("R", (r, n)), ("gate", ())):
            if role != "gate" and r < 1:
                wrong.append(f"{prefix}{name} ({role}: of rank {r}, expected at least 1)")
            elif role in found and tuple(found[role].shape) != expected:
                wrong.append(f"{prefix}{name} ({role}: {tuple(found[role].shape)}, expected {expected})")
    for what, names in (("are missing", missing), ("are extra", extra), ("have wrong shapes", wrong)):
        if names:
            raise ValueError(f"{file}: {len(names)} tensors {what}: {some(names)}")
    if not tensors:
        raise ValueError(f"{file}: holds no adapter tensors")


def some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


# Configuration, to PEFT's JSON and back ------------------------------------------------------------------------------


def to_peft(config: DeftConfig, ranks: dict[str, int], base: str | None = None) -> dict:
    """PEFT's JSON for an adapter whose layers have these ranks, made for the model named `base`."""
    written = {
        "base_model_name_or_path": str(base) if base else None,
        "r": config.r,
        "target_modules": list(ranks) if config.target_modules is None else config.target_modules,
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
        others = {f"^{name}": r for name, r in ranks.items() if r != config.r}
        return written | {
            "peft_type": "LORA",
            "rank_pattern": others,
            "alpha_pattern": others if config.alpha is None else {},
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


def from_peft(raw: dict, file: Path) -> DeftConfig:
    """The config that PEFT's JSON describes. Options of any PEFT version that are off are passed over; ValueError lists
    those that are on and unknown here."""
    kind = raw.get("peft_type")
    if kind not in ("DEFT", "LORA"):
        raise ValueError(f"{file}: peft_type is {kind!r}, expected DEFT or LORA")
    understood = UNDERSTOOD | (UNDERSTOOD_OF_LORA if kind == "LORA" else set())
    used = [key for key, value in raw.items() if key not in understood and value and (key, value) != ("bias", "none")]
    start = raw.get("init_lora_weights")
    if start not in INITIALISATIONS:
        used.append(f"init_lora_weights={start!r}")
    if used:
        version = raw.get("peft_version")
        made = f" (the file is PEFT {version}'s)" if version else ""
        raise ValueError(f"{file}: options that these layers do not have: {', '.join(used)}{made}")
    _check_types(raw, file)
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
    except KeyError as error:
        raise ValueError(f"{file}: {error} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {error}") from None


def _check_types(raw: dict, file: Path) -> None:
    """What a dataclass would take in silence."""
    for key in SWITCHES:
        if not isinstance(raw.get(key, False), bool):
            raise ValueError(f"{file}: {key} is {raw[key]!r}, expected true or false")
    for key in ("target_modules", "exclude_modules"):
        value = raw.get(key)
        if not (value is None or isinstance(value, str) or _all_are(value, list, str)):
            raise ValueError(f"{file}: {key} is {value!r}, expected a string or a list of strings")
    for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = raw.get(key) or {}
        if not (isinstance(pattern, dict) and _all_are(list(pattern.values()), list, kind)):
            raise ValueError(f"{file}: {key} is {pattern!r}, expected numbers by layer")
        for name, value in pattern.items():
            try:
                re.compile(name)
                float(value)
            except (re.error, OverflowError) as error:
                raise ValueError(f"{file}: {key} has {name!r}: {error}") from None


def _all_are(value, container, kind) -> bool:
    return isinstance(value, container) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def peft_ranks(raw: dict, names) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of every layer of a PEFT LoRA, its patterns (regular expressions for the end of a name) and rank
    stabilisation (alpha / sqrt(r), arXiv 2312.03732) applied."""

    def of(patterns, name, default):
        return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name)), default)

    ranks = {name: of(raw.get("rank_pattern"), name, raw["r"]) for name in names}
    alphas = {}
    for name, r in ranks.items():
        alpha = of(raw.get("alpha_pattern"), name, r if raw.get("lora_alpha") is None else raw["lora_alpha"])
        alphas[name] = alpha * r**0.5 if raw.get("use_rslora") and r > 0 else alpha
    return ranks, alphas


def commonest(ranks: dict[str, int]) -> int:
    """The rank that most layers have, the largest of several such."""
    return max((count, r) for r, count in Counter(ranks.values()).items())[1]


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


def sketch_bases(model: nn.Module) -> None:
    """Have the adapted layers remember a sketch of their base weights, for `base_fingerprint` once these cannot be read:
    before FSDP splits them over processes."""
    for layer in adapted_layers(model).values():
        layer.sketch = _sketch(layer)


def _is_readable(layer: nn.Module) -> bool:
    if getattr(layer, "sketch", None) is not None:
        return True
    return _dense(layer) is not None or quantised(getattr(layer, "base_layer", layer)) is not None


def _sketch(layer: nn.Module) -> list[float] | dict[str, list[float]] | None:
    """Weights spread evenly over a layer's pristine weight, float32, by the name of its type where that is quantised; None
    where the weight cannot be read."""
    weight, held = _dense(layer), None
    if weight is None:
        held = quantised(getattr(layer, "base_layer", layer))
        weight = None if held is None else held.dequantise(getattr(layer, "_pristine", None))
        if weight is None:
            return getattr(layer, "sketch", None)
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLED, dtype=torch.float64).long().to(flat.device)
    values = flat[index].float().cpu().tolist()
    return values if held is None else {held.name: values}


def _unfold(sketch) -> tuple[str, Tensor]:
    """The type ("" where dense) and the weights of a sketch."""
    ((kind, values),) = sketch.items() if isinstance(sketch, dict) else [("", sketch)]
    return kind, torch.tensor(values, dtype=torch.float32)


def _check_base(file: Path, recorded: str | None, layers: dict[str, nn.Module], any_base: bool, prefix: str) -> None:
    if recorded is None:
        return
    try:
        made = {name: _unfold(sketch) for name, sketch in json.loads(recorded).items()}
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:  # RecursionError is a RuntimeError
        raise ValueError(f"{file}: its base_fingerprint cannot be read: {error}") from None
    here = {name: _sketch(layers[name]) for name in made if name in layers}
    here = {name: _unfold(sketch) for name, sketch in here.items() if sketch is not None}
    pairs = [(name, made[name], now) for name, now in here.items() if now[1].shape == made[name][1].shape]
    if not pairs:
        return
    _, *sides = zip(*pairs)
    then, now = (torch.cat([values for _, values in side]) for side in sides)
    kinds = [", ".join(sorted({kind or "dense" for kind, _ in side})) for side in sides]
    distance = float((now - then).norm() / then.norm().clamp_min(1e-12))
    if distance <= OTHER_BASE:
        return
    if kinds[0] != kinds[1] and distance <= OTHER_QUANTISATION:
        warn(
            f"{file}: this adapter was made for {kinds[0]} base weights, and these are {kinds[1]}, which differ by "
            f"{distance:.1%}: by their rounding, if they are of one base"
        )
        return
    name, *both = max(pairs, key=lambda pair: float((pair[1][1] - pair[2][1]).norm()))
    first = ["[" + ", ".join(f"{v:.4g}" for v in values[:3].tolist()) + ", …]" for _, values in both]
    message = (
        f"{file}: this adapter was made for another base model (weights differ by {distance:.1%}: {prefix}{name} begins "
        f"with {first[0]} in the file's fingerprint and with {first[1]} here)"
    )
    if not any_base:  # a distance that is not a number comes here too
        raise ValueError(
            f"{message}; give the base that it was made for (in Python, load_adapter(..., any_base=True) takes this one too)"
        )
    warn(message)


def warn(message: str) -> None:
    """A warning that points at the line outside of this library, and of torch's decorators, that has led here."""
    inside = (__name__.partition(".")[0], "torch")
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


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
