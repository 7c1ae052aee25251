"""Encoders, protocols and `deft evaluate`, on tiny encoders that are built here."""

import dataclasses
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from deft_diffusers import UserError, cli
from deft_diffusers.evaluation import encoders as module
from deft_diffusers.evaluation import protocols
from deft_diffusers.evaluation.encoders import dino_transform, load_encoders
from deft_diffusers.evaluation.evaluate import score
from deft_diffusers.families import load_family
from deft_diffusers.options import EvaluateOptions
from deft_diffusers.toyworld.world import SCENES, draw, draw_individual
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import write_tiny_encoders
from tiny_pipeline import write_picture

import deft_kernels as dk

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("clip", "dinov1", "dinov2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = write_tiny_encoders(tmp_path_factory.mktemp("encoders"))
    return {name: str(folder / name) for name in NAMES}


@pytest.fixture
def load(folders):
    return lambda **more: load_encoders(**folders | more)


@pytest.fixture(scope="module")
def tiny_encoders(folders):
    return load_encoders(**folders)


@pytest.fixture
def pictures(tmp_path):
    """Six pictures, the last two of an unrelated prompt, three references, and the base's pictures of that prompt."""
    images = [write_picture(tmp_path / f"{k}.png", k, (40, 48)) for k in range(6)]
    references = [write_picture(tmp_path / f"r{k}.png", 10 + k, (64, 48)) for k in range(3)]
    base = {("a house", k): write_picture(tmp_path / f"base{k}.png", 20 + k, (40, 48)) for k in (4, 5)}
    prompts = ["a sks cat in snow"] * 2 + ["a sks cat in rain"] * 2 + ["a house"] * 2
    about = [{"seed": k, "unrelated": k > 3} for k in range(6)]
    settings = {"about": about, "base_images": base, "subject": "sks cat", "class_name": "cat", "progress": False}
    return images, prompts, references, settings


def features(encoder, paths):
    """By the model alone, one picture at a time."""
    rows = [encoder._encode_images([Image.open(path)])[0].double() for path in paths]
    return [row / row.norm() for row in rows]


def text_features(encoder, texts):
    rows = [encoder._encode_texts([text])[0].double() for text in texts]
    return [row / row.norm() for row in rows]


# encoders ---------------------------------------------------------------------------------------------------------------


WIDE = [[1.7694151401519775, 0.1254388839006424, -1.2959158420562744],
        [-0.5301119685173035, 0.5903362035751343, -0.10994395613670349],
        [2.0125491619110107, 1.472244143486023, 1.0888018608093262]]  # fmt: skip
TALL = [[0.5193082094192505, -1.1417930126190186, -0.09718302637338638],
        [-0.7577030062675476, -0.7927169799804688, 1.3256303071975708],
        [-0.3403920829296112, -0.845838725566864, 0.7750764489173889]]  # fmt: skip


@pytest.mark.parametrize(
    "seed, size, some, total",
    [(5, (30, 47), WIDE, 33618.11441824166), (6, (61, 40), TALL, 35029.20437418902)],
    ids=["wide", "tall"],
)
def test_dino_sees_what_torchvision_would_show_it(seed, size, some, total):
    """Values of torchvision 0.29.2 for the same noise: Resize(256, BICUBIC), CenterCrop(224), ToTensor, Normalize."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    found = dino_transform(image)
    assert found.shape == (3, 224, 224) and found.dtype == torch.float32
    assert found[:, [0, 100, 223], [0, 57, 223]].tolist() == some
    assert found.double().sum().item() == pytest.approx(total, rel=1e-12)


def test_models_are_asked_as_transformers_documents(tiny_encoders, pictures):
    """Pixels by hand, features by the models' documented calls."""
    image = Image.open(pictures[0][0])

    def by_hand(mean, deviation):  # to 36 pixels, 32 of the middle; transformers rounds an odd rest down
        small = image.resize((36, 43), Image.BICUBIC).crop((2, 5, 34, 37))
        pixels = (np.asarray(small, np.float64) / 255 - mean) / deviation
        return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]

    openai = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    clip, dinov1, dinov2 = (encoder.model for encoder in tiny_encoders.present.values())
    with torch.no_grad():
        expected = {
            "clip": clip.visual_projection(clip.vision_model(by_hand(*openai)).pooler_output),
            "dinov1": dinov1(dino_transform(image)[None]).last_hidden_state[:, 0],
            "dinov2": dinov2(by_hand(*openai)).last_hidden_state[:, 0],
        }
    for name, encoder in tiny_encoders.present.items():
        found = encoder.images([image])
        assert found.norm().item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(found, expected[name] / expected[name].norm(), rtol=0, atol=2e-5)
        assert encoder.facts["id"] == encoder.id and len(encoder.facts["revision_or_sha256"]) == 64
    letters = ["c</w>", "d", "o", "g</w>"]  # the tiny tokenizer knows no more
    ids = [0, *(tiny_encoders.clip.tokenizer.get_vocab()[letter] for letter in letters), 1]
    with torch.no_grad():
        said = clip.text_projection(clip.text_model(torch.tensor([ids])).pooler_output)
    torch.testing.assert_close(tiny_encoders.clip.texts(["c dog"]), said / said.norm(), rtol=0, atol=2e-5)


def test_a_text_has_the_same_feature_alone_and_beside_a_longer_one(tiny_encoders):
    alone = tiny_encoders.clip.texts(["a cat"])[0]
    beside = tiny_encoders.clip.texts(["a dog in the rain", "a cat", "a cat"])
    torch.testing.assert_close(beside[1], alone, rtol=0, atol=1e-6)
    assert torch.equal(beside[1], beside[2]) and (beside[0] - alone).abs().max() > 0.01


def test_convolutions_are_cudnns_in_full_precision(load, pictures):
    """TF32, torch's default for them, keeps 10 bits, and which pictures are rounded how would depend on the batch."""
    encoder, seen = load(clip="none", dinov1="none").dinov2, []
    encoder.model.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
    )
    encoder.images([Image.open(pictures[0][0])])
    assert seen == [(True, False)]


def test_features_are_kept_and_then_touch_no_model(load, pictures, tmp_path):
    images, prompts, references, settings = pictures
    cold = load(cache_dir=tmp_path / "cache")
    first = score(images, prompts, references, cold, **settings)
    assert [encoder.calls for encoder in cold.present.values()] == [2, 1, 1]
    warm = load(cache_dir=tmp_path / "cache")
    for encoder in warm.present.values():
        encoder.model = encoder.prepare = None
    warm.clip.cut_text = lambda text: False
    assert score(images, prompts, references, warm, **settings) == first
    assert [encoder.calls for encoder in warm.present.values()] == [0, 0, 0]


def test_other_weights_or_other_pixels_are_not_found(load, folders, pictures, tmp_path):
    image = Image.open(pictures[0][0])
    cache = tmp_path / "cache"
    before = load(cache_dir=cache).dinov2
    row = before.images([image])
    other = tmp_path / "other"
    shutil.copytree(folders["dinov2"], other)
    weights = load_file(other / "model.safetensors")
    weights["layernorm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    changed = load(cache_dir=cache, dinov2=str(other)).dinov2
    assert not torch.equal(changed.images([image]), row) and changed.sha256 != before.sha256
    told = json.loads((other / "preprocessor_config.json").read_text()) | {"image_mean": [0.5, 0.5, 0.5]}
    shutil.copy(Path(folders["dinov2"]) / "model.safetensors", other)
    (other / "preprocessor_config.json").write_text(json.dumps(told))
    shown = load(cache_dir=cache, dinov2=str(other)).dinov2
    assert not torch.equal(shown.images([image]), row) and shown.sha256 == before.sha256
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert not torch.equal(before.images([mirrored]), row) and before.calls == 2
    assert torch.equal(load(cache_dir=cache).dinov2.images([image]), row)


def test_other_tokens_of_a_text_are_not_found(load, folders, tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "other"
    before = load(cache_dir=cache).clip
    row = before.texts(["abc"])
    shutil.copytree(folders["clip"], other)
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(told))
    (other / "vocab.json").unlink(missing_ok=True)
    changed = load(cache_dir=cache, clip=str(other)).clip
    assert not torch.equal(changed.texts(["abc"]), row) and changed.sha256 == before.sha256


def test_all_that_prepares_a_picture_is_told(tiny_encoders):
    facts = {name: dict(encoder.facts["preprocessing"]) for name, encoder in tiny_encoders.present.items()}
    same = {"do_resize": True, "size": {"shortest_edge": 36}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    assert facts["clip"].pop("by").startswith("transformers' CLIPImageProcessor") and facts["clip"] == same
    assert facts["dinov2"].pop("by").startswith("transformers' BitImageProcessor") and facts["dinov2"] == same
    assert facts["dinov1"] == {
        "by": "DINO's evaluation transform, PIL", "resize": 256, "resample": "bicubic", "center_crop": 224,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip


def test_preparation_in_the_words_of_the_hubs_old_files(load, tiny_encoders, folders, pictures, tmp_path):
    """OpenAI's CLIP and Facebook's DINO on the hub name feature extractors, and sides by one number."""
    old = {"do_normalize": True, "do_resize": True, "resample": 3}
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 32, "size": 36,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    dino = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    asked = {}
    for name, more in (("clip", clip), ("dinov1", dino)):
        asked[name] = str(shutil.copytree(folders[name], tmp_path / name))
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(old | more))
    image = Image.open(pictures[0][0])
    for name, encoder in load(**asked, dinov2="none").present.items():
        usual = getattr(tiny_encoders, name)
        assert encoder.preprocessing == usual.preprocessing and torch.equal(encoder.images([image]), usual.images([image]))
    own = clip | old | {"feature_extractor_type": "BitFeatureExtractor", "crop_size": 224, "size": 230}
    (tmp_path / "dinov1" / "preprocessor_config.json").write_text(json.dumps(own))  # one that crops, as it says
    told = load(dinov1=asked["dinov1"], clip="none", dinov2="none").dinov1.preprocessing
    assert told["by"].startswith("transformers' BitImageProcessor") and told["size"] == {"shortest_edge": 230}


def test_what_is_not_downloaded_is_named_with_its_command_and_folder(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))

    def said(**asked):
        with pytest.raises(UserError) as error:
            load_encoders(**asked)
        return str(error.value)

    for words in ("--clip openai/clip-vit-base-patch32 is not downloaded", "run `hf download openai/clip-vit-base-patch32`",
                  str(tmp_path / "hub" / "models--openai--clip-vit-base-patch32"), "run `hf download facebook/dino-vits16`",
                  "run `hf download facebook/dinov2-small`"):  # fmt: skip
        assert words in said(), words
    assert "run `hf download facebook/dino-vits8`" in said(protocol="dreambench++")
    for words in (str(tmp_path / "torch" / "facebookresearch_dino_main"), "or take facebook/dino-vits8, the same weights",
                  "torch.hub.load('facebookresearch/dino:main', 'dino_vits8')"):  # fmt: skip
        assert words in said(dinov1="torchhub:facebookresearch/dino:main:dino_vits8"), words
    assert "unknown protocol 'dreambench', did you mean dreambench++?" in said(protocol="dreambench")


@pytest.mark.parametrize(
    "words, said",
    [({"clip": "dinov2"}, "--clip .* is a model of type dinov2, expected clip"),
     ({"dinov1": "/no/such/folder"}, "--dinov1 /no/such/folder: no such folder, nor a hub id"),
     ({"clip": "torchhub:owner/repo:main:entry"}, "--clip torchhub:owner/repo:main:entry: no such folder, nor a hub id"),
     ({"dinov1": "torchhub:a/b:c"}, "expected torchhub:owner/repo:ref:entry"),
     ({"clip": "none", "dinov1": "none", "dinov2": "none"}, "nothing to score with"),
     ({"encoders": "toyword"}, "--encoders must be toyworld, .* got 'toyword'")],
    ids=["kind", "folder", "hub", "torchhub", "none", "encoders"],
)  # fmt: skip
def test_wrong_encoders_are_refused(folders, words, said):
    words = {name: folders.get(value, value) for name, value in words.items()}
    with pytest.raises(UserError, match=said):
        load_encoders(**folders | words)


def test_an_encoder_without_all_its_weights_is_refused(folders, tmp_path):
    shutil.copytree(folders["dinov2"], tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights, such as layernorm.weight"):
        load_encoders(**folders | {"dinov2": str(tmp_path / "half")})
    weights["layernorm.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="--dinov2 .*half cannot be loaded from .*half: "):
        load_encoders(**folders | {"dinov2": str(tmp_path / "half")})
    (tmp_path / "half" / "model.safetensors").write_bytes(Path(folders["dinov2"], "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="--dinov2 .*half cannot be loaded from .*half: "):
        load_encoders(**folders | {"dinov2": str(tmp_path / "half")})


def test_the_embedded_encoders_come_with_their_judge(folders, monkeypatch):
    judge = types.SimpleNamespace(load_judge=lambda device: f"judge on {device}")
    monkeypatch.setitem(sys.modules, "deft_diffusers.toyworld.judge", judge)
    monkeypatch.setattr(module, "EMBEDDED", Path(folders["clip"]).parent)
    found = load_encoders("toyworld")
    assert [encoder.id for encoder in found.present.values()] == ["toyworld/clip", "toyworld/dinov1", "toyworld/dinov2"]
    assert found.judge == "judge on cpu"
    assert set(load_encoders("toyworld", dinov2="none").present) == {"clip", "dinov1"}

    def missing(device):
        raise FileNotFoundError

    judge.load_judge = missing
    with pytest.raises(UserError, match="the embedded encoders are missing from this installation"):
        load_encoders("toyworld")


def test_a_model_of_torch_hub(monkeypatch, folders, pictures, tmp_path):
    """A repository as torch.hub keeps it, whose entry point returns a plain module."""
    repository = tmp_path / "owner_repo_main"
    repository.mkdir()
    (repository / "hubconf.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.grey = torch.nn.Linear(3, 2, bias=False)\n        torch.nn.init.eye_(self.grey.weight)\n\n"
        "    def forward(self, x):\n        return self.grey(x.mean((2, 3)))\n\n\ndef tiny():\n    return Net()\n\n\n"
        "def offline():\n    raise OSError('no route to host')\n\n\ndef dino_vits8():\n    import torch_vision\n"
    )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = load_encoders(**folders | {"dinov1": "torchhub:owner/repo:main:tiny"}, cache_dir=tmp_path / "cache").dinov1
    image = Image.open(pictures[0][0])
    mean = dino_transform(image).mean((1, 2))[:2]
    torch.testing.assert_close(found.images([image])[0], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert found.facts["id"] == "torchhub:owner/repo:main:tiny"
    for entry, said in (("nobody", "from .*: Cannot find callable nobody in hubconf$"),
                        ("dino_vits8", "from .*: No module named 'torch_vision' .or take facebook/dino-vits8, the same"),
                        ("offline", "from .*: no route to host: run `python -c .*'owner/repo:main', 'offl")):  # fmt: skip
        with pytest.raises(UserError, match=f"--dinov1 torchhub:owner/repo:main:{entry} cannot be loaded {said}"):
            load_encoders(**folders | {"dinov1": f"torchhub:owner/repo:main:{entry}"})


# score ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol, scale", [("dreambooth", 1), ("dreambench++", 100)])
def test_scores_are_the_cosines_of_the_models_features(tiny_encoders, pictures, protocol, scale):
    images, prompts, references, settings = pictures
    result = score(images, prompts, references, tiny_encoders, protocol, **settings)
    own = {name: features(getattr(tiny_encoders, name), images) for name in NAMES}
    real = {name: features(getattr(tiny_encoders, name), references) for name in NAMES}
    near = lambda value: pytest.approx(value, abs=scale * 1e-5)
    for name, encoder in (("clip_i", "clip"), ("dinov1", "dinov1"), ("dinov2", "dinov2")):
        cosines = [[float(a @ b) for b in real[encoder]] for a in own[encoder][:4]]
        assert result["scores"][name] == near(scale * np.mean(cosines))
        assert [s[name] for s in result["samples"][:4]] == near([scale * np.mean(row) for row in cosines])
        among = [float(real[encoder][i] @ real[encoder][j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert result["real"][name] == near(scale * np.mean(among))
        assert all(name not in s for s in result["samples"][4:])
    said = text_features(tiny_encoders.clip, ["a cat in snow"] * 2 + ["a cat in rain"] * 2)
    cosines = [float(a @ b) for a, b in zip(said, own["clip"])]
    assert result["scores"]["clip_t"] == near(scale * np.mean(cosines))
    one = own["dinov1"]
    assert result["scores"]["diversity"] == pytest.approx(1 - float(one[0] @ one[1] + one[2] @ one[3]) / 2, abs=1e-5)
    before = features(tiny_encoders.dinov2, settings["base_images"].values())
    apart = [float(a @ b) for a, b in zip(before, own["dinov2"][4:])]
    assert result["scores"]["drift"] == pytest.approx((1 - np.mean(apart)) / 2, abs=1e-5)
    assert result["counts"] == {"clip_i": 4, "clip_t": 4, "dinov1": 4, "dinov2": 4, "diversity": 4, "drift": 2}
    assert (result["protocol"], result["scale"], result["missing"]) == (protocol, scale, [])
    assert result["references"] == ["r0.png", "r1.png", "r2.png"]
    first = result["samples"][0]
    assert (first["file"], first["seed"], first["text"]) == ("0.png", 0, "a cat in snow")
    assert set(result["versions"]) == {"torch", "transformers", "diffusers", "deft_kernels"}
    assert json.loads(json.dumps(result)) == result


def test_no_score_depends_on_batches_or_order(load, pictures):
    images, prompts, references, settings = pictures
    expected = score(images, prompts, references, load(batch_size=32), **settings)
    for size, order in ((1, [5, 2, 0, 4, 3, 1]), (4, [5, 2, 0, 4, 3, 1]), (2, [0, 1, 2]), (2, [3, 4, 5])):
        mine, said, about = ([values[k] for k in order] for values in (images, prompts, settings["about"]))
        found = score(mine, said, references[::-1], load(batch_size=size), **settings | {"about": about})
        for k, sample in zip(order, found["samples"], strict=True):  # parts too, as where several processes share the work
            assert sample == pytest.approx(expected["samples"][k], abs=1e-5)
        if len(order) == 6:
            assert found["scores"] == pytest.approx(expected["scores"], abs=1e-5)


def test_each_picture_may_have_its_own_reference(tiny_encoders, pictures):
    images, prompts, references, _ = pictures
    each = [references[1:], [references[0]]]
    result = score(images[:2], prompts[:2], each, tiny_encoders, "dreambench++", progress=False)
    own, real = features(tiny_encoders.dinov2, images[:2]), features(tiny_encoders.dinov2, references)
    assert result["scores"]["dinov2"] == pytest.approx(
        50 * float(own[0] @ (real[1] + real[2]) / 2 + own[1] @ real[0]), abs=1e-3
    )
    assert result["real"] == {}


def test_what_is_wrong_is_named_and_the_rest_is_scored(tiny_encoders, pictures, tmp_path, capsys, monkeypatch):
    images, prompts, references, settings = pictures
    whole = score(images, prompts, references, tiny_encoders, **settings)
    capsys.readouterr()
    images[1].write_bytes(b"no picture")
    images[2].unlink()
    rotated = Image.open(references[2])
    exif = rotated.getexif()
    exif[274] = 6
    rotated.transpose(Image.Transpose.ROTATE_90).save(references[2], exif=exif)  # looks as before
    clear = Image.open(images[3]).convert("RGBA")
    clear.save(images[3])
    grey = tmp_path / "grey.png"
    Image.new("L", (90, 30), 77).save(grey)
    settings["about"].append({"seed": 9})
    result = score([*images, grey], [*prompts, None], references, tiny_encoders, **settings)
    for k in (0, 3):
        assert result["samples"][k]["dinov1"] == pytest.approx(whole["samples"][k]["dinov1"], abs=1e-5)
    assert result["counts"] == {"clip_i": 3, "clip_t": 2, "dinov1": 3, "dinov2": 3, "drift": 2}
    missing = {entry["what"]: entry["why"] for entry in result["missing"]}
    assert "cannot read the picture" in missing[str(images[1])]
    assert missing[str(images[2])] == "there is no such picture"
    assert "no CLIP-T" in missing["grey.png"] and len(missing) == 3
    assert "of another size than most (40 x 48): grey.png (90 x 30)" in capsys.readouterr().err


def test_features_that_are_no_numbers_are_named_and_never_kept(load, pictures, tmp_path):
    images, prompts, references, settings = pictures
    sick = load(cache_dir=tmp_path / "cache", batch_size=3)
    marked = torch.from_numpy(np.asarray(Image.open(images[0])).copy())
    prepare = sick.dinov2.prepare

    def spoilt(image):
        same = torch.equal(torch.from_numpy(np.asarray(image).copy()), marked)
        return prepare(image) * (math.nan if same else 1)

    sick.dinov2.prepare = spoilt
    result = score(images, prompts, references, sick, **settings)
    assert result["missing"] == [{"what": str(images[0]), "why": "dinov2 gives features that are not finite"}]
    assert result["counts"]["dinov2"] == 3 and result["counts"]["clip_i"] == 4
    assert "dinov2" not in result["samples"][0] and all(math.isfinite(v) for v in result["scores"].values())
    well = score(images, prompts, references, load(cache_dir=tmp_path / "cache"), **settings)
    assert well["missing"] == [] and well["counts"]["dinov2"] == 4


def test_clip_is_asked_for_the_class_as_it_is_said(load, pictures):
    images, clip = pictures[0], load(dinov1="none", dinov2="none")
    prompts = ["a sks owl", "an old sks owl on a sks owl", "A sks owl", "an owl"]
    result = score(images[:4], prompts, [], clip, subject="sks owl", class_name="owl", progress=False)
    texts = ["an owl", "an old owl on an owl", "An owl", "an owl"]
    assert [s.get("text", s["prompt"]) for s in result["samples"]] == texts
    result = score(images[:1], ["an <v> dog"], [], clip, subject="<v> dog", class_name="dog", progress=False)
    assert result["samples"][0]["text"] == "a dog"


def test_texts_that_are_too_long_or_give_no_numbers_are_named(load, pictures, capsys, monkeypatch):
    images, _, references, settings = pictures
    found, long = load(), "a cat " * 9
    encode = found.clip._encode_texts
    spoilt = lambda texts: encode(texts) * torch.tensor([[math.nan if text == "a dog" else 1] for text in texts])
    monkeypatch.setattr(found.clip, "_encode_texts", spoilt)
    result = score(images[:3], ["a cat", long, "a dog"], references, found, progress=False)
    assert f"CLIP sees only the beginning of {long!r}\n" in capsys.readouterr().err
    assert result["missing"] == [{"what": "a dog", "why": "clip gives features that are not finite"}]
    assert result["counts"]["clip_t"] == 2 and result["counts"]["clip_i"] == 3
    assert math.isfinite(result["scores"]["clip_t"]) and "clip_t" not in result["samples"][2]


def test_diversity_counts_the_pictures_that_have_another_of_their_prompt(tiny_encoders, pictures):
    images, _, _, _ = pictures
    result = score(images[:5], ["a", "b", "b", "c", "c"], [], tiny_encoders, progress=False)
    assert result["counts"]["diversity"] == 4 and result["counts"]["clip_t"] == 5


def test_without_references_texts_and_drift_are_still_scored(tiny_encoders, pictures):
    images, prompts, _, settings = pictures
    result = score(images, prompts, [], tiny_encoders, **settings)
    assert set(result["scores"]) == {"clip_t", "diversity", "drift"}
    assert [entry["what"] for entry in result["missing"]] == ["references"]
    del settings["base_images"][("a house", 5)]
    result = score(images, prompts, [], tiny_encoders, **settings)
    assert result["counts"]["drift"] == 1 and "for 5.png: no drift" in result["missing"][1]["why"]
    result = score(images, prompts, [], tiny_encoders, **settings | {"base_images": {}})
    assert "drift" not in result["scores"] and "for 4.png, 5.png: no drift" in result["missing"][1]["why"]
    result = score(images, prompts, [], tiny_encoders, **settings | {"base_images": None})
    assert "drift" not in result["scores"] and len(result["missing"]) == 1


def test_an_encoder_left_out_takes_only_its_scores(load, pictures):
    images, prompts, references, settings = pictures
    result = score(images, prompts, references, load(clip="none"), **settings)
    assert set(result["scores"]) == {"dinov1", "dinov2", "diversity", "drift"}
    assert set(result["encoders"]) == {"dinov1", "dinov2"}


def test_the_judge_of_the_drawn_world(tiny_encoders, pictures, monkeypatch):
    images, prompts, references, settings = pictures
    said = (("cat", "snow"), (None, "snow"), ("cat", "snow"), ("dog", None), ("cat", "snow"), ("cat", "snow"))
    said = {Image.open(path).tobytes(): dict(zip(("individual", "scene"), words)) for path, words in zip(images, said)}
    nothing = {"individual": None, "scene": None}
    judge = lambda pictures: [said.get(picture.tobytes(), nothing) for picture in pictures]
    judge.sha256, judge.preprocessing = "abc", {"by": "PIL"}

    asked = lambda prompt: {"scene": "snow" if "snow" in prompt else "rain" if "rain" in prompt else None}
    monkeypatch.setitem(sys.modules, "deft_diffusers.toyworld.judge", types.SimpleNamespace(asked=asked))
    found = dataclasses.replace(tiny_encoders, judge=judge)
    result = score(images, prompts, references, found, individual="cat", **settings)
    assert result["scores"]["individual"] == 2 / 4 and result["scores"]["scene"] == 2 / 4
    assert [(s["individual"], s["scene"]) for s in result["samples"][:4]] == [
        (True, True), (False, True), (True, False), (False, False)]  # fmt: skip
    assert "individual" not in result["samples"][4]
    assert result["encoders"]["judge"] == {
        "id": "toyworld/judge", "revision_or_sha256": "abc", "preprocessing": {"by": "PIL"}}  # fmt: skip
    scores = score(images, prompts, references, found, **settings)["scores"]  # whoever it is
    assert "individual" not in scores and scores["scene"] == 2 / 4


# protocols --------------------------------------------------------------------------------------------------------------

LISTING = """Classes

subject_name,class
bear_plushie,stuffed animal
dog8,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the moon'.format(unique_token, class_token),
'a striped {0} {1}'.format(unique_token, class_token),
'a paper {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} with a kite'.format(unique_token, class_token),
"a sleepy {0} {1} in a king's bed".format(unique_token, class_token)
]
"""


def test_dreambooths_listing(tmp_path):
    """Lines as in the data set's own file."""
    file = tmp_path / "prompts_and_classes.txt"
    file.write_text(LISTING)
    classes, objects, live = protocols.read_prompts_and_classes(file)
    assert classes == {"bear_plushie": "stuffed animal", "dog8": "dog"}
    assert objects == ["a {} on the moon", "a striped {}", "a paper {}"] == protocols.read_prompts(file, "vase")
    assert live == ["a {} with a kite", "a sleepy {} in a king's bed"] == protocols.read_prompts(file, "dog")
    assert protocols.read_prompts(file, "cat") == live
    with pytest.raises(UserError, match="--class_name tells"):
        protocols.read_prompts(file)
    file.write_text("Object prompts\n'a {0} {1}'\n")
    assert protocols.read_prompts_and_classes(file) == ({}, ["a {}"], [])
    file.write_text("Classes\nsubject_name,class\ncat , cat\n'nobody asks for this'\n")
    assert protocols.read_prompts_and_classes(file) == ({"cat": "cat"}, [], [])
    with pytest.raises(UserError, match="has no prompts for cat"):
        protocols.read_prompts(file, "cat")
    file.write_text("nothing of the kind\n")
    with pytest.raises(UserError, match="is no prompts_and_classes.txt"):
        protocols.read_prompts_and_classes(file)


def test_dreambench_plus_names_and_captions(tmp_path):
    assert protocols.collection_id("images/live_subject/animal/00.jpg", "Kitten") == "live_subject_animal_00_kitten"
    assert protocols.collection_id("images/live_subject/human/12.jpg", "man") == "live_subject_human_12_man"
    assert protocols.collection_id("images/object/07.jpg", "Red Mug") == "object_07_red_mug"
    file = tmp_path / "captions" / "live_subject" / "animal" / "00.txt"
    file.parent.mkdir(parents=True)
    file.write_text("kitten\n" + "".join(f"a kitten {k} \n" for k in range(9)))
    assert protocols.read_prompts(file)[:2] == ["kitten", "a kitten 0"]  # a file of prompts, were it not where it is
    (tmp_path / "images").mkdir()
    (tmp_path / "texts").mkdir()
    shutil.copy(file, tmp_path / "texts")
    assert protocols.read_prompts(tmp_path / "texts" / "00.txt")[0] == "kitten"
    assert protocols.read_prompts(file) == [f"a {{}} {k}" for k in range(9)]
    file.write_text("kitten\n")
    with pytest.raises(UserError, match="00.txt has no prompts"):
        protocols.read_prompts(file)


def test_the_subject_of_a_caption_is_a_word_of_it(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    file = tmp_path / "captions" / "00.txt"
    file.write_text("man\na man in the manner of a romantic woman\nA Man, asleep\nman\n")
    assert protocols.read_prompts(file) == ["a {} in the manner of a romantic woman", "A {}, asleep", "{}"]
    assert capsys.readouterr().err == ""
    file.write_text("man\na woman\nmen\na man\n")
    assert protocols.read_prompts(file) == ["a woman", "men", "a {}"]
    assert capsys.readouterr().err.endswith("00.txt do not say 'man': 'a woman', 'men'\n")


def test_dreambench_plus_there_and_back(tiny_encoders, pictures, tmp_path):
    images, _, references, _ = pictures
    prompts = ["a kitten in snow", "a kitten in rain", "a kitten in snow"]
    folder, name = tmp_path / "samples" / "deft", "live_subject_animal_00_kitten"
    names = protocols.write_dreambench_plus(folder, name, images[:3], prompts, references[0], "ugly")
    assert names == ["0_0", "1_0", "0_1"]
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == sorted(["negative_prompt.txt", *(f"{part}/{name}/{n}.{end}" for n in names for part, end in
                            (("src_image", "jpg"), ("tgt_image", "jpg"), ("text", "txt")))])  # fmt: skip
    assert (folder / "negative_prompt.txt").read_text() == "ugly"
    grey = lambda path: np.asarray(Image.open(path).convert("L").resize((4, 4), Image.BOX), float)  # spares JPEG's noise
    for part, originals in (("tgt_image", images), ("src_image", [references[0]] * 3)):
        for n, original in zip(names, originals):
            np.testing.assert_allclose(grey(folder / part / name / f"{n}.jpg"), grey(original), atol=3)
    with pytest.raises(ValueError, match="shorter"):
        protocols.write_dreambench_plus(folder, name, images[:3], prompts[:2], references[0])
    protocols.write_dreambench_plus(folder, "object_07_mug", images[3:4], ["a mug"], references[1])
    read = protocols.read_samples(folder)
    order = [f"{name}/{n}" for n in ("0_0", "0_1", "1_0")] + ["object_07_mug/0_0"]
    assert [more["file"] for more in read.about] == [f"{n}.jpg" for n in order]
    assert read.prompts == ["a kitten in snow", "a kitten in snow", "a kitten in rain", "a mug"] and read.missing == []
    each = {"about": read.about, "progress": False}
    result = score(read.images, read.prompts, read.references, tiny_encoders, "dreambench++", **each)
    pairs = [(folder / "src_image" / more["file"], folder / "tgt_image" / more["file"]) for more in read.about]
    dino = [100 * float(a @ b) for a, b in (features(tiny_encoders.dinov1, pair) for pair in pairs)]
    assert result["scores"]["dinov1"] == pytest.approx(np.mean(dino), abs=1e-3)
    written = protocols.write_dreambench_plus_scores(tmp_path, result)
    assert [file.name for file in written] == [
        "clip_scores_image.json", "clip_scores_text.json", "dino_scores_v1.json", "dino_scores_v2.json"]  # fmt: skip
    assert [sample["dinov1"] for sample in result["samples"]] == pytest.approx(dino, abs=1e-3)
    for file, metric in zip(written, ("clip_i", "clip_t", "dinov1", "dinov2")):
        own = {n.replace("/", "-"): sample[metric] for n, sample in zip(order, result["samples"])}
        assert json.loads(file.read_text()) == own and len(set(own.values())) == 4


def test_subjects_that_share_a_prompt_are_not_compared(tiny_encoders, pictures, tmp_path):
    images, _, references, _ = pictures
    for name, pair in (("cup", images[:2]), ("mug", images[2:4])):
        protocols.write_dreambench_plus(tmp_path / "deft", name, pair, ["a red thing"] * 2, references[0])
    read = protocols.read_samples(tmp_path / "deft")
    each = {"about": read.about, "progress": False}
    result = score(read.images, read.prompts, read.references, tiny_encoders, "dreambench++", **each)
    one = features(tiny_encoders.dinov1, read.images)
    assert result["scores"]["diversity"] == pytest.approx(1 - float(one[0] @ one[1] + one[2] @ one[3]) / 2, abs=1e-5)


def test_dreambench_plus_is_read_in_natural_order_and_without_other_files(tmp_path):
    for file in ("tgt_image/mug/10_0.jpg", "tgt_image/mug/2_1.png", "tgt_image/mug/2_0.JPG", "tgt_image/mug/.2_2.jpg",
                 "tgt_image/mug/notes.md", "text/mug/2_0.txt", "text/mug/3_0.txt"):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(" a mug\n")
    read = protocols.read_samples(tmp_path)
    assert [more["file"] for more in read.about] == ["mug/2_0.JPG", "mug/2_1.png", "mug/10_0.jpg"]
    assert read.prompts == ["a mug", None, None] and read.references == [[], [], []]
    assert read.missing == [{"what": "tgt_image/mug/3_0", "why": "there is text of it, but no picture"}]
    shutil.rmtree(tmp_path / "tgt_image" / "mug")
    with pytest.raises(UserError, match="tgt_image holds no pictures: expected <collection_id>/<i>_<j>.jpg"):
        protocols.read_samples(tmp_path)


def test_of_two_pictures_of_one_name_one_is_read_and_the_other_named(tmp_path):
    for file in ("tgt_image/mug/0_0.jpg", "tgt_image/mug/0_0.png", "src_image/mug/0_0.jpg", "src_image/mug/0_0.jpeg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    read = protocols.read_samples(tmp_path)
    assert [path.name for path in read.images] == ["0_0.jpg"] and [path.name for path in read.references[0]] == ["0_0.jpeg"]
    assert [tuple(entry.values()) for entry in read.missing] == [
        ("src_image/mug/0_0.jpg", "0_0.jpeg has the same name, and is taken alone"),
        ("tgt_image/mug/0_0.png", "0_0.jpg has the same name, and is taken alone"),
    ]


def test_gaps_in_dreambench_plus_are_named(tiny_encoders, load, pictures, tmp_path):
    images, _, references, _ = pictures
    folder = tmp_path / "samples"
    protocols.write_dreambench_plus(folder, "mug", images[:3], ["a", "b", "c"], references[0])
    (folder / "src_image" / "mug" / "0_0.jpg").unlink()
    (folder / "text" / "mug" / "1_0.txt").unlink()
    (folder / "tgt_image" / "mug" / "2_0.jpg").unlink()
    read = protocols.read_samples(folder)
    assert read.missing == [{"what": "tgt_image/mug/2_0", "why": "there is src_image and text of it, but no picture"}]
    each = {"about": read.about, "progress": False}
    result = score(read.images, read.prompts, read.references, tiny_encoders, "dreambench++", **each)
    assert result["counts"] == {"clip_i": 1, "clip_t": 1, "dinov1": 1, "dinov2": 1}
    assert [entry["what"] for entry in result["missing"]] == ["mug/1_0.jpg", "references"]
    for file in protocols.write_dreambench_plus_scores(tmp_path, result):
        assert list(json.loads(file.read_text())) == ["mug-0_0" if "text" in file.name else "mug-1_0"]
    result = score(read.images, read.prompts, read.references, load(clip="none"), "dreambench++", **each)
    written = protocols.write_dreambench_plus_scores(tmp_path, result)
    assert [file.name for file in written] == ["dino_scores_v1.json", "dino_scores_v2.json"]


def test_plain_pictures_with_texts_beside_or_in_a_file(photos, tmp_path):
    (photos / "0.txt").write_text("a cat\n")
    (photos / "9.txt").write_text("a lost cat\n")
    read = protocols.read_samples(photos)
    assert read.prompts == ["a cat", None, None] and [more["file"] for more in read.about] == ["0.png", "1.png", "2.png"]
    (photos / "1.txt").write_text(" \n")
    assert protocols.read_samples(photos).prompts == read.prompts
    assert read.missing == [{"what": "9.txt", "why": "a prompt without a picture"}]
    texts = tmp_path / "prompts.txt"
    texts.write_text("one\n\ntwo\nthree\nfour\n")
    read = protocols.read_samples(photos, texts)
    assert read.prompts == ["one", "two", "three"] and [entry["what"] for entry in read.missing] == ["four"]
    texts.write_text("one\n")
    assert protocols.read_samples(photos, texts).prompts == ["one", None, None]
    (photos / "below").mkdir()
    assert protocols.read_samples(photos, texts).missing == []
    write_picture(photos / "below" / "3.png")
    (missing,) = protocols.read_samples(photos, texts).missing
    assert missing == {"what": "below/", "why": "folders below are not searched: its pictures have no scores"}


def test_files_of_prompts_to_draw_are_not_taken_for_texts_of_pictures(photos, tmp_path):
    file = tmp_path / "captions" / "00.txt"
    (tmp_path / "images").mkdir()
    file.parent.mkdir()
    file.write_text("kitten\na kitten\na blue kitten\na wet kitten\n")
    read = protocols.read_samples(photos, file)
    assert read.prompts == ["a kitten", "a blue kitten", "a wet kitten"] and read.missing == []
    (tmp_path / "listing.txt").write_text(LISTING)
    with pytest.raises(UserError, match="listing.txt lists what to draw: expected a line for each picture"):
        protocols.read_samples(photos, tmp_path / "listing.txt")


def test_a_record_tells_its_own_texts(photos, tmp_path):
    entry = {"file": "1.png", "prompt": "a cat", "seed": 3, "template": "a {}", "unrelated": True, "else": 0}
    (photos / "samples.json").write_text(json.dumps({"settings": {}, "samples": [entry]}))
    read = protocols.read_samples(photos)
    assert (read.images, read.prompts) == ([photos / "1.png"], ["a cat"])
    assert read.about == [{"file": "1.png", "seed": 3, "template": "a {}", "unrelated": True}]
    with pytest.raises(UserError, match="--prompts_file does not apply to .*samples.json there tells the texts"):
        protocols.read_samples(photos, tmp_path / "prompts.txt")
    for said, wrong in (('{"samples": [{"file": "1.png"}]}', "is no record of samples: expected"),
                        ('{"samples": 3}', "is no record of samples: expected"),
                        ('{"samples": []}', "records no samples")):  # fmt: skip
        (photos / "samples.json").write_text(said)
        with pytest.raises(UserError, match=wrong):
            protocols.read_samples(photos)


# the command ------------------------------------------------------------------------------------------------------------


def run(words, capsys):
    """Exit code, standard output and standard error of `deft evaluate` with these words."""
    try:
        code = cli.main(["evaluate", *(str(w) for pair in words.items() for w in pair if w is not None)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def flags(folders, photos, tmp_path):
    own = {f"--{name}": folder for name, folder in folders.items()}
    return own | {"--images": photos, "--output_dir": tmp_path / "out", "--device": "cpu"}


def test_help_tells_every_option(capsys):
    code, out, _ = run({"--help": None}, capsys)
    assert code == 0 and "example:\n  deft evaluate" in out and max(map(len, out.splitlines())) <= 110
    for field in dataclasses.fields(EvaluateOptions):
        assert f"--{field.name}" in out and f"{field.metadata['group']}:" in out


def test_a_folder_of_pictures_by_the_command(flags, pictures, photos, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na cat\na dog\na cow\n")
    more = {"--prompts_file": tmp_path / "prompts.txt", "--references": pictures[2][0]}
    code, out, err = run(flags | more, capsys)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["counts"] == {"clip_i": 3, "clip_t": 3, "dinov1": 3, "dinov2": 3, "diversity": 2}
    assert f"| CLIP-I | {result['scores']['clip_i']:.4f} | 3 |" in out and "protocol dreambooth, scale 1" in out
    assert out.startswith((tmp_path / "out" / "scores.md").read_text())
    assert [entry["what"] for entry in result["missing"]] == ["a cow"] and "missing: a cow: a prompt of" in err
    code, _, err = run(flags | more, capsys)
    assert code == 2 and "scores.json is there already" in err and "--overwrite_output_dir" in err
    assert run(flags | more | {"--overwrite_output_dir": None}, capsys)[0] == 0


def test_pictures_that_are_there_go_out_in_dreambench_pluss_layout(flags, pictures, photos, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a sks mug\na sks mug\na red sks mug\n")
    (photos / "1.png").write_bytes(b"")
    reference = tmp_path / "object" / "07.png"
    reference.parent.mkdir()
    shutil.copy(pictures[2][0], reference)
    code, _, err = run(flags | {
        "--prompts_file": tmp_path / "prompts.txt", "--references": reference, "--subject": "sks mug",
        "--class_name": "mug", "--dreambench_plus_dir": tmp_path / "plus",
    }, capsys)  # fmt: skip
    assert code == 0 and "missing: " in err and "1.png" in err
    read = protocols.read_samples(tmp_path / "plus")
    assert [more["file"] for more in read.about] == ["object_07_mug/0_0.jpg", "object_07_mug/1_0.jpg"]
    assert read.prompts == ["a mug", "a red mug"]


def test_dreambench_plus_keeps_the_prompts_numbers_and_names_what_it_lacks(flags, pictures, photos, tmp_path, capsys):
    for k, text in enumerate(("a wet mug", "a mug", "a red mug")):
        (photos / f"{k}.txt").write_text(text)
    (photos / "0.png").write_bytes(b"")
    write_picture(photos / "3.png")
    more = {"--references": pictures[2][0], "--dreambench_plus_dir": tmp_path / "plus", "--collection_id": "mug"}
    code, _, err = run(flags | more, capsys)
    assert code == 0 and f"not in {tmp_path / 'plus'}, for want of a prompt or of features: 0.png, 3.png\n" in err
    read = protocols.read_samples(tmp_path / "plus")
    assert [more["file"] for more in read.about] == ["mug/1_0.jpg", "mug/2_0.jpg"] and read.missing == []
    assert read.prompts == ["a mug", "a red mug"]
    # what was written before would be scored with it
    code, _, err = run(flags | more | {"--output_dir": tmp_path / "again"}, capsys)
    assert code == 2 and "mug is there already; remove it, or choose another --dreambench_plus_dir" in err
    assert not (tmp_path / "again").exists()
    more |= {"--dreambench_plus_dir": pictures[2][0], "--output_dir": tmp_path / "third"}
    code, _, err = run(flags | more, capsys)
    assert code == 2 and f"cannot write DreamBench++'s layout to {pictures[2][0]}: " in err
    assert (tmp_path / "third" / "scores.json").exists()


def test_dreambench_plus_by_the_command(flags, pictures, tmp_path, capsys):
    images, _, references, _ = pictures
    protocols.write_dreambench_plus(tmp_path / "deft", "mug", images[:2], ["a mug", "a red mug"], references[0])
    words = flags | {"--images": tmp_path / "deft"}
    code, _, err = run(words | {"--references": references[0]}, capsys)
    assert code == 2 and "--references does not apply to" in err and "deft: it has one beside each picture" in err
    code, out, err = run(words, capsys)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["scale"] == 100 and f"| DINOv2 | {result['scores']['dinov2']:.2f} | 2 |" in out
    assert list(json.loads((tmp_path / "out" / "clip_scores_image.json").read_text())) == ["mug-0_0", "mug-1_0"]


def test_dreambench_pluss_own_files_are_of_its_protocol_and_of_this_run(flags, pictures, tmp_path, capsys):
    protocols.write_dreambench_plus(tmp_path / "deft", "mug", pictures[0][:1], ["a mug"], pictures[2][0])
    words = flags | {"--images": tmp_path / "deft"}
    names = lambda: sorted(file.name for file in (tmp_path / "out").glob("*_scores*.json"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dino_scores_v1.json").write_text("{}")  # DreamBench++'s scripts write where they are run
    code, _, err = run(words, capsys)
    assert code == 2 and "dino_scores_v1.json is there already" in err
    words |= {"--overwrite_output_dir": None}
    assert run(words, capsys)[0] == 0 and names() == sorted(protocols.SCORES)
    assert run(words | {"--clip": "none"}, capsys)[0] == 0 and names() == ["dino_scores_v1.json", "dino_scores_v2.json"]
    assert run(words | {"--protocol": "dreambooth"}, capsys)[0] == 0 and names() == []


@pytest.mark.parametrize("by", ["folder", "here", "name"])
def test_who_and_where_is_counted_on_the_embedded_world(by, tmp_path, monkeypatch, capsys):
    """By its own judge: of six pictures three show the dog, one of them where it was not asked for."""
    rng, images, subject = np.random.default_rng(5), tmp_path / "images", tmp_path / "dog"
    images.mkdir(), subject.mkdir()
    draw_individual("dog", "field", rng).save(subject / "0.png")
    shown = ("dog", "snow"), ("dog", "beach"), ("dog", "city"), ("cat", "snow"), ("car", "beach")
    for k, (who, scene) in enumerate(shown):
        draw_individual(who, scene, rng).save(images / f"{k}.png")
        asked = "beach" if scene == "city" else scene
        (images / f"{k}.txt").write_text(f"a photo of sks dog {SCENES[asked][0][0]}")
    draw("dog", "red", "plain", "snow", rng).save(images / "5.png")
    (images / "5.txt").write_text("a photo of sks dog")
    monkeypatch.chdir(subject)
    references = {"folder": subject, "here": ".", "name": tmp_path / "photos"}[by]
    if by == "name":
        shutil.copytree(subject, references)
    words = {"--images": images, "--references": references, "--encoders": "toyworld", "--output_dir": tmp_path / "out",
             "--device": "cpu"}  # fmt: skip
    code, out, err = run(words | ({"--individual": "dog"} if by == "name" else {}), capsys)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [s["individual"] for s in result["samples"]] == [True] * 3 + [False] * 3
    assert [s.get("scene") for s in result["samples"]] == [True, True, False, True, True, None]
    assert "| this individual | 0.5000 | 6 |  | the judge of the drawn world |" in out
    assert "| the scene asked for | 0.8000 | 5 |  | the judge of the drawn world |" in out
    if by == "name":
        code, _, err = run(words | {"--individual": "dogs", "--overwrite_output_dir": None}, capsys)
        assert code == 2 and "--individual dogs, did you mean dog?: there are bear_plushie, cat, dog" in err
        code, _, err = run(words | {"--overwrite_output_dir": None}, capsys)  # nobody's name
        table = (tmp_path / "out" / "scores.md").read_text()
        assert code == 0 and "this individual" not in table and "| the scene asked for | 0.8000 | 5 |" in table


@pytest.mark.parametrize(
    "plus, protocol, dino",
    [(False, None, "vits16"), (True, None, "vits8"), (False, "dreambench++", "vits8"), (True, "dreambooth", "vits16")],
    ids=["plain", "layout", "asked", "asked-of-layout"],
)
def test_each_protocol_has_its_own_dino(flags, pictures, plus, protocol, dino, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    protocols.write_dreambench_plus(tmp_path / "deft", "mug", pictures[0][:1], ["a mug"], pictures[2][0])
    words = flags | ({"--images": tmp_path / "deft"} if plus else {}) | ({"--protocol": protocol} if protocol else {})
    code, _, err = run({name: value for name, value in words.items() if name != "--dinov1"}, capsys)
    assert code == 2 and f"--dinov1 facebook/dino-{dino} is not downloaded" in err and "--clip" not in err


def test_draws_first_then_scores(folders, pictures, tmp_path, capsys):
    """The embedded model, adapted at random; prompts of DreamBooth's listing; the pictures in DreamBench++'s layout too."""
    model = load_family("toyworld", torch.float32).model
    dk.inject_adapter(model, dk.DeftConfig(r=2, init_weights=False))
    dk.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "result.json").write_text('{"parameters": 7}')
    dk.save_adapter(model, tmp_path / "adapter" / "checkpoint-5")
    (tmp_path / "listing.txt").write_text(LISTING)
    words = {f"--{name}": folder for name, folder in folders.items()} | {
        "--pretrained_model_name_or_path": "toyworld", "--adapter": tmp_path / "adapter",
        "--prompts_file": tmp_path / "listing.txt", "--subject": "sks dog", "--class_name": "dog",
        "--unrelated_prompt": "a house", "--references": pictures[2][0],
        "--num_images_per_prompt": 2, "--num_inference_steps": 1, "--device": "cpu", "--output_dir": tmp_path / "out",
        "--dreambench_plus_dir": tmp_path / "plus", "--collection_id": "dog_00",
    }  # fmt: skip
    code, _, err = run(words, capsys)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(result["scores"]) == {"clip_i", "clip_t", "dinov1", "dinov2", "diversity", "drift"}
    assert result["counts"]["clip_i"] == 4 and result["counts"]["drift"] == 2 and result["missing"] == []
    first, far = result["samples"][0], result["samples"][-1]
    assert first["prompt"] == "a sks dog with a kite" and first["text"] == "a dog with a kite"
    assert first["template"] == "a {} with a kite" and first["file"] == "samples/0000.png"
    assert far["unrelated"] and far["prompt"] == "a house" and far["seed"] == 1
    (cost,), size = result["cost"], (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert cost["training"] == {"parameters": 7} and cost["bytes"] == size
    told = (tmp_path / "out" / "scores.md").read_text()
    assert told.endswith(
        "| adapter | bytes | parameters | steps | seconds | memory (GB) |\n|---|---:|---:|---:|---:|---:|\n"
        f"| {tmp_path / 'adapter'} | {size} | 7 |  |  |  |\n"
    )
    read = protocols.read_samples(tmp_path / "plus")
    assert [m["file"] for m in read.about] == [f"dog_00/{n}.jpg" for n in ("0_0", "0_1", "1_0", "1_1")]
    assert read.prompts[0] == "a dog with a kite"
    # the same from the pictures that now lie there
    again = {name: value for name, value in words.items() if name[2:] in (*NAMES, "subject", "class_name", "references",
             "unrelated_prompt", "device")}  # fmt: skip
    again |= {"--images": tmp_path / "out" / "samples", "--base_images": tmp_path / "out" / "base"}
    code, _, err = run(again | {"--output_dir": tmp_path / "again"}, capsys)
    assert code == 0, err
    found = json.loads((tmp_path / "again" / "scores.json").read_text())["scores"]
    assert found == pytest.approx(result["scores"], abs=1e-5)
    # the base model by itself has forgotten nothing, and is not drawn twice
    alone = {name: value for name, value in words.items() if name not in ("--adapter", "--dreambench_plus_dir")}
    alone |= {"--num_images_per_prompt": 1, "--output_dir": tmp_path / "alone"}
    code, _, err = run(alone, capsys)
    assert code == 0 and not (tmp_path / "alone" / "base").exists(), err
    found = json.loads((tmp_path / "alone" / "scores.json").read_text())
    assert "drift" not in found["scores"] and found["cost"] == [] == found["missing"]
    # pictures whose seeds nobody knows are not compared
    (tmp_path / "out" / "base" / "samples.json").unlink()
    code, _, err = run(again | {"--output_dir": tmp_path / "third"}, capsys)
    assert code == 2 and "base does not tell the pictures' seeds: expected a folder that `deft sample` wrote" in err


@pytest.mark.parametrize(
    "change, said",
    [({"--images": None}, "give either --images, a folder of pictures, or --pretrained_model_name_or_path"),
     ({"--images": "nowhere"}, "no such folder or file of pictures"),
     ({"--references": "nowhere"}, "no such folder or file of pictures"),
     ({"--subject": "sks cat"}, "--subject and --class_name go together"),
     ({"--subject": "sks cat", "--class_name": "cat"}, "'sks cat' stands in none of the prompts: there are none"),
     ({"--prompt": "a cat"}, "--prompt is for drawing: without --images"),
     ({"--num_images_per_prompt": 2}, "--num_images_per_prompt is for drawing: without --images"),
     ({"--batch_size": 0}, "--batch_size must be at least 1, got 0"),
     ({"--protocol": "dreambench"}, "did you mean dreambench\\+\\+"),
     ({"--individual": "cat"}, "--individual goes with --encoders toyworld"),
     ({"--dreambench_plus_dir": "plus"}, "--dreambench_plus_dir needs --references"),
     ({"--device": "cuda:7"}, "cannot use --device cuda:7"),
     ({"--images": None, "--pretrained_model_name_or_path": "toyworld"}, "either with --prompt or with --prompts_file"),
     ({"--images": None, "--pretrained_model_name_or_path": "toyworld", "--prompt": "a {}"}, "stands for the subject"),
     ({"--base_images": "nowhere"}, "tells the drift by --unrelated_prompt, and no picture is of one")],
    ids=["neither", "images", "references", "subject", "words", "prompt", "pictures", "batch", "protocol", "individual",
         "plus", "device", "texts", "braces", "base"],
)  # fmt: skip
def test_wrong_words_are_refused_before_anything_is_written(flags, change, said, tmp_path, capsys):
    flags = {name: value for name, value in (flags | change).items() if value is not None}
    code, _, err = run(flags, capsys)
    assert code == 2 and re.search(said, err) and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_nothing_that_can_be_scored_is_an_error_that_says_why(flags, photos, tmp_path, capsys):
    for path in photos.iterdir():
        path.write_bytes(b"")
    code, _, err = run(flags, capsys)
    assert code == 2 and "nothing could be scored" in err and "cannot read the picture" in err
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())["samples"]) == 3
