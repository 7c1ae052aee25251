"""Adapters on quantised bases: right against the dequantised layer, trainable, merged only when asked, unmerged to the bit.

Every base is made by its own library, and the weight that it stands for is read by that library, not by deft_kernels.
"""

import copy
import re
import warnings

import bitsandbytes as bnb
import gguf
import pytest
import torch
import torchao.quantization as ao
from bitsandbytes.functional import has_avx512bf16
from common import CONFIGS, Opaque, gradients, small_model
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, GGUFQuantizationConfig, TorchAoConfig
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor
from safetensors import safe_open
from torch import nn
from torchao.quantization.granularity import PerGroup

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.nn.quantised import quantised

M, N, T = 72, 256, 37  # a row count that is no multiple of anything; GGUF's K types come in blocks of 256


def bnb_4bit(kind, double, storage=torch.uint8):
    def make(linear):
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type=kind,
                                  compress_statistics=double, quant_storage=storage)  # fmt: skip
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.dtype).to("cpu")  # which quantises

    return make


def bnb_8bit(threshold):
    def make(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None,
                                    has_fp16_weights=False, threshold=threshold)  # fmt: skip
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.dtype).to("cpu")

    return make


def torchao(config):
    def make(linear):
        layer = copy.deepcopy(linear)
        ao.quantize_(layer, config)
        return layer

    return make


def k_quant(W, kind):
    """Blocks of a K type, which the gguf package reads but cannot make: random codes under scales of W's size."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    codes = torch.randint(0, 256, (W.numel() // block, size), dtype=torch.uint8)
    for at, scale in {"Q4_K": {0: 1 / 300, 2: 1 / 40}, "Q6_K": {208: 1 / 1300}}[kind.name].items():
        codes[:, at : at + 2] = (W.std() * scale).half().view(1).view(torch.uint8)
    return codes.view(W.shape[0], -1).numpy()


def gguf_linear(kind):
    kind = gguf.GGMLQuantizationType[kind]

    def make(linear):
        layer = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        W = linear.weight.detach().float()
        codes = k_quant(W, kind) if kind.name.endswith("_K") else gguf.quants.quantize(W.numpy(), kind)
        layer.weight, layer.bias = GGUFParameter(torch.from_numpy(codes), quant_type=kind), linear.bias
        return layer

    return make


KINDS = {
    "bnb-8bit": bnb_8bit(0.0),
    "bnb-8bit-outliers": bnb_8bit(6.0),
    "bnb-nf4": bnb_4bit("nf4", False),
    "bnb-nf4-double": bnb_4bit("nf4", True),
    "bnb-nf4-stored-as-bfloat16": bnb_4bit("nf4", False, torch.bfloat16),
    "bnb-fp4": bnb_4bit("fp4", False),
    "bnb-fp4-double": bnb_4bit("fp4", True),
    "torchao-int8": torchao(ao.Int8WeightOnlyConfig()),
    "torchao-int8-groups": torchao(ao.Int8WeightOnlyConfig(granularity=PerGroup(64))),
    "torchao-float8": torchao(ao.Float8WeightOnlyConfig()),
    "torchao-int4": torchao(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "gguf-BF16": gguf_linear("BF16"),
    "gguf-Q8_0": gguf_linear("Q8_0"),
    "gguf-Q5_1": gguf_linear("Q5_1"),
    "gguf-Q4_0": gguf_linear("Q4_0"),
    "gguf-Q4_K": gguf_linear("Q4_K"),
    "gguf-Q6_K": gguf_linear("Q6_K"),
}


def dense(m=M, n=N, bias=True, dtype=torch.float32):
    return nn.Linear(n, m, bias).to(dtype).requires_grad_(False)


def make(kind, **options):
    return KINDS[kind](dense(**options)).requires_grad_(False)


def true_weight(layer):
    """W as the layer's own library reads it, float64."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        held = layer.state if weight.CB is None else weight
        return held.CB.double() * (held.SCB.double() / 127)[:, None]
    if isinstance(layer, GGUFLinear):
        return dequantize_gguf_tensor(weight).detach().double()
    return weight.dequantize().double()


def with_weight(layer, W, kind=Opaque, dtype=torch.float64):
    """A plain layer with this weight and the layer's bias."""
    plain = kind(layer.in_features, layer.out_features, layer.bias is not None).to(dtype).requires_grad_(False)
    plain.weight.copy_(W)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain


def bits(layer):
    """All that a quantised layer holds."""
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in quantised(layer).tensors]


def same_bits(layer, before):
    return all(torch.equal(a, b) for a, b in zip(bits(layer), before, strict=True))


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    if isinstance(layer, dk.DeftLinear):
        found |= {f"d{role}": p.grad for role, p in layer.adapter_tensors("default").items()}
    return found


# Forward and backward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_result_is_that_of_the_dequantised_layer(kind, dtype, training):
    """Error at most twice that of the activation form on a plain layer with the dequantised weight, in the same precision.
    In eval mode bitsandbytes' 8-bit layers round their inputs too, by 0.7 or 1.6 %: that much, measured on the layer alone,
    enters y once and P's gradient by y and by its own rows, and is allowed three times there."""
    base = make(kind, dtype=dtype)
    W, x, dy = true_weight(base), torch.randn(2, T, N).to(dtype), torch.randn(2, T, M).to(dtype)
    x[..., 3] *= 8  # what LLM.int8 calls an outlier
    rounds_inputs = kind.startswith("bnb-8bit") and not training
    for method in ("qr", "qr-gate-alpha", "relu", "para", "lora"):
        layer = dk.DeftLinear(base, CONFIGS[method]).train(training)
        assert layer.dense_weight() is None and layer.shape == (M, N)
        with torch.no_grad():
            for p in layer.adapter_tensors("default").values():
                assert p.dtype == torch.float32
                p.add_(torch.randn_like(p) * 0.1)
        state = {k: v for k, v in layer.state_dict().items() if "base_layer" not in k}
        exact, same = (dk.DeftLinear(with_weight(base, W, dtype=d), CONFIGS[method]) for d in (torch.float64, dtype))
        for plain in (exact, same):
            plain.load_state_dict(state, strict=False)
        expected, found = run(exact, x.double(), dy.double()), run(layer, x, dy)
        alone, alone_expected = run(base, x, dy), run(exact.base_layer, x.double(), dy.double())
        for key, value in run(same, x, dy).items():
            allowed = 2 * distance(value, expected[key])
            if rounds_inputs:
                allowed += 3 * max(distance(alone[k], alone_expected[k]) for k in alone)
                assert allowed < 0.06
            assert distance(found[key], expected[key]) <= allowed, (method, key)


@pytest.mark.parametrize("kind", ["bnb-nf4-double", "torchao-int8", "gguf-Q4_K"])
def test_several_adapters_and_one_for_each_sample(kind):
    base, x = make(kind), torch.randn(3, T, N)
    packed, plain = (nn.ModuleDict({"to_q": b}) for b in (base, with_weight(base, true_weight(base))))
    for model in (packed, plain):
        for name, config in (("a", dk.DeftConfig(r=3)), ("b", dk.DeftConfig(r=4, para=True)), ("c", dk.LoraConfig(r=2))):
            config.target_modules, config.init_weights = ["to_q"], False
            dk.inject_adapter(model, config, name)
    plain.load_state_dict({k: v for k, v in packed.state_dict().items() if "deft" in k}, strict=False)
    x64 = x.double()
    for use in (
        lambda model: dk.set_adapters(model, ["a", "b", "c"], [0.5, -1, 2]),
        lambda model: dk.set_adapters(model, ["a", "b"], combine="sequential"),
        lambda model: dk.route_adapters(model, ["c", "base", "a"]),
    ):
        use(packed), use(plain)
        assert distance(packed["to_q"](x), plain["to_q"](x64)) < 1e-6  # float32


def test_a_small_gradient_beside_a_large_bias():
    """K's gradient passes through the base layer, whose bias is added to it and taken off again."""
    base = Opaque(N, M).requires_grad_(False)
    base.bias.fill_(100.0)
    x, dy = torch.randn(T, N), torch.randn(T, M) * 1e-7
    layer = dk.DeftLinear(base, CONFIGS["qr"])
    exact = copy.deepcopy(layer).double()
    for store in ("deft_P", "deft_R"):
        getattr(exact, store)["default"] = nn.Parameter(getattr(layer, store)["default"].detach().double())
    exact.set_adapters({"default": 1.0})
    found, expected = run(layer, x, dy), run(exact, x.double(), dy.double())
    # float32 rounds y0, of size 100, by 4e-6, and h carries that into dP; before the rows were scaled, the distance was 1
    assert distance(found["dP"], expected["dP"]) < 1e-4


# The identity start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_identity(kind, recwarn):
    """W comes from the library's own dequantisation. Float32: what is removed and what is injected differ by rounding."""
    base = make(kind)
    model, x = nn.Sequential(base), torch.randn(T, N)
    y = base(x)
    dk.inject_adapter(model, dk.DeftConfig(r=8, alpha=3, target_modules=["0"]))
    assert distance(model(x), y) < 2e-6
    W = true_weight(model[0].base_layer)
    Q = torch.linalg.qr(model[0].deft_P["default"].detach()).Q
    assert distance(model[0].deft_R["default"] * 3 / 8, Q.double().mT @ W) < 2e-6
    assert not [w for w in recwarn if "do not act exactly" in str(w.message)]


def test_the_start_through_a_layer_of_which_nothing_can_be_read():
    """bitsandbytes' 8-bit layer with float weights, which it quantises in every forward."""
    base = bnb.nn.Linear8bitLt(N, M, has_fp16_weights=True).requires_grad_(False)
    model, x = nn.Sequential(base), torch.randn(T, N)
    y = base(x)
    assert quantised(base) is None
    dk.inject_adapter(model, dk.DeftConfig(r=8, target_modules=["0"]))
    assert distance(model(x), y) < 2e-6
    with pytest.raises(ValueError, match="0: cannot merge into this layer: its weight is quantised in an unknown way"):
        dk.merge(model, requantize=True)


def test_layers_that_round_their_inputs_are_told(recwarn):
    model = nn.Sequential(make("bnb-8bit"), make("bnb-nf4", m=64, n=M)).eval()
    dk.inject_adapter(model, dk.DeftConfig(target_modules=["0", "1"]))
    (told,) = [str(w.message) for w in recwarn if "do not act exactly" in str(w.message)]
    share = float(re.search(r"1 layers .* \(worst: 0, whose output is ([0-9.]+)% away\)", told)[1])
    assert 0.5 < share < 3 and "init_weights=False" in told  # of 8 bits on normal inputs
    recwarn.clear()
    dk.eject(model)
    dk.inject_adapter(model, dk.DeftConfig(target_modules=["0", "1"], init_weights=False))
    assert not len(recwarn)


@pytest.mark.parametrize("trouble", ["no scales", "other scales", "not quantised"])
def test_a_weight_that_cannot_be_had_is_refused_by_name(trouble):
    model = nn.Sequential(make("bnb-8bit"))
    if trouble == "no scales":
        model[0].weight.SCB = None
        message = "0: its 8-bit weight has lost its row scales"
    elif trouble == "other scales":  # those that the layer computes with are not those of its weight any more
        model[0](torch.randn(3, N))
        model[0].weight.CB, model[0].weight.SCB = model[0].weight.data, model[0].state.SCB * 3
        model[0].init_8bit_state = lambda: None
        message = "0: the output of Linear8bitLt.* is .*% away from the product with the weight that it holds"
    else:
        model[0] = bnb.nn.Linear4bit(N, M).requires_grad_(False)
        message = "0: its 4-bit weight has no quantisation state yet: move the layer to its device first"
    with pytest.raises(ValueError, match=message):
        dk.inject_adapter(model, dk.DeftConfig(target_modules=["0"]))
    assert not isinstance(model[0], dk.DeftLinear)
    if trouble != "other scales":  # with which W is another one, but is one
        dk.inject_adapter(model, dk.DeftConfig(target_modules=["0"], init_weights=False))
        with pytest.raises(ValueError, match=message):
            dk.merge(model, requantize=True)


def test_a_base_that_passes_no_gradient_is_refused():
    """torchao's int8 activations have no derivative: x's gradient would lack the base layer's share in silence."""
    model = nn.Sequential(nn.Linear(M, N), torchao(ao.Int8DynamicActivationInt8WeightConfig())(dense()))
    dk.inject_adapter(model, dk.DeftConfig(target_modules=["0", "1"]))
    with pytest.raises(RuntimeError, match="passes no gradient on to its input"):
        model(torch.randn(T, M))
    with torch.no_grad():
        model(torch.randn(T, M))


# Merging --------------------------------------------------------------------------------------------------------------

MERGED = [kind for kind in KINDS if not kind.endswith("_K")]


def adapted_model(kind, method="qr", dtype=torch.float32):
    model = nn.ModuleDict({name: make(kind, dtype=dtype) for name in ("to_q", "to_k")})
    config = copy.copy(CONFIGS[method])
    config.target_modules, config.init_weights = ["to_q", "to_k"], False
    dk.inject_adapter(model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.05)
    return model


def merged_matrices(model):
    """W' of every layer by the equation, float64, and W."""
    for name, layer in model.items():
        config, tensors = layer.configs["default"], layer.adapter_tensors("default")
        P, R = (tensors[k].detach().double() if k in tensors else None for k in "PR")
        W = true_weight(layer.base_layer)
        if isinstance(config, dk.LoraConfig):
            yield name, W + config.scale(3) * P @ R, W
        else:
            yield name, reference.merged_weight(W, P, R, config.decomposition_method, config.scale(3)), W


@pytest.mark.parametrize("method", ["qr", "para", "lora"])
@pytest.mark.parametrize("kind", MERGED)
def test_merge_requantises_when_asked_and_tells_the_loss(kind, method):
    model, x = adapted_model(kind, method).eval(), torch.randn(T, N)
    before = {name: bits(layer.base_layer) for name, layer in model.items()}
    where = [t.data_ptr() for layer in model.values() for t in quantised(layer.base_layer).tensors]
    exact, unmerged = {n: (a, b) for n, a, b in merged_matrices(model)}, {n: l(x) for n, l in model.items()}
    type_name = quantised(model["to_q"].base_layer).name
    with pytest.raises(ValueError, match=re.escape(f"to_q: its weight is quantised ({type_name})") + ".*requantize=True"):
        dk.merge(model)
    assert all(same_bits(layer.base_layer, before[name]) for name, layer in model.items())

    with pytest.warns(UserWarning, match="has rounded their weights anew") as told:
        dk.merge(model, requantize=True, snapshot="host")
    assert [t.data_ptr() for layer in model.values() for t in quantised(layer.base_layer).tensors] == where
    norms = {}
    for name, layer in model.items():
        Q, (merged, W) = true_weight(layer.base_layer), exact[name]
        norms[name] = torch.stack([(Q - merged).norm(), merged.norm(), (merged - W).norm()])
        # as well as the library makes it of W' (some weights lie midway between two codes)
        fresh = true_weight(KINDS[kind](with_weight(layer.base_layer, merged.float(), nn.Linear, torch.float32)))
        assert float(norms[name][0]) == pytest.approx(float((fresh - merged).norm()), rel=0.01)
        assert distance(Q, fresh) < 0.01
        assert distance(layer(x), unmerged[name]) < 3 * norms[name][0] / norms[name][1] + 0.02
    lost, whole, update = torch.stack(list(norms.values())).square().sum(0).sqrt().tolist()
    worst = max(norms, key=lambda name: norms[name][0] / norms[name][2])
    said = re.search(r"error is ([0-9.]+)% of W', ([0-9.]+)% of the update W' - W; worst in (\w+): ", str(told[0].message))
    assert float(said[1]) == pytest.approx(100 * lost / whole, abs=0.06, rel=0.01)
    assert float(said[2]) == pytest.approx(100 * lost / update, abs=0.06, rel=0.01)
    assert said[3] == worst and type_name in str(told[0].message)

    dk.unmerge(model)
    assert all(same_bits(layer.base_layer, before[name]) for name, layer in model.items())
    assert all(torch.equal(layer(x), unmerged[name]) for name, layer in model.items())


def test_what_merging_costs(record_property):
    """One DEFT adapter of rank 8 on a 256 x 512 layer: the rounding of W' is the type's own rounding, no more."""
    linear = dense(256, 512)
    nn.init.normal_(linear.weight, std=0.03)
    lines = ["relative error               of W, when quantised      of W' merged      of the update W' - W"]
    for kind in MERGED:
        base = KINDS[kind](linear)
        first, W = distance(true_weight(base), linear.weight), true_weight(base)
        torch.manual_seed(0)
        model = nn.ModuleDict({"to_q": base})
        dk.inject_adapter(model, dk.DeftConfig(r=8, target_modules=["to_q"], init_weights=False))
        layer = model["to_q"]
        B, A = reference.factors(W, *(layer.adapter_tensors("default")[k].detach().double() for k in "PR"))
        merged = W + B @ A
        with pytest.warns(UserWarning, match="rounded their weights anew"):
            dk.merge(model, requantize=True)
        lost = distance(true_weight(layer.base_layer), merged)
        update = lost * float(merged.norm() / (merged - W).norm())
        lines.append(f"{kind:28s} {first:18.2%} {lost:18.2%} {update:18.0%}")
        assert 0.5 * first < lost < 1.3 * first
    record_property("table", "\n".join(lines))


@pytest.mark.parametrize("kind", ["gguf-Q4_K", "gguf-Q6_K"])
def test_types_that_cannot_be_made_are_refused_by_name(kind):
    model = adapted_model(kind)
    with pytest.raises(ValueError, match=rf"to_q: its weight is quantised \(GGUF {kind[5:]}\), to which no matrix can"):
        dk.merge(model, requantize=True)


@pytest.mark.parametrize("kind", ["bnb-nf4-double", "bnb-8bit", "torchao-float8", "gguf-Q4_0"])
@pytest.mark.filterwarnings("ignore:merging into")
def test_hotswap_is_from_the_pristine_weight(kind, tmp_path):
    model = adapted_model(kind)
    dk.save_adapter(model, tmp_path / "file")
    dk.inject_adapter(model, dk.LoraConfig(r=2, init_weights=False, target_modules=["to_q"]), "other")
    before = {name: bits(layer.base_layer) for name, layer in model.items()}
    dk.merge(model, "default", requantize=True)
    fresh = {name: bits(layer.base_layer) for name, layer in model.items()}
    for _ in range(5):
        dk.hotswap(model, "other", requantize=True)
        assert same_bits(model["to_k"].base_layer, before["to_k"])
        assert not same_bits(model["to_q"].base_layer, before["to_q"])
        dk.hotswap(model, tmp_path / "file", requantize=True)
    assert all(same_bits(layer.base_layer, fresh[name]) for name, layer in model.items())
    with pytest.raises(ValueError, match="requantize=True"):
        dk.hotswap(model, "other")
    dk.unmerge(model)
    assert all(same_bits(layer.base_layer, before[name]) for name, layer in model.items())


def test_a_merge_that_fails_leaves_the_pristine_weights(monkeypatch):
    model = adapted_model("bnb-nf4-double")
    before = {name: bits(layer.base_layer) for name, layer in model.items()}
    original, calls = bnb.functional.quantize_4bit, []

    def fails_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", fails_at_the_second)
    with pytest.raises(MemoryError):
        dk.merge(model, requantize=True)
    assert all(same_bits(layer.base_layer, before[name]) and not layer.is_merged for name, layer in model.items())


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-nf4-double", "torchao-int8"])
@pytest.mark.filterwarnings("ignore:merging into")
def test_a_copy_of_a_merged_model_unmerges_by_itself(kind):
    model, x = adapted_model(kind).eval(), torch.randn(T, N)
    before, unmerged = {name: bits(layer.base_layer) for name, layer in model.items()}, model["to_q"](x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    dk.merge(model, requantize=True)
    merged, twin = model["to_q"](x), copy.deepcopy(model)
    dk.unmerge(twin)
    if kind.startswith("bnb"):  # torchao's tensors are not compared by torch.equal
        assert all(torch.equal(v, state[k]) for k, v in twin.state_dict().items())
    assert all(same_bits(layer.base_layer, before[name]) for name, layer in twin.items())
    assert torch.equal(twin["to_q"](x), unmerged) and torch.equal(model["to_q"](x), merged)


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-nf4-double", "torchao-int8", "gguf-Q4_0"])
@pytest.mark.filterwarnings("ignore:merging into")
def test_a_write_into_merged_weights_is_noticed(kind):
    model = adapted_model(kind)
    before = {name: bits(layer.base_layer) for name, layer in model.items()}
    dk.merge(model, requantize=True)
    weight = model["to_q"].base_layer.weight
    with torch.no_grad():
        weight.copy_(weight.as_tensor().clone() if kind.startswith("gguf") else weight.clone())
    with pytest.raises(RuntimeError, match="to_q: the weight was written to while an adapter was merged"):
        dk.unmerge(model)
    dk.unmerge(model, force=True)
    assert all(same_bits(layer.base_layer, before[name]) for name, layer in model.items())


# Training -------------------------------------------------------------------------------------------------------------


def quantised_model(kind="bnb-nf4-double"):
    torch.manual_seed(1)
    model = small_model(64)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, child if kind is None else KINDS[kind](child.requires_grad_(False)))
    return model.requires_grad_(False)


def layers_bits(model):
    return {k.removesuffix(".base_layer"): bits(m) for k, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("kind", ["bnb-nf4-double", "bnb-fp4", "bnb-8bit", "torchao-int8", "torchao-float8", "gguf-Q4_0"])
def test_it_trains_and_its_file_fits_a_freshly_quantised_base(kind, tmp_path):
    model = quantised_model(kind)
    untouched = layers_bits(model)
    plain = quantised_model(None)
    for name, module in model.named_modules():
        if name in untouched:
            plain.get_submodule(name).weight.copy_(true_weight(module))
    x, target, losses = torch.randn(2, 3, 4, 4), torch.randn(2, 16, 64), {}
    for m in (model, plain):
        torch.manual_seed(2)
        dk.inject_adapter(m, dk.DeftConfig(r=4, target_modules=["to_q", "to_v"]))  # other quantised layers lie between
        optimizer, losses[m] = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=2.0), []
        for step in range(12):
            loss = (m(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[m].append(loss.item())
            if step == 5:  # sampling between two steps must not stand in the way of the next
                m.eval()
                with torch.no_grad():
                    m(x)
                m.train()
    assert losses[model][-1] < 0.95 * losses[model][0]
    assert losses[model] == pytest.approx(losses[plain], rel=1e-4)
    after = layers_bits(model)
    assert after.keys() == untouched.keys()
    assert all(torch.equal(a, b) for k in after for a, b in zip(after[k], untouched[k], strict=True))
    dk.save_adapter(model, tmp_path)
    fresh = quantised_model(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its fingerprint is that of the same base
        dk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-8bit", "torchao-int8", "gguf-Q8_0"])
@pytest.mark.parametrize("merged", [False, True])
def test_exported_as_a_lora(kind, merged, tmp_path):
    """A = s R - K^T W of the W that the layer stands for, merged or not: as a LoRA on the same base it is the adapter."""
    model = adapted_model(kind).eval()
    x = torch.randn(3, N)
    with torch.no_grad():
        expected = {name: layer(x) for name, layer in model.items()}
    if merged:
        with pytest.warns(UserWarning):
            dk.merge(model, requantize=True)
    dk.export_lora(model, tmp_path / "lora", format="peft")
    dk.eject(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.import_lora(model, tmp_path / "lora")
    with torch.no_grad():
        for name, layer in model.items():  # 8-bit layers round their inputs, which the adapter follows and its LoRA does not
            assert distance(layer(x), expected[name]) < (0.02 if kind == "bnb-8bit" else 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    found = []
    for checkpointing in (None, use_reentrant):
        model = quantised_model()
        model.checkpointing = checkpointing
        torch.manual_seed(2)
        dk.inject_adapter(model, dk.DeftConfig(r=4, target_modules=["to_q", "to_v"]))
        model(torch.ones(2, 3, 4, 4, requires_grad=True)).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 8
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-5)  # summed in another order


def test_bitsandbytes_does_not_repack_adapted_models():
    """As it would on a CPU with AVX512-BF16 in the first forward without grad: see `quantised.hold`."""
    model = nn.Sequential(make("bnb-nf4", m=64, n=N), make("bnb-nf4", m=64, n=64)).eval()
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    x, before = torch.randn(T, N), [bits(layer) for layer in model]
    truth = [true_weight(layer) for layer in model]
    dk.inject_adapter(model, dk.DeftConfig(target_modules=["1"]))
    with torch.no_grad():
        model(x)
    assert same_bits(model[0], before[0]) and same_bits(model[1].base_layer, before[1])
    x.requires_grad_()
    model(x).sum().backward()
    assert distance(x.grad, (truth[1] @ truth[0]).sum(0).expand(T, -1)) < 1e-5
    dk.eject(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in model)


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX512-BF16, for which bitsandbytes repacks")
@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-nf4-double", "bnb-nf4-stored-as-bfloat16"])
def test_a_base_that_bitsandbytes_has_repacked_is_read_all_the_same(kind):
    model = nn.Sequential(make(kind, m=64, n=N), make(kind, m=64, n=64)).eval()
    x, truth = torch.randn(T, N), true_weight(model[0])
    with torch.no_grad():
        packed = model(x)  # which rounds its scales to bfloat16
    assert model[0].weight.quant_state.packing_format_for_cpu
    dk.inject_adapter(model, dk.DeftConfig(target_modules=["1"]))
    assert distance(model(x), packed) < 1e-2 and distance(true_weight(model[0]), truth) < 4e-3


# Files, and what torch does to a module -------------------------------------------------------------------------------


def test_fingerprints_know_a_quantised_base(tmp_path):
    base = small_model(64).requires_grad_(False)
    config = dk.DeftConfig(r=2, target_modules=["to_q"])

    def quantise(kind):
        model = copy.deepcopy(base)
        for block in model.blocks:
            block.to_q = KINDS[kind](block.to_q)
        return model

    dense_model, four_bits = copy.deepcopy(base), quantise("bnb-nf4")
    dk.inject_adapter(dense_model, config)
    dk.inject_adapter(four_bits, config)
    dk.save_adapter(dense_model, tmp_path / "dense")
    dk.save_adapter(four_bits, tmp_path / "nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.load_adapter(quantise("bnb-nf4"), tmp_path / "nf4")
    with pytest.warns(UserWarning, match=r"made for dense base weights, and these are bitsandbytes nf4, .* by [0-9.]+%"):
        dk.load_adapter(quantise("bnb-nf4"), tmp_path / "dense")
    with pytest.warns(UserWarning, match="made for bitsandbytes nf4 base weights, and these are dense"):
        dk.load_adapter(copy.deepcopy(base), tmp_path / "nf4")
    with pytest.warns(UserWarning, match="made for bitsandbytes nf4 base weights, and these are torchao Int8Tensor"):
        dk.load_adapter(quantise("torchao-int8"), tmp_path / "nf4")
    for block in base.blocks:  # a tenth away: as far as quantising goes, but the type is the same
        block.to_q.weight.add_(torch.randn_like(block.to_q.weight) * block.to_q.weight.std() / 10)
    with pytest.raises(ValueError, match="another base model"):
        dk.load_adapter(quantise("bnb-nf4"), tmp_path / "nf4")
    for block in base.blocks:
        nn.init.normal_(block.to_q.weight)
    for kind in ("bnb-nf4", "bnb-8bit"):
        with pytest.raises(ValueError, match="another base model"):
            dk.load_adapter(quantise(kind), tmp_path / "nf4")
    with pytest.warns(UserWarning, match="of W', and there is no update; worst in"):  # the identity start
        dk.merge(four_bits, requantize=True)  # the fingerprint is the pristine base's all the same
    dk.save_adapter(four_bits, tmp_path / "merged")
    sketches = [safe_open(tmp_path / name / "adapter_model.safetensors", "pt").metadata() for name in ("nf4", "merged")]
    assert sketches[0]["base_fingerprint"] == sketches[1]["base_fingerprint"]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_moves_and_casts(kind):
    layer, x = dk.DeftLinear(make(kind), CONFIGS["qr"]), torch.randn(T, N)
    y = layer(x)
    if not kind.startswith("gguf"):  # diffusers' GGUFParameter cannot be copied: KeyError None
        assert torch.equal(copy.deepcopy(layer)(x), y)
    layer.to("cpu").bfloat16()
    assert all(p.dtype == torch.float32 for p in layer.adapter_tensors("default").values())
    if kind.startswith("bnb"):  # GGUF computes in the dtype that it was loaded for, torchao in its weight's
        assert distance(layer(x), y) < 0.01
    assert layer.shape == (M, N) and layer.deft_P["default"].shape == (M, 3) and layer.deft_R["default"].shape == (3, N)


@pytest.mark.parametrize("kind", ["bnb-nf4-double", "bnb-8bit", "torchao-int8", "torchao-float8", "gguf-Q4_0"])
def test_it_compiles_whole(kind):
    model, x = nn.Sequential(nn.Linear(N, N), make(kind)).requires_grad_(False), torch.randn(T, N)
    dk.inject_adapter(model, dk.DeftConfig(target_modules=["1"], init_weights=False))
    compiled, found = torch.compile(model, backend="aot_eager", fullgraph=True), []
    with torch.set_grad_enabled(not kind.startswith("gguf")):  # diffusers' GGUFLinear has no compiled backward of its own
        for called in (model, compiled):
            y = called(x)
            if y.requires_grad:
                y.square().sum().backward()
            found.append({"y": y.detach(), **gradients(model)})
            model.zero_grad()
    assert found[0].keys() == found[1].keys() and len(found[0]) == (1 if kind.startswith("gguf") else 3)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# diffusers' own loading -----------------------------------------------------------------------------------------------

BNB_4BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LOADED = {
    "bitsandbytes 4-bit": lambda: BitsAndBytesConfig(**BNB_4BIT, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
    "torchao float8": lambda: TorchAoConfig(ao.Float8WeightOnlyConfig()),
    "GGUF": lambda: GGUFQuantizationConfig(compute_dtype=torch.float32),
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A small FLUX.1 transformer in diffusers' layout, and as a GGUF file with its blocks in Q8_0 and Q4_0."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("flux")
    model.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "flux")
    for name, p in model.state_dict().items():
        if p.dim() == 2 and "blocks" in name:
            kind = gguf.GGMLQuantizationType.Q4_0 if ".ff" in name else gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(p.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, p.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def load_flux(folder, how, monkeypatch):
    options = {"quantization_config": LOADED[how](), "torch_dtype": torch.float32}
    if how == "GGUF":
        return FluxTransformer2DModel.from_single_file(str(folder / "model.gguf"), config=str(folder), **options)
    if how.startswith("bitsandbytes"):  # diffusers wants a GPU for it; bitsandbytes does not
        for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        options["device_map"] = {"": "cpu"}
    return FluxTransformer2DModel.from_pretrained(folder, **options)


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["attention", "all-linear"])
@pytest.mark.parametrize("how", LOADED)
def test_flux_as_diffusers_loads_it(flux, how, targets, monkeypatch, tmp_path):
    model = load_flux(flux, how, monkeypatch)
    inputs = {
        "hidden_states": torch.randn(1, 16, 64), "encoder_hidden_states": torch.randn(1, 5, 64),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = dk.inject_adapter(model, dk.DeftConfig(r=4, target_modules=targets))
    assert sorted(names) == sorted(linear) if targets else len(names) == 11
    quantised_names = [n for n in names if quantised(model.get_submodule(n).base_layer)]
    assert len(quantised_names) >= (len(names) if targets is None else 20)
    with torch.no_grad():
        base = adapted = model(**inputs)[0]
        dk.set_adapters(model, [])
        base = model(**inputs)[0]
        dk.set_adapters(model, "default")
    # the identity start: float32 rounding; 8-bit layers in eval mode round their inputs, and 4 of 64 dimensions are removed
    assert distance(adapted, base) < (2e-2 if how.endswith("8-bit") else 1e-5)

    model.train()
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2), []
    for _ in range(5):
        loss = (model(**inputs)[0] - inputs["hidden_states"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        trained = model(**inputs)[0]
    dk.save_adapter(model, tmp_path)
    again = load_flux(flux, how, monkeypatch)
    dk.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert distance(again(**inputs)[0], trained) < 1e-6

        before = {name: bits(model.get_submodule(name).base_layer) for name in quantised_names}
        with pytest.warns(UserWarning, match=f"merging into {len(quantised_names)} quantised layers") as told:
            dk.merge(model, requantize=True)
        merged = model(**inputs)[0]
        dk.unmerge(model)
        assert all(same_bits(model.get_submodule(name).base_layer, b) for name, b in before.items())
        assert distance(model(**inputs)[0], trained) == 0
    lost = float(re.search(r"the error is ([0-9.]+)% of W'", str(told[-1].message))[1]) / 100
    # every layer is that far off, and this model has some ten in a row
    assert distance(merged, trained) < 10 * lost
    assert distance(trained, base) > 0.05
