"""Every family of pipeline from end to end: train, save, load in a fresh process, draw, merge, unmerge, export."""

import subprocess
import sys

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from tiny_pipeline import python_environment
from tiny_pipelines import FAMILIES, build, denoiser, draw

import deft_kernels as dk
from deft_kernels.adapters.inject import match_targets
from deft_kernels.config import TARGETS

WITH_TEXT = "sdxl"  # the family whose text encoder is adapted too
# Largest difference of two pictures in [0, 1] that differ by rounding only: the order of sums in float32; in bfloat16 the
# merged weights are rounded to 8 bits too, through two steps of the denoiser and the VAE.
SAME = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def difference(a, b):
    return (a - b).abs().max().item()


def bits(pipe):
    """Every tensor of the pipeline's modules that belongs to no adapter."""
    state = {}
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for name, t in module.state_dict().items():
                if "deft_" not in name:
                    state[f"{part}.{name.replace('.base_layer', '')}"] = t.reshape(-1).clone().view(torch.uint8)
    return state


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


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
    pipe = build(family)
    dk.load_adapter(pipe, f"{sys.argv[1]}/{family}", "cat")
    torch.save(draw(pipe, family), f"{sys.argv[1]}/{family}/picture.pt")
"""


def fresh_process(code, folder):
    command = [sys.executable, "-c", code, folder, *FAMILIES]
    run = subprocess.run(command, env=python_environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{family: (pipeline, picture of the base, its bits)} and the folder of the adapters, with what a fresh process drew."""
    folder, pipes = tmp_path_factory.mktemp("families"), {}
    for family in FAMILIES:
        torch.manual_seed(1)
        pipe = build(family)
        base, before = draw(pipe, family), bits(pipe)
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        config = dk.DeftConfig(r=2)
        names = dk.inject_adapter(pipe, {part: config, "text_encoder": config} if family == WITH_TEXT else config)
        assert {name.partition(".")[0] for name in names} == {part} | ({"text_encoder"} if family == WITH_TEXT else set())
        assert difference(draw(pipe, family), base) < SAME[torch.float32]  # the identity start
        losses = train(pipe, family)
        assert losses[-1] < 0.6 * losses[0], (family, losses)
        assert same_bits(bits(pipe), before)
        dk.save_adapter(pipe, folder / family)
        assert [file.name for file in (folder / family).iterdir()] == ["pytorch_deft_weights.safetensors"]
        pipes[family] = pipe, base, before
    fresh_process(FRESH, folder)
    return pipes, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_saved_loaded_afresh_merged_unmerged(trained, family):
    pipes, folder = trained
    pipe, base, before = pipes[family]
    tolerance = SAME[torch.float32]
    picture = draw(pipe, family)
    assert difference(picture, base) > 100 * tolerance
    assert difference(torch.load(folder / family / "picture.pt"), picture) <= tolerance
    dk.merge(pipe)
    assert not same_bits(bits(pipe), before)
    assert difference(draw(pipe, family), picture) <= tolerance
    dk.unmerge(pipe)
    assert same_bits(bits(pipe), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_draws_the_same_in_bfloat16(trained, family):
    pipe, folder = build(family).to(torch.bfloat16), trained[1]
    base, before, tolerance = draw(pipe, family), bits(pipe), SAME[torch.bfloat16]
    dk.load_adapter(pipe, folder / family)
    picture = draw(pipe, family)
    assert difference(picture, base) > 2 * tolerance
    dk.merge(pipe)
    assert not same_bits(bits(pipe), before)
    assert difference(draw(pipe, family), picture) <= tolerance
    dk.eject(pipe)
    assert same_bits(bits(pipe), before)


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


@pytest.mark.skipif(not hasattr(dk, "export_lora"), reason="dk.export_lora is not there yet")
def test_exported_lora_draws_the_same_in_plain_diffusers(trained):
    pipes, folder = trained
    for family, (pipe, *_) in pipes.items():
        if hasattr(pipe, "load_lora_weights"):
            dk.export_lora(pipe, folder / family / "lora.safetensors", format="diffusers")
        else:
            dk.export_lora(pipe, folder / family / "lora", format="peft")
    fresh_process(PLAIN, folder)
    for family, (pipe, *_) in pipes.items():
        picture, other = draw(pipe, family), build(family)
        assert difference(torch.load(folder / family / "plain.pt"), picture) <= SAME[torch.float32], family
        file = folder / family / "lora.safetensors"
        dk.load_adapter(other, file if file.is_file() else folder / family / "lora")
        assert difference(draw(other, family), picture) <= SAME[torch.float32], family


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
