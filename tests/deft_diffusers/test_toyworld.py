"""The embedded base model and its world: drawings, captions, the shipped pipeline, and the script that makes it."""

import hashlib
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from deft_diffusers import data
from deft_diffusers.sweep import find_subjects
from deft_diffusers.toyworld import CLASSES, COLOURS, MODEL_DIR, PATTERNS, SCENES, caption, draw, sample, train
from deft_diffusers.toyworld.subjects import write_subjects
from deft_diffusers.toyworld.world import INDIVIDUALS, draw_individual
from PIL import Image

SIZE_LIMIT = 16_000_000  # bytes of the shipped folder
DRAWING_PSNR, PHOTO_PSNR = 23.5, 25.0  # dB, floors under what the shipped autoencoder reaches (see its README.md)


def _pixels(image):
    return np.asarray(image, np.float32)


def _to_tensor(images):
    return torch.from_numpy(np.stack([_pixels(i) for i in images])).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_seed_fixes_picture_caption_and_attributes():
    for seed in (0, 1, 97):
        a, b = sample(np.random.default_rng(seed)), sample(np.random.default_rng(seed))
        assert np.array_equal(_pixels(a[0]), _pixels(b[0])) and a[1:] == b[1:]
    assert not np.array_equal(_pixels(sample(np.random.default_rng(0))[0]), _pixels(sample(np.random.default_rng(1))[0]))


def test_every_subject_draws_in_every_scene_and_is_distinct():
    for scene in SCENES:
        pictures = [_pixels(draw(c, "red", "plain", scene, np.random.default_rng(5))) for c in (*CLASSES, None)]
        for k, a in enumerate(pictures):
            assert a.shape == (64, 64, 3)
            for b in pictures[:k]:
                assert np.abs(a - b).mean() > 3, f"two subjects look alike in {scene}"


def test_a_subject_fills_a_good_part_of_the_frame():
    for subject in CLASSES:
        for seed in range(4):
            both = (_pixels(draw(s, "red", "plain", "snow", np.random.default_rng(seed))) for s in (subject, None))
            changed = np.abs(next(both) - next(both)).max(-1) > 60
            rows, columns = np.nonzero(changed)
            assert max(np.ptp(rows), np.ptp(columns)) > 0.4 * 64, subject


def test_colour_and_pattern_show():
    for colour in COLOURS:
        pictures = [_pixels(draw("teapot", colour, p, "snow", np.random.default_rng(3))) for p in PATTERNS]
        middle = np.median(pictures[0][32:52, 26:38].reshape(-1, 3), axis=0)
        nearest = min(COLOURS, key=lambda c: np.abs(np.asarray(COLOURS[c]) - middle).sum())
        assert nearest == colour or np.abs(np.asarray(COLOURS[colour]) - middle).max() < 60
        assert min(np.abs(a - b).mean() for a, b in zip(pictures, pictures[1:])) > 1


def test_an_individual_is_itself_in_every_pose_and_like_no_training_picture():
    for name, one in INDIVIDUALS.items():
        own = [_pixels(draw_individual(name, "snow", np.random.default_rng(seed))) for seed in range(4)]
        again = _pixels(draw_individual(name, "snow", np.random.default_rng(0)))
        assert np.array_equal(own[0], again) and min(np.abs(own[0] - p).mean() for p in own[1:]) > 1, name
        for colour in (one.colour, *one.coat.values()):
            near = [np.abs(p - colour).max(-1) for p in own]
            assert sum((n < 40).mean() > 0.005 for n in near) >= 3, (name, colour)  # a close-up may hide a part
        far = min(np.abs(np.subtract(one.colour, other)).max() for other in COLOURS.values())
        assert far >= 20 and one.coat, name  # in training all of a subject has one colour
    # the colours of parts are one more thing that is drawn: what is not an individual has none, and looks as before
    before = draw("cat", "red", "striped", "beach", np.random.default_rng(1))
    assert hashlib.sha256(before.tobytes()).hexdigest()[:8] == "bfb41460"


def test_subjects_are_a_data_set(tmp_path):
    folder = write_subjects(tmp_path / "subjects")
    subjects = find_subjects(folder)
    assert {s.name: s.class_name for s in subjects} == {name: one.subject for name, one in INDIVIDUALS.items()}
    for subject in subjects:
        sources = data.find_sources(subject.instance_data_dir, subject.instance_prompt)
        texts = {source.caption for source in sources}
        assert len(sources) == 5 and len(texts) == (5 if subject.name == "church_rock" else 1)
        assert all("sks " + subject.class_name in text for text in texts)


def test_captions_name_what_is_drawn_and_sometimes_leave_it_out():
    said = {"subject": 0, "colour": 0, "scene": 0}
    count = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        subject, colour, scene = (names[rng.integers(len(names))] for names in (CLASSES, list(COLOURS), list(SCENES)))
        assert subject in caption(subject, colour, "striped", scene, rng)
        _, text, attributes = sample(rng)
        if attributes["subject"]:
            count += 1
            said["subject"] += attributes["subject"] in text
            said["colour"] += attributes["colour"] in text
            said["scene"] += any(
                p in text for p in (*SCENES[attributes["scene"]][0], SCENES[attributes["scene"]][1].removeprefix("a "))
            )
    assert said["subject"] == count
    assert 0.5 < said["colour"] / count < 0.9 and 0.5 < said["scene"] / count < 0.95


def test_every_word_of_a_caption_is_one_token(pipeline):
    tokenizer = pipeline.tokenizer
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for seed in range(200):
        text = sample(np.random.default_rng(seed))[1]
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= tokenizer.model_max_length
        assert not special & set(ids[1:-1])


def test_rare_tokens_are_single_and_any_prompt_tokenises(pipeline):
    tokenizer = pipeline.tokenizer
    rare = [tokenizer(t).input_ids[1:-1] for t in (*train.RARE_TOKENS, *train.ADDED_TOKENS)]
    assert all(len(ids) == 1 for ids in rare) and len({ids[0] for ids in rare}) == len(rare)
    strange = "zebra über naïve 42 żółw"
    ids = tokenizer(strange).input_ids
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == strange.replace(" ", "")
    assert len(tokenizer) <= pipeline.text_encoder.get_input_embeddings().num_embeddings


def test_pipeline_is_small_loads_without_a_word_and_computes_in_float32():
    from diffusers import StableDiffusionPipeline

    assert sum(f.stat().st_size for f in MODEL_DIR.rglob("*") if f.is_file()) <= SIZE_LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.safety_checker is None and not pipeline.config.requires_safety_checker
    names = {n.rsplit("attn2.", 1)[1] for n, _ in pipeline.unet.named_modules() if "attn2." in n}
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= names


def test_a_seed_fixes_the_sample(pipeline):
    def run(seed):
        return _pixels(pipeline("a red car", num_inference_steps=3, generator=torch.Generator().manual_seed(seed)).images[0])

    a, b, c = run(0), run(0), run(1)
    assert a.shape == (64, 64, 3) and np.array_equal(a, b) and not np.array_equal(a, c)


@torch.no_grad()
def test_autoencoder_keeps_drawings_and_a_photograph(pipeline):
    def psnr(images):
        x = _to_tensor(images)
        return train.psnr(x, pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1))

    assert psnr([sample(np.random.default_rng((71, k)))[0] for k in range(16)]).mean() > DRAWING_PSNR
    data = pytest.importorskip("skimage.data", reason="needs scikit-image for the photograph")
    photo = Image.fromarray(data.chelsea())
    side = min(photo.size)
    left = (photo.width - side) // 2
    photo = photo.crop((left, 0, left + side, side)).resize((64, 64), Image.LANCZOS)
    assert psnr([photo]).item() > PHOTO_PSNR


@torch.no_grad()
def test_the_right_caption_denoises_better_than_one_with_a_single_wrong_word(pipeline):
    lists = list(CLASSES), list(COLOURS), list(SCENES)
    images, texts = [], {"right": [], "subject": [], "colour": [], "scene": []}
    for k in range(40):
        rng = np.random.default_rng((72, k))
        chosen = [names[rng.integers(len(names))] for names in lists]
        images.append(draw(*chosen[:2], "plain", chosen[2], rng))
        for wrong, said in enumerate(texts.values(), start=-1):
            subject, colour, scene = (n[n.index(c) - 3 * (j == wrong)] for j, (n, c) in enumerate(zip(lists, chosen)))
            said.append(caption(subject, colour, None, scene, np.random.default_rng((75, k))))
    latents = pipeline.vae.encode(_to_tensor(images)).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(latents),), 700)

    def loss(said):
        ids = train.encode(pipeline.tokenizer, said)
        return train.v_loss(pipeline.unet, pipeline.text_encoder, pipeline.scheduler, latents, ids, noise, t)

    right = loss(texts.pop("right"))
    for what, said in texts.items():
        assert (right < loss(said)).float().mean() >= 0.9, what


def test_report_prints_the_rows_of_the_card_and_writes_samples(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage.data", reason="needs scikit-image for the photographs")
    folder = shutil.copytree(MODEL_DIR, tmp_path / "model", ignore=shutil.ignore_patterns("samples.png"))
    monkeypatch.setattr(train, "REPORT_PICTURES", 6)  # the card has 64, so only the photographs' rows agree in value
    found = train.main(["--report", str(folder), "--grid_prompts", "1", "--device", "cpu"])
    row = re.compile(r"^\| ((?:PSNR|loss), [^|]+) \| ([\d.]+) \|$", re.MULTILINE)
    printed, card = row.findall(capsys.readouterr().out), row.findall((MODEL_DIR / "README.md").read_text())
    assert [name for name, _ in printed] == [name for name, _ in card] == list(found)
    for (name, value), (_, stated) in zip(printed, card):
        assert float(value) == pytest.approx(found[name], abs=0.06)
        if name.removeprefix("PSNR, ") in train.REPORT_PHOTOS:
            assert float(stated) == pytest.approx(found[name], abs=0.06), name
    for what in ("subject", "colour", "scene"):
        assert found[f"loss, wrong {what}"] > found["loss, right caption"]
        assert found[f"loss, wrong {what}, share higher"] > 0.5
    assert Image.open(folder / "samples.png").size == (8 * 64 * 2, 64 * 2)


def _train(folder, vae_steps, unet_steps, *more):
    tiny = "--vae_images 6 --vae_batch_size 2 --images 6 --batch_size 2 --grid_prompts 1 --workers 1".split()
    steps = ["--vae_steps", str(vae_steps), "--unet_steps", str(unet_steps), "--fall", "0", "--device", "cpu"]
    return train.main(["--output_dir", str(folder), *tiny, *steps, *more])


def test_training_runs_every_stage_and_resumes_where_it_stopped(tmp_path):
    whole = _train(tmp_path / "whole", 2, 4)
    _train(tmp_path / "parts", 2, 2)
    parts = _train(tmp_path / "parts", 2, 4)
    assert len(whole) == 4 and np.isfinite(whole).all()
    assert np.allclose(whole, parts, rtol=1e-3)
    assert Image.open(tmp_path / "parts" / "grid_000004.png").size[0] > 0
    assert (tmp_path / "parts" / "model" / "model_index.json").exists()


def test_resuming_with_other_arguments_is_refused_and_says_which(tmp_path):
    folder = tmp_path / "first"
    _train(folder, 2, 1, "--encoder_steps", "2")
    for stage, name, value, was in (
        ("vae", "vae_lr", "0.5", "0.0015"),
        ("vae", "seed", "1", "0"),
        ("latents", "images", "7", "6"),
        ("unet", "lr", "0.5", "0.0007"),
    ):
        with pytest.raises(SystemExit, match=rf"{stage}\.pt was made with {name} = {was}, not {value}: [^\n]+$"):
            _train(folder, 2, 1, "--encoder_steps", "2", f"--{name}", value)
    with pytest.raises(SystemExit, match=r"unet\.pt has done step 1, past --unet_steps 0"):
        _train(folder, 2, 0, "--encoder_steps", "2")
    weights = folder / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    _train(folder, 3, 1, "--encoder_steps", "2")  # the encoder stood still: its latents hold, the decoder is renewed
    assert weights.read_bytes() != before
    (folder / "vae.pt").unlink()
    with pytest.raises(SystemExit, match=r"latents\.pt was made with encoder_steps = 2, not 3"):
        _train(folder, 3, 1, "--encoder_steps", "3")
