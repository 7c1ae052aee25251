"""Pictures and captions from a folder: whatever their kind and shape, they become undistorted RGB squares."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import UserError, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Picture:
    """A training picture: RGB, its shorter side at the training resolution, and the text that goes with it."""

    path: Path
    image: Image.Image
    caption: str


def to_rgb(image):
    """RGB as it is meant to be seen: turned by its EXIF orientation, transparent parts on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # PIL's own conversion clips these at 255 instead of scaling.
        values = np.asarray(image).astype(np.float64)
        brightest = values.max()
        white = 1 if image.mode == "F" and brightest <= 1 else 255 if image.mode in "IF" and brightest <= 255 else 65535
        image = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def shrink(image, resolution):
    """The picture with its shorter side at `resolution` pixels, its proportions kept."""
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    return image if list(image.size) == size else image.resize(size, Image.LANCZOS)


def square(image, u=0.5, v=0.5, mirror=False):
    """A square as large as the shorter side; (u, v) in [0, 1] place it, (½, ½) in the middle."""
    side = min(image.size)
    left, top = round(u * (image.width - side)), round(v * (image.height - side))
    image = image.crop((left, top, left + side, top + side))
    return ImageOps.mirror(image) if mirror else image


def to_array(image):
    """(3, H, W) float32 in [−1, 1]."""
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def find_pictures(path):
    """The picture files of a folder in natural order (2 before 10), or the one file given. UserError if there is none."""
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no such folder or file of pictures: {path}")
    found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not found:
        raise UserError(f"no pictures in {path}: expected files ending in {' '.join(SUFFIXES)}")
    return sorted(found, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.name.lower())])


def read_captions(paths, prompt=None):
    """Text of each picture: of the .txt file beside it, else `prompt`. UserError names a picture that has neither."""
    captions = []
    for path in paths:
        beside = path.with_suffix(".txt")
        text = " ".join(read_text(beside).split()) if beside.is_file() else ""
        if not (text or prompt):
            raise UserError(f"{path} has no caption ({beside.name}) and there is no --instance_prompt")
        captions.append(text or prompt)
    return captions


def read_image(path):
    """The picture in RGB; UserError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error
