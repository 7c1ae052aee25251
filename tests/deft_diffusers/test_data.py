"""Every kind of picture file becomes the RGB square that its author meant."""

import json
import re
import sys
import zlib
from types import SimpleNamespace

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
        ('{"file_name": "a.png", "text": 5}', "line 2: file_name and text must be texts"),
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


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "gif", "tif", "bmp"])
def test_unreadable_picture_is_named(content, suffix, tmp_path):
    path = tmp_path / f"broken.{suffix}"
    if content is None:  # cut in the middle
        Image.fromarray(NOISE).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read the picture .*broken\.{suffix}"):
        data.read_image(path)


@pytest.mark.parametrize("at", [4, 30, 60, 200, 260])
def test_damaged_picture_is_named_whatever_its_decoder_raises(at, tmp_path):
    """A TypeError, a RuntimeError … of PIL's."""
    Image.fromarray(NOISE).save(tmp_path / "a.avif")
    whole = bytearray((tmp_path / "a.avif").read_bytes())
    whole[at : at + 30] = bytes(30)
    (tmp_path / "a.avif").write_bytes(whole)
    with pytest.raises(UserError, match=r"cannot read the picture .*a\.avif"):
        data.read_image(tmp_path / "a.avif")


def test_the_first_frame_is_used_and_that_is_said(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "b.webp", "c.tiff", "d.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (pixels(data.read_image(tmp_path / name)) == (255, 0, 0)).all(), name
    frames[0].save(tmp_path / "e.jpg")
    frames[0].save(tmp_path / "phone.mpo", save_all=True, append_images=frames[1:])
    (tmp_path / "phone.mpo").rename(tmp_path / "phone.jpg")  # a still picture
    frames[0].convert("L").save(tmp_path / "still.gif")
    sources = data.find_sources(tmp_path, "a cat")
    data.check(sources)
    said = capsys.readouterr().err
    assert said == "of several frames or pages only the first is used: a.gif, b.webp, c.tiff, d.png\n"


def test_heic_needs_its_library(tmp_path, monkeypatch):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0 ftypheic")
    assert data.find_pictures(tmp_path) == [path]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"picture .*IMG_1.HEIC: pip install pillow-heif .*, or save it as PNG or JPEG"):
        data.read_image(path)
    asked = []
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: asked.append(1)))
    Image.new("RGB", (8, 8), "red").save(path, format="png")  # which stands in for what the library reads
    assert (pixels(data.read_image(path)) == (255, 0, 0)).all() and asked


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpegs_of_printers(mode, tmp_path):
    red = np.asarray(roundtrip(Image.new("RGB", (8, 8), (200, 30, 30)).convert(mode), tmp_path / "a.jpg", quality=95))
    assert np.abs(red.astype(int) - (200, 30, 30)).max() <= 3


def test_sixteen_bit_colours(tmp_path):
    """48 bits a pixel, which PIL reads as 24."""
    values = np.zeros((4, 4, 3), ">u2")
    values[..., 0], values[..., 1] = 65535, 32768
    raw = b"".join(b"\0" + row.tobytes() for row in values)
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = (4).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert pixels(data.read_image(tmp_path / "a.png"))[0, 0].tolist() == [255, 128, 0]


# folders -----------------------------------------------------------------------------------------------------------------


def test_folders_below_are_not_searched_and_that_is_said(tmp_path, capsys):
    for name in ("one", "two", ".hidden", "notes"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / ("a.txt.png" if name != "notes" else ".a.png"))
    with pytest.raises(UserError, match="no pictures in .* not searched, and there are pictures in one, two$"):
        data.find_sources(tmp_path, "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "top.png")
    line = {"file_name": "top.png", "text": "a cat", "input_images": ["one/a.txt.png"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert len(data.find_sources(tmp_path)) == 1
    assert capsys.readouterr().err == f"{tmp_path} has folders of pictures, which are not searched: two\n"
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line | {"file_name": "two/a.txt.png"}))
    with pytest.raises(UserError, match="not there, or lie in folders below, which are not searched: two/a.txt.png"):
        data.find_sources(tmp_path, "a cat")


def test_names_of_all_kinds(tmp_path):
    outside = tmp_path / "outside.png"
    folder = tmp_path / "my photos, été"
    folder.mkdir()
    for path in (outside, folder / "ein Hündchen 1.PNG", folder / "a.b.JPG", folder / "犬.jpeg"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "link.png").symlink_to(outside)
    (folder / "a.b.txt").write_text("two dots")
    (folder / "犬.txt").write_text("一匹の犬")
    (folder / ".DS_Store").touch()
    found = {s.path.name: s.caption for s in data.find_sources(folder, "a cat")}
    assert found == {"a.b.JPG": "two dots", "ein Hündchen 1.PNG": "a cat", "link.png": "a cat", "犬.jpeg": "一匹の犬"}
    data.check(data.find_sources(folder, "a cat"))
    outside.unlink()
    with pytest.raises(UserError, match=r"cannot read the picture .*link\.png"):
        data.check(data.find_sources(folder, "a cat"))


def test_two_pictures_of_one_name(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(data.find_sources(tmp_path, "a cat")) == 3
    (tmp_path / "a.txt").write_text("which?")
    with pytest.raises(UserError, match=r"a\.txt would be the caption of a\.jpg and a\.png: give each a name of its own"):
        data.find_sources(tmp_path, "a cat")


def test_what_fits_badly_is_said(tmp_path, capsys):
    sizes = {"small": (24, 40), "fine": (64, 64), "panorama": (640, 64), "tower": (64, 130), "phone": (64, 86)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    sources = data.find_sources(tmp_path, "a cat")
    pictures = [data.load(source, data.buckets(64, 8)) for source in sources]
    data.warn_of_fit(sources, pictures, whole=False)
    small, cut = capsys.readouterr().err.splitlines()
    assert small == "warning: pictures smaller than they are trained at are scaled up: small.png (24 x 40 to 48 x 80)"
    assert "but their middle is cut off: panorama.png (17% kept)" in cut and cut.count("%") == 1
    squares = [data.load(source, [(64, 64)]) for source in sources]
    data.warn_of_fit(sources, squares, whole=False)
    assert capsys.readouterr().err.count("% kept)") == 3
    data.warn_of_fit(sources, squares, whole=True)
    assert "kept" not in capsys.readouterr().err
