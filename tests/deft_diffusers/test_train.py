"""Training learns, stops, resumes to the bit, spreads over processes, and leaves the base model alone."""

import collections
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from deft_diffusers import UserError, data
from deft_diffusers import train as module
from deft_diffusers.demo import fingerprints
from deft_diffusers.families import load_family
from deft_diffusers.methods import adapter_rates
from deft_diffusers.options import TrainOptions
from deft_diffusers.samples import Samples, seed_of
from deft_diffusers.train import complete, find_checkpoints, train
from deft_diffusers.writing import alone
from safetensors.torch import load_file
from tiny_pipeline import picture, write_picture

import deft_kernels as dk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tiny, photos, tmp_path):
    """Makes options for a short run; keyword arguments replace or add."""

    def make(**changes):
        defaults = {
            "pretrained_model_name_or_path": str(tiny),
            "instance_data_dir": str(photos),
            "instance_prompt": "a cat",
            "output_dir": str(tmp_path / "out"),
            "max_train_steps": 3,
            "rank": 2,
            "report_to": "none",
        }
        return TrainOptions(**defaults | changes)

    return make


def adapter(folder):
    return load_file(os.path.join(folder, "adapter_model.safetensors"))


def log(folder):
    with open(os.path.join(folder, "loss.jsonl")) as file:
        return [json.loads(line) for line in file]


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


# what is learnt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "tiny_v"])
def test_loss_falls_and_only_the_adapter_changes(model, options, photos, request):
    o = options(
        pretrained_model_name_or_path=str(request.getfixturevalue(model)),
        instance_data_dir=str(photos / "0.png"),
        max_train_steps=40,
        train_batch_size=2,
        learning_rate=2e-2,
        target_modules="all-linear",
        rank=4,
    )
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    base = dict(family.model.named_parameters())
    everything = {**base, **{f"vae.{n}": p for n, p in family.pipe.vae.named_parameters()}}
    everything |= {f"text.{n}": p for n, p in family.pipe.text_encoder.named_parameters()}
    before = fingerprints(everything)
    still = train(dataclasses.replace(o, output_dir=f"{o.output_dir}-still", learning_rate=0.0))
    train(o, family)
    assert fingerprints(everything) == before
    assert not any(p.requires_grad for p in base.values())

    losses = [entry["loss"] for entry in log(o.output_dir)]
    assert [entry["step"] for entry in log(o.output_dir)] == list(range(1, 41))
    pictures = [picture(photos / "0.png")]
    unseen = Samples(pictures, family, 99, False, False).batch(range(32), torch.device("cpu"))  # other noise and times
    family.model.eval()
    with torch.no_grad():
        adapted = family.loss(family.model, *unseen).item()
        dk.eject(family.model)
        plain = family.loss(family.model, *unseen).item()
    assert adapted < 0.8 * plain, (plain, adapted)
    # of the same noise and times, which differ too much from step to step to compare the first steps with the last
    assert sum(losses[-10:]) < 0.9 * sum(entry["loss"] for entry in log(still)[-10:])


@pytest.mark.parametrize("model, velocity", [("tiny", False), ("tiny_v", True)])
def test_the_target_is_the_one_that_the_model_was_made_for(model, velocity, request):
    family = load_family(str(request.getfixturevalue(model)), torch.float32)
    latents, noise = torch.randn(2, 3, 4, 16, 16).unbind(0)
    times = torch.tensor([0, 400, 999])
    kept = family.noise_scheduler.alphas_cumprod[times][:, None, None, None]
    scaled = latents * family.pipe.vae.config.scaling_factor
    target = kept.sqrt() * noise - (1 - kept).sqrt() * scaled if velocity else noise

    def perfect(noisy, t, **conditions):
        torch.testing.assert_close(noisy, kept.sqrt() * scaled + (1 - kept).sqrt() * noise)
        return (target,)

    assert family.loss(perfect, latents, noise, times, {}).item() < 1e-10


@pytest.mark.parametrize(
    "changes, kind, keys",
    [
        ({"method": "deft"}, "DEFT", {"deft_P", "deft_R"}),
        ({"method": "deft", "decomposition_method": "svd", "gate": True}, "DEFT", {"deft_P", "deft_R", "deft_gate"}),
        ({"method": "deft", "decomposition_method": "relu", "init_weights": False}, "DEFT", {"deft_P", "deft_R"}),
        ({"method": "para"}, "DEFT", {"deft_P"}),
        ({"method": "lora", "alpha": 4.0, "dropout": 0.1}, "LORA", {"lora_A.weight", "lora_B.weight"}),
    ],
)
def test_every_method_trains_and_loads_again(changes, kind, keys, options):
    o = options(max_train_steps=2, target_modules="to_q,to_out.0", **changes)
    folder = train(o)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == kind and config["r"] == 2
    tensors = adapter(folder)
    assert {name.split("to_q.")[-1] for name in tensors if "to_q." in name} == keys
    assert all("to_q" in name or "to_out.0" in name for name in tensors)
    settings = json.loads((folder / "training_args.json").read_text())
    assert settings["method"] == o.method and settings["resolution"] == 32
    assert "deft sample" in (folder / "README.md").read_text()
    dk.load_adapter(load_family(o.pretrained_model_name_or_path, torch.float32).model, folder)


def test_learning_rates(options):
    assert adapter_rates(options(learning_rate=1e-3)) == {"P": pytest.approx(1e-4), "R": 1e-3, "gate": 1e-3}
    for changes in (
        {"decomposition_method": "none"},
        {"decomposition_method": "relu"},
        {"method": "lora"},
        {"method": "para"},
    ):
        assert adapter_rates(options(learning_rate=1e-3, **changes))["P"] == 1e-3
    assert adapter_rates(options(learning_rate=1e-3, learning_rate_P=3e-3))["P"] == 3e-3
    o = options(learning_rate=1e-3, learning_rate_P=3e-3, train_text_encoder=True)
    assert adapter_rates(o, text=True) == adapter_rates(o)
    o = dataclasses.replace(o, text_encoder_lr=2e-4)
    assert adapter_rates(o, text=True) == {"P": pytest.approx(2e-5), "R": 2e-4, "gate": 2e-4}
    assert adapter_rates(o)["P"] == 3e-3


@pytest.mark.parametrize(
    "changes, rate, steps",
    [
        ({}, 1e-3, 500),
        ({"method": "para"}, 5e-4, 1000),
        ({"method": "lora", "train_text_encoder": True}, 5e-4, 500),
        ({"method": "svdiff"}, 1e-3, 500),
        ({"method": "dreambooth"}, 5e-6, 400),
        ({"method": "dreambooth", "class_prompt": "a dog"}, 5e-6, 800),
        ({"method": "dreambooth", "class_prompt": "a dog", "train_text_encoder": True}, 2e-6, 800),
        ({"method": "textual_inversion", "train_batch_size": 2, "gradient_accumulation_steps": 4}, 4e-3, 3000),
        ({"method": "textual_inversion", "optimizer": "prodigy"}, 1.0, 3000),
        ({"method": "svdiff", "learning_rate": 0.1, "max_train_steps": 7}, 0.1, 7),
    ],
)
def test_published_rates_and_steps(changes, rate, steps, options):
    o = complete(options(**{"max_train_steps": None, "rank": 8} | changes))
    assert (o.learning_rate, o.max_train_steps) == (pytest.approx(rate), steps)


def test_both_learning_rates_and_their_schedule_reach_the_optimizer(options):
    o = options(max_train_steps=4, learning_rate=1e-2, learning_rate_P=2e-3, lr_scheduler="linear", lr_warmup_steps=2)
    rates = [(entry["lr_P"], entry["lr_R"]) for entry in log(train(o))]
    assert rates == [pytest.approx(r) for r in ((0, 0), (1e-3, 5e-3), (2e-3, 1e-2), (1e-3, 5e-3))]


def test_captions_beside_pictures_are_used(tiny, photos):
    family = load_family(str(tiny), torch.float32)
    pictures = [picture(photos / f"{k}.png", text) for k, text in enumerate(["a cat", "a dog", "a cat"])]
    samples = Samples(pictures, family, 0, False, False)
    *_, conditions = samples.batch(range(9), torch.device("cpu"))
    chosen = [samples._index(n) for n in range(9)]
    want = family.encode_prompts([pictures[k].caption for k in chosen])["encoder_hidden_states"]
    torch.testing.assert_close(conditions["encoder_hidden_states"], want)
    assert all(sorted(chosen[e : e + 3]) == [0, 1, 2] for e in (0, 3, 6))  # an epoch shows every picture once


# randomness --------------------------------------------------------------------------------------------------------------


def test_a_step_has_pictures_of_one_size_and_all_are_seen_equally_often(tiny, tmp_path):
    family = load_family(str(tiny), torch.float32)
    sizes = [(32, 32), (48, 24), (32, 32), (24, 48), (48, 24), (32, 32)]
    for k, size in enumerate(sizes):
        write_picture(tmp_path / f"{k}.png", size=size)
    pictures = [picture(tmp_path / f"{k}.png", "a cat", size) for k, size in enumerate(sizes)]
    samples = Samples(pictures, family, 0, False, False, images_per_step=4)
    cycle = [[samples._index(4 * step + k) for k in range(4)] for step in range(2 * len(sizes))]
    assert all(len({sizes[k] for k in step}) == 1 for step in cycle)
    for half in (cycle[:6], cycle[6:]):
        assert collections.Counter(k for step in half for k in step) == dict.fromkeys(range(6), 4)
    assert cycle[:6] != cycle[6:]
    again = Samples(pictures, family, 0, False, False, images_per_step=4)
    assert [[again._index(4 * step + k) for k in range(4)] for step in (11, 3)] == [cycle[11], cycle[3]]
    step = next(s for s, chosen in enumerate(cycle) if sizes[chosen[0]] == (48, 24))
    assert samples.batch(range(4 * step, 4 * step + 4), torch.device("cpu"))[0].shape[2:] == (12, 24)


def test_pictures_of_all_proportions_train_undistorted(options, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for k, size in enumerate([(300, 300), (320, 180), (90, 160)]):
        write_picture(folder / f"{k}.png", size=size)
    train(options(instance_data_dir=str(folder), max_train_steps=3))
    out = capsys.readouterr().out
    assert "3 pictures at" in out and out.count("(1)") == 3 and "32 x 32 (1)" in out, out
    train(options(instance_data_dir=str(folder), max_train_steps=1, overwrite_output_dir=True, aspect_ratio_buckets=False))
    assert "3 pictures at 32 x 32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("crop, flip", [(False, False), (True, True)])
def test_a_sample_depends_on_its_number_alone(crop, flip, tiny, tmp_path):
    family = load_family(str(tiny), torch.float32)
    write_picture(tmp_path / "wide.png", size=(48, 32))
    pictures = [picture(tmp_path / "wide.png")]
    cpu = torch.device("cpu")
    together = Samples(pictures, family, 7, crop, flip).batch(range(6), cpu)
    again = Samples(pictures, family, 7, crop, flip)
    for n in (5, 0, 3):
        latents, noise, times, _ = again.batch([n], cpu)
        torch.testing.assert_close(latents[0], together[0][n], rtol=0, atol=1e-5)  # the VAE's rounding varies with the batch
        assert torch.equal(noise[0], together[1][n]) and torch.equal(times[0], together[2][n])
    assert not torch.equal(together[1][0], together[1][1])
    other = Samples(pictures, family, 8, crop, flip).batch([0], cpu)
    assert not torch.equal(other[1][0], together[1][0])


@pytest.mark.parametrize("flip", [False, True])
def test_latents_computed_once_are_those_computed_each_time(flip, tiny, photos, tmp_path):
    family = load_family(str(tiny), torch.float32)
    pictures = [picture(photos / f"{k}.png") for k in range(3)]
    samples = Samples(pictures, family, 0, True, flip)  # square: a random crop has nowhere to go
    assert samples.posteriors is not None
    once = samples.batch(range(9), torch.device("cpu"))
    samples.posteriors = None
    each = samples.batch(range(9), torch.device("cpu"))
    torch.testing.assert_close(once[0], each[0], rtol=0, atol=1e-5)
    write_picture(tmp_path / "wide.png", size=(64, 32))
    assert Samples([picture(tmp_path / "wide.png")], family, 0, True, flip).posteriors is None


def test_cached_latents_and_texts(tiny, photos, tmp_path):
    """Found again; made anew for another picture, size, text or encoder; a damaged one is named."""
    cpu, folder = torch.device("cpu"), tmp_path / "cache"
    family = load_family(str(tiny), torch.float32)
    pictures = [picture(photos / f"{k}.png", text) for k, text in enumerate(["a cat", "a dog", "a cat"])]

    def make(pictures, family=family, flip=False):
        samples = Samples(pictures, family, 0, False, flip, cache_dir=folder)
        return samples.batch(range(6), cpu), [(cache.found, cache.made) for cache in samples.caches]

    plain = Samples(pictures, family, 0, False, False).batch(range(6), cpu)
    for expected in ([(0, 2), (0, 3)], [(2, 0), (3, 0)]):
        batch, counts = make(pictures)
        assert counts == expected
        torch.testing.assert_close(batch, plain, rtol=0, atol=1e-5)
    write_picture(photos / "1.png", 77)
    assert make([*pictures[:1], picture(photos / "1.png", "a bird")])[1] == [(1, 1), (1, 1)]
    assert make(pictures[:1], flip=True)[1] == [(1, 0), (1, 1)]
    assert make([picture(photos / "0.png", size=(32, 24))])[1] == [(1, 0), (0, 1)]
    with torch.no_grad():
        next(family.pipe.vae.encoder.parameters()).add_(1e-3)
    assert make(pictures)[1] == [(2, 0), (0, 3)]
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"\.safetensors is damaged .*delete it"):
        make(pictures)


@pytest.mark.parametrize(
    "change", [{"gradient_accumulation_steps": 2, "train_batch_size": 1}, {"gradient_checkpointing": True}]
)
def test_accumulation_and_checkpointing_change_only_rounding(change, options, tmp_path):
    plain = {"max_train_steps": 4, "train_batch_size": 2}
    whole = train(options(**plain))
    other = train(options(**plain | change | {"output_dir": str(tmp_path / "other")}))
    assert_same(adapter(whole), adapter(other), 2e-5)
    assert [e["loss"] for e in log(other)] == pytest.approx([e["loss"] for e in log(whole)], abs=2e-5)


# stopping and going on ---------------------------------------------------------------------------------------------------


@pytest.fixture
def restless(options, photos):
    """Options under which everything that can be random is."""
    write_picture(photos / "wide.png", 5, size=(60, 34))

    def make(**changes):
        every_kind = {
            "max_train_steps": 8,
            "random_flip": True,
            "dropout": 0.2,
            "gradient_accumulation_steps": 2,
            "lr_scheduler": "cosine",
            "learning_rate": 1e-2,
            "checkpointing_steps": 2,
        }
        return options(**every_kind | changes)

    return make


@pytest.fixture
def uninterrupted(restless, tmp_path):
    return train(restless(output_dir=str(tmp_path / "whole")))


def test_resuming_elsewhere_and_further(restless, uninterrupted, tmp_path):
    checkpoint = uninterrupted / "checkpoint-4"
    o = restless(output_dir=str(tmp_path / "elsewhere"), resume_from_checkpoint=str(checkpoint))
    train(o)
    assert_same(adapter(uninterrupted), adapter(o.output_dir))
    assert [entry["step"] for entry in log(o.output_dir)] == [5, 6, 7, 8]
    renamed = shutil.copytree(checkpoint, tmp_path / "best")
    train(restless(output_dir=str(tmp_path / "third"), resume_from_checkpoint=str(renamed)))
    assert_same(adapter(uninterrupted), adapter(tmp_path / "third"))
    # All steps are done: nothing is trained, and the adapter is the checkpoint's.
    before = adapter(o.output_dir)
    train(restless(output_dir=o.output_dir, resume_from_checkpoint="latest"))
    assert_same(before, adapter(o.output_dir))


def test_what_would_be_another_run_is_not_resumed(restless, uninterrupted, photos):
    same = {"output_dir": str(uninterrupted), "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="was trained with rank 2, not 4"):
        train(restless(rank=4, **same))
    with pytest.raises(UserError, match="was trained with method deft, not lora"):
        train(restless(method="lora", **same))
    with pytest.raises(UserError, match="(images_per_step|gradient_accumulation_steps) 2, not 1"):
        train(restless(gradient_accumulation_steps=1, **same))
    write_picture(photos / "1.png", 77)
    with pytest.raises(UserError, match="pictures"):
        train(restless(**same))
    assert adapter(uninterrupted)


def test_one_run_at_a_time_writes_to_a_folder(options, tmp_path):
    o = options(max_train_steps=1)
    with alone(tmp_path / "out"), pytest.raises(UserError, match="another run writes to .*out"):
        train(o)
    assert not list((tmp_path / "out").iterdir())
    train(o)


def test_only_the_newest_checkpoints_are_kept(options, tmp_path):
    o = options(max_train_steps=12, checkpointing_steps=1, checkpoints_total_limit=2)
    train(o)
    assert [p.name for p in find_checkpoints(o.output_dir)] == ["checkpoint-11", "checkpoint-12"]
    Path(o.output_dir, "checkpoint-12").rename(Path(o.output_dir, "checkpoint-99"))  # as if it had gone on for longer
    again = {"resume_from_checkpoint": f"{o.output_dir}/checkpoint-11", "max_train_steps": 13}
    train(dataclasses.replace(o, **again))
    assert [p.name for p in find_checkpoints(o.output_dir)] == ["checkpoint-12", "checkpoint-13", "checkpoint-99"]
    assert not list((tmp_path / "out").glob(".*"))


def test_divergence_stops_with_the_step_and_keeps_the_good_checkpoint(options, monkeypatch):
    o = options(max_train_steps=9, checkpointing_steps=2)
    step = module.Run._train_step

    def poison(run):
        if run.step == 4:
            with torch.no_grad():
                run.parameters[0].fill_(float("nan"))
        step(run)

    monkeypatch.setattr(module.Run, "_train_step", poison)
    with pytest.raises(UserError, match=r"not finite at step 5 of 9.*checkpoint-4"):
        train(o)
    assert not os.path.exists(f"{o.output_dir}/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in adapter(f"{o.output_dir}/checkpoint-4").values())
    assert len(log(o.output_dir)) == 4


def test_overwriting_removes_the_old_run_and_nothing_else(options, tmp_path):
    o = options(max_train_steps=2, checkpointing_steps=1)
    train(o)
    mine = tmp_path / "out" / "mine.txt"
    mine.write_text("keep")
    with pytest.raises(UserError, match="holds a run already"):
        train(o)
    train(options(max_train_steps=1, checkpointing_steps=9, overwrite_output_dir=True))
    assert mine.read_text() == "keep" and not find_checkpoints(tmp_path / "out") and len(log(tmp_path / "out")) == 1


# more ways ---------------------------------------------------------------------------------------------------------------


def test_validation_draws_without_disturbing_the_run(options, tmp_path):
    same = {"max_train_steps": 2, "dropout": 0.2}
    plain = adapter(train(options(**same)))
    draw = {"validation_prompt": "a cat", "validation_steps": 1, "num_validation_images": 2}
    assert_same(plain, adapter(train(options(output_dir=str(tmp_path / "drawn"), **same, **draw))))
    assert (tmp_path / "drawn" / "validation-1.png").stat().st_size > 1000
    assert "validation.png" in (tmp_path / "drawn" / "README.md").read_text()


def test_bf16_base_keeps_the_adapter_in_fp32(options):
    o = options(max_train_steps=2, mixed_precision="bf16")
    assert all(t.dtype == torch.float32 for t in adapter(train(o)).values())
    assert json.loads(Path(o.output_dir, "training_args.json").read_text())["mixed_precision"] == "bf16"


# what else a run can be asked for ----------------------------------------------------------------------------------------


def test_prior_preservation(options, tiny, tmp_path, capsys):
    """The base model draws what is missing of the class, once; its loss is added at its weight."""
    classes = tmp_path / "classes"
    prior = {"class_prompt": "a dog", "class_data_dir": str(classes), "num_class_images": 3, "prior_loss_weight": 0.5}
    o = options(**prior, learning_rate=0.0)
    classes.mkdir()
    write_picture(classes / "0001.png", 9)
    own = (classes / "0001.png").read_bytes()
    folder = train(o)
    assert sorted(p.name for p in classes.iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert (classes / "0001.png").read_bytes() == own
    stamps = [p.stat().st_mtime_ns for p in sorted(classes.iterdir())]
    again = train(options(**vars(o) | {"output_dir": str(tmp_path / "again")}))
    assert [p.stat().st_mtime_ns for p in sorted(classes.iterdir())] == stamps and log(again) == log(folder)
    alone = {}
    for name, source, text in (("subject", o.instance_data_dir, "a cat"), ("class", str(classes), "a dog")):
        family = load_family(str(tiny), torch.float32)
        pictures = [picture(p, text) for p in data.find_pictures(source)]
        samples = Samples(pictures, family, seed_of(o.seed, name == "class"), False, False)
        with torch.no_grad():
            alone[name] = [family.loss(family.model, *samples.batch([n], torch.device("cpu"))).item() for n in range(3)]
    expected = [a + 0.5 * b for a, b in zip(alone["subject"], alone["class"])]
    assert [entry["loss"] for entry in log(folder)] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="--class_data_dir needs a --class_prompt"):
        train(options(class_data_dir=str(classes), overwrite_output_dir=True))


def test_pictures_of_the_class_are_of_this_run(options, tmp_path, monkeypatch):
    """Those of a run that is overwritten go, those of this one stay, a gap is filled, and others are another run's."""
    monkeypatch.setattr(module, "VALIDATION", {"num_inference_steps": 1})
    prior = {"class_prompt": "a dog", "num_class_images": 2, "checkpointing_steps": 1, "max_train_steps": 2}
    classes = train(options(**prior)) / "class_images"
    first = {p.name: p.read_bytes() for p in classes.iterdir()}
    (classes / "0000.png").unlink()
    again = options(**prior, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    train(again)
    assert {p.name: p.read_bytes() for p in classes.iterdir()} == first
    write_picture(classes / "0000.png", 77)
    with pytest.raises(UserError, match="was trained with class_pictures"):
        train(again)
    train(options(**prior | {"class_prompt": "a bird"}, overwrite_output_dir=True))
    assert {p.name for p in classes.iterdir()} == first.keys() and (classes / "0001.png").read_bytes() != first["0001.png"]
    train(options(max_train_steps=1, overwrite_output_dir=True))
    assert not classes.exists()


def test_moving_average(options, tmp_path):
    """The files hold the average; a resumed run goes on from the parameters and the average alike."""
    last = adapter(train(options(max_train_steps=6, learning_rate=1e-2, output_dir=str(tmp_path / "last"))))
    o = options(max_train_steps=6, learning_rate=1e-2, use_ema=True, ema_decay=0.5, checkpointing_steps=3)
    whole = adapter(train(dataclasses.replace(o, output_dir=str(tmp_path / "whole"))))
    assert any(not torch.equal(last[k], whole[k]) for k in last)
    train(dataclasses.replace(o, max_train_steps=3))
    assert_same(adapter(train(dataclasses.replace(o, resume_from_checkpoint="latest"))), whole)
    still = options(max_train_steps=4, learning_rate=0.0, use_ema=True, output_dir=str(tmp_path / "still"))
    start = options(max_train_steps=1, learning_rate=0.0, output_dir=str(tmp_path / "start"))
    assert_same(adapter(train(still)), adapter(train(start)), 1e-7)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "prodigy"])
def test_other_optimizers_resume_too(optimizer, options, tmp_path):
    o = options(max_train_steps=4, optimizer=optimizer, checkpointing_steps=2)
    whole = train(dataclasses.replace(o, output_dir=str(tmp_path / "whole")))
    train(dataclasses.replace(o, max_train_steps=2))
    parts = train(dataclasses.replace(o, resume_from_checkpoint="latest"))
    assert_same(adapter(parts), adapter(whole))
    assert log(parts) == log(whole)
    rate = json.loads((whole / "training_args.json").read_text())["learning_rate"]
    assert rate == {"adamw8bit": 1e-3, "prodigy": 1.0}[optimizer]


def test_an_optimizer_that_is_not_installed(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match="--optimizer prodigy needs prodigyopt: pip install prodigyopt"):
        train(options(optimizer="prodigy"))
    with pytest.raises(UserError, match="--learning_rate_P does not apply"):
        train(options(optimizer="prodigy", learning_rate_P=0.1))


def test_compiled_training_is_the_same_training(options, tmp_path, monkeypatch):
    # without inductor, whose gradients of this UNet are wrong with no adapter on it too (torch 2.13.0, CPU)
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="aot_eager"))
    plain = train(options(max_train_steps=2, output_dir=str(tmp_path / "plain"), target_modules="to_q"))
    torch._dynamo.reset()
    compiled = train(options(max_train_steps=2, output_dir=str(tmp_path / "compiled"), target_modules="to_q", compile=True))
    for ours, theirs in zip(log(compiled), log(plain), strict=True):  # (AdamW's first steps hang on gradients' signs)
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_curves_and_pictures_in_tensorboard(options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(options(max_train_steps=4, report_to="tensorboard", validation_prompt="a cat", validation_steps=2))
    events = EventAccumulator(str(folder / "logs"), {"images": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([e["loss"] for e in log(folder)])
    assert [e.step for e in events.Images("validation")] == [2, 4]


def test_curves_of_a_killed_run_go_on_without_a_step_twice(options, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real = module.Run._train_step
    o = options(max_train_steps=5, checkpointing_steps=2, report_to="tensorboard")

    def die(run):
        if run.step == 3:
            raise RuntimeError("killed")
        real(run)

    monkeypatch.setattr(module.Run, "_train_step", die)
    with pytest.raises(RuntimeError, match="killed"):
        train(o)
    monkeypatch.setattr(module.Run, "_train_step", real)
    AcceleratorState._reset_state(reset_partial_state=True)
    events = EventAccumulator(str(train(dataclasses.replace(o, resume_from_checkpoint="latest")) / "logs"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_not_installed(options):
    with pytest.raises(UserError, match="--report_to wandb: pip install wandb"):
        train(options(report_to="wandb"))
