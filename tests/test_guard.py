"""What must not get slower: counts, which no machine changes, and ratios, with margins that a loaded machine keeps.

Beside each limit stands the figure that was seen. Counted elsewhere, beside what is counted:
- Triton's launches of 560 layers, one for each operation: deft_kernels/test_triton.py, test_launches_of_a_whole_model
- one node for all layers, under checkpointing too: deft_kernels/test_bank.py
- saved bytes of one layer, at SDXL's shapes to the byte: deft_kernels/test_layers.py
- no recompilation: test_layers.py (strengths), test_several.py (combinations, routes), test_merge.py (hot-swaps of other
  ranks and methods), test_diffusers_models.py (1000 hot-swaps between ten adapters)
- one pass however many adapters are routed: test_several.py
"""

import collections
import copy
import statistics
import time

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.nn.prepare import Spec, prepare
from deft_kernels.ops import _dispatch
from tests.deft_kernels.common import Recorder, without_native

deft = torch.ops.deft_kernels
needs_native = pytest.mark.skipif(without_native() is not None, reason=f"csrc's CPU kernels: {without_native()}")


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.delenv("DEFT_KERNELS_BACKEND", raising=False)
    torch.use_deterministic_algorithms(False)  # which fills all new memory


def chain(layers: int, width: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).requires_grad_(False)


def adapted(model: nn.Sequential, r: int = 4, **options) -> nn.Sequential:
    """A copy with DEFT on every layer."""
    model = copy.deepcopy(model)
    targets = [name for name, _ in model.named_children()]
    dk.inject_adapter(model, dk.DeftConfig(r=r, target_modules=targets, **options))
    return model


def lora(model: nn.Sequential, r: int = 4) -> nn.Sequential:
    """A copy with PEFT's LoRA on every layer."""
    targets = [name for name, _ in model.named_children()]
    return inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=targets), copy.deepcopy(model))


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad()


# Counts ---------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Calls by name: of this library's operations, and of all others together, views left out."""

    VIEWS = ("aten::detach", "aten::t", "aten::view", "aten::select", "aten::unsqueeze", "aten::unbind", "aten::expand")

    def __init__(self):
        super().__init__()
        self.ours: collections.Counter = collections.Counter()
        self.others = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        space, _, name = operation.name().partition("::")
        if space == "deft_kernels":
            self.ours[name.partition(".")[0]] += 1
        elif operation.name().partition(".")[0] not in self.VIEWS:
            self.others += 1
        return operation(*args, **kwargs or {})


ONCE = ("orthonormalize", "orthonormalize_backward")
EACH = ("lowrank_linear_forward", "lowrank_linear_backward")
FORMS = {  # width, rows, what is called once, what once a layer, all else a layer: so much is seen, 2 in a frozen one
    "weight": (64, 40, (*ONCE, "merge", "merge_backward"), (), 3),
    "factor": (256, 128, (*ONCE, "project", "project_backward"), EACH, 0),
    "merged": (256, 512, (*ONCE, "project", "project_backward"), EACH, 0),
    "activation": (256, 80, ONCE, (), 25),
    "activation, few rows": (256, 20, ONCE, (), 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_calls_of_a_step(form):
    width, rows, once, each, most = FORMS[form]
    others = {}
    for layers in (3, 9):
        model, x = adapted(chain(layers, width)), torch.randn(rows, width)
        step(model, x)  # which tells the layers how many rows there are
        with Calls() as calls:
            step(model, x)
        assert calls.ours == dict.fromkeys(once, 1) | dict.fromkeys(each, layers)
        others[layers] = calls.others
    assert (others[9] - others[3]) / 6 <= most


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_products_and_copies_within_a_step(form):
    """Those inside this library's operations too, which `Calls` does not see; those of a layer's bias are counted."""
    width, rows, *_ = FORMS[form]
    copies, products = {  # seen
        "weight": (1, 3), "factor": (1, 2), "merged": (3, 4), "activation": (4, 12), "activation, few rows": (4, 11),
    }[form]  # fmt: skip
    counts = {}
    for layers in (3, 9):
        model, x = adapted(chain(layers, width)), torch.randn(rows, width)
        step(model, x)
        with profile() as seen:
            step(model, x)
        events = {e.key.removeprefix("aten::"): e.count for e in seen.key_averages()}
        counts[layers] = [sum(events.get(k, 0) for k in kinds) for kinds in (("copy_",), ("mm", "addmm", "bmm", "baddbmm"))]
    few, many = counts[3], counts[9]
    assert (many[0] - few[0]) / 6 <= copies and (many[1] - few[1]) / 6 <= products


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_csrc_serves_all_of_a_step(form, monkeypatch):
    """No kernel is lost in silence: that of `lowrank_linear_backward` is worth less than the ratios' margins."""
    width, rows, *_ = FORMS[form]
    model, x = adapted(chain(3, width)), torch.randn(rows, width)
    step(model, x)
    served = collections.Counter()

    def counted(name, function):
        return lambda *args: served.update([name]) or function(*args)

    for name, kernels in _dispatch._kernels.items():
        if "cpp" in kernels:
            function, *rest = kernels["cpp"]
            monkeypatch.setitem(kernels, "cpp", (counted(name, function), *rest))
    with Calls() as calls:
        step(model, x)
        dk.merge(model)
    assert served == calls.ours and served["merge_into"] == 1


def test_calls_of_merging():
    others = collections.defaultdict(list)  # so much is seen
    for layers in (3, 9):
        model = adapted(chain(layers, 64), init_weights=False)
        for verb, most in ((dk.merge, 3), (lambda m: dk.hotswap(m, "default"), 2), (dk.unmerge, 1)):
            with Calls() as calls:
                verb(model)
            assert calls.ours == ({} if verb is dk.unmerge else {"orthonormalize": 1, "merge_into": 1})
            others[most].append(calls.others)
    for most, (few, many) in others.items():
        assert (many - few) / 6 <= most


class Waits(TorchFunctionMode):
    """Where the host would wait for a GPU: calls, from Python and within operations, that hand values to it."""

    NAMES = frozenset({"item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "unique", "masked_select",
                       "__bool__", "__float__", "__int__", "__index__", "__contains__"})  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_name = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, str)]
        if name in self.NAMES or (name == "to" and "cpu" in by_name):
            self.calls[name] += 1
        return function(*args, **kwargs or {})


def waits(function) -> dict[str, int]:
    with profile() as seen, Waits() as mode:
        function()
    inside = {e.key: e.count for e in seen.key_averages()}
    return dict(mode.calls) | {k: inside[k] for k in ("aten::_local_scalar_dense", "aten::nonzero") if k in inside}


@pytest.mark.parametrize(
    "options", [{}, {"gate": True, "alpha": 2}, {"para": True}, {"decomposition_method": "relu"}, {"dropout": 0.1}],
    ids=["qr", "gate", "para", "relu", "dropout"],
)  # fmt: skip
@pytest.mark.parametrize("rows", [20, 128], ids=["activation", "factor"])
def test_a_step_never_waits_for_the_device(options, rows):
    model, x = adapted(chain(3, 256), **options), torch.randn(rows, 256)
    step(model, x)
    assert waits(lambda: step(model, x)) == {}
    assert waits(lambda: dk.set_adapters(model, "default", 0.5)) == {}
    assert waits(lambda: step(model, x)) == {}


def test_new_strengths_and_routes_are_written_where_the_old_were():
    """Or a captured CUDA graph would go on with the old ones."""
    model = adapted(chain(3, 64), init_weights=False)
    dk.inject_adapter(model, dk.DeftConfig(r=4, target_modules=["0", "1", "2"]), "other")
    dk.set_adapters(model, ["default", "other"])
    scales = [layer._scales for layer in model]
    dk.set_adapters(model, ["default", "other"], [0.5, -3.0])
    assert all(layer._scales is kept and kept[1].tolist() == [0.5, -3.0] for layer, kept in zip(model, scales))
    dk.route_adapters(model, ["default", "other"], [1.0, 2.0])
    routes = [(layer._route_index, layer._route_weight) for layer in model]
    dk.route_adapters(model, ["default", "base"], [3.0, 4.0])
    for layer, (index, weight) in zip(model, routes):
        assert layer._route_index is index and layer._route_weight is weight and weight.tolist() == [3.0, 4.0]


def test_merging_waits_for_the_device_once():
    """To refuse values that are not finite: no model is half merged."""
    model = adapted(chain(5, 64), init_weights=False)
    assert waits(lambda: dk.merge(model)) == {"tolist": 1}
    assert waits(lambda: dk.hotswap(model, "default")) == {"tolist": 1}
    assert waits(lambda: dk.unmerge(model)) == {}


def test_a_compiled_step_follows_strengths_without_recompilation():
    model, x = adapted(chain(2, 64), init_weights=False), torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    torch._dynamo.utils.counters.clear()
    for strength in (1.0, 0.5, -3.0):
        dk.set_adapters(model, "default", strength)
        with torch._dynamo.config.patch(error_on_recompile=strength != 1.0):
            step(compiled, x)
            seen.append(compiled(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(seen[-1], model(x))


@pytest.mark.parametrize("rows", [128, 512], ids=["factor", "merged"])
def test_saved_bytes_are_loras_and_the_factors(rows):
    """Of a whole model: B and A of every layer, and two scales; in merged form not even h = x A^T."""
    frozen, x, layers, r = chain(6, 256), torch.randn(rows, 256), 6, 4
    saved = {}
    for name, model in (("deft", adapted(frozen, r)), ("lora", lora(frozen, r))):
        model(x)
        with Recorder(model) as recorder:
            y = model(x)
        saved[name] = recorder.bytes()
        del y
    h = 4 * layers * rows * r
    assert saved["deft"] == saved["lora"] + layers * (4 * r * 512 + 8) - h * (rows == 512)


@needs_native
@pytest.mark.parametrize("rows", [128, 512], ids=["factor", "merged"])
def test_peak_of_a_step_is_loras_and_the_factors(rows):
    """All that any operation allocates. Seen: to the byte; in merged form 49152 bytes less. The factors are of the last
    forward: the layers still hold them."""
    frozen, x = chain(6, 256), torch.randn(rows, 256)
    peaks = {}
    for name, model in (("deft", adapted(frozen)), ("lora", lora(frozen))):
        with profile(profile_memory=True) as seen:
            step(model, x), step(model, x)
        now = peaks[name] = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peaks[name] = max(peaks[name], now)
    assert peaks["deft"] <= peaks["lora"] + 6 * 4 * 4 * 512


# Ratios ---------------------------------------------------------------------------------------------------------------


def ratio(ours, floor, rounds: int = 15) -> float:
    """The median over rounds, each of which times both, of their ratio; in time of one thread on a core, of which what else
    the machine does takes none."""

    def seconds(call) -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(seconds(ours), seconds(floor)) for _ in range(rounds + 2)]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(a / b for a, b in pairs[2:])


def training(model: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    def call():
        x.grad = None
        model.zero_grad()
        model(x).backward(dy)  # dense, as in a model

    return call


@needs_native
@pytest.mark.parametrize("rows,most", [(512, 1.7), (1024, 1.55)], ids=["factor", "merged"])
def test_an_adapted_layer(rows, most):
    """Seen: 1.33 and 1.24 x the frozen layer, 1.07 and 0.96 x PEFT's LoRA."""
    frozen = chain(1, 640)
    x, dy = torch.randn(rows, 640, requires_grad=True), torch.randn(rows, 640)
    ours = training(adapted(frozen, 16), x, dy)
    assert ratio(ours, training(frozen, x, dy)) < most
    assert ratio(ours, training(lora(frozen, 16), x, dy)) < 1.4


@pytest.mark.parametrize("layers,width,rows", [(30, 64, 77), (12, 256, 200)], ids=["weight", "factor"])
def test_a_step_of_many_small_layers(layers, width, rows):
    """Where Python's work for each layer weighs most. Seen: 1.2 x PEFT's LoRA."""
    frozen = chain(layers, width)
    x, dy = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    assert ratio(training(adapted(frozen), x, dy), training(lora(frozen), x, dy)) < 1.6


@needs_native
def test_merging():
    """8.2 M weights. Seen: 2.7 x a copy of them, 0.55 x two library products a layer; hot-swap, from P and R, 4.9 x the
    copy."""
    model = adapted(chain(20, 640), 16, init_weights=False)
    W = [layer.weight.detach().clone() for layer in model]
    Q = deft.orthonormalize([layer.deft_P["default"].detach() for layer in model])
    R, out = [layer.deft_R["default"].detach() for layer in model], [torch.empty_like(w) for w in W]
    flat, copied = torch.cat([w.flatten() for w in W]), torch.cat([w.flatten() for w in W])

    def products():
        for w, q, r, o in zip(W, Q, R, out):
            torch.addmm(w, q, torch.addmm(r, q.mT, w, alpha=-1), out=o)

    merge = lambda: deft.merge_into(out, W, Q, Q, R)
    assert ratio(merge, lambda: copied.copy_(flat)) < 5
    assert ratio(merge, products) < 1
    dk.merge(model)
    assert ratio(lambda: dk.hotswap(model, "default"), lambda: copied.copy_(flat)) < 9


@needs_native
def test_preparing():
    """60 small layers together, forward and backward. Seen: 0.76 x a loop of plain torch over them, 0.23 x one of `prepare`
    over them; their QR alone 0.35 x torch's."""
    P, R = ([torch.randn(*shape, requires_grad=True) for _ in range(60)] for shape in ((128, 4), (4, 64)))
    W, dB, dA = ([torch.randn(*shape) for _ in range(60)] for shape in ((128, 64), (128, 4), (4, 64)))

    def prepared(P, R, W, dB, dA):
        one = torch.ones(len(P))
        factors = prepare([Spec("qr", True, True, torch.float32)] * len(P), one, one, P, R, W)
        torch.autograd.grad([f.B for f in factors] + [f.A for f in factors], P + R, dB + dA)

    def plain(P, R, W, dB, dA):
        torch.autograd.grad(reference.factors(W[0], P[0], R[0]), P + R, dB + dA)

    def loop(function):
        return lambda: [function(*([t] for t in layer)) for layer in zip(P, R, W, dB, dA)]

    together = lambda: prepared(P, R, W, dB, dA)
    assert ratio(together, loop(plain)) < 1.1
    assert ratio(together, loop(prepared)) < 0.6
    tall = [torch.randn(1280, 16) for _ in range(12)]
    assert ratio(lambda: deft.orthonormalize(tall), lambda: [torch.linalg.qr(p).Q for p in tall]) < 0.8
