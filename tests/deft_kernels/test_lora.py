"""LoRA files out of any adapter and in again, against what diffusers and PEFT themselves make of them.

Tolerances: an export is the update of the adapted model, B A, added by other code in another order: float32 rounding of a
few hundred operations in a row, checked to 1e-4 of the outputs' size where the adapter changes them by more than 1e-2.
"""

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from common import CONFIGS, Opaque, small_model
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_diffusers_models import flux_like, sdxl_like
from test_inject import assert_untouched, fingerprint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import deft_kernels as dk
from deft_kernels.adapters.inject import adaptable, outer_modules
from deft_kernels.adapters.kohya import _latent_diffusion, kohya_names
from deft_kernels.adapters.lora import lora_factors, read_lora, truncate
from deft_kernels.nn.prepare import COMBINATIONS

TESTS = Path(__file__).parents[1]
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


# Every method: through PEFT's own loader, and back in here ------------------------------------------------------------


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


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_adapters_act_in_the_file_as_they_do_together(tmp_path, combine):
    """PaRa in one subspace and in another that overlaps it: the three combinations differ, here by more than 0.01."""
    model, x = adapted("para", "a"), torch.randn(2, 3, 4, 4)
    adapted("para", "b", model)
    outputs = {}
    for how in COMBINATIONS:
        dk.set_adapters(model, ["a", "b"], combine=how)
        outputs[how] = model(x)
    assert all((outputs[how] - outputs[combine]).abs().max() > 0.01 for how in COMBINATIONS if how != combine)
    dk.set_adapters(model, ["a", "b"], combine=combine)
    dk.export_lora(model, tmp_path / "active", None, "peft")
    dk.set_adapters(model, [])
    dk.export_lora(model, tmp_path / "named", ["a", "b"], "peft", combine=combine)
    for name in ("active", "named"):
        other = seeded_model()
        dk.import_lora(other, tmp_path / name)
        torch.testing.assert_close(other(x), outputs[combine], **CLOSE)
        made_of = json.loads(metadata_of(tmp_path / name / "adapter_model.safetensors")["deft_kernels"])["made_of"]
        assert list(made_of) == ["a", "b"] and all(words.endswith(f", {combine}") == (combine != "sum")
                                                   for words in made_of.values())  # fmt: skip


def test_combinations_that_cannot_be_exported(tmp_path):
    model = adapted("para", "a")
    adapted("qr", "b", model)
    with pytest.raises(ValueError, match="combine is 'concat', expected one of sum, sequential, joint"):
        dk.export_lora(model, tmp_path / "x", "a", "peft", combine="concat")
    with pytest.raises(ValueError, match="conv_in: only PaRa adapters .* and 'b' is none"):
        dk.export_lora(model, tmp_path / "x", ["a", "b"], "peft", combine="joint")
    dk.route_adapters(model, ["a", "b"])
    with pytest.raises(ValueError, match="samples are routed to adapters of their own: name the adapters"):
        dk.export_lora(model, tmp_path / "x", None, "peft")
    assert not list(tmp_path.iterdir())
    dk.export_lora(model, tmp_path / "x", "b", "peft")


@pytest.mark.parametrize("options", [{"rank": 1}, {"dtype": torch.float16}, {"rank": 1, "dtype": torch.bfloat16}], ids=str)
def test_adapters_that_cancel_each_other(tmp_path, options):
    model = adapted("lora", "a")
    adapted("lora", "b", model)
    model.load_state_dict({k: model.state_dict()[k.replace(".b", ".a") if k.endswith(".b") else k]
                           for k in model.state_dict()})  # fmt: skip
    errors = dk.export_lora(model, tmp_path, ["a", "b"], "peft", weights=[1.0, -1.0], **options)
    assert len(errors) == 7 and set(errors.values()) == {0.0}
    other = seeded_model()
    dk.import_lora(other, tmp_path)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(other(x), seeded_model()(x), **CLOSE)


def test_float64_and_the_exact_factors(tmp_path):
    model = adapted("qr-gate-alpha", dtype=torch.float64)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (dk.DeftLinear, dk.DeftConv2d))}
    pairs = lora_factors(layers, {name: {"default": 0.7} for name in layers})
    dk.merge(model, ["default"], [0.7])
    for name, layer in layers.items():
        B, A = pairs[name]
        W = layer.pristine_weight()
        torch.testing.assert_close(W + B @ A, layer.matrix(layer.weight), rtol=1e-12, atol=1e-13)


# Families: a file that plain diffusers loads --------------------------------------------------------------------------


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


LOADED = [(name, "diffusers") for name in FAMILIES] + [(name, "kohya") for name in FAMILIES if name != "sd3"]


@pytest.mark.parametrize("name, format", LOADED)  # diffusers reads no Kohya file for SD3: see test_kohya_names_of_sd3
def test_plain_diffusers_loads_it(tmp_path, name, format):
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


def test_kohya_files_with_ranks_that_differ_in_diffusers(tmp_path):
    """diffusers gives all attention layers of such a file one alpha; so do we."""
    torch.manual_seed(1)
    unet, run = sd_like()
    plain = type(unet).from_config(unet.config)
    plain.load_state_dict(unet.state_dict())
    dk.inject_adapter(unet, dk.DeftConfig(r=2, init_weights=False), "a")
    dk.inject_adapter(unet, dk.DeftConfig(r=3, init_weights=False, target_modules=["to_q", "conv1", "to_out.0"]), "b")
    stir(unet, 0.1)
    dk.set_adapters(unet, ["a", "b"], [0.5, 2.0])
    dk.export_lora(unet, tmp_path / "a.safetensors", None, "kohya")
    assert metadata_of(tmp_path / "a.safetensors")["ss_network_dim"] == "Dynamic"
    assert metadata_of(tmp_path / "a.safetensors")["ss_network_alpha"] == "5"
    pipeline(diffusers.StableDiffusionPipeline, unet=plain).load_lora_weights(str(tmp_path / "a.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(run(plain), run(unet), **CLOSE)


def test_kohya_has_a_name_for_every_layer_of_a_unet():
    for build in (sd_like, sdxl_like):
        assert every_layer(build()[0], kohya=True) == every_layer(build()[0])


def test_text_encoders_go_into_the_same_file(tmp_path):
    """SDXL with both text encoders, in both formats."""
    config = CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=8, projection_dim=10)  # fmt: skip
    tokens = torch.randint(30, (2, 8))
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}

    def build():
        torch.manual_seed(3)
        unet, run = sdxl_like()
        return {"unet": unet.eval()} | {name: kind(config).eval() for name, kind in kinds.items()}, run

    def outputs(parts):
        with torch.no_grad():
            return [run(parts["unet"]), *(parts[n](tokens).last_hidden_state for n in kinds)]

    parts, run = build()
    before = outputs(parts)
    dk.inject_adapter(parts["unet"], dk.DeftConfig(r=2, init_weights=False))
    for name in kinds:
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        dk.inject_adapter(parts[name], dk.DeftConfig(r=3, target_modules=targets, init_weights=False))
    for part in parts.values():
        stir(part, 0.1)
    expected = outputs(parts)
    for format in ("diffusers", "kohya", "peft"):
        file = tmp_path / (format if format == "peft" else f"{format}.safetensors")
        errors = dk.export_lora(pipeline(diffusers.StableDiffusionXLPipeline, **parts), file, format=format)
        assert {name.split(".")[0] for name in errors} == set(parts)
        fresh = build()[0]
        pipe = pipeline(diffusers.StableDiffusionXLPipeline, **fresh)
        assert sorted(dk.import_lora(pipe, file)) == sorted(errors)
        for now, then, base in zip(outputs(fresh), expected, before):
            assert (then - base).abs().max() > 0.01
            torch.testing.assert_close(now, then, **CLOSE)
        if format != "peft":
            fresh = build()[0]
            pipeline(diffusers.StableDiffusionXLPipeline, **fresh).load_lora_weights(str(file))
            for now, then in zip(outputs(fresh), expected):
                torch.testing.assert_close(now, then, **CLOSE)
    with pytest.raises(ValueError, match=r"keys fit no adaptable layer of UNet2D.*wants the pipeline.*text_encoder"):
        dk.import_lora(build()[0]["unet"], tmp_path / "diffusers.safetensors")


IMAGES = """
import sys, torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
logging.disable_progress_bar()
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.load_lora_weights(sys.argv[2])
image = pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(image, sys.argv[3])
print([name for name in sys.modules if name.startswith("deft")])
"""


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_fresh_process_without_us_draws_the_same_picture(tmp_path, format):
    sys.path.insert(0, str(TESTS / "deft_diffusers"))
    from tiny_pipeline import python_environment, write_tiny_pipeline

    folder = write_tiny_pipeline(tmp_path / "base")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images

    before = draw()
    dk.inject_adapter(pipe.unet, dk.DeftConfig(r=2, init_weights=False))
    stir(pipe.unet)
    dk.merge(pipe.unet)
    dk.export_lora(pipe, tmp_path / "lora.safetensors", format=format)
    out = subprocess.run(
        [sys.executable, "-c", IMAGES, folder, tmp_path / "lora.safetensors", tmp_path / "image.pt"],
        env=python_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0 and out.stdout.strip() == "[]", out.stderr
    image = torch.load(tmp_path / "image.pt", weights_only=True)
    assert (image - before).abs().max() > 0.02  # of a range of 1
    torch.testing.assert_close(image, draw(), rtol=0, atol=1e-3)  # a quarter of a step of 8-bit pictures


def test_kohya_names_of_flux_by_diffusers_own_converter(tmp_path):
    """FLUX.1's own widths, which diffusers' converter has as constants; no weights are needed for that."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    from deft_kernels.adapters.lora import _Export, _kohya_state, _Pair

    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2)
    names = every_layer(flux, kohya=True)
    shapes = {name: flux.get_submodule(name).weight.shape for name in names}
    ranks = {name: 2 + (k % 2) for k, name in enumerate(names)}  # neighbours in one fused layer differ in rank
    pairs = {n: _Pair(torch.randn(m, ranks[n]), torch.randn(ranks[n], k), ranks[n], 0.0) for n, (m, k) in shapes.items()}
    del pairs["single_transformer_blocks.1.attn.to_k"]  # a part without an adapter
    layers = {name: dk.DeftLinear(flux.get_submodule(name)) for name in pairs}
    state, _ = _kohya_state({"transformer": _Export(flux, layers, pairs)}, {"transformer": flux})
    converted = _convert_kohya_flux_lora_to_diffusers(dict(state))
    for name, pair in pairs.items():
        B, A = (converted[f"transformer.{name}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(B[:64] @ A[:, :64], (pair.B[:64] @ pair.A[:, :64]))
    assert not converted["transformer.single_transformer_blocks.1.attn.to_k.lora_B.weight"].any()
    file = tmp_path / "kohya.safetensors"
    save_file(state, file)
    adapter = read_lora(flux, file)[""]  # and by our own reader, which leaves the zeros out
    assert adapter.tensors.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert torch.equal(adapter.tensors[name]["P"], pair.B) and torch.equal(adapter.tensors[name]["R"], pair.A)


def test_kohya_names_of_sd3(tmp_path):
    """As sd-scripts and ComfyUI have them; in and out by our own reader."""
    model, _, run, *_ = family("sd3", "kohya")
    dk.export_lora(model, tmp_path / "a.safetensors", format="kohya")
    state = load_file(tmp_path / "a.safetensors")
    ends = ("0_x_block_attn_qkv", "0_x_block_attn2_proj", "1_context_block_attn_qkv")
    assert {key.split(".")[0] for key in state} >= {f"lora_unet_joint_blocks_{end}" for end in ends}
    shapes = {end: [tuple(state[f"lora_unet_joint_blocks_0_{end}.lora_{side}.weight"].shape) for side in ("down", "up")]
              for end in ("x_block_mlp_fc1", "x_block_mlp_fc2", "context_block_mlp_fc1")}  # fmt: skip
    assert shapes == {"x_block_mlp_fc1": [(2, 16), (64, 2)], "x_block_mlp_fc2": [(2, 64), (16, 2)],
                      "context_block_mlp_fc1": [(2, 16), (64, 2)]}  # fmt: skip
    for key, names in (("1_x_block_attn", "qkv"), ("1_context_block_attn", "qkv")):  # rows of q above those of k and v
        up, down = (state[f"lora_unet_joint_blocks_{key}_qkv.lora_{side}.weight"] for side in ("up", "down"))
        block = model.transformer_blocks[1].attn
        for x, rows in zip(names, (up @ down).split(16)):
            layer = block.get_submodule(f"add_{x}_proj" if "context" in key else f"to_{x}")
            ((B, A),) = lora_factors({"x": layer}, {"x": {"default": 1.0}}).values()
            torch.testing.assert_close(rows, B @ A)
    expected = run(model)
    dk.eject(model)
    dk.import_lora(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(run(model), expected, **CLOSE)


def test_layers_and_models_without_a_name_in_kohyas_format(tmp_path):
    flux, _ = flux_like()
    dk.inject_adapter(flux, dk.DeftConfig(r=2, target_modules=["x_embedder", "to_q"]))
    with pytest.raises(ValueError, match="1 layers have no name in Kohya's format .*: x_embedder; format='diffusers'"):
        dk.export_lora(flux, tmp_path / "a.safetensors", format="kohya")
    with pytest.raises(ValueError, match="Kohya's names for a Model are not known here: export with format='diffusers'"):
        dk.export_lora(adapted(), tmp_path / "a.safetensors", format="kohya", prefix="unet")
    with pytest.raises(ValueError, match="what a pipeline calls a Model is not known: give prefix='unet'"):
        dk.export_lora(adapted(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# Sums, truncation, smaller types --------------------------------------------------------------------------------------


def test_a_weighted_sum_in_one_file(tmp_path):
    model = adapted("qr")
    adapted("para", "gone", model, target_modules=["to_q", "to_v"])
    adapted("lora", "lora", model, r=2)
    names, weights = ["default", "gone", "lora"], [0.5, -1.25, 2.0]
    with pytest.raises(ValueError, match="no adapter named 'gnoe'; the model has default, gone, lora"):
        dk.export_lora(model, tmp_path, ["default", "gnoe"], "peft")
    dk.export_lora(model, tmp_path, names, "peft", weights=weights)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == {"^blocks.0.to_q": 8, "^blocks.1.to_q": 8, "^blocks.0.to_v": 3, "^blocks.1.to_v": 3}
    x = torch.randn(2, 3, 4, 4)
    dk.set_adapters(model, names, weights)
    expected = model(x)
    torch.testing.assert_close(PeftModel.from_pretrained(seeded_model(), tmp_path)(x), expected, **CLOSE)
    dk.export_lora(model, tmp_path / "active", None, "peft")  # the active ones at their strengths
    other = seeded_model()
    dk.import_lora(other, tmp_path / "active", "sum")
    torch.testing.assert_close(other(x), expected, **CLOSE)
    dk.save_adapter(other, tmp_path / "again", "sum")  # ranks that differ survive our own files too
    once_more = seeded_model()
    dk.load_adapter(once_more, tmp_path / "again")
    assert torch.equal(once_more(x), other(x))
    torch.testing.assert_close(PeftModel.from_pretrained(seeded_model(), tmp_path / "again")(x), expected, **CLOSE)


def test_truncation_is_the_best_and_its_error_is_told(tmp_path):
    model = adapted("qr", r=6)
    errors = dk.export_lora(model, tmp_path, "default", "peft", rank=2)
    state = load_file(tmp_path / "adapter_model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (dk.DeftLinear, dk.DeftConv2d))}
    for name, (B, A) in lora_factors(layers, {name: {"default": 1.0} for name in layers}).items():
        S = torch.linalg.svdvals((B @ A).double())
        best = float(S[2:].norm() / S.norm())
        stored = [state[f"base_model.model.{name}.lora_{side}.weight"].flatten(1) for side in "BA"]
        assert stored[1].shape[0] == 2
        whole = (B @ A).double()
        measured = float((stored[0].double() @ stored[1].double() - whole).norm() / whole.norm())
        assert 0.01 < best < 1
        assert [errors[name], measured] == pytest.approx([best, best], rel=1e-5)
    told = json.loads(metadata_of(tmp_path / "adapter_model.safetensors")["deft_kernels"])
    assert told == {"made_of": {"default": "qr, rank 6, strength 1"}, "relative_error": errors}
    assert set(dk.export_lora(model, tmp_path, "default", "peft", rank=6).values()) == {0.0}
    kept, rest = truncate(torch.randn(9, 4), torch.randn(4, 11), 3)
    assert kept[0].shape == (9, 3) and rest[1].shape == (1, 11)


def test_truncation_makes_nothing_of_the_size_of_a_weight():
    """m x n would be 40 GB here."""
    B, A = torch.randn(100_000, 4), torch.randn(4, 100_000)
    (kept_B, kept_A), (rest_B, rest_A) = truncate(B, A, 3)
    torch.testing.assert_close(kept_B[:50] @ kept_A[:, :50] + rest_B[:50] @ rest_A[:, :50], B[:50] @ A[:, :50], **CLOSE)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_smaller_types_tell_what_they_cost(tmp_path, dtype, bound):
    """Two roundings of relative size 2^-11 (2^-8), one in each factor."""
    model = adapted("qr", r=4)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (dk.DeftLinear, dk.DeftConv2d))}
    exact = lora_factors(layers, {name: {"default": 1.0} for name in layers})
    for rank in (None, 2):
        errors = dk.export_lora(model, tmp_path, "default", "peft", dtype=dtype, rank=rank)
        state = load_file(tmp_path / "adapter_model.safetensors")
        assert {t.dtype for t in state.values()} == {dtype}
        for name, (B, A) in exact.items():
            stored = [state[f"base_model.model.{name}.lora_{side}.weight"].flatten(1).double() for side in "BA"]
            whole = B.double() @ A.double()
            measured = float((stored[0] @ stored[1] - whole).norm() / whole.norm())
            assert errors[name] == pytest.approx(measured, rel=1e-3)
            assert rank or 0 < measured < bound
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "deft_R" in n).fill_(1e6)
    with pytest.raises(ValueError, match="conv_in: its factors are too large for torch.float16: export in float32"):
        dk.export_lora(model, tmp_path, format="peft", dtype=torch.float16)


@pytest.mark.parametrize("change, message", [
    ({"format": "lycoris"}, "format 'lycoris': expected one of diffusers, kohya, peft"),
    ({"dtype": torch.int8}, "dtype torch.int8: expected float32, float16 or bfloat16"),
    ({"rank": 0}, "rank is 0, expected a rank of at least 1"),
    ({"rank": True}, "rank is True"),
    ({"adapter_name": "defualt"}, "no adapter named 'defualt'; the model has default"),
    ({"weights": float("nan")}, "are not all finite"),
    ({"adapter_name": None, "weights": 2.0}, "weights belong to adapters that are named"),
])  # fmt: skip
def test_what_cannot_be_exported(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        dk.export_lora(adapted(), tmp_path / "x", **{"format": "peft", **change})
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind_than_the_format(tmp_path):
    unet, _ = sd_like()
    dk.inject_adapter(unet, dk.DeftConfig(r=2))
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet=unet)
    (tmp_path / "plain").write_text("x")
    with pytest.raises(ValueError, match="x.safetensors: format 'peft' is a folder of two files"):
        dk.export_lora(unet, tmp_path / "x.safetensors", format="peft")
    for format in ("peft", "diffusers"):
        with pytest.raises(ValueError, match="plain is a file: give a folder, or the name of a .safetensors file"):
            dk.export_lora(unet, tmp_path / "plain", format=format)
    with pytest.raises(ValueError, match="prefix='transformer' is for a module alone: the parts .* have names, unet"):
        dk.export_lora(pipe, tmp_path / "x.safetensors", prefix="transformer")
    assert [f.name for f in tmp_path.iterdir()] == ["plain"] and (tmp_path / "plain").read_text() == "x"


def test_values_that_are_not_finite_are_not_exported(tmp_path):
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "deft_R" in n)[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"conv_in.deft_R.default has values that are not finite \(1 such tensors\)$"):
        dk.export_lora(model, tmp_path / "x", format="peft")
    with pytest.raises(TypeError, match="this is the adapted layer itself: .* give the model that holds it"):
        dk.export_lora(model.conv_in, tmp_path / "x", format="peft")
    with pytest.raises(ValueError, match=r"x.pt: LoRA files are written as .safetensors"):
        dk.export_lora(model, tmp_path / "x.pt", format="kohya")
    with pytest.raises(ValueError, match="Model has no adapter: call deft_kernels.inject_adapter"):
        dk.export_lora(seeded_model(), tmp_path / "x", format="peft")


@pytest.mark.parametrize("para", [False, True])
def test_a_layer_known_by_its_output_alone(tmp_path, para):
    """A quantised layer's stand-in: K^T W comes from the layer itself."""
    torch.manual_seed(0)
    base = Opaque(6, 5)
    model = torch.nn.Sequential(base)
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=["0"], init_weights=False, para=para))
    x = torch.randn(3, 6)
    dk.export_lora(model, tmp_path, format="peft")
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5))
    plain[0].load_state_dict(base.state_dict())
    assert (plain(x) - model(x)).abs().max() > 0.01
    dk.import_lora(plain, tmp_path)
    torch.testing.assert_close(plain(x), model(x), **CLOSE)


# In: what others write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"r": 3, "lora_alpha": 6},
    {"r": 4, "lora_alpha": 2, "rank_pattern": {"blocks.0.to_q": 2, "to_v": 3}},
    {"r": 4, "lora_alpha": 2, "rank_pattern": {"^blocks.0.to_q": 6}, "alpha_pattern": {"conv_in": 9, r"blocks\.1\..*": 0.5}},
    {"r": 4, "lora_alpha": 2, "use_rslora": True, "rank_pattern": {"to_v": 2}},
])  # fmt: skip
def test_pefts_own_files(tmp_path, options):
    """Rank and alpha patterns, rank stabilisation, convolutions: equal to PEFT."""
    config = PeftLora(target_modules=["to_q", "to_v", "conv_in", "to_out.0"], init_lora_weights=False, **options)
    peft = get_peft_model(seeded_model(), config)
    peft.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 4, 4)
    for load in (dk.import_lora, dk.load_adapter):
        model = seeded_model()
        assert len(load(model, tmp_path)) == 7
        torch.testing.assert_close(model(x), peft(x), **CLOSE)
        dk.save_adapter(model, tmp_path / "again")
        again = PeftModel.from_pretrained(seeded_model(), tmp_path / "again")
        torch.testing.assert_close(again(x), peft(x), **CLOSE)


def lora_on_unet(**options):
    """A tiny Stable Diffusion UNet with diffusers' own LoRA on it, and the same UNet without."""
    torch.manual_seed(2)
    unet, run = sd_like()
    plain = diffusers.UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict())
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"]
    unet.add_adapter(PeftLora(target_modules=targets, init_lora_weights=False, **options))
    return unet.eval(), plain.eval(), run


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("options", [{"r": 3, "lora_alpha": 3}, {"r": 3, "lora_alpha": 3, "rank_pattern": {"conv1": 2},
                                                                 "alpha_pattern": {"conv1": 2}}])  # fmt: skip
def test_diffusers_own_files(tmp_path, options, with_metadata):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    if with_metadata:  # which alone tells an alpha that is not the rank
        options = options | {"lora_alpha": 5}
    unet, plain, run = lora_on_unet(**options)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if with_metadata else {}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, layers, **metadata)
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet=plain)
    names = dk.import_lora(pipe, tmp_path)
    assert len(names) == 48 and all(name.startswith("unet.") for name in names)
    torch.testing.assert_close(run(plain), run(unet), **CLOSE)


@pytest.mark.parametrize("options", [
    {"r": 3, "lora_alpha": 9}, {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_q": 2}},
    {"r": 3, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"conv1": 1}},
])  # fmt: skip
def test_a_models_own_save_lora_adapter(tmp_path, options):
    """Bare keys and bare metadata, which alone tells alphas: as diffusers loads it again itself."""
    unet, plain, run = lora_on_unet(**options)
    unet.save_lora_adapter(tmp_path)
    again = lora_on_unet()[1]
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    torch.testing.assert_close(run(again), run(unet), **CLOSE)
    before = run(plain)
    assert (run(again) - before).abs().max() > 0.01
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet=plain)
    for target, load in ((plain, dk.import_lora), (pipe, dk.import_lora), (plain, dk.load_adapter)):
        assert len(load(target, tmp_path)) == 48
        torch.testing.assert_close(run(plain), run(again), **CLOSE)
        dk.eject(plain)


def test_metadata_of_something_else(tmp_path):
    unet, file = a_file(tmp_path)
    dk.eject(unet)
    for told, message in (
        ({"text_encoder.r": 2}, "its lora_adapter_metadata describes text_encoder, expected ''"),
        ({"r": 2, "lora_alpha": 4, "peft_type": "LORA", "use_dora": True}, "do not have: use_dora"),
    ):
        save_file(load_file(file), tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(told)})
        with pytest.raises(ValueError, match=message):
            dk.import_lora(unet, tmp_path / "b.safetensors")


def old_style(state):
    """The keys of diffusers before PEFT: attention processors."""
    for key, t in state.items():
        key = key.replace(".lora_A.weight", ".lora.down.weight").replace(".lora_B.weight", ".lora.up.weight")
        key = key.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.")
        for name in ("to_q", "to_k", "to_v"):
            key = key.replace(f".{name}.lora.", f".{name}_lora.")
        yield key.replace(".to_out.0.lora.", ".to_out_lora."), t


def test_diffusers_old_keys(tmp_path):
    from peft import get_peft_model_state_dict

    unet, plain, run = lora_on_unet(r=2, lora_alpha=2)
    state = {f"unet.{key}": t for key, t in get_peft_model_state_dict(unet).items()}
    save_file(dict(old_style(state)), tmp_path / "old.safetensors")
    for target in (plain, pipeline(diffusers.StableDiffusionPipeline, unet=plain)):
        assert len(dk.import_lora(target, tmp_path / "old.safetensors")) == 48
        torch.testing.assert_close(run(plain), run(unet), **CLOSE)
        dk.eject(plain)


@pytest.mark.parametrize("alphas", [(2.0, 2.0), (0.5, 2.0)])
def test_kohyas_alphas_and_ranks(tmp_path, alphas):
    """Alphas that are not the ranks, ranks that differ: equal to what diffusers makes of the file. Where alphas differ it
    takes the commonest for all attention layers, so there the weights are made by hand."""
    unet, run = sdxl_like()
    plain = diffusers.UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict())
    state = {}
    for k, (name, layers) in enumerate(kohya_names(unet, every_layer(unet)).items()):
        weight, r = unet.get_submodule(layers[0]).weight, 1 + k % 3
        conv = weight.dim() == 4
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = torch.randn(r, *weight.shape[1:]) * 0.1
        state[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], r, *(1, 1) * conv) * 0.1
        state[f"{key}.alpha"] = torch.tensor(alphas[k % 2])
        if alphas[0] != alphas[1]:
            down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
            update = (up.flatten(1) @ down.flatten(1)).view(weight.shape) * (alphas[k % 2] / r)
            plain.get_submodule(layers[0]).weight.data += update
    file = tmp_path / "kohya.safetensors"
    save_file(state, file)
    if alphas[0] == alphas[1]:
        pipeline(diffusers.StableDiffusionXLPipeline, unet=plain).load_lora_weights(str(file))
    names = dk.import_lora(unet, file)
    assert len(names) == len(state) / 3
    with torch.no_grad():
        torch.testing.assert_close(run(unet), run(plain), **CLOSE)


def test_comfyuis_names(tmp_path):
    """The authors' names with dots, as ComfyUI saves them."""
    model, _, run, _, _, names = family("flux", "kohya")
    dk.export_lora(model, tmp_path / "kohya.safetensors", format="kohya")
    state = {}
    for name, layers in kohya_names(model, set(every_layer(model))).items():
        if layers[0] in names:
            key = f"lora_unet_{name.replace('.', '_')}"
            state[f"diffusion_model.{name}.alpha"] = load_file(tmp_path / "kohya.safetensors")[f"{key}.alpha"]
            for end, side in (("down", "A"), ("up", "B")):
                t = load_file(tmp_path / "kohya.safetensors")[f"{key}.lora_{end}.weight"]
                state[f"diffusion_model.{name}.lora_{side}.weight"] = t
    save_file(state, tmp_path / "comfy.safetensors")
    expected = run(model)
    dk.eject(model)
    assert sorted(dk.import_lora(model, tmp_path / "comfy.safetensors")) == names
    torch.testing.assert_close(run(model), expected, **CLOSE)


def test_names_that_only_diffusers_knows(tmp_path):
    """FLUX.2's own names, by the pipeline's converter."""
    with torch.device("cpu"):
        flux2 = diffusers.Flux2Transformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
        )  # fmt: skip
    weight = flux2.transformer_blocks[0].attn.to_out[0].weight
    state = {
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": torch.randn(2, weight.shape[1]),
        "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": torch.randn(weight.shape[0], 2),
    }
    save_file(state, tmp_path / "bfl.safetensors")
    with pytest.raises(ValueError, match="2 of 2 keys fit no adaptable layer of Flux2Transformer2DModel"):
        dk.import_lora(flux2, tmp_path / "bfl.safetensors")
    pipe = pipeline(diffusers.Flux2Pipeline, transformer=flux2)
    assert dk.import_lora(pipe, tmp_path / "bfl.safetensors") == ["transformer.transformer_blocks.0.attn.to_out.0"]


def entry(key, weight, r=4, alpha=None):
    """A LoRA in Kohya's naming."""
    down, up = torch.randn(r, weight.shape[1]) * 0.3, torch.randn(weight.shape[0], r) * 0.3
    made = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return made | ({} if alpha is None else {f"{key}.alpha": torch.tensor(float(alpha))})


def tiny_clip():
    return CLIPTextModel(CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=8))  # fmt: skip


def tiny_t5():
    return T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def update(adapter, name):
    roles, config = adapter.tensors[name], adapter.config
    return roles["P"] @ roles["R"] * config.scale(roles["P"].shape[1])


def test_diffusers_converters_get_only_what_is_unknown_here(tmp_path):
    """One key of FLUX.1 that only diffusers knows, among those of T5 and of blocks that are known here: all come, each with
    its alpha."""
    torch.manual_seed(1)
    flux, _ = flux_like()
    encoders = {"text_encoder": tiny_clip(), "text_encoder_2": tiny_t5()}
    pipe = pipeline(diffusers.FluxPipeline, transformer=flux, **encoders)
    wanted = {
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q"): "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ("transformer", "transformer_blocks.0.attn.to_out.0"): "lora_unet_double_blocks_0_img_attn_proj",
        ("transformer", "proj_out"): "lora_unet_final_layer_linear",
        ("transformer", "x_embedder"): "lora_unet_img_in",
    }
    state, exact = {}, {}
    for alpha, ((part, name), key) in enumerate(wanted.items(), 1):
        made = entry(key, pipe.components[part].get_submodule(name).weight, alpha=alpha)
        exact[part, name] = made[f"{key}.lora_up.weight"] @ made[f"{key}.lora_down.weight"] * (alpha / 4)
        state |= made
    save_file(state, tmp_path / "a.safetensors")
    read = read_lora(pipe, tmp_path / "a.safetensors")
    assert {(part, name) for part, adapter in read.items() for name in adapter.tensors} == set(wanted)
    for (part, name), expected in exact.items():
        torch.testing.assert_close(update(read[part], name), expected)
    junk = entry("lora_unet_double_blocks_7_img_mlp_9", flux.x_embedder.weight, alpha=1)
    save_file(state | junk, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="3 of 15 keys fit no .*: lora_unet_double_blocks_7_img_mlp_9.alpha"):
        dk.import_lora(pipe, tmp_path / "b.safetensors")


@pytest.mark.parametrize("more", ["transformer_blocks.0.attn.to_k.lora_A.weight.alpha", "single_blocks.9.x.alpha"])
def test_an_alpha_without_its_pair(tmp_path, more):
    torch.manual_seed(1)
    flux, _ = flux_like()
    state = {}
    for name, weight in ((n, flux.get_submodule(n).weight) for n in ("transformer_blocks.0.attn.to_q", "proj_out")):
        state |= {f"transformer.{name}.lora_A.weight": torch.randn(4, weight.shape[1])}
        state |= {f"transformer.{name}.lora_B.weight": torch.randn(weight.shape[0], 4)}
        state |= {f"transformer.{name}.alpha": torch.tensor(1.0)}
    pipe = pipeline(diffusers.FluxPipeline, transformer=flux)
    save_file(state, tmp_path / "a.safetensors")
    adapter = read_lora(pipe, tmp_path / "a.safetensors")["transformer"]
    B, A = (state[f"transformer.proj_out.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(update(adapter, "proj_out"), B @ A / 4)
    save_file(state | {f"transformer.{more}": torch.tensor(1.0)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=f"1 of 7 keys fit no adaptable layer of FluxTransformer2D.*: transformer.{more}"):
        dk.import_lora(pipe, tmp_path / "b.safetensors")


def test_t5_in_kohyas_format(tmp_path):
    """Prefix, names and alpha as sd-scripts has them, and back."""
    t5 = tiny_t5().eval()
    dk.inject_adapter(t5, dk.LoraConfig(r=2, target_modules=["q", "wo"], init_weights=False))
    dk.export_lora(t5, tmp_path / "a.safetensors", format="kohya")
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "a.safetensors").items()}
    block = "lora_te3_encoder_block_0_layer"
    ends = {f"{block}_0_SelfAttention_q": (16, 16), f"{block}_1_DenseReluDense_wo": (16, 24)}
    assert shapes == {k: v for stem, (m, n) in ends.items() for k, v in (
        (f"{stem}.lora_down.weight", (2, n)), (f"{stem}.lora_up.weight", (m, 2)), (f"{stem}.alpha", ()))}  # fmt: skip
    tokens = torch.randint(30, (2, 5))
    expected = t5(tokens).last_hidden_state
    dk.eject(t5)
    assert (t5(tokens).last_hidden_state - expected).abs().max() > 1e-3
    assert len(dk.import_lora(t5, tmp_path / "a.safetensors")) == 2
    torch.testing.assert_close(t5(tokens).last_hidden_state, expected, **CLOSE)


def test_a_fused_layer_at_its_start_comes_back(tmp_path):
    """B is zero, which tells nothing of which of the layers it is: all of them have it."""
    flux, _ = flux_like()
    dk.inject_adapter(flux, dk.LoraConfig(r=2, target_modules=["transformer_blocks.0.attn.to_q"]))
    dk.export_lora(flux, tmp_path / "a.safetensors", format="kohya")
    dk.eject(flux)
    names = dk.import_lora(flux, tmp_path / "a.safetensors")
    assert names == [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert not any(flux.get_submodule(name).adapter_tensors("default")["P"].any() for name in names)


def test_where_latent_diffusion_has_its_upsamplers():
    """After the attentions of an output block, where it has some (SDXL), or else after its one residual block."""
    names = {"up_blocks.0.attentions.0.proj_in", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"}
    assert _latent_diffusion("up_blocks.0.upsamplers.0.conv", 2, names) == "output_blocks.2.2.conv"
    assert _latent_diffusion("up_blocks.1.upsamplers.0.conv", 2, names) == "output_blocks.5.1.conv"


def test_what_peft_wrote_for_a_text_encoder_goes_there(tmp_path):
    unet, encoder = sd_like()[0], tiny_clip()
    dk.inject_adapter(encoder, dk.LoraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet=unet, text_encoder=encoder)
    dk.export_lora(pipe, tmp_path / "pipe", format="peft")
    dk.export_lora(encoder, tmp_path / "module", format="peft")
    assert [f.name for f in (tmp_path / "pipe").iterdir()] == ["text_encoder"]
    dk.eject(encoder)
    for source in ("pipe", "module", "module/adapter_model.safetensors"):
        (name,) = dk.import_lora(pipe, tmp_path / source)
        assert name.startswith("text_encoder.") and name.endswith("layers.0.self_attn.q_proj")
        dk.eject(encoder)


def test_parts_and_their_adapters_are_told_apart(tmp_path):
    unet, encoder = sd_like()[0], tiny_clip()
    dk.inject_adapter(unet, dk.DeftConfig(r=2))
    dk.inject_adapter(encoder, dk.LoraConfig(r=3, target_modules=["out_proj"]))
    dk.export_lora(pipeline(diffusers.StableDiffusionPipeline, unet=unet, text_encoder=encoder), tmp_path / "a.safetensors")
    assert json.loads(metadata_of(tmp_path / "a.safetensors")["deft_kernels"])["made_of"] == {
        "unet.default": "qr, rank 2, strength 1", "text_encoder.default": "lora, rank 3, strength 1"}  # fmt: skip


# In: what is refused --------------------------------------------------------------------------------------------------

STEM = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def a_file(tmp_path):
    unet, _ = sd_like()
    dk.inject_adapter(unet, dk.LoraConfig(r=2, init_weights=False))
    dk.export_lora(unet, tmp_path / "a.safetensors")
    return unet, tmp_path / "a.safetensors"


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update({f"{STEM}.lora_magnitude_vector": torch.ones(16)}), "1 of 65 keys belong to DoRA, .*lora_magnitude"),
    (lambda s: s.update({f"{STEM}.dora_scale": torch.ones(16)}), "1 of 65 keys belong to DoRA, which these layers"),
    (lambda s: s.update({f"{STEM}.lora_B.bias": torch.ones(16)}), "1 of 65 keys belong to a bias"),
    (lambda s: s.update({f"{STEM}.hada_w1_a": torch.ones(16, 2), f"{STEM}.lokr_w1": torch.ones(2)}), "LoHa, LoKr"),
    (lambda s: s.update({f"{STEM}.oft_diag": torch.ones(2)}), "1 of 65 keys belong to OFT or BOFT"),
    (lambda s: s.update({f"{STEM}.a1.weight": torch.ones(2)}), "1 of 65 keys belong to GLoRA"),
    (lambda s: s.update({f"{STEM}.on_input": torch.ones(2)}), "1 of 65 keys belong to IA3"),
    (lambda s: s.update({f"{STEM}.diff": torch.ones(2)}), "1 of 65 keys belong to a full difference"),
    (lambda s: s.update({"x.diffusion_model.to_q.lora_A.weight": torch.ones(2)}), "1 of 65 keys fit no .*: x.diff"),
    (lambda s: s.update({f"{STEM}.lora_A.weight": torch.ones(0, 16), f"{STEM}.lora_B.weight": torch.ones(16, 0)}),
     r"wrong shapes: mid_block\S*to_q \(P: of rank 0, expected at least 1\)"),
    (lambda s: s.update({f"{STEM}.alpha": torch.tensor(1e38), f"{STEM}.lora_B.weight": torch.full((16, 2), 1e5)}),
     r"P of mid_block\S*to_q has values of up to 5e\+42 \(alpha / r is 5e\+37\), expected below 1.15e\+18"),
    (lambda s: s.update({"unet.tail.lora_A.weight": torch.ones(2)}), "1 of 65 keys fit no .*: unet.tail"),
    (lambda s: s.pop(f"{STEM}.lora_A.weight"), r"1 tensors are missing: mid_block.*to_q \(R\)"),
    (lambda s: s.pop(f"{STEM}.lora_B.weight"), r"1 tensors are missing: mid_block.*to_q \(P\)"),
    (lambda s: s.update({f"{STEM}.lora_B.weight": torch.ones(16, 3)}), r"shapes: .*\(P: \(16, 3\), expected \(16, 2\)\)"),
    (lambda s: s.update({f"{STEM}.lora_A.weight": torch.ones(2, 9)}), r"shapes: .*\(R: \(2, 9\), expected \(2, 16\)\)"),
    (lambda s: s[f"{STEM}.lora_A.weight"].fill_(float("nan")), "R of mid_block.*to_q has values that are not finite"),
    (lambda s: s.update({f"{STEM}.alpha": torch.tensor(float("inf"))}), r"alpha is \(\) torch.float32, expected one finite"),
    (lambda s: s.update({f"{STEM}.lora_down.weight": torch.ones(2, 16)}), "R of mid_block.*to_q is there twice"),
    (lambda s: s.clear(), "holds no LoRA tensors"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_listed_and_refused(tmp_path, change, message):
    unet, file = a_file(tmp_path)
    dk.eject(unet)
    state = load_file(file)
    change(state)
    save_file(state, file)
    before = fingerprint(unet)
    with pytest.raises(ValueError, match=message) as error:
        dk.import_lora(unet, file)
    assert str(file) in str(error.value)
    assert_untouched(unet, before)


def test_a_file_for_another_architecture(tmp_path):
    _, file = a_file(tmp_path)
    flux, _ = flux_like()
    with pytest.raises(ValueError, match="64 of 64 keys fit no adaptable layer of FluxTransformer2DModel .*: unet"):
        dk.import_lora(flux, file)
    wide = diffusers.UNet2DConditionModel.from_config({**sd_like()[0].config, "cross_attention_dim": 24})
    with pytest.raises(ValueError, match=r"8 tensors have wrong shapes: .*attn2.to_k \(R: \(2, 16\), expected \(2, 24\)\)"):
        dk.import_lora(wide, file)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        dk.import_lora(flux, tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights.safetensors does not exist"):
        (tmp_path / "empty").mkdir()
        dk.import_lora(flux, tmp_path / "empty")


def test_another_base_warns_with_both(tmp_path):
    unet, file = a_file(tmp_path)
    dk.export_lora(unet, tmp_path / "peft", format="peft")
    dk.eject(unet)
    dk.import_lora(unet.half(), file)  # the same, in half
    other, _ = sd_like()
    with pytest.warns(UserWarning, match=r"for another base model \(weights differ by .*: \S+ begins with \[.*, …\] in the "
                                         r"file's fingerprint and with \[.*, …\] here\)"):  # fmt: skip
        dk.import_lora(other, file)
    for load in (dk.import_lora, dk.load_adapter):
        with pytest.warns(UserWarning, match="made for another base model"):
            load(sd_like()[0], tmp_path / "peft")


def test_one_part_that_fails_leaves_all_as_they_were(tmp_path):
    unet, file = a_file(tmp_path)
    dk.eject(unet)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                           num_attention_heads=2, max_position_embeddings=8))  # fmt: skip
    state = load_file(file)
    for name, shape in (("A", (2, 16)), ("B", (16, 2))):
        state[f"text_encoder.encoder.layers.0.self_attn.q_proj.lora_{name}.weight"] = torch.ones(shape)
    save_file(state, file)
    dk.inject_adapter(encoder, dk.LoraConfig(r=1, target_modules=["k_proj"]), "taken")
    before = fingerprint(unet)
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet=unet, text_encoder=encoder)
    with pytest.raises(ValueError, match="has an adapter named 'taken' already"):
        dk.import_lora(pipe, file, "taken")
    assert_untouched(unet, before)
    dk.inject_adapter(unet, dk.DeftConfig(r=1, target_modules=["conv_in"]), "first")  # what was active is so again
    with pytest.raises(ValueError, match="has an adapter named 'taken' already"):
        dk.import_lora(pipe, file, "taken")
    assert unet.conv_in.active == ["first"] and unet.conv_in.deft_P["first"].requires_grad
    dk.eject(unet)
    assert_untouched(unet, before)


def test_what_was_together_is_so_again_where_loading_fails(tmp_path):
    unet, file = a_file(tmp_path)
    dk.eject(unet)
    encoder, state = tiny_clip(), load_file(file)
    for name, shape in (("A", (2, 16)), ("B", (16, 2))):
        state[f"text_encoder.encoder.layers.0.self_attn.q_proj.lora_{name}.weight"] = torch.ones(shape)
    save_file(state, file)
    dk.inject_adapter(encoder, dk.LoraConfig(r=1, target_modules=["k_proj"]), "taken")
    for name in "pq":
        dk.inject_adapter(unet, dk.DeftConfig(r=2, para=True, init_weights=False), name)
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet=unet, text_encoder=encoder)
    layer = unet.get_submodule(STEM.removeprefix("unet."))
    dk.set_adapters(unet, ["p", "q"], combine="joint")
    with pytest.raises(ValueError, match="has an adapter named 'taken' already"):
        dk.import_lora(pipe, file, "taken")
    assert layer.combination == "joint" and layer.strengths == {"p": 1.0, "q": 1.0}
    dk.route_adapters(unet, ["p", "base"])
    with pytest.raises(ValueError, match="has an adapter named 'taken' already"):
        dk.import_lora(pipe, file, "taken")
    assert layer.routes.samples == [("p", 1.0), (None, 1.0)]


def test_two_adapters_in_one_folder(tmp_path):
    unet, _ = a_file(tmp_path)
    dk.export_lora(unet, tmp_path / "two", format="peft")
    dk.export_lora(unet, tmp_path / "two")
    dk.eject(unet)
    with pytest.raises(ValueError, match="two holds two adapters, adapter_model.safetensors and pytorch_lora_weights"):
        dk.import_lora(unet, tmp_path / "two")
    for name in ("adapter_model", "pytorch_lora_weights"):
        assert len(dk.import_lora(unet, tmp_path / "two" / f"{name}.safetensors", name)) == 32


def test_several_files_without_a_name(tmp_path):
    unet, file = a_file(tmp_path)
    dk.eject(unet)
    assert len(dk.import_lora(unet, tmp_path)) == 32  # the only one there
    file.rename(tmp_path / "b.safetensors")
    save_file(load_file(tmp_path / "b.safetensors"), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files, and none is pytorch_lora_weights.safetensors: name"):
        dk.import_lora(unet, tmp_path, "again")
    assert len(dk.import_lora(unet, tmp_path, "again", weight_name="c.safetensors")) == 32


def test_a_hub_id_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="(?s)hf download someone/lora-cat .*pass its path"):
        dk.import_lora(seeded_model(), "someone/lora-cat")


def test_trainable_and_active_as_asked(tmp_path):
    unet, file = a_file(tmp_path)
    dk.eject(unet)
    dk.import_lora(unet, file, "trained", trainable=True)
    dk.import_lora(unet, file, "waiting", activate=False)
    layer = unet.get_submodule(STEM.removeprefix("unet."))
    assert layer.active == ["trained"] and sorted(layer.configs) == ["trained", "waiting"]
    assert all(p.requires_grad for p in layer.adapter_tensors("trained").values())
    dk.set_adapters(unet, "waiting")
    assert not any(p.requires_grad for p in layer.adapter_tensors("waiting").values())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_the_base_of_every_part_is_known_in_every_format(tmp_path, format, part):
    torch.manual_seed(3)
    config = CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                            max_position_embeddings=8, projection_dim=10)  # fmt: skip
    parts = {"unet": sdxl_like()[0], "text_encoder": CLIPTextModel(config),
             "text_encoder_2": CLIPTextModelWithProjection(config)}  # fmt: skip
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, **parts)
    for module in parts.values():
        dk.inject_adapter(module, dk.LoraConfig(r=2))
    dk.export_lora(pipe, tmp_path / "a.safetensors", format=format)
    for module in parts.values():
        dk.eject(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.import_lora(pipe, tmp_path / "a.safetensors", "same")
    with torch.no_grad():
        for p in parts[part].parameters():
            p.mul_(1.5)
    with pytest.warns(UserWarning, match="made for another base model") as told:
        dk.import_lora(pipe, tmp_path / "a.safetensors", "other")
    assert [w.filename for w in told if "another base" in str(w.message)] == [__file__]


def test_a_deft_folder_is_no_lora(tmp_path):
    model = adapted("qr")
    dk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="is a DEFT adapter, no LoRA: load it by deft_kernels.load_adapter"):
        dk.import_lora(seeded_model(), tmp_path)
