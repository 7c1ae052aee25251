"""Adapters into a model and out of it; what is wrong is said, and the model stays as it was."""

import copy

import pytest
import torch
from common import Opaque, small_model
from torch import nn

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers

ATTENTION = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")]


def fingerprint(model):
    return [(name, type(m)) for name, m in model.named_modules()], {
        name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()
    }


def assert_untouched(model, before):
    modules, parameters = fingerprint(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (p, grad) in parameters.items():
        assert torch.equal(p, before[1][name][0]) and grad == before[1][name][1], name


@pytest.mark.parametrize("targets,expected", [
    (None, ATTENTION),
    (["to_q", "blocks.1.to_v"], ["blocks.0.to_q", "blocks.1.to_q", "blocks.1.to_v"]),
    (r"blocks\.0\..*", ATTENTION[:4]),
    ("all-linear", ATTENTION),
    (["conv_in", "to_out.0"], ["conv_in", "blocks.0.to_out.0", "blocks.1.to_out.0"]),
])  # fmt: skip
def test_targets_are_matched_as_peft_matches_them(targets, expected):
    assert sorted(dk.inject_adapter(small_model(), dk.DeftConfig(r=2, target_modules=targets))) == sorted(expected)


def test_targets_against_peft():
    from peft import DeftConfig, get_peft_model

    for targets in (["to_q", "to_out.0"], r".*\.1\.to_(q|k)", "all-linear", ["blocks.0.to_v"]):
        for exclude in (None, ["to_k", "blocks.1.to_q"], r"blocks\.0.*"):
            try:
                model = get_peft_model(small_model(), DeftConfig(r=2, target_modules=targets, exclude_modules=exclude))
            except ValueError:  # nothing left
                with pytest.raises(ValueError, match="no layer of Model matches"):
                    dk.inject_adapter(small_model(), dk.DeftConfig(target_modules=targets, exclude_modules=exclude))
                continue
            theirs = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "deft_P")]
            ours = dk.inject_adapter(small_model(), dk.DeftConfig(r=2, target_modules=targets, exclude_modules=exclude))
            assert sorted(ours) == sorted(theirs)


def test_only_the_adapter_trains_and_eject_gives_the_very_modules_back():
    model, x = small_model(), torch.randn(2, 3, 4, 4)
    model.conv_in.weight.requires_grad_(False)
    before, modules, y = fingerprint(model), dict(model.named_modules()), model(x)
    dk.inject_adapter(model, dk.DeftConfig(r=2))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 16 and all(".deft_" in name for name in trainable)
    torch.testing.assert_close(model(x), y)
    dk.inject_adapter(model, dk.LoraConfig(r=3, target_modules=["conv_in", "to_q"]), "second")
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    assert adapted_layers(model)["blocks.0.to_q"].active == ["second"]
    dk.merge(model, ["default", "second"], [0.5, 2])
    dk.eject(model)
    assert_untouched(model, before)
    assert dict(model.named_modules()) == modules and torch.equal(model(x), y)
    assert not model._forward_pre_hooks and not model._forward_hooks and "_deft_bank" not in model.__dict__


def test_a_module_used_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))})
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"))
    assert model["a"] is model["b"][0] and isinstance(model["a"], dk.DeftLinear)
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"), "second")
    dk.merge(model, ["default", "second"])
    dk.eject(model)
    assert model["a"] is shared and model["b"][0] is shared


def test_strengths():
    model, x = small_model(), torch.randn(2, 3, 4, 4)
    base = model(x)
    for name in "ab":
        dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False), name)
    outputs = {}
    for names, weights in (("a", None), ("b", None), (["a", "b"], [0.3, -0.4]), ([], None), (["a"], 0.0)):
        dk.set_adapters(model, names, weights)
        outputs[str(names), str(weights)] = model(x)
    torch.testing.assert_close(outputs["[]", "None"], base, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs["['a']", "0.0"], base)
    values = list(outputs.values())
    assert not torch.allclose(values[0], values[1]) and not torch.allclose(values[2], base)
    dk.delete_adapter(model, "a")
    with pytest.raises(ValueError, match=r"no adapter named 'a'; the model has b \(did you mean 'b'\?\)"):
        dk.set_adapters(model, "a")


def test_trainability_rests_with_an_inactive_adapter():
    model = small_model()

    def trainable():
        return sorted({name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad})

    dk.inject_adapter(model, dk.DeftConfig(r=2), "a")
    dk.inject_adapter(model, dk.DeftConfig(r=2), "b")
    assert trainable() == ["b"]
    dk.set_adapters(model, "a")
    assert trainable() == ["a"]
    dk.set_adapters(model, [])
    assert trainable() == []
    dk.set_adapters(model, ["a", "b"])
    assert trainable() == ["a", "b"]
    for p in dk.adapter_parameters(model, "b")["P"]:
        p.requires_grad_(False)
    dk.set_adapters(model, "a")
    dk.set_adapters(model, "b")
    assert {p.requires_grad for p in dk.adapter_parameters(model, "b")["P"]} == {False}
    assert {p.requires_grad for p in dk.adapter_parameters(model, "b")["R"]} == {True}
    model.conv_in.requires_grad_(True)  # somebody trains another part as well
    dk.inject_adapter(model, dk.DeftConfig(r=2), "c")
    assert model.conv_in.weight.requires_grad


@pytest.mark.parametrize("outer_first", [False, True])
def test_nested_roots(outer_first):
    model, x = small_model(), torch.randn(2, 3, 4, 4)
    base, before = model(x), fingerprint(model)
    roots = [model, model.blocks[0]] if outer_first else [model.blocks[0], model]
    for root, name in zip(roots, "ab"):
        dk.inject_adapter(root, dk.DeftConfig(r=2, init_weights=False), name)
    assert not torch.allclose(model(x), base)
    model(x).sum().backward()
    dk.eject(model.blocks[0])
    model(x).sum().backward()
    dk.eject(model)
    torch.testing.assert_close(model(x), base, rtol=1e-6, atol=1e-6)
    assert_untouched(model, before)


def test_modules_that_read_weights_directly_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(TypeError, match=r"attention.out_proj: a MultiheadAttention reads its layers' weights"):
        dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"))
    assert dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear", exclude_modules=["out_proj"])) == [
        "linear"
    ]
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(ValueError, match="weight is on the meta device"):
        dk.inject_adapter(model, dk.DeftConfig(r=2))
    layer = dk.DeftLinear(nn.Linear(4, 4), dk.DeftConfig(r=2))
    with pytest.raises(TypeError, match="this is the adapted layer itself"):
        dk.eject(layer)


def test_adapter_parameters_by_role():
    model = small_model()
    dk.inject_adapter(model, dk.DeftConfig(r=2, gate=True))
    groups = dk.adapter_parameters(model)
    assert {role: len(ps) for role, ps in groups.items()} == {"P": 8, "R": 8, "gate": 8}
    assert {id(p) for ps in groups.values() for p in ps} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("options,error,message", [
    ({"target_modules": ["to_qq"]}, ValueError, r"'to_qq' matches no layer of Model; the nearest names are .*to_q"),
    ({"target_modules": ["to_q", "xyzzy"]}, ValueError, r"'xyzzy' matches no layer"),
    ({"target_modules": r"nothing\..*"}, ValueError, r"no layer of Model matches .* end in: 0, conv_in, to_k"),
    ({"exclude_modules": r".*"}, ValueError, r"no layer of Model matches"),
    ({"target_modules": ["to_out"]}, TypeError, r"matches blocks.0.to_out, a ModuleList"),
])  # fmt: skip
def test_bad_targets(options, error, message):
    model = small_model()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        dk.inject_adapter(model, dk.DeftConfig(r=2, **options))
    assert_untouched(model, before)


def test_bad_models_and_names():
    model = small_model()
    model.blocks[1].to_v.weight.data[0, 0] = float("nan")
    before = fingerprint(model)[0]
    with pytest.raises(ValueError, match=r"blocks.1.to_v: the adapter's first values are not finite"):
        dk.inject_adapter(model, dk.DeftConfig(r=2))
    assert fingerprint(model)[0] == before and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="without dots"):
        dk.inject_adapter(small_model(), dk.DeftConfig(r=2), "a.b")
    for name in ("keys", "training", "_modules"):
        with pytest.raises(ValueError, match=f"'{name}' is an attribute"):
            dk.inject_adapter(small_model(), dk.DeftConfig(r=2), name)
    with pytest.raises(TypeError, match=r"the model itself is a Linear"):
        dk.inject_adapter(nn.Linear(4, 4), dk.DeftConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TypeError, match=r"grouped: DeftConv2d does not adapt grouped|matches grouped, a Conv2d"):
        model = nn.Sequential()
        model.add_module("grouped", nn.Conv2d(4, 4, 3, groups=2))
        dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=["grouped"]))
    with pytest.raises(ValueError, match="Linear has no adapter"):
        dk.set_adapters(nn.Linear(4, 4), "default")
    model = small_model()
    dk.inject_adapter(model, dk.DeftConfig(r=2))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        dk.inject_adapter(model, dk.DeftConfig(r=2))
    for weights, message in (([1.0, 2.0], "1 adapter names but 2 weights"), (float("inf"), "not all finite")):
        with pytest.raises(ValueError, match=message):
            dk.set_adapters(model, "default", weights)
    assert_untouched(model, before)


def test_a_failing_second_adapter_leaves_the_first():
    model = small_model()
    dk.inject_adapter(model, dk.DeftConfig(r=2))
    adapted_layers(model)["blocks.1.to_v"].base_layer.weight.data[0, 0] = float("nan")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        dk.inject_adapter(model, dk.DeftConfig(r=2), "second")
    assert set(model.state_dict()) == before


def test_layers_without_a_dense_weight_are_adapted_by_their_output():
    model = nn.Sequential(Opaque(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin[0].__class__ = nn.Linear
    torch.manual_seed(1)
    dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False, target_modules="all-linear"))
    torch.manual_seed(1)
    dk.inject_adapter(twin, dk.DeftConfig(r=2, init_weights=False, target_modules="all-linear"))
    torch.testing.assert_close(model(x), twin(x))
    with pytest.raises(ValueError, match="0: cannot merge into this layer: its weight is quantised"):
        dk.merge(model)
