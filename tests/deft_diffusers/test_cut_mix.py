"""Cut-Mix-Unmix: what is shown and said of two subjects, the same when asked again, and the unmix loss by hand."""

import collections
import json

import numpy as np
import pytest
import tiny_pipelines
import torch
from deft_diffusers import UserError, cut_mix, data
from deft_diffusers.families import load_family
from deft_diffusers.options import TrainOptions
from deft_diffusers.samples import Samples
from deft_diffusers.train import Objective, find_checkpoints, train
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image
from safetensors.torch import load_file
from tiny_pipeline import picture, write_picture

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SUBJECTS = ("u dog", "v cat", "w dog")


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of each subject, one of them wide, and one of nobody."""
    made = []
    for k, subject in enumerate((*SUBJECTS, *SUBJECTS, "")):
        size = (32, 32) if k < len(SUBJECTS) else (48, 24)
        made.append(picture(write_picture(tmp_path / f"{k}.png", k, (64, 64)), f"a {subject}".strip(), size))
        made[-1].subject = subject
    return made


def make(pictures, family, probability, **more):
    return Samples(pictures, family, 3, False, True, 2, cut_mix_prob=probability, **more)


def test_two_pictures_side_by_side():
    left, right = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))
    left.paste("white", (0, 0, 12, 40))  # its left end, which the half does not show
    left.paste("green", (20, 0, 30, 40))  # left of its middle
    mixed = np.asarray(cut_mix.picture(left, right, (32, 32)))
    assert mixed.shape == (32, 32, 3)
    assert (mixed[:, 16:] == (0, 0, 255)).all() and not (mixed[:, :16] == 255).all(-1).any()
    assert (mixed[:, 10:15] == (255, 0, 0)).all()  # what was right of the middle of the left picture
    mirrored = np.asarray(cut_mix.picture(left, right, (32, 32), mirror=True))
    assert (mirrored[:, 1:6] == (255, 0, 0)).all() and (mirrored[:, 16:] == (0, 0, 255)).all()  # still to the right
    assert cut_mix.prompt("u dog", "v cat") == "photo of a u dog on the left and a v cat on the right"


def test_a_share_of_the_samples_is_of_two_subjects(pictures, tiny):
    family = load_family(str(tiny), torch.float32)
    for p in pictures:
        p.size = (32, 32)
    samples, plain = make(pictures, family, 0.6, caption_dropout=0.5), make(pictures, family, 0.0, caption_dropout=0.5)
    pairs = samples.pairs(range(1400))
    with_subject = sum(bool(pictures[samples._index(n)].subject) for n in range(1400))
    mixed = [pair for pair in pairs if pair]
    assert 0.55 < len(mixed) / with_subject < 0.65 and plain.pairs(range(99)) == [None] * 99
    counts = collections.Counter(mixed)
    assert len(counts) == 6 and all(0.7 < n / (len(mixed) / 6) < 1.3 for n in counts.values())  # either on either side

    numbers = range(24)
    (latents, *drawn, conditions), (before, *same, others) = samples.batch(numbers, CPU), plain.batch(numbers, CPU)
    assert all(map(torch.equal, drawn, same))  # noise and times are the samples' own
    assert {bool(pair) for pair in pairs[:24]} == {True, False}
    for n, pair in enumerate(pairs[:24]):
        alone = samples.batch([n], CPU)
        torch.testing.assert_close(alone[0][0], latents[n], rtol=0, atol=1e-5)  # the VAE's rounding varies with the batch
        key = "encoder_hidden_states"
        assert torch.equal(latents[n], before[n]) == torch.equal(conditions[key][n], others[key][n]) == (pair is None)
        if pair:  # it keeps its text
            said = family.encode_prompts([cut_mix.prompt(*pair)])[key][0]
            torch.testing.assert_close(conditions[key][n], said, rtol=0, atol=1e-5)


def test_what_is_shown_of_two(pictures, tiny):
    family = load_family(str(tiny), torch.float32)
    samples = make(pictures, family, 1.0)
    seen, lefts = {True: 0, False: 0}, 0
    for n in range(60):
        k, pair = samples._index(n), samples._pair(n)
        if not pair:
            assert not pictures[k].subject
            continue
        assert k in pair and pictures[pair[0]].subject != pictures[pair[1]].subject
        whole = samples._see(k, (0.5, 0.5, False), pair)
        assert whole.size == pictures[k].size  # that of the step, whatever the other's
        seen[pictures[k].size == (32, 32)] += 1
        lefts += pair[0] == k
        middle = whole.width // 2
        for other, box in zip(pair, ((0, 0, middle, whole.height), (middle, 0, whole.width, whole.height))):
            half = data.cover(pictures[other].image, (middle, whole.height))
            assert whole.crop(box).tobytes() == data.crop(half, (middle, whole.height)).tobytes()
    assert min(seen.values()) > 4 and 0.3 < lefts / sum(seen.values()) < 0.7


@pytest.fixture
def sdxl(tmp_path, monkeypatch):
    """SDXL, whose cross-attention is to two text encoders, for texts of 64 letters."""
    monkeypatch.setattr(tiny_pipelines, "LENGTH", 64)
    pipe = tiny_pipelines.build("sdxl")
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 64
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def said(family, texts, size):
    """Texts for latents of this size, as `Samples` hands them to a loss that encodes them."""
    whole = tuple(side * family.pipe.vae_scale_factor for side in reversed(size))
    return texts, [()] * len(texts), family.sizes([(whole, (0, 0), whole)] * len(texts))


def loaded(folder):
    family = load_family(str(folder), torch.float32)
    family.unmix_weight = 1.0
    return family


def test_the_tokens_of_a_subject(sdxl):
    family = loaded(sdxl)
    tokenizer = family.pipe.tokenizer
    unmix = cut_mix.Unmix(family)
    letters = tokenizer.convert_ids_to_tokens(tokenizer(cut_mix.prompt("u dog", "v cat")).input_ids)
    assert ["".join(letters[span]) for span in unmix.tokens("u dog", "v cat")] == [" u dog", " v cat"]  # spaces are tokens
    tokenizer.add_tokens(["<u>", "<u>_1"])  # a new word of two vectors
    left, right = unmix.tokens("<u> dog", "v")
    assert (left.stop - left.start, right.stop - right.start) == (
        2 + 2 + len(" dog"),
        len(" v"),
    )  # two words of a token, with a space each
    tokenizer.model_max_length = 24  # which the right one lies behind
    left, right = unmix.tokens("u dog", "v cat")
    assert left == slice(11, 17) and right.start == right.stop == 23


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_the_unmix_loss_by_hand(size, sdxl, monkeypatch):
    """Against the maps that attention itself makes, summed up pixel by pixel."""
    family = loaded(sdxl)
    pairs = [None, ("u dog", "v cat"), ("v", "u d")]
    maps, scores = [], Attention.get_attention_scores
    unmix = cut_mix.Unmix(family)
    unmix.remove()  # here it only tells the tokens
    family.model.set_attn_processor(AttnProcessor())

    def listen(attention, query, key, mask=None):
        probabilities = scores(attention, query, key, mask)
        if attention.is_cross_attention:
            maps.append(probabilities.detach().unflatten(0, (-1, attention.heads)))
        return probabilities

    latents, noise = torch.randn(2, 3, 4, *size, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([900, 500, 30])
    texts = said(family, [cut_mix.prompt(*pair) if pair else "a cat" for pair in pairs], size)
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(Attention, "get_attention_scores", listen)
        plain = family.loss(family.model, latents, noise, times, family.encode_prompts(texts[0]) | texts[2])
    expected = []
    for each in maps:  # all of half the size, whose middle column, where there is one, is of neither
        values = []
        for row, pair in enumerate(pairs):
            for k, span in enumerate(unmix.tokens(*pair) if pair else ()):
                for head in range(each.shape[1]):
                    grid = each[row, head].reshape(size[0] // 2, size[1] // 2, -1)
                    width = grid.shape[1]
                    columns = [c for c in range(width) if (c + 0.5 > width / 2 if k == 0 else c + 0.5 < width / 2)]
                    values += [grid[:, c, token] ** 2 for c in columns for token in range(span.start, span.stop)]
        expected.append(torch.cat(values).mean())
    objective = Objective(family, True).train()
    loss = objective([(latents, noise, times, texts)], (1.0,), [pairs])
    torch.testing.assert_close(loss - plain, torch.stack(expected).mean(), rtol=1e-3, atol=1e-6)
    assert loss - plain > 1e-5
    again = objective([(latents, noise, times, texts)], (0.5,), [[None] * 3])
    torch.testing.assert_close(again, 0.5 * plain)


def test_unmixing_is_learnt_and_checkpointing_changes_nothing(sdxl):
    gradients, strayed = [], []
    for checkpointing in (False, True):
        family = loaded(sdxl)
        if checkpointing:
            family.model.enable_gradient_checkpointing()
        objective = Objective(family, True).train()
        optimizer = torch.optim.AdamW(family.model.parameters(), 1e-3)
        latents, noise = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        batch = latents, noise, torch.tensor([900, 30]), said(family, [cut_mix.prompt("u", "v")] * 2, (16, 16))
        for _ in range(6):
            objective.unmix.watch(latents, [("u", "v")] * 2)
            family.loss(family.model, *batch[:3], family.encode_prompts(batch[3][0]) | batch[3][2])
            loss = objective.unmix.loss()
            strayed.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        objective([batch], (1.0,), [[("u", "v")] * 2]).backward()
        gradients.append([p.grad for p in family.model.parameters() if p.grad is not None])
    assert strayed[5] < 0.8 * strayed[0] and strayed[6:] == pytest.approx(strayed[:6], rel=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# `deft train` ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(sdxl, photos, tmp_path):
    def make(**changes):
        tell(photos, ["u dog", "v cat", "u dog"], text="a pet")
        defaults = {
            "pretrained_model_name_or_path": str(sdxl), "instance_data_dir": str(photos), "train_batch_size": 2,
            "output_dir": str(tmp_path / "out"), "method": "svdiff", "report_to": "none", "cut_mix_prob": 0.6,
            "random_flip": True, "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, "unmix_weight": 10.0,
        }  # fmt: skip
        return TrainOptions(**defaults | changes)

    return make


def tell(folder, subjects, **more):
    lines = [{"file_name": f"{k}.png", "subject": subject, **more} for k, subject in enumerate(subjects)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read(folder):
    return load_file(folder / "spectral_shifts.safetensors"), (folder / "loss.jsonl").read_text()


def test_a_mixed_run_resumes_to_the_bit(options, tmp_path):
    family = loaded(options().pretrained_model_name_or_path)
    shifts, log = read(train(options(output_dir=str(tmp_path / "whole")), family))
    assert not any(m._forward_pre_hooks for m in family.model.modules() if isinstance(m, Attention))  # taken off again
    train(options(max_train_steps=2))
    parts, same = read(train(options(resume_from_checkpoint="latest")))
    assert log == same and all(torch.equal(shifts[k], parts[k]) for k in shifts)
    assert [c.name for c in find_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    for changes in ({"cut_mix_prob": 0.0, "unmix_weight": None}, {"unmix_weight": None}):
        assert read(train(options(output_dir=str(tmp_path / "other"), overwrite_output_dir=True, **changes)))[1] != log
    o = options(resume_from_checkpoint="latest")
    tell(tmp_path / "photos", ["u dog", "v cat", "v cat"], text="a pet")
    with pytest.raises(UserError, match="was trained with pictures"):
        train(o)


def test_pictures_of_the_class_are_mixed_too(options, tmp_path, monkeypatch):
    classes, seen = tmp_path / "classes", []
    classes.mkdir()
    for k in range(2):
        write_picture(classes / f"{k}.png", 10 + k)
    tell(classes, ["dog", "cat"])
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, b, w, pairs: seen.append(pairs) or forward(self, b, w, pairs))
    train(options(cut_mix_prob=1.0, class_prompt="a pet", class_data_dir=str(classes), num_class_images=2))
    assert len(seen) == 4
    for own, prior in seen:
        assert {*own} <= {("u dog", "v cat"), ("v cat", "u dog")} and {*prior} <= {("dog", "cat"), ("cat", "dog")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cut_mix_prob": 1.5}, "--cut_mix_prob must be from 0 to 1, got 1.5"),
        ({"cut_mix_prob": 0.0}, "--unmix_weight needs --cut_mix_prob"),
        ({"compile": True}, "--unmix_weight does not go with --compile"),
        ({"unmix_weight": 0.0}, "--unmix_weight must be a positive number"),
    ],
)
def test_what_cannot_be_mixed(changes, message, options, tmp_path):
    with pytest.raises(UserError, match=message):
        train(options(**changes))
    assert not (tmp_path / "out").exists()


def test_one_subject_and_transformers(options, photos, tmp_path):
    o = options()
    tell(photos, ["u dog"] * 3)
    with pytest.raises(UserError, match="mixes pictures of several subjects, and .* tells of 1: write metadata"):
        train(o)
    tiny_pipelines.build("flux").save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match="--unmix_weight does not apply to .*FluxPipeline"):
        train(options(pretrained_model_name_or_path=str(tmp_path / "flux")))
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_long(tiny, options, capsys):
    """Of eight letters neither subject is seen: that is told, and there is nothing to unmix."""
    train(options(pretrained_model_name_or_path=str(tiny)))
    assert "the prompt 'photo of a v cat on the left and a u dog on the right' is too long" in capsys.readouterr().err
