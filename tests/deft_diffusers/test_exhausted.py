"""Disk and memory that run out: said in one line, and nothing that was there before is lost."""

import dataclasses
import json
import resource
import shutil
import subprocess

import numpy as np
import pytest
import torch
from deft_diffusers import UserError
from deft_diffusers import train as module
from deft_diffusers.train import find_checkpoints, train
from processes import Child, short_run
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tiny, photos, tmp_path):
    return lambda folder=tmp_path, **changes: short_run(tiny, photos, folder / "out", **{"checkpointing_steps": 2} | changes)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left):
    """Takes all space of a file system but `left` bytes."""
    with open(folder / "filler", "wb") as file:
        file.write(bytes(max(shutil.disk_usage(folder).free - left, 0)))


def limited_train(options, step, room, disk=None):
    """From the end of a step on no file may exceed `room` bytes; or, on a disk of its own, no more than that is free."""
    real = module.Run._train_step

    def limited(run):
        real(run)
        if run.step == step:
            fill(disk, room) if disk else resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    module.Run._train_step = limited
    train(options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("method", ["deft", "svdiff", "dreambooth"])  # which write by three libraries
def test_a_checkpoint_that_cannot_be_written(method, run, tmp_path):
    """Half a checkpoint is taken away, the last one is whole, and the run goes on from it."""
    o = run(method=method, max_train_steps=6)
    child = Child(tmp_path / "said.txt", limited_train, o, 3, 4000)
    assert child.wait() == 1
    last = child.said.strip().splitlines()[-1]
    target = tmp_path / "out" / "checkpoint-4"
    assert last.startswith(f"UserError: cannot write {target}: ")
    assert "File too large" in last and last.endswith(" MB are free there")
    assert [p.name for p in find_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint-2", "loss.jsonl", "training_args.json"]
    train(dataclasses.replace(o, resume_from_checkpoint="latest"))
    log = (tmp_path / "out/loss.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(1, 7))


@pytest.mark.parametrize("method", ["deft", "dreambooth"])
def test_a_result_that_cannot_be_written(method, run, tmp_path):
    """The result of the run as it was before is still there."""
    o = run(method=method, checkpointing_steps=9)
    o2 = dataclasses.replace(o, checkpointing_steps=4)
    train(o2)
    before = contents(tmp_path / "out")
    longer = dataclasses.replace(o, max_train_steps=6, resume_from_checkpoint="latest")
    child = Child(tmp_path / "said.txt", limited_train, longer, 6, 4000)
    assert child.wait() == 1
    assert child.said.strip().splitlines()[-1].startswith(f"UserError: cannot write {tmp_path / 'out'}: ")
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"loss.jsonl", "training_args.json"}
    train(longer)
    assert "loss of the last 6 steps" in (tmp_path / "out/README.md").read_text()


def test_a_full_disk(run, small_disk, tmp_path):
    o = run(small_disk, max_train_steps=6)
    child = Child(tmp_path / "said.txt", limited_train, o, 3, 40_000, small_disk)
    assert child.wait() == 1
    last = child.said.strip().splitlines()[-1]
    target = small_disk / "out" / "checkpoint-4"
    assert last.startswith(f"UserError: cannot write {target}: No space left on device; 0.0 MB are free there")
    assert [p.name for p in find_checkpoints(small_disk / "out")] == ["checkpoint-2"]
    assert not list((small_disk / "out").glob(".*"))
    (small_disk / "filler").unlink()
    train(dataclasses.replace(o, resume_from_checkpoint="latest"))
    assert load_file(small_disk / "out/adapter_model.safetensors")


def test_a_log_that_cannot_be_written(run, tmp_path, monkeypatch):
    real, path = module.Run._train_step, tmp_path / "out" / "loss.jsonl"

    def full(run):
        real(run)
        if run.step == 3:
            path.unlink()
            path.symlink_to("/dev/full")

    monkeypatch.setattr(module.Run, "_train_step", full)
    with pytest.raises(UserError, match=f"^cannot write {path}: No space left on device; [0-9.,]+ MB are free there$"):
        train(run(max_train_steps=6))
    assert [p.name for p in find_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


# memory ------------------------------------------------------------------------------------------------------------------

TOO_MUCH = 1 << 60  # bytes: more than there are addresses for


def allocate_tensor():
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def allocate_array():
    np.empty(TOO_MUCH, dtype=np.uint8)


def on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB")


SHARED = "several GPUs that share the base (accelerate launch --use_fsdp --fsdp_version 2)"


@pytest.mark.parametrize("allocate", [allocate_tensor, allocate_array, on_a_gpu])
def test_out_of_memory_in_a_step(allocate, run, tmp_path, monkeypatch):
    real = module.Objective.forward
    calls = []

    def forward(self, *args):
        calls.append(args)
        if len(calls) == 7:  # the first of the fourth step's two
            allocate()
        return real(self, *args)

    monkeypatch.setattr(module.Objective, "forward", forward)
    o = run(max_train_steps=6, train_batch_size=3, gradient_accumulation_steps=2, rank=4)
    with pytest.raises(UserError) as error:
        train(o)
    assert str(error.value) == (
        "out of memory at step 4 of 6; turn down, in this order: --gradient_checkpointing, --train_batch_size 1 "
        "--gradient_accumulation_steps 6, --mixed_precision bf16, --optimizer adamw8bit, --quantize nf4, a smaller "
        f"--resolution, --rank 2, {SHARED}; last good checkpoint: {tmp_path / 'out' / 'checkpoint-2'}"
    )
    smaller = {"train_batch_size": 1, "gradient_accumulation_steps": 6, "gradient_checkpointing": True}
    train(dataclasses.replace(o, resume_from_checkpoint="latest", **smaller))


@pytest.mark.parametrize(
    "changes, ways",
    [
        (
            {
                "gradient_checkpointing": True,
                "mixed_precision": "bf16",
                "optimizer": "adamw8bit",
                "rank": 1,
                "quantize": "fp4",
            },
            [SHARED],
        ),
        ({"method": "svdiff", "gradient_checkpointing": True}, ["--mixed_precision bf16", "--optimizer adamw8bit"]),
    ],
    ids=["deft", "svdiff"],
)
def test_only_what_is_not_turned_down_yet_is_named(changes, ways, run, monkeypatch):
    named = module._smaller(run(**changes))
    named.remove("a smaller --resolution")
    assert named == ways
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert SHARED not in module._smaller(run(**changes))


def test_out_of_memory_while_drawing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *args, **kwargs: allocate_tensor())
    message = "^out of memory while drawing at step 2; turn down, in this order: --num_validation_images 1, --gradient"
    with pytest.raises(UserError, match=f"{message}.*checkpoint-2$"):
        train(run(validation_prompt="a cat", validation_steps=2))


def test_a_base_that_does_not_fit(run, monkeypatch):
    monkeypatch.setattr(module, "load_family", lambda *args: allocate_tensor())
    with pytest.raises(UserError, match="^out of memory while the base model was loaded; turn down"):
        train(run())


def test_another_failure_is_not_taken_for_memory(run, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(module.Objective, "forward", fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(run())
