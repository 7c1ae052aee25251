"""Brings adapters from one kind of file to another."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers

import deft_kernels as dk
from deft_kernels.adapters.authors import is_reference, read_reference
from deft_kernels.adapters.files import (
    CONFIG_NAME,
    FOUND,
    PIPELINE_WEIGHTS,
    PREFIX,
    peft_type,
    read_safetensors,
    suffix,
    to_peft,
    write_adapter,
)
from deft_kernels.adapters.hub import locate
from deft_kernels.adapters.inject import adapted_layers
from deft_kernels.adapters.lora import lora_file
from deft_kernels.adapters.pipeline import DENOISERS, TEXT_ENCODERS
from deft_kernels.config import LoraConfig

from . import UserError, read_json
from .families import _index, _locate

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REFERENCE, DEFT, LORA = "reference", "DEFT", "LORA"


def convert(options):
    """Runs `deft convert`: takes `ConvertOptions`, writes `--output_dir`, returns the names of the converted layers."""
    if options.rank is not None and options.rank < 1:
        raise UserError(f"--rank must be at least 1, got {options.rank}")
    if not math.isfinite(options.adapter_weight):
        raise UserError("--adapter_weight must be a finite number")
    folder = Path(options.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not options.overwrite_output_dir:
        raise UserError(f"{folder} holds files already; choose another --output_dir or add --overwrite_output_dir")
    try:
        source = locate(options.source)
        if folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"--output_dir {folder} holds {options.source} itself; choose another")
        names = _convert(options, source, folder)
    except (ValueError, FileNotFoundError) as error:  # what the readers say of a file
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    print(f"{len(names)} layers in {folder}")
    return names


def _convert(options, source, folder):
    of_pipeline = PIPELINE_WEIGHTS in (source.name, *(p.name for p in source.glob(PIPELINE_WEIGHTS)))
    kind = REFERENCE if is_reference(source) else DEFT if of_pipeline else (peft_type(source) or LORA)
    format = options.format or ("diffusers" if kind == DEFT else "deft")
    if format == "deft":
        _refuse(options, "format deft", adapter_weight=1.0, rank=None, dtype="fp32")
        if kind == DEFT:
            raise UserError(f"{source} is a deft folder already: give --format diffusers, kohya or peft")
    if kind != REFERENCE:
        _refuse(options, "a source that DEFT's authors' code did not write", decomposition_method=None)
    if kind == REFERENCE and format == "deft":
        return _reference_to_deft(source, folder, options.decomposition_method)
    if options.pretrained_model_name_or_path is None:
        why = "the names of its layers" if format == "deft" else "the update depends on the base weights"
        raise UserError(f"--pretrained_model_name_or_path is needed to convert {source} to {format}: {why}")

    adapts_text = of_pipeline or (kind == LORA and _adapts_text(source))
    model = _load(options.pretrained_model_name_or_path, adapts_text)
    _say(f"reading {source}")
    active = _read(kind, source, model, options.decomposition_method)
    _say(f"writing {folder}")
    _clear(folder)
    if format != "deft":
        weights = [options.adapter_weight] * len(active)
        settings = {"rank": options.rank, "dtype": DTYPES[options.dtype]}
        errors = dk.export_lora(model, folder, active, format, weights=weights, **settings)
        if worst := max(errors.values()):
            mean = sum(errors.values()) / len(errors)
            print(f"relative error of the layers' updates: {worst:.3g} at most, {mean:.3g} on average")
        return list(errors)
    adapted = {part: layers for part, module in model.components.items() if (layers := adapted_layers(module))}
    for part in adapted:  # alone in the folder, it is the denoiser's
        alone = len(adapted) == 1 and part in DENOISERS
        dk.save_adapter(model.components[part], folder if alone else folder / part, "converted")
    return [f"{part}.{name}" for part, layers in adapted.items() for name in layers]


def _clear(folder):
    """Delete what an earlier conversion has written there: it would be taken for a part of this one."""
    for part in (folder, *(folder / name for name in (*DENOISERS, *TEXT_ENCODERS, "para", "lora"))):
        for name in (CONFIG_NAME, *FOUND):
            (part / name).unlink(missing_ok=True)
        if part != folder and part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def _refuse(options, why, **defaults):
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name} does not apply to {why}")


def _say(step):
    print(step, file=sys.stderr, flush=True)


def _reference_to_deft(source, folder, decomposition_method):
    """The authors' tensors as they are, under PEFT's names; two folders for `lorapara`."""
    adapters = read_reference(source, decomposition_method)
    _clear(folder)
    for name, (config, tensors) in adapters.items():
        lora = isinstance(config, LoraConfig)
        state = {f"{PREFIX}{k}.{suffix(role, lora)}": t for k, roles in tensors.items() for role, t in roles.items()}
        state = {key: t.contiguous() for key, t in state.items()}
        where = folder / name.strip("-") if len(adapters) > 1 else folder
        write_adapter(where, to_peft(config, dict.fromkeys(tensors, config.r)), state)
    return list(dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.tensors))


def _adapts_text(source):
    """Whether a LoRA file has layers of text encoders."""
    folders = [source / name for name in TEXT_ENCODERS] if source.is_dir() else []
    if peft_type(source) is not None or any(f.is_dir() for f in folders):
        return any(f.is_dir() for f in folders)
    return any(key.startswith(("text_encoder", "lora_te")) for key in read_safetensors(lora_file(source), tensors=False)[0])


def _load(name, text_encoders):
    """The parts of a pipeline that adapters go into, under their names there."""
    where = _locate(name)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = read_json(_index(where))
    wanted = [*DENOISERS, *(TEXT_ENCODERS if text_encoders else ())]
    found = {}
    for part in wanted:
        if isinstance(index, dict) and (index.get(part) or [None])[0] is not None:
            _say(f"loading {part} of {name}")
            found[part] = diffusers.AutoModel.from_pretrained(str(where), subfolder=part).eval()
    if not any(part in found for part in DENOISERS):
        raise UserError(f"{name} has none of {', '.join(DENOISERS)}: nothing that an adapter goes into")
    # the pipeline's class knows other tools' names of its layers
    converter = getattr(getattr(diffusers, str(index.get("_class_name")), None), "lora_state_dict", None)
    return SimpleNamespace(components=found, lora_state_dict=converter)


def _read(kind, source, model, decomposition_method):
    """Put the source on the model; returns the names of its adapters there."""
    denoiser = next(model.components[part] for part in DENOISERS if part in model.components)
    if kind == DEFT:
        dk.load_adapter(model, source, "converted")
    elif kind == LORA:
        dk.import_lora(model, source, "converted")
    else:
        dk.import_reference(denoiser, source, "converted", decomposition_method=decomposition_method)
    layers = [layer for part in model.components.values() for layer in adapted_layers(part).values()]
    return list(dict.fromkeys(name for layer in layers for name in layer.configs))
