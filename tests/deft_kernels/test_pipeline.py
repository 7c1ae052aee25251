"""Pipelines under every verb, all parts or none; their files, PEFT's and diffusers'; hub ids without a network."""

import inspect
import json
import os
from types import SimpleNamespace

import pytest
import torch
from common import CONFIGS, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_diffusers_models import sdxl_like
from test_inject import assert_untouched, fingerprint

import deft_kernels as dk
from deft_kernels.adapters import files, inject, merge
from deft_kernels.adapters.pipeline import components

BOTH = {"unet": dk.DeftConfig(r=2, init_weights=False), "text_encoder": dk.LoraConfig(r=3, init_weights=False)}
FILE = "pytorch_deft_weights.safetensors"


def pipeline(**parts):
    """What the verbs know a pipeline by; its parts are always the same ones."""
    torch.manual_seed(5)
    parts = {"unet": small_model(), "text_encoder": small_model(), **parts}
    return SimpleNamespace(components={"vae": torch.nn.Linear(2, 2), "tokenizer": None, **parts})


def outputs(pipe):
    x = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)
    return torch.cat([pipe.components[part](x) for part in ("unet", "text_encoder")])


def adapted(config=BOTH):
    pipe = pipeline()
    torch.manual_seed(7)
    dk.inject_adapter(pipe, config, "a")
    return pipe


def whole(pipe):
    return torch.nn.ModuleDict({name: part for name, part in pipe.components.items() if part is not None})


def test_every_verb_over_a_model_is_one_over_pipelines():
    verbs = {f.__name__ for module in (inject, files, merge) for f in vars(module).values() if inspect.isfunction(f)}
    for name in verbs & set(dk.__all__):
        verb = getattr(dk, name)
        assert hasattr(verb, "__wrapped__") or verb.__module__ == "deft_kernels.adapters.pipeline", name


def test_a_config_goes_into_the_denoiser_and_a_dict_into_parts():
    pipe = pipeline()
    before, base = fingerprint(whole(pipe)), outputs(pipe)
    names = dk.inject_adapter(pipe, dk.DeftConfig(r=2), "a")
    assert len(names) == 8 and all(name.startswith("unet.blocks.") for name in names)
    assert dk.list_adapters(pipe) == {"unet": {"a": 1.0}, "text_encoder": {}}
    assert all(p.requires_grad for p in pipe.components["text_encoder"].parameters())  # not adapted, so not frozen
    names = dk.inject_adapter(pipe, BOTH, "b")
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"} and len(names) == 16
    assert dk.list_adapters(pipe) == {"unet": {"a": None, "b": 1.0}, "text_encoder": {"b": 1.0}}
    ranks = [{p.shape[1] for p in dk.adapter_parameters(part, "b")["P"]} for part in components(pipe).values()]
    assert ranks == [{2}, {3}]
    y = outputs(pipe)
    dk.set_adapters(pipe, ["a", "b"], [1.0, 0.5])
    assert dk.list_adapters(pipe) == {"unet": {"a": 1.0, "b": 0.5}, "text_encoder": {"b": 0.5}}
    assert not torch.allclose(outputs(pipe), y)
    dk.delete_adapter(pipe, "a")
    dk.set_adapters(pipe, "b")
    torch.testing.assert_close(outputs(pipe), y)
    dk.eject(pipe)
    assert_untouched(whole(pipe), before)
    torch.testing.assert_close(outputs(pipe), base)


def test_each_part_prepares_its_own_layers_and_trains():
    pipe = adapted()
    parameters = [p for group in dk.adapter_parameters(pipe, "a").values() for p in group]
    assert len(parameters) == 32
    outputs(pipe).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    banks = [part.__dict__["_deft_bank"] for part in components(pipe).values()]
    assert [len(bank.layers) for bank in banks] == [8, 8]


def test_each_sample_its_own_adapter():
    pipe = adapted()
    parts = ("unet", "text_encoder")
    each = outputs(pipe).view(len(parts), 2, 16, 8)  # part, sample, token, feature
    dk.set_adapters(pipe, [])
    base = outputs(pipe).view_as(each)
    dk.route_adapters(pipe, ["a", "base"])
    routed = outputs(pipe).view_as(each)
    torch.testing.assert_close(routed, torch.stack([each[:, 0], base[:, 1]], 1), rtol=1e-4, atol=1e-5)


def test_merge_unmerge_and_hotswap(tmp_path):
    pipe = adapted()
    pristine = {k: t.clone() for k, t in whole(pipe).state_dict().items()}
    y = outputs(pipe)
    whole(pipe).eval()
    dk.merge(pipe)
    torch.testing.assert_close(outputs(pipe), y, rtol=1e-4, atol=1e-5)
    other = pipeline()
    torch.manual_seed(8)
    dk.inject_adapter(other, BOTH, "b")
    dk.save_adapter(other, tmp_path, "b")
    dk.hotswap(pipe, tmp_path)
    torch.testing.assert_close(outputs(pipe), outputs(other), rtol=1e-4, atol=1e-5)
    dk.hotswap(pipe, "a")
    torch.testing.assert_close(outputs(pipe), y, rtol=1e-4, atol=1e-5)
    dk.delete_adapter(pipe, "hotswap")
    dk.unmerge(pipe)
    assert all(torch.equal(t, pristine[k]) for k, t in whole(pipe).state_dict().items())


def test_an_error_in_one_part_leaves_all_as_they_were(tmp_path):
    pipe = pipeline()
    with torch.no_grad():
        pipe.components["text_encoder"].blocks[1].to_q.weight[0, 0] = float("nan")
    modules = [(name, type(m)) for name, m in whole(pipe).named_modules()]
    with pytest.raises(ValueError, match=r"text_encoder.blocks.1.to_q: the adapter's first values are not finite"):
        dk.inject_adapter(pipe, dict.fromkeys(("unet", "text_encoder"), dk.DeftConfig(r=2)))
    assert [(name, type(m)) for name, m in whole(pipe).named_modules()] == modules
    with pytest.raises(ValueError, match="SimpleNamespace has no adapter: call deft_kernels.inject_adapter"):
        dk.merge(pipe)

    pipe = adapted()
    layers = inject.adapted_layers(whole(pipe))
    with torch.no_grad():
        layers["text_encoder.blocks.0.to_v"].adapter_tensors("a")["R"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"text_encoder.blocks.0.to_v.deft_R.a has values that are not finite"):
        dk.merge(pipe)
    assert not any(layer.is_merged or layer.merged for layer in layers.values())
    with pytest.raises(ValueError, match="no adapter named 'c'; the model has a"):
        dk.set_adapters(pipe, ["a", "c"])
    assert dk.list_adapters(pipe) == {"unet": {"a": 1.0}, "text_encoder": {"a": 1.0}}

    dk.save_adapter(adapted(), tmp_path, "a")
    edit(tmp_path / FILE, lambda state, metadata: state["text_encoder.blocks.0.to_k.lora_A.weight"].fill_(float("nan")))
    pipe = pipeline()
    before = fingerprint(whole(pipe))
    with pytest.raises(ValueError, match=r"R of text_encoder.blocks.0.to_k has values that are not finite"):
        dk.load_adapter(pipe, tmp_path)
    assert_untouched(whole(pipe), before)


def test_what_is_no_pipeline_and_parts_that_are_not_there():
    with pytest.raises(TypeError, match="SimpleNamespace is neither a module nor a pipeline with a denoiser"):
        dk.merge(SimpleNamespace(components={"vae": torch.nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match="SimpleNamespace has no transformer; adapters can go into its unet, text_encoder"):
        dk.inject_adapter(pipeline(), {"unet": dk.DeftConfig(), "transformer": dk.DeftConfig()})
    linear = pipeline(text_encoder=torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match="the model itself is a Linear"):
        dk.inject_adapter(linear, {"text_encoder": dk.DeftConfig(target_modules="all-linear")})
    compiled = pipeline(unet=torch.compile(small_model(), backend="eager"))
    assert all(name.startswith("unet.blocks") for name in dk.inject_adapter(compiled, dk.DeftConfig(r=2)))


# Files ---------------------------------------------------------------------------------------------------------------


def edit(file, change):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    change(state, metadata)
    save_file(state, file, metadata)


def test_one_file_for_all_parts(tmp_path):
    pipe = adapted()
    dk.save_adapter(pipe, tmp_path, "a")
    assert os.listdir(tmp_path) == [FILE]
    state = load_file(tmp_path / FILE)
    assert state["unet.blocks.0.to_q.deft_P"].shape == (8, 2)
    assert state["text_encoder.blocks.1.to_out.0.lora_B.weight"].shape == (8, 3)
    assert state.keys() == dk.adapter_state_dict(pipe, "a").keys()
    with safe_open(tmp_path / FILE, "pt") as opened:
        metadata = opened.metadata()
    assert {json.loads(metadata[f"{part}.adapter_config"])["peft_type"] for part in BOTH} == {"DEFT", "LORA"}
    assert all(json.loads(metadata[f"{part}.base_fingerprint"]) for part in BOTH)
    for source in (tmp_path, tmp_path / FILE):
        other = pipeline()
        names = dk.load_adapter(other, source, "b", trainable=True)
        assert torch.equal(outputs(other), outputs(pipe)) and len(names) == 16
        assert dk.list_adapters(other) == {"unet": {"b": 1.0}, "text_encoder": {"b": 1.0}}
        assert all(p.requires_grad for group in dk.adapter_parameters(other, "b").values() for p in group)
    module = pipeline().components["unet"]
    with pytest.raises(ValueError, match="for text_encoder, unet, but Model is one model: pass the pipeline"):
        dk.load_adapter(module, tmp_path)
    dk.delete_adapter(pipe.components["text_encoder"], "a")
    dk.save_adapter(pipe, tmp_path, "a")
    assert len(dk.load_adapter(module, tmp_path)) == 8  # a file with one part, into that part
    assert dk.list_adapters(module) == {"": {"default": 1.0}}


def same_denoiser(pipe, other):
    x = torch.randn(2, 3, 4, 4)
    return torch.equal(pipe.components["unet"](x), other.components["unet"](x))


def test_pefts_layout_goes_to_the_denoiser_or_to_each_part(tmp_path):
    pipe = adapted()
    dk.save_adapter(pipe.components["unet"], tmp_path / "one/sub", "a")
    for source in ({"source": tmp_path / "one/sub"}, {"source": tmp_path / "one", "subfolder": "sub"},
                   {"source": tmp_path, "subfolder": "one/sub", "weight_name": "adapter_model.safetensors"}):  # fmt: skip
        other = pipeline()
        assert all(name.startswith("unet.") for name in dk.load_adapter(other, **source))
        assert same_denoiser(pipe, other)
    for part, module in components(pipe).items():
        dk.save_adapter(module, tmp_path / "each" / part, "a")
    other = pipeline()
    dk.load_adapter(other, tmp_path / "each")
    assert torch.equal(outputs(other), outputs(pipe))


def test_what_diffusers_writes_of_pefts_deft(tmp_path):
    """`add_adapter` and `save_lora_adapter` of a model: bare keys, and the configuration in the metadata."""
    from peft import DeftConfig

    theirs, run = sdxl_like()
    state = {k: t.clone() for k, t in theirs.state_dict().items()}
    theirs.add_adapter(DeftConfig(r=2, target_modules=["to_q"], decomposition_method="qr", init_weights=False), "cat")
    theirs.save_lora_adapter(tmp_path, adapter_name="cat")
    ours, _ = sdxl_like()
    ours.load_state_dict(state)
    dk.load_adapter(SimpleNamespace(components={"unet": ours}), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change,message", [
    (lambda s, m: [s.update({k.replace("text_encoder", "transformer"): s.pop(k)}) for k in list(s) if "text" in k],
     "holds an adapter for transformer, but SimpleNamespace has unet, text_encoder"),
    (lambda s, m: m.pop("unet.adapter_config"), "carries no configuration of its own"),
    (lambda s, m: s.update({"image_encoder.to_q.deft_P": torch.ones(1)}), "keys that belong to no part begin with image"),
    (lambda s, m: s.update({"unet.blocks.9.to_q.deft_P": torch.ones(1)}), r"1 of 17 keys fit no adaptable layer of Model"),
    (lambda s, m: s.update({"unet.blocks.0.to_q.deft_P": torch.ones(9, 2)}),
     r"unet.blocks.0.to_q \(P: \(9, 2\), expected \(8"),
    (lambda s, m: m.update({"unet.base_fingerprint": json.dumps({"blocks.0.to_q": [9.0] * 16})}),
     r"made for another base model .*: unet.blocks.0.to_q begins"),
])  # fmt: skip
def test_wrong_files(tmp_path, change, message):
    dk.save_adapter(adapted(), tmp_path, "a")
    edit(tmp_path / FILE, change)
    pipe = pipeline()
    before = fingerprint(whole(pipe))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dk.load_adapter(pipe, tmp_path)
    assert_untouched(whole(pipe), before)
    with pytest.raises(FileNotFoundError, match=r"none of pytorch_deft_weights.* or a folder for a part \(unet, text"):
        dk.load_adapter(pipe, tmp_path.parent)


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options,command", [
    ({}, '--include "pytorch_deft_weights.safetensors" --include "adapter_model.safetensors"'),
    ({"weight_name": "x.safetensors", "subfolder": "sub", "revision": "v2"},
     '--include "sub/adapter_config.json" --include "sub/x.safetensors" --revision v2'),
])  # fmt: skip
@pytest.mark.parametrize("cached_only", [True, False])
def test_a_hub_id_that_cannot_be_reached(tmp_path, monkeypatch, options, command, cached_only):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    pipe = pipeline()
    before = fingerprint(whole(pipe))
    with pytest.raises(FileNotFoundError) as error:
        dk.load_adapter(pipe, "owner/my-dog", cache_dir=tmp_path, local_files_only=cached_only, **options)
    message = str(error.value)
    assert "hf download owner/my-dog " in message and command in message
    assert "--local-dir my-dog\n" in message and "pass its path" in message
    assert_untouched(whole(pipe), before)


def test_a_hub_id_from_the_cache(tmp_path):
    pipe, commit = adapted(), "1" * 40
    dk.save_adapter(pipe, tmp_path / "models--owner--my-dog/snapshots" / commit, "a")
    (tmp_path / "models--owner--my-dog/refs").mkdir()
    (tmp_path / "models--owner--my-dog/refs/main").write_text(commit)
    other = pipeline()
    assert len(dk.load_adapter(other, "owner/my-dog", cache_dir=tmp_path, local_files_only=True)) == 16
    assert torch.equal(outputs(other), outputs(pipe))
    with pytest.raises(FileNotFoundError, match=r"none of the files other.safetensors .*copy in the cache here is inc"):
        dk.load_adapter(
            pipeline(), "owner/my-dog", weight_name="other.safetensors", cache_dir=tmp_path, local_files_only=True
        )


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "./owner/name", "owner/name.safetensors"])
def test_a_path_is_never_taken_for_a_hub_id(source):
    with pytest.raises(FileNotFoundError, match="does not exist: expected a folder with adapter_model.safetensors"):
        dk.load_adapter(small_model(), source)


def test_the_methods_survive_a_pipelines_file(tmp_path):
    for method, config in CONFIGS.items():
        pipe = adapted(config)
        dk.save_adapter(pipe, tmp_path / method, "a")
        other = pipeline()
        dk.load_adapter(other, tmp_path / method)
        assert same_denoiser(pipe, other), method
