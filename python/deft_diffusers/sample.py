"""Draws pictures with a base model and adapters."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import deft_kernels as dk
from deft_kernels.adapters.hub import locate

from . import UserError, read_json, read_text
from .data import read_image
from .families import load_family
from .grid import grid
from .methods import Adapter, check_base, method_of

RECORD, GRID = "samples.json", "grid.png"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def warn_of_cut_text(family, prompts):
    """Names, for each prompt that is too long for the text encoder, what it will not see."""
    for prompt in dict.fromkeys(prompts):
        if cut := family.cut_text(prompt):
            print(
                f"warning: the prompt {prompt!r} is too long for the text encoder, which will not see: {cut!r}",
                file=sys.stderr,
            )


def check_size(name, value, family):
    """UserError if `value` (None: the model's own) is no size in pixels that the model can draw."""
    if value is not None and (value <= 0 or value % family.size_multiple):
        raise UserError(f"--{name} must be a positive multiple of {family.size_multiple}, got {value}")
    if value is not None and value > family.max_size:
        raise UserError(f"--{name} must be at most {family.max_size}, all that the model has positions for, got {value}")


def find_adapter(name):
    """Folder or file of an adapter: a path, or a hub id (owner/name), which is downloaded. UserError if there is none."""
    try:
        return locate(name)
    except FileNotFoundError as error:
        raise UserError(f"no such adapter: {error}") from error


def load_adapters(family, folders, weights=(), merge=None):
    """Loads what `deft train` has written, of any method, in the order given; `weights` empty means 1 for each.

    Adapters are switched on together: merged into the base weights (undo with `deft_kernels.unmerge`), else as factors.
    `merge` None: merged unless the base is quantised, where the merged weights would have to be rounded again.
    """
    if merge is None:
        merge = not family.quantisation
    adapters = {}
    for k, (folder, weight) in enumerate(zip(folders, weights or [1.0] * len(folders))):
        kind = method_of(folder, family) if Path(folder).is_dir() else Adapter
        if kind is Adapter:
            dk.load_adapter(family.pipe, folder, adapter_name=f"adapter{k}")
            adapters[f"adapter{k}"] = weight
        else:
            check_base(kind, family)
            kind.apply(family, folder, weight)
    if adapters:
        (dk.merge if merge else dk.set_adapters)(family.pipe, list(adapters), list(adapters.values()))


def generate(family, jobs, batch_size=4, progress=True, **settings):
    """Yields a picture for each of `jobs`, a list of (prompt, seed); `settings` go to the family's `generate`."""
    for part in (family.model, *family.text_encoders.values()):
        part.eval()
    with tqdm(total=len(jobs), desc="drawing", unit="image", disable=not progress) as bar:
        for start in range(0, len(jobs), batch_size):
            prompts, seeds = zip(*jobs[start : start + batch_size])
            images = family.generate(list(prompts), seeds, **settings)
            bar.update(len(images))
            yield from images


def _read_prompts(options):
    if bool(options.prompt) == bool(options.prompts_file):
        raise UserError("give the texts either with --prompt or with --prompts_file")
    if not options.prompts_file:
        return options.prompt
    lines = read_text(options.prompts_file).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{options.prompts_file} holds no text")
    return prompts


def device_of(name):
    """The torch device of this name, for None a GPU if there is one. UserError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    return device


def _device_and_dtype(options):
    device = device_of(options.device)
    dtype = options.dtype or ("fp32" if device.type == "cpu" else None)
    if device.type == "cpu" and dtype == "fp16":
        raise UserError("--dtype fp16 needs a GPU; use fp32 on a CPU")
    return device, dtype and DTYPES[dtype]


def _clear(folder, overwrite):
    """Makes room for new samples: UserError if the folder holds pictures, unless they are recorded ones that `overwrite`
    deletes, and nothing else."""
    record, grid_file = folder / RECORD, folder / GRID
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    if not record.is_file():
        foreign = [p for p in (grid_file, *folder.glob("[0-9][0-9][0-9][0-9].png")) if p.exists()]
        if foreign:
            raise UserError(f"{foreign[0]} is in the way and not on record as a sample; choose another --output_dir")
        return
    if not overwrite:
        raise UserError(f"{folder} holds samples already; choose another --output_dir or add --overwrite_output_dir")
    try:
        files = [Path(sample["file"]).name for sample in read_json(record)["samples"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{record} is no record of samples; choose another --output_dir") from error
    for name in (*files, GRID, RECORD):
        (folder / name).unlink(missing_ok=True)


def _write_record(folder, record):
    part = folder / f".{RECORD}.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, folder / RECORD)


def sample(options):
    """Runs `deft sample`: takes `SampleOptions`, writes `0000.png` …, `grid.png`, `samples.json`, returns the pictures."""
    prompts = _read_prompts(options)
    if options.adapter_weight and len(options.adapter_weight) != len(options.adapter):
        raise UserError(
            f"{len(options.adapter_weight)} --adapter_weight for {len(options.adapter)} --adapter: give one each, or none"
        )
    if not all(map(math.isfinite, options.adapter_weight)):
        raise UserError("every --adapter_weight must be a finite number")
    for name in ("num_images_per_prompt", "num_inference_steps", "batch_size"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    device, dtype = _device_and_dtype(options)
    folder = Path(options.output_dir).expanduser()
    if not options.overwrite_output_dir:
        _clear(folder, False)

    model = options.pretrained_model_name_or_path
    adapters = [find_adapter(name) for name in options.adapter]
    family = load_family(model, dtype, options.quantize, options.quantize_text_encoders).to(device)
    if options.negative_prompt is not None and not family.takes_negative_prompt:
        raise UserError(f"--negative_prompt does not apply to {options.pretrained_model_name_or_path}, {family.kind}")
    if options.num_inference_steps > family.max_inference_steps:
        raise UserError(
            f"--num_inference_steps must be at most {family.max_inference_steps}, got {options.num_inference_steps}"
        )
    check_size("height", options.height, family)
    check_size("width", options.width, family)
    if adapters and options.merge is None and family.quantisation:
        print(f"the base is quantised ({family.quantisation}): adapters stay apart from it, as factors", file=sys.stderr)
    if adapters:
        load_adapters(family, adapters, options.adapter_weight, options.merge)
    for prompt in prompts:
        family.check_prompt(prompt, options.input_image)
    inputs = {"input_images": [read_image(path) for path in options.input_image]} if options.input_image else {}
    warn_of_cut_text(family, [*prompts, options.negative_prompt or ""])

    n = options.num_images_per_prompt
    jobs = [(prompt, options.seed + k) for prompt in prompts for k in range(n)]
    settings = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}
    if settings["guidance_scale"] is None:
        settings["guidance_scale"] = family.guidance_scale
    height, width = family.default_size(**inputs)  # the pipeline ignores a height without a width
    settings.update(height=options.height or height, width=options.width or width)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output_dir {folder}: {error}") from error

    record = {"settings": dataclasses.asdict(options) | settings, "samples": []}
    images = []
    for (prompt, seed), image in zip(jobs, generate(family, jobs, options.batch_size, **settings, **inputs)):
        if not images:
            _clear(folder, options.overwrite_output_dir)
        file = f"{len(images):04d}.png"
        record["samples"].append({"file": file, "prompt": prompt, "seed": seed})
        _write_record(folder, record)  # first, so that a picture is never there without its record
        image.save(folder / file)
        images.append(image)
    rows = [images[k : k + n] for k in range(0, len(images), n)]
    grid(rows, [f"seed {options.seed + k}" for k in range(n)], prompts).save(folder / GRID)
    print(f"{len(images)} picture{'s' * (len(images) != 1)} in {folder}")
    return images
