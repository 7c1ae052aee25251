"""A run that is killed, at any moment, however often, and resumed by the same command ends as one that was not."""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from deft_diffusers import cli
from deft_diffusers import train as module
from deft_diffusers.train import find_checkpoints, train
from processes import Child, short_run, words
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipeline import write_picture
from torch.utils._pytree import tree_map_only

EVERY, KILLS = 2, 20  # steps between checkpoints, lives that end early
TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}  # audit events


@pytest.fixture
def restless(tiny, photos, tmp_path):
    """Options, in a folder of that name, under which everything that can be random is."""
    write_picture(photos / "wide.png", 5, size=(60, 34))
    random_kinds = {"random_flip": True, "dropout": 0.2, "caption_dropout": 0.3, "use_ema": True, "lr_scheduler": "cosine"}
    every = {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "checkpointing_steps": EVERY}
    return lambda name, **changes: short_run(
        tiny, photos, tmp_path / name, **random_kinds | every | {"checkpoints_total_limit": 2} | changes
    )


def at_moments(folder, note):
    """Calls `note()` whenever something is about to happen to a file in the folder, around every step and every fsync."""
    inside, busy = f"{folder}{os.sep}", threading.local()

    def once():
        if not getattr(busy, "on", False):  # else it is `note` itself that touches files
            busy.on = True
            note()
            busy.on = False

    def hook(event, args):
        names = [os.fspath(a) for a in args if isinstance(a, str | os.PathLike)]
        if event in TOUCHING and any(f"{name}{os.sep}".startswith(inside) for name in names):
            once()

    def around(function):
        def noted(*args):
            once()
            result = function(*args)
            once()
            return result

        return noted

    sys.addaudithook(hook)
    module.Run._train_step = around(module.Run._train_step)
    os.fsync = around(os.fsync)


def counted_train(options, report):
    """Tells how many moments and seconds there are between two checkpoints."""
    moments = [0]
    at_moments(options.output_dir, lambda: moments.__setitem__(0, moments[0] + 1))
    start = time.perf_counter()
    train(options)
    intervals = options.max_train_steps / EVERY
    Path(report).write_text(json.dumps([moments[0] / intervals, (time.perf_counter() - start) / intervals]))


def mortal_train(options, moment=None, delay=None):
    """Ends at a moment, or so many seconds after its first step began."""
    left, real = [moment], module.Run.train

    def note():
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def train_until(run):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        real(run)

    if moment is not None:
        at_moments(options.output_dir, note)
    else:
        module.Run.train = train_until
    train(options)


def state_of(folder, parse=False):
    """All that a run leaves, by name: bytes, or with `parse` values (a safetensors file has its metadata in any order)."""
    left = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in ("training_args.json", "README.md", "result.json"):
            continue
        if parse and path.name.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                left[name] = file.metadata(), {key: file.get_tensor(key).numpy().tobytes() for key in load_file(path)}
        elif parse and path.name == module.STATE:
            state = torch.load(path, weights_only=True)
            left[name] = tree_map_only(torch.Tensor, lambda t: t.numpy().tobytes(), state)
        else:
            left[name] = path.read_bytes()
    return left


def test_twenty_kills(restless, tmp_path):
    steps = EVERY * (KILLS + 4)
    short = {"max_train_steps": steps, "gradient_accumulation_steps": 1}
    whole = Child(tmp_path / "whole.txt", counted_train, restless("whole", **short), str(tmp_path / "report"))
    assert whole.wait() == 0, whole.said
    moments, seconds = json.loads((tmp_path / "report").read_text())
    o = restless("killed", **short, resume_from_checkpoint="latest")
    draw, lives = random.Random(0), []
    for life in range(KILLS):
        early = {"moment": 1 + draw.randrange(int(2 * moments))} if life % 2 else {"delay": draw.uniform(0, 2 * seconds)}
        child = Child(tmp_path / f"life{life}.txt", mortal_train, o, *[early.get(k) for k in ("moment", "delay")])
        assert child.wait() == -signal.SIGKILL, child.said
        kept = find_checkpoints(o.output_dir)
        lives.append(module._step_of(kept[-1]) if kept else 0)
    assert lives[0] < lives[-1] < steps and lives == sorted(lives), lives
    last = Child(tmp_path / "last.txt", train, o)
    assert last.wait() == 0, last.said
    killed, uninterrupted = state_of(tmp_path / "killed", parse=True), state_of(tmp_path / "whole", parse=True)
    assert killed.keys() == uninterrupted.keys()
    for name in killed:
        assert killed[name] == uninterrupted[name], name


def signalled_main(options, step, number):
    """The command line, told to stop in a step."""
    real = module.Run._train_step

    def tell(run):
        if run.step == step - 1:
            os.kill(os.getpid(), number)
        real(run)

    module.Run._train_step = tell
    raise SystemExit(cli.main(words(options)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_first(number, restless, tmp_path):
    whole = Child(tmp_path / "whole.txt", train, restless("whole", max_train_steps=6))
    o = restless("out", max_train_steps=6)
    stopped = Child(tmp_path / "stopped.txt", signalled_main, o, 3, number)
    assert (whole.wait(), stopped.wait()) == (0, cli.INTERRUPTED), whole.said + stopped.said
    assert "deft train: stopped at step 3 of 6, checkpoint written; go on with --resume_from_checkpoint" in stopped.said
    assert [p.name for p in find_checkpoints(o.output_dir)] == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    again = Child(tmp_path / "again.txt", train, dataclasses.replace(o, resume_from_checkpoint="latest"))
    assert again.wait() == 0, again.said
    assert state_of(tmp_path / "out", parse=True)["loss.jsonl"] == state_of(tmp_path / "whole", parse=True)["loss.jsonl"]
    name = "adapter_model.safetensors"
    assert state_of(tmp_path / "out", parse=True)[name] == state_of(tmp_path / "whole", parse=True)[name]


def watched_train(options, snapshots):
    """Copies the output folder at every moment: what a kill would leave there."""
    count, module.VALIDATION = [0], {"num_inference_steps": 1}

    def copy():
        if os.path.isdir(options.output_dir):
            shutil.copytree(options.output_dir, f"{snapshots}/{count[0]:04d}")
            count[0] += 1

    at_moments(options.output_dir, copy)
    train(options)


def test_what_a_kill_leaves_at_every_moment(restless, tmp_path):
    """Whatever bears its final name is whole: checkpoints, results, card."""
    o = restless("out", max_train_steps=6, checkpoints_total_limit=1, validation_prompt="a cat", num_validation_images=1)
    child = Child(tmp_path / "out.txt", watched_train, o, str(tmp_path / "snapshots"))
    assert child.wait() == 0, child.said
    final = state_of(tmp_path / "out")
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert len(snapshots) > 60
    known, seen = dict(final), set()
    for snapshot in snapshots:
        state = state_of(snapshot)
        log = state.pop("loss.jsonl", b"")
        assert final["loss.jsonl"].startswith(log)
        kept = find_checkpoints(snapshot)
        assert not kept or log.count(b"\n") >= module._step_of(kept[-1])
        for name, content in state.items():
            if not any(part.startswith(".") for part in Path(name).parts):
                assert content == known.setdefault(name, content), (snapshot.name, name)
        for checkpoint in kept:
            assert {p.name for p in checkpoint.iterdir()} == {p.name for p in (tmp_path / "out/checkpoint-6").iterdir()}
        if (snapshot / "README.md").exists():
            assert state.keys() >= final.keys() - {"loss.jsonl"}
        seen.add((len(kept), (snapshot / "adapter_model.safetensors").exists(), (snapshot / "README.md").exists()))
    assert seen == {(0, False, False), (1, False, False), (2, False, False), (1, True, False), (1, True, True)}
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("files", ["nothing", "no checkpoint", "half a result", "a half-written checkpoint"])
def test_the_same_command_starts_anew_where_there_is_no_checkpoint(files, restless, tmp_path):
    o = restless("out", max_train_steps=2, resume_from_checkpoint="latest")
    folder = tmp_path / "out"
    if files != "nothing":
        folder.mkdir()
        (folder / "training_args.json").write_text("{")
        (folder / "loss.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"st')
    if files == "half a result":
        (folder / "adapter_model.safetensors").write_bytes(b"old")
    if files == "a half-written checkpoint":
        (folder / ".checkpoint-2.77.part").mkdir()
        (folder / ".checkpoint-2.77.part/state.pt").write_bytes(b"half")
    train(o)
    assert not list(folder.glob(".*"))
    assert [json.loads(line)["step"] for line in (folder / "loss.jsonl").read_text().splitlines()] == [1, 2]
    assert torch.load(folder / "checkpoint-2/state.pt", weights_only=True)["step"] == 2
