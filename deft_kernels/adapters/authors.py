"""The files that the code of DEFT's authors writes (github.com/MAXNORM8650/DEFT), read as adapters. Pickles are read as
tensors and plain values, or refused: nothing in them is executed.

| file | keys | W' |
|---|---|---|
| `knowledge_injection_state.bin` | `<module>.P .R_new .gate .Q_P_cached .lora_A .lora_B` | by `injection_method`, below |
| `project_replace.pt` (SDXL) | `<module>.lora_layer.P .R_new .gate` | W - P P^T W + P R; without R_new: PaRa |
| `para_rank_state.bin` | `<module>.B .B_dense .sparse_mask` | W - M W, M by `decomposition_method` |

project_replace, residual_projection: W - B K^T W + sigmoid(gate) B R_new, B and K from P by `qr` or `svd`; the string
'None' is relu here (their deft/injection.py, which raises for null, as is done here).  additive_update: LoRA, W +
(lora_alpha / r) sigmoid(gate) lora_A lora_B, lora_A being (m, r).  lorapara: PaRa of P and that LoRA at once, two adapters
here.
PaRa: qr: M = Q Q^T; tsvd, lrmf: M = U S U^T of B = U S V^T; eigen: the r leading terms of B B^T. All but qr are P P^T of a P
that is made here.
"""

import os
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import reference
from ..config import DeftConfig, LoraConfig
from .files import FLOATS, Adapter, attach_adapter, checked, read_json, some, warn
from .inject import adaptable, adapted_layers, outer_modules, set_adapters, wrap
from .pipeline import components

STATES = {
    "knowledge_injection_state.bin": "knowledge_injection_config",
    "para_rank_state.bin": "para_rank_config",
    "project_replace.pt": None,
}
DEFT_KEYS = {"P", "R_new", "gate", "Q_P_cached", "lora_A", "lora_B"}
PARA_KEYS = {"B", "B_dense", "sparse_mask"}
PREFIXES = ("module.", "base_model.model.", "unet.", "transformer.")  # of models that were wrapped when they were saved
DECOMPOSITION = {"qr": "qr", "svd": "svd", "None": "relu"}
SDXL_ALPHA = 8.0  # the default of that code's layers, which its files do not record
EIGEN_RIDGE = 1e-6  # added to B B^T there


def import_reference(
    model,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    decomposition_method: str | None = None,
    trainable: bool = False,
) -> list[str]:
    """Load an adapter that DEFT's authors' code has saved, and make it the active one.

    Args:
        model: a module, or a pipeline, whose denoiser is meant.
        path: the folder, or the file with the tensors; the configuration is looked for beside it.
        adapter_name: without dots. `lorapara` becomes two, `<name>-para` and `<name>-lora`, both active.
        decomposition_method: "qr", "svd", "relu" or "none", where the files do not tell or tell wrongly; the SDXL runs'
            files do not: they are taken for "none" as their code has it, and for "qr" where nothing is injected (PaRa).
            It does not apply to LoRA (additive_update), nor to PaRa by another decomposition than qr.
        trainable: whether its parameters require grad.

    Returns the names of the adapted layers.

    Raises:
        FileNotFoundError: nothing there. ValueError: pickles that hold anything but tensors and plain values, unknown keys
        or methods, layers that are not in the model (the first are named), wrong shapes, values that are not finite. The
        model is then as it was.
    """
    part = next(iter(components(model).values()))
    read = read_reference(path, decomposition_method, outer_modules(part))
    fitted = {adapter_name + suffix: _fitted(path, adapter, part) for suffix, adapter in read.items()}
    for layer in adapted_layers(part).values():
        if taken := [name for name in fitted if name in layer.configs]:  # before the first of two is attached
            raise ValueError(f"the model has an adapter named {taken[0]!r} already: choose another name or delete it")
    attached = [attach_adapter(part, adapter, name, trainable) for name, adapter in fitted.items()]
    set_adapters(part, list(fitted))
    return list(dict.fromkeys(name for names in attached for name in names))


def read_reference(path: str | os.PathLike, decomposition_method: str | None = None, known=()) -> dict[str, Adapter]:
    """Read the authors' files with no model at hand: {suffix of the adapter's name: adapter}, the suffix being empty but
    for `lorapara`. Names of layers are those of the authors' model, without the prefix of a wrapped one where the name is
    none of those `known`."""
    if decomposition_method is not None and decomposition_method not in reference.DECOMPOSITIONS:
        expected = ", ".join(reference.DECOMPOSITIONS)
        raise ValueError(f"decomposition_method is {decomposition_method!r}, expected one of {expected}, or None")
    file = _find(Path(path))
    layers = _layers(file, _unpickled(file))
    sdxl = any(name.endswith(".lora_layer") for name in layers)
    configs = _layer_configs(file)
    layers, configs = _plainly_named(file, layers, known), _plainly_named(file, configs, known)
    absent = [name for name in layers if configs and name not in configs] + [name for name in configs if name not in layers]
    if absent:
        raise ValueError(f"{file}: {len(absent)} layers are in the tensors or in the configuration alone: {some(absent)}")
    if any(PARA_KEYS & tensors.keys() for tensors in layers.values()):
        return {"": _para(file, layers, configs, decomposition_method)}
    return _deft(file, layers, configs, decomposition_method, sdxl)


# Files ---------------------------------------------------------------------------------------------------------------


def is_reference(path: Path) -> bool:
    """Whether these look like the authors' files: no one else's adapters are pickles."""
    return path.suffix in (".bin", ".pt") if path.is_file() else any((path / name).is_file() for name in STATES)


def _find(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in STATES if (path / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{path} holds {' and '.join(f.name for f in found)}: name the file to read")
        path = found[0] if found else path / next(iter(STATES))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a file or a folder with one of {', '.join(STATES)}")
    return path


def _unpickled(file: Path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything; it comes back as what it is, a file that is no good
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's text advises to execute it
        reason = f"it asks for {named[1]}" if named else type(error).__name__
        raise ValueError(
            f"{file} is refused: it is damaged, or holds other things than tensors and plain values, which could run code "
            f"({reason})"
        ) from None


def _layers(file: Path, state) -> dict[str, dict[str, Tensor]]:
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file} holds a {type(state).__name__}, expected a dictionary of tensors")
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        name, _, role = str(key).rpartition(".")
        if role not in DEFT_KEYS | PARA_KEYS or not name:
            unknown.append(str(key))
        elif not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.dtype not in FLOATS:
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{file}: {key} is a {kind}, expected a dense tensor of a floating dtype")
        else:
            layers.setdefault(name, {})[role] = value.detach().float()
    if unknown:
        nmf = {key.rpartition(".")[2] for key in unknown} <= {"W", "H"}
        hint = " (those of nmf, which has no counterpart here)" if nmf else ""
        raise ValueError(f"{file}: {len(unknown)} of {len(state)} keys are unknown{hint}: {some(unknown)}")
    for name, tensors in layers.items():
        for role, t in tensors.items():
            if not torch.isfinite(t).all():
                raise ValueError(f"{file}: {role} of {name} has values that are not finite")
    return layers


def _plainly_named(file: Path, layers: dict[str, dict], known) -> dict[str, dict]:
    """The same by the layers' names in the model itself."""
    named = {}
    for name, value in layers.items():
        plain = name.removesuffix(".lora_layer")
        for prefix in PREFIXES:
            plain = plain if plain in known else plain.removeprefix(prefix)
        if plain in named:
            raise ValueError(f"{file}: {plain} is there twice, the second time as {name}")
        named[plain] = value
    return named


def _layer_configs(file: Path) -> dict[str, dict]:
    """The configuration of each layer, from the JSON beside the tensors or, without one, from the pickle; empty where there
    is none."""
    stem = STATES.get(file.name)
    found = [file.parent / f"{stem}{end}" for end in (".json", ".bin") if stem and (file.parent / f"{stem}{end}").is_file()]
    if not found:
        return {}
    where = found[0]
    whole = read_json(where.read_bytes(), where) if where.suffix == ".json" else _unpickled(where)
    configs = whole.get("layer_configs") if isinstance(whole, dict) else None
    if not isinstance(configs, dict) or not configs or not all(isinstance(c, dict) for c in configs.values()):
        raise ValueError(f"{where} has no layer_configs")
    for name, config in configs.items():
        for key, value in config.items():
            if not (value is None or isinstance(value, (str, int, float))):
                raise ValueError(f"{where}: {key} of {name} is a {type(value).__name__}, expected a plain value")
    return {str(name): config for name, config in configs.items()}


def _one(file: Path, configs: dict[str, dict], key: str, default=None):
    """An option's value, which all layers must share."""
    values = {name: config.get(key, default) for name, config in configs.items()}
    first = next(iter(values.values()), default)
    other = [name for name, value in values.items() if value != first or type(value) is not type(first)]
    if other:
        raise ValueError(f"{file}: layers differ in {key}, {first!r} and {values[other[0]]!r}, which is of {some(other)}")
    return first


def _switch(file: Path, configs: dict[str, dict], key: str) -> bool:
    value = _one(file, configs, key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {key} is {value!r}, expected true or false")
    return value


def _option(file: Path, key: str, value, default: float) -> float:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{file}: {key} is {value!r}, expected a finite number")
    return float(value)


def _rank(file: Path, tensors: dict[str, dict[str, Tensor]], role: str, inner: str | None = None) -> int:
    """The rank that all layers have: the width of `role` (m, r), and the height of `inner` (r, n)."""
    for name, roles in tensors.items():
        for which in filter(None, (role, inner)):
            if which not in roles or roles[which].dim() != 2 or not roles[which].numel():
                shape = tuple(roles[which].shape) if which in roles else "missing"
                raise ValueError(f"{file}: {which} of {name} is {shape}, expected a matrix")
        if inner and roles[inner].shape[0] != roles[role].shape[1]:
            seen, (m, r) = tuple(roles[inner].shape), roles[role].shape
            raise ValueError(f"{file}: {inner} of {name} is {seen}, expected ({r}, n), as {role} is ({m}, {r})")
    ranks = {roles[role].shape[1] for roles in tensors.values()}
    if len(ranks) > 1:
        raise ValueError(f"{file}: layers differ in rank, {sorted(ranks)}: one adapter has one")
    return ranks.pop()


# What they say -------------------------------------------------------------------------------------------------------


def _deft(file: Path, layers, configs, chosen: str | None, sdxl: bool) -> dict[str, Adapter]:
    gated = _switch(file, configs, "use_gating")
    if configs:
        method = _one(file, configs, "injection_method")
        dropout = _option(file, "lora_dropout", _one(file, configs, "lora_dropout"), 0.0)
        init_scale = _option(file, "init_scale", _one(file, configs, "init_scale"), 1.0)
        alpha = _option(file, "lora_alpha", _one(file, configs, "lora_alpha"), SDXL_ALPHA)
        decomposition = chosen
    elif sdxl or chosen is not None:
        method = "additive_update" if all("lora_A" in t for t in layers.values()) else "residual_projection"
        dropout, init_scale, alpha = 0.0, 1.0, SDXL_ALPHA
        gated = all("gate" in t for t in layers.values())
        injected = any("R_new" in t for t in layers.values())
        decomposition = chosen or ("none" if injected else "qr")
    else:
        missing = file.parent / "knowledge_injection_config.json"
        raise FileNotFoundError(f"{missing} (or .bin) is missing: give decomposition_method to do without")
    if method == "additive_update" and chosen is not None:
        raise ValueError(f"{file}: decomposition_method does not apply to additive_update, which is LoRA: leave it out")
    if method in ("additive_update", "lorapara"):
        lora = _additive(file, layers, alpha, dropout, gated)
        if method == "additive_update":
            return {"": lora}
        gated = False
    elif method not in ("project_replace", "residual_projection"):
        raise ValueError(
            f"{file}: unknown injection_method {method!r}: expected project_replace, residual_projection, additive_update "
            "or lorapara"
        )
    if decomposition is None:
        decomposition = _decomposition(file, _one(file, configs, "decomposition_method"))
    para = method == "lorapara" or (sdxl and not any("R_new" in t for t in layers.values()))
    r = _rank(file, layers, "P", None if para else "R_new")
    fixed = bool(configs) and not _switch(file, configs, "compute_svd_each_forward")
    bases, decomposition = _bases(file, layers, decomposition, fixed)
    tensors = {}
    for name, roles in layers.items():
        tensors[name] = {"P": bases[name]}
        if not para:
            tensors[name]["R"] = roles["R_new"]
            tensors[name] |= {"gate": _gate(file, name, roles)} if gated else {}
    config = _config(file, r=r, decomposition_method=decomposition, para=para, gate=gated and not para,
                     dropout=dropout, init_scale=init_scale, init_weights=False)  # fmt: skip
    deft = Adapter(config, tensors)
    return {"-para": deft, "-lora": lora} if method == "lorapara" else {"": deft}


def _gate(file: Path, name: str, roles: dict[str, Tensor]) -> Tensor:
    if "gate" not in roles or roles["gate"].numel() != 1:
        raise ValueError(f"{file}: the gate of {name} is missing or no single number")
    return roles["gate"].reshape(())


def _config(file: Path, kind=DeftConfig, **options) -> DeftConfig:
    try:
        return kind(**options)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {error}") from None


def _decomposition(file: Path, method) -> str:
    if not isinstance(method, str) or method not in DECOMPOSITION:
        raise ValueError(
            f"{file}: unknown decomposition_method {method!r}: expected 'qr', 'svd' or 'None'; where you know it, give "
            "decomposition_method"
        )
    return DECOMPOSITION[method]


def _bases(file: Path, layers, decomposition: str, fixed: bool) -> tuple[dict[str, Tensor], str]:
    """P of every layer, and how B and K come from it. A layer that takes its basis once and for all (`fixed`,
    compute_svd_each_forward off) samples with Q_P_cached, whatever P is: where they differ, P is that basis, used as it
    is."""
    P = {name: roles["P"] for name, roles in layers.items()}
    cached = {name: roles["Q_P_cached"] for name, roles in layers.items() if "Q_P_cached" in roles}
    for name, Q in cached.items():
        if Q.shape != P[name].shape:
            raise ValueError(f"{file}: Q_P_cached of {name} is {tuple(Q.shape)}, expected {tuple(P[name].shape)}")
    if not fixed or decomposition not in ("qr", "svd") or not cached:
        return P, decomposition
    own = {name: reference.decompose(p, decomposition)[0] for name, p in P.items()}
    # rounding of a basis that was cached in half precision, and far below a column that is turned or another one's
    if all(torch.allclose(own[name], Q, rtol=0, atol=2**-7) for name, Q in cached.items()):
        return P, decomposition
    warn(
        f"{file}: the bases in Q_P_cached, which these layers sample with, are not those of their P: P is replaced by them, "
        "and decomposition_method by 'none'"
    )
    return own | cached, "none"


def _additive(file: Path, layers, alpha: float, dropout: float, gated: bool) -> Adapter:
    r = _rank(file, layers, "lora_A", "lora_B")
    tensors = {}
    for name, roles in layers.items():
        scale = torch.sigmoid(_gate(file, name, roles)) if gated else 1.0
        tensors[name] = {"P": roles["lora_A"] * scale, "R": roles["lora_B"]}
    return Adapter(_config(file, LoraConfig, r=r, alpha=alpha, dropout=dropout), tensors)


def _para(file: Path, layers, configs, chosen: str | None) -> Adapter:
    """PaRa: W' = W - M W. Without a configuration, M is Q Q^T."""
    P, methods = {}, {}
    for name, roles in layers.items():
        config = configs.get(name, {})
        if "B_dense" in roles:
            if "sparse_mask" not in roles or roles["sparse_mask"].shape != roles["B_dense"].shape:
                raise ValueError(f"{file}: sparse_mask of {name} is missing or not of the shape of B_dense")
            roles = {"B": roles["B_dense"] * roles["sparse_mask"]}
        if "B" not in roles or roles["B"].dim() != 2 or not roles["B"].numel():
            raise ValueError(f"{file}: B of {name} is missing or no matrix")
        P[name] = roles["B"]
        methods[name] = "tsvd" if config.get("truncated_svd") is True else config.get("decomposition_method", "qr")
    decomposition = chosen or "qr"
    if any(method != "qr" for method in methods.values()):
        if chosen is not None:
            other = next(f"{method!r} ({name})" for name, method in methods.items() if method != "qr")
            raise ValueError(f"{file}: decomposition_method does not apply: this is PaRa by {other}: leave it out")
        P = {name: _para_basis(file, name, B, methods[name], configs[name]) for name, B in P.items()}
        decomposition = "none"
    r = _rank(file, {name: {"P": p} for name, p in P.items()}, "P")
    config = _config(file, r=r, decomposition_method=decomposition, para=True, init_weights=False)
    return Adapter(config, {name: {"P": p} for name, p in P.items()})


def _para_basis(file: Path, name: str, B: Tensor, method, config: dict) -> Tensor:
    """P (m, r) with M = P P^T; columns that `adaptive_rank` cuts off are zero."""
    if method == "qr":
        return reference.decompose(B, "qr")[0]
    if method not in ("tsvd", "lrmf", "eigen"):
        raise ValueError(
            f"{file}: decomposition_method of {name} is {method!r}, expected qr, tsvd, lrmf or eigen (nmf has no "
            "counterpart here)"
        )
    U, S, _ = torch.linalg.svd(B, full_matrices=False)
    variance, beyond = S**2, 0.0
    if method == "eigen":  # of an m x m matrix, whose other eigenvalues are the ridge
        S = variance = variance + EIGEN_RIDGE
        beyond = EIGEN_RIDGE * (B.shape[0] - len(S))
    keep = len(S)
    if config.get("adaptive_rank") is True:
        threshold = _option(file, "variance_threshold", config.get("variance_threshold"), 0.95)
        share = torch.cumsum(variance, 0) / (variance.sum() + beyond)
        keep = int((share < threshold).sum()) + 1
    S = torch.where(torch.arange(len(S)) < keep, S, torch.zeros(()))
    return U * S.sqrt()


# Into a model --------------------------------------------------------------------------------------------------------


def _fitted(path, adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter under the model's own names, checked against it."""
    file = Path(path)
    modules = outer_modules(model)
    here = {name: module for name, module in modules.items() if adaptable(module)}
    if any(name not in here for name in adapter.tensors):
        adapter = _split(adapter, here) or adapter
    absent = [name for name in adapter.tensors if name not in here]
    if absent:
        kind = type(model).__name__
        raise ValueError(f"{file}: {len(absent)} of {len(adapter.tensors)} layers are not in {kind}: {some(absent)}")
    ranks = dict.fromkeys(adapter.tensors, adapter.config.r)
    alpha = adapter.config.r if adapter.config.alpha is None else adapter.config.alpha
    return checked(file, adapter.config, adapter.tensors, ranks, dict.fromkeys(ranks, alpha), modules, None, any_base=True)


def _split(adapter: Adapter, here: dict[str, nn.Module]) -> Adapter | None:
    """OmniGen's adapters in diffusers' OmniGen, where `qkv_proj` is three layers: as a LoRA, since a projector of all three
    outputs is none of each, but B A of all three has their B in its rows. None where the model is no such one."""
    parts = {name: _omnigen(name) for name in adapter.tensors}
    if not all(parts.values()) or not all(part in here for names in parts.values() for part in names):
        return None
    tensors = {}
    for name, roles in adapter.tensors.items():
        layers = [wrap(part, here[part]) for part in parts[name]]
        weights = [layer.pristine_weight() for layer in layers]
        if any(w is None for w in weights):
            raise ValueError(f"{parts[name][0]}: its dense weight is needed to take {name} apart; load an unquantised model")
        W = torch.cat([w.detach().cpu().float() for w in weights])
        if W.shape[0] != roles["P"].shape[0] or ("R" in roles and roles["R"].shape != (roles["P"].shape[1], W.shape[1])):
            shapes = {role: tuple(t.shape) for role, t in roles.items()}
            raise ValueError(f"{name}: {shapes} do not fit {', '.join(parts[name])}, together {tuple(W.shape)}")
        if isinstance(adapter.config, LoraConfig):
            B, A = roles["P"], roles["R"] * adapter.config.scale(adapter.config.r)
        else:
            scale = torch.sigmoid(roles["gate"]) if "gate" in roles else 1.0
            B, A = reference.factors(W, roles["P"], roles.get("R"), adapter.config.method, scale)
        for part, rows in zip(parts[name], B.split([len(w) for w in weights])):
            tensors[part] = {"P": rows.contiguous(), "R": A}
    return Adapter(LoraConfig(r=adapter.config.r), tensors)


def _omnigen(name: str) -> tuple[str, ...]:
    """The layers in diffusers' OmniGen that one of the authors' OmniGen is."""
    bare = name.removeprefix("llm.")
    block, _, last = bare.rpartition(".")
    if last == "qkv_proj":
        return tuple(f"{block}.{part}" for part in ("to_q", "to_k", "to_v"))
    return (f"{block}.to_out.0",) if last == "o_proj" else (bare,)
