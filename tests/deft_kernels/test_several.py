"""Several adapters at once: weighted, one after the other, jointly, and one for each sample of a batch."""

import copy
import itertools

import pytest
import torch
from common import CONFIGS, FORMS, LAYERS, Opaque, adapted, example, force_form, gradients, make, small_model, weight_matrix
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.adapters.inject import adapted_layers
from deft_kernels.nn.layers import Routes

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_in"]
STRENGTHS = {"qr-gate-alpha": 0.7, "relu": -1.3, "lora": 2.0, "para": 0.4}


def model_with(methods, dtype=torch.float64, targets=TARGETS, r=None):
    """A small model with an adapter of each method, none of them at its start."""
    model = small_model().to(dtype)
    for i, method in enumerate(methods):
        config = copy.copy(CONFIGS[method])
        config.target_modules, config.init_weights, config.r = targets, False, r or 2 + i
        dk.inject_adapter(model, config, method)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in [*layer.deft_P.values(), *layer.deft_R.values(), *layer.deft_gate.values()]:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def one_after_the_other(layer, strengths) -> torch.Tensor:
    """W' by the definition: each adapter acts on the weight that those before it have made."""
    W = layer.matrix(layer.weight.detach())
    for name, strength in strengths.items():
        tensors, config = layer.masters(name), layer.configs[name]
        r = tensors.get("R")
        if r is not None:
            r = r * strength * config.scale(r.shape[0])
            r = r * torch.sigmoid(tensors["gate"]) if "gate" in tensors else r
        if config.method == "lora":
            W = W + tensors["P"] @ r
        else:
            B, K = reference.decompose(tensors["P"], config.method)
            W = W - B @ (K.mT @ W) * strength + (0 if r is None else B @ r)
    return W


def plain_copy(model, weights):
    """The model as plain layers with the given weights."""
    plain = copy.deepcopy(model)
    layers = adapted_layers(plain)
    with torch.no_grad():
        for name, W in weights.items():
            layers[name].weight.copy_(W.reshape(layers[name].weight.shape))
    dk.eject(plain)
    return plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", list(itertools.permutations(STRENGTHS))[::7])
def test_sequential_is_one_after_the_other(order, form, monkeypatch):
    force_form(monkeypatch, form)
    model = model_with(STRENGTHS)
    strengths = {name: STRENGTHS[name] for name in order}
    layers = adapted_layers(model)
    weights = {name: one_after_the_other(layer, strengths) for name, layer in layers.items()}
    plain, x = plain_copy(model, weights), torch.randn(3, 3, 4, 4, dtype=torch.float64)

    dk.set_adapters(model, list(order), list(strengths.values()), combine="sequential")
    torch.testing.assert_close(model(x), plain(x))
    dk.set_adapters(model, list(order), list(strengths.values()))
    assert not torch.allclose(model(x), plain(x), rtol=1e-3)

    dk.merge(model, list(order), list(strengths.values()), combine="sequential")
    for name, layer in layers.items():
        torch.testing.assert_close(layer.matrix(layer.weight), weights[name])
    dk.unmerge(model)
    dk.set_adapters(model, list(order), list(strengths.values()), combine="sequential")
    dk.merge(model)  # as they are active
    for name, layer in layers.items():
        torch.testing.assert_close(layer.matrix(layer.weight), weights[name])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("combination", ["sequential", "joint"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_combinations(kind, combination, form, monkeypatch):
    force_form(monkeypatch, form)
    layer = adapted(kind, "para")
    second = copy.copy(CONFIGS["para" if combination == "joint" else "relu"])
    second.r = 1
    layer.add_adapter("second", second)
    layer.set_adapters({"default": 0.8, "second": 0.8}, combination)
    parameters = [p for name in ("default", "second") for p in layer.adapter_tensors(name).values()]
    for p in parameters:
        p.data.add_(torch.randn_like(p) * 0.3)
    x = example(kind).requires_grad_()

    def f(x, *values):
        names = [k for k, p in layer.named_parameters() if any(p is q for q in parameters)]
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    named = [p for _, p in layer.named_parameters() if any(p is q for q in parameters)]
    assert torch.autograd.gradcheck(f, (x, *named))


@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_joint_removes_the_union_of_the_subspaces_once(dtype, eps):
    layer = dk.DeftLinear(make("linear", dtype), dk.DeftConfig(r=2, para=True), "a")
    layer.add_adapter("b", dk.DeftConfig(r=2, para=True, decomposition_method="svd"))
    layer.set_adapters({"a": 1.0, "b": 1.0}, "joint")
    model = nn.ModuleDict({"layer": layer})
    Ps = [layer.masters(name)["P"].detach() for name in "ab"]
    _, A = reference.compose_joint(W := weight_matrix(layer.base_layer).to(Ps[0].dtype), Ps)
    Q = reference.compose_joint(W, Ps)[0]
    expected, x = W + Q @ A, torch.randn(7, 6, dtype=dtype)
    torch.testing.assert_close(layer(x), (x.to(W.dtype) @ expected.mT + layer.bias).to(dtype), rtol=eps, atol=eps)
    dk.merge(model, ["a", "b"], combine="joint")
    torch.testing.assert_close(layer.weight, expected.to(dtype), rtol=eps, atol=eps)


@pytest.mark.parametrize("combination", ["sequential", "joint"])
def test_combinations_in_half_precision_round_once(combination):
    """No further from the float64 truth than the sum of the same adapters is from its own."""
    errors = {}
    for how in ("sum", combination):
        torch.manual_seed(3)
        exact = dk.DeftLinear(nn.Linear(96, 128).double(), dk.DeftConfig(r=4, para=True), "a")
        exact.add_adapter("b", dk.DeftConfig(r=4, para=True))
        with torch.no_grad():  # subspaces that nearly share a direction, where rounded bases would tell
            exact.deft_P["b"][:, 0] = exact.deft_P["a"][:, 0] + 1e-2 * exact.deft_P["b"][:, 0]
        exact.set_adapters({"a": 1.0, "b": 1.0}, how)
        x = torch.randn(64, 96, dtype=torch.float64)
        half = copy.deepcopy(exact).bfloat16()
        truth = exact(x)
        errors[how] = ((half(x.bfloat16()).double() - truth).norm() / truth.norm()).item()
        with torch.autocast("cpu", torch.bfloat16):
            cast = copy.deepcopy(exact).float()(x.float())
        assert (cast.double() - truth).norm() <= 2 * errors["sum"] * truth.norm()
    assert errors[combination] <= 2 * errors["sum"]


def test_joint_counts_a_shared_direction_once():
    """As qr([Q, Q]) would not: its second half is made of rounding."""
    layer = dk.DeftLinear(make("linear", torch.float32), dk.DeftConfig(r=2, para=True), "a")
    layer.add_adapter("b", dk.DeftConfig(r=2, para=True), {"P": layer.deft_P["a"] @ torch.randn(2, 2)})
    x = torch.randn(4, 6)
    alone = layer(x)
    layer.set_adapters({"a": 1.0, "b": 1.0}, "joint")
    torch.testing.assert_close(layer(x), alone, rtol=1e-4, atol=1e-4)
    layer.set_adapters({"a": 1.0, "b": 1.0}, "sequential")  # projecting twice is projecting once
    torch.testing.assert_close(layer(x), alone, rtol=1e-4, atol=1e-4)
    layer.set_adapters({"a": 1.0, "b": 1.0})
    assert not torch.allclose(layer(x), alone, rtol=1e-2)


def test_combinations_cost_no_m_by_n_work():
    """The flops beyond the sum's own do not grow with n, and with m only by r^2."""
    flops = {}
    for combination, (m, n) in itertools.product(("sum", "sequential", "joint"), ((256, 64), (256, 512), (512, 64))):
        layer = dk.DeftLinear(nn.Linear(n, m), dk.DeftConfig(r=4, para=True), "a")
        layer.add_adapter("b", dk.DeftConfig(r=4, para=True))
        layer.set_adapters({"a": 1.0, "b": 1.0}, combination)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.zeros(4, n))
        flops[combination, m, n] = counter.get_total_flops()
    for combination in ("sequential", "joint"):
        extra = {(m, n): flops[combination, m, n] - flops["sum", m, n] for (_, m, n) in flops if _ == "sum"}
        assert 0 < extra[256, 64] == extra[256, 512] <= 4 * 256 * 8**2
        assert extra[512, 64] == 2 * extra[256, 64]


def test_a_new_strength_of_a_combination_needs_no_recompilation():
    model = model_with(["qr", "para"], torch.float32)
    dk.set_adapters(model, ["qr", "para"], [1.0, 1.0], combine="sequential")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        dk.set_adapters(model, ["qr", "para"], [0.3, -2.0], combine="sequential")
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), model(x))


def test_combinations_that_cannot_be():
    model = model_with(["qr", "para"])
    with pytest.raises(ValueError, match="combine is 'jointly', expected one of sum, sequential, joint"):
        dk.set_adapters(model, ["qr"], combine="jointly")
    with pytest.raises(ValueError, match=r"conv_in: only PaRa adapters .* act jointly, and 'qr' is none"):
        dk.set_adapters(model, ["qr", "para"], combine="joint")
    with pytest.raises(ValueError, match="act jointly, and 'qr' is none"):
        dk.merge(model, ["qr", "para"], combine="joint")
    dk.set_adapters(model, ["qr", "para"], combine="sequential")
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=TARGETS), "third")
    dk.set_adapters(model, ["qr", "para", "third"], combine="sequential")
    dk.delete_adapter(model, "third")  # the others go on as they were
    assert all(layer.combination == "sequential" for layer in adapted_layers(model).values())
    dk.set_adapters(model, ["qr"])
    wide = model_with(["para"], r=6)
    dk.inject_adapter(wide, dk.DeftConfig(r=3, para=True, target_modules=TARGETS), "more")
    with pytest.raises(ValueError, match="conv_in: 9 directions cannot be removed from the 8 of its output"):
        dk.set_adapters(wide, ["para", "more"], combine="joint")
    with pytest.raises(ValueError, match="at one strength, not at 1, 2"):
        dk.set_adapters(model, ["para", "qr"], [1.0, 2.0], combine="joint")
    assert not any(layer.is_merged or layer.combination != "sum" for layer in adapted_layers(model).values())


# One adapter for each sample ------------------------------------------------------------------------------------------

ROUTED = ["qr", "base", "lora", "para", "qr", "relu"]
PER_SAMPLE = [1.0, 1.0, -0.5, 2.0, 0.25, 1.0]


def routed_model(dtype=torch.float64):
    return model_with(["qr", "lora", "para", "relu", "svd"], dtype)


def alone(model, x, name, weight):
    dk.set_adapters(model, [] if name == "base" else [name], None if name == "base" else [weight])
    return model(x[None])[0]


@pytest.mark.parametrize("form", ["activation", "factor"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_each_sample_as_if_alone_forward_and_backward(form, checkpointing, monkeypatch):
    force_form(monkeypatch, form)
    model = routed_model()
    x = torch.randn(len(ROUTED), 3, 4, 4, dtype=torch.float64)
    dy = torch.randn(len(ROUTED), 16, 8, dtype=torch.float64)

    inputs = x.clone().requires_grad_()
    outputs = torch.stack([alone(model, s, name, w) for s, name, w in zip(inputs, ROUTED, PER_SAMPLE)])
    dk.set_adapters(model, ["qr", "lora", "para", "relu"])  # so that all of them train
    for s, name, w, g in zip(inputs, ROUTED, PER_SAMPLE, dy):
        only = {} if name == "base" else {name: w}
        for layer in adapted_layers(model).values():  # the others' parameters keep requires_grad
            layer.strengths, layer.active = only, list(only)
            layer._write_scales()
        model(s[None])[0].backward(g)
    expected, dx = gradients(model), inputs.grad.clone()
    model.zero_grad()

    dk.route_adapters(model, ROUTED, PER_SAMPLE)
    model.checkpointing = checkpointing
    again = x.clone().requires_grad_()
    y = model(again)
    torch.testing.assert_close(y, outputs)
    y.backward(dy)
    torch.testing.assert_close(again.grad, dx)
    found = gradients(model)
    assert found.keys() == expected.keys() and any("conv_in" in k for k in found)
    for key, g in expected.items():
        torch.testing.assert_close(found[key], g)


class OpaqueConv2d(nn.Conv2d):
    """A convolution whose weight cannot be used directly."""

    def forward(self, x):
        return super().forward(x)


OPAQUE = {"linear": lambda: Opaque(6, 5), "conv2d": lambda: OpaqueConv2d(3, 5, 3, stride=2, padding=1)}


@pytest.mark.parametrize("kind", [*LAYERS, *(f"opaque {kind}" for kind in OPAQUE)])
@pytest.mark.parametrize("methods", [("qr", "lora"), ("para", "qr-gate-alpha"), ("lora", "relu")])
def test_gradcheck_of_routed_layers(kind, methods):
    opaque, kind = kind.startswith("opaque"), kind.removeprefix("opaque ")
    base = OPAQUE[kind]().double().requires_grad_(False) if opaque else None
    first = "qr-random" if opaque and methods[0] == "qr" else methods[0]  # no identity start without a weight
    layer = adapted(kind, first, base=base)
    second = copy.copy(CONFIGS[methods[1]])
    second.r, second.init_weights = 2, False
    layer.add_adapter("second", second)
    layer.set_adapters(
        {"default": 1.0, "second": 1.0}, routes=Routes("it", [("second", -0.7), (None, 1.0), ("default", 2.0)])
    )
    named = {k: p for k, p in layer.named_parameters() if p.requires_grad and "deft_" in k}
    x = torch.cat([example(kind, rows=3)] * 2)[:3].clone().requires_grad_()

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(named, values)), (x,))

    assert torch.autograd.gradcheck(f, (x, *named.values()))
    y = layer(x)
    torch.testing.assert_close(y[1], layer.base_layer(x)[1], rtol=0, atol=0)
    for sample, name, weight in ((0, "second", -0.7), (2, "default", 2.0)):
        layer.set_adapters({name: weight})
        torch.testing.assert_close(y[sample : sample + 1], layer(x[sample : sample + 1]))


@pytest.mark.parametrize(
    "dtype, autocast", [(torch.float32, False), *itertools.product((torch.bfloat16, torch.float16), (False, True))]
)
def test_routed_in_other_precisions(dtype, autocast):
    """As near to the float64 truth as a sample alone, which goes through the usual layer, is."""
    exact = routed_model()
    model = copy.deepcopy(exact).to(torch.float32 if autocast else dtype)
    x = torch.randn(len(ROUTED), 3, 4, 4, dtype=torch.float64)
    given = x.to(torch.float32 if autocast else dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        each = torch.stack([alone(model, s, name, w) for s, name, w in zip(given, ROUTED, PER_SAMPLE)]).double()
        dk.route_adapters(model, ROUTED, PER_SAMPLE)
        together = model(given)
    dk.route_adapters(exact, ROUTED, PER_SAMPLE)
    with torch.no_grad():
        truth = exact(x)
    assert together.dtype == dtype
    assert (together.double() - truth).norm() <= 2 * (each - truth).norm() + torch.finfo(dtype).eps * truth.norm()


def test_dropout_of_each_samples_adapter():
    """Only the injection, only of the samples whose adapter has it; right in the mean."""
    layer = dk.DeftLinear(make("linear"), dk.DeftConfig(r=2, init_weights=False), "kept")
    layer.add_adapter("dropped", dk.DeftConfig(r=3, init_weights=False, init_scale=20.0, dropout=0.5))
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(6, dtype=torch.float64).repeat(3, 4000, 1)
    dk.route_adapters(model, ["dropped", "kept", "base"])
    layer.train()
    with torch.no_grad():
        y = layer(x)
        z = layer.eval()(x)
    torch.testing.assert_close(y[1:], z[1:])
    assert y[0].std(0).min() > 0.01
    torch.testing.assert_close(y[0].mean(0), z[0, 0], atol=5 * float(y[0].std(0).max()) / 4000**0.5, rtol=0)


def test_guidance_asks_for_several_predictions_of_each_sample():
    model = routed_model()
    x = torch.randn(len(ROUTED), 3, 4, 4, dtype=torch.float64)
    dk.route_adapters(model, ROUTED)
    torch.testing.assert_close(model(torch.cat([x, x])), torch.cat([model(x)] * 2))


def test_layers_without_a_samples_adapter_leave_it_alone():
    model = model_with(["qr"], targets=["to_q"])
    dk.inject_adapter(model, dk.LoraConfig(r=2, init_weights=False, target_modules=["to_k"]), "key")
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    routes = ["key", "base", "qr"]
    expected = torch.stack([alone(model, s, name, 1.0) for s, name in zip(x, routes)])
    dk.route_adapters(model, routes)
    torch.testing.assert_close(model(x), expected)
    dk.delete_adapter(model, "key")
    torch.testing.assert_close(model(x)[1:], expected[1:])


def test_one_pass_however_many_adapters():
    """The base layer is called once, and the number of products does not grow with the number of adapters."""
    layer = dk.DeftLinear(nn.Linear(48, 32), dk.DeftConfig(r=2), "a0")
    model, calls = nn.ModuleDict({"layer": layer}), {}
    for i in range(1, 6):
        layer.add_adapter(f"a{i}", dk.DeftConfig(r=2))
    for count in (1, 2, 6):
        dk.route_adapters(model, [f"a{i % count}" for i in range(6)])
        with torch.no_grad(), torch.profiler.profile() as profile:
            layer(torch.randn(6, 20, 48))
        calls[count] = [
            sum(e.count for e in profile.key_averages() if e.key == f"aten::{op}") for op in ("linear", "bmm", "baddbmm")
        ]
    assert calls[1] == calls[2] == calls[6] == [1, 1, 1]


def test_another_routing_needs_no_recompilation():
    model = routed_model(torch.float32)
    dk.route_adapters(model, ROUTED, PER_SAMPLE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(len(ROUTED), 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        dk.route_adapters(model, ["qr", "lora", "para", "relu", "base", "base"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(model(x)[0], model(x)[1])


def test_routings_that_cannot_be():
    model = routed_model()
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="no adapter named 'qe'.*did you mean 'qr'"):
        dk.route_adapters(model, ["qr", "qe"])
    with pytest.raises(ValueError, match="expected a list with one name for each sample"):
        dk.route_adapters(model, "qr")
    with pytest.raises(ValueError, match="2 adapter names but 3 weights"):
        dk.route_adapters(model, ["qr", "base"], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="not all finite"):
        dk.route_adapters(model, ["qr", "base"], [1.0, float("nan")])
    with pytest.raises(ValueError, match="stands for the base model"):
        dk.inject_adapter(model, dk.DeftConfig(target_modules=TARGETS), "base")
    dk.route_adapters(model, ["qr", "base", "lora"])
    with pytest.raises(ValueError, match=r"conv_in: input of shape \(4, 3, 4, 4\) cannot be routed.* a batch of 3"):
        model(x)
    with pytest.raises(ValueError, match="name the adapters that are to be merged"):
        dk.merge(model)
    dk.merge(model, "qr")
    with pytest.raises(RuntimeError, match="unmerge"):
        dk.route_adapters(model, ["qr", "base"])


def test_a_layer_whose_rows_are_no_samples_is_named():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(6, 6)

        def forward(self, hidden_states):
            return self.to_q(hidden_states.flatten(0, 1))

    model = Flattened()
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=["to_q"]), "a")
    dk.route_adapters(model, ["a", "base"])
    with pytest.raises(ValueError, match=r"to_q: input of shape \(8, 6\) cannot be routed.*called with a batch of 2"):
        model(hidden_states=torch.randn(2, 4, 6))
