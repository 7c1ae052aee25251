"""Pipelines under every verb, all parts or none; their files, PEFT's and diffusers'; hub ids without a network."""

import inspect
import json
import os
import pickle
import subprocess
import sys
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
from deft_kernels.adapters import pipeline as pipelines
from deft_kernels.adapters.pipeline import components, read

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


def test_hotswap_takes_an_adapter_that_was_read(tmp_path):
    pipe, other = adapted(), pipeline()
    dk.save_adapter(pipe, tmp_path, "a")
    dk.inject_adapter(other, dk.DeftConfig(r=2), "b")
    whole(other).eval()
    dk.hotswap(other, read(other, tmp_path))
    torch.testing.assert_close(outputs(other), outputs(pipe), rtol=1e-4, atol=1e-5)


def test_eject_puts_back_what_required_grad_and_keeps_what_is_merged_if_asked():
    pipe = adapted()
    dk.inject_adapter(pipe, BOTH, "b")  # onto layers that are adapted already
    whole(pipe).eval()
    dk.merge(pipe, ["a", "b"])
    y = outputs(pipe)
    dk.eject(pipe, keep_merged=True)
    assert not inject.adapted_layers(whole(pipe))
    torch.testing.assert_close(outputs(pipe), y)
    assert all(p.requires_grad for p in whole(pipe).parameters())


def test_an_adapter_from_before_the_bank_still_trains():
    pipe = pipeline()
    block = pipe.components["unet"].blocks[0]
    block.to_q = dk.DeftLinear(block.to_q, dk.DeftConfig(r=2), "mine")
    dk.inject_adapter(pipe, dk.DeftConfig(r=2, target_modules=["to_v"]), "b")
    dk.set_adapters(pipe, "mine")
    assert all(p.requires_grad for role in "PR" for p in dk.adapter_parameters(pipe, "mine")[role])


def test_adapters_that_only_some_layers_have_are_listed():
    pipe = pipeline()
    dk.inject_adapter(pipe, dk.DeftConfig(r=2, target_modules=["to_q"]), "a")
    dk.inject_adapter(pipe, dk.DeftConfig(r=2, target_modules=["to_q", "to_v"]), "b")
    dk.set_adapters(pipe, ["a", "b"], [0.5, 2.0])
    assert dk.list_adapters(pipe)["unet"] == {"a": 0.5, "b": 2.0}
    dk.set_adapters(pipe.components["unet"].blocks[1], [])  # the last layers at rest
    assert dk.list_adapters(pipe)["unet"] == {"a": 0.5, "b": 2.0}


def test_configs_by_part_want_a_pipeline():
    with pytest.raises(TypeError, match="configs for unet want a pipeline, but Model is one model: pass its config itself"):
        dk.inject_adapter(small_model(), {"unet": dk.DeftConfig(r=2)})


def test_all_encoders_are_parts():
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    pipe = SimpleNamespace(components={name: small_model() for name in ("transformer", *names, "image_encoder")})
    assert tuple(components(pipe)) == ("transformer", *names)


def test_import_without_docstrings():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = "import deft_kernels as dk; assert dk.inject_adapter.__doc__ is None; print(len(dk.__all__))"
    run = subprocess.run([sys.executable, "-OO", "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and int(run.stdout) == len(dk.__all__), run.stderr[-2000:]


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


def test_a_file_has_the_parts_that_have_the_adapter(tmp_path):
    pipe = adapted({"unet": BOTH["unet"]})
    dk.inject_adapter(pipe, {"text_encoder": BOTH["text_encoder"]}, "b")
    dk.save_adapter(pipe, tmp_path, "a")
    with safe_open(tmp_path / FILE, "pt") as opened:
        assert {key.partition(".")[0] for key in (*opened.keys(), *opened.metadata())} == {"unet", "format"}
    assert dk.list_adapters(pipe)["text_encoder"] == {"b": 1.0}


def test_a_folder_with_two_adapters_wants_a_name(tmp_path):
    """An older pipeline's file beside a newer adapter in PEFT's layout: neither wins in silence."""
    pipe = adapted()
    dk.inject_adapter(pipe, dk.DeftConfig(r=3, init_weights=False), "new")
    dk.save_adapter(pipe, tmp_path, "a")
    dk.save_adapter(pipe.components["unet"], tmp_path, "new")
    for model in (pipeline(), small_model()):
        with pytest.raises(ValueError, match=r"holds pytorch_deft_weights.* and adapter_model.*: say which by weight_name="):
            dk.load_adapter(model, tmp_path)
    for file, name in ((FILE, "a"), ("adapter_model.safetensors", "new")):
        other = pipeline()
        dk.load_adapter(other, tmp_path, weight_name=file)
        ours, theirs = dk.adapter_parameters(other)["P"], dk.adapter_parameters(pipe, name)["P"]
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_folders_of_parts_that_are_not_there_are_refused(tmp_path):
    pipe = adapted()
    dk.save_adapter(pipe.components["unet"], tmp_path / "unet", "a")
    module = pipeline().components["unet"]
    assert len(dk.load_adapter(module, tmp_path)) == 8  # one part alone, into that part
    dk.save_adapter(pipe.components["text_encoder"], tmp_path / "text_encoder_2", "a")
    (tmp_path / "vae").mkdir()
    other = pipeline()
    before = fingerprint(whole(other))
    message = "holds an adapter for text_encoder_2, but SimpleNamespace has unet, text_encoder"
    with pytest.raises(ValueError, match=message):
        dk.load_adapter(other, tmp_path)
    assert_untouched(whole(other), before)
    with pytest.raises(ValueError, match="Model is one model: pass the pipeline"):
        dk.load_adapter(small_model(), tmp_path)


@pytest.mark.parametrize("layout", ["pipeline", "folders", "peft"])
def test_another_base_of_every_layout(tmp_path, layout):
    pipe = adapted({"unet": BOTH["unet"]})
    folder = tmp_path / "unet" if layout == "folders" else tmp_path
    dk.save_adapter(pipe if layout == "pipeline" else pipe.components["unet"], folder, "a")
    other = pipeline()
    with torch.no_grad():
        other.components["unet"].blocks[0].to_q.weight.mul_(2)
    with pytest.raises(ValueError, match="made for another base model .*: unet.blocks.0.to_q begins"):
        dk.load_adapter(other, tmp_path)
    with pytest.warns(UserWarning, match="made for another base model"):
        assert len(dk.load_adapter(other, tmp_path, any_base=True)) == 8


def test_a_file_is_read_once(tmp_path, monkeypatch):
    reads, original = [], files.read_safetensors

    def counted(file, tensors=True):
        reads.append(file)
        return original(file, tensors)

    pipe = adapted()
    dk.save_adapter(pipe, tmp_path / "pipeline", "a")
    dk.save_adapter(pipe.components["unet"], tmp_path / "peft", "a")
    for module in (files, pipelines):
        monkeypatch.setattr(module, "read_safetensors", counted)
    for layout in ("pipeline", "peft"):
        dk.load_adapter(pipeline(), tmp_path / layout)
    assert len(reads) == 2


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "checkpoint.pt"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    for options in ({"source": tmp_path / name}, {"source": tmp_path, "weight_name": name}):
        with pytest.raises(ValueError, match="is a pickle, and only safetensors are read here"):
            dk.load_adapter(small_model(), **options)


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
    other = SimpleNamespace(components={"text_encoder": small_model(), "unet": pipeline().components["unet"]})
    assert all(name.startswith("unet.") for name in dk.load_adapter({**other.components}, tmp_path / "one/sub"))
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
    assert "hf download owner/my-dog " in message and command in message and error.value.__cause__ is not None
    assert "--local-dir my-dog\n" in message and "pass its path" in message
    assert_untouched(whole(pipe), before)


def in_the_cache(cache, commit="1" * 40):
    """Where huggingface_hub keeps the files of owner/my-dog."""
    (cache / "models--owner--my-dog/refs").mkdir(parents=True)
    (cache / "models--owner--my-dog/refs/main").write_text(commit)
    return cache / "models--owner--my-dog/snapshots" / commit


def test_a_hub_id_from_the_cache(tmp_path):
    pipe = adapted()
    dk.save_adapter(pipe, in_the_cache(tmp_path), "a")
    other = pipeline()
    assert len(dk.load_adapter(other, "owner/my-dog", cache_dir=tmp_path, local_files_only=True)) == 16
    assert torch.equal(outputs(other), outputs(pipe))
    with pytest.raises(FileNotFoundError, match=r"none of the files other.safetensors .*copy in the cache here is inc"):
        dk.load_adapter(
            pipeline(), "owner/my-dog", weight_name="other.safetensors", cache_dir=tmp_path, local_files_only=True
        )


@pytest.mark.parametrize("subfolder", [None, "v1"])
def test_folders_of_parts_from_the_hub(tmp_path, subfolder):
    pipe = adapted()
    folder = in_the_cache(tmp_path) / (subfolder or "")
    for part, module in components(pipe).items():
        dk.save_adapter(module, folder / part, "a")
    other = pipeline()
    options = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": subfolder}
    assert len(dk.load_adapter(other, "owner/my-dog", **options)) == 16
    assert torch.equal(outputs(other), outputs(pipe))


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    """Its options as they were given; by exact names only what is read, not checkpoints that lie below."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    pipe, asked = adapted(), {}
    dk.save_adapter(pipe, tmp_path, "a")

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"revision": "v2", "token": "secret", "cache_dir": tmp_path / "cache", "local_files_only": True}
    dk.load_adapter(pipeline(), "owner/my-dog", **options)
    patterns = asked.pop("allow_patterns")
    assert asked == options | {"repo": "owner/my-dog"}
    there = [FILE, "unet/adapter_model.safetensors", "checkpoint-5/adapter_model.safetensors", "vae/adapter_config.json",
             "checkpoint-5/unet/adapter_model.safetensors", "text_encoder_2/adapter_config.json"]  # fmt: skip
    assert list(filter_repo_objects(there, allow_patterns=patterns)) == [there[0], there[1], there[-1]]


def hub_failures():
    from huggingface_hub import errors

    answer = SimpleNamespace(headers={}, request=None)
    yield errors.HTTPError("Server disconnected")  # a connection that is cut
    yield errors.HfHubHTTPError("502 Bad Gateway", response=answer)
    yield json.JSONDecodeError("Expecting value", "<html>Welcome to our hotel", 0)  # a network that wants a login
    yield errors.HFValidationError("Repo id must use alphanumeric chars")


@pytest.mark.parametrize("failure", hub_failures(), ids=lambda failure: type(failure).__name__)
def test_whatever_fails_at_the_hub_tells_what_to_do(monkeypatch, failure):
    import huggingface_hub

    def fails(repo, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(FileNotFoundError, match=rf"\({type(failure).__name__}: .*(?s:.*)hf download owner/my-dog") as error:
        dk.load_adapter(small_model(), "owner/my-dog")
    assert error.value.__cause__ is failure


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    dk.save_adapter(adapted(), tmp_path / "my-dog", "a")
    assert len(dk.load_adapter(pipeline(), "~/my-dog")) == 16


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "./owner/name", "owner/name.safetensors", "runs/step.bin"])
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
