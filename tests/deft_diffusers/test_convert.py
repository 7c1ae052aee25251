"""`deft convert`: every kind of source to every format that it can become, and what it says where it cannot."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from deft_diffusers import cli
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import deft_kernels as dk

sys.path.insert(0, str(Path(__file__).parents[1] / "deft_kernels"))
from test_authors import injected, written

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of outputs of size 1, float32: another order of the same sums


def run(words, capsys):
    """Exit code, standard output and standard error of `deft convert` with these words."""
    try:
        code = cli.main(["convert", *map(str, words)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def pipe(tiny):
    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stirred(unet, config):
    names = dk.inject_adapter(unet, config)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "deft_" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return names


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return unet(sample, torch.tensor([3, 700]), text, return_dict=False)[0]


def loaded(tiny, load):
    """The output of a fresh UNet after `load(pipe)`."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    load(pipe)
    return output(pipe.unet)


@pytest.mark.parametrize("format", [None, "kohya", "peft"])
def test_deft_to_lora(tiny, pipe, tmp_path, capsys, format):
    before = output(pipe.unet)
    names = stirred(pipe.unet, dk.DeftConfig(r=2, gate=True))
    dk.save_adapter(pipe.unet, tmp_path / "deft")
    expected = output(pipe.unet)
    words = [tmp_path / "deft", "--pretrained_model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    code, out, err = run([*words, *(["--format", format] if format else [])], capsys)
    assert code == 0 and out == f"{len(names)} layers in {tmp_path / 'out'}\n", err
    assert err.splitlines() == [f"loading unet of {tiny}", f"reading {tmp_path / 'deft'}", f"writing {tmp_path / 'out'}"]
    load = (lambda p: dk.import_lora(p.unet, tmp_path / "out")) if format == "peft" else (
        lambda p: p.load_lora_weights(str(tmp_path / "out")))  # fmt: skip
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(loaded(tiny, load), expected, **CLOSE)


def test_strength_rank_and_type(tiny, pipe, tmp_path, capsys):
    stirred(pipe.unet, dk.DeftConfig(r=4))
    dk.save_adapter(pipe.unet, tmp_path / "deft")
    dk.set_adapters(pipe.unet, "default", -0.5)
    words = [tmp_path / "deft", "--pretrained_model_name_or_path", tiny, "--adapter_weight=-0.5"]
    assert run([*words, "--output_dir", tmp_path / "a"], capsys)[0] == 0
    result = loaded(tiny, lambda p: p.load_lora_weights(str(tmp_path / "a")))
    torch.testing.assert_close(result, output(pipe.unet), **CLOSE)
    code, out, _ = run([*words, "--output_dir", tmp_path / "b", "--rank", 2, "--dtype", "bf16"], capsys)
    assert code == 0 and "relative error of the layers' updates: 0." in out
    state = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert {t.shape[0] for key, t in state.items() if "lora_A" in key} == {2}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_lora_to_deft_with_a_text_encoder(tiny, pipe, tmp_path, capsys, format):
    stirred(pipe.unet, dk.LoraConfig(r=2))
    stirred(pipe.text_encoder, dk.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    dk.export_lora(pipe, tmp_path / "lora.safetensors", format=format)
    words = [tmp_path / "lora.safetensors", "--pretrained_model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    code, out, err = run(words, capsys)  # not by its out_proj, which diffusers would know a text encoder's keys by
    assert code == 0, err
    assert sorted(os.listdir(tmp_path / "out")) == ["text_encoder", "unet"]

    def load(p):
        dk.load_adapter(p.unet, tmp_path / "out" / "unet")
        dk.load_adapter(p.text_encoder, tmp_path / "out" / "text_encoder")

    torch.testing.assert_close(loaded(tiny, load), output(pipe.unet), **CLOSE)
    capsys.readouterr()
    words = ["--pretrained_model_name_or_path", tiny, "--output_dir", tmp_path / "back", "--format", format]
    code, _, err = run([tmp_path / "out", *words], capsys)  # and out again
    assert code == 0, err
    result = loaded(tiny, lambda p: p.load_lora_weights(str(tmp_path / "back")))
    torch.testing.assert_close(result, output(pipe.unet), **CLOSE)


@pytest.mark.parametrize("options", [{"gating": True}, {"decomposition": "None"}, {"method": "additive_update"},
                                     {"method": "lorapara"}], ids=str)  # fmt: skip
def test_the_authors_files(tiny, pipe, tmp_path, capsys, options):
    """To a folder of ours with no model at hand, and to a LoRA with one."""
    names = [n for n, m in pipe.unet.named_modules() if n.endswith(("to_q", "to_v"))]
    layers = {name: injected(pipe.unet.get_submodule(name).weight, **options) for name in names}
    written(tmp_path / "theirs", layers)
    for name, (*_, changed) in layers.items():
        pipe.unet.get_submodule(name).weight.data.copy_(changed)
    expected = output(pipe.unet)
    code, out, err = run([tmp_path / "theirs", "--output_dir", tmp_path / "ours"], capsys)
    assert (code, out, err) == (0, f"{len(names)} layers in {tmp_path / 'ours'}\n", "")

    def load(p):
        parts = ["para", "lora"] if "lorapara" in options.values() else [""]
        for part in parts:
            dk.load_adapter(p.unet, tmp_path / "ours" / part, "a" + part)
        dk.set_adapters(p.unet, ["a" + part for part in parts])

    torch.testing.assert_close(loaded(tiny, load), expected, **CLOSE)
    words = ["--pretrained_model_name_or_path", tiny, "--format", "kohya", "--output_dir", tmp_path / "lora"]
    code, _, err = run([tmp_path / "theirs", *words], capsys)
    assert code == 0, err
    torch.testing.assert_close(loaded(tiny, lambda p: p.load_lora_weights(str(tmp_path / "lora"))), expected, **CLOSE)


def test_sdxl_runs_need_no_configuration(pipe, tmp_path, capsys):
    torch.save({"mid_block.a.to_q.lora_layer.P": torch.ones(4, 2), "mid_block.a.to_q.lora_layer.R_new": torch.ones(2, 4)},
               tmp_path / "project_replace.pt")  # fmt: skip
    for words, method in (([], "none"), (["--decomposition_method", "qr"], "qr")):
        code, *_ = run([tmp_path / "project_replace.pt", "--output_dir", tmp_path / method, *words], capsys)
        config = json.loads((tmp_path / method / "adapter_config.json").read_text())
        assert code == 0 and config["decomposition_method"] == method
        assert config["target_modules"] == ["mid_block.a.to_q"]


def test_what_was_converted_before_is_gone(tiny, pipe, tmp_path, capsys):
    """Other formats' files, parts' folders, and nothing of anyone else's."""
    stirred(pipe.unet, dk.DeftConfig(r=2))
    dk.save_adapter(pipe.unet, tmp_path / "deft")
    names = [n for n, m in pipe.unet.named_modules() if n.endswith("to_q")]
    dk.eject(pipe.unet)
    weights = {name: pipe.unet.get_submodule(name).weight for name in names}
    for kind, method in (("two", "lorapara"), ("one", "residual_projection")):
        written(tmp_path / kind, {name: injected(w, method) for name, w in weights.items()})
    out, model = tmp_path / "out", ["--pretrained_model_name_or_path", tiny]
    always = ["--output_dir", out, "--overwrite_output_dir"]
    for words, expected in (
        ([tmp_path / "two"], ["lora/adapter_config.json", "lora/adapter_model.safetensors", "para/adapter_config.json",
                              "para/adapter_model.safetensors"]),
        ([tmp_path / "one"], ["adapter_config.json", "adapter_model.safetensors"]),
        ([tmp_path / "deft", *model, "--format", "peft"], ["unet/adapter_config.json", "unet/adapter_model.safetensors"]),
        ([tmp_path / "deft", *model, "--adapter_weight", "0.25"], ["pytorch_lora_weights.safetensors"]),
    ):  # fmt: skip
        code, _, err = run([*words, *always], capsys)
        assert code == 0, err
        assert sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file() and f.name != "notes") == expected
        (out / "unet").mkdir(exist_ok=True)
        (out / "unet" / "notes").write_text("mine")
    assert (out / "unet" / "notes").read_text() == "mine"
    dk.load_adapter(pipe.unet, tmp_path / "deft")
    dk.set_adapters(pipe.unet, "default", 0.25)
    torch.testing.assert_close(loaded(tiny, lambda p: dk.import_lora(p, out)), output(pipe.unet), **CLOSE)


@pytest.mark.parametrize("options, change", [
    ({}, lambda t: t.update(R_new=torch.randn(5, 16))), ({}, lambda t: t.pop("R_new")),
    ({"gating": True}, lambda t: t.pop("gate")), ({"method": "additive_update"}, lambda t: t.pop("lora_B")),
])  # fmt: skip
def test_broken_files_of_the_authors(pipe, tmp_path, capsys, options, change):
    names = [n for n, m in pipe.unet.named_modules() if n.endswith("to_q")]
    layers = {name: injected(pipe.unet.get_submodule(name).weight, **options) for name in names}
    change(layers[names[-1]][0])
    written(tmp_path / "theirs", layers)
    code, _, err = run([tmp_path / "theirs", "--output_dir", tmp_path / "out"], capsys)
    assert code == 2 and f" of {names[-1]} is " in err and not (tmp_path / "out").exists()


def test_the_method_that_is_given_counts_with_a_model_too(tiny, pipe, tmp_path, capsys):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    W = pipe.unet.get_submodule(name).weight.data
    P, R = torch.randn(len(W), 2), torch.randn(2, W.shape[1])
    torch.save({f"{name}.lora_layer.P": P, f"{name}.lora_layer.R_new": R}, tmp_path / "project_replace.pt")
    words = ["--pretrained_model_name_or_path", tiny, "--format", "diffusers", "--decomposition_method", "qr"]
    code, _, err = run([tmp_path / "project_replace.pt", *words, "--output_dir", tmp_path / "out"], capsys)
    assert code == 0, err
    Q = torch.linalg.qr(P).Q
    W.copy_(W - Q @ Q.T @ W + Q @ R)
    result = loaded(tiny, lambda p: p.load_lora_weights(str(tmp_path / "out")))
    torch.testing.assert_close(result, output(pipe.unet), **CLOSE)


def test_a_text_encoder_alone_stays_one(tiny, pipe, tmp_path, capsys):
    stirred(pipe.text_encoder, dk.LoraConfig(r=2, target_modules=["q_proj", "out_proj"]))
    dk.export_lora(pipe, tmp_path / "lora.safetensors")
    words = ["--pretrained_model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    assert run([tmp_path / "lora.safetensors", *words], capsys)[0] == 0
    assert os.listdir(tmp_path / "out") == ["text_encoder"]


def test_a_hub_id_that_cannot_be_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(["someone/lora-cat", "--output_dir", tmp_path / "out"], capsys)
    assert code == 2 and "hf download someone/lora-cat" in err and "pass its path" in err


@pytest.fixture
def sources(pipe, tmp_path):
    dk.inject_adapter(pipe.unet, dk.DeftConfig(r=2))
    dk.save_adapter(pipe.unet, tmp_path / "deft")
    state = {"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "project_replace.pt").write_bytes(b"no pickle")
    return tmp_path


@pytest.mark.parametrize("words, message", [
    ("nothing", "{0}/nothing does not exist: expected a folder with adapter_model.safetensors, a safetensors file, or a"),
    ("x.safetensors --pretrained_model_name_or_path {1} --adapter_weight 2", "--adapter_weight does not apply to format"),
    ("x.safetensors --pretrained_model_name_or_path {1} --dtype fp16", "--dtype does not apply to format deft"),
    ("deft --overwrite_output_dir --output_dir {0}/deft", "--output_dir {0}/deft holds {0}/deft itself; choose another"),
    ("deft --overwrite_output_dir --output_dir {0}", "--output_dir {0} holds {0}/deft itself; choose another"),
    ("deft", "--pretrained_model_name_or_path is needed to convert {0}/deft to diffusers: the update depends on the base"),
    ("deft --format deft", "{0}/deft is a deft folder already: give --format diffusers, kohya or peft"),
    ("x.safetensors", "is needed to convert {0}/x.safetensors to deft: the names of its layers"),
    ("x.safetensors --rank 2", "--rank does not apply to format deft"),
    ("x.safetensors --pretrained_model_name_or_path {1}", "2 of 2 keys fit no adaptable layer of UNet2DCondition"),
    ("x.safetensors --format kohya --decomposition_method qr", "--decomposition_method does not apply to a source"),
    ("empty --pretrained_model_name_or_path {1}", "{0}/empty/pytorch_lora_weights.safetensors does not exist"),
    ("project_replace.pt", "project_replace.pt is refused: it is damaged, or holds other things than tensors"),
    ("deft --rank 0", "--rank must be at least 1, got 0"),
    ("deft --adapter_weight nan", "--adapter_weight must be a finite number"),
    ("deft --format lycoris", "invalid choice: 'lycoris'"),
    ("deft --pretrained_model_name_or_path {0}/empty", "{0}/empty is no pipeline folder: it has no model_index.json"),
    ("deft --output_dir {0}/deft", "{0}/deft holds files already; choose another --output_dir or add --over"),
    ("deft --output_dir {0}/x.safetensors", "--output_dir {0}/x.safetensors is a file"),
])  # fmt: skip
def test_errors_are_one_line(sources, tiny, capsys, words, message):
    words = words.format(sources, tiny).split()
    out = [] if "--output_dir" in words else ["--output_dir", sources / "out"]
    code, stdout, err = run([sources / words[0], *words[1:], *out], capsys)
    assert code == 2 and not stdout
    assert message.format(sources, tiny) in err.splitlines()[-1] and "--debug" not in err
    assert not (sources / "out").exists()


def test_help_teaches(capsys):
    code, out, _ = run(["--help"], capsys)
    text = " ".join(out.split())
    assert code == 0 and out.startswith("usage: deft convert SOURCE [options]")
    assert "SOURCE an adapter's folder of this library or of PEFT" in text and "example: deft convert outputs/cat" in text
    assert max(map(len, out.splitlines())) <= 115
    assert run([], capsys)[2].startswith("deft convert: error: the following arguments are required: SOURCE, --output_dir")


@pytest.mark.parametrize("format", ["diffusers", "kohya", "deft"])
def test_what_was_converted_is_drawn_with(format, pipe, tiny, tmp_path, capsys):
    """`deft sample --adapter` takes every folder that `deft convert` writes for it."""
    from deft_diffusers.families import load_family
    from deft_diffusers.sample import load_adapters

    stirred(pipe.unet, dk.DeftConfig(r=2, init_weights=False))
    dk.save_adapter(pipe.unet, tmp_path / "deft")
    if format != "deft":
        words = [tmp_path / "deft", "--output_dir", tmp_path / format, "--format", format]
        assert run([*words, "--pretrained_model_name_or_path", tiny], capsys)[0] == 0
    for merge in (True, False):
        family = load_family(str(tiny), torch.float32)
        load_adapters(family, [tmp_path / format], [1.0], merge)
        torch.testing.assert_close(output(family.model), output(pipe.unet), **CLOSE)
