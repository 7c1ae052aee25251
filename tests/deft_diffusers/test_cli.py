"""The command line teaches, and says in one line what is wrong before it has written anything."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from deft_diffusers import __version__, cli
from deft_diffusers.options import DemoOptions, SampleOptions, TrainOptions
from PIL import Image
from safetensors.torch import load_file
from tiny_pipeline import python_environment

pytestmark = pytest.mark.usefixtures("one_thread")


def run(words, capsys):
    """Exit code, standard output and standard error of `deft` with these words."""
    try:
        code = cli.main([str(w) for w in words])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def train_words(tiny, photos, tmp_path):
    return {
        "--pretrained_model_name_or_path": tiny,
        "--instance_data_dir": photos,
        "--instance_prompt": "a cat",
        "--output_dir": tmp_path / "out",
        "--max_train_steps": 2,
    }


@pytest.fixture
def sample_words(tiny, tmp_path):
    return {
        "--pretrained_model_name_or_path": tiny,
        "--prompt": "a cat",
        "--num_inference_steps": 2,
        "--output_dir": tmp_path / "out",
    }


def words(command, options):
    return [command, *(w for pair in options.items() for w in pair if w is not None)]


# help --------------------------------------------------------------------------------------------------------------------


def test_help_of_every_command_shows_groups_defaults_and_an_example(capsys):
    code, out, _ = run(["--help"], capsys)
    assert code == 0 and all(f"    {name} " in out for name in ("train", "sample", "demo"))
    for name, options in (("train", TrainOptions), ("sample", SampleOptions), ("demo", DemoOptions)):
        code, out, _ = run([name, "--help"], capsys)
        assert code == 0 and "example:\n  deft " + name in out
        for field in dataclasses.fields(options):
            assert f"--{field.name}" in out and f"{field.metadata['group']}:" in out
    _, out, _ = run(["train", "--help"], capsys)
    text = " ".join(out.split())
    assert "rank of the adapter; 4 to 8 suits one subject (default: 8)" in text
    assert "--seed INT" in text and "(default: 0)" in text and "(required)" in text
    assert max(map(len, out.splitlines())) <= 110


def test_version_and_help_import_nothing_heavy(capsys):
    assert run(["--version"], capsys)[:2] == (0, f"deft {__version__}\n")
    program = (
        "import sys; from deft_diffusers import cli, sweep; cli.build_parser(); "
        "print({'torch', 'diffusers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", program], env=python_environment(), capture_output=True, text=True)
    assert out.stdout == "set()\n", out.stderr


def test_flags_and_options_have_the_same_defaults():
    parser, _ = cli.build_parser()

    def parse(options, line):
        values = vars(parser.parse_args(line.split()))
        return options(**{k: v for k, v in values.items() if k not in ("command", "debug")})

    asked = {"pretrained_model_name_or_path": "m", "instance_data_dir": "d", "output_dir": "o"}
    got = parse(TrainOptions, "train " + " ".join(f"--{k} {v}" for k, v in asked.items()))
    assert got == TrainOptions(**asked)
    got = parse(
        SampleOptions, "sample --pretrained_model_name_or_path m --no-merge --adapter a --adapter b --adapter_weight -1"
    )
    assert got == SampleOptions(pretrained_model_name_or_path="m", merge=False, adapter=["a", "b"], adapter_weight=[-1.0])


# bad words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "required: COMMAND"),
        ("trian", "(choose from 'train', 'sweep', 'compare', 'sample', 'evaluate', 'convert', 'demo'), did you mean train?"),
        ("train --method=txtual_inversion", "did you mean textual_inversion?"),
        ("train --mixed_precision bf-16", "did you mean bf16?"),
        ("sample --dtype float16", "(choose from 'fp32', 'fp16', 'bf16'), did you mean fp16?"),
        ("sweep --method drembooth", "did you mean dreambooth?"),
        ("convert x --format khoya", "did you mean kohya?"),
        ("sweep --subjets x", "unknown option --subjets, did you mean --subjects?"),
        ("sample --num-inference-steps 3", "unknown option --num-inference-steps, did you mean --num_inference_steps?"),
        ("convert --ranks 3", "unknown option --ranks, did you mean --rank?"),
        ("demo --max_steps 3", "unknown option --max_steps, did you mean --max_train_steps?"),
        ("train --learing_rate 1", "unknown option --learing_rate, did you mean --learning_rate?"),
        ("train --instance_data=x", "unknown option --instance_data, did you mean --instance_data_dir?"),
        ("sample --zzz", "unknown option --zzz (see deft sample --help)"),
        ("train --rank", "--rank: expected one argument"),
        ("train --rank two", "--rank: invalid int value: 'two'"),
        ("train --method dora", "'deft', 'para', 'lora'"),
        ("train", "required: --pretrained_model_name_or_path, --instance_data_dir, --output_dir"),
        ("sample", "required: --pretrained_model_name_or_path"),
        ("demo 7", "unrecognized arguments: 7"),
    ],
)
def test_bad_words(line, message, capsys):
    code, out, err = run(line.split(), capsys)
    assert code == 2 and not out and err.count("\n") == 1 and message in err


# bad values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--rank": 0}, "--rank must be at least 1, got 0"),
        ({"--rank": -4}, "--rank must be at least 1, got -4"),
        ({"--max_train_steps": 0}, "--max_train_steps must be at least 1"),
        ({"--train_batch_size": 0}, "--train_batch_size must be at least 1"),
        ({"--checkpointing_steps": 0}, "--checkpointing_steps must be at least 1"),
        ({"--learning_rate": "nan"}, "--learning_rate must be a number from 0 up"),
        ({"--learning_rate": -1}, "--learning_rate must be a number from 0 up"),
        ({"--dropout": 1}, "--dropout must be at least 0 and below 1"),
        ({"--alpha": 0}, "--alpha must be a positive number"),
        ({"--max_grad_norm": 0}, "--max_grad_norm must be a positive number"),
        ({"--resolution": 30}, "--resolution must be a positive multiple of 8, got 30"),
        ({"--lr_warmup_steps": 5}, "use constant_with_warmup"),
        ({"--method": "lora", "--decomposition_method": "svd"}, "do not apply to --method lora"),
        ({"--method": "para", "--gate": None}, "para has no R"),
        ({"--mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"--target_modules": "to_kk"}, "'to_kk' matches no layer"),
        ({"--instance_data_dir": "nowhere"}, "no such folder or file of pictures: nowhere"),
        ({"--pretrained_model_name_or_path": "./nowhere"}, "no such folder, nor a hub id"),
        ({"--resume_from_checkpoint": "nowhere"}, "no checkpoint there"),
    ],
)
def test_bad_training_values(change, message, train_words, capsys, tmp_path):
    code, _, err = run(words("train", train_words | change), capsys)
    assert code == 2 and err.startswith("deft train: error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--prompts_file": "x"}, "either with --prompt or with --prompts_file"),
        ({"--adapter": "nowhere"}, "no such adapter: nowhere"),
        ({"--adapter_weight": 1}, "1 --adapter_weight for 0 --adapter"),
        ({"--num_images_per_prompt": 0}, "--num_images_per_prompt must be at least 1"),
        ({"--num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
        ({"--num_inference_steps": 1001}, "--num_inference_steps must be at most 1000, got 1001"),
        ({"--height": 33}, "--height must be a positive multiple of 8"),
        ({"--width": 0}, "--width must be a positive multiple of 8"),
        ({"--dtype": "fp16", "--device": "cpu"}, "fp16 needs a GPU"),
        ({"--device": "warp9"}, "cannot use --device warp9"),
        ({"--pretrained_model_name_or_path": "~/nowhere"}, "no such folder, nor a hub id"),
        (
            {"--pretrained_model_name_or_path": "no-one/nothing"},
            "there is no folder no-one/nothing, and the hub gives no such model",
        ),
    ],
)
def test_bad_sampling_values(change, message, sample_words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a test asks nothing of the network
    code, _, err = run(words("sample", sample_words | change), capsys)
    assert code == 2 and err.startswith("deft sample: error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_bad_folders(train_words, sample_words, capsys, tmp_path, photos):
    def fails(command, options, message):
        code, _, err = run(words(command, options), capsys)
        assert code == 2 and message in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    fails("train", train_words | {"--instance_data_dir": empty}, f"no pictures in {empty}")
    fails("train", train_words | {"--pretrained_model_name_or_path": empty}, "it has no model_index.json")
    (photos / "bad.jpg").write_bytes(b"\xff\xd8 not really")
    fails("train", train_words, f"cannot read the picture {photos / 'bad.jpg'}")
    (photos / "bad.jpg").unlink()
    silent = {k: v for k, v in train_words.items() if k != "--instance_prompt"}
    fails("train", silent, "0.png has no caption (0.txt or metadata.jsonl)")
    (empty / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline", "_diffusers_version": "0.36.0"}))
    fails(
        "train",
        train_words | {"--pretrained_model_name_or_path": empty},
        "KolorsPipeline, which is not supported; supported: St",
    )
    fails("sample", sample_words | {"--adapter": empty}, "adapter_model.safetensors")
    (empty / "texts").write_text("\n \n")
    from_file = {k: v for k, v in sample_words.items() if k != "--prompt"} | {"--prompts_file": empty / "texts"}
    fails("sample", from_file, "holds no text")
    (tmp_path / "file").touch()
    for command, options in (("train", train_words), ("sample", sample_words)):
        assert "is a file" in run(words(command, options | {"--output_dir": tmp_path / "file"}), capsys)[2]


def test_debug_shows_the_traceback(train_words, capsys):
    bad = train_words | {"--rank": 0}
    assert "Traceback" not in run(words("train", bad), capsys)[2]
    assert "Traceback" in run(words("train", bad | {"--debug": None}), capsys)[2]


# good words --------------------------------------------------------------------------------------------------------------


def test_train_then_sample(train_words, sample_words, capsys, tmp_path):
    train_words["--instance_prompt"] = "a b c d e f g"
    code, out, err = run(words("train", train_words), capsys)
    assert code == 0, err
    count = int(
        re.search(r"training ([\d,]+) parameters \(deft, rank 8, 32 layers\) on 3 pictures", out)[1].replace(",", "")
    )
    assert count == sum(t.numel() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values())
    assert "too long for the text encoder, which will not see: 'g'" in err
    samples = tmp_path / "samples"
    code, out, err = run(words("sample", sample_words | {"--adapter": tmp_path / "out", "--output_dir": samples}), capsys)
    assert code == 0, err
    assert "1 picture in" in out and (samples / "grid.png").exists()
    code, _, err = run(words("train", train_words), capsys)
    assert code == 2 and "holds a run already" in err


# demo --------------------------------------------------------------------------------------------------------------------


def test_demo_shows_before_and_after_and_gives_the_base_back(tiny, tmp_path, capsys, monkeypatch):
    from deft_diffusers import demo

    monkeypatch.setattr(demo, "MODEL", str(tiny))
    monkeypatch.setattr(demo, "DRAW", {"num_inference_steps": 2})
    line = ["demo", "--output_dir", tmp_path / "out", "--max_train_steps", "2"]
    code, out, err = run(line, capsys)
    assert code == 0, err
    hashes = dict(re.findall(r"sha256 (\w+) +(\w{64})", out))
    assert hashes["before"] == hashes["unmerged"] != hashes["merged"] and "back to the bit" in out
    assert re.search(r"^kernels: \w+", out, re.MULTILINE)
    assert re.search(r"train +\d+\.\d\d s", out) and re.search(r"total +\d+\.\d\d s", out)
    page = Image.open(tmp_path / "out" / "demo.png")
    assert page.width > 6 * 192 and page.height > 2 * 192
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()

    monkeypatch.setattr(demo.dk, "unmerge", lambda model: None)  # a base model that is not restored is no success
    code, out, err = run(line, capsys)
    assert code == 2 and re.search(r"did not restore \d+ base parameters", err) and "back to the bit" not in out


def test_demo_checks_its_options_first(capsys, tmp_path):
    code, _, err = run(["demo", "--output_dir", tmp_path / "out", "--max_train_steps", 0], capsys)
    assert code == 2 and "--max_train_steps must be at least 1" in err and not (tmp_path / "out").exists()


def test_demo_replaces_only_what_is_its_own(tiny, tmp_path, capsys, monkeypatch):
    from deft_diffusers import demo

    monkeypatch.setattr(demo, "MODEL", str(tiny))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "wedding.jpg").write_bytes(b"precious")
    code, _, err = run(["demo", "--output_dir", tmp_path], capsys)
    assert code == 2 and "pictures is not this demonstration's" in err
    assert (tmp_path / "pictures" / "wedding.jpg").read_bytes() == b"precious"


# what the user already has ------------------------------------------------------------------------------------------------


def test_nothing_of_the_users_is_overwritten(train_words, sample_words, capsys):
    out = train_words["--output_dir"]
    out.mkdir()
    (out / "README.md").write_text("my own notes")
    code, _, err = run(words("train", train_words), capsys)
    assert code == 2 and "holds a run already (README.md)" in err
    assert (out / "README.md").read_text() == "my own notes"
    (out / "0000.png").write_bytes(b"mine")
    code, _, err = run(words("sample", sample_words), capsys)
    assert code == 2 and "0000.png is in the way" in err and (out / "0000.png").read_bytes() == b"mine"
    for content in ("{", "[]", '{"samples": [3]}'):
        (out / "samples.json").write_text(content)
        code, _, err = run([*words("sample", sample_words), "--overwrite_output_dir"], capsys)
        assert code == 2 and "samples.json" in err.strip().splitlines()[-1] and "Traceback" not in err
        assert (out / "0000.png").read_bytes() == b"mine"


def test_damaged_files_are_named(train_words, tiny, tmp_path, capsys):
    broken = tmp_path / "model"
    broken.mkdir()
    for content, message in (("{", "model_index.json"), ("{}", "is a None, which is not supported")):
        (broken / "model_index.json").write_text(content)
        code, _, err = run(words("train", train_words | {"--pretrained_model_name_or_path": broken}), capsys)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    code, _, err = run(words("train", train_words | {"--checkpointing_steps": 1}), capsys)
    assert code == 0, err
    resume = train_words | {"--resume_from_checkpoint": "latest"}
    checkpoint = train_words["--output_dir"] / "checkpoint-2"
    code, _, err = run(words("train", resume | {"--max_train_steps": 1}), capsys)
    assert code == 2 and "checkpoint-2 is beyond --max_train_steps 1" in err
    state = (checkpoint / "state.pt").read_bytes()
    (checkpoint / "state.pt").write_bytes(state[: len(state) // 2])
    code, _, err = run(words("train", resume), capsys)
    assert code == 2 and "cannot read" in err and "state.pt" in err


@pytest.mark.parametrize("flag", [["--dropout", "0.5"], ["--alpha", "4"], ["--no-init_weights"]])
def test_para_refuses_what_would_do_nothing(flag, train_words, capsys):
    code, _, err = run([*words("train", train_words | {"--method": "para"}), *flag], capsys)
    assert code == 2 and "--method para injects nothing" in err
