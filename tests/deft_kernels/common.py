"""What several test files share: layers of every kind, and adapters of every method."""

import os
import shutil

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deft_kernels as dk

CONFIGS = {
    "qr": dk.DeftConfig(r=3),
    "qr-gate-alpha": dk.DeftConfig(r=3, alpha=2.0, gate=True),
    "qr-random": dk.DeftConfig(r=3, init_weights=False),
    "svd": dk.DeftConfig(r=3, decomposition_method="svd", init_weights=False),
    "relu": dk.DeftConfig(r=3, decomposition_method="relu", alpha=5, init_weights=False),
    "none": dk.DeftConfig(r=3, decomposition_method="none", gate=True, init_weights=False),
    "para": dk.DeftConfig(r=3, para=True),
    "para-relu": dk.DeftConfig(r=3, para=True, decomposition_method="relu"),
    "lora": dk.LoraConfig(r=3, alpha=6, init_weights=False),
}

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "linear-tall": lambda: nn.Linear(3, 11, bias=False),
    "conv1d": lambda: Conv1D(5, 6),
    "conv2d": lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1),
    "conv2d-dilated": lambda: nn.Conv2d(2, 4, (3, 2), padding=(2, 1), dilation=2, bias=False),
    "conv2d-same-reflect": lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"),
    "conv2d-same-even": lambda: nn.Conv2d(2, 4, (2, 4), padding="same"),
}


class Opaque(nn.Linear):
    """A linear layer whose weight cannot be used directly, as a quantised one's cannot."""

    def forward(self, x):
        return super().forward(x)


def make(kind: str, dtype=torch.float64):
    """A frozen layer of some kind with random weights, Conv1D's bias included."""
    layer = LAYERS[kind]().to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
        p.requires_grad_(False)
    return layer


def example(kind: str, rows: int = 5, dtype=torch.float64) -> torch.Tensor:
    """A random input for a kind of layer; `rows` of them, or a small image."""
    if kind.startswith("conv2d"):
        channels = LAYERS[kind]().in_channels
        side = 3 + rows // 4
        return torch.randn(2, channels, side, side + 1, dtype=dtype)
    return torch.randn(rows, LAYERS[kind]().weight.shape[0 if kind == "conv1d" else 1], dtype=dtype)


def adapted(kind: str, method: str, dtype=torch.float64, base=None):
    base = make(kind, dtype) if base is None else base
    layer = (dk.DeftConv2d if kind.startswith("conv2d") else dk.DeftLinear)(base, CONFIGS[method])
    with torch.no_grad():  # away from the special points of the start
        for p in layer.adapter_tensors("default").values():
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def weight_matrix(base: nn.Module) -> torch.Tensor:
    weight = base.weight.detach()
    return weight.t() if isinstance(base, Conv1D) else weight.flatten(1)


def small_model(width: int = 8) -> nn.Module:
    """Attention-like blocks with diffusers' names, a convolution, and checkpointing by request."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
            self.to_k = nn.Linear(width, width, bias=False)
            self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

        def forward(self, x):
            scores = torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1)
            return x + self.to_out[0](scores @ self.to_v(x))

    class Model(nn.Module):
        checkpointing = None  # None, or the value of use_reentrant

        def __init__(self):
            super().__init__()
            self.conv_in = nn.Conv2d(3, width, 3, padding=1)
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            x = self.conv_in(x).flatten(2).mT
            for block in self.blocks:
                if self.checkpointing is None:
                    x = block(x)
                else:
                    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.checkpointing)
            return x

    return Model()


def without_native() -> str | None:
    """Why csrc's CPU kernels are rightly absent, or None: where a compiler is, they must be there."""
    if shutil.which("c++") is None:
        return "no C++ compiler here"
    return "DEFT_KERNELS_BUILD=none" if os.environ.get("DEFT_KERNELS_BUILD") == "none" else None


def use_isa(monkeypatch, isa: str) -> None:
    """csrc's kernels for this instruction set; skips where the processor lacks it, and for no other reason."""
    monkeypatch.setenv("DEFT_KERNELS_ISA", isa)
    try:
        torch.ops.deft_kernels_native.orthonormalize([], [])
    except RuntimeError as error:
        if f"DEFT_KERNELS_ISA={isa}: expected" not in str(error):
            raise
        pytest.skip(f"this processor has no {isa}")


FORMS = ("activation", "factor", "merged")


def force_form(monkeypatch, form: str) -> None:
    """Every layer in this form, whatever would be cheapest; convolutions have no activation form of their own, and a bank
    alone prepares whole weights."""
    from deft_kernels.nn import functional, layers
    from deft_kernels.ops import lowrank_linear

    monkeypatch.setattr(layers, "weight_is_cheaper", lambda *shape: form == "weight")
    monkeypatch.setattr(layers, "activation_is_cheaper", lambda *shape: form == "activation")
    for module in (functional, lowrank_linear):
        monkeypatch.setattr(module, "merged_is_cheaper", lambda *shape: form == "merged")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorder:
    """Bytes that autograd keeps for the backward, apart from the module's own parameters."""

    def __init__(self, *modules):
        self.known = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.saved: dict[int, torch.Tensor] = {}

    def __enter__(self):
        def pack(t):
            if t.untyped_storage().data_ptr() not in self.known and t.numel():
                self.saved[t.untyped_storage().data_ptr()] = t
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.saved.values())
