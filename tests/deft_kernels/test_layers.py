"""The modules: exact, differentiable, thrifty, and well-behaved in everything that torch does to a module."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from common import (
    CONFIGS,
    FORMS,
    LAYERS,
    Opaque,
    Recorder,
    adapted,
    example,
    force_form,
    gradients,
    make,
    small_model,
    weight_matrix,
)
from torch import nn
from torch.func import functional_call

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.nn.functional import ActivationLinear, few_rows
from deft_kernels.ops.lowrank_linear import LowRankLinear


def reference_output(layer, x, name="default", strength=1.0):
    """The adapted layer by the paper's equation: the base layer run with W' in place of W."""
    config, tensors = layer.configs[name], layer.adapter_tensors(name)
    W = weight_matrix(layer.base_layer)
    P, R = tensors["P"], tensors.get("R")
    scale = config.scale(P.shape[1]) * (torch.sigmoid(tensors["gate"]) if "gate" in tensors else 1.0)
    if isinstance(config, dk.LoraConfig):
        merged = W + strength * scale * P @ R
    else:
        B, A = reference.factors(W, P, R, config.decomposition_method, scale)
        merged = W + strength * B @ A
    weight = merged.t() if type(layer.base_layer).__name__ == "Conv1D" else merged.reshape(layer.base_layer.weight.shape)
    return functional_call(layer.base_layer, {"weight": weight}, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck(kind, method, form, monkeypatch):
    if kind.startswith("conv2d") and form == "activation":
        return  # has none
    force_form(monkeypatch, form)
    layer, x = adapted(kind, method), example(kind)
    names = [f"deft_{role}.default" for role in layer.adapter_tensors("default")]
    assert len(names) == sum(p.requires_grad for p in layer.parameters())
    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.adapter_tensors("default").values())]

    def run(x, *params):
        return functional_call(layer, dict(zip(names, params)), x)

    torch.testing.assert_close(run(*inputs), reference_output(layer, x))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=kind.startswith("conv2d"))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 4], ids=["output kept", "output made again"])
def test_gradcheck_of_the_activation_form(method, bias, rows):
    """A base layer known by its output alone: every gradient, with the base's own trainable weight too."""
    base = Opaque(8, 5, bias=bias).double().requires_grad_(False)
    layer, x = adapted("linear", method, base=base), torch.randn(rows, 8).double()
    assert layer.dense_weight() is None and few_rows(rows, 8) == (rows == 2)
    names = [f"deft_{role}.default" for role in layer.adapter_tensors("default")]
    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.adapter_tensors("default").values())]
    torch.testing.assert_close(layer(x), reference_output(layer, x))
    assert torch.autograd.gradcheck(lambda x, *params: functional_call(layer, dict(zip(names, params)), x), inputs)


@pytest.mark.parametrize("form", ["linear", "conv2d"])
def test_a_trainable_base_layer_gets_its_gradient(form):
    layer, x = adapted(form, "qr"), example(form)
    layer.base_layer.requires_grad_(True)
    dy = torch.randn_like(layer(x))
    ours = torch.autograd.grad(layer(x), list(layer.parameters()), dy)
    W = layer.base_layer.weight
    tensors = layer.adapter_tensors("default")
    B, A = reference.factors(W.flatten(1), tensors["P"], tensors["R"])
    y = functional_call(layer.base_layer, {"weight": W + (B @ A).view(W.shape)}, x)
    torch.testing.assert_close(ours, torch.autograd.grad(y, list(layer.parameters()), dy))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_start(kind, method):
    """The identity within one rounding where the method can be one; something else otherwise."""
    base, x = make(kind, torch.float32), example(kind, 5, torch.float32)
    config = copy.copy(CONFIGS[method])
    config.init_weights = True
    layer = (dk.DeftConv2d if kind.startswith("conv2d") else dk.DeftLinear)(base, config)
    y, y0 = layer(x), base(x)
    if config.para:
        assert (y - y0).abs().max() > 1e-2 * y0.abs().max() or config.decomposition_method != "qr"
        assert not torch.equal(y, y0)
    else:
        assert (y - y0).abs().max() <= 4 * torch.finfo(torch.float32).eps * y0.abs().max()
    config.init_weights = False
    assert not torch.allclose(type(layer)(base, config)(x), y0)


def test_identity_start_of_a_layer_without_a_dense_weight():
    base, x = Opaque(6, 5).requires_grad_(False), torch.randn(3, 6)
    torch.testing.assert_close(dk.DeftLinear(base, dk.DeftConfig(r=2, alpha=3))(x), base(x))


def test_rank_is_capped_at_out_features():
    layer = dk.DeftLinear(nn.Linear(9, 2), dk.DeftConfig(r=8, alpha=4))
    assert layer.rank("default") == 2 and layer.deft_R["default"].shape == (2, 9)
    assert layer._scales[0].item() == 4 / 2  # as PEFT: alpha over the capped rank


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("method", ["qr", "para", "lora", "qr-gate-alpha"])
def test_dropout_acts_on_the_injection_only(kind, method, monkeypatch):
    layer, x = adapted(kind, method), example(kind, 50)
    layer.configs["default"] = copy.copy(layer.configs["default"])
    layer.configs["default"].dropout = 0.5
    masks = []

    def record(x, p):
        assert p == 0.5
        masks.append((torch.rand_like(x) > p) / (1 - p))
        return x * masks[-1]

    layer.eval()
    torch.testing.assert_close(layer(x), reference_output(layer, x))
    layer.train()
    monkeypatch.setattr(F, "dropout", record)
    y = layer(x)
    if method == "para":
        assert not masks
        torch.testing.assert_close(y, reference_output(layer, x))
        return
    tensors, config = layer.adapter_tensors("default"), layer.configs["default"]
    W = weight_matrix(layer.base_layer)
    lora = isinstance(config, dk.LoraConfig)
    B, K = (tensors["P"], torch.zeros_like(tensors["P"])) if lora else reference.decompose(tensors["P"], "qr")
    scale = config.scale(3) * (torch.sigmoid(tensors["gate"]) if "gate" in tensors else 1)
    shape = layer.base_layer.weight.shape
    removed = functional_call(layer.base_layer, {"weight": (W - B @ K.T @ W).view(shape)}, x)
    injected = functional_call(
        layer.base_layer, {"weight": (scale * B @ tensors["R"]).view(shape), "bias": layer.bias * 0}, x * masks[0]
    )
    torch.testing.assert_close(y, removed + injected)
    dy, trained = torch.randn_like(y), list(tensors.values())
    torch.testing.assert_close(torch.autograd.grad(y, trained, dy), torch.autograd.grad(removed + injected, trained, dy))


@pytest.mark.parametrize("base", [make("linear"), make("conv2d"), Opaque(6, 5).double().requires_grad_(False)])
def test_several_adapters_at_any_strength(base):
    kind = "conv2d" if isinstance(base, nn.Conv2d) else "linear"
    layer, x = adapted(kind, "qr", base=base), example(kind, 7)
    strengths = {"default": 0.3}
    for name, strength in (("para", -1.5), ("lora", 2.0), ("relu", 0.0)):
        layer.add_adapter(name, CONFIGS[name])
        strengths[name] = strength
    layer.set_adapters(strengths)
    delta = sum(reference_output(layer, x, name, w) - base(x) for name, w in strengths.items())
    torch.testing.assert_close(layer(x), base(x) + delta)
    layer.set_adapters({"lora": 0.5})
    torch.testing.assert_close(layer(x), reference_output(layer, x, "lora", 0.5))
    layer.set_adapters({})
    assert torch.equal(layer(x), base(x))
    layer.delete_adapter("lora")
    assert "lora" not in layer.configs and not any("lora" in name for name in layer.state_dict())


@pytest.mark.parametrize("method", ["qr", "para", "relu", "lora"])
@pytest.mark.parametrize("size,rows", [((64, 48), 20), ((64, 48), 512)])
def test_saved_bytes_are_loras_plus_the_factors(size, rows, method):
    """x, h (T, r) and B, A: nothing of size T x out."""
    from peft.tuners.lora import LoraConfig as PeftLora
    from peft.tuners.lora.layer import Linear as PeftLinear

    r, x = 4, torch.randn(rows, size[0], requires_grad=True)
    base = nn.Linear(*size).requires_grad_(False)
    config = dk.LoraConfig(r=r) if method == "lora" else dk.DeftConfig(
        r=r, para=method == "para", decomposition_method="relu" if method == "relu" else "qr")  # fmt: skip
    layer = dk.DeftLinear(base, config)
    lora = PeftLinear(base, "default", PeftLora(r=r, lora_alpha=r), r=r, lora_alpha=r)
    with Recorder(lora) as peft:
        lora(x)
    with Recorder(layer) as ours:
        layer(x)
    factors = 4 * r * sum(size)
    if rows < size[0] and method != "lora":  # activation form, whose factors are B, K and R
        factors += 4 * r * size[1]
    scales = 8  # injection and removal
    assert ours.bytes() <= peft.bytes() + factors + scales
    assert all(t.untyped_storage().nbytes() <= 4 * max(rows * size[0], r * max(size)) for t in ours.saved.values())
    assert ours.bytes() < 4 * rows * (size[0] + size[1])  # what keeping any T x out would exceed


def test_few_rows_keep_an_output_of_at_most_a_quarter_of_the_weight():
    layer = dk.DeftLinear(nn.Linear(256, 64), dk.DeftConfig(r=16))
    for rows in (64, 65):
        with Recorder(layer) as saved:
            layer(torch.randn(rows, 256, requires_grad=True))
        kept = [t for t in saved.saved.values() if t.shape == (rows, 64)]
        assert len(kept) == (rows == 64) and all(4 * t.nbytes <= layer.weight.nbytes for t in kept)
        with torch.no_grad(), Recorder(layer) as saved:
            layer(torch.randn(rows, 256))
        assert not saved.saved


@pytest.mark.parametrize("size,rows,keeps_h", [(640, 4096, False), (1280, 1024, True)])
def test_saved_bytes_at_sdxls_shapes(size, rows, keeps_h):
    """To the byte: x, the factors, two scales, and h = x A^T only in the factor form."""
    base, x, r = nn.Linear(size, size), torch.randn(rows, size, requires_grad=True), 16
    layer = dk.DeftLinear(base, dk.DeftConfig(r=r))
    with Recorder(layer) as saved:
        layer(x)
    assert saved.bytes() == 4 * (rows * size + 2 * r * size + rows * r * keeps_h + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d", "opaque"])
@pytest.mark.parametrize("form,rows", [("activation", 1), ("activation", 50), ("factor", 50)])
def test_autocast(kind, dtype, form, rows, monkeypatch):
    force_form(monkeypatch, form)
    base = Opaque(6, 5).requires_grad_(False) if kind == "opaque" else None
    kind = "linear" if kind == "opaque" else kind
    layer, x = adapted(kind, "qr", torch.float32, base), example(kind, rows, torch.float32)
    exact = copy.deepcopy(layer).double()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        plain = functional_call(layer.base_layer, {}, x)
    assert y.dtype == plain.dtype == dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    truth = exact(x.double())
    truth.backward(dy.double())
    eps = torch.finfo(dtype).eps
    assert (y.double() - truth).norm() <= 2 * eps * truth.norm()
    for name, g in gradients(layer).items():
        assert g.dtype == torch.float32
        assert (g.double() - gradients(exact)[name]).norm() <= 4 * eps * gradients(exact)[name].norm(), name


@pytest.mark.parametrize("rows", [1, 50])
def test_a_base_layer_that_leaves_autocast(rows):
    """Its output is float32 where x's products are bfloat16."""

    class Wide(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    layer = adapted("linear", "qr", torch.float32, Wide(6, 5).requires_grad_(False))
    x = example("linear", rows, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_float64_stays_float64_under_autocast():
    layer, x = adapted("linear", "qr"), example("linear")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), reference_output(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_float32_masters(dtype):
    layer = adapted("linear", "qr-gate-alpha", torch.float32)
    before = {k: v.clone() for k, v in layer.state_dict().items() if "deft" in k}
    layer.to(dtype)
    assert layer.weight.dtype == dtype and layer._scales.dtype == torch.float32
    assert all(torch.equal(layer.state_dict()[k], v) and v.dtype == torch.float32 for k, v in before.items())
    y = layer(example("linear", 50, dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype and all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(layer).values())
    layer.float().double()
    assert layer.deft_P["default"].dtype == torch.float64
    layer(example("linear", 50))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies(copier):
    model, x = small_model(), torch.randn(2, 3, 4, 4)
    dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False))
    y = model(x)
    y.sum().backward()
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":  # the classes of small_model are local to it; a layer and a bank are not
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False, target_modules="all-linear"))
        x = torch.randn(3, 4)
        y = model(x)
        twin = pickle.loads(pickle.dumps(model))
    else:
        model, x = adapted("linear", "qr"), example("linear")
        y = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(twin(x), y, rtol=0, atol=0)
    with torch.no_grad():
        next(p for p in twin.parameters() if p.requires_grad).add_(1)
    assert not torch.equal(twin(x), y) and torch.equal(model(x), y)


def test_copy_of_one_layer_leaves_its_model_behind():
    model, x = small_model(), torch.randn(2, 3, 4, 4)
    dk.inject_adapter(model, dk.DeftConfig(r=2))
    model(x)
    assert model.blocks[0].to_q._bank is not None
    assert copy.deepcopy(model.blocks[0].to_q)._bank is None
    assert len(pickle.dumps(model.blocks[0].to_q)) < 8000


@pytest.mark.parametrize("method", CONFIGS)
def test_state_dict_round_trip(method):
    layer, x = adapted("linear", method), example("linear")
    other = adapted("linear", method)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_a_half_precision_state_dict_assigned():
    layer, x = adapted("linear", "qr-gate-alpha", torch.float32), torch.randn(4, 6)
    layer.load_state_dict({k: v.half() if "deft" in k else v for k, v in layer.state_dict().items()}, assign=True)
    assert layer.deft_P["default"].dtype == torch.float16
    y = layer(x)
    y.sum().backward()
    dk.merge(layer)
    torch.testing.assert_close(layer.eval()(x), y)


def test_requires_grad_toggles():
    layer, x = adapted("linear", "qr"), example("linear", 50)
    full = torch.autograd.grad(layer(x).square().sum(), [layer.deft_P["default"], layer.deft_R["default"]])
    layer.deft_P["default"].requires_grad_(False)
    layer(x).square().sum().backward()
    assert layer.deft_P["default"].grad is None
    torch.testing.assert_close(layer.deft_R["default"].grad, full[1])
    layer.deft_P["default"].requires_grad_(True)
    layer.deft_R["default"].requires_grad_(False)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.deft_P["default"].grad, full[0])
    layer.requires_grad_(False)
    assert not layer(x).requires_grad and layer(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("method", ["qr", "relu", "para", "svd", "lora", "qr-gate-alpha"])
@pytest.mark.parametrize("form", ["activation", "merged"])
def test_compiles_without_a_graph_break(kind, method, form, monkeypatch):
    force_form(monkeypatch, form)
    layer, x = adapted(kind, method), example(kind).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected, dx = gradients(layer), x.grad.clone()
    layer.zero_grad()
    x.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    z = compiled(x)
    torch.testing.assert_close(z, y)
    z.backward(dy)
    torch.testing.assert_close(gradients(layer), expected)
    torch.testing.assert_close(x.grad, dx)


def test_a_new_strength_needs_no_recompilation():
    layer, x = adapted("linear", "qr"), example("linear", 50)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for strength in (1.0, 0.5, -3.0, 0.0):
            layer.set_adapters({"default": strength})
            with torch._dynamo.config.patch(error_on_recompile=strength != 1.0):
                torch.testing.assert_close(compiled(x), reference_output(layer, x, strength=strength))


def test_compiles_with_inductor():
    layer, x = adapted("linear", "qr", torch.float32), example("linear", 50, torch.float32)
    y = layer(x)
    y.sum().backward()
    expected = gradients(layer)
    layer.zero_grad()
    z = torch.compile(layer, fullgraph=True)(x)
    z.sum().backward()
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(gradients(layer), expected)


@pytest.mark.parametrize("method", reference.DECOMPOSITIONS)
@pytest.mark.parametrize("para", [False, True])
def test_functional_forms(method, para):
    x, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 6), (5, 6), (5,)))
    P, R = torch.randn(5, 2, dtype=torch.float64), None if para else torch.randn(2, 6, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in ([x, P] if para else [x, P, R])]
    options = {"decomposition_method": method, "scale": 0.7}
    expected = reference.merged_weight(W, P, R, method, 0.7)
    torch.testing.assert_close(dk.deft_linear(x, W, b, P, R, **options), x @ expected.T + b)
    torch.testing.assert_close(dk.deft_weight(W, P, R, **options), expected)
    last = (lambda t: t) if not para else (lambda t: [*t, None])
    assert torch.autograd.gradcheck(lambda x, *pr: dk.deft_linear(x, W, b, *last(pr), **options), inputs)
    assert torch.autograd.gradcheck(lambda *pr: dk.deft_weight(W, *last(pr), **options), inputs[1:])


def test_functional_forms_in_half_precision():
    x, W, P, R = torch.randn(9, 6).bfloat16(), torch.randn(5, 6).bfloat16(), torch.randn(5, 2), torch.randn(2, 6)
    assert dk.deft_linear(x, W, None, P, R).dtype == torch.bfloat16
    merged = dk.deft_weight(W, P, R)
    exact = reference.merged_weight(W.double(), P.double(), R.double())
    assert merged.dtype == torch.bfloat16 and (merged.double() - exact).norm() <= 2**-8 * exact.norm()


def test_functional_errors():
    W, P, R = torch.randn(5, 6), torch.randn(5, 2), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"unknown decomposition_method 'lu'"):
        dk.deft_weight(W, P, R, decomposition_method="lu")
    with pytest.raises(ValueError, match=r"P \(4, 2\) and R \(2, 6\) do not fit a weight of \(5, 6\)"):
        dk.deft_weight(W, P[:4], R)
    with pytest.raises(ValueError, match="requires grad"):
        dk.deft_linear(torch.randn(3, 6), W.requires_grad_(), None, P, R)
    with pytest.raises(ValueError, match=r"torch.int64, expected a floating dtype"):
        dk.deft_weight(torch.ones(5, 6, dtype=torch.int64), P, R)


def test_layers_refuse_what_they_cannot_adapt():
    with pytest.raises(TypeError, match="groups=2"):
        dk.DeftConv2d(nn.Conv2d(4, 4, 3, groups=2), dk.DeftConfig())
    with pytest.raises(TypeError, match="not Embedding"):
        dk.DeftLinear(nn.Embedding(4, 4), dk.DeftConfig())
    layer = adapted("linear", "qr", torch.float32)
    with pytest.raises(ValueError, match=r"input of shape \(3, 5\) does not fit a linear layer of 6"):
        layer(torch.randn(3, 5))
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"input is {dtype}, but the layer's weight is torch.float32"):
            layer(torch.ones(300, 6, dtype=dtype))
    for opaque in (True, False):  # the activation form's base layer refuses by itself
        with pytest.raises((RuntimeError, ValueError)):
            adapted("linear", "qr", torch.float32, Opaque(6, 5) if opaque else None)(torch.ones(1, 6, dtype=torch.int64))


def test_a_base_layer_is_frozen_only_if_it_is_adapted():
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="not finite|identity|r is"):
        dk.DeftLinear(base, dk.DeftConfig(r=0))
    assert base.weight.requires_grad
    dk.DeftLinear(base, dk.DeftConfig(r=2))
    assert not base.weight.requires_grad


def test_made_under_inference_mode_it_still_trains():
    base = nn.Linear(6, 5)
    with torch.inference_mode():
        layer = dk.DeftLinear(base, dk.DeftConfig(r=2))
    layer.set_adapters({"default": 0.5})
    layer(torch.randn(4, 6)).sum().backward()
    assert layer.deft_P["default"].grad is not None


@pytest.mark.parametrize("options,message", [
    ({"r": 0}, "r is 0"), ({"r": -2}, "r is -2"), ({"r": 2.0}, "r is 2.0"),
    ({"decomposition_method": "lu"}, "unknown decomposition_method 'lu'"), ({"dropout": 1.0}, "dropout is 1.0"),
    ({"alpha": 0}, "alpha is 0"), ({"para": True, "gate": True}, "gate scales the injection"),
    ({"target_modules": []}, "empty list"), ({"alpha": float("inf")}, "alpha is inf"),
    ({"dropout": "0.1"}, "dropout is '0.1'"),
    ({"target_modules": "*"}, "is no regular expression"), ({"init_scale": float("nan")}, "init_scale is nan"),
])  # fmt: skip
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        dk.DeftConfig(**options)


def test_the_forms_are_the_ones_meant(monkeypatch):
    """Few rows take the activation form, many the factor form, and neither is taken for the other."""
    calls = []
    for node in (ActivationLinear, LowRankLinear):
        original = node.apply
        monkeypatch.setattr(node, "apply", lambda *a, o=original, n=node.__name__: (calls.append(n), o(*a))[1])
    layer = dk.DeftLinear(nn.Linear(256, 128).requires_grad_(False), dk.DeftConfig(r=16))
    layer(torch.randn(4, 256))
    layer(torch.randn(1024, 256))
    assert calls == ["ActivationLinear", "LowRankLinear"]
