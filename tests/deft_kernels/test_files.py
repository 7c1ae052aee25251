"""Adapters in files: PEFT's layout both ways, and every kind of wrong file named before the model is touched."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import warnings

import pytest
import torch
from common import CONFIGS, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_inject import assert_untouched, fingerprint
from transformers.pytorch_utils import Conv1D

import deft_kernels as dk
from deft_kernels.adapters.files import base_fingerprint, sketch_bases
from deft_kernels.adapters.inject import adapted_layers
from deft_kernels.adapters.lora import lora_factors
from deft_kernels.nn.layers import DeftLayer

TARGETS = ["to_q", "to_k", "to_out.0", "conv_in"]


def seeded_model():
    torch.manual_seed(5)
    return small_model()


def saved(tmp_path, method="qr", **options):
    model = seeded_model()
    options = {"target_modules": TARGETS, "init_weights": False, **options}
    dk.inject_adapter(model, dataclasses.replace(CONFIGS[method], **options))
    dk.save_adapter(model, tmp_path / "a")
    return model, tmp_path / "a"


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("from_file", [False, True])
def test_round_trip(tmp_path, method, from_file):
    model, folder = saved(tmp_path, method)
    other, x = seeded_model(), torch.randn(2, 3, 4, 4)
    if from_file:  # one file is enough: it carries its configuration
        os.rename(folder / "adapter_model.safetensors", tmp_path / "alone.safetensors")
        folder = tmp_path / "alone.safetensors"
    names = dk.load_adapter(other, folder, "mine")
    assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, (dk.DeftLinear, dk.DeftConv2d)))
    assert torch.equal(other(x), model(x))
    assert not any(p.requires_grad for p in other.parameters())
    dk.eject(other)
    dk.load_adapter(other, folder, trainable=True)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    dk.save_adapter(other, tmp_path / "again")
    assert (tmp_path / "again/adapter_config.json").read_text() == (tmp_path / "a/adapter_config.json").read_text()


def test_layout_is_pefts(tmp_path):
    _, folder = saved(tmp_path)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    state = load_file(folder / "adapter_model.safetensors")
    assert state["base_model.model.blocks.0.to_q.deft_P"].shape == (8, 3)
    assert state["base_model.model.blocks.1.to_out.0.deft_R"].shape == (3, 8)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "DEFT"


def test_diffusers_bare_keys_are_read(tmp_path):
    model, folder = saved(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({k.removeprefix("base_model.model."): v for k, v in load_file(file).items()}, file)
    other, x = seeded_model(), torch.randn(2, 3, 4, 4)
    dk.load_adapter(other, folder)
    assert torch.equal(other(x), model(x))


def mutated(folder, change):
    """Change the tensors of a file, which then carries no configuration any more, as PEFT's do not."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def rename(state, old, new):
    state[new] = state.pop(old)


KEY = "base_model.model.blocks.0.to_q.deft_P"


@pytest.mark.parametrize("change,message", [
    (lambda s: s.pop(KEY), r"1 tensors are missing: blocks.0.to_q \(P\)"),
    (lambda s: rename(s, KEY, KEY.replace("to_q", "to_z")), r"1 of 14 keys fit no adaptable layer of Model.*to_z.deft_P"),
    (lambda s: s.update({KEY.replace("_P", "_gate"): torch.ones(())}), r"1 tensors are extra: blocks.0.to_q \(gate\)"),
    (lambda s: s.update({KEY: torch.ones(9, 3)}), r"wrong shapes: blocks.0.to_q \(P: \(9, 3\), expected \(8, 3\)\)"),
    (lambda s: s[KEY].fill_(float("nan")), r"P of blocks.0.to_q has values that are not finite"),
    (lambda s: s.clear(), r"holds no adapter tensors"),
    (lambda s: [s.pop(KEY), s.pop(KEY.replace("_P", "_R"))], r"1 layers are targeted but missing: blocks.0.to_q"),
    (lambda s: rename(s, KEY, KEY.replace("deft_P", "lora_B.weight")), r"1 of 14 keys .* none of a DEFT adapter: .*lora_B"),
    (lambda s: s.update({KEY.removeprefix("base_model.model."): s[KEY] + 1}), r"P of blocks.0.to_q is there twice"),
    (lambda s: s.update({KEY: s[KEY].to(torch.float8_e4m3fn).fill_(float("nan"))}), r"P of blocks.0.to_q has values that"),
    (lambda s: s.update({KEY: s[KEY].long()}), r"P of blocks.0.to_q has values that"),
])  # fmt: skip
def test_wrong_tensors(tmp_path, change, message):
    _, folder = saved(tmp_path)
    mutated(folder, change)
    model = seeded_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        dk.load_adapter(model, folder)
    assert_untouched(model, before)


@pytest.mark.parametrize("change,message", [
    ({"peft_type": "IA3"}, "peft_type is 'IA3', expected DEFT or LORA"),
    ({"r": 0}, "r is 0"),
    ({"r": 4}, "wrong shapes"),
    ({"decomposition_method": "lu"}, "unknown decomposition_method 'lu'"),
    ({"modules_to_save": ["conv_out"]}, "options that these layers do not have: modules_to_save"),
    ({"para": True}, r"tensors are extra: .*\(R\)"),
    ({"use_bdlora": {"x": 1}}, "options that these layers do not have: use_bdlora"),
    ({"peft_version": "99.1", "use_magic": True}, r"layers do not have: use_magic \(the file is PEFT 99.1's\)"),
    ({"para": "yes"}, "para is 'yes', expected true or false"),
    ({"target_modules": ["to_q", 3]}, r"target_modules is \['to_q', 3\], expected a string or a list of strings"),
    ({"alpha": 1e300}, r"R of blocks.0.to_\w+ has values of up to .*e\+29\d \(alpha / r is .*\), expected below 1.15e\+18"),
    ({"rank_pattern": {"to_q": 2}}, "options that these layers do not have: rank_pattern"),
    (None, "not readable JSON"),
])  # fmt: skip
def test_wrong_configurations(tmp_path, change, message):
    _, folder = saved(tmp_path)
    mutated(folder, lambda state: None)
    file = folder / "adapter_config.json"
    file.write_text("{" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    model = seeded_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        dk.load_adapter(model, folder)
    assert_untouched(model, before)


def test_rank_0_and_absurd_alphas_of_a_lora(tmp_path):
    _, folder = saved(tmp_path, "lora")
    whole, file = json.loads((folder / "adapter_config.json").read_text()), folder / "adapter_config.json"
    mutated(folder, lambda state: None)
    model = seeded_model()
    file.write_text(json.dumps({**whole, "lora_alpha": 1e300}))
    with pytest.raises(ValueError, match=r"P of blocks.0.to_\w+ has values of up to .* expected below 1.15e\+18"):
        dk.load_adapter(model, folder)
    file.write_text(json.dumps({**whole, "rank_pattern": {"blocks.0.to_q": 0}}))
    key = "base_model.model.blocks.0.to_q.lora_"
    mutated(folder, lambda s: s.update({f"{key}A.weight": torch.ones(0, 8), f"{key}B.weight": torch.ones(8, 0)}))
    with pytest.raises(ValueError, match=r"wrong shapes: blocks.0.to_q \(P: of rank 0, expected at least 1\)"):
        dk.load_adapter(model, folder)


@pytest.mark.parametrize("version", ["99.1", "", None, 3, ["0.21"]])
def test_any_peft_version_is_read(tmp_path, version):
    """What a version cannot do is told by the options that are on, not by its number; those that are off change nothing."""
    model, folder = saved(tmp_path)
    mutated(folder, lambda state: None)
    file = folder / "adapter_config.json"
    more = {"peft_version": version, "use_magic": False, "magic_config": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    other, x = seeded_model(), torch.randn(2, 3, 4, 4)
    dk.load_adapter(other, folder)
    assert torch.equal(other(x), model(x))


def test_two_files_of_different_adapters(tmp_path):
    _, folder = saved(tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"qr"', '"relu"'))
    with pytest.raises(ValueError, match="are not of one adapter: they differ in decomposition_method"):
        dk.load_adapter(seeded_model(), folder)


def test_a_pissa_lora_is_refused(tmp_path):
    _, folder = saved(tmp_path, "lora")
    mutated(folder, lambda state: None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="options that these layers do not have: init_lora_weights='pissa'"):
        dk.load_adapter(seeded_model(), folder)


def test_nan_is_not_saved(tmp_path):
    model, folder = saved(tmp_path)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="P of conv_in has values that are not finite: adapter 'default' is not saved"):
        dk.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == whole


def test_a_model_with_a_part_called_base_layers(tmp_path):
    model = torch.nn.ModuleDict({"base_layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"))
    dk.save_adapter(model, tmp_path)
    dk.eject(model)
    assert dk.load_adapter(model, tmp_path) == ["base_layers.0"]


def test_missing_and_truncated_files(tmp_path):
    model = seeded_model()
    before = fingerprint(model)
    with pytest.raises(
        FileNotFoundError, match="nothing.* does not exist: expected a folder with adapter_model.safetensors"
    ):
        dk.load_adapter(model, tmp_path / "nothing")
    _, folder = saved(tmp_path)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            dk.load_adapter(model, folder)
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        dk.load_adapter(model, tmp_path / "foreign.safetensors")
    assert_untouched(model, before)


# A thousand damaged files ------------------------------------------------------------------------------------------------

# What a JSON value, or a value in a pickle, may have become.
VALUES = [None, True, False, 0, 1, -1, 3, 0.5, 10**400, "x", "", "1", "(", "qr", [], [1], ["to_q"], [None], {}, {"r": 3},
          {"(": 1}, {"to_q": "x"}]  # fmt: skip
TEXTS = [*map(json.dumps, VALUES), "NaN", "1e999", "{", "", "[" * 100_000, "\ud800", '{"r": 3, "r": "x"}']


def a_denoiser():
    """The small model under a name that files for pipelines know."""
    model = seeded_model()
    model.__class__ = type("UNet2DConditionSmall", (type(model),), {})
    return model


def sources(folder):
    """Every kind of file there is a reader for: {name: (path to read, reader)}, in folders of their own."""
    made = {}
    for name in ("qr", "lora"):
        model = a_denoiser()
        options = {"target_modules": TARGETS, "init_weights": False}
        dk.inject_adapter(model, dataclasses.replace(CONFIGS[name], **options))
        dk.save_adapter(model, folder / name)
        made[name] = (folder / name, dk.load_adapter)
        bare = folder / f"{name} bare"  # as PEFT writes it: the tensors' file carries no configuration
        shutil.copytree(folder / name, bare)
        mutated(bare, lambda state: None)
        made[bare.name] = (bare, dk.load_adapter)
    for name in ("diffusers", "kohya", "peft"):
        dk.export_lora(model, folder / name, format=name)
        made[name] = (folder / name, dk.import_lora)
    from test_authors import injected, removed, targets, written

    plain = seeded_model()
    weights = {name: plain.get_submodule(name).weight for name in targets(plain)}
    injections, ranks = (injected, "knowledge_injection"), (removed, "para_rank")
    for name, (layer, stem), options in (
        ("deft", injections, {}),
        ("fixed", injections, {"fixed": True, "gating": True}),
        ("lorapara", injections, {"method": "lorapara"}),
        ("para", ranks, {}),
        ("adaptive", ranks, {"method": "tsvd", "adaptive": True}),
    ):
        layers = {key: layer(weight, **options) for key, weight in weights.items()}
        for with_json in (True, False):
            made[f"{name} {with_json}"] = (folder / f"{name} {with_json}", dk.import_reference)
            written(made[f"{name} {with_json}"][0], layers, stem, json_too=with_json)
    made["sdxl"] = (folder / "sdxl" / "project_replace.pt", dk.import_reference)
    made["sdxl"][0].parent.mkdir()
    torch.save({f"unet.{k}.lora_layer.P": torch.randn(8, 2) for k in weights}, made["sdxl"][0])
    return made


def damaged_bytes(whole, rng):
    kind = rng.randrange(5)
    if kind == 0:
        return whole[: rng.randrange(len(whole))]
    if kind == 1:  # a header of any length
        return rng.choice([2**63, 2**40, 10**8, len(whole), 3]).to_bytes(8, "little") + whole[8:]
    if kind == 2:
        at = rng.randrange(len(whole))
        return whole[:at] + rng.randbytes(rng.randrange(1, 40)) + whole[at + rng.randrange(40) :]
    flipped = bytearray(whole)
    for _ in range(rng.randrange(1, 9)):
        flipped[rng.randrange(min(len(flipped), rng.choice([64, 3000, 10**6])))] = rng.randrange(256)
    return bytes(flipped)


def damaged_value(value, rng):
    """The same with one value, somewhere, of another type, missing, renamed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        value, kind = dict(value), rng.randrange(8)
        if kind == 0:
            value.pop(key)
        elif kind == 1:
            value[rng.choice(["x", "", "unet.", key + "x", key.replace("to_", "no_")])] = value.pop(key)
        elif kind == 2:
            key = rng.choice(["use_dora", "peft_version", "modules_to_save", "r", "lora_alpha", "alpha", "use_rslora"])
            value[key] = rng.choice(VALUES)
        else:
            value[key] = damaged_value(value[key], rng)
        return value
    if isinstance(value, torch.Tensor):
        return damaged_tensor(value, rng)
    return rng.choice(VALUES)


def damaged_tensor(t, rng):
    return rng.choice([
        lambda: t[..., :-1] if t.dim() else t[None], lambda: t[None], lambda: t.flatten(), lambda: t.flatten()[:0], t.sum,
        lambda: t[:0] if t.dim() else t, lambda: t[..., :0] if t.dim() else t, lambda: t.float() * 1e30,
        lambda: t.long(), lambda: t.bool(), lambda: t.to(torch.complex64), lambda: t * float("nan"), lambda: t / 0,
        lambda: t.double() + 1e300, lambda: t.half(), lambda: t.to(torch.float8_e4m3fn), lambda: t.to(torch.uint8),
        lambda: torch.cat([t, t]) if t.dim() else t, lambda: t.mT if t.dim() > 1 else t,
    ])().contiguous()  # fmt: skip


def damage(file, rng, canary):
    """Damage one file, in bytes or in what it says."""
    whole = file.read_bytes()
    if file.suffix in (".bin", ".pt") and rng.random() < 0.2:
        from test_authors import Canary

        state = torch.load(file, weights_only=True)
        state[rng.choice([*state, "x"])] = Canary(canary)
        torch.save(state, file) if rng.random() < 0.5 else file.write_bytes(pickle.dumps(state))
    elif rng.random() < 0.3:
        file.write_bytes(damaged_bytes(whole, rng))
    elif file.suffix == ".json":
        text = rng.choice(TEXTS) if rng.random() < 0.1 else json.dumps(damaged_value(json.loads(whole), rng))
        file.write_bytes(text.encode(errors="surrogatepass"))
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {"format": "pt"}
        state = load_file(file)
        if rng.random() < 0.5:
            key = rng.choice(sorted(metadata))
            if rng.random() < 0.3:
                metadata[key] = rng.choice(TEXTS[:-2])
            elif key != "format":
                metadata[key] = json.dumps(damaged_value(json.loads(metadata[key]) if metadata[key][:1] == "{" else 0, rng))
        else:
            state = damaged_value(state, rng)
            state = {k: t for k, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
        save_file({k: t.clone() for k, t in state.items()}, file, metadata)
    else:
        torch.save(damaged_value(torch.load(file, weights_only=True), rng), file)


def factors_of_all(model):
    """B and A of every layer of what is active."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DeftLayer) and layer.strengths}
    return lora_factors(layers, {name: layer.strengths for name, layer in layers.items()}).values()


def test_a_thousand_damaged_files(tmp_path):
    """Over all readers and kinds of file: each is refused by an error that names it, or is a valid adapter still; the model
    is as it was, and nothing that a pickle brings along is executed."""
    rng, canary = random.Random(0), tmp_path / "canary"
    torch.manual_seed(0)
    made = sources(tmp_path / "files")
    model = a_denoiser()
    before = fingerprint(model)
    refused, loaded = dict.fromkeys(made, 0), dict.fromkeys(made, 0)
    for turn in range(100 * len(made)):
        name = list(made)[turn % len(made)]
        path, reader = made[name]
        folder = path if path.is_dir() else path.parent
        whole = {file: file.read_bytes() for file in sorted(folder.iterdir())}
        damage(rng.choice(sorted(whole)), rng, canary)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader(model, path)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), (turn, name, error)
            refused[name] += 1
        else:
            assert all(torch.isfinite(t).all() for pair in factors_of_all(model) for t in pair), (turn, name)
            dk.eject(model)
            loaded[name] += 1
        assert_untouched(model, before)
        for file, content in whole.items():
            file.write_bytes(content)
    assert not canary.exists()
    for name, (path, reader) in made.items():  # none of them was refused from the start
        reader(model, path)
        dk.eject(model)
        assert refused[name] > 30 and loaded[name] > 3, (name, refused, loaded)


def test_another_base(tmp_path):
    _, folder = saved(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):  # the same base, in another precision
        dk.load_adapter(seeded_model().to(dtype), folder)
    other = small_model()
    before = fingerprint(other)
    with pytest.raises(ValueError, match=r"for another base model \(weights differ by .*: \S+ begins with \[.*\] in the "
                                         r"file's fingerprint and with \[.*\] here\).*any_base=True"):
        dk.load_adapter(other, folder)
    assert_untouched(other, before)
    with pytest.warns(UserWarning, match="made for another base model"):
        dk.load_adapter(other, folder, any_base=True)


def test_the_fingerprint_is_the_pristine_bases(tmp_path):
    model, _ = saved(tmp_path)
    dk.merge(model)
    dk.save_adapter(model, tmp_path / "b")
    dk.load_adapter(seeded_model(), tmp_path / "b")


def test_writes_are_atomic(tmp_path, monkeypatch):
    model, folder = saved(tmp_path)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dk.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_layer_of_conv1d_in_a_file(tmp_path):
    def build():
        torch.manual_seed(2)
        return torch.nn.Sequential(Conv1D(5, 6))

    model, x = build(), torch.randn(3, 6)
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=["0"], init_weights=False))
    dk.save_adapter(model, tmp_path)
    other = build()
    dk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_a_base_that_cannot_be_read_any_more_keeps_its_fingerprint():
    model = seeded_model()
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules=TARGETS))
    layers = adapted_layers(model)
    known = base_fingerprint(layers)
    sketch_bases(model)
    for layer in layers.values():
        layer.base_layer.weight = torch.nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)
    assert base_fingerprint(layers) == known
    for layer in layers.values():
        layer.sketch = None
    assert base_fingerprint(layers) is None
