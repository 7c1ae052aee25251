"""diffusers' own denoisers and transformers' text encoder, small, adapted whole."""

import dataclasses
import gc
import resource
from pathlib import Path

import pytest
import torch
from common import CONFIGS, gradients
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import deft_kernels as dk
from benchmarks import shapes
from deft_kernels.adapters.inject import match_targets
from deft_kernels.nn import DeftLayer


def sdxl_like():
    """SDXL's block layout and conditioning, a thousandth of its width."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10,
    )  # fmt: skip
    conditions = {"text_embeds": torch.randn(2, 10), "time_ids": torch.randn(2, 6)}
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 12))
    return unet, lambda m: m(*inputs, added_cond_kwargs=conditions, return_dict=False)[0]


def flux_like():
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(2, 9, 4), "encoder_hidden_states": torch.randn(2, 5, 12), "img_ids": torch.zeros(9, 3),
        "pooled_projections": torch.randn(2, 10), "timestep": torch.tensor([0.3, 0.9]), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return flux, lambda m: m(**kwargs, return_dict=False)[0]


def clip():
    model = CLIPTextModel(CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=8))  # fmt: skip
    tokens = torch.randint(30, (2, 8))
    return model, lambda m: m(tokens).last_hidden_state


CASES = {
    "sdxl": (sdxl_like, None, 64),
    "sdxl-all": (sdxl_like, ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.2"], 92),
    "flux": (flux_like, None, 11),
    "clip": (clip, ["q_proj", "k_proj", "v_proj", "out_proj"], 8),
}


def step(model, run):
    model.zero_grad()
    y = run(model)
    y.square().mean().backward()
    return y.detach(), gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_whole_models(case, tmp_path):
    build, targets, count = CASES[case]
    model, run = build()
    model.eval()
    with torch.no_grad():
        base = run(model)
    names = dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=targets))
    assert len(names) == count
    with torch.no_grad():
        torch.testing.assert_close(run(model), base)  # identity
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    model.train()
    y, grads = step(model, run)
    assert len(grads) == 2 * count
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(step(model, run), (y, grads))
        model.disable_gradient_checkpointing()
    model.eval()
    dk.save_adapter(model, tmp_path)
    dk.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model), y, rtol=1e-4, atol=1e-5)
    dk.eject(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model), base, rtol=1e-6, atol=1e-7)
        dk.load_adapter(model, tmp_path)
        torch.testing.assert_close(run(model), y, rtol=1e-4, atol=1e-5)


def test_default_targets_of_sdxl_itself():
    """560 layers and 0.955 G weights, as in the paper's SDXL runs; no memory is taken."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shapes.SDXL_UNET)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    names = match_targets(unet, dk.DeftConfig())
    assert len(names) == 560
    assert sum(unet.get_submodule(name).weight.numel() for name in names) == 955_187_200


@pytest.mark.parametrize("case", ["sdxl", "flux"])
def test_compiled_whole(case):
    build, targets, _ = CASES[case]
    model, run = build()
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=targets, init_weights=False))
    expected = step(model, run)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    y = run(compiled)
    y.square().mean().backward()
    torch.testing.assert_close((y.detach(), gradients(model)), expected, rtol=1e-4, atol=1e-6)


def memory() -> tuple[int, int]:
    """Resident bytes of this process, and tensors alive in it."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_a_servers_thousand_swaps(tmp_path, monkeypatch):
    """A compiled, merged denoiser serves twenty adapters in random order, half of them from files: no recompilation, no
    weight moved, every bit as if freshly loaded, no memory lost, the base back to the bit."""
    unet, run = sdxl_like()
    unet.eval()
    plain = {name: p.detach().clone() for name, p in unet.named_parameters()}
    fresh, methods = {}, ("qr", "relu", "para", "lora", "qr-gate-alpha")
    for i in range(20):
        config = dataclasses.replace(CONFIGS[methods[i % 5]], r=1 + i % 4, init_weights=False)
        if i % 3 == 0:
            config.target_modules = ["to_q", "to_v"]  # fewer layers than others
        name = f"a{i}" if i < 10 else str(tmp_path / f"a{i}")
        dk.inject_adapter(unet, config, "made")
        dk.save_adapter(unet, tmp_path / f"a{i}", "made")
        dk.eject(unet)
        dk.load_adapter(unet, tmp_path / f"a{i}")
        dk.merge(unet)
        fresh[name] = {
            k.replace("base_layer.", ""): p.detach().clone() for k, p in unet.named_parameters() if ".deft_" not in k
        }
        dk.eject(unet)

    dk.load_adapter(unet, tmp_path / "a1", "a1")
    for i in range(10):
        if i != 1:
            dk.load_adapter(unet, tmp_path / f"a{i}", f"a{i}")
    dk.merge(unet, "a1")
    weights = {k.replace("base_layer.", ""): p for k, p in unet.named_parameters() if ".deft_" not in k}
    where = {name: p.data_ptr() for name, p in weights.items()}
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    outputs, warmed = {}, None
    order = torch.randint(20, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    started = [0]
    monkeypatch.setattr(DeftLayer, "_start", lambda *args: started.append(1))  # no first values are drawn on the way
    random = torch.get_rng_state()
    with torch.no_grad():
        run(compiled)
        torch._dynamo.utils.counters.clear()
        for step, choice in enumerate(order):
            name = list(fresh)[choice]
            dk.hotswap(unet, name)
            assert all(torch.equal(p, fresh[name][k]) for k, p in weights.items()), (step, name)
            if step % 10 == 0:
                y = run(compiled)
                assert torch.equal(y, outputs.setdefault(name, y))
            if step == 200:
                warmed = memory()
    counters = torch._dynamo.utils.counters
    assert not counters["recompiles"] and not counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert started == [0] and torch.equal(torch.get_rng_state(), random)
    assert {name: p.data_ptr() for name, p in weights.items()} == where
    resident, tensors = memory()
    assert tensors <= warmed[1] + 200 and resident <= warmed[0] + 8 * 2**20, (warmed, resident, tensors)
    dk.unmerge(unet)
    assert all(torch.equal(p, plain[k]) for k, p in weights.items())
