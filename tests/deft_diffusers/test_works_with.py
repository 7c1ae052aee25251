"""What diffusers and accelerate do to a pipeline besides: offloading, device maps, slicing, tiling, compilation, fusion.

Without an accelerator everything is offloaded from the CPU to nowhere ("meta", with the values in main memory or on disk),
and brought back to the CPU: what is read while it is away shows.
"""

import accelerate
import pytest
import torch
from tiny_pipelines import PROMPT, build, denoiser, difference, draw

import deft_kernels as dk

CPU = torch.device("cpu")
CONFIGS = {
    "sdxl": dk.DeftConfig(r=2, gate=True, alpha=3, init_weights=False, init_scale=15,
                          target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]),
    "flux": dk.DeftConfig(r=2, init_weights=False, init_scale=15),
}  # fmt: skip
ROUNDING = 1e-5  # largest difference of two pictures in [0, 1] that differ by the order of sums in float32


def adapted(family, prepare=None):
    """A pipeline with an adapter, and what `prepare` does before that."""
    pipe = build(family)
    if prepare is not None:
        prepare(pipe)
    torch.manual_seed(0)
    dk.inject_adapter(pipe, CONFIGS[family])
    return pipe


@pytest.fixture(scope="module")
def pictures():
    """{family: {strength: picture}}, with nothing else done to the pipeline."""
    found = {}
    for family in CONFIGS:
        pipe = adapted(family)
        found[family] = {}
        for strength in (1.0, 0.4, 0.0):
            dk.set_adapters(pipe, "default", strength)
            found[family][strength] = draw(pipe, family)
        assert difference(found[family][1.0], found[family][0.4]) > 100 * ROUNDING
    return found


def group_offload(pipe, kind, folder=None):
    denoiser(pipe).enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=folder
    )


def dispatch(pipe):
    """A device map with hooks on every module, which is what from_pretrained(device_map=...) leaves behind."""
    model = denoiser(pipe)
    accelerate.dispatch_model(
        model, {name: "cpu" for name, _ in model.named_children()}, main_device="cpu", force_hooks=True
    )


OFFLOADING = {
    "weights in main memory": lambda pipe, folder: accelerate.cpu_offload(denoiser(pipe), CPU),
    "and buffers": lambda pipe, folder: accelerate.cpu_offload(denoiser(pipe), CPU, offload_buffers=True),
    "weights on disk": lambda pipe, folder: accelerate.disk_offload(denoiser(pipe), folder, CPU),
    "a model at a time": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "a device map": lambda pipe, folder: dispatch(pipe),
    "blocks": lambda pipe, folder: group_offload(pipe, "block_level"),
    "leaves": lambda pipe, folder: group_offload(pipe, "leaf_level"),
    "leaves on disk": lambda pipe, folder: group_offload(pipe, "leaf_level", str(folder)),
    "sliced attention, tiled VAE": lambda pipe, folder: [
        pipe.enable_attention_slicing(1), pipe.vae.enable_tiling(), pipe.vae.enable_slicing(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("how", OFFLOADING)
def test_the_same_pictures(pictures, tmp_path, family, how):
    pipe = adapted(family)
    state = dk.adapter_state_dict(pipe)
    OFFLOADING[how](pipe, tmp_path)
    for strength, picture in pictures[family].items():
        dk.set_adapters(pipe, "default", strength)
        assert difference(draw(pipe, family), picture) <= ROUNDING, strength
    saved = dk.adapter_state_dict(pipe)
    assert saved.keys() == state.keys() and all(torch.equal(t, saved[key]) for key, t in state.items())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("how", ["weights in main memory", "weights on disk", "a model at a time", "a device map", "leaves"])
def test_an_adapter_put_in_afterwards(pictures, tmp_path, family, how):
    pipe = adapted(family, lambda pipe: OFFLOADING[how](pipe, tmp_path))
    assert difference(draw(pipe, family), pictures[family][1.0]) <= ROUNDING
    dk.set_adapters(pipe, "default", 0.4)
    assert difference(draw(pipe, family), pictures[family][0.4]) <= ROUNDING


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("how", ["weights in main memory", "leaves on disk"])
def test_each_sample_its_own_adapter_while_offloaded(tmp_path, family, how):
    drawn = []
    for offload in (False, True):
        pipe = adapted(family)
        if offload:
            OFFLOADING[how](pipe, tmp_path)
        for names in (["default", "base"], ["base", "default"]):
            dk.route_adapters(pipe, names, [0.7, 0.7])
            drawn.append(draw(pipe, family, prompt=[PROMPT] * 2))
    assert difference(drawn[0], drawn[1]) > 100 * ROUNDING
    assert difference(drawn[0], drawn[2]) <= ROUNDING and difference(drawn[1], drawn[3]) <= ROUNDING


def test_the_identity_start_reads_an_offloaded_weight():
    pipe = build("flux")
    base = draw(pipe, "flux")
    accelerate.cpu_offload(pipe.transformer, CPU)
    dk.inject_adapter(pipe, dk.DeftConfig(r=2))
    assert min(p.norm() for p in dk.adapter_parameters(pipe)["R"]) > 0
    assert difference(draw(pipe, "flux"), base) <= ROUNDING


def test_a_model_loaded_partly_to_disk(pictures, tmp_path):
    pipe = build("sdxl")
    pipe.unet.save_pretrained(tmp_path / "unet")
    device_map = {name: "disk" if name == "up_blocks" else "cpu" for name, _ in pipe.unet.named_children()}
    pipe.unet = type(pipe.unet).from_pretrained(tmp_path / "unet", device_map=device_map, offload_folder=tmp_path / "disk")
    assert pipe.unet.up_blocks[0].resnets[0].conv1.weight.is_meta
    torch.manual_seed(0)
    dk.inject_adapter(pipe, CONFIGS["sdxl"])
    assert difference(draw(pipe, "sdxl"), pictures["sdxl"][1.0]) <= ROUNDING


def test_weights_that_are_away():
    pipe = adapted("flux")
    accelerate.cpu_offload(pipe.transformer, CPU)
    with pytest.raises(ValueError, match="attn.to_q: cannot merge into this layer: its weight is .*hooked"):
        dk.merge(pipe)
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).to("meta")
    with pytest.raises(ValueError, match="attn.to_q: its weight is on the meta device, not loaded and not offloaded either"):
        dk.inject_adapter(pipe, dk.DeftConfig(r=2))
    layer = dk.DeftLinear(torch.nn.Linear(4, 4), dk.DeftConfig(r=2))
    with pytest.raises(RuntimeError, match="the adapter is on cpu, its layer's input on meta: move the model there"):
        layer(torch.ones(3, 4, device="meta"))


@pytest.mark.parametrize("family", CONFIGS)
def test_fused_projections_are_refused_until_merged(pictures, family):
    """diffusers copies the weights of q, k and v into one layer, and calls the adapted ones no more."""
    message = r"attn\d?: its projections are fused, .* call the model's unfuse_qkv_projections\(\) first"
    pipe = adapted(family)
    model, expected = denoiser(pipe), pictures[family][1.0]
    with torch.no_grad():
        model.fuse_qkv_projections()
    for verb in (lambda: draw(pipe, family), lambda: dk.merge(pipe), lambda: dk.inject_adapter(pipe, CONFIGS[family], "b")):
        with pytest.raises(RuntimeError, match=message):
            verb()
    model.unfuse_qkv_projections()
    assert difference(draw(pipe, family), expected) <= ROUNDING
    dk.merge(pipe)
    with torch.no_grad():
        model.fuse_qkv_projections()
    assert difference(draw(pipe, family), expected) <= ROUNDING
    for verb in (lambda: dk.unmerge(pipe), lambda: dk.eject(pipe), lambda: dk.hotswap(pipe, "default", 0.4)):
        with pytest.raises(RuntimeError, match=message):
            verb()
    model.unfuse_qkv_projections()
    dk.hotswap(pipe, "default", 0.4)
    assert difference(draw(pipe, family), pictures[family][0.4]) <= ROUNDING


def test_compiled_whole_and_at_any_strength(pictures):
    """One graph with adapters, and no other for another strength."""
    pipe = adapted("flux")
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
    assert difference(draw(pipe, "flux"), pictures["flux"][1.0]) <= ROUNDING
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength, picture in pictures["flux"].items():
            dk.set_adapters(pipe, "default", strength)
            assert difference(draw(pipe, "flux"), picture) <= ROUNDING
    assert dk.list_adapters(pipe)["transformer"] == {"default": 0.0}
