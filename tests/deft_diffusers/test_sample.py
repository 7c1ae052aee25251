"""A picture depends on model, adapters, text, seed and settings, and on nothing else."""

import json

import numpy as np
import pytest
import torch
from deft_diffusers import UserError
from deft_diffusers.families import load_family
from deft_diffusers.grid import MARGIN, grid
from deft_diffusers.options import SampleOptions
from deft_diffusers.sample import sample
from PIL import Image

import deft_kernels as dk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def adapters(tiny, tmp_path_factory):
    """Two adapters that change the tiny model a lot: DEFT and LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {"deft": dk.DeftConfig(r=4, target_modules="all-linear"), "lora": dk.LoraConfig(r=4, target_modules=["to_v"])}
    for name, config in kinds.items():
        model = load_family(str(tiny), torch.float32).model
        torch.manual_seed(len(name))
        dk.inject_adapter(model, config)
        with torch.no_grad():
            for group in dk.adapter_parameters(model).values():
                for p in group:
                    p.add_(torch.randn_like(p))
        dk.save_adapter(model, folder / name)
    return {name: str(folder / name) for name in kinds}


@pytest.fixture
def draw(tiny, tmp_path):
    """Runs `sample` and returns its pictures as one int array (N, H, W, 3)."""

    def run(**changes):
        defaults = {
            "pretrained_model_name_or_path": str(tiny),
            "prompt": ["a cat", "a dog"],
            "num_inference_steps": 3,
            "num_images_per_prompt": 2,
            "output_dir": str(tmp_path / "out"),
            "overwrite_output_dir": True,
        }
        return np.stack([np.asarray(image, int) for image in sample(SampleOptions(**defaults | changes))])

    return run


def distance(a, b):
    return np.abs(a - b).max()


def test_pictures_are_written_labelled_and_on_record(draw, tmp_path):
    pictures = draw(seed=5, guidance_scale=3.0)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "0000.png",
        "0001.png",
        "0002.png",
        "0003.png",
        "grid.png",
        "samples.json",
    ]
    record = json.loads((out / "samples.json").read_text())
    assert [(s["prompt"], s["seed"]) for s in record["samples"]] == [("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)]
    assert record["settings"]["guidance_scale"] == 3.0 and record["settings"]["height"] == 32
    for row, entry in enumerate(record["samples"]):
        assert distance(np.asarray(Image.open(out / entry["file"]), int), pictures[row]) == 0
    assert Image.open(out / "grid.png").width > 2 * 192


def test_same_seed_same_picture_other_seed_another(draw):
    first = draw(seed=3)
    assert distance(first, draw(seed=3)) == 0
    assert distance(first[1], draw(seed=4)[0]) <= 1
    assert distance(first[0], first[1]) > 10


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_picture_does_not_depend_on_its_batch(batch_size, draw):
    together = draw(batch_size=4)
    assert distance(together, draw(batch_size=batch_size)) <= 1  # a rounding at most
    assert distance(together[2:], draw(prompt=["a dog"])) <= 1


def test_merged_and_unmerged_adapters_draw_the_same(draw, adapters):
    base, merged = draw(), draw(adapter=[adapters["deft"]])
    assert distance(base, merged) > 10
    assert distance(merged, draw(adapter=[adapters["deft"]], merge=False)) <= 2
    both = [adapters["deft"], adapters["lora"]]
    weights = [0.5, -0.7]
    mixed = draw(adapter=both, adapter_weight=weights)
    assert distance(mixed, draw(adapter=both, adapter_weight=weights, merge=False)) <= 2
    assert min(distance(mixed, base), distance(mixed, merged)) > 10


def test_an_adapter_from_the_hub(draw, adapters, monkeypatch, tmp_path):
    """Downloaded before the base is loaded; a folder of that name comes first."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or adapters["deft"])
    assert distance(draw(adapter=["owner/my-dog"]), draw(adapter=[adapters["deft"]])) == 0 and asked == ["owner/my-dog"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "my-dog").symlink_to(adapters["lora"])
    assert distance(draw(adapter=["owner/my-dog"]), draw(adapter=[adapters["lora"]])) == 0 and len(asked) == 1

    def fails(repo, **_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=r"no such adapter: there is no folder owner/my-cat(?s:.*)hf download owner/my-cat"):
        draw(adapter=["owner/my-cat"], pretrained_model_name_or_path="./nowhere")
    with pytest.raises(UserError, match="no such adapter: runs/my/cat does not exist: expected a folder with"):
        draw(adapter=["runs/my/cat"])


def test_weight_zero_is_the_base_model_and_one_the_default(draw, adapters):
    assert distance(draw(), draw(adapter=[adapters["lora"]], adapter_weight=[0.0])) == 0
    assert distance(draw(adapter=[adapters["lora"]]), draw(adapter=[adapters["lora"]], adapter_weight=[1.0])) == 0


def test_negative_prompt_guidance_size_and_dtype_matter(draw):
    plain = draw()
    assert distance(plain, draw(negative_prompt="x y z")) > 0
    assert distance(plain, draw(guidance_scale=1.0)) > 0
    assert draw(height=48).shape[1:] == (48, 32, 3)
    assert distance(plain, draw(dtype="bf16")) > 0


def test_texts_from_a_file(draw, tmp_path):
    (tmp_path / "texts").write_text("a cat\n\n  a dog  \n")
    assert distance(draw(), draw(prompt=[], prompts_file=str(tmp_path / "texts"))) == 0


def test_what_a_long_prompt_loses_is_named(draw, capsys):
    draw(prompt=["a b c d e f g hi"], num_images_per_prompt=1)
    assert "will not see: 'g hi'" in capsys.readouterr().err
    draw(prompt=["a b c d e f"], num_images_per_prompt=1)
    assert "warning" not in capsys.readouterr().err


def test_samples_are_not_overwritten_unasked(draw, tmp_path):
    draw()
    (tmp_path / "out" / "mine.png").write_text("keep")
    with pytest.raises(UserError, match="holds samples already"):
        draw(overwrite_output_dir=False)
    draw(prompt=["a cat"], num_images_per_prompt=1)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["0000.png", "grid.png", "mine.png"]


def test_a_stop_keeps_what_was_drawn(draw, tmp_path, monkeypatch):
    from deft_diffusers.families import StableDiffusion

    generate, calls = StableDiffusion.generate, []

    def stop_at_second(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        draw(batch_size=2)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [entry["file"] for entry in record["samples"]] == ["0000.png", "0001.png"]
    assert (tmp_path / "out" / "0001.png").exists() and not (tmp_path / "out" / "grid.png").exists()


def test_grid_places_pictures_and_labels():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 32), "blue")
    page = grid(
        [[red, None], [red, blue]], ["first", "a label that is longer than its cell"], ["above", "below"], "title", cell=100
    )
    pixels = np.asarray(page).astype(int)
    reds = (np.abs(pixels - (255, 0, 0)).sum(-1) == 0).sum()
    blues = (np.abs(pixels - (0, 0, 255)).sum(-1) == 0).sum()
    assert reds == 2 * 100 * 100 and blues == 100 * 50
    right = page.width - MARGIN - 50
    column = pixels[:, right]
    assert (column[page.height - MARGIN - 100 : page.height - MARGIN - 76] == 255).all()  # centred in its cell
    assert (pixels[:40].min(-1) < 100).any() and (pixels[page.height // 2 :, :40].min(-1) < 100).any()  # title and label
