"""LoRA files out of any adapter and in again, against what diffusers and PEFT themselves make of them.

Tolerances: an export is the update of the adapted model, B A, added by other code in another order: float32 rounding of a
few hundred operations in a row, checked to 1e-4 of the outputs' size where the adapter changes them by more than 1e-2.
"""

import dataclasses
import json
import subprocess
import sys

import diffusers
import pytest
import torch
from common import CONFIGS, small_model
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_diffusers_models import flux_like, sdxl_like
from test_inject import assert_untouched, fingerprint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import deft_kernels as dk
from deft_kernels.adapters.inject import adaptable, outer_modules
from deft_kernels.adapters.kohya import kohya_names
from deft_kernels.adapters.lora import lora_factors, truncate

TARGETS = ["to_q", "to_k", "to_out.0", "conv_in"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def seeded_model(dtype=torch.float32):
    torch.manual_seed(5)
    return small_model().to(dtype)


def stir(model, size=0.3):
    """Away from the start: every adapter's parameters moved."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "deft_" in name:
                p.add_(torch.randn_like(p) * size)


def adapted(method="qr", name="default", model=None, dtype=torch.float32, **options):
    model = seeded_model(dtype) if model is None else model
    options = {"target_modules": TARGETS, "init_weights": False, **options}
    dk.inject_adapter(model, dataclasses.replace(CONFIGS[method], **options), name)
    stir(model)
    return model


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# Every method: through PEFT's own loader, and back in here ---------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_is_the_same_in_peft(tmp_path, method, merged):
    model, x = adapted(method), torch.randn(2, 3, 4, 4)
    expected = model(x)
    if merged:
        dk.merge(model)
    errors = dk.export_lora(model, tmp_path, format="peft")
    assert len(errors) == 7 and set(errors.values()) == {0.0}
    peft = PeftModel.from_pretrained(seeded_model(), tmp_path).eval()
    assert (seeded_model()(x) - expected).abs().max() > 0.01
    torch.testing.assert_close(peft(x), expected, **CLOSE)
    other = seeded_model()
    names = dk.import_lora(other, tmp_path)
    assert sorted(names) == sorted(errors) and not any(p.requires_grad for p in other.parameters())
    torch.testing.assert_close(other(x), expected, **CLOSE)


def test_float64_and_the_exact_factors(tmp_path):
    model = adapted("qr-gate-alpha", dtype=torch.float64)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (dk.DeftLinear, dk.DeftConv2d))}
    pairs = lora_factors(layers, {name: {"default": 0.7} for name in layers})
    dk.merge(model, ["default"], [0.7])
    for name, layer in layers.items():
        B, A = pairs[name]
        W = layer.pristine_weight()
        torch.testing.assert_close(W + B @ A, layer.matrix(layer.weight), rtol=1e-12, atol=1e-13)


# Families: a file that plain diffusers loads -------------------------------------------------------------------------------


def sd_like():
    """Stable Diffusion 1.x: its block layout, convolutions for proj_in and proj_out."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 16))
    return unet, lambda m: m(*inputs, return_dict=False)[0]


def sd3_like():
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        dual_attention_layers=(0,), pos_embed_max_size=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4), "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10), "timestep": torch.tensor([3.0, 700.0]),
    }  # fmt: skip
    return sd3, lambda m: m(**inputs, return_dict=False)[0]


def pipeline(cls, **parts):
    """A pipeline of some parts, for its loaders alone."""
    import inspect

    names = [n for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self" and p.default is p.empty]
    options = {"requires_safety_checker": False} if cls is diffusers.StableDiffusionPipeline else {}
    return cls(**{name: parts.get(name) for name in names}, **options)


FAMILIES = {
    "sd": (sd_like, diffusers.StableDiffusionPipeline, "unet"),
    "sdxl": (sdxl_like, diffusers.StableDiffusionXLPipeline, "unet"),
    "sd3": (sd3_like, diffusers.StableDiffusion3Pipeline, "transformer"),
    "flux": (flux_like, diffusers.FluxPipeline, "transformer"),
}


def every_layer(model, kohya=False):
    """Full names of all layers that can be adapted, or of those with a name in Kohya's format."""
    names = {name for name, module in outer_modules(model).items() if adaptable(module)}
    if kohya:
        names = {name for layers in kohya_names(model, names).values() for name in layers}
    return sorted(names)


def family(name, format):
    """A model of a family with an adapter on every layer that the format has names for, and a pristine copy of it."""
    build, cls, part = FAMILIES[name]
    torch.manual_seed(1)
    model, run = build()
    plain = type(model).from_config(model.config)
    plain.load_state_dict(model.state_dict())
    names = every_layer(model, format == "kohya")
    if (name, format) == ("flux", "kohya"):  # diffusers takes linear1 apart by the widths of FLUX.1 itself
        names = [n for n in names if not (n.startswith("single_") and (".attn." in n or "proj_mlp" in n))]
    dk.inject_adapter(model, dk.DeftConfig(r=2, gate=True, target_modules=names, init_weights=False))
    stir(model, 0.1)
    return model.eval(), plain.eval(), run, pipeline(cls, **{part: plain}), part, names


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_plain_diffusers_loads_it(tmp_path, name, format):
    if (name, format) == ("sd3", "kohya"):
        pytest.skip("diffusers reads no Kohya file for SD3: see test_kohya_names_of_sd3")
    model, plain, run, pipe, part, names = family(name, format)
    file = tmp_path / "lora.safetensors"
    errors = dk.export_lora(model, file, format=format)
    assert sorted(errors) == [f"{part}.{n}" for n in names]
    with torch.no_grad():
        before, expected = run(plain), run(model)
        pipe.load_lora_weights(str(file))
        adapted_by_peft = [n for n, m in plain.named_modules() if hasattr(m, "lora_A")]
        assert sorted(adapted_by_peft) == names
        assert (expected - before).abs().max() > 0.01
        torch.testing.assert_close(run(plain), expected, **CLOSE)

        dk.eject(model)  # and back, as a module and as a part of a pipeline
        assert sorted(dk.import_lora(model, file)) == names
        torch.testing.assert_close(run(model), expected, **CLOSE)
        dk.delete_adapter(model, "default")
        whole = pipeline(FAMILIES[name][1], **{part: model})
        assert sorted(dk.import_lora(whole, file)) == sorted(errors)
        torch.testing.assert_close(run(model), expected, **CLOSE)
