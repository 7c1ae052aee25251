"""PEFT's DEFT layers on our operations: the same numbers and files, exact unmerging, strengths, routing, and the way back.

PEFT itself, unpatched, is the oracle beside the reference in float64: an error may be twice that of PEFT's own layers (plus
`FLOOR` roundings of float32, where both are at the limit).
"""

import contextlib
import copy
import gc
import importlib
import io
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from common import Opaque
from peft import DeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.deft.layer import DeftLayer as PeftLayer
from peft.tuners.deft.layer import DeftLinear as PeftLinear
from peft.tuners.deft.model import DeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.adapters import peft as patch

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Already following adapters")

METHODS = {
    "qr": {"decomposition_method": "qr"},
    "relu": {"decomposition_method": "relu"},
    "qr-alpha": {"decomposition_method": "qr", "alpha": 12},
    "qr-para": {"decomposition_method": "qr", "para": True},
    "relu-para": {"decomposition_method": "relu", "para": True},
}
TARGETS = ["first", "second", "last"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FLOOR = 8 * torch.finfo(torch.float32).eps


class Net(nn.Module):
    reentrant = None  # checkpoint the layers: None, or `use_reentrant`

    def __init__(self, opaque=False):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(24, 40), Conv1D(31, 40), nn.Linear(31, 9, bias=False)
        if opaque:
            self.first = Opaque(24, 40)
        nn.init.normal_(self.second.bias)

    def forward(self, x):
        for i, layer in enumerate((self.first, self.second, self.last)):
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x = torch.tanh(x) if i < 2 else x
        return x


def build(method="qr", adapters=1, dtype=torch.float32, autocast_adapter_dtype=True, dropout=0.0, opaque=False, **options):
    torch.manual_seed(11)
    model = Net(opaque).to(dtype)
    for i in range(adapters):
        config = DeftConfig(r=4 + i, target_modules=TARGETS, init_weights=False, fan_in_fan_out=True, deft_dropout=dropout,
                            **METHODS[method], **options)  # fmt: skip
        if i == 0:
            model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=autocast_adapter_dtype)
    with torch.no_grad():
        for layer in deft_layers(model).values():
            layer.fan_in_fan_out = isinstance(layer.base_layer, Conv1D)  # PEFT's second adapter sets it on every layer
            for p in (*layer.deft_P.values(), *layer.deft_R.values()):
                p.add_(torch.randn_like(p) * 0.1)
    names = ["default", *(f"a{i}" for i in range(1, adapters))]
    model.base_model.set_adapter(names)
    return model


def deft_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PeftLinear)}


@contextlib.contextmanager
def patched():
    dk.patch_peft()
    try:
        yield
    finally:
        dk.unpatch_peft()


@pytest.fixture
def kernels():
    with patched():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often our layers' forward ran: a test that compares PEFT with itself must fail."""
    count = []
    original = patch.PeftView.forward
    monkeypatch.setattr(patch.PeftView, "forward", lambda self, x, *a, **k: count.append(1) or original(self, x, *a, **k))
    return count


def run(model, x, dy, autocast=False, seed=5):
    """Output and gradients of x and of every parameter that trains."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


def oracle(model, x, dy, dtype=torch.float64):
    """`run` by the reference: the truth in float64, or the factor form's own rounding in a narrower type, to which the
    factors are cast from float32."""
    wide = torch.promote_types(dtype, torch.float32)
    x, leaves = x.to(dtype, copy=True).requires_grad_(), {}
    h = x
    for i, (name, layer) in enumerate(deft_layers(model).items()):
        base = layer.get_base_layer()
        W = (base.weight.t() if isinstance(base, Conv1D) else base.weight).detach()
        pairs = []
        for adapter in layer.active_adapters:
            P, R = (
                leaves.setdefault(f"{name}.{key}.{adapter}", store[adapter].detach().to(wide, copy=True).requires_grad_())
                if adapter in store
                else None
                for key, store in (("deft_P", layer.deft_P), ("deft_R", layer.deft_R))
            )
            method, scale = layer.deft_decomposition[adapter], layer.deft_scaling[adapter]
            pairs.append([f.to(dtype) for f in reference.factors(W.to(wide), P, R, method, scale)])
        factors = reference.compose(pairs, [1.0] * len(pairs))
        h = reference.lowrank_linear(h, W.to(dtype), None if base.bias is None else base.bias.detach().to(dtype), *factors)
        h = torch.tanh(h) if i < 2 else h
    h.backward(dy.to(dtype))
    return {"y": h.detach(), "x": x.grad} | {name: p.grad for name, p in leaves.items()}


def assert_as_near(ours, theirs, exact, rounded=None):
    """Errors at most twice PEFT's; in a narrow type, where PEFT widens all of its activations to float32, those of P's and
    R's gradients at most twice the larger of PEFT's and of the same maths in that type (`rounded`)."""
    assert set(ours) == set(theirs) == set(exact)
    for name, t in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        peers = [theirs] if rounded is None or name in "xy" else [theirs, rounded]
        error, *allowed = [((r[name].double() - t).norm() / t.norm()).item() for r in (ours, *peers)]
        assert error <= 2 * max(allowed) + FLOOR, f"{name}: {error}, peers {allowed}"


# The same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 300])  # activation and factor form
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_as_exact_as_peft(method, adapters, dtype, rows, calls):
    torch.manual_seed(0)
    x, dy = torch.randn(2, rows, 24).to(dtype), torch.randn(2, rows, 9).to(dtype)
    model = build(method, adapters, dtype)
    theirs = run(model, x, dy)
    assert not calls
    with patched():
        ours = run(model, x, dy)  # a model built before the patch
        assert len(calls) == 3
    assert_as_near(ours, theirs, oracle(model, x, dy), oracle(model, x, dy, dtype))
    after = run(model, x, dy)  # and after it PEFT's own numbers, to the bit
    assert len(calls) == 3 and all(torch.equal(after[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_parameters_in_half_precision(dtype, calls):
    x, dy = torch.randn(50, 24).to(dtype), torch.randn(50, 9).to(dtype)
    model = build("qr", 2, dtype, autocast_adapter_dtype=False)
    theirs = run(model, x, dy)
    with patched():
        ours = run(model, x, dy)
    assert len(calls) == 3 and ours["base_model.model.first.deft_P.default"].dtype == dtype
    assert_as_near(ours, theirs, oracle(model, x, dy), oracle(model, x, dy, dtype))


@pytest.mark.parametrize("method", ["qr", "relu-para"])
def test_autocast(method, calls):
    x, dy = torch.randn(50, 24), torch.randn(50, 9)
    model = build(method, 2)
    theirs = run(model, x, dy, autocast=True)
    with patched():
        ours = run(model, x, dy, autocast=True)
    assert len(calls) == 3
    assert_as_near(ours, theirs, oracle(model, x, dy))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_checkpointing_dropout_and_layers_known_by_their_output(reentrant, dropout, opaque, calls):
    x, dy = torch.randn(50, 24), torch.randn(50, 9)
    results = []
    for on in (False, True):
        with patched() if on else contextlib.nullcontext():
            model = build("qr", 2, dropout=dropout, opaque=opaque)
            model.get_base_model().reentrant = reentrant
            results.append([run(model, x, dy, seed=seed) for seed in (5, 6)])
    assert len(calls) == (6 if reentrant is None else 12)
    for theirs, ours in zip(*results):
        for name in theirs:
            assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
    assert dropout == 0 or not torch.equal(results[1][0]["y"], results[1][1]["y"])


def test_fifty_training_steps_agree(kernels):
    curves, x, target = [], torch.randn(64, 24), torch.randn(64, 9)
    for on in (True, False):
        model = build("qr")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        if not on:
            dk.unpatch_peft()
        curve = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_base_that_trains_keeps_its_gradients(trained, calls):
    x, dy = torch.randn(50, 24), torch.randn(50, 9)
    model = build("qr")
    for name in ("first", "second"):
        getattr(model.get_base_model().get_submodule(name).base_layer, trained).requires_grad_(True)
    theirs = run(model, x, dy)
    with patched():
        ours = run(model, x, dy)
    assert len(calls) == 3 and f"base_model.model.second.base_layer.{trained}" in ours
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("injected", [False, True])
def test_compiles_into_one_graph(injected, warm, kernels):
    x, dy = torch.randn(50, 24), torch.randn(50, 9)
    model = build("qr", 2)
    for layer in deft_layers(model).values():
        layer.set_scale("a1", 0.5)  # which PEFT's own code would not compute
    model = model.get_base_model() if injected else model
    if warm:
        run(model, x, dy), run(model, x, dy)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = run(compiled, x, dy)
    run(compiled, x, dy)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run(compiled, x, dy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    eager = run(model, x, dy)
    for name, t in eager.items():
        found = ours[name if name in "xy" else f"_orig_mod.{name}"]
        assert (found - t).norm() <= 1e-5 * t.norm(), name
    dk.unpatch_peft()
    assert (run(model, x, dy)["y"] - eager["y"]).norm() > 0.01 * eager["y"].norm()


# One launch for a whole model -----------------------------------------------------------------------------------------


@pytest.fixture
def preparations(monkeypatch):
    """How many layers each call of prepare_layers had."""
    from deft_kernels.nn import layers

    sizes, original = [], layers.prepare_layers

    def counted(members, rows=None, **more):
        sizes.append(len(members))
        return original(members, rows, **more)

    monkeypatch.setattr(layers, "prepare_layers", counted)
    return sizes


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_peft_model_prepares_all_layers_together(reentrant, kernels, preparations):
    model, x = build("qr", 2), torch.randn(300, 24)
    model.get_base_model().reentrant = reentrant
    for _ in range(2):
        model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert preparations == [3, 3, 3]
    assert not model.get_base_model()._forward_pre_hooks


def test_an_injected_model_prepares_all_layers_together_from_its_second_call(kernels, preparations):
    model, x = Net(), torch.randn(300, 24)
    inject_adapter_in_model(DeftConfig(r=4, target_modules=["first", "second"], fan_in_fan_out=True), model)
    y = model(x)
    assert preparations == [1, 1]
    preparations.clear()
    assert torch.equal(model(x), y)
    inject_adapter_in_model(DeftConfig(r=4, target_modules=["last"]), model, "more")
    for layer in deft_layers(model).values():
        layer.set_adapter(["default", "more"])
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)  # both start at the identity
    duplicate = copy.deepcopy(model)
    assert preparations == [2, 3]
    torch.testing.assert_close(duplicate(x), y, rtol=1e-5, atol=1e-6)
    assert preparations == [2, 3, 1, 1, 1]
    assert b"deft_kernels" not in pickle.dumps(model)
    dk.unpatch_peft()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_model_with_a_hook_of_its_own(kernels, preparations):
    model, x = Net(), torch.randn(300, 24)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    inject_adapter_in_model(DeftConfig(r=4, target_modules=["first", "last"]), model)
    for _ in range(3):
        model(x).sum().backward()
    assert preparations == [1, 1, 2, 2] and len(seen) == 3


def test_a_model_injected_before_the_patch(preparations):
    model, x = Net(), torch.randn(300, 24)
    inject_adapter_in_model(DeftConfig(r=4, target_modules=TARGETS, fan_in_fan_out=True), model)
    expected = model(x)
    with patched():
        torch.testing.assert_close(model(x), expected)
        assert preparations == [1, 1, 1]
        assert dk.patch_peft(model) == {}
        model(x), model(x)
        assert preparations == [1, 1, 1, 1, 1, 1, 3]


def test_inference_mode_before_training(kernels):
    x, dy = torch.randn(50, 24), torch.randn(50, 9)
    model = build("qr", 2)
    expected = run(model, x, dy)
    dk.unpatch_peft()
    dk.patch_peft()
    with torch.inference_mode():
        model(x)
        model.base_model.set_adapter([])  # the first state that a view sees, and one without adapters
        model(x)
        model.base_model.set_adapter(["default", "a1"])
        model(x)
        model.merge_adapter()
    model.unmerge_adapter()
    found = run(model, x, dy)
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    model.base_model.set_adapter([])
    model(x)


def test_nothing_keeps_a_model_alive(kernels):
    model = build("qr")
    model(torch.randn(3, 24))
    layer = weakref.ref(next(iter(deft_layers(model).values())))
    del model
    gc.collect()
    assert layer() is None


# Merging --------------------------------------------------------------------------------------------------------------


def weights(model):
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in deft_layers(model).items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_merge_is_pefts_and_unmerge_exact(method, adapters, safe, kernels):
    model, x = build(method, adapters).eval(), torch.randn(7, 24)
    before, expected = weights(model), model(x)
    pointers = [layer.weight.data_ptr() for layer in deft_layers(model).values()]
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    merged = weights(model)
    assert pointers == [layer.weight.data_ptr() for layer in deft_layers(model).values()]
    assert "deft_pristine" not in "".join(model.state_dict())
    model.unmerge_adapter()
    assert equal(weights(model), before) and not any(layer.merged for layer in deft_layers(model).values())
    dk.unpatch_peft()
    model.merge_adapter()
    for name, w in weights(model).items():
        torch.testing.assert_close(merged[name], w, rtol=1e-4, atol=1e-5)


def test_ten_thousand_cycles_to_the_bit(kernels):
    base = nn.Linear(6, 5, dtype=torch.bfloat16)
    model = get_peft_model(nn.ModuleDict({"layer": base}), DeftConfig(r=2, target_modules=["layer"], init_weights=False))
    layer, before = model.base_model.model["layer"], base.weight.detach().clone()
    layer.merge()
    merged = base.weight.detach().clone()
    assert not torch.equal(merged, before)
    layer.unmerge()
    for _ in range(10_000):
        layer.merge()
        layer.unmerge()
    assert torch.equal(base.weight, before)
    layer.merge()
    assert torch.equal(base.weight, merged)


def test_a_second_adapter_merges_from_the_pristine_weight(kernels):
    model, x = build("qr", 2).eval(), torch.randn(7, 24)
    before, expected = weights(model), model(x)
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["a1"])
    assert next(iter(deft_layers(model).values())).merged_adapters == ["default", "a1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges on the way
        torch.testing.assert_close(model(x), model.get_base_model()(x))
    model.unmerge_adapter()
    assert equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_snapshot_follows_its_layer(dtype, kernels):
    model = build("qr", dtype=dtype)
    before = weights(model)
    model.merge_adapter()
    duplicate = copy.deepcopy(model)
    reloaded = pickle.loads(pickle.dumps(model))
    for copied in (duplicate, reloaded, model.double()):
        copied.unmerge_adapter()
        assert all(torch.equal(w.to(dtype), before[name]) for name, w in weights(copied).items())
        assert not any("deft_pristine" in name for name, _ in copied.named_buffers())


def test_what_is_written_while_merged_stays(kernels):
    model = build("qr")
    layer, before = deft_layers(model)["base_model.model.first"], weights(model)["base_model.model.first"]
    model.merge_adapter()
    with torch.no_grad():
        layer.weight.add_(1.0)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight.detach(), before + 1.0, rtol=1e-5, atol=1e-5)


def test_merge_and_unload_and_a_failing_safe_merge(kernels):
    model, x = build("qr").eval(), torch.randn(7, 24)
    expected, before = model(x), weights(model)
    layer = deft_layers(model)["base_model.model.first"]
    good = layer.deft_R["default"].detach().clone()
    layer.deft_R["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert equal(weights(model), before) and not layer.merged
    layer.deft_R["default"].data.copy_(good)
    plain = model.merge_and_unload()
    assert not deft_layers(plain) and not plain._forward_pre_hooks
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_merge_and_an_adapter_deleted_while_merged(kernels, monkeypatch):
    model = build("qr", 2)
    layer, before = deft_layers(model)["base_model.model.first"], weights(model)["base_model.model.first"]

    class Ops:
        project = torch.ops.deft_kernels.project

        @staticmethod
        def merge_into(out, W, B, K, R):
            out[0][:2] = 0
            raise KeyboardInterrupt

    with monkeypatch.context() as patched_ops:
        patched_ops.setattr(patch, "_ops", Ops)
        with pytest.raises(KeyboardInterrupt):
            layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged and not dict(layer.named_buffers())
    layer.merge()
    layer.delete_adapter("a1")  # as diffusers' delete_adapters does, without a word about merging
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_delta_weight_is_the_adapters_own_also_while_merged(kernels):
    model = build("qr-alpha", 2)
    layer = deft_layers(model)["base_model.model.second"]
    before = layer.weight.detach().clone()
    delta = layer.get_delta_weight("a1")
    layer.set_scale("a1", 0.5)
    layer.merge(adapter_names=["a1"])
    torch.testing.assert_close(layer.weight.detach() - before, 0.5 * delta, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.get_delta_weight("a1"), 0.5 * delta)
    dk.unpatch_peft()
    layer.unmerge()
    torch.testing.assert_close(layer.get_delta_weight("a1"), delta, rtol=1e-4, atol=1e-6)


# Files ----------------------------------------------------------------------------------------------------------------


def saved(what):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


def test_files_state_dicts_and_pickles_are_identical(tmp_path):
    files, pickles, x = [], [], torch.randn(5, 24)
    for on in (False, True):
        with patched() if on else contextlib.nullcontext():
            model = build("qr", 2)
            model(x).sum().backward()
            model.zero_grad()
            pickles.append(saved(model))
            if on:
                model.merge_adapter()
                model.unmerge_adapter()
            model.save_pretrained(tmp_path / str(on))
            found = {f.relative_to(tmp_path / str(on)): f.read_bytes() for f in (tmp_path / str(on)).rglob("*.*")}
            files.append(found | {"state_dict": saved(model.state_dict())})
    assert pickles[0] == pickles[1]
    assert set(files[0]) == set(files[1]) and len(files[0]) == 6  # two adapters, a card, a state dict
    assert all(files[0][name] == files[1][name] for name in files[0])
    with patched():
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "False")
        model.base_model.set_adapter("default")
        torch.testing.assert_close(loaded(x), model(x))


# Strength -------------------------------------------------------------------------------------------------------------


def delta(model, x):
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    return model(x).detach() - base


@pytest.mark.parametrize("rows", [3, 300])
def test_strength_is_honoured(rows, kernels):
    layer = build("qr-alpha", 2).base_model.model.first
    x = torch.randn(rows, 24)
    base = layer.base_layer(x)
    layer.set_adapter("default")
    one = layer(x) - base
    layer.set_adapter("a1")
    two = layer(x) - base
    layer.set_adapter(["default", "a1"])
    layer.set_scale("default", -0.5)
    layer.set_scale("a1", 2)
    layer.set_scale("unknown", 7)
    torch.testing.assert_close(layer(x) - base, -0.5 * one + 2 * two, rtol=1e-4, atol=1e-5)
    layer.scale_layer(0.5)
    torch.testing.assert_close(layer(x) - base, -0.25 * one + two, rtol=1e-4, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x) - base, -0.25 * one + two, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    layer.unscale_layer(0.5)
    torch.testing.assert_close(layer(x) - base, -0.5 * one + 2 * two, rtol=1e-4, atol=1e-5)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x) - base, one + two, rtol=1e-4, atol=1e-5)
    assert "deft_strength" not in "".join(layer.state_dict())
    layer.set_scale("a1", 3.0)
    layer.delete_adapter("a1")
    assert layer.deft_strength == {}
    with pytest.raises(ValueError, match="'default' is nan, expected a finite number"):
        layer.set_scale("default", float("nan"))
    with pytest.raises(ValueError, match="cannot be divided back"):
        layer.unscale_layer(0)


def test_diffusers_set_adapters_and_fuse_reach_the_layers(kernels):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    plain = copy.deepcopy(unet)
    config = {"r": 3, "decomposition_method": "qr", "init_weights": False, "target_modules": ["to_q", "to_k", "to_out.0"]}
    for name in ("dog", "hat"):
        unet.add_adapter(DeftConfig(**config), name)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    unet.set_adapters(["dog", "hat"], [0.7, -0.4])
    with torch.no_grad():
        ours = unet(*inputs).sample
        for adapter in ("dog", "hat"):  # the same through dk
            dk.inject_adapter(plain, dk.DeftConfig(**config), adapter)
            for key, layer in deft_layers(unet).items():
                for role, p in plain.get_submodule(key).adapter_tensors(adapter).items():
                    p.copy_(getattr(layer, f"deft_{role}")[adapter])
        dk.set_adapters(plain, ["dog", "hat"], [0.7, -0.4])
        torch.testing.assert_close(ours, plain(*inputs).sample, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, plain_sample(unet, inputs), atol=1e-3)
        half = unet(*inputs, cross_attention_kwargs={"scale": 0.5}).sample
        dk.set_adapters(plain, ["dog", "hat"], [0.35, -0.2])
        torch.testing.assert_close(half, plain(*inputs).sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unet(*inputs).sample, ours, rtol=1e-4, atol=1e-5)
        before = weights(unet)
        unet.fuse_lora(lora_scale=0.5)
        torch.testing.assert_close(unet(*inputs).sample, half, rtol=1e-4, atol=1e-5)
        unet.unfuse_lora()
        assert equal(weights(unet), before)


def plain_sample(unet, inputs):
    unet.disable_adapters()
    sample = unet(*inputs).sample
    unet.enable_adapters()
    return sample


# Routing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qr", "relu-para"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_row_goes_through_its_adapter(method, dtype, kernels):
    model = build(method, 3, dtype).eval()
    model.base_model.set_adapter("default")
    names = ["a1", "__base__", "a2", "default", "a1"]
    x = torch.randn(5, 6, 24).to(dtype)
    y = model(x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x[i : i + 1])
        else:
            model.base_model.set_adapter(name)
            alone = model(x[i : i + 1])
        # one row and several are summed in another order: a rounding of the type
        torch.testing.assert_close(y[i : i + 1], alone, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert not any(layer._forward_pre_hooks for layer in deft_layers(model).values())


def test_routing_has_gradients(kernels):
    model = build("qr", 2).eval()
    x = torch.randn(2, 6, 24, requires_grad=True)
    model(x, adapter_names=["default", "a1"]).sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for i, name in enumerate(["default", "a1"]):
        for layer in deft_layers(model).values():
            layer._active_adapter = [name]
        model(x[i : i + 1]).sum().backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[key], p.grad, rtol=1e-4, atol=1e-5)


def test_routing_refuses_what_it_cannot_do(kernels):
    model, x = build("qr", 2), torch.randn(2, 24)
    with pytest.raises(ValueError, match="in training mode"):
        model(x, adapter_names=["default", "a1"])
    model.eval()
    with pytest.raises(ValueError, match="non-existing adapter.*dog"):
        model(x, adapter_names=["default", "dog"])
    with pytest.raises(ValueError, match="1 entries for a batch of 2"):
        model(x, adapter_names=["default"])
    assert not any(layer._forward_pre_hooks for layer in deft_layers(model).values())  # after an error too
    model.merge_adapter()
    with pytest.raises(ValueError, match="default, a1 is merged: call unmerge_adapter"):
        model(x, adapter_names=["default", "a1"])


def test_routing_reaches_modules_to_save(kernels):
    torch.manual_seed(2)
    config = DeftConfig(
        r=3, decomposition_method="qr", init_weights=False, target_modules=["first"], modules_to_save=["last"]
    )
    model = get_peft_model(Net(), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for p in model.base_model.model.last.modules_to_save.parameters():
            p.normal_()
    model.eval()
    x, names = torch.randn(3, 24), ["other", "__base__", "default"]
    y = model(x, adapter_names=names)
    for i, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1]), rtol=1e-5, atol=1e-5)


def test_generation_with_beams_routes_each_prompt(kernels):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, bos_token_id=0, eos_token_id=39))
    config = DeftConfig(r=3, decomposition_method="qr", init_weights=False, fan_in_fan_out=True, target_modules=["c_attn"])
    model = get_peft_model(gpt, config).eval()
    model.add_adapter("other", config)
    with torch.no_grad():
        for layer in deft_layers(model).values():
            for p in layer.deft_R.values():
                p.normal_(std=2.0)
    prompts = torch.tensor([[1, 2, 3], [1, 2, 3]])
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 39}
    mask = torch.ones_like(prompts)
    routed = model.generate(input_ids=prompts, attention_mask=mask, adapter_names=["default", "other"], **options)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=prompts[:1], attention_mask=mask[:1], **options)[0])
    assert torch.equal(routed[0], alone[0]) and torch.equal(routed[1], alone[1])
    assert not torch.equal(alone[0], alone[1])


# What cannot be served ------------------------------------------------------------------------------------------------


def test_layers_that_keep_pefts_code_are_named():
    model, x = build("qr"), torch.randn(3, 24)
    layer = deft_layers(model)["base_model.model.second"]
    layer.forward = layer.forward  # as accelerate's hooks do
    expected = model(x)
    with patched():
        reasons = dk.patch_peft(model)
        assert (
            list(reasons) == ["base_model.model.second"] and "replaced on the object" in reasons["base_model.model.second"]
        )
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="keeps PEFT's code, without: its forward was replaced"):
            layer.set_scale("default", 0.5)
        with pytest.raises(ValueError, match="cannot route through second, which keeps PEFT's code"):
            model.eval()(x, adapter_names=["default"] * 3)
        del layer.forward
        assert dk.patch_peft(model) == {}


def test_a_second_adapter_where_linear_and_conv1d_meet():
    """PEFT gives the second adapter's `fan_in_fan_out` to every layer, whatever its weight's layout."""
    config, x = DeftConfig(r=4, decomposition_method="qr", target_modules=TARGETS, fan_in_fan_out=True), torch.randn(9, 24)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        get_peft_model(Net(), config).add_adapter("second", config)
    with patched():
        model = get_peft_model(Net(), config)
        model.add_adapter("second", config)
        assert [layer.fan_in_fan_out for layer in deft_layers(model).values()] == [False, True, False]
        model.base_model.set_adapter(["default", "second"])
        with model.disable_adapter():
            base = model(x)
        torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)  # both start at the identity


def quantised(kind: str) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    library = importlib.import_module("torchao.quantization" if kind == "torchao" else "bitsandbytes")
    if kind == "torchao":
        library.quantize_(plain, library.Int8WeightOnlyConfig())
        return plain
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": "nf4"}
    layer = getattr(library.nn, kind)(64, 48, **options)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit", "torchao"])
def test_quantised_bases_train_and_refuse_to_merge_by_name(kind, kernels):
    layer, x = quantised(kind), torch.randn(9, 64)
    base = layer(x)
    model = get_peft_model(
        nn.ModuleDict({"layer": layer}), DeftConfig(r=4, decomposition_method="qr", target_modules=["layer"])
    )
    layer = model.base_model.model["layer"]
    y = layer(x)
    assert (y - base).norm() <= 0.02 * base.norm()  # the identity at the start; int8 rounds the input to 1 in 127
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in (layer.deft_P["default"], layer.deft_R["default"]))
    with pytest.raises(ValueError, match=r"cannot merge: layer: its weight is no plain one"):
        model.merge_adapter()
    for call in (layer.merge, lambda: layer.get_delta_weight("default")):
        with pytest.raises(ValueError, match="cannot take an adapter into its weight"):
            call()


# The patch itself -----------------------------------------------------------------------------------------------------


def contents():
    return {(cls, name): value for cls in (PeftLayer, PeftLinear, DeftModel) for name, value in vars(cls).items()}


def test_without_deft_in_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.deft.layer", None)
    with pytest.raises(ImportError, match="patch_peft needs a PEFT that has DEFT"):
        dk.patch_peft()


def test_unpatch_restores_the_very_functions():
    before = contents()
    dk.unpatch_peft()  # without a patch: nothing
    dk.patch_peft()
    dk.patch_peft()
    assert PeftLinear.forward is not before[PeftLinear, "forward"]
    dk.unpatch_peft()
    after = contents()
    assert set(before) == set(after)
    assert all(after[key] is value for key, value in before.items() if key[1] != "__abstractmethods__")


def test_another_peft_is_refused_whole(monkeypatch):
    before = contents()
    monkeypatch.delattr(PeftLinear, "get_delta_weight")
    with pytest.raises(RuntimeError, match=r"missing DeftLinear.get_delta_weight; nothing is patched"):
        dk.patch_peft()
    assert PeftLinear.forward is before[PeftLinear, "forward"]


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("method", ["qr-alpha", "relu-para"])
def test_unpatching_a_merged_model(method, strength):
    with patched():
        model = build(method, 2)
        before = weights(model)
        for layer in deft_layers(model).values():
            layer.set_scale("a1", strength)
        model.merge_adapter()
        duplicate = copy.deepcopy(model)
    for m in (model, duplicate):
        assert not any("deft_pristine" in name for name, _ in m.named_buffers())
        m.unmerge_adapter()  # PEFT's
        for name, w in weights(m).items():
            torch.testing.assert_close(w, before[name], rtol=1e-5, atol=1e-6)
        m(torch.randn(2, 24)).sum().backward()


def test_patching_a_merged_model():
    model = build("qr", 2)
    before = weights(model)
    model.merge_adapter(adapter_names=["default"])
    with patched():
        model.merge_adapter(adapter_names=["a1"])
        model.unmerge_adapter()
    for name, w in weights(model).items():
        torch.testing.assert_close(w, before[name], rtol=1e-5, atol=1e-6)


def test_hooks_that_keep_a_patched_forward_outlive_the_patch():
    """accelerate's hooks hold the method that they found; it must go on working, unpatched and patched again."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    x = torch.randn(5, 24)
    expected = build(adapters=2)(x)
    with patched():
        model = build(adapters=2)
        for layer in deft_layers(model).values():
            add_hook_to_module(layer, ModelHook())
        torch.testing.assert_close(model(x), expected)
        assert dk.patch_peft(model) == {}
    assert torch.equal(model(x), expected)
    with patched():
        assert dk.patch_peft(model) == {}
        torch.testing.assert_close(model(x), expected)


def test_layers_that_share_a_weight_are_unmerged():
    """By PEFT's code, whose writes torch does not count: no layer takes the update of another for its pristine weight."""
    with patched():
        base = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        base[2].weight = base[0].weight
        model = get_peft_model(
            base, DeftConfig(r=4, target_modules=["0", "2"], init_weights=False, decomposition_method="qr")
        )
        before = base[0].base_layer.weight.detach().clone()
        for _ in range(2):
            model.merge_adapter()
            assert (base[0].base_layer.weight - before).norm() > 1e-2
            model.unmerge_adapter()
            torch.testing.assert_close(base[0].base_layer.weight.detach(), before, rtol=0, atol=1e-5)


def test_a_model_unmerged_elsewhere_keeps_no_stale_snapshot():
    with patched():
        model = build()
        model.merge_adapter()
        kept = io.BytesIO()
        torch.save(model, kept)
    kept.seek(0)
    model = torch.load(kept, weights_only=False)
    model.unmerge_adapter()
    with torch.no_grad():
        for layer in deft_layers(model).values():
            layer.base_layer.weight.add_(1.0)
    x = torch.randn(4, 24)
    expected = model(x)
    with patched():
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_rests_in_eval(kernels):
    model = build(dropout=0.5)
    x = torch.randn(6, 24)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    with contextlib.ExitStack() as out:
        out.callback(dk.patch_peft)
        dk.unpatch_peft()
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_base_layer_that_is_replaced_is_followed(kernels):
    model = build()
    x = torch.randn(6, 24)
    before = model(x)
    layer = deft_layers(model)["base_model.model.first"]
    layer.base_layer = nn.Linear(24, 40)
    after = model(x)
    dk.unpatch_peft()
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-5)
    dk.patch_peft()
    assert not torch.allclose(after, before)


def test_disabled_adapters_are_not_routed(kernels):
    model = build(adapters=2).eval()
    x = torch.randn(2, 24)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, adapter_names=["default", "a1"]), model(x))


@pytest.mark.parametrize("cause", ["sharded", "decomposition"])
def test_adapters_that_are_not_understood_stay_with_peft(cause, kernels):
    model = build()
    layer = deft_layers(model)["base_model.model.first"]
    if cause == "sharded":
        layer.deft_P["default"] = type("Sharded", (nn.Parameter,), {})(layer.deft_P["default"].detach().clone())
    else:
        layer.deft_decomposition["default"] = "cayley"
    (reason,) = dk.patch_peft(model).values()
    assert {"sharded": "no plain parameter", "decomposition": "'cayley'"}[cause] in reason


def test_models_and_scales_that_make_no_sense(kernels):
    with pytest.raises(ValueError, match="Linear has no DEFT layer"):
        dk.patch_peft(nn.Linear(3, 3))
    layer = deft_layers(build())["base_model.model.first"]
    for scale in (np.float32(0.5), torch.tensor(0.5)):
        layer.set_scale("default", scale)
        assert layer.deft_strength == {"default": 0.5}
    for scale in (float("nan"), "1", None):
        with pytest.raises(ValueError, match="expected a finite number"):
            layer.set_scale("default", scale)


def test_a_4_bit_base_trains_on_after_sampling(kernels):
    """bitsandbytes repacks 4-bit weights in a forward without gradients where the processor has AVX512-BF16."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    base = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)))
    base = base.to("cpu")
    model = get_peft_model(base, DeftConfig(r=4, target_modules=["0", "1"], decomposition_method="qr"))
    x, gradients = torch.randn(8, 64), []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first)


def test_pefts_own_tests_pass_as_without_the_patch(tmp_path):
    """The outcome of every DEFT test of PEFT, one by one, patched and not."""
    root = os.environ.get("DEFT_KERNELS_PEFT_TESTS")
    if not root:
        pytest.skip(
            "DEFT_KERNELS_PEFT_TESTS is not set: the folder of a checkout of huggingface/peft that has tests/test_deft.py"
        )
    (tmp_path / "patch_plugin.py").write_text("import deft_kernels\ndeft_kernels.patch_peft()\n")
    outcomes, files = [], ["tests/test_deft.py", "tests/test_custom_models.py"]
    for plugin in ([], ["-p", "patch_plugin"]):
        report = tmp_path / f"report{len(plugin)}.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-k", "deft", *files,
                   "-c", os.devnull, "--rootdir", root, "-p", "no:cacheprovider", *plugin]  # fmt: skip
        path = os.pathsep.join([str(tmp_path), str(Path(dk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        report.write_text(done.stdout)
        lines = [line.partition(" - ")[0] for line in done.stdout.splitlines()]
        outcomes.append(sorted(line for line in lines if line.startswith(("PASSED", "FAILED", "ERROR"))))
    assert sum(line.startswith("PASSED") for line in outcomes[0]) > 100, done.stdout[-2000:]
    assert outcomes[1] == outcomes[0]
