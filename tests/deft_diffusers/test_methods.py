"""Every method through `deft train`: what is said of it, its files, a stopped run that goes on. (That each learns, and
nothing else moves, on every family: test_family_training.py.)"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from deft_diffusers import UserError
from deft_diffusers.convert import convert
from deft_diffusers.demo import fingerprints
from deft_diffusers.families import load_family
from deft_diffusers.methods import METHODS, Spectral, TextualInversion, method_of
from deft_diffusers.options import METHODS as NAMES
from deft_diffusers.options import ConvertOptions, TrainOptions
from deft_diffusers.sample import generate, load_adapters
from deft_diffusers.samples import Samples
from deft_diffusers.train import Objective, complete, find_checkpoints, make_optimizer, train
from safetensors.torch import load_file, save_file
from tiny_pipeline import picture
from torch import nn

import deft_kernels as dk
from deft_kernels.adapters.inject import adapted_layers

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "deft": {"method": "deft", "rank": 4, "learning_rate": 1e-2},
    "para": {"method": "para", "rank": 4, "learning_rate": 1e-2},
    "lora": {"method": "lora", "rank": 4, "learning_rate": 1e-2},
    "deft-text": {"method": "deft", "rank": 4, "learning_rate": 1e-2, "train_text_encoder": True, "gate": True,
                  "text_encoder_lr": 2e-3, "dropout": 0.1},
    "para-text": {"method": "para", "rank": 4, "learning_rate": 1e-2, "train_text_encoder": True},
    "lora-text": {"method": "lora", "rank": 4, "learning_rate": 1e-2, "train_text_encoder": True},
    "svdiff": {"method": "svdiff", "learning_rate": 3e-2},
    "dreambooth": {"method": "dreambooth", "learning_rate": 1e-3},
    "dreambooth-text": {"method": "dreambooth", "learning_rate": 1e-3, "train_text_encoder": True, "text_encoder_lr": 1e-4},
    "inversion": {"method": "textual_inversion", "learning_rate": 0.1, "instance_prompt": "a <sks>"},
    "inversion-3": {"method": "textual_inversion", "learning_rate": 0.1, "instance_prompt": "a <sks>", "num_vectors": 3,
                    "initializer_token": "t"},
}  # fmt: skip
# The groups of what trains, and their learning rates.
RATES = {
    "deft": {"P": 1e-3, "R": 1e-2},
    "para": {"P": 1e-2},
    "lora": {"P": 1e-2, "R": 1e-2},
    "deft-text": {"P": 1e-3, "R": 1e-2, "gate": 1e-2, "text_P": 2e-4, "text_R": 2e-3, "text_gate": 2e-3},
    "para-text": {"P": 1e-2, "text_P": 1e-2},
    "lora-text": {"P": 1e-2, "R": 1e-2, "text_P": 1e-2, "text_R": 1e-2},
    "svdiff": {"delta": 3e-2, "delta_1d": 3e-5},
    "dreambooth": {"unet": 1e-3},
    "dreambooth-text": {"unet": 1e-3, "text_encoder": 1e-4},
    "inversion": {"words": 0.1},
    "inversion-3": {"words": 0.1},
}
ADAPTERS = [case for case in CASES if CASES[case]["method"] in ("deft", "para", "lora")]


@pytest.fixture
def options(tiny, photos, tmp_path):
    def make(case, **changes):
        defaults = {
            "pretrained_model_name_or_path": str(tiny), "instance_data_dir": str(photos), "instance_prompt": "a cat",
            "output_dir": str(tmp_path / "out"), "max_train_steps": 3, "train_batch_size": 2, "checkpointing_steps": 100,
            "report_to": "none",
        }  # fmt: skip
        return TrainOptions(**defaults | CASES[case] | changes)

    return make


def weights(family):
    parts = ("unet", "vae", "text_encoder")
    return {f"{part}.{name}": p for part in parts for name, p in getattr(family.pipe, part).named_parameters()}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]


def prediction(family, prompt):
    """What the denoiser says of fixed noise with a prompt."""
    family.model.eval(), family.pipe.text_encoder.eval()
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return family.model(noisy, torch.tensor([10, 700]), **family.encode_prompts([prompt] * 2), return_dict=False)[0]


def test_every_method_has_a_name():
    assert tuple(METHODS) == NAMES


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_a_run(case, options, capsys):
    """As many parameters as its files hold, each group at its rate; a folder that tells its method."""
    o = options(case, max_train_steps=1)
    folder = train(o)
    trained = sum(t.numel() for file in folder.rglob("*.safetensors") for t in load_file(file).values())
    said = capsys.readouterr().out
    assert f"training {trained:,} parameters ({o.method}" in said
    if case in ADAPTERS:  # sixteen of the UNet's, and four of the text encoder's layer
        assert f"rank 4, {36 if o.train_text_encoder else 32} layers" in said
    (entry,) = map(json.loads, (folder / "loss.jsonl").read_text().splitlines())
    assert {name[3:]: rate for name, rate in entry.items() if name[:3] == "lr_"} == pytest.approx(RATES[case])
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    assert method_of(folder, family) is METHODS[o.method]


def test_other_words_mean_what_they_meant(options):
    o = options("inversion-3", max_train_steps=4)
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    plain, start = prediction(family, "a cat"), family.pipe.text_encoder.get_input_embeddings().weight[ids_of(family, "t")]
    folder = train(o, family)
    rows = load_file(folder / "learned_embeds.safetensors")["<sks>"]
    assert rows.shape == (3, 16) and (rows - start).abs().min(1).values.max() > 0 and (rows - start).abs().max() < 0.5
    for trained in (family, load_family(o.pretrained_model_name_or_path, torch.float32)):
        if trained is not family:
            load_adapters(trained, [folder])
        torch.testing.assert_close(prediction(trained, "a cat"), plain, rtol=0, atol=1e-6)
        assert (prediction(trained, "a <sks>") - prediction(trained, "a t")).abs().max() > 1e-3


def ids_of(family, word):
    return family.pipe.tokenizer.encode(word, add_special_tokens=False)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("deft", "para", "lora")])  # those in test_train.py
def test_resumed_to_the_bit(case, options, tmp_path):
    whole = train(options(case, max_train_steps=4, output_dir=str(tmp_path / "whole"), noise_offset=0.1))
    parts = options(case, max_train_steps=4, output_dir=str(tmp_path / "parts"), noise_offset=0.1, checkpointing_steps=2)
    train(dataclasses.replace(parts, max_train_steps=2))
    folder = train(dataclasses.replace(parts, resume_from_checkpoint="latest"))
    assert [c.name for c in find_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    files = [p.relative_to(whole) for p in whole.rglob("*.safetensors")]
    assert files and losses(whole) == losses(folder)
    for file in files:
        ours, theirs = load_file(whole / file), load_file(folder / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), file


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_another_method_or_base_is_not_resumed(case, options, tiny, tmp_path):
    folder = train(options(case, max_train_steps=1, checkpointing_steps=1))
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    other = next(
        name for name in [*CASES, *CASES][list(CASES).index(case) + 1 :] if CASES[name]["method"] != CASES[case]["method"]
    )
    methods = f"was trained with method {CASES[case]['method']}, not {CASES[other]['method']}"
    with pytest.raises(UserError, match=methods):
        train(options(other, resume_from_checkpoint="latest"))
    if case in ADAPTERS:
        text = not CASES[case].get("train_text_encoder", False)
        with pytest.raises(UserError, match=f"was trained with train_text_encoder {not text}, not {text}"):
            train(options(case, resume_from_checkpoint="latest", train_text_encoder=text, text_encoder_lr=None))
    pipe = load_family(str(tiny), torch.float32).pipe
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(1.01)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was trained on another base model, .*tiny.* as it then was"):
        train(options(case, resume_from_checkpoint="latest", pretrained_model_name_or_path=str(tmp_path / "other")))
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))} == before


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_text_encoders_adapters_leave_by_deft_convert(format, options, tmp_path):
    """What has been learned for the pipeline, merged and as a LoRA, says the same of a prompt."""
    o = options("deft-text", max_train_steps=6)
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    plain = prediction(family, "a cat")
    folder = train(o, family)
    trained = prediction(family, "a cat")
    assert [p.name for p in folder.glob("*.safetensors")] == ["pytorch_deft_weights.safetensors"]
    keys = load_file(folder / "pytorch_deft_weights.safetensors").keys()
    assert {key.partition(".")[0] for key in keys} == {"unet", "text_encoder"}
    converted = ConvertOptions(
        source=str(folder), output_dir=str(tmp_path / "lora"), format=format,
        pretrained_model_name_or_path=o.pretrained_model_name_or_path,
    )  # fmt: skip
    assert sum(name.startswith("text_encoder.") for name in convert(converted)) == 4
    for source in (folder, tmp_path / "lora"):
        fresh = load_family(o.pretrained_model_name_or_path, torch.float32)
        load_adapters(fresh, [source])
        torch.testing.assert_close(prediction(fresh, "a cat"), trained, rtol=1e-3, atol=1e-4)
    dk.eject(fresh.pipe)
    assert torch.equal(prediction(fresh, "a cat"), plain)
    if format == "diffusers":
        other = load_family(o.pretrained_model_name_or_path, torch.float32)
        other.pipe.load_lora_weights(tmp_path / "lora")  # diffusers' own
        torch.testing.assert_close(prediction(other, "a cat"), trained, rtol=1e-3, atol=1e-4)
    assert (trained - plain).abs().max() > 1e-2


def test_dropout_of_text_encoders_is_the_adapters_alone(options):
    family = load_family(options("deft-text").pretrained_model_name_or_path, torch.float32)
    METHODS["deft"](family, complete(options("deft-text", dropout=0.5))).start()
    objective = Objective(family, True).train()
    training = {name for name, m in objective.text_encoders.named_modules() if m.training}
    adapted = tuple(adapted_layers(objective.text_encoders))
    assert len(adapted) == 4 and all(name.startswith(adapted) for name in training) and set(adapted) <= training
    list(generate(family, [("a cat", 0)], progress=False, num_inference_steps=1))
    assert not any(m.training for m in (*objective.model.modules(), *objective.text_encoders.modules()))


def test_a_cold_start_of_para_learns_with_the_defaults(options):
    """P starts as DEFT's does, N(0, 0.02^2), of which the basis has the direction alone; zero, the paper's start, has none.
    What is removed at random hurts at first."""
    o = complete(options("para", rank=8, learning_rate=None, max_train_steps=None))
    assert (o.learning_rate, o.max_train_steps) == (5e-4, 1000)
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    pictures = [picture(path) for path in sorted(Path(o.instance_data_dir).iterdir())]
    batch = Samples(pictures, family, 77, False, False).batch(range(4), torch.device("cpu"))
    method = METHODS["para"](family, o)
    with torch.no_grad():
        plain = family.loss(family.model, *batch).item()
    method.start()
    groups, rates = method.groups()
    values = torch.cat([p.flatten() for p in groups["P"]])
    assert values.std().item() == pytest.approx(0.02, rel=0.05) and abs(values.mean().item()) < 1e-3
    optimizer = make_optimizer(o, [{"params": groups["P"], "lr": rates["P"]}])
    losses = []
    for _ in range(40):
        loss = family.loss(family.model, *batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.97 * losses[0] and losses[-1] < plain, (plain, losses[0], losses[-1])


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 3, 2), (7,)])
def test_spectral_shifts_are_the_papers_equation(shape):
    weight = torch.randn(shape)
    spectral = Spectral(weight)
    assert torch.equal(spectral(weight), weight)
    with torch.no_grad():
        spectral.delta.copy_(torch.randn_like(spectral.delta) * 3)  # some singular values are cut off at zero
    U, S, Vh = torch.linalg.svd(weight.reshape(shape[0], -1), full_matrices=False)
    expected = (U * torch.relu(S + spectral.delta)) @ Vh
    torch.testing.assert_close(spectral(weight), expected.reshape(shape), rtol=1e-5, atol=1e-5)


def test_strengths_and_sums_of_spectral_shifts(options, tmp_path):
    o = options("svdiff", max_train_steps=6)
    folder = train(o)
    shifts = load_file(folder / "spectral_shifts.safetensors")
    assert set(shifts) > {"conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"}
    plain = load_family(o.pretrained_model_name_or_path, torch.float32)
    norms = [k for k, m in plain.model.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    assert norms and all(shifts[k].shape == (1,) for k in norms)
    assert 0 < max(shifts[k].abs().max() for k in norms) < 1e-2 * shifts["conv_in"].abs().max()  # their own learning rate
    outputs = {}
    for strengths in ((1.0,), (0.25, 0.75), (1.0, -1.0)):
        family = load_family(o.pretrained_model_name_or_path, torch.float32)
        load_adapters(family, [folder] * len(strengths), strengths)
        outputs[strengths] = prediction(family, "a cat")
    torch.testing.assert_close(outputs[0.25, 0.75], outputs[1.0,], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs[1.0, -1.0], prediction(plain, "a cat"), rtol=1e-3, atol=1e-4)


def test_strength_of_a_whole_model(options):
    o = options("dreambooth")
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    name, before = next((n, p.detach().clone()) for n, p in family.model.named_parameters() if p.dim() > 1)
    folder = train(o, family)
    after = family.model.get_parameter(name).detach().clone()
    half = load_family(o.pretrained_model_name_or_path, torch.float32)
    load_adapters(half, [folder], [0.5])
    torch.testing.assert_close(half.model.get_parameter(name).detach(), (before + after) / 2)


def test_a_new_word_is_diffusers_own_kind_of_file(options):
    o = options("inversion-3")
    folder = train(o)
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    family.pipe.load_textual_inversion(str(folder))
    assert {"<sks>", "<sks>_1", "<sks>_2"} <= set(family.pipe.tokenizer.get_vocab())
    fresh = load_family(o.pretrained_model_name_or_path, torch.float32)
    load_adapters(fresh, [folder])
    torch.testing.assert_close(prediction(fresh, "a <sks>"), prediction(family, "a <sks>"))


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("svdiff", {"rank": 3}, "--rank does not apply to --method svdiff"),
        ("dreambooth", {"gate": True}, "--gate does not apply to --method dreambooth"),
        ("svdiff", {"train_text_encoder": True}, "--train_text_encoder does not apply to --method svdiff"),
        ("inversion", {"text_encoder_lr": 1e-4}, "--text_encoder_lr does not apply to --method textual_inversion"),
        ("deft", {"text_encoder_lr": 1e-4}, "--text_encoder_lr needs --train_text_encoder"),
        ("lora-text", {"text_encoder_lr": -1.0}, "--text_encoder_lr must be a number from 0 up"),
        ("deft-text", {"optimizer": "prodigy"}, "prodigy finds one rate for all: --text_encoder_lr does not apply"),
        ("lora", {"placeholder_token": "x"}, "--placeholder_token does not apply to --method lora"),
        ("inversion", {"instance_prompt": "a cat"}, "no text has the placeholder <sks>"),
        ("inversion", {"placeholder_token": "t", "instance_prompt": "a t"}, "t is a word of the model already"),
        ("inversion", {"initializer_token": " "}, "is no word to this model"),
        ("inversion", {"num_vectors": 0}, "--num_vectors must be at least 1"),
        ("deft", {"caption_dropout": 1.1}, "--caption_dropout must be from 0 to 1"),
        ("inversion", {"caption_dropout": 1.0}, "leaves textual_inversion no text"),
        ("deft", {"snr_gamma": 0.0}, "--snr_gamma must be a positive number"),
    ],
)
def test_what_cannot_be_trained(case, changes, message, options, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        train(options(case, **changes))
    assert not (tmp_path / "out").exists()


def test_results_that_do_not_fit(options, tmp_path):
    o = options("svdiff")
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    before = fingerprints(weights(family))
    with pytest.raises(UserError, match="holds nothing that `deft train` writes"):
        load_adapters(family, [tmp_path])
    for name, content, message in (
        ("spectral_shifts", {"conv_in": torch.zeros(3)}, "does not fit"),
        ("spectral_shifts", {"conv_in": torch.tensor([float("nan")])}, "not finite"),
        ("learned_embeds", {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, "holds a, b; StableDiffusionPipeline takes"),
    ):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_file(content, folder / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            load_adapters(family, [folder])
    with pytest.raises(UserError, match="has no strength"):
        load_adapters(family, [folder], [0.5])
    (tmp_path / "whole" / "unet").mkdir(parents=True)
    with pytest.raises(UserError, match="is no UNet2DConditionModel"):
        load_adapters(family, [tmp_path / "whole"])
    assert fingerprints(weights(family)) == before


def test_dropped_captions_offsets_and_min_snr(tiny, options):
    """A share of empty texts, noise with a mean of its own, and steps weighted by min(snr, gamma) / snr."""
    o = options("deft")
    family = load_family(str(tiny), torch.float32)
    pictures = [picture(path, "a cat") for path in sorted(Path(o.instance_data_dir).iterdir())]
    cpu = torch.device("cpu")
    plain = Samples(pictures, family, 0, False, False)
    changed = Samples(pictures, family, 0, False, False, caption_dropout=0.3, noise_offset=0.5)
    empty = family.encode_prompts([""])["encoder_hidden_states"]
    (_, noise, times, _), (_, shifted, same, conditions) = plain.batch(range(400), cpu), changed.batch(range(400), cpu)
    share = (conditions["encoder_hidden_states"] == empty).flatten(1).all(1).float().mean()
    assert 0.2 < share < 0.4 and torch.equal(times, same)
    without = Samples(pictures, family, 0, False, False, caption_dropout=1.0).batch(range(50), cpu)[3]
    assert torch.equal(without["encoder_hidden_states"], empty.expand(50, -1, -1))
    offset = shifted - noise
    torch.testing.assert_close(offset.std((2, 3)), torch.zeros(400, 4), atol=1e-5, rtol=0)
    assert 0.4 < offset.mean((2, 3)).std() < 0.6

    latents, noise, times, conditions = plain.batch(range(2), cpu)
    each = [family.loss(family.model, latents[k : k + 1], noise[k : k + 1], times[k : k + 1],
                        {n: v[k : k + 1] for n, v in conditions.items()}) for k in range(2)]  # fmt: skip
    family.snr_gamma = 0.5
    kept = family.noise_scheduler.alphas_cumprod[times]
    weights = (kept / (1 - kept)).clamp(max=0.5) / (kept / (1 - kept))
    weighted = family.loss(family.model, latents, noise, times, conditions)
    torch.testing.assert_close(weighted, (torch.stack(each) * weights).mean())


@pytest.mark.parametrize("words", [None, "t", "t b c"], ids=["all", "one", "several"])
def test_a_new_word_starts_as_the_mean_of_the_words_given(words, tiny, options):
    family = load_family(str(tiny), torch.float32)
    table = family.pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    ids = slice(None) if words is None else family.pipe.tokenizer(words).input_ids[1:-1]
    assert words is None or len(ids) == len(words.split())
    method = TextualInversion(family, options("inversion", initializer_token=words, num_vectors=2))
    method.start()
    (rows,) = method.groups()[0]["words"]
    assert torch.equal(rows.detach(), table[ids].mean(0, keepdim=True).repeat(2, 1))
