"""PEFT's own DEFT and LoRA layers as a second oracle: outputs, gradients, merged weights, files and loss curves."""

import pytest
import torch
from peft import DeftConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers

METHODS = {
    "qr": {"decomposition_method": "qr"},
    "relu": {"decomposition_method": "relu"},
    "qr-alpha": {"decomposition_method": "qr", "alpha": 12},
    "qr-para": {"decomposition_method": "qr", "para": True},
    "relu-para": {"decomposition_method": "relu", "para": True},
}
TOLERANCE = 1e-5  # relative, fp32


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(24, 40), Conv1D(31, 40), nn.Linear(31, 9, bias=False)
        nn.init.normal_(self.second.bias)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def build():
    torch.manual_seed(11)
    return Net()


def pair(method, init_weights=False, r=6):
    """The same adapter in PEFT's layers and in ours."""
    options = METHODS[method]
    targets = ["first", "second", "last"]
    theirs = get_peft_model(build(), DeftConfig(r=r, target_modules=targets, init_weights=init_weights, fan_in_fan_out=True,
                                                **options))  # fmt: skip
    ours = build()
    dk.inject_adapter(ours, dk.DeftConfig(r=r, target_modules=targets, init_weights=init_weights, **options))
    with torch.no_grad():
        for name, layer in adapted_layers(ours).items():
            peft_layer = theirs.get_submodule(f"base_model.model.{name}")
            for role, p in layer.adapter_tensors("default").items():
                source = getattr(peft_layer, f"deft_{role}")["default"]
                assert p.shape == source.shape
                p.copy_(source)
    return theirs, ours


def close(ours, theirs):
    assert (ours - theirs).norm() <= TOLERANCE * theirs.norm().clamp_min(1e-6), (ours - theirs).norm() / theirs.norm()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("method", METHODS)
def test_forward_gradients_and_merged_weights(method, rows):
    theirs, ours = pair(method)
    x = torch.randn(rows, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [theirs(inputs[0]), ours(inputs[1])]
    close(outputs[1], outputs[0])
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    close(inputs[1].grad, inputs[0].grad)
    for name, layer in adapted_layers(ours).items():
        peft_layer = theirs.get_submodule(f"base_model.model.{name}")
        for role, p in layer.adapter_tensors("default").items():
            close(p.grad, getattr(peft_layer, f"deft_{role}")["default"].grad)
    theirs.merge_adapter()
    dk.merge(ours)
    for name, layer in adapted_layers(ours).items():
        close(layer.weight, theirs.get_submodule(f"base_model.model.{name}").base_layer.weight)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("method", METHODS)
def test_files_both_ways(method, tmp_path):
    theirs, ours = pair(method)
    x = torch.randn(7, 24)
    theirs.save_pretrained(tmp_path / "peft")
    loaded = build()
    dk.load_adapter(loaded, tmp_path / "peft")
    close(loaded(x), theirs(x))
    dk.save_adapter(ours, tmp_path / "dk")
    close(PeftModel.from_pretrained(build(), tmp_path / "dk")(x), ours(x))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("method", METHODS)
def test_fifty_training_steps(method):
    theirs, ours = pair(method, init_weights=True)
    x, target = torch.randn(64, 24), torch.randn(64, 9)
    curves = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        curve = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("conv", [False, True])
def test_lora(tmp_path, conv):
    def base():
        torch.manual_seed(4)
        return nn.ModuleDict({"layer": nn.Conv2d(3, 6, 3, stride=2) if conv else nn.Linear(12, 7)})

    x = torch.randn(2, 3, 9, 9) if conv else torch.randn(5, 12)
    theirs = get_peft_model(base(), LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "peft")
    ours = base()
    dk.load_adapter(ours, tmp_path / "peft", trainable=True)
    peft_layer = theirs.base_model.model["layer"]
    y, z = peft_layer(x), ours["layer"](x)
    close(z, y)
    dy = torch.randn_like(y)
    y.backward(dy), z.backward(dy)
    tensors = ours["layer"].adapter_tensors("default")
    close(tensors["P"].grad, peft_layer.lora_B["default"].weight.grad.flatten(1))
    close(tensors["R"].grad, peft_layer.lora_A["default"].weight.grad.flatten(1))
    dk.save_adapter(ours, tmp_path / "dk")
    back = PeftModel.from_pretrained(base(), tmp_path / "dk").base_model.model["layer"](x)
    close(back, z)
