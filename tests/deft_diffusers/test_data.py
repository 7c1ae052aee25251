"""Every kind of picture file becomes the RGB square that its author meant."""

import json
import re

import numpy as np
import pytest
from deft_diffusers import UserError, data
from PIL import Image


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def roundtrip(image, path, **save):
    image.save(path, **save)
    return data.read_image(path)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: left becomes top
    turned = pixels(roundtrip(image, tmp_path / "a.png", exif=exif))
    assert turned.shape == (40, 20, 3)
    assert (turned[:20] == (0, 0, 255)).all() and (turned[20:] == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode, tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((100, 100, 100, 255), (0, 0, 4, 8))
    got = pixels(roundtrip(image.convert(mode), tmp_path / "a.png"))
    assert (got[:, 4:] == 255).all() and (got[:, :4] == 100).all()


def test_half_transparent_is_blended_with_white(tmp_path):
    got = pixels(roundtrip(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), tmp_path / "a.png"))
    assert np.abs(got.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(suffix, tmp_path):
    values = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
    got = pixels(roundtrip(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert got[0, :, 0].tolist() == [0, 1, 128, 255] and (got[..., 0] == got[..., 2]).all()


def test_eight_bits_in_a_wide_mode_stay_as_they_are(tmp_path):
    values = np.array([[0, 100, 252]] * 3, np.int32)
    assert pixels(roundtrip(Image.fromarray(values), tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 100, 252]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(mode, tmp_path):
    got = pixels(roundtrip(Image.new("RGB", (6, 5), "white").convert(mode), tmp_path / "a.tif"))
    assert got.shape == (5, 6, 3) and got.min() >= 250


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (37, 37), (500, 41), (30, 20)])
@pytest.mark.parametrize("target", [(32, 32), (48, 24)])
def test_resizing_keeps_proportions_and_covers(size, target):
    covering = data.cover(Image.new("RGB", size), target)
    assert covering.width >= target[0] and covering.height >= target[1]
    assert covering.width == target[0] or covering.height == target[1]  # as small as can be
    assert abs(covering.width / covering.height - size[0] / size[1]) < 0.04 * size[0] / size[1]
    assert data.crop(covering, target).size == target


@pytest.mark.parametrize("resolution, multiple", [(64, 8), (512, 8), (1024, 16), (768, 64), (40, 8)])
def test_buckets(resolution, multiple):
    sizes = data.buckets(resolution, multiple)
    assert sizes[0] == (resolution, resolution) and len(set(sizes)) == len(sizes) > 2
    for w, h in sizes:
        assert w % multiple == h % multiple == 0 and (h, w) in sizes
        assert 0.5 <= w / h <= 2 and w * h <= resolution**2
    assert data.buckets(resolution, multiple, squares=True) == [(resolution, resolution)]


def test_a_picture_loses_little_to_its_bucket():
    sizes, lost = data.buckets(1024, 8), []
    for width, height in [(4000, 3000), (3000, 4000), (1920, 1080), (1000, 1000), (1500, 1000), (1200, 1500)]:
        w, h = data.bucket_of((width, height), sizes)
        whole = data.cover(Image.new("RGB", (width, height)), (w, h))
        lost.append(1 - w * h / (whole.width * whole.height))
    assert max(lost) < 0.05, lost
    assert data.bucket_of((9000, 1000), sizes)[0] / data.bucket_of((9000, 1000), sizes)[1] == pytest.approx(2, rel=0.1)


def test_crop_goes_where_it_is_told():
    ramp = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (20, 1, 3))
    image = Image.fromarray(ramp)
    column = lambda *where: np.asarray(data.crop(image, (20, 20), *where))[0, :, 0].tolist()
    assert column(0.0, 0.3) == list(range(20))
    assert column() == list(range(40, 60))
    assert column(1.0, 0.9) == list(range(80, 100))
    assert column(0.0, 0.5, True) == list(range(19, -1, -1))


def test_array_spans_minus_one_to_one():
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    array = data.to_array(image)
    assert array.shape == (3, 2, 3) and array.dtype == np.float32
    np.testing.assert_allclose(array[:, 0, 0], [-1, 1, -0.6], atol=1e-6)


def test_finding_pictures(tmp_path):
    for name in ("10.png", "2.PNG", "1.jpeg", "notes.txt", "._1.png"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    assert [p.name for p in data.find_pictures(tmp_path)] == ["1.jpeg", "2.PNG", "10.png"]
    assert data.find_pictures(tmp_path / "2.PNG") == [tmp_path / "2.PNG"]
    with pytest.raises(UserError, match="no such folder"):
        data.find_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="no pictures in"):
        data.find_pictures(tmp_path / "sub.png")


def test_captions(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a cat\n on a mat \n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("not for training")
    captions = lambda prompt=None: [(s.path.name, s.caption, s.repeats) for s in data.find_sources(tmp_path, prompt)]
    assert captions("a dog") == [("a.png", "a cat on a mat", 1), ("b.png", "a dog", 1), ("c.png", "a dog", 1)]
    assert "no pictures and are not used: notes.md\n" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"b\.png has no caption \(b\.txt or metadata\.jsonl\)"):
        captions()
    lines = [{"file_name": "c.png", "text": "a bird", "repeats": 3}, {"file_name": "b.png", "text": "a  fish"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert captions() == [("a.png", "a cat on a mat", 1), ("b.png", "a fish", 1), ("c.png", "a bird", 3)]
    lines[0] = {"file_name": "c.png", "subject": " sks  dog "}
    lines[1]["subject"] = "fish"
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    told = [(s.caption, s.subject) for s in data.find_sources(tmp_path, "a thing")]
    assert told == [("a cat on a mat", ""), ("a fish", "fish"), ("photo of a sks dog", "sks dog")]
    lines[0] = {"file_name": "c.png", "text": "a bird"}
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "a.txt").write_bytes("un café".encode("utf-8-sig"))
    assert captions()[0][1] == "un café"
    assert [s.caption for s in data.find_sources(tmp_path / "c.png")] == ["a bird"]  # one picture of many
    (tmp_path / "a.txt").write_bytes("un café".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*a\.txt as UTF-8 text"):
        captions()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "gone.txt").write_text("a ghost")
    with pytest.raises(UserError, match=r"texts of pictures that are not there: gone\.txt"):
        captions("a dog")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: expected"),
        ('["a.png"]', "line 2: expected"),
        ('{"text": "a cat"}', "line 2: expected"),
        ('{"file_name": "a.png", "text": 5}', "line 2: file_name, text and subject must be texts"),
        ('{"file_name": "a.png", "subject": ["dog"]}', "line 2: file_name, text and subject must be texts"),
        ('{"file_name": "a.png", "repeats": 0}', "repeats a number from 1 up"),
        ('{"file_name": "a.png", "repeats": true}', "repeats a number from 1 up"),
        ('{"file_name": "b.png"}', "line 2: b.png is there twice"),
        ('{"file_name": "ghost.png"}', "pictures that are not there: ghost.png"),
    ],
)
def test_bad_metadata(line, message, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a dog"}\n' + line)
    with pytest.raises(UserError, match=re.escape(message)):
        data.find_sources(tmp_path, "a cat")


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_unreadable_picture_is_named(content, tmp_path):
    path = tmp_path / "broken.png"
    if content is None:  # cut in the middle
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the picture .*broken\.png"):
        data.read_image(path)
