"""An entry is found again where all that it was made from is the same, and only there."""

import errno

import pytest
import torch
from deft_diffusers import UserError, cache
from deft_diffusers.families import load_family
from deft_diffusers.samples import Samples
from test_family_training import build
from tiny_pipeline import picture
from torchao.quantization import Int8WeightOnlyConfig, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("a cat", "a dog", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of a family with three text encoders and their tokenizers."""
    folder = tmp_path_factory.mktemp("model")
    build("sd3").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def found(model, photos, tmp_path):
    """Fills a cache and says how many (texts, latents) of it are found again after `change(family)`."""

    def run(change=lambda family: None, **options):
        for alter in (lambda family: None, change):
            family = load_family(model, torch.float32)
            alter(family)
            pictures = [picture(photos / f"{k}.png", text) for k, text in enumerate(TEXTS[:2])]
            samples = Samples(pictures, family, 0, False, False, cache_dir=tmp_path / "cache", **options)
        return tuple(c.found for c in samples.caches)

    return run


def test_what_is_the_same_is_found(found):
    assert found() == (2, 2)
    assert found(caption_dropout=0.5) == (3, 2)


def change_a_weight(part):
    """One weight of the largest tensor, which a sample of them would hardly meet."""

    def change(family):
        with torch.no_grad():
            max(getattr(family.pipe, part).parameters(), key=torch.numel).view(-1)[77] += 1e-4

    return change


def swap_words(family):
    words = family.pipe.text_encoder_3.get_input_embeddings().weight
    with torch.no_grad():
        words[[5, 6]] = words[[6, 5]]


def draw(family):
    """By which the tokenizers keep how long its text was."""
    family.generate(["a cat"], [0], num_inference_steps=1, height=32, width=32)


def add_a_word(family):
    family.pipe.tokenizer_2.add_tokens(["zebra"])


CHANGES = {
    "nothing-but-a-picture-drawn": (draw, (2, 2)),
    "text-encoder": (change_a_weight("text_encoder"), (0, 2)),
    "last-text-encoder": (change_a_weight("text_encoder_3"), (0, 2)),
    "two-words-that-change-places": (swap_words, (0, 2)),
    "vae": (change_a_weight("vae"), (2, 0)),
    "denoiser": (change_a_weight("transformer"), (2, 2)),
    "no-t5": (lambda family: family.pipe.register_modules(text_encoder_3=None, tokenizer_3=None), (0, 2)),
    "half-precision": (lambda family: family.pipe.text_encoder_3.bfloat16(), (0, 2)),
    "a-new-word": (add_a_word, (0, 2)),
    "a-longer-prompt": (lambda family: setattr(family.pipe.tokenizer, "model_max_length", 20), (0, 2)),
    "nf4": (lambda family: family.quantise("nf4", True) or family.to("cpu"), (0, 2)),
    "int8": (lambda family: family.quantise("int8", True), (0, 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_made_anew(name, found):
    change, expected = CHANGES[name]
    assert found(change) == expected


@pytest.mark.parametrize("what", ["diffusers", "deft_diffusers", "kind"])
def test_another_version_or_kind_of_pipeline(what, found, monkeypatch):
    def change(family):
        if what == "kind":
            monkeypatch.setattr(type(family), "kind", "AnotherPipeline")
        elif what == "diffusers":
            monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "99")
        else:
            monkeypatch.setattr(cache, "__version__", "99")

    assert found(change) == (0, 0)


def test_int8_weights_count(model):
    digests = set()
    for k in range(3):
        part = load_family(model, torch.float32).pipe.text_encoder_3
        quantize_(part.encoder, Int8WeightOnlyConfig())
        if k == 2:
            part.encoder.block[0].layer[0].SelfAttention.q.weight.qdata[3, 5] += 1
        digests.add(cache.digest_of(part))
    assert len(digests) == 2


@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_a_full_disk(where, found, tmp_path, monkeypatch):
    """It is said, what is there stays whole, and nothing half is left."""
    found()
    before = sorted((tmp_path / "cache").iterdir())
    assert len(before) == 4

    def full(entry, path, *more):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "save_file":
        monkeypatch.setattr(cache, "save_file", full)
    else:
        monkeypatch.setattr(cache.os, "replace", lambda part, file: full(None, part))
    with pytest.raises(UserError, match=r"cannot write to --cache_dir .*No space left on device; what it holds is whole"):
        found(change_a_weight("vae"))
    assert sorted((tmp_path / "cache").iterdir()) == before
