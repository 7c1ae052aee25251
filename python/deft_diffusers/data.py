"""Pictures and captions from a folder: whatever their kind and shape, they become undistorted RGB of a few sizes."""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import UserError, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
METADATA = "metadata.jsonl"  # of Hugging Face's image folders: one {"file_name": ..., "text": ...} a line
MOST_ELONGATED = 2.0  # sides of the longest bucket; what is longer is cropped to it


@dataclass
class Source:
    """A picture file and what is said of it."""

    path: Path
    caption: str
    repeats: int = 1  # how often it is seen for once that others are
    inputs: tuple[Path, ...] = ()  # pictures that the text speaks of
    subject: str = ""  # whom it shows, in the words of the text; of a folder with several subjects


@dataclass
class Picture:
    """A training picture: RGB that covers `size` (width, height), and the text that goes with it."""

    image: Image.Image
    caption: str
    size: tuple[int, int]
    inputs: tuple[Image.Image, ...] = ()  # RGB, of any size; the text speaks of them
    subject: str = ""


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


def buckets(resolution, multiple, squares=False):
    """Sizes (width, height) of about resolution² pixels, from twice as high as wide to twice as wide as high, in steps of a
    sixteenth of the resolution that `multiple` divides; only the square one if `squares`."""
    step = max(multiple, resolution // 16 // multiple * multiple)
    sides = range(step, math.ceil(resolution * MOST_ELONGATED**0.5) + 1, step)
    sizes = [(w, resolution**2 // w // step * step) for w in sides]
    sizes += [(h, w) for w, h in sizes]
    sizes = {(w, h) for w, h in sizes if h and 1 / MOST_ELONGATED <= w / h <= MOST_ELONGATED and w != h}
    return [(resolution, resolution), *([] if squares else sorted(sizes))]


def bucket_of(size, sizes):
    """The bucket whose proportions are nearest to those of a picture of this size."""
    return min(sizes, key=lambda bucket: abs(math.log(bucket[0] / bucket[1] * size[1] / size[0])))


def cover(image, size):
    """The picture as small as it still covers `size`, its proportions kept."""
    scale = max(side / own for side, own in zip(size, image.size))
    scaled = [max(side, round(own * scale)) for side, own in zip(size, image.size)]
    return image if list(image.size) == scaled else image.resize(scaled, Image.LANCZOS)


def crop(image, size, u=0.5, v=0.5, mirror=False):
    """A part of this size; (u, v) in [0, 1] place it, (½, ½) in the middle."""
    left, top = (round(t * (own - side)) for t, own, side in zip((u, v), image.size, size))
    image = image.crop((left, top, left + size[0], top + size[1]))
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


def find_sources(path, prompt=None):
    """The pictures of a folder (or the one file given) with their texts.

    A text comes from the .txt file beside the picture, else from `metadata.jsonl` (keys `file_name`, `text` and, if wanted,
    `repeats`, `subject`, and `input_images`, paths from the folder), else "photo of a <subject>", else it is `prompt`. Files
    that are neither are named on stderr.
    UserError names pictures without a text, and texts without a picture.
    """
    paths = find_pictures(path)
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    said = _read_metadata(folder / METADATA)
    sources = []
    for picture in paths:
        beside, entry = picture.with_suffix(".txt"), said.pop(picture.name, {})
        text = " ".join(read_text(beside).split()) if beside.is_file() else ""
        subject = " ".join(entry.get("subject", "").split())
        text = text or " ".join(entry.get("text", "").split()) or (f"photo of a {subject}" if subject else prompt)
        if not text:
            raise UserError(f"{picture} has no caption ({beside.name} or {METADATA}) and there is no --instance_prompt")
        inputs = tuple(folder / name for name in entry.get("input_images", ()))
        sources.append(Source(picture, text, entry.get("repeats", 1), inputs, subject))
    if folder == Path(path).expanduser():
        stems = {p.stem for p in paths}
        others = [p for p in sorted(folder.iterdir()) if p.is_file() and p not in paths and p.name[0] != "."]
        lost = [p.name for p in others if p.suffix == ".txt" and p.stem not in stems] + list(said)
        if lost:
            raise UserError(f"{folder} has texts of pictures that are not there: {_some(lost)}")
        ignored = [p.name for p in others if p.suffix != ".txt" and p.name != METADATA]
        if ignored:
            print(f"{folder} has files that are no pictures and are not used: {_some(ignored)}", file=sys.stderr)
    return sources


def _some(names, limit=8):
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_metadata(file):
    """{file name: entry} of a metadata.jsonl; empty if there is none."""
    said = {}
    for number, line in enumerate(read_text(file).splitlines() if file.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text, repeats = entry["file_name"], entry.get("text", ""), entry.get("repeats", 1)
            inputs, subject = entry.get("input_images", []), entry.get("subject", "")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'{file}, line {number}: expected {{"file_name": ..., "text": ...}}') from error
        if not (all(isinstance(t, str) for t in (name, text, subject)) and type(repeats) is int and repeats >= 1):
            raise UserError(f"{file}, line {number}: file_name, text and subject must be texts, repeats a number from 1 up")
        if not (isinstance(inputs, list) and all(isinstance(path, str) for path in inputs)):
            raise UserError(f"{file}, line {number}: input_images must be a list of paths")
        if name in said:
            raise UserError(f"{file}, line {number}: {name} is there twice")
        said[name] = entry
    return said


def read_image(path):
    """The picture in RGB; UserError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error


def load(source, sizes):
    """The picture of a source, scaled to cover the best of `sizes`."""
    image = read_image(source.path)
    size = bucket_of(image.size, sizes)
    return Picture(cover(image, size), source.caption, size, tuple(map(read_image, source.inputs)), source.subject)
