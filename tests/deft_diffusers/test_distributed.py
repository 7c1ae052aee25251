"""Two processes train what one trains: with whole copies of the base (DDP), and with its weights split (FSDP2).

The sum of two processes' gradients is rounded otherwise than one process's, so that results agree to float32's tolerance and
not to the bit.
"""

import functools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from deft_diffusers import train as module
from deft_diffusers.train import find_checkpoints, train
from PIL import Image
from processes import Child, short_run, together
from safetensors.torch import load_file
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
    "para": {"method": "para"},
    "lora": DDP_CASES["lora"],
    "dreambooth": DDP_CASES["dreambooth"] | {"gradient_accumulation_steps": 2},
    "textual_inversion": DDP_CASES["textual_inversion"],
}


@pytest.mark.parametrize("kind, case", [("ddp", c) for c in DDP_CASES] + [("fsdp", c) for c in FSDP_CASES])
def test_two_processes_train_what_one_trains(kind, case, run, tmp_path):
    split = kind == "fsdp"
    changes = (FSDP_CASES if split else DDP_CASES)[case]
    pair = together(tmp_path, steady_train, run("two", **changes), split, **FSDP if split else {})
    alone = Child(tmp_path / "alone.txt", steady_train, run("one", train_batch_size=2, **changes))
    finish(alone, *pair)
    assert "2 per step" in pair[0].said or "4 per step" in pair[0].said
    assert_same_training(tmp_path / "one", tmp_path / "two")
