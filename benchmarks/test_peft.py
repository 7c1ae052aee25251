"""Training steps of a small PEFT model, on PEFT's own code and patched, in turn in one run.

No time is shown unless both give the same loss and gradients first. They take turns in blocks, since a patch is of the whole
process; the first step after each turn, which makes what a patch keeps beside the layers, is not counted.
"""

import statistics
import time

import torch
from conftest import TABLES
from peft import DeftConfig, LoraConfig, get_peft_model
from torch import nn

import deft_kernels as dk

LAYERS, FEATURES, TOKENS, RANK = 6, 640, 1024, 16
BLOCKS, STEPS = 10, 5  # 50 steps each
AGREE = 1e-4  # relative, fp32, through six layers


def make(config_class, **options):
    torch.manual_seed(0)
    parts = [part for _ in range(LAYERS) for part in (nn.Linear(FEATURES, FEATURES), nn.GELU())]
    targets = [str(2 * i) for i in range(LAYERS)]
    return get_peft_model(nn.Sequential(*parts[:-1]), config_class(r=RANK, target_modules=targets, **options))


def gate(deft, x, target):
    """The loss and every gradient, patched and not."""
    results = []
    for switch in (dk.unpatch_peft, dk.patch_peft):
        switch()
        deft.zero_grad()
        loss = (deft(x) - target).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in deft.parameters() if p.requires_grad)])
    dk.unpatch_peft()
    for theirs, ours in zip(*results):
        assert (ours - theirs).norm() <= AGREE * theirs.norm()


def test_fifty_training_steps(benchmark):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, target = torch.randn(2, TOKENS, FEATURES, device=device)
    deft = make(DeftConfig, decomposition_method="qr", init_weights=False).to(device)
    gate(deft, x, target)
    peers = {
        "PEFT LoRA": (dk.unpatch_peft, make(LoraConfig, lora_alpha=RANK).to(device)),
        "PEFT DEFT": (dk.unpatch_peft, deft),
        "PEFT DEFT, patched": (dk.patch_peft, deft),
    }
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        for name, (_, model) in peers.items()
    }

    def step(name):
        start = time.perf_counter()
        optimizers[name].zero_grad()
        (peers[name][1](x) - target).square().mean().backward()
        optimizers[name].step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in peers}
    try:
        for _ in range(BLOCKS):
            for name, (switch, _) in peers.items():
                switch()
                step(name)
                times[name] += [step(name) for _ in range(STEPS)]
        benchmark.pedantic(step, ["PEFT DEFT, patched"], rounds=3)
    finally:
        dk.unpatch_peft()
    rows = {}
    for name, seconds in times.items():
        low, *_, high = statistics.quantiles(seconds, n=5)
        ratio = statistics.median(s / floor for s, floor in zip(seconds, times["PEFT DEFT"]))
        rows[name] = (statistics.median(seconds), low, high, ratio)
    TABLES.append((f"a training step of {LAYERS} layers {FEATURES}x{FEATURES}, T {TOKENS}, r {RANK}, fp32:", rows))
    benchmark.extra_info.update({f"{name} / PEFT DEFT": ratio for name, (*_, ratio) in rows.items()})
