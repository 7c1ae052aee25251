"""Every family of pipeline: train, save; load, draw, merge and export in a fresh process; draw without deft_kernels."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from tiny_pipeline import python_environment
from tiny_pipelines import FAMILIES, build, denoiser, difference, draw, same_state, state_of

import deft_kernels as dk
from deft_kernels.adapters.inject import match_targets
from deft_kernels.adapters.pipeline import TEXT_ENCODERS, components
from deft_kernels.config import TARGETS

WITH_TEXT = "sdxl"  # the family whose text encoder is adapted too
SAME = 1e-5  # largest difference of two pictures in [0, 1] that differ by the order of sums in float32 alone
ENCODERS = {"stable-diffusion": 1, "sdxl": 2, "sd3": 3, "flux": 2, "flux2-klein": 1, "omnigen": 0}


def train(pipe, family):
    """Five steps towards what a random adapter makes of the same inputs; the losses."""
    model, seen = denoiser(pipe), []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    draw(pipe, family)
    hook.remove()
    args, kwargs = seen[0]
    tokens = pipe.tokenizer(tiny_pipelines.PROMPT, return_tensors="pt").input_ids

    def outputs():
        yield model(*args, **kwargs)[0]
        if family == WITH_TEXT:
            yield pipe.text_encoder(tokens).last_hidden_state

    parts = {part for part, names in dk.list_adapters(pipe).items() if names}
    dk.inject_adapter(pipe, dict.fromkeys(parts, dk.DeftConfig(r=2, init_weights=False, init_scale=20)), "teacher")
    with torch.no_grad():
        targets = list(outputs())
    dk.set_adapters(pipe, "default")
    dk.delete_adapter(pipe, "teacher")
    groups = dk.adapter_parameters(pipe)
    optimizer = torch.optim.AdamW([{"params": groups["R"], "lr": 0.05}, {"params": groups["P"], "lr": 0.005}])
    losses = []
    for _ in range(5):
        loss = sum(F.mse_loss(y, target) for y, target in zip(outputs(), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


FRESH = """
import sys, torch
import deft_kernels as dk
from tiny_pipelines import build, draw
for family in sys.argv[2:]:
    pipe, folder = build(family), f"{sys.argv[1]}/{family}"
    dk.load_adapter(pipe, folder, "cat")
    pictures = {"loaded": draw(pipe, family)}
    dk.merge(pipe)
    pictures["merged"] = draw(pipe, family)
    dk.unmerge(pipe)
    if hasattr(pipe, "load_lora_weights"):
        dk.export_lora(pipe, f"{folder}/lora.safetensors", "cat", format="diffusers")
    else:
        dk.export_lora(pipe, f"{folder}/lora", "cat", format="peft")
    torch.save(pictures, f"{folder}/pictures.pt")
"""
PLAIN = """
import sys, torch
from tiny_pipelines import build, draw
for family in sys.argv[2:]:
    pipe = build(family)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(f"{sys.argv[1]}/{family}", weight_name="lora.safetensors")
    else:  # OmniGen's: diffusers has no loader for it
        from peft import PeftModel
        lora = f"{sys.argv[1]}/{family}/lora/transformer"
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, lora).base_model.model
    assert "deft_kernels" not in sys.modules
    torch.save(draw(pipe, family), f"{sys.argv[1]}/{family}/plain.pt")
"""


def fresh_process(code, folder):
    command = [sys.executable, "-c", code, folder, *FAMILIES]
    run = subprocess.run(command, env=python_environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


class Trained(NamedTuple):
    pipe: object  # with the adapter, unmerged
    base: torch.Tensor  # picture without it
    picture: torch.Tensor  # with it
    state: dict  # of the base
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function of the family, which trains at its first call."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def of(family):
        torch.manual_seed(1)
        pipe = build(family)
        base, before = draw(pipe, family), state_of(pipe)
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        config = dk.DeftConfig(r=2)
        names = dk.inject_adapter(pipe, {part: config, "text_encoder": config} if family == WITH_TEXT else config)
        assert {name.partition(".")[0] for name in names} == {part} | ({"text_encoder"} if family == WITH_TEXT else set())
        assert difference(draw(pipe, family), base) < SAME  # the identity start
        losses = train(pipe, family)
        assert losses[-1] < 0.6 * losses[0], losses
        assert same_state(state_of(pipe), before)
        dk.save_adapter(pipe, folder / family)
        assert [file.name for file in (folder / family).iterdir()] == ["pytorch_deft_weights.safetensors"]
        return Trained(pipe, base, draw(pipe, family), before, folder / family)

    return of


@pytest.fixture(scope="module")
def afresh(trained):
    """What a fresh process drew of every family from its file, and another, without deft_kernels, of its export."""
    folder = [trained(family).folder.parent for family in FAMILIES].pop()
    fresh_process(FRESH, folder)
    fresh_process(PLAIN, folder)
    return {f: {**torch.load(folder / f / "pictures.pt"), "plain": torch.load(folder / f / "plain.pt")} for f in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_merged_unmerged(trained, family):
    pipe, base, picture, before, _ = trained(family)
    assert difference(picture, base) > 100 * SAME
    dk.merge(pipe)
    assert not same_state(state_of(pipe), before)
    assert difference(draw(pipe, family), picture) <= SAME
    dk.unmerge(pipe)
    assert same_state(state_of(pipe), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_merged_exported_afresh(trained, afresh, family):
    for how, drawn in afresh[family].items():
        assert difference(drawn, trained(family).picture) <= SAME, how
    other, folder = build(family), trained(family).folder
    file = folder / "lora.safetensors"
    dk.load_adapter(other, file if file.is_file() else folder / "lora")
    assert difference(draw(other, family), trained(family).picture) <= SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_as_near_the_truth_in_bfloat16(trained, family):
    """The truth is the picture in float32: merging may err at most twice as much as bfloat16 does without it."""
    _, base, truth, _, folder = trained(family)
    effect = rms(truth, base)
    pipe = build(family).to(torch.bfloat16)
    before = state_of(pipe)
    dk.load_adapter(pipe, folder / "pytorch_deft_weights.safetensors")
    unmerged = rms(draw(pipe, family), truth)
    dk.merge(pipe)
    assert not same_state(state_of(pipe), before)
    assert rms(draw(pipe, family), truth) <= 2 * unmerged < effect
    dk.eject(pipe)
    assert same_state(state_of(pipe), before)


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_encoder(tmp_path, family):
    pipe = build(family)
    encoders = [part for part in components(pipe) if part in TEXT_ENCODERS]
    assert len(encoders) == ENCODERS[family]
    base = draw(pipe, family)
    for part in encoders:
        dk.inject_adapter(pipe, {part: dk.DeftConfig(r=2, init_weights=False, init_scale=15)}, "cat")
        picture = draw(pipe, family)
        assert difference(picture, base) > 100 * SAME, part
        dk.set_adapters(pipe, "cat", 0.0)
        assert difference(draw(pipe, family), base) <= SAME, part
        dk.set_adapters(pipe, "cat")
        dk.merge(pipe)
        assert difference(draw(pipe, family), picture) <= SAME, part
        dk.unmerge(pipe)
        dk.save_adapter(pipe, tmp_path / part, "cat")
        dk.eject(pipe)
        dk.load_adapter(pipe, tmp_path / part)
        assert torch.equal(draw(pipe, family), picture), part
        dk.eject(pipe)


# Layers of one block of each class, and how many there are in the tiny model.
COUNTS = {
    "UNet2DConditionModel": 32,
    "SD3Transformer2DModel": 15,  # the last block has no text output: its to_add_out is missing
    "FluxTransformer2DModel": 11,
    "Flux2Transformer2DModel": 13,
    "OmniGenTransformer2DModel": 8,
    "CLIPTextModel": 8,
    "CLIPTextModelWithProjection": 8,
    "T5EncoderModel": 8,
    "Qwen3ForCausalLM": 8,
}


def test_default_targets_of_every_class():
    models = {}
    for family in FAMILIES:
        for module in build(family).components.values():
            models.setdefault(type(module).__name__, module)
    assert COUNTS.keys() == TARGETS.keys() <= models.keys()
    for name, targets in TARGETS.items():
        matched = match_targets(models[name], dk.DeftConfig())
        assert len(matched) == COUNTS[name], name
        assert {next(t for t in targets if layer.endswith(f".{t}")) for layer in matched} == set(targets), name
