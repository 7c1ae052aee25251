"""Two processes train what one trains: with whole copies of the base (DDP), and with its weights split (FSDP2).

The sum of two processes' gradients is rounded otherwise than one process's, so that results agree to float32's tolerance and
not to the bit.
"""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from deft_diffusers import UserError, sharding
from deft_diffusers import train as module
from deft_diffusers.families import load_family
from deft_diffusers.train import find_checkpoints, train
from PIL import Image
from processes import Child, short_run, together, words
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipeline import python_environment
from tiny_pipelines import build
from torch.distributed.tensor import DTensor

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STEADY = {"learning_rate": 1.0, "checkpointing_steps": 2}


def steady_train(options, split=False):
    """Trains by steps as large as the gradients: AdamW's own are as large where a gradient is nothing but rounding."""
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1.0)
    real = module.Run.train

    def watched(run):
        base = set(run.family.model.parameters()) - set(run.whole)
        assert base and all(isinstance(p, DTensor) == split for p in base)
        assert all(p.to_local().numel() < p.numel() for p in base if split and p.shape[0] > 1)
        real(run)

    module.Run.train = watched
    module.VALIDATION = {"num_inference_steps": 2}
    train(options)


def learned(folder):
    """Every tensor of a folder's result."""
    files = [f for f in sorted(folder.rglob("*.safetensors")) if "checkpoint" not in str(f.relative_to(folder))]
    return {f"{f.relative_to(folder)}:{k}": t for f in files for k, t in load_file(f).items()}


def log(folder):
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def distance(a, b):
    """Length of the difference of two results, each taken as one vector."""
    assert a.keys() == b.keys() and a
    return sum(float((a[k] - b[k]).double().square().sum()) for k in a) ** 0.5


def length(a):
    return distance(a, {k: torch.zeros_like(t) for k, t in a.items()})


def finish(*children):
    codes = [child.wait() for child in children]
    assert codes == [0] * len(children), "\n".join(child.said[-3000:] for child in children)


@pytest.fixture
def run(tiny, photos, tmp_path):
    """Options for a run in a folder of that name."""
    return lambda name, **changes: short_run(tiny, photos, tmp_path / name, **STEADY | changes)


def assert_same_training(one, two, tolerance=1e-6):
    """Of folders: every loss, every checkpoint and the result, against how far the run has come."""
    for a, b in zip(log(one), log(two), strict=True):
        assert b == pytest.approx(a, rel=max(1e-5, tolerance))
    final, early = learned(one), learned(one / "checkpoint-2")
    way = distance(final, early)
    assert way > 1e-4 * length(final)
    assert distance(final, learned(two)) < max(tolerance * length(final), 100 * tolerance * way)
    assert distance(early, learned(two / "checkpoint-2")) < tolerance * length(early)
    assert distance(learned(two), learned(two / "checkpoint-4")) == 0
    for file in one.glob("*.safetensors"):
        with safe_open(file, "pt") as a, safe_open(two / file.name, "pt") as b:
            assert a.metadata() == b.metadata()  # the base's fingerprint among it


DDP_CASES = {
    "deft": {"use_ema": True, "ema_decay": 0.5, "gradient_accumulation_steps": 2},
    "deft, prior": {"class_prompt": "a dog", "num_class_images": 2, "prior_loss_weight": 0.5},
    "lora": {"method": "lora", "gradient_accumulation_steps": 2},
    "svdiff": {"method": "svdiff"},
    "dreambooth": {"method": "dreambooth", "train_text_encoder": True, "use_ema": True, "ema_decay": 0.5},
    "textual_inversion": {"method": "textual_inversion", "instance_prompt": "a <sks>"},
}
FSDP_CASES = {
    "deft": DDP_CASES["deft"] | {"gradient_checkpointing": True},
    "para": {"method": "para", "target_modules": "all-linear"},  # of blocks, and of none
    "lora": DDP_CASES["lora"],
    "dreambooth": DDP_CASES["dreambooth"] | {"gradient_accumulation_steps": 2},
    "textual_inversion": DDP_CASES["textual_inversion"],
}


def compare(tmp_path, run, split, tolerance=1e-6, **changes):
    """Trains with two processes and with one."""
    pair = together(tmp_path, steady_train, run("two", **changes), split, **FSDP if split else {})
    alone = Child(tmp_path / "alone.txt", steady_train, run("one", train_batch_size=2, **changes))
    finish(alone, *pair)
    assert re.search("[24] per step", pair[0].said) and "training" not in pair[1].said
    assert_same_training(tmp_path / "one", tmp_path / "two", tolerance)


@pytest.mark.parametrize("kind, case", [("ddp", c) for c in DDP_CASES] + [("fsdp", c) for c in FSDP_CASES])
def test_two_processes_train_what_one_trains(kind, case, run, tmp_path):
    split = kind == "fsdp"
    compare(tmp_path, run, split, **(FSDP_CASES if split else DDP_CASES)[case])


def idle_train(options, split):
    """With an adapter on a layer, too, that the model never calls."""
    family = load_family(options.pretrained_model_name_or_path, torch.float32)
    family.model.idle = torch.nn.Linear(6, 5)
    torch.nn.init.constant_(family.model.idle.weight, 0.1)
    module.load_family = lambda *args: family
    steady_train(options, split)


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp"])
def test_what_gets_no_gradient(split, run, tmp_path):
    o = run("two", target_modules="to_q,idle", adam_weight_decay=0.1, learning_rate=0.1)
    pair = together(tmp_path, idle_train, o, split, **FSDP if split else {})
    one = dataclasses.replace(o, output_dir=str(tmp_path / "one"), train_batch_size=2)
    alone = Child(tmp_path / "alone.txt", idle_train, one, False)
    finish(alone, *pair)
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_the_launcher_starts_it(run, tmp_path):
    """`accelerate launch --use_fsdp`, as the help says it."""
    o = run("two", learning_rate=1e-3)
    # Without a GPU, `accelerate launch` starts several processes only where it believes that there are some.
    launch = [*sharding.LAUNCH.split()[2:], "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "deft_diffusers", *words(o)],
        env=python_environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 per step" in done.stdout
    assert json.loads((tmp_path / "two/training_args.json").read_text())["num_processes"] == 2
    train(run("one", learning_rate=1e-3, train_batch_size=2))
    assert distance(learned(tmp_path / "one"), learned(tmp_path / "two")) < 2e-5
    assert [p.name for p in find_checkpoints(tmp_path / "two")] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    "kind, family, changes",
    [
        # its text encoders have last layers of which it does not use the output: weights without a gradient
        ("ddp", "sdxl", {"method": "dreambooth", "train_text_encoder": True, "adam_weight_decay": 0.1}),
        ("fsdp", "sdxl", {"method": "dreambooth", "train_text_encoder": True, "adam_weight_decay": 0.1}),
        ("fsdp", "flux", {"gate": True}),
    ],
    ids=["ddp-sdxl", "fsdp-sdxl", "fsdp-flux"],
)
def test_two_processes_on_other_bases(kind, family, changes, run, tmp_path):
    pipe = build(family)
    pipe.save_pretrained(tmp_path / "base")
    changes = changes | {"pretrained_model_name_or_path": str(tmp_path / "base"), "resolution": 32}
    compare(tmp_path, run, kind == "fsdp", **changes)


@pytest.mark.parametrize("method", ["deft", "dreambooth"])
def test_split_bf16(method, run, tmp_path):
    """In bfloat16 the split base is the one process's as far as bfloat16 goes."""
    compare(tmp_path, run, True, 1e-2, method=method, mixed_precision="bf16", learning_rate=0.1)


@pytest.mark.parametrize("method", ["deft", "dreambooth"])
def test_a_run_goes_on_split_or_not(method, run, tmp_path):
    """A checkpoint of split weights is a whole one's: it goes on in one process, and the other way round."""
    same = {"method": method, "use_ema": True, "validation_prompt": "a cat", "num_validation_images": 1}
    pair = together(tmp_path, steady_train, run("two", **same), True, **FSDP)
    alone = Child(tmp_path / "alone.txt", steady_train, run("one", train_batch_size=2, **same))
    finish(alone, *pair)
    states = [torch.load(tmp_path / f"{name}/checkpoint-4/state.pt", weights_only=True) for name in ("one", "two")]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*(state["ema"]["shadow_params"] for state in states), rtol=1e-3, atol=1e-5)
    drawn = [np.asarray(Image.open(tmp_path / f"{name}/validation.png")).astype(int) for name in ("one", "two")]
    assert abs(drawn[0] - drawn[1]).max() <= 3
    before = {name: learned(tmp_path / name) for name in ("one", "two")}

    crossed = {name: same | {"resume_from_checkpoint": str(tmp_path / f"{name}/checkpoint-2")} for name in before}
    again = together(tmp_path, steady_train, run("one, split", **crossed["one"]), True, **FSDP)
    pair = together(tmp_path, steady_train, run("two, split", **crossed["two"]), True, **FSDP)
    alone = Child(tmp_path / "alone.txt", steady_train, run("two, whole", train_batch_size=2, **crossed["two"]))
    finish(alone, *again, *pair)
    assert distance(before["two"], learned(tmp_path / "two, split")) == 0
    for name in ("one, split", "two, whole"):
        assert distance(before["one"], learned(tmp_path / name)) < 1e-6 * length(before["one"])


@pytest.mark.parametrize(
    "changes, environment, said",
    [
        ({}, {"FSDP_VERSION": "1"}, "FSDP needs version 2 here: accelerate launch --use_fsdp --fsdp_version 2"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params does not go with FSDP"),
        ({"method": "svdiff"}, {}, "--method svdiff, whose singular vectors would not be split, does not go with FSDP"),
        ({"compile": True}, {}, "--compile does not go with FSDP"),
        ({"class_prompt": "a dog"}, {}, "--class_prompt, for which the base model draws before it is split, does not"),
        ({"method": "dreambooth", "optimizer": "adamw8bit"}, {}, "--optimizer adamw8bit for dreambooth does not go with"),
    ],
    ids=["version", "offload", "svdiff", "compile", "prior", "adamw8bit"],
)
def test_what_does_not_go_with_splitting_is_refused(changes, environment, said, run, monkeypatch):
    for name, value in (FSDP | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    with pytest.raises(UserError, match=said):
        train(run("refused", **changes))


# stopping ----------------------------------------------------------------------------------------------------------------


def poisoned_train(options, step):
    """The last process's weights become NaN before a step."""
    real = module.Run._train_step

    def poison(run):
        if run.step == step - 1 and run.accelerator.is_last_process:
            with torch.no_grad():
                run.parameters[0].fill_(float("nan"))
        real(run)

    module.Run._train_step = poison
    train(options)


def test_divergence_of_one_process_stops_all_and_keeps_the_good_checkpoint(run, tmp_path):
    pair = together(tmp_path, poisoned_train, run("out", max_train_steps=9, learning_rate=1e-3), 5)
    assert [child.wait() for child in pair] == [1, 1]
    for child in pair:
        assert re.search(r"UserError: the loss is not finite at step 5 of 9.*checkpoint-4$", child.said.strip()), child.said
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert all(t.isfinite().all() for t in learned(tmp_path / "out/checkpoint-4").values())
    assert [entry["step"] for entry in log(tmp_path / "out")] == [1, 2, 3, 4]


def signalled_train(options, step, number):
    """The last process is told to stop in a step."""
    real = module.Run._train_step

    def tell(run):
        if run.step == step - 1 and run.accelerator.is_last_process:
            os.kill(os.getpid(), number)
        real(run)

    module.Run._train_step = tell
    train(options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_one_process_saves_first_and_stops_all(number, run, tmp_path):
    whole = together(tmp_path, train, run("whole", max_train_steps=6, learning_rate=1e-3, checkpointing_steps=9))
    finish(*whole)
    stopped = run("out", max_train_steps=6, learning_rate=1e-3, checkpointing_steps=9)
    pair = together(tmp_path, signalled_train, stopped, 3, number)
    assert [child.wait() for child in pair] == [1, 1]
    for child in pair:
        assert "KeyboardInterrupt: stopped at step 3 of 6, checkpoint written" in child.said
    assert [p.name for p in find_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    finish(*together(tmp_path, train, dataclasses.replace(stopped, resume_from_checkpoint="latest")))
    assert distance(learned(tmp_path / "out"), learned(tmp_path / "whole")) == 0
    assert log(tmp_path / "out") == log(tmp_path / "whole")


def hidden_train(options, folder):
    """A process of another machine, which sees neither the output folder nor what is in it."""
    if os.environ["RANK"] == "1":
        options = dataclasses.replace(options, output_dir=folder)
        module.STATE = "unseen"
    train(options)


def test_another_machine_needs_the_output_folder_to_resume_alone(run, tmp_path):
    o = run("out", learning_rate=1e-3)
    finish(*together(tmp_path, hidden_train, o, str(tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere").exists() and len(log(tmp_path / "out")) == 4
    again = dataclasses.replace(o, resume_from_checkpoint="latest", max_train_steps=5)
    pair = together(tmp_path, hidden_train, again, str(tmp_path / "elsewhere"))
    pair[1].wait()
    pair[0].process.kill()  # as the launcher does
    assert "checkpoint-4 is not on this machine: resuming on several needs a folder" in pair[1].said
