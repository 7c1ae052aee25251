"""What a model is told beside the text: SDXL the sizes of its training pictures, FLUX.2 klein and OmniGen input pictures.
And the sizes that a model cannot draw."""

import json
import shlex

import numpy as np
import pytest
import torch
from deft_diffusers import UserError, cli, data
from deft_diffusers.families import load_family
from deft_diffusers.options import SampleOptions, TrainOptions
from deft_diffusers.sample import sample
from deft_diffusers.samples import Samples
from deft_diffusers.train import Objective, train
from PIL import Image, ImageOps
from test_family_training import build, pixels, states_of, watch
from tiny_pipeline import write_picture

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def save_models(folder, families):
    """{family: the folder of its tiny pipeline}."""
    for family in families:
        build(family).save_pretrained(folder / family)
    return {family: str(folder / family) for family in families}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), ("sdxl", "sd3", "flux2-klein", "omnigen"))


def train_options(model, photos, folder, **changes):
    defaults = {
        "pretrained_model_name_or_path": model, "instance_data_dir": str(photos), "instance_prompt": "a cat",
        "output_dir": str(folder), "max_train_steps": 2, "train_batch_size": 2, "report_to": "none", "resolution": 32,
        "rank": 2,
    }  # fmt: skip
    return TrainOptions(**defaults | changes)


# SDXL --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode_texts", [True, False])
def test_sdxl_is_told_the_true_sizes(encode_texts, models, tmp_path):
    """Original size, corner and target size, heights first, of the very part that the VAE sees, mirrored or not."""
    family = load_family(models["sdxl"], torch.float32)
    sizes = {"wide": (120, 60), "tall": (50, 90), "small": (16, 20)}
    for k, (name, size) in enumerate(sizes.items()):
        write_picture(tmp_path / f"{name}.png", k, size)
    pictures = [data.load(data.Source(tmp_path / f"{name}.png", "a cat"), [(32, 32)]) for name in sizes]
    assert [p.original for p in pictures] == list(sizes.values())
    seen, encode = [], family.encode_images
    family.encode_images = lambda x: seen.append(x) or encode(x)
    samples = Samples(pictures, family, 3, True, True, encode_texts=encode_texts)
    *batch, conditions = samples.batch(range(24), CPU)
    ids = (conditions if encode_texts else conditions[2])["time_ids"]
    assert ids.shape == (24, 6)
    (parts,) = seen
    corners = set()
    for k, part, (h, w, top, left, height, width) in zip(map(samples._index, range(24)), parts, ids.int().tolist()):
        assert (w, h) == list(sizes.values())[k] and (width, height) == (32, 32)
        for faced in (pictures[k].image, ImageOps.mirror(pictures[k].image)):
            if np.array_equal(data.to_array(faced.crop((left, top, left + 32, top + 32))), part.numpy()):
                break
        else:
            raise AssertionError(f"{k}: not what is at {left}, {top}")
        corners.add((k, left, top))
    assert len(corners) > 10 and {left > 0 for _, left, _ in corners} == {top > 0 for _, _, top in corners} == {True, False}
    again = Samples(pictures, family, 3, True, True, encode_texts=encode_texts).batch(range(5, 9), CPU)[3]
    assert torch.equal((again if encode_texts else again[2])["time_ids"], ids[5:9])

    told = []
    family.model.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        Objective(family, not encode_texts)([(*batch, conditions)], (1.0,))
    assert torch.equal(told[0], ids)


def test_sdxl_trains_and_draws_with_its_sizes(models, photos, tmp_path):
    """Same pixels of a larger original are another lesson; drawing has the pipeline's own sizes."""
    losses = {}
    for scale in (1, 4):
        folder = tmp_path / str(scale)
        folder.mkdir()
        for path in photos.iterdir():
            Image.open(path).resize((32 * scale, 32 * scale), Image.NEAREST).save(folder / path.name)
        out = train(train_options(models["sdxl"], folder, tmp_path / f"out{scale}", center_crop=True))
        losses[scale] = (out / "loss.jsonl").read_text()
    assert losses[1] != losses[4]
    family = load_family(models["sdxl"], torch.float32)
    calls = watch(family.model)
    family.generate(["a cat"], [0], num_inference_steps=1, guidance_scale=1.0, height=32, width=40)
    assert calls[0][0]["added_cond_kwargs"]["time_ids"].tolist() == [[32, 40, 0, 0, 32, 40]]


# FLUX.2 klein ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(photos):
    """Paths of three pictures; training pictures 0 and 1 have one of them each, of two sizes, 2 has two."""
    (photos / "inputs").mkdir()
    sizes = [(90, 70), (64, 80), (90, 70)]
    paths = [write_picture(photos / "inputs" / f"{k}.png", 20 + k, size) for k, size in enumerate(sizes)]
    names = [["0"], ["1"], ["0", "2"]]
    lines = [
        {"file_name": f"{k}.png", "text": "turn it into a cat", "input_images": [f"inputs/{name}.png" for name in own]}
        for k, own in enumerate(names)
    ]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return paths


def test_klein_is_asked_as_its_pipeline_asks(models, inputs):
    """With input pictures of two sizes, and without a text, which it is guided away from."""
    family = load_family(models["flux2-klein"], torch.float32)
    images = [data.read_image(path) for path in inputs[:2]]
    calls = watch(family.model)
    family.generate(["a cat"], [5], num_inference_steps=1, height=32, width=48, input_images=images)
    tokens = 8 * 12
    for prompt, (arguments, output) in zip(("a cat", ""), list(calls), strict=True):
        assert states_of(arguments).shape[1] - tokens == 22 * 17 + 16 * 20
        noisy = states_of(arguments)[:, :tokens].transpose(1, 2).unflatten(2, (8, 12))
        with torch.no_grad():
            conditions = family.encode_prompts([prompt], [images])
            asked = family.predict(family.model, noisy, arguments["timestep"] * 1000, conditions)
        torch.testing.assert_close(asked.flatten(2).transpose(1, 2), output[0][:, :tokens], rtol=1e-4, atol=1e-5)
        assert torch.equal(calls[-1][0]["img_ids"], arguments["img_ids"])
    assert family.drops_inputs is False


def test_klein_draws_in_the_size_of_its_input(models, inputs):
    family = load_family(models["flux2-klein"], torch.float32)
    images = [data.read_image(path) for path in inputs]
    draw = {"num_inference_steps": 1, "input_images": images}
    assert family.generate(["a cat"], [5], **draw)[0].size == (88, 68)  # multiples of 4
    own = family.pipe(prompt="a cat", image=images, generator=torch.Generator().manual_seed(5), num_inference_steps=1)
    assert abs(pixels(own.images[0]) - pixels(family.generate(["a cat"], [5], **draw)[0])).max() <= 1
    assert family.generate(["a cat"], [5], **draw, height=32, width=48)[0].size == (48, 32)
    assert family.default_size([Image.new("RGB", (1500, 1000))]) == (836, 1252)  # of a million pixels
    with pytest.raises(UserError, match="input picture of 40 x 90 pixels: Image too small"):
        family.encode_prompts(["a cat"], [[Image.new("RGB", (40, 90))]])


def test_klein_learns_from_input_pictures(models, photos, inputs):
    """Samples of several numbers and sizes of input pictures in one batch; a dropped text leaves them."""
    family = load_family(models["flux2-klein"], torch.float32)
    write_picture(photos / "3.png", 3)  # no input pictures
    pictures = [data.load(source, [(32, 32)]) for source in data.find_sources(photos, "a cat")]
    samples = Samples(pictures, family, 77, False, False, caption_dropout=0.5)
    together = samples.batch(range(8), CPU)
    counts = [len(row) for row in together[3]["inputs"]]
    assert sorted(counts) == [0, 0, 1, 1, 1, 1, 2, 2]
    empty = family.encode_prompts([""])["encoder_hidden_states"][0]
    dropped = [torch.equal(text, empty) for text in together[3]["encoder_hidden_states"]]
    assert {c for c, gone in zip(counts, dropped) if gone} - {0} and not all(dropped)
    split = [(*(t[k : k + 1] for t in together[:3]), {n: v[k : k + 1] for n, v in together[3].items()}) for k in range(8)]
    with torch.no_grad():
        loss = family.loss(family.model, *together).item()
        each = [family.loss(family.model, *one).item() for one in split]
        blind = family.loss(family.model, *together[:3], together[3] | {"inputs": [[]] * 8}).item()
    assert loss == pytest.approx(sum(each) / 8, rel=1e-5) and abs(blind / loss - 1) > 1e-4


@pytest.mark.parametrize("method", ["deft", "textual_inversion"])
def test_klein_trains_and_draws_with_input_pictures(method, models, photos, inputs, tmp_path, capsys):
    """The validation is of the first picture's, and the card's command draws with them too."""
    if method == "textual_inversion":
        (photos / "metadata.jsonl").write_text((photos / "metadata.jsonl").read_text().replace("a cat", "a <sks>"))
    prompt = "turn it into a <sks>" if method == "textual_inversion" else "turn it into a cat"
    options = train_options(
        models["flux2-klein"], photos, tmp_path / "out", method=method, validation_prompt=prompt, num_validation_images=1,
        cache_dir=str(tmp_path / "cache"), caption_dropout=0.2, **({} if method == "deft" else {"rank": 8}),
    )  # fmt: skip
    family = load_family(models["flux2-klein"], torch.float32)
    calls = watch(family.model)
    folder = train(options, family)
    assert states_of(calls[-1][0]).shape[1] == 8 * 8 + 22 * 17
    assert (folder / "validation.png").is_file()
    image = data.read_image(inputs[0])
    drawn = family.generate([prompt], [0], num_inference_steps=2, height=32, width=32, input_images=[image])[0]
    command = (folder / "README.md").read_text().split("```")[1].removeprefix("bash\n").replace("\\\n", " ")
    words = [*shlex.split(command)[1:], "--output_dir", str(tmp_path / "drawn"), "--num_inference_steps", "2"]
    assert str(inputs[0]) in words and cli.main(words) == 0, capsys.readouterr().err
    again = Image.open(tmp_path / "drawn" / "0000.png")
    assert again.size == (32, 32) and abs(pixels(again) - pixels(drawn)).max() <= 1


# validation --------------------------------------------------------------------------------------------------------------


def test_omnigen_is_shown_with_the_pictures_that_its_text_names(models, photos, inputs, tmp_path):
    """Those of --validation_image, else the first training picture's, else none."""
    lines = [{"file_name": "0.png", "text": "<img><|image_1|></img> as a cat", "input_images": ["inputs/0.png"]}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {"validation_prompt": "<img><|image_1|></img> as a dog", "num_validation_images": 1, "max_train_steps": 1}
    sheets = []
    for k, more in enumerate([{}, {"validation_image": [str(inputs[1])]}, {"validation_prompt": "a dog"}]):
        folder = train(
            train_options(models["omnigen"], photos, tmp_path / str(k), resolution=64, learning_rate=0.0, **common | more)
        )
        sheets.append(pixels(Image.open(folder / "validation.png")))
        card = (folder / "README.md").read_text()
        assert card.count("--input_image") == (k < 2) and "--height 64 --width 64" in card
        assert k == 2 or str(inputs[k]) in card
        assert "| seed | 0 |" in card and (k == 2 or "<img><\\|image_1\\|></img> as a dog |" in card)
    assert abs(sheets[0] - sheets[1]).max() >= 2
    for wrong, message in (
        ({"validation_image": ["x.png"]}, "cannot read the picture x.png"),
        ({"validation_image": [str(inputs[0])] * 2}, "comes with 2 input pictures"),
        ({"validation_image": [str(inputs[0])], "validation_prompt": None}, "needs a --validation_prompt"),
    ):
        with pytest.raises(UserError, match=message):
            train(train_options(models["omnigen"], photos, tmp_path / "wrong", resolution=64, **common | wrong))
        assert not (tmp_path / "wrong").exists()


def test_other_models_take_no_input_pictures(models, photos, tmp_path):
    asked = {"validation_prompt": "a cat", "validation_image": [str(photos / "0.png")]}
    with pytest.raises(UserError, match="StableDiffusionXLPipeline takes no input pictures"):
        train(train_options(models["sdxl"], photos, tmp_path / "out", **asked))
    drawing = {"prompt": ["a cat"], "input_image": [str(photos / "0.png")], "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="StableDiffusionXLPipeline takes no input pictures"):
        sample(SampleOptions(pretrained_model_name_or_path=models["sdxl"], **drawing))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family, limit, step", [("sd3", 384, 4), ("omnigen", 128, 16)])
def test_no_picture_is_larger_than_a_model_has_positions_for(family, limit, step, models, photos, tmp_path):
    asked = {"prompt": ["a cat"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=f"--resolution must be at most {limit}, all that the model has positions for"):
        train(train_options(models[family], photos, tmp_path / "out", resolution=limit + step))
    with pytest.raises(UserError, match=f"--resolution must be a positive multiple of {step}, got {limit - 1}"):
        train(train_options(models[family], photos, tmp_path / "out", resolution=limit - 1))
    for name in ("height", "width"):
        with pytest.raises(UserError, match=f"--{name} must be at most {limit}"):
            sample(SampleOptions(pretrained_model_name_or_path=models[family], **asked | {name: limit + step}))
    assert not (tmp_path / "out").exists()


def test_no_bucket_is_longer_than_a_model_has_positions_for(models, tmp_path, capsys):
    assert (144, 80) in data.buckets(112, 16)
    write_picture(tmp_path / "long.png", 4, (288, 160))
    train(train_options(models["omnigen"], tmp_path / "long.png", tmp_path / "out", resolution=112, max_train_steps=1))
    assert "at 128 x 96 pixels" in capsys.readouterr().out
