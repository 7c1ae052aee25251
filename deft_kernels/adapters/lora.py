"""LoRA files, out and in: diffusers', Kohya's (which ComfyUI reads too) and PEFT's.

Every adapter here is W' = W + B A, which is a LoRA with lora_B = B, lora_A = A and alpha = r: DEFT and PaRa lower to it
exactly, for the base weights W that A = s R - K^T W was taken from.
"""

import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DeftConfig, LoraConfig
from ..nn.layers import DeftLayer
from .files import (
    CONFIG_NAME,
    DEFT_ROLES,
    LORA_ROLES,
    LORA_WEIGHTS,
    PREFIX,
    WEIGHTS_NAME,
    Adapter,
    attach_adapter,
    base_fingerprint,
    checked,
    commonest,
    from_peft,
    lora_shaped,
    peft_ranks,
    peft_type,
    read_adapter,
    read_json,
    read_safetensors,
    replace_file,
    some,
    suffix,
    to_peft,
    write_adapter,
)
from .hub import locate
from .inject import adaptable, adapted_layers, check_combination, named_weights, outer_modules, require_layers, wrap
from .kohya import is_fused, is_sdxl, kohya_names, kohya_prefix
from .merge import check_finite, factors_of, spread
from .pipeline import as_model, components, together

FORMATS = ("diffusers", "kohya", "peft")
TEXT = "text_encoder"
NOTHING = 1e-7  # of ||B||_F ||A||_F: below it, B A is what float32 rounding leaves of adapters that cancel each other
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations in a file


# Out -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_lora(
    model,
    file: str | os.PathLike,
    adapter_name: str | list[str] | None = "default",
    format: str = "diffusers",
    *,
    weights: float | list[float] | None = None,
    combine: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    prefix: str | None = None,
) -> dict[str, float]:
    """Write adapters as one LoRA, exactly: gate, alpha and strength are part of the factors, and alpha is the rank
    (in a Kohya file for a UNet or a text encoder whose layers differ in rank the commonest of them: alpha / r is then in B).

    The factors are taken from the pristine weights, merged or not. With DEFT and PaRa they depend on them: the file carries
    the fingerprint of its base.

    Args:
        model: a module, or a diffusers pipeline, of which all adapted parts go into the file.
        file: for "diffusers" and "kohya" a `.safetensors` file, or a folder for `pytorch_lora_weights.safetensors`; for
            "peft" a folder (of a pipeline, with a folder for each adapted part in it).
        adapter_name: one adapter, or several for what they are together, whose rank is the sum of theirs; None: the active
            ones.
        format: "diffusers", for `pipe.load_lora_weights`; "kohya", for that, ComfyUI and Kohya's scripts (Stable Diffusion 1
            and 2, SDXL, SD3 (which diffusers reads in its own format alone), FLUX.1); "peft".
        weights: strengths, any real numbers; None: 1 (or the active strengths, where `adapter_name` is None).
        combine: how several adapters act together, as `set_adapters` explains; None: "sum", or how the active ones do where
            `adapter_name` is None.
        rank: truncate every layer's update to this rank, as its singular value decomposition does best, from the factors
            alone. Layers of a lower rank stay as they are.
        dtype: of the tensors in the file: float32, or float16 or bfloat16 for half the size.
        prefix: the part's name in a pipeline where `model` is a module; None: `unet`, `transformer` or `text_encoder` by
            its class.

    Returns the relative error of every layer's update, ||B A - exact||_F / ||exact||_F: 0 unless `rank` or `dtype` cost
    something, and where adapters cancel each other. Errors above 0 are in the file's metadata too.

    Raises:
        ValueError: unknown adapter, format, combination, dtype or rank, adapters that cannot act jointly, samples routed to
        adapters of their own, values that are not finite, a layer that the format has no name for, a `file` of another kind
        than the format's. TypeError: a layer instead of a model. RuntimeError: a merged layer whose pristine weight cannot
        be read. Nothing is then written.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype {dtype}: expected float32, float16 or bfloat16")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}, expected a rank of at least 1, or None for the exact update")
    file = Path(file)
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"{file}: LoRA files are written as .safetensors")
    if format == "peft" and file.suffix == ".safetensors":
        raise ValueError(f"{file}: format 'peft' is a folder of two files: give a folder's name")
    if file.suffix != ".safetensors" and file.is_file():
        raise ValueError(f"{file} is a file: give a folder, or the name of a .safetensors file")
    parts = components(model)
    if prefix is not None and "" not in parts:
        raise ValueError(f"prefix={prefix!r} is for a module alone: the parts of a pipeline have names, {', '.join(parts)}")
    exported, made_of = {}, {}
    for key, layers, chosen, how in _chosen(parts, adapter_name, weights, combine):
        component = key or prefix or ("" if format == "peft" else _component(parts[key]))
        layers = {name: layers[name] for name in chosen}
        factors = lora_factors(layers, chosen, how)
        ranks = {name: min(A.shape[0], rank or A.shape[0]) for name, (_, A) in factors.items()}
        # diffusers loses the alphas of a Kohya file's attention layers that are not the commonest: there, one for all
        alphas = dict.fromkeys(ranks, commonest(ranks)) if format == "kohya" and not is_fused(parts[key]) else ranks
        pairs = {name: _stored(name, B, A, rank, dtype, alphas[name]) for name, (B, A) in factors.items()}
        exported[component] = _Export(parts[key], layers, pairs)
        for name, strengths in chosen.items():
            told = {n: _described(layers[name].configs[n], w, how) for n, w in strengths.items()}
            made_of |= {_dotted(component, n): words for n, words in told.items()}
    errors = {_dotted(c, n): pair.error for c, e in exported.items() for n, pair in e.pairs.items()}
    told = {name: error for name, error in errors.items() if error}
    metadata = {"format": "pt", "deft_kernels": json.dumps({"made_of": made_of, "relative_error": told})}
    if format == "peft":
        for component, e in exported.items():
            folder = file / component if component in parts else file
            state = {PREFIX + key: t for key, t in _peft_state(e).items()}
            write_adapter(folder, e.config(), state, base_fingerprint(e.layers), metadata)
        return errors
    # one fingerprint for the file, of all parts
    sketches = {c: json.loads(base_fingerprint(e.layers) or "{}") for c, e in exported.items()}
    if any(sketches.values()):
        metadata["base_fingerprint"] = json.dumps({_dotted(c, n): v for c, of in sketches.items() for n, v in of.items()})
    if format == "kohya":
        state, more = _kohya_state(exported, parts)
    else:
        state = {_dotted(c, key): t for c, e in exported.items() for key, t in _peft_state(e).items()}
        configs = {_dotted(c, key): v for c, e in exported.items() for key, v in e.config().items()}
        more = {METADATA_KEY: json.dumps(configs, indent=2, sort_keys=True)}
    from safetensors.torch import save

    file = file if file.suffix == ".safetensors" else file / LORA_WEIGHTS
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(state, metadata | more))
    return errors


def _described(config: DeftConfig, weight: float, how: str) -> str:
    together = "" if how == "sum" else f", {how}"
    return f"{'PaRa ' if config.para else ''}{config.method}, rank {config.r}, strength {weight:g}{together}"


class _Pair(NamedTuple):
    """The factors of one layer as they are stored, their update being alpha / r B A, and what that cost."""

    B: Tensor  # (m, r)
    A: Tensor  # (r, n)
    alpha: int
    error: float


class _Export(NamedTuple):
    """What goes into a file of one part of a pipeline."""

    model: nn.Module
    layers: dict[str, DeftLayer]
    pairs: dict[str, _Pair]

    def config(self) -> dict:
        ranks = {name: pair.A.shape[0] for name, pair in self.pairs.items()}
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None) or None
        return to_peft(LoraConfig(r=commonest(ranks)), ranks, base)


def _chosen(parts: dict[str, nn.Module], adapter_name, weights, combine: str | None):
    """(part, its adapted layers, {layer: {adapter: strength}}, how they act together) of every part that has one of the
    adapters."""
    layers = {key: adapted_layers(part) for key, part in parts.items()}
    held = [key for key in layers if layers[key]]
    if not held:
        require_layers(next(iter(parts.values())))  # says what to do
    if any("" in layers[key] for key in held):
        raise TypeError("this is the adapted layer itself: a LoRA file names layers, so give the model that holds it")
    if adapter_name is None:
        if weights is not None:
            raise ValueError("weights belong to adapters that are named; the active ones have strengths of their own")
        if any(layer.routes is not None for key in held for layer in layers[key].values()):
            raise ValueError("samples are routed to adapters of their own: name the adapters that are to be exported")
        found = [{name: dict(layer.strengths) for name, layer in layers[key].items() if layer.strengths} for key in held]
    else:
        everywhere = named_weights(adapter_name, weights)
        known = {name for key in held for layer in layers[key].values() for name in layer.configs}
        for name in everywhere.keys() - known:
            require_layers(parts[held[0]], [name])  # tells the names that there are
        found = [spread(layers[key], everywhere) for key in held]
    if not any(found):
        raise ValueError("nothing to export: no adapter is active and none was named")
    chosen = {key: of_part for key, of_part in zip(held, found) if of_part}
    hows = dict.fromkeys(chosen, combine or "sum")
    if combine is None and adapter_name is None:
        hows = {key: layers[key][next(iter(of_part))].combination for key, of_part in chosen.items()}
    for key, of_part in chosen.items():
        for name, strengths in of_part.items():
            check_combination({_dotted(key, name): layers[key][name]}, strengths, hows[key])
    return [(key, layers[key], of_part, hows[key]) for key, of_part in chosen.items()]


@torch.no_grad()
def lora_factors(
    layers: dict[str, DeftLayer], chosen: dict[str, dict[str, float]], combine: str = "sum"
) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) with W' = W + B A, B (m, r) and A (r, n), of `chosen`, {layer: {adapter: strength}}: adapters side by side
    along r, every A from the pristine weight; float32 (float64 for a float64 weight), on the layers' devices."""
    check_finite(layers, chosen)
    B, K, R = factors_of(layers, chosen, combine)
    W = [layer.pristine_weight() for layer in layers.values()]
    A = list(R)
    dense = [i for i, (w, k) in enumerate(zip(W, K)) if w is not None and k is not None]
    if dense:
        ones = torch.ones(len(dense), device=W[dense[0]].device, dtype=B[dense[0]].dtype)
        projected = torch.ops.deft_kernels.project(*([side[i] for i in dense] for side in (K, W, R)), ones, ones)
        for i, a in zip(dense, projected):
            A[i] = a
    for i, (name, layer) in enumerate(layers.items()):  # those that are not dense one by one: W takes memory
        if W[i] is None and K[i] is not None:
            weight = layer.read_weight()
            if weight is None and layer.is_merged:
                raise RuntimeError(f"{name}: its pristine weight cannot be read while adapters are merged: unmerge first")
            removed = layer._removed_by_output(K[i]) if weight is None else K[i].mT @ weight
            A[i] = -removed if R[i] is None else R[i] - removed
    return {name: (b, a) for name, b, a in zip(layers, B, A)}


def _stored(name: str, B: Tensor, A: Tensor, rank: int | None, dtype: torch.dtype, alpha: int) -> _Pair:
    """The factors as a file will hold them, on the CPU, and the relative error of their product."""
    r = min(A.shape[0], rank or A.shape[0])
    B = B if alpha == r else B * (r / alpha)
    lost: list[tuple[Tensor, Tensor]] = []  # terms whose sum is exact - stored; none of them cancels another
    kept_B, kept_A = B, A
    if rank is not None and rank < A.shape[0]:
        (kept_B, kept_A), tail = truncate(B, A, rank)
        lost.append(tail)
    out_B, out_A = kept_B.to(dtype), kept_A.to(dtype)
    if not (out_B.isfinite().all() and out_A.isfinite().all()):
        raise ValueError(f"{name}: its factors are too large for {dtype}: export in float32 or bfloat16")
    if dtype != kept_B.dtype:
        lost += [(kept_B - out_B.to(B.dtype), kept_A), (out_B.to(B.dtype), kept_A - out_A.to(B.dtype))]
    error, size = _norm(lost), _norm([(B, A)])
    if size <= NOTHING * float(B.double().norm() * A.double().norm()):
        error = 0.0
    return _Pair(out_B.cpu(), out_A.cpu(), alpha, error / size if error else 0.0)


def truncate(B: Tensor, A: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """B A (m x n) as its best approximation of a rank, and what is left: two pairs of factors that add up to B A.

    By the factors alone: B = Q_B T_B, A^T = Q_A T_A, and T_B T_A^T = U S V^T is r x r (Eckart and Young 1936). The rest has
    the Frobenius norm of the singular values that were cut off.
    """
    Q_B, T_B = torch.linalg.qr(B.double())
    Q_A, T_A = torch.linalg.qr(A.mT.double())
    U, S, Vh = torch.linalg.svd(T_B @ T_A.mT, full_matrices=False)
    left, right = (Q_B @ U * S.sqrt()).to(B.dtype), ((Q_A @ Vh.mT * S.sqrt()).mT).to(A.dtype)
    return (left[:, :rank], right[:rank]), (left[:, rank:], right[rank:])


def _norm(terms: list[tuple[Tensor, Tensor]]) -> float:
    """||sum_i B_i A_i||_F, from r x r Gram matrices in float64."""
    if not terms:
        return 0.0
    B, A = torch.cat([b for b, _ in terms], 1).double(), torch.cat([a for _, a in terms], 0).double()
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())


def _dotted(component: str, name: str) -> str:
    return f"{component}.{name}" if component else name


def _component(model: nn.Module) -> str:
    """The name that diffusers' pipelines have for a module of this class."""
    kind = type(model).__name__
    for mark, component in (("UNet", "unet"), ("Transformer", "transformer"), ("CLIPText", TEXT), ("T5", TEXT)):
        if mark in kind:
            return component
    raise ValueError(f"what a pipeline calls a {kind} is not known: give prefix='unet', 'transformer' or 'text_encoder'")


def _peft_state(e: _Export) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in e.pairs.items():
        for role, t in (("R", pair.A), ("P", pair.B)):
            tensors[f"{name}.{suffix(role, lora=True)}"] = lora_shaped(e.layers[name], role, t)
    return tensors


def _kohya_state(exported: dict[str, _Export], parts: dict[str, nn.Module]):
    """Tensors and metadata in Kohya's layout."""
    state: dict[str, Tensor] = {}
    for component, e in exported.items():
        stem = kohya_prefix(component, e.model, _encoders(parts))
        table = kohya_names(e.model, {name for name, m in outer_modules(e.model).items() if adaptable(m)})
        if table is None:
            kind = type(e.model).__name__
            raise ValueError(f"Kohya's names for a {kind} are not known here: export with format='diffusers' or 'peft'")
        nameless = e.pairs.keys() - {name for names in table.values() for name in names}
        if nameless:
            raise ValueError(
                f"{len(nameless)} layers have no name in Kohya's format that other tools load: {some(sorted(nameless))}; "
                "format='diffusers' has one for every layer"
            )
        pairs = e.pairs | _zeros_for_diffusers(e)
        for key, names in table.items():
            if any(name in pairs for name in names):
                shapes = [wrap(name, e.model.get_submodule(name)).shape for name in names]
                down, up = _side_by_side([pairs.get(name) for name in names], shapes)
                if len(names) == 1:
                    up, down = (lora_shaped(e.layers.get(names[0]), role, t) for role, t in (("P", up), ("R", down)))
                key = f"{stem}_{key.replace('.', '_')}"
                state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = down.contiguous(), up.contiguous()
                alpha = pairs[names[0]].alpha if len(names) == 1 else down.shape[0]
                state[f"{key}.alpha"] = torch.tensor(float(alpha))
    ranks = {t.shape[0] for key, t in state.items() if key.endswith("lora_down.weight")}
    alphas = {float(t) for key, t in state.items() if key.endswith(".alpha")}
    dim, alpha = (f"{v.pop():g}" if len(v) == 1 else "Dynamic" for v in (ranks, alphas))  # sd-scripts' word for it
    return state, {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha}


def _zeros_for_diffusers(e: _Export) -> dict[str, _Pair]:
    """diffusers tells the keys of a CLIP text encoder by an `out_proj` among them, and refuses a file without one: an update
    of zero for the first of them, where none is adapted."""
    if not type(e.model).__name__.startswith("CLIPText") or any(name.endswith("out_proj") for name in e.pairs):
        return {}
    name, module = next((n, m) for n, m in outer_modules(e.model).items() if n.endswith("out_proj"))
    one, (m, n) = next(iter(e.pairs.values())), wrap(name, module).shape
    return {name: _Pair(one.B.new_zeros(m, 1), one.A.new_zeros(1, n), one.alpha, 0.0)}


def _side_by_side(pairs: list[_Pair | None], shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(down, up) of one layer that several stand side by side in: up is block-diagonal. The blocks are of one rank, as
    readers expect it that take them apart again."""
    if len(pairs) == 1:
        return pairs[0].A, pairs[0].B
    r = max(pair.A.shape[0] for pair in pairs if pair is not None)
    one = next(pair for pair in pairs if pair is not None)
    down, up = one.A.new_zeros(r * len(pairs), shapes[0][1]), one.B.new_zeros(sum(m for m, _ in shapes), r * len(pairs))
    row = 0
    for i, (pair, (m, _)) in enumerate(zip(pairs, shapes)):
        if pair is not None:
            k = pair.A.shape[0]
            down[i * r : i * r + k], up[row : row + m, i * r : i * r + k] = pair.A, pair.B
        row += m
    return down, up


def _encoders(parts: dict[str, nn.Module]) -> int:
    """How many text encoders Kohya would count: SDXL's are numbered even where one of them is missing."""
    count = sum(name.startswith("text_encoder") for name in parts)
    return max(count, 2) if any(is_sdxl(part) for part in parts.values()) else count or 1


# In ------------------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"(.+)\.(?:lora_(A|down|B|up)\.weight|(alpha))")
_ENDS = (*LORA_ROLES, *DEFT_ROLES)
_ROLE = {"A": "R", "down": "R", "B": "P", "up": "P", "alpha": "alpha"}
# of a pair as other tools name it: what comes before, which of the two it is; or what has an alpha
_FOREIGN = re.compile(r"(.+?)[._]?lora(?:_linear_layer)?(\d*)[._](A|B|down|up)(?:\.default)?\.weight|(.+)\.alpha")
# what a key of another kind of adapter ends in
_OTHERS = {
    "DoRA": r"lora_magnitude_vector(\.\w+)?(\.weight)?|dora_scale",
    "LoHa": r"hada_\w+(\.weight)?",
    "LoKr": r"lokr_\w+(\.weight)?",
    "OFT or BOFT": r"oft_\w+(\.weight)?|boft_\w+(\.weight)?",
    "GLoRA": r"[ab][12]\.weight",
    "IA3": r"ia3_l(\.weight)?|on_input",
    "a bias": r"bias|diff_b|b_norm",
    "a full difference": r"diff|w_norm",
    "Tucker's form": r"lora_mid\.weight",
}


def import_lora(
    model,
    file: str | os.PathLike,
    adapter_name: str = "default",
    *,
    weight_name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
) -> list[str]:
    """Load a LoRA file as adapters: W' = W + (alpha / r) B A, as diffusers and PEFT compute it.

    Args:
        model: a module, or a diffusers pipeline. Names that are unknown here go through the pipeline's own converter.
        file: a `.safetensors` file in diffusers', Kohya's or PEFT's naming, a folder with one, or a hub id (owner/name);
            ranks and alphas may differ from layer to layer.
        adapter_name: without dots.
        weight_name: the file to take, where there are several.
        trainable: whether its parameters require grad.
        activate: make it the active adapter.

    Returns the names of the adapted layers, which begin with the part's name where `model` is a pipeline.

    Raises:
        FileNotFoundError: nothing there, or a hub id that cannot be reached (the message tells what to download and where to
        put it). ValueError: a file that cannot be read, keys that fit no layer or are no plain LoRA (DoRA, LoHa, LoKr,
        biases: listed), wrong shapes, values that are not finite. The model is then as it was.
        Warns where the file's fingerprint is another base's.
    """
    found, model = read_lora(model, locate(file, weight_name=weight_name)), as_model(model)
    return attach_adapter(model, together(model, found), adapter_name, trainable, activate)


def read_lora(model, file: str | os.PathLike) -> dict[str, Adapter]:
    """Read a LoRA file and check all about it: {part of the pipeline: adapter}, the part "" for a module. The model is not
    touched."""
    parts, file = components(model), Path(file)
    if file.is_dir():
        if (file / CONFIG_NAME).is_file() and (file / LORA_WEIGHTS).is_file():
            raise ValueError(f"{file} holds two adapters, {WEIGHTS_NAME} and {LORA_WEIGHTS}: name the file to load")
        if (file / CONFIG_NAME).is_file():
            return _of_one_part(parts, file)
        folders = {key: key or _guess(part) for key, part in parts.items()}
        own = {key: file / name for key, name in folders.items() if name and (file / name / CONFIG_NAME).is_file()}
        if own:
            return {key: _lora_only(read_adapter(parts[key], folder), folder) for key, folder in own.items()}
    file = lora_file(file)
    if peft_type(file) is not None:
        return _of_one_part(parts, file)

    state, metadata = read_safetensors(file)
    modules = {key: outer_modules(part) for key, part in parts.items()}
    found, unknown = _sorted(file, state, parts, modules)
    if unknown and not any(_kind(key) for key in unknown):
        converted, lost = _by_diffusers(model, file, state, unknown)
        known = {key: t for key, t in state.items() if key not in unknown}
        found, strange = _sorted(file, known | converted, parts, modules)
        unknown = unknown if strange else lost
    if unknown:
        kinds = sorted({kind for kind in map(_kind, unknown) if kind})
        why = f"belong to {', '.join(kinds)}, which these layers do not have" if kinds else _no_layer(model, parts)
        raise ValueError(f"{file}: {len(unknown)} of {len(state)} keys {why}: {some(unknown)}")
    configs = read_json(metadata[METADATA_KEY], f"{file}: {METADATA_KEY}") if METADATA_KEY in metadata else {}
    sketch = read_json(metadata["base_fingerprint"], f"{file}: base_fingerprint") if "base_fingerprint" in metadata else {}
    bare = "r" in configs  # as a model's own `save_lora_adapter` writes it, for what is the denoiser in a pipeline
    loaded, used = {}, not configs
    for key, layers in found.items():
        if layers:
            raw, of_part = (_without(key or _guess(parts[key]), d) for d in (configs, sketch))
            raw = (configs if key == next(iter(parts)) else {}) if bare else raw
            used |= bool(raw)
            loaded[key] = _adapter(file, raw, layers, modules[key], json.dumps(of_part) if of_part else None)
    if not loaded:
        raise ValueError(f"{file}: holds no LoRA tensors")
    if not used:  # ranks and alphas would be guessed
        of = ", ".join(sorted({key.partition(".")[0] for key in configs}))
        raise ValueError(f"{file}: its {METADATA_KEY} describes {some([of])}, expected {', '.join(map(repr, loaded))}")
    return loaded


def _of_one_part(parts: dict[str, nn.Module], path: Path) -> dict[str, Adapter]:
    """PEFT's layout names no part: it is the first that has all of its layers."""
    state, _ = read_safetensors(path / WEIGHTS_NAME if path.is_dir() else path, tensors=False)
    keys = [key.removeprefix(PREFIX) for key in state]
    names = {key: outer_modules(part) for key, part in parts.items()}
    fits = [k for k, known in names.items() if all(any(key.removesuffix(f".{e}") in known for e in _ENDS) for key in keys)]
    key = next(iter(fits or parts))
    return {key: _lora_only(read_adapter(parts[key], path), path)}


def _lora_only(adapter: Adapter, file: Path) -> Adapter:
    if not isinstance(adapter.config, LoraConfig):
        raise ValueError(f"{file} is a DEFT adapter, no LoRA: load it by deft_kernels.load_adapter")
    return adapter


def lora_file(folder: Path) -> Path:
    """diffusers' LoRA file in a folder, or the only one there; a file itself."""
    if not folder.is_dir():
        return folder
    files = sorted(folder.glob("*.safetensors"))
    if folder / LORA_WEIGHTS in files or not files:
        return folder / LORA_WEIGHTS  # which says that it is missing, when it is read
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} safetensors files, and none is {LORA_WEIGHTS}: name the file to load")
    return files[0]


def _guess(model: nn.Module) -> str:
    try:
        return _component(model)
    except ValueError:
        return ""


def _without(component: str, values: dict) -> dict:
    """The entries of one part of a pipeline, its name taken off."""
    dot = f"{component}." if component else ""
    return {key.removeprefix(dot): value for key, value in values.items() if key.startswith(dot)}


def _spellings(key: str, model: nn.Module, modules: dict[str, nn.Module], encoders: int) -> dict[str, tuple[str, ...]]:
    """Every name that a file may have for a part's layers -> the layers that it stands for."""
    names = [name for name, module in modules.items() if adaptable(module)]
    component = key or _guess(model)
    heads = [f"{component}."] if component else []
    stems = ["lora_unet", "lora_transformer"]
    if component.startswith("text_encoder"):
        stems = [kohya_prefix(component, model, encoders)]
        if component == TEXT:
            stems += ["lora_te", "lora_te1"]
        names += [f"text_model.{n}" for n in names if not n.startswith("text_")]
    else:
        heads += ["base_model.model.", "diffusion_model.", ""]
    if not key:
        heads += [PREFIX, ""]
    table: dict[str, tuple[str, ...]] = {}
    for name in names:
        layers = (name if name in modules else name.removeprefix("text_model."),)
        table |= {f"{head}{name}": layers for head in heads}
        table |= {f"{stem}_{name.replace('.', '_')}": layers for stem in stems}
    for name, layers in (kohya_names(model, set(modules)) or {}).items():
        table |= {f"{stem}_{name.replace('.', '_')}": layers for stem in stems} | {f"diffusion_model.{name}": layers}
    return table


def _sorted(file: Path, state: dict[str, Tensor], parts, modules):
    """{part: {layer: {"P", "R" (matrices), "alpha" (a number, where the file has one)}}}, and the keys that fit nothing."""
    table = {}
    for key in reversed(parts):  # where two parts claim a name, the denoiser has it
        spelled = _spellings(key, parts[key], modules[key], _encoders(parts))
        table |= {name: (key, layers) for name, layers in spelled.items()}
    found: dict[str, dict[str, dict]] = {key: {} for key in parts}
    unknown, fused = [], {}
    for name, value in state.items():
        matched = _KEY.fullmatch(name)
        owner = table.get(matched[1]) if matched else None
        if owner is None:
            unknown.append(name)
            continue
        key, layers = owner
        role = _ROLE[matched[2] or matched[3]]
        if role == "alpha":
            value = _number(file, name, value)
        elif value.dim() == 4:
            value = value.flatten(1)
        roles = found[key].setdefault(layers[0], {}) if len(layers) == 1 else fused.setdefault((key, layers), {})
        if role in roles:
            raise ValueError(f"{file}: {role} of {layers[0]} is there twice, the second time as {name}")
        roles[role] = value
    for (key, layers), roles in fused.items():
        for layer, taken in _taken_apart(file, layers, roles, modules[key]).items():
            if layer in found[key]:
                raise ValueError(f"{file}: {layer} is there twice, alone and as a part of a larger layer")
            found[key][layer] = taken
    return found, unknown


def _number(file: Path, name: str, value: Tensor) -> float:
    if value.numel() != 1 or value.is_complex() or not torch.isfinite(value.float()).all():
        raise ValueError(f"{file}: {name} is {tuple(value.shape)} {value.dtype}, expected one finite number")
    return float(value)


def _taken_apart(file: Path, layers: tuple[str, ...], roles: dict, modules: dict[str, nn.Module]) -> dict[str, dict]:
    """The LoRAs of layers that one LoRA's outputs are the side by side of: rows of B. Columns of B that are zero for a layer
    (as in a block-diagonal B) are left out there."""
    sizes = [wrap(layer, modules[layer]).shape[0] for layer in layers]
    B, A = roles.get("P"), roles.get("R")
    if B is None or A is None or B.dim() != 2 or A.dim() != 2 or B.shape != (sum(sizes), A.shape[0]):
        shapes = [None if t is None else tuple(t.shape) for t in (B, A)]
        raise ValueError(
            f"{file}: lora_B and lora_A of {', '.join(layers)} are {shapes[0]} and {shapes[1]}, expected "
            f"({sum(sizes)}, r) and (r, {wrap(layers[0], modules[layers[0]]).shape[1]})"
        )
    taken = {}
    for layer, rows in zip(layers, B.split(sizes)):
        used = rows.float().abs().amax(0) != 0  # NaN is unlike zero, and will be told
        if not B.any():
            used[:] = True  # nothing tells which of them was adapted
        if used.any():
            taken[layer] = {"P": rows[:, used], "R": A[used]}
            if "alpha" in roles:  # alpha / r stays what it is
                taken[layer]["alpha"] = roles["alpha"] * int(used.sum()) / A.shape[0]
    return taken


def _adapter(file: Path, raw: dict, layers: dict[str, dict], modules: dict[str, nn.Module], fingerprint) -> Adapter:
    """Tensors and alphas of one part, checked against its modules. `raw`: PEFT's configuration, where the file has it."""
    tensors = {name: {role: t for role, t in roles.items() if role != "alpha"} for name, roles in layers.items()}
    ranks = {name: roles["R"].shape[0] if "R" in roles and roles["R"].dim() else 0 for name, roles in tensors.items()}
    alphas: dict[str, float] = dict(ranks)
    config = LoraConfig(r=max(commonest(ranks), 1))
    if raw:
        raw = {"peft_type": "LORA", **raw}
        from_peft(raw, file)  # tells of options that are unknown here
        peft, alphas = peft_ranks(raw, tensors)
        differ = [f"{name} ({ranks[name]}, by the configuration {r})" for name, r in peft.items() if r != ranks[name]]
        if differ:
            raise ValueError(f"{file}: ranks that differ from {METADATA_KEY}: {some(differ)}")
    alphas |= {name: roles["alpha"] for name, roles in layers.items() if "alpha" in roles}
    return checked(file, config, tensors, ranks, alphas, modules, fingerprint, any_base=True)


def _kind(key: str) -> str | None:
    return next((kind for kind, end in _OTHERS.items() if re.search(rf"\.(?:{end})$", key)), None)


def _no_layer(model, parts) -> str:
    where = ", ".join(type(part).__name__ for part in parts.values())
    hint = " (a file for several parts of a pipeline wants the pipeline)" if "" in parts else ""
    return f"fit no adaptable layer of {where}{hint}"


def _by_diffusers(model, file: Path, state: dict[str, Tensor], unknown: list[str]):
    """What diffusers' converters, which know more tools' names, make of the `unknown` keys of a state, and those keys that
    they make nothing of: pair by pair, for they drop without a word what they do not expect. alpha / r is folded into B
    before, since they round alphas, or lose them."""
    pairs: dict[str, dict[str, str]] = {}
    for key in unknown:
        if matched := _FOREIGN.fullmatch(key):
            name = matched[4] or matched[1] + matched[2]
            pairs.setdefault(name, {})[_ROLE[matched[3] or "alpha"]] = key
    converted, lost = {}, [key for key in unknown if not _FOREIGN.fullmatch(key)]
    for keys in pairs.values():
        pair = {keys[role]: state[keys[role]] for role in "PR" if role in keys}
        if len(pair) == 2 and "alpha" in keys:
            up, down = pair.values()
            alpha = _number(file, keys["alpha"], state[keys["alpha"]])
            pair[keys["P"]] = up.float() * (alpha / max(down.shape[0] if down.dim() else 0, 1))
        made = _renamed(model, pair) if len(pair) == 2 else {}
        converted |= made
        lost += [] if made else keys.values()
    return converted, lost


def _renamed(model, pair: dict[str, Tensor]) -> dict[str, Tensor]:
    """lora_B and lora_A under a pipeline's own names by diffusers' converters; empty where they know nothing of them."""
    try:
        from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    except ImportError:
        return {}
    reader = getattr(model, "lora_state_dict", None)
    if reader is not None:
        unet = model.components.get("unet")
        options = {} if unet is None else {"unet_config": unet.config}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of diffusers' own deprecations
                made = reader(dict(pair), **options)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return {}  # names, or shapes, that the converter was not written for
        made, alphas = made if isinstance(made, tuple) else (made, None)
        pair = {} if alphas else made  # alphas of its own invention
    if any("lora_linear_layer" in key or "to_out_lora" in key for key in pair if key.startswith(TEXT)):
        try:
            return convert_state_dict_to_peft(pair)
        except ValueError:  # its way to say that it does not know them
            return {}
    return convert_unet_state_dict_to_peft(pair)
