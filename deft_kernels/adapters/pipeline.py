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
from .files import FOUND, PIPELINE_WEIGHTS, PREFIX, Adapter, attach_adapter, read_adapter, read_safetensors
from .hub import locate
from .inject import Parts, adapted_layers

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


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
    found = components(target)
    return found[""] if "" in found else type(type(target).__name__, (Parts,), {})(found)


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


@functools.wraps(inject.inject_adapter)
def inject_adapter(model, config: DeftConfig | dict[str, DeftConfig], adapter_name: str = "default") -> list[str]:
    model = as_model(model)
    if not isinstance(model, Parts):
        return inject.inject_adapter(model, config, adapter_name)
    configs = config if isinstance(config, dict) else {name: config for name in DENOISERS if name in model}
    unknown = [name for name in configs if name not in model]
    if unknown or not configs:
        asked = ", ".join(unknown) or "a denoiser"
        raise ValueError(f"{type(model).__name__} has no {asked}; adapters can go into its {', '.join(model)}")
    by_layer = {f"{part}.{name}": c for part, c in configs.items() for name in inject.match_targets(model[part], c)}
    return inject.attach(model, by_layer, adapter_name, list(by_layer))


inject_adapter.__doc__ += """
    Of a pipeline, `config` goes into the denoiser; {"unet": config, "text_encoder": config} into the parts that it names,
    each with its own. Layers are then named `<part>.<layer>`.
    """


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


@functools.wraps(files.save_adapter)
def save_adapter(model, folder: str | os.PathLike, adapter_name: str = "default") -> None:
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


save_adapter.__doc__ += """
    A pipeline's adapter is one file, `pytorch_deft_weights.safetensors`, with keys `<part>.<module>.deft_P` and the
    configuration and fingerprint of each part in its metadata.
    """


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
    known = any(path_or_name in names for names in list_adapters(model).values())
    merging.hotswap(as_model(model), path_or_name if known else read(model, locate(path_or_name)), *args, **kwargs)


def _weights_file(path: Path) -> Path | None:
    """The adapter's tensors at a path; None for a folder that has none itself."""
    if not path.is_dir():
        return path
    return next((path / name for name in FOUND if (path / name).is_file()), None)


def read(target, path: Path, any_base: bool = False) -> Adapter:
    """Read an adapter for a model or a pipeline, and check everything about it; nothing is touched."""
    model, parts, file = as_model(target), components(target), _weights_file(path)
    if file is not None and _is_lora(file):
        from .lora import read_lora

        found = read_lora(target, file)
    elif file is not None:
        found = _read_file(model, parts, file, any_base)
    else:
        found = {n: read_adapter(part, path / n, any_base) for n, part in parts.items() if n and (path / n).is_dir()}
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


def _is_lora(file: Path) -> bool:
    """Whether this is a LoRA as other tools write it, without PEFT's configuration."""
    state, metadata = read_safetensors(file)
    configured = (file.parent / files.CONFIG_NAME).is_file() or any(key.endswith("adapter_config") for key in metadata)
    return not configured and any("lora" in key for key in state)


def _read_file(model: nn.Module, parts: dict[str, nn.Module], file: Path, any_base: bool) -> dict[str, Adapter]:
    """The adapters of a file by part: a pipeline's file says by its keys which parts it has, any other is one adapter."""
    state, _ = read_safetensors(file)
    heads = {key.partition(".")[0] for key in state}
    named = sorted(heads & {*DENOISERS, *TEXT_ENCODERS, *parts})
    if not named:
        main = next((name for name in DENOISERS if name in parts), next(iter(parts)))
        return {main: read_adapter(parts[main], file, any_base)}
    if "" in parts and len(named) == 1:  # a pipeline's file with one part, for that part
        parts = {named[0]: model}
    if strangers := [name for name in named if name not in parts]:
        has = f"has {', '.join(parts)}" if isinstance(model, Parts) else "is one model: pass the pipeline"
        raise ValueError(f"{file}: holds an adapter for {', '.join(strangers)}, but {type(model).__name__} {has}")
    if heads != set(named):
        raise ValueError(f"{file}: keys that belong to no part begin with {', '.join(sorted(heads - set(named))[:8])}")
    return {part: read_adapter(parts[part], file, any_base, part) for part in named}
