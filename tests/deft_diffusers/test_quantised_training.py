"""`deft train` and `deft sample` on bases in 4 and 8 bits: quantised as they load, or saved so."""

import dataclasses
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from deft_diffusers import UserError, cli, data
from deft_diffusers.families import load_family
from deft_diffusers.families.quantise import quantise
from deft_diffusers.options import SampleOptions, TrainOptions
from deft_diffusers.sample import sample
from deft_diffusers.samples import Samples
from deft_diffusers.train import train
from diffusers import FluxTransformer2DModel, PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from diffusers.quantizers.quantization_config import BitsAndBytesConfig
from safetensors.torch import load_file
from test_conditions import save_models
from test_family_training import pixels
from tiny_pipeline import python_environment
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

from deft_kernels.nn.quantised import quantised

pytestmark = pytest.mark.usefixtures("one_thread")

DRAW = {"num_inference_steps": 2, "height": 32, "width": 32}
SETTINGS = {
    "deft": {"rank": 2, "learning_rate": 5e-2}, "para": {"rank": 2, "learning_rate": 1e-2},
    "lora": {"rank": 2, "learning_rate": 2e-2},
    "textual_inversion": {"learning_rate": 0.1, "instance_prompt": "a <sks>", "num_vectors": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), ("stable-diffusion", "sd3", "flux", "flux2-klein"))


@pytest.fixture
def options(models, photos, tmp_path):
    def make(family, **changes):
        defaults = {
            "pretrained_model_name_or_path": models.get(family, family), "instance_data_dir": str(photos),
            "instance_prompt": "a cat", "output_dir": str(tmp_path / "out"), "max_train_steps": 16, "train_batch_size": 2,
            "report_to": "none", "resolution": 32,
        }  # fmt: skip
        return TrainOptions(**defaults | changes)

    return make


def loss_of(family, photos, prompt):
    """Of a fixed batch."""
    pictures = [data.load(data.Source(photos / f"{k}.png", prompt), [(32, 32)]) for k in range(2)]
    latents, noise, times, _ = Samples(pictures, family, 77, False, False, encode_texts=False).batch(range(16), "cpu")
    family.model.eval()
    with torch.no_grad():
        return family.loss(family.model, latents, noise, times, family.encode_prompts([prompt] * 16)).item()


@pytest.mark.parametrize("family, kind, method", [
    ("stable-diffusion", "nf4", "deft"), ("flux", "nf4", "deft"), ("flux", "fp4", "lora"), ("flux", "int8", "deft"),
    ("sd3", "nf4", "para"), ("flux", "nf4", "textual_inversion"), ("flux2-klein", "nf4", "textual_inversion"),
    ("stable-diffusion", "int8", "textual_inversion"),
])  # fmt: skip
def test_trains_resumes_and_draws(family, kind, method, options, models, photos, tmp_path, capsys):
    """The loss of a fixed batch falls, a stopped run goes on to the same bits, and `deft sample` draws the same picture."""
    large, steps = family != "stable-diffusion", 4 if family == "flux2-klein" else 16  # Qwen3 has 28 layers
    how = {"quantize": kind, "quantize_text_encoders": large}
    settings = {"max_train_steps": steps, "gradient_checkpointing": kind == "nf4", **how, **SETTINGS[method]}
    o = options(family, method=method, **settings)
    wrapped = load_family(models[family], torch.float32, **how).to("cpu")
    packed = [module for module in wrapped.model.modules() if quantised(module)]
    bits = [t.clone() for module in packed for t in quantised(module).tensors]
    first = loss_of(wrapped, photos, o.instance_prompt)
    plain = wrapped.generate([o.instance_prompt], [5], **DRAW)[0]
    folder = train(o, wrapped)
    assert loss_of(wrapped, photos, o.instance_prompt) < (1 if method == "textual_inversion" else 0.98) * first
    assert all(map(torch.equal, bits, [t for module in packed for t in quantised(module).tensors]))

    middle = {"max_train_steps": steps // 2, "checkpointing_steps": steps // 2}
    half = dataclasses.replace(o, output_dir=str(tmp_path / "half"), **middle)
    train(half)
    train(dataclasses.replace(half, max_train_steps=steps, resume_from_checkpoint="latest"))
    file = "learned_embeds.safetensors" if method == "textual_inversion" else "adapter_model.safetensors"
    whole, resumed = load_file(folder / file), load_file(tmp_path / "half" / file)
    assert whole.keys() == resumed.keys() and all(torch.equal(t, resumed[name]) for name, t in whole.items())

    trained = wrapped.generate([o.instance_prompt], [5], **DRAW)[0]
    capsys.readouterr()
    settings = {"prompt": [o.instance_prompt], "seed": 5, "output_dir": str(tmp_path / "drawn"), **DRAW}
    asked = SampleOptions(pretrained_model_name_or_path=models[family], adapter=[str(folder)], **how | settings)
    assert abs(pixels(sample(asked)[0]) - pixels(trained)).max() <= 1
    assert abs(pixels(trained) - pixels(plain)).max() >= 2
    name = "torchao Int8Tensor" if kind == "int8" else f"bitsandbytes {kind} with double quantisation"
    assert f"the base is quantised ({name}): adapters stay apart from it, as factors" in capsys.readouterr().err


@pytest.mark.parametrize("kind, least, most", [("nf4", 0.125, 0.145), ("fp4", 0.125, 0.145), ("int8", 0.25, 0.27)])
def test_the_denoiser_shrinks(kind, least, most):
    """Bytes against float32, all that is stored counted. Every linear layer is packed, as diffusers' loader does it."""
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=512, pooled_projection_dim=512, axes_dims_rope=(16, 16, 32), guidance_embeds=False,
    )  # fmt: skip
    before = sum(p.nbytes for p in model.parameters())
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantise(model, kind, torch.float32)
    model.to("cpu")
    assert {name for name, module in model.named_modules() if quantised(module)} == linear
    after = sum(t.nbytes for m in model.modules() if (held := quantised(m)) for t in held.tensors)
    after += sum(p.nbytes for p in model.parameters() if type(p) is nn.Parameter and type(p.data) is torch.Tensor)
    assert least < after / before < most, after / before


def test_which_text_encoders_are_packed(models):
    wrapped = load_family(models["sd3"], torch.float32, "nf4", True).to("cpu")
    packed = {n: [k for k, m in p.named_modules() if quantised(m)] for n, p in wrapped.text_encoders.items()}
    assert not packed["text_encoder"] and not packed["text_encoder_2"] and len(packed["text_encoder_3"]) == 10
    assert not any(name.endswith("wo") for name in packed["text_encoder_3"])  # whose type T5 asks for
    assert all(bool(torch.isfinite(t).all()) for t in wrapped.encode_prompts(["a cat"]).values())
    alone = load_family(models["sd3"], torch.float32, "nf4").to("cpu")
    assert not any(quantised(m) for part in alone.text_encoders.values() for m in part.modules())


@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao"])
def test_a_base_that_was_saved_quantised(kind, models, options, tmp_path, monkeypatch):
    """It needs no flag. (diffusers wants a GPU for bitsandbytes' layers, which do not.)"""
    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    config = config if kind == "bitsandbytes" else TorchAoConfig(Int8WeightOnlyConfig())
    loaded = load_family(models["flux"], torch.float32)
    pipe = type(loaded.pipe).from_pretrained(
        models["flux"], quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config})
    )
    pipe.save_pretrained(tmp_path / "packed", safe_serialization=kind == "bitsandbytes")
    model = str(tmp_path / "packed")
    wrapped = load_family(model, torch.float32).to("cpu")
    assert wrapped.quantisation.startswith(kind) and quantised(wrapped.model.proj_out)
    folder = train(options(model, max_train_steps=2, rank=2, gradient_checkpointing=True), wrapped)
    trained = wrapped.generate(["a cat"], [5], **DRAW)[0]
    settings = {"prompt": ["a cat"], "seed": 5, "output_dir": str(tmp_path / "drawn"), **DRAW}
    drawn = sample(SampleOptions(pretrained_model_name_or_path=model, adapter=[str(folder)], **settings))[0]
    assert abs(pixels(drawn) - pixels(trained)).max() <= 1
    with pytest.raises(UserError, match="has no linear layer that is not quantised already"):
        load_family(model, torch.float32, "nf4")
    if kind == "bitsandbytes":

        def missing(self, *args, **kwargs):
            raise ImportError("it requires `pip install -U bitsandbytes`")

        monkeypatch.setattr(quantizer, "validate_environment", missing)
        with pytest.raises(UserError, match="packed cannot be loaded here: it requires `pip install -U bitsandbytes`"):
            load_family(model, torch.float32)


@pytest.mark.parametrize("method", ["svdiff", "dreambooth"])
def test_methods_that_need_dense_weights(method, options, models, tmp_path):
    """Refused by name and reason, in training and for what they have trained."""
    with pytest.raises(UserError, match=f"{method} .* weights.*quantised .bitsandbytes nf4.*: use a dense base, or deft"):
        train(options("flux", method=method, quantize="nf4"))
    assert not (tmp_path / "out").exists()
    folder = train(options("flux", method=method, max_train_steps=1))
    asked = {"pretrained_model_name_or_path": models["flux"], "prompt": ["a cat"], "output_dir": str(tmp_path / "drawn")}
    with pytest.raises(UserError, match=f"{method} .* weights"):
        sample(SampleOptions(adapter=[str(folder)], quantize="nf4", **asked, **DRAW))


def test_what_is_asked_wrongly(options, models, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="--quantize_text_encoders goes with --quantize"):
        train(options("flux", quantize_text_encoders=True))
    with pytest.raises(UserError, match="does not apply to StableDiffusionPipeline: it has none of T5 and Qwen3"):
        train(options("stable-diffusion", quantize="nf4", quantize_text_encoders=True))
    folder = train(options("flux", rank=2, max_train_steps=1, quantize="nf4", checkpointing_steps=1))
    with pytest.raises(UserError, match="trained with quantize nf4, not None"):
        train(options("flux", rank=2, max_train_steps=2, resume_from_checkpoint="latest"))
    words = ["sample", "--pretrained_model_name_or_path", models["flux"], "--prompt", "a cat", "--adapter", str(folder),
             "--quantize", "nf4", "--merge", "--output_dir", str(tmp_path / "drawn")]  # fmt: skip
    capsys.readouterr()
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "its weight is quantised (bitsandbytes nf4" in error and "keep the adapter unmerged" in error
    for library, kind in (("bitsandbytes", "nf4"), ("torchao.quantization", "int8")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=f"--quantize {kind} needs .*: pip install {library.partition('.')[0]} "):
            load_family(models["flux"], torch.float32, kind)


def test_two_processes_train_the_adapter_of_one(options, tmp_path):
    """torchao's tensors cannot be sent from one to the other, and need not be."""
    o = options("flux", rank=2, quantize="int8", max_train_steps=3, train_batch_size=4)
    alone = load_file(train(o) / "adapter_model.safetensors")
    two = dataclasses.asdict(o) | {"train_batch_size": 2, "output_dir": str(tmp_path / "two")}
    words = [f"--{name}={value}" for name, value in two.items() if value and value is not True]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 -m"
    done = subprocess.run(
        [sys.executable, *launch.split(), "deft_diffusers", "train", *words],
        env=python_environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"num_processes": 2' in (tmp_path / "two" / "training_args.json").read_text()
    for name, t in load_file(tmp_path / "two" / "adapter_model.safetensors").items():
        torch.testing.assert_close(t, alone[name], rtol=0, atol=1e-6)


def test_gradients_pass_through_packed_layers_without_an_adapter(models):
    """Also after a forward that needs none, in which bitsandbytes would pack them anew on CPUs with AVX512-BF16."""
    wrapped = load_family(models["flux"], torch.float32, "nf4").to("cpu")
    layer = wrapped.model.proj_out
    assert isinstance(layer, bnb.nn.Linear4bit)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        before = layer(x)
    x.requires_grad_(True)
    layer(x).sum().backward()
    W = quantised(layer).dequantise()
    torch.testing.assert_close(x.grad, W.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before, x.detach() @ W.T + layer.bias, rtol=1e-5, atol=1e-5)
