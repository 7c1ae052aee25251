"""Pipelines: every verb that takes a model takes a pipeline too, all of whose parts it changes, or none.

A pipeline's parts are handed to the verbs as one model (`Parts`), whose layers are named `unet.<layer>`,
`text_encoder.<layer>` ... A pipeline is told by duck type: diffusers is no dependency here.

Files, in diffusers' habit: `pytorch_deft_weights.safetensors` alone, keys `<part>.<module>.deft_P` (the bare suffixes of
files.py), metadata `<part>.adapter_config` and `<part>.base_fingerprint`.
"""

import functools
import os
from pathlib import Path

from torch import Tensor, nn

from ..config import DeftConfig
from . import files, inject
from . import merge as merging
from .files import FOUND, PIPELINE_WEIGHTS, PREFIX, WEIGHTS_NAME, Adapter, attach_adapter, read_adapter, read_safetensors
from .hub import PICKLES, locate
from .inject import DENOISERS, TEXT_ENCODERS, Parts, adapted_layers


def components(target) -> dict[str, nn.Module]:
    """The modules that adapters go into, by their name in the pipeline, which is also the prefix of their keys in a
    pipeline's files: `{"unet": ..., "text_encoder": ...}`; `{"": target}` where target is a module itself, and a dict of
    modules as it is. Of a compiled module, the original.

    Raises TypeError for what is neither a module nor a pipeline with one of these parts.
    """
    if isinstance(target, Parts):
        return dict(target.items())
    if isinstance(target, nn.Module):
        return {"": _original(target)}
    held = target if isinstance(target, dict) else getattr(target, "components", None)
    if isinstance(held, dict):
        names = held if isinstance(target, dict) else (*DENOISERS, *TEXT_ENCODERS)
        found = {name: _original(held[name]) for name in names if isinstance(held.get(name), nn.Module)}
        if found:
            return found
    raise TypeError(f"{type(target).__name__} is neither a module nor a pipeline with a denoiser ({', '.join(DENOISERS)})")


def _original(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)  # torch.compile's wrapper has none of the module's hooks


def as_model(target) -> nn.Module:
    """A module, or the parts of a pipeline as one; named in messages as what it stands for."""
    if isinstance(target, Parts):
        return target
    found = components(target)
    return found[""] if "" in found else Parts(found, type(target).__name__)


def takes_pipelines(verb):
    """A verb over one model, for pipelines too: it sees their parts as one."""

    @functools.wraps(verb)
    def over_parts(model, *args, **kwargs):
        return verb(as_model(model), *args, **kwargs)

    return over_parts


set_adapters = takes_pipelines(inject.set_adapters)
route_adapters = takes_pipelines(inject.route_adapters)
delete_adapter = takes_pipelines(inject.delete_adapter)
eject = takes_pipelines(inject.eject)
adapter_parameters = takes_pipelines(inject.adapter_parameters)
merge = takes_pipelines(merging.merge)
unmerge = takes_pipelines(merging.unmerge)


def inject_adapter(model, config: DeftConfig | dict[str, DeftConfig], adapter_name: str = "default") -> list[str]:
    """Put a new adapter on the target layers of a model or pipeline, in place.

    The model's own parameters are frozen; the new adapter becomes the active and the only trainable one. The first
    adapter turns each target layer into a `DeftLinear` or `DeftConv2d`; further ones join it there. All layers are
    prepared together at the start of every forward of `model` (see `nn.Bank`), so inject into the module that you call.

    Args:
        model: a diffusers pipeline, a UNet or transformer, a text encoder, any module with linear layers or 2-D
            convolutions.
        config: `DeftConfig` (DEFT, PaRa) or `LoraConfig`. Of a pipeline it goes into the denoiser;
            {"unet": config, "text_encoder": config} into the parts that it names, each with its own.
        adapter_name: without dots.

    Returns the names of the adapted layers, a pipeline's as `<part>.<layer>`.

    Raises:
        ValueError: a target that matches nothing (the nearest names are told), no layer matched, a name in use, NaN in a
            base weight, a quantised one that cannot be read, a part that there is not. TypeError: a target that is no linear
            layer and no plain convolution, configs by part for what has no parts. The model is then as it was.

    Warns where quantised layers round their inputs too, so that the start is not quite the identity.
    """
    model = as_model(model)
    if not isinstance(model, Parts):
        if isinstance(config, dict):
            named = f"configs for {', '.join(config)} want a pipeline"
            raise TypeError(f"{named}, but {type(model).__name__} is one model: pass its config itself, or the pipeline")
        return inject.inject_adapter(model, config, adapter_name)
    configs = config if isinstance(config, dict) else {name: config for name in DENOISERS if name in model}
    unknown = [name for name in configs if name not in model]
    if unknown or not configs:
        asked = ", ".join(unknown) or "a denoiser"
        raise ValueError(f"{model._get_name()} has no {asked}; adapters can go into its {', '.join(model)}")
    by_layer = {f"{part}.{name}": c for part, c in configs.items() for name in inject.match_targets(model[part], c)}
    return inject.attach(model, by_layer, adapter_name, list(by_layer))


def list_adapters(target) -> dict[str, dict[str, float | None]]:
    """Which adapters each part has, and how strongly they act: {part: {adapter: strength, None where it is inactive}}. A
    module itself is the part ""."""
    listed: dict[str, dict[str, float | None]] = {}
    for part, module in components(target).items():
        listed[part] = {}
        for layer in adapted_layers(module).values():
            for name in layer.configs:
                listed[part][name] = layer.strengths.get(name, listed[part].get(name))
    return listed


@functools.wraps(files.adapter_state_dict)
def adapter_state_dict(model, adapter_name: str = "default") -> dict[str, Tensor]:
    model = as_model(model)
    state = files.adapter_state_dict(model, adapter_name)
    return {key.removeprefix(PREFIX): t for key, t in state.items()} if isinstance(model, Parts) else state


def save_adapter(model, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write an adapter into `folder`: a module's as PEFT does, `adapter_config.json` and `adapter_model.safetensors`; a
    pipeline's as one file, `pytorch_deft_weights.safetensors`, with keys `<part>.<module>.deft_P` and the configuration and
    fingerprint of each part in its metadata.

    Each file is replaced atomically. PEFT reads its layout back for the methods that it has (qr, relu, PaRa on linear
    layers; LoRA). ValueError for an unknown adapter, or one with NaN or infinity.
    """
    model = as_model(model)
    if not isinstance(model, Parts):
        files.save_adapter(model, folder, adapter_name)
        return
    from safetensors.torch import save

    state, metadata = adapter_state_dict(model, adapter_name), {"format": "pt"}
    for part, names in list_adapters(model).items():
        if adapter_name in names:
            described = files.metadata_of(*files.describe(model[part], adapter_name))
            metadata |= {f"{part}.{key}": value for key, value in described.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    files.replace_file(Path(folder) / PIPELINE_WEIGHTS, save(state, metadata))


def load_adapter(
    model,
    source: str | os.PathLike,
    adapter_name: str = "default",
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    trainable: bool = False,
    any_base: bool = False,
) -> list[str]:
    """Load an adapter into a model or pipeline, and make it the active one.

    Args:
        source: a folder, a safetensors file, or a hub id (owner/name), of a pipeline's file as `save_adapter` writes it; of
            PEFT's layout, which goes to a pipeline's denoiser; of folders in PEFT's layout under the names of parts; of what
            diffusers' `save_lora_adapter` writes (bare keys); or of a LoRA file as `import_lora` reads it.
        weight_name: the file to take, where there are several. subfolder: where it lies.
        revision, token, cache_dir, local_files_only: of a hub id, as huggingface_hub takes them.
        trainable: whether its parameters require grad, to go on training.
        any_base: load an adapter made for another base of the same shapes, with a warning instead of an error. A LoRA,
            which does not depend on its base, and weights that differ as one base does in another quantisation always get
            the warning.

    Returns the names of the adapted layers, a pipeline's as `<part>.<layer>`.

    Raises:
        FileNotFoundError: nothing there, or a hub id that cannot be reached (the message tells what to download and where to
        put it). ValueError: files that cannot be read, keys that are missing or fit no layer or part, wrong shapes, values
        that are not finite, another base, options these layers do not have. The model is then as it was.
    """
    path = locate(
        source, weight_name=weight_name, subfolder=subfolder, revision=revision, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only,
    )  # fmt: skip
    loaded = read(model, path, any_base)
    return attach_adapter(as_model(model), loaded, adapter_name, trainable=trainable)


@functools.wraps(merging.hotswap)
def hotswap(model, path_or_name, *args, **kwargs) -> None:
    source = path_or_name
    if not isinstance(source, Adapter) and not any(source in names for names in list_adapters(model).values()):
        source = read(model, locate(source))
    merging.hotswap(as_model(model), source, *args, **kwargs)


def _weights_file(path: Path) -> Path | None:
    """The adapter's tensors at a path; None for a folder that has none itself."""
    if path.suffix in PICKLES and path.is_file():
        raise ValueError(
            f"{path}: a {path.suffix} file is a pickle, and only safetensors are read here; deft_kernels.import_reference "
            "reads what the authors' code of DEFT and PaRa wrote"
        )
    if not path.is_dir():
        return path
    found = [name for name in FOUND if (path / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(found)}: say which by weight_name=, or pass the file itself")
    return path / found[0] if found else None


def read(target, path: Path, any_base: bool = False) -> Adapter:
    """Read an adapter for a model or a pipeline, and check everything about it; nothing is touched."""
    model, parts, file = as_model(target), components(target), _weights_file(path)
    if file is None:
        named = [n for n in dict.fromkeys((*parts, *DENOISERS, *TEXT_ENCODERS)) if n and (path / n / WEIGHTS_NAME).is_file()]
        found = {n: read_adapter(part, path / n, any_base, n) for n, part in _by_part(model, parts, named, path).items()}
    else:
        held = read_safetensors(file)
        if _is_lora(file, *held):
            from .lora import read_lora

            found = read_lora(target, file)
        else:
            found = _read_file(model, parts, file, any_base, held)
    if not found:
        folders = f", or a folder for a part ({', '.join(parts)})" if isinstance(model, Parts) else ""
        raise FileNotFoundError(f"{path} has none of {', '.join(FOUND)}{folders}; weight_name= tells another file's name")
    return together(model, found)


def together(model: nn.Module, found: dict[str, Adapter]) -> Adapter:
    """What was read for the parts of `as_model`'s model, as one adapter."""
    if not isinstance(model, Parts):
        return next(iter(found.values()))
    return Adapter(
        {f"{part}.{name}": adapter.config for part, adapter in found.items() for name in adapter.tensors},
        {f"{part}.{name}": roles for part, adapter in found.items() for name, roles in adapter.tensors.items()},
    )


def _is_lora(file: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    """Whether this is a LoRA as other tools write it, without PEFT's configuration."""
    configured = (file.parent / files.CONFIG_NAME).is_file() or any(key.endswith("adapter_config") for key in metadata)
    return not configured and any("lora" in key for key in state)


def _read_file(model: nn.Module, parts: dict[str, nn.Module], file: Path, any_base: bool, held) -> dict[str, Adapter]:
    """The adapters of a file by part: a pipeline's file says by its keys which parts it has, any other is one adapter.
    `held` is what `read_safetensors` has read of it."""
    heads = {key.partition(".")[0] for key in held[0]}
    named = sorted(heads & {*DENOISERS, *TEXT_ENCODERS, *parts})
    if not named:
        main = next((name for name in DENOISERS if name in parts), next(iter(parts)))
        return {main: read_adapter(parts[main], file, any_base, main, held=held)}
    parts = _by_part(model, parts, named, file)
    if heads != set(named):
        raise ValueError(f"{file}: keys that belong to no part begin with {', '.join(sorted(heads - set(named))[:8])}")
    return {n: read_adapter(part, file, any_base, n, held=_of_part(n, *held)) for n, part in parts.items()}


def _by_part(model: nn.Module, parts: dict[str, nn.Module], named: list[str], source: Path) -> dict[str, nn.Module]:
    """The modules that the parts named in a file or folder stand for; one part alone may be for a module itself."""
    if "" in parts and len(named) == 1:
        parts = {named[0]: model}
    if strangers := [name for name in named if name not in parts]:
        has = f"has {', '.join(parts)}" if isinstance(model, Parts) else "is one model: pass the pipeline"
        raise ValueError(f"{source}: holds an adapter for {', '.join(strangers)}, but {model._get_name()} {has}")
    return {name: parts[name] for name in named}


def _of_part(part: str, *held: dict) -> tuple[dict, ...]:
    """What of a pipeline's file is one part's, without the part's name."""
    return tuple({k.removeprefix(f"{part}."): v for k, v in d.items() if k.startswith(f"{part}.")} for d in held)
