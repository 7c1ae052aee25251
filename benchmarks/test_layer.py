"""One adapted linear layer, forward and backward, beside its peers and the frozen layer, in one run.

Every round times every peer once, in turn, so that whatever else the machine does falls on all of them alike; the incoming
gradient is dense. No time is shown unless this layer, PEFT's DEFT and the reference agree first.
"""

import statistics
import time

import pytest
import torch
from conftest import TABLES
from peft import DeftConfig as PeftDeftConfig
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.deft.layer import DeftLinear as PeftDeftLinear
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn

import deft_kernels as dk
from deft_kernels import reference

SHAPES = [(640, 4096), (1280, 1024)]  # features of an SDXL attention projection, tokens of a 1024-pixel image there
RANK = 16


def make_peers(features: int, device: str):
    base = nn.Linear(features, features, device=device).requires_grad_(False)
    ours = dk.DeftLinear(base, dk.DeftConfig(r=RANK))
    deft = PeftDeftLinear(base, "default", PeftDeftConfig(r=RANK, decomposition_method="qr"), r=RANK)
    lora = PeftLoraLinear(base, "default", PeftLoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
    with torch.no_grad():  # away from the identity, the same adapter in both DEFTs
        ours.deft_R["default"].add_(torch.randn_like(ours.deft_R["default"]) * 0.1)
        deft.deft_P["default"].copy_(ours.deft_P["default"])
        deft.deft_R["default"].copy_(ours.deft_R["default"])
        nn.init.normal_(lora.lora_B["default"].weight, std=0.02)
    return base, {
        "frozen layer": base,
        "deft_kernels DEFT": ours,
        "deft_kernels LoRA": dk.DeftLinear(base, dk.LoraConfig(r=RANK)),
        "PEFT LoRA": lora,
        "PEFT DEFT": deft,
    }


def gate(base, peers, x, dy):
    """Outputs and gradients of this layer and of PEFT's, both against the reference in float64."""
    ours, theirs = peers["deft_kernels DEFT"], peers["PEFT DEFT"]
    exact = [t.detach().double().requires_grad_() for t in (x, ours.deft_P["default"], ours.deft_R["default"])]
    B, A = reference.factors(base.weight.double(), exact[1], exact[2])
    truth = reference.lowrank_linear(exact[0], base.weight.double(), base.bias.double(), B, A)
    truth = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    for layer in (ours, theirs):
        y = layer(x)
        got = [y, *torch.autograd.grad(y, [x, layer.deft_P["default"], layer.deft_R["default"]], dy)]
        for g, t in zip(got, truth):
            assert (g - t).norm() <= 1e-5 * t.norm()


@pytest.mark.parametrize("features,tokens", SHAPES, ids=[f"{f}x{f}-T{t}" for f, t in SHAPES])
def test_forward_backward_fp32_r16(benchmark, features, tokens, rounds=60):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, peers = make_peers(features, device)
    x = torch.randn(tokens, features, device=device, requires_grad=True)
    dy = torch.randn(tokens, features, device=device)
    gate(base, peers, x, dy)

    def step(layer):
        x.grad = None
        layer(x).backward(dy)
        if device == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(rounds + 3):
        for name, layer in peers.items():
            start = time.perf_counter()
            step(layer)
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    rows = {}
    for name, seconds in times.items():
        low, *_, high = statistics.quantiles(seconds, n=5)
        ratio = statistics.median(s / floor for s, floor in zip(seconds, times["frozen layer"]))  # round by round
        rows[name] = (statistics.median(seconds), low, high, ratio)
    TABLES.append((f"one linear layer {features}x{features}, T {tokens}, r {RANK}, fp32, forward + backward:", rows))
    benchmark.extra_info.update({f"{name} / frozen": ratio for name, (*_, ratio) in rows.items()})
    benchmark.pedantic(step, [peers["deft_kernels DEFT"]], rounds=10)
