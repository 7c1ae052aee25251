"""Every method: only what it says trains, the loss falls, what is saved gives the same pictures, a stopped run goes on."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from deft_diffusers import UserError
from deft_diffusers.demo import fingerprints
from deft_diffusers.families import load_family
from deft_diffusers.methods import METHODS, Spectral, TextualInversion, method_of
from deft_diffusers.options import METHODS as NAMES
from deft_diffusers.options import TrainOptions
from deft_diffusers.sample import load_adapters
from deft_diffusers.train import Samples, complete, find_checkpoints, train
from safetensors.torch import load_file, save_file
from tiny_pipeline import picture
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "deft": {"method": "deft", "rank": 4, "learning_rate": 1e-2},
    "para": {"method": "para", "rank": 4, "learning_rate": 1e-2},
    "lora": {"method": "lora", "rank": 4, "learning_rate": 1e-2},
    "svdiff": {"method": "svdiff", "learning_rate": 3e-2},
    "dreambooth": {"method": "dreambooth", "learning_rate": 1e-3},
    "dreambooth-text": {"method": "dreambooth", "learning_rate": 1e-3, "train_text_encoder": True},
    "inversion": {"method": "textual_inversion", "learning_rate": 0.1, "instance_prompt": "a <sks>"},
    "inversion-3": {"method": "textual_inversion", "learning_rate": 0.1, "instance_prompt": "a <sks>", "num_vectors": 3,
                    "initializer_token": "t"},
}  # fmt: skip
# What moves in place; all else that changes is what the method has added.
MOVES = {"dreambooth": ("unet.",), "dreambooth-text": ("unet.", "text_encoder.")}


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
    family.model.eval()
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return family.model(noisy, torch.tensor([10, 700]), **family.encode_prompts([prompt] * 2), return_dict=False)[0]


def test_every_method_has_a_name():
    assert tuple(METHODS) == NAMES


@pytest.mark.parametrize("case", CASES)
def test_trains_saves_and_loads(case, options, tmp_path):
    o = options(case, max_train_steps=25, aspect_ratio_buckets=False)
    family = load_family(o.pretrained_model_name_or_path, torch.float32)
    base = weights(family)
    before, plain = fingerprints(base), prediction(family, "a cat")
    pictures = [picture(path) for path in sorted(Path(o.instance_data_dir).iterdir())]
    latents, noise, times, _ = Samples(pictures, family, 77, False, False).batch(range(24), torch.device("cpu"))

    def loss(family):
        family.model.eval()
        with torch.no_grad():
            conditions = family.encode_prompts([complete(o).instance_prompt] * 24)
            return family.loss(family.model, latents, noise, times, conditions).item()

    first = loss(family)
    folder = train(o, family)
    moved = {name for name, digest in fingerprints(base).items() if digest != before[name]}
    assert all(name.startswith(MOVES.get(case, ())) for name in moved)
    for part in MOVES.get(case, ()):
        assert sum(name.startswith(part) for name in moved) > 0.9 * sum(name.startswith(part) for name in base)
    # a word moves little in a model this small and untrained
    assert loss(family) < (1 if "inversion" in case else 0.98) * first, (first, loss(family))

    prompt = complete(o).instance_prompt
    trained = prediction(family, prompt)
    fresh = load_family(o.pretrained_model_name_or_path, torch.float32)
    assert method_of(folder, fresh) is METHODS[o.method]
    load_adapters(fresh, [folder])
    torch.testing.assert_close(prediction(fresh, prompt), trained, rtol=1e-3, atol=1e-4)
    untouched = "a dog" if "inversion" in case else None
    if untouched:  # other words mean what they meant
        torch.testing.assert_close(prediction(fresh, "a cat"), plain)
    else:
        assert (trained - plain).abs().max() > 1e-2


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
        ("deft", {"train_text_encoder": True}, "--train_text_encoder does not apply to --method deft"),
        ("lora", {"placeholder_token": "x"}, "--placeholder_token does not apply to --method lora"),
        ("inversion", {"instance_prompt": "a cat"}, "no text has the placeholder <sks>"),
        ("inversion", {"placeholder_token": "t", "instance_prompt": "a t"}, "t is a word of the model already"),
        ("inversion", {"initializer_token": " "}, "is no word to this model"),
        ("inversion", {"num_vectors": 0}, "--num_vectors must be at least 1"),
        ("deft", {"caption_dropout": 1.0}, "--caption_dropout must be at least 0 and below 1"),
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
