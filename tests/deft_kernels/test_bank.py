"""The bank: one node per forward, right under everything that training does to a model."""

import copy
import os
import tempfile

import pytest
import torch
import torch.multiprocessing as mp
from common import force_form, gradients, small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers
from deft_kernels.nn import layers
from deft_kernels.nn.prepare import Prepare

ALL = ["to_q", "to_k", "to_v", "to_out.0", "conv_in"]


@pytest.fixture(params=["weight", "factor"])
def form(request, monkeypatch):
    force_form(monkeypatch, request.param)
    return request.param


def adapted_model(**options):
    torch.manual_seed(3)
    model = small_model().double()
    dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False, target_modules=ALL, **options))
    return model, torch.randn(2, 3, 4, 4, dtype=torch.float64)


def loss_and_gradients(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), gradients(model)


def alone(model, x):
    """The same with every layer preparing for itself."""
    bank = model.__dict__["_deft_bank"]
    layers, bank.layers = bank.layers, []
    for layer in layers:
        layer._bank = layer._factors = None
    result = loss_and_gradients(model, x)
    bank.layers = layers
    return result


@pytest.fixture
def prepared(monkeypatch):
    """Counts the forwards and backwards of prepare, and the layers of each."""
    counts = {"forward": [], "backward": []}
    original = Prepare.apply, Prepare.backward

    def apply(specs, *rest):
        counts["forward"].append(len(specs))
        return original[0](specs, *rest)

    def backward(ctx, *grads):
        counts["backward"].append(len(ctx.specs))
        return original[1](ctx, *grads)

    monkeypatch.setattr(Prepare, "apply", apply)
    monkeypatch.setattr(Prepare, "backward", staticmethod(backward))
    return counts


@pytest.mark.parametrize("options", [{}, {"gate": True}, {"para": True}, {"dropout": 0.0, "decomposition_method": "relu"}])
def test_one_node_per_step_and_the_same_result(options, prepared, form):
    model, x = adapted_model(**options)
    expected = alone(model, x)
    assert prepared["forward"] == [1] * 9
    prepared["forward"].clear(), prepared["backward"].clear()
    torch.testing.assert_close(loss_and_gradients(model, x), expected)
    assert prepared == {"forward": [9], "backward": [9]}
    whole = [name for name, layer in adapted_layers(model).items() if layer._factors[0].W is not None]
    assert len(whole) == (8 if form == "weight" else 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, prepared, form):
    model, x = adapted_model()
    expected = loss_and_gradients(model, x)
    model.checkpointing = use_reentrant
    prepared["backward"].clear()
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradients(model, x), expected)
    if not use_reentrant:  # the recomputation finds the bank's factors
        assert prepared["backward"] == [9, 9]


@pytest.mark.parametrize("between", ["nothing", "no_grad forward", "another forward", "a larger forward"])
def test_checkpointing_with_other_forwards_before_the_backward(between, monkeypatch):
    """What is recomputed keeps what the forward kept, whatever the bank has prepared since."""
    monkeypatch.setattr(layers, "weight_is_cheaper", lambda *shape: False)
    torch.manual_seed(3)
    model = small_model(width=64).double()
    dk.inject_adapter(model, dk.DeftConfig(r=16, init_weights=False, target_modules=ALL))
    model.checkpointing = False
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    expected = loss_and_gradients(copy.deepcopy(model), x)
    forms = []
    for _ in range(3):
        model.zero_grad()
        loss = model(x).square().mean()
        extra = 0.0
        if between == "no_grad forward":
            with torch.no_grad():
                model(x)
        elif between == "another forward":
            extra = model(x).square().mean() * 0
        elif between == "a larger forward":  # what it sees asks for another form
            extra = model(torch.randn(1, 3, 12, 12, dtype=torch.float64)).square().mean() * 0
        forms.append(model.blocks[0].to_q._by_activation)
        (loss + extra).backward()
        torch.testing.assert_close((loss.detach(), gradients(model)), expected)
    # A form changes between steps only: the first knows of no rows yet, the later ones go by those recomputed last.
    assert forms == [False, True, True]


def test_accumulation_over_forwards_and_over_backwards(form):
    model, x = adapted_model()
    y = torch.randn_like(x)
    expected = {k: g + loss_and_gradients(model, y)[1][k] for k, g in loss_and_gradients(model, x)[1].items()}
    model.zero_grad()
    for z in (x, y):
        model(z).square().mean().backward()
    torch.testing.assert_close(gradients(model), expected)
    model.zero_grad()
    (model(x).square().mean() + model(y).square().mean()).backward()  # two forwards, then one backward
    torch.testing.assert_close(gradients(model), expected)


def test_a_part_of_the_model_called_by_itself_prepares_for_itself(prepared, form):
    model, x = adapted_model()
    model(x).square().mean().backward()
    inner = torch.randn(2, 16, 8, dtype=torch.float64)
    before = model.blocks[0](inner)
    before.sum().backward()  # would fail if it went through the model's graph a second time
    assert prepared["forward"] == [9, 1, 1, 1, 1]
    with torch.no_grad():
        model.blocks[0].to_q.deft_P["default"].add_(0.1)
    assert not torch.equal(model.blocks[0](inner), before)  # no stale factors


def test_factors_follow_the_parameters(form):
    model, x = adapted_model()
    with torch.no_grad():
        before = model(x)
        model.conv_in.deft_P["default"].data.add_(0.1)  # not even the version counter moves
        assert not torch.equal(model(x), before)
    layers = model.__dict__["_deft_bank"].layers
    assert all(layer._factors is None and layer._passing is None for layer in layers)  # nothing is kept without grad


def test_a_layer_frozen_or_unused_gets_no_gradient(form):
    model, x = adapted_model()
    expected = loss_and_gradients(model, x)[1]
    model.blocks[1].requires_grad_(False)
    got = loss_and_gradients(model, x)[1]
    torch.testing.assert_close(got, {k: v for k, v in expected.items() if not k.startswith("blocks.1")})
    del model.blocks[0]
    assert all(not k.startswith("conv") or v.isfinite().all() for k, v in loss_and_gradients(model, x)[1].items())


def test_an_exception_in_the_forward_leaves_no_trace(form):
    model, x = adapted_model()
    expected = loss_and_gradients(model, x)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    inner = torch.randn(2, 16, 8, dtype=torch.float64)
    one = model.blocks[0](inner)
    dk.set_adapters(model, "default", 0.1)
    assert not torch.allclose(model.blocks[0](inner), one)  # nothing of that forward is left over
    dk.set_adapters(model, "default")
    torch.testing.assert_close(loss_and_gradients(model, x), expected)


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_compiled_model(use_reentrant, form):
    model, x = adapted_model()
    expected = loss_and_gradients(model, x)
    model.checkpointing = use_reentrant
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean()
    loss.backward()
    torch.testing.assert_close((loss.detach(), gradients(model)), expected)


def test_autocast_inside_and_around(form):
    model, x = adapted_model()
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        around = model(x)
    inner = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(inner)  # as accelerate does: the bank runs outside of it
    inside = model(x)
    assert around.dtype == inside.dtype
    torch.testing.assert_close(inside, around, rtol=2e-2, atol=2e-2)
    inside.float().square().mean().backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


def test_activation_form_is_taken_from_the_second_forward_on(prepared, monkeypatch):
    """The bank learns how many rows a layer sees: few rows are cheaper without projecting A."""
    monkeypatch.setattr(layers, "weight_is_cheaper", lambda *shape: False)  # as if these layers were large
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 128)).double()
    dk.inject_adapter(model, dk.DeftConfig(r=8, target_modules="all-linear", init_weights=False))
    x = torch.randn(4, 256, dtype=torch.float64)
    first, second = loss_and_gradients(model, x), loss_and_gradients(model, x)
    assert model[0]._factors[0].A is None and model[0]._factors[0].K is not None
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    "config",
    [
        *(dk.DeftConfig(r=2, decomposition_method=d, alpha=3.0, init_weights=False) for d in ("qr", "svd", "relu")),
        dk.DeftConfig(r=2, gate=True, init_weights=False),
        dk.DeftConfig(r=2, para=True),
        dk.LoraConfig(r=2, init_weights=False),
    ],
    ids=["qr", "svd", "relu", "gate", "para", "lora"],
)
def test_small_layers_are_prepared_whole(config, dtype):
    """The weight form: the same loss and gradients, at another strength too; without grad; and where P alone trains."""
    torch.manual_seed(3)
    model, x = small_model().to(dtype), torch.randn(2, 3, 4, 4, dtype=dtype)
    config.target_modules = ALL
    dk.inject_adapter(model, config)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}
    for strength in (1.0, -0.7):
        dk.set_adapters(model, ["default"], strength)
        expected = alone(model, x)
        torch.testing.assert_close(loss_and_gradients(model, x), expected, **close)
        forms = {name: layer._factors[0].W is not None for name, layer in adapted_layers(model).items()}
        assert sum(forms.values()) == 8 and not forms["conv_in"]
        with torch.no_grad():
            torch.testing.assert_close(model(x).square().mean(), expected[0], **close)
    for name, p in model.named_parameters():
        p.requires_grad_("deft_P" in name)
    (_, grads), every = loss_and_gradients(model, x), expected[1]
    torch.testing.assert_close(grads, {name: g for name, g in every.items() if "deft_P" in name}, **close)


def test_no_weight_form_in_half_precision_under_dropout_or_for_two_adapters():
    x = torch.randn(2, 3, 4, 4)

    def whole(model, x):
        model(x).float().square().mean().backward()
        return any(layer._factors[0].W is not None for layer in adapted_layers(model).values())

    def model_with(**options):
        model = small_model()
        dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=ALL, **options))
        return model

    assert whole(model_with(), x)
    assert not whole(model_with(dropout=0.5).train(), x)
    assert not whole(model_with().bfloat16(), x.bfloat16())
    two = model_with()
    dk.inject_adapter(two, dk.DeftConfig(r=2, target_modules=ALL), "other")
    dk.set_adapters(two, ["default", "other"])
    assert not whole(two, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not whole(model_with(), x)


def test_the_weight_form_ends_with_its_adapter_while_a_backward_waits():
    model, x = adapted_model()
    dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False, target_modules=ALL), "other")
    waiting = model(x)
    dk.set_adapters(model, ["default", "other"])
    loss = model(x).square().mean().detach()
    torch.testing.assert_close(loss, alone(model, x)[0])
    assert waiting.requires_grad


def train(rank: int, world: int, folder: str):
    torch.set_num_threads(1)
    model, x = adapted_model()
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x[rank::world]).square().mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save({k.removeprefix("module."): p for k, p in model.state_dict().items()}, f"{folder}/{world}.pt")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        train(0, 1, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        mp.spawn(train, (2, folder), nprocs=2)
        one, two = (torch.load(f"{folder}/{n}.pt") for n in (1, 2))
    torch.testing.assert_close(two, one)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("blocks", [True, False], ids=["block by block", "the model alone"])
def test_a_base_split_by_fsdp(blocks, one_process):
    """Inside a block weights appear only while it runs, so that its layers go by its output; the model's own are there."""
    model, x = adapted_model()
    expected, wanted = loss_and_gradients(model, x)
    mesh = init_device_mesh("cpu", (1,))
    adapters = {p for p in model.parameters() if p.requires_grad}
    wrapped = [m for m in model.modules() if type(m).__name__ == "Block"] if blocks else []
    inside = {m for block in wrapped for m in block.modules()}
    for module in (*wrapped, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    adapted = [m for m in model.modules() if isinstance(m, layers.DeftLayer)]
    assert bool(wrapped) == blocks and all(layer.dense_weight() is None for layer in adapted)
    for _ in range(2):
        loss, found = loss_and_gradients(model, x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, wanted)
        assert all((layer._factors[0].K is not None) == (layer in inside) for layer in adapted)
