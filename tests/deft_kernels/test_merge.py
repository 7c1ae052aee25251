"""merge, unmerge, hot-swap: in the same storage, from the pristine weights, back to the bit."""

import copy
import sys

import pytest
import torch
from common import CONFIGS, small_model
from safetensors.torch import load_file, save
from torch import nn
from transformers.pytorch_utils import Conv1D

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_in"]


def model_with_adapters(methods=("qr", "para", "lora"), dtype=torch.float32):
    model = small_model().to(dtype)
    for method in methods:
        config = copy.copy(CONFIGS[method])
        config.target_modules, config.init_weights = TARGETS, False
        dk.inject_adapter(model, config, method)
    return model.eval()


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}


def same_bits(model, before):
    def as_bytes(t):
        return t.detach().contiguous().view(torch.uint8)

    return all(torch.equal(as_bytes(p), as_bytes(before[name])) for name, p in model.named_parameters() if name in before)


def addresses(model):
    return [p.data_ptr() for name, p in model.named_parameters() if "base_layer" in name]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_exact_to_one_rounding(method, dtype):
    model = model_with_adapters([method], dtype)
    with torch.no_grad():
        for layer in adapted_layers(model).values():  # large enough that not merging would show in any dtype
            for p in layer.adapter_tensors(method).values():
                p.copy_(torch.randn_like(p) * 0.5)
    before, where = bits(model), addresses(model)
    exact, eps = copy.deepcopy(model).double(), torch.finfo(dtype).eps
    inputs = {k: torch.randn(9, 3, 4, 4) if "conv" in k else torch.randn(9, 8) for k in adapted_layers(model)}

    def outputs(model):
        with torch.no_grad():
            return {
                k: layer(inputs[k].to(dtype).to(layer.weight.dtype)).double() for k, layer in adapted_layers(model).items()
            }

    unmerged, truth = outputs(model), outputs(exact)
    dk.merge(model)
    dk.merge(exact)
    merged = outputs(model)
    assert addresses(model) == where
    for key, layer in adapted_layers(model).items():
        pristine, W = before[f"{key}.base_layer.weight"].double(), adapted_layers(exact)[key].weight
        fp32_accumulation = 1e-6 * W.abs().max() if dtype != torch.float64 else 1e-14 * W.abs().max()
        assert ((layer.weight.double() - W).abs() <= eps / 2 * W.abs() + fp32_accumulation).all()
        assert (W - pristine).norm() > 8 * eps * W.norm()
        error, unmerged_error = ((y[key] - truth[key]).norm() for y in (merged, unmerged))
        assert error <= 2 * unmerged_error + eps * truth[key].norm()
    dk.unmerge(model)
    assert same_bits(model, before)
    assert all(torch.equal(y, unmerged[k]) for k, y in outputs(model).items())


def test_merge_of_several_takes_each_from_the_pristine_weight():
    model, x = model_with_adapters(dtype=torch.float64), torch.randn(2, 3, 4, 4).double()
    strengths = {"qr": 0.7, "para": -1.2, "lora": 3.0}
    dk.set_adapters(model, list(strengths), list(strengths.values()))
    expected = model(x)
    dk.merge(model)
    torch.testing.assert_close(model(x), expected)
    dk.unmerge(model)
    dk.set_adapters(model, [])
    dk.merge(model, list(strengths), list(strengths.values()))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ten_thousand_cycles_change_no_bit(dtype):
    model = nn.Sequential(nn.Linear(16, 24), nn.Conv2d(3, 4, 3), Conv1D(8, 16)).to(dtype)
    names = ["a", "b", "c"]
    for name, config in zip(names, (dk.DeftConfig(r=4), dk.DeftConfig(r=3, para=True), dk.LoraConfig(r=2))):
        config.target_modules, config.init_weights = r"\d", False
        dk.inject_adapter(model, config, name)
    before, fresh = bits(model), {}
    for name in names:
        dk.merge(model, name)
        fresh[name] = bits(model)
        dk.unmerge(model)
    generator = torch.Generator().manual_seed(0)
    merged = None
    for _ in range(10_000):
        choice = int(torch.randint(4, (), generator=generator))
        if merged is None:
            merged = names[choice % 3]
            dk.merge(model, merged)
        elif choice == 3:
            dk.unmerge(model)
            merged = None
        else:
            merged = names[choice]
            dk.hotswap(model, merged)
    if merged is not None:
        assert same_bits(model, fresh[merged])
        dk.unmerge(model)
    assert same_bits(model, before)


def test_hotswap_from_files_on_a_compiled_model(tmp_path):
    model, x = small_model().eval(), torch.randn(2, 3, 4, 4)
    before_files = bits(model)
    outputs = {}
    for i, config in enumerate((dk.DeftConfig(r=4), dk.DeftConfig(r=2, decomposition_method="relu"), dk.LoraConfig(r=3))):
        config.init_weights, config.target_modules = False, ["to_q", "to_v"] if i else None
        dk.inject_adapter(model, config)
        dk.save_adapter(model, tmp_path / str(i))
        dk.merge(model)
        with torch.no_grad():
            outputs[i] = model(x)
        dk.eject(model)
    assert same_bits(model, before_files)

    dk.load_adapter(model, tmp_path / "0")
    dk.merge(model)
    where = addresses(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for i in (1, 2, 0, 2, 1, 0):
                dk.hotswap(model, tmp_path / str(i))
                assert torch.equal(compiled(x), outputs[i])  # to the bit as if freshly loaded
    assert addresses(model) == where
    dk.unmerge(model)
    assert same_bits(model, before_files)


def test_storage_orders_that_flattening_cannot_view():
    model = nn.Sequential(nn.Conv2d(6, 5, 3)).to(memory_format=torch.channels_last)
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=["0"], init_weights=False))
    x, where = torch.randn(2, 6, 5, 5), addresses(model)
    y, before = model(x).detach(), bits(model)
    dk.merge(model)
    model.eval()
    torch.testing.assert_close(model(x), y)
    assert addresses(model) == where and model[0].weight.is_contiguous(memory_format=torch.channels_last)
    dk.unmerge(model)
    assert same_bits(model, before)


def test_inference_mode_and_host_snapshot():
    with torch.inference_mode():
        model = model_with_adapters(["qr"])
        before = bits(model)
        dk.merge(model, snapshot="host")
        dk.unmerge(model)
        assert same_bits(model, before)


def test_refusals_leave_the_model_as_it_was():
    model = model_with_adapters()
    before = bits(model)
    with pytest.raises(RuntimeError, match="nothing is merged"):
        dk.unmerge(model)
    with pytest.raises(ValueError, match="no adapter named 'unknown'"):
        dk.merge(model, "unknown")
    with pytest.raises(ValueError, match="snapshot 'disk': expected one of device, host"):
        dk.merge(model, snapshot="disk")
    dk.set_adapters(model, [])
    with pytest.raises(ValueError, match="nothing to merge"):
        dk.merge(model)
    layer = adapted_layers(model)["blocks.0.to_k"]
    with torch.no_grad():
        kept = layer.deft_P["qr"][0, 0].clone()
        layer.deft_P["qr"][0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"blocks.0.to_k.deft_P.qr has values that are not finite"):
            dk.merge(model, "qr")
        layer.deft_P["qr"][0, 0] = kept
    assert same_bits(model, before)

    dk.merge(model, "qr")
    merged = bits(model)
    for call in (
        lambda: dk.merge(model, "lora"),
        lambda: dk.set_adapters(model, "lora"),
        lambda: dk.delete_adapter(model, "qr"),
        lambda: dk.inject_adapter(model, dk.DeftConfig(), "new"),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            call()
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        dk.hotswap(model, "nowhere")
    assert same_bits(model, merged)
    dk.unmerge(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_failure_while_writing_leaves_no_half_merged_model(monkeypatch, merged_before):
    model = model_with_adapters(["qr", "lora"])
    before = bits(model)
    if merged_before:
        dk.merge(model, "qr")

    def half(pristine, targets, B, K, R):
        next(iter(targets.values())).weight.detach().zero_()
        raise MemoryError

    monkeypatch.setattr(sys.modules["deft_kernels.adapters.merge"], "_write_from", half)
    with pytest.raises(MemoryError):
        dk.hotswap(model, "lora")
    monkeypatch.undo()
    assert same_bits(model, before)
    dk.merge(model, "lora")
    dk.unmerge(model)
    assert same_bits(model, before)


def test_training_while_merged_is_refused():
    model, x = model_with_adapters(["qr"]), torch.randn(2, 3, 4, 4)
    dk.merge(model)
    model.train()
    with pytest.raises(RuntimeError, match="adapter qr cannot be trained while adapters are merged.*deft_kernels.unmerge"):
        model(x)
    with torch.no_grad():
        model(x)  # validation is fine


def test_a_weight_written_to_while_merged_is_noticed():
    model = model_with_adapters(["qr"])
    before = bits(model)
    dk.merge(model)
    with torch.no_grad():
        adapted_layers(model)["blocks.0.to_q"].weight.mul_(2)
    for call in (dk.unmerge, dk.eject, lambda m: dk.hotswap(m, "qr")):
        with pytest.raises(RuntimeError, match=r"blocks.0.to_q: the weight was written to while an adapter was merged"):
            call(model)
    dk.unmerge(model, force=True)
    assert same_bits(model, before)


def test_shared_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="0: another layer shares its weight"):
        dk.merge(model)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="1: another layer shares its weight"):
        dk.merge(model)


def test_each_layer_is_merged_at_its_own_strength():
    model, x = model_with_adapters(["qr"], torch.float64), torch.randn(2, 3, 4, 4).double()
    dk.set_adapters(model.blocks[0], "qr", 0.2)
    expected = model(x)
    dk.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_a_refused_hotswap_leaves_everything_as_it_was(tmp_path):
    model = model_with_adapters(["qr", "lora"])
    dk.save_adapter(model, tmp_path / "a", "lora")
    dk.save_adapter(model, tmp_path / "b", "qr")  # depends on its base, as a LoRA does not
    dk.merge(model, "qr")
    dk.hotswap(model, tmp_path / "a")
    merged, keys = bits(model), set(model.state_dict())
    with pytest.raises(ValueError, match="not all finite"):
        dk.hotswap(model, tmp_path / "a", float("nan"))
    assert same_bits(model, merged) and set(model.state_dict()) == keys
    assert adapted_layers(model)["blocks.1.to_v"].merged == {"hotswap": 1.0}

    model = small_model()
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=["to_q"]))
    dk.merge(model)
    keys = set(model.state_dict())
    model.blocks[1].to_v.register_forward_hook(lambda *args: None)
    adapter = tmp_path / "b"
    with pytest.raises(ValueError, match="another base"):
        dk.hotswap(model, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(_without_metadata(adapter / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"blocks.1.to_v: cannot merge into this layer"):
        dk.hotswap(model, adapter)
    assert set(model.state_dict()) == keys and type(model.blocks[1].to_v) is nn.Linear


def _without_metadata(file):
    return save(load_file(file))


def test_merged_model_moves_and_copies():
    model, x = model_with_adapters(["qr"]), torch.randn(2, 3, 4, 4)
    base = bits(model)
    dk.merge(model)
    y = model(x)
    twin = copy.deepcopy(model)
    dk.unmerge(twin)
    assert same_bits(twin, base) and torch.equal(model(x), y)
    model.to(torch.bfloat16)
    dk.unmerge(model)
    assert same_bits(model, {k: v.bfloat16() for k, v in base.items()})


@pytest.mark.gpu
def test_parts_on_several_devices():
    models = {"unet": model_with_adapters(["qr"]).cuda(), "text_encoder": model_with_adapters(["qr"])}
    expected = {part: copy.deepcopy(model) for part, model in models.items()}
    before = {part: bits(model) for part, model in models.items()}
    dk.merge(models)
    for part, model in expected.items():
        dk.merge(model)
        assert same_bits(models[part], bits(model))
    dk.unmerge(models)
    assert all(same_bits(model, before[part]) for part, model in models.items())
