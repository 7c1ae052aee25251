"""Pictures and captions from a folder: whatever their kind and shape, they become undistorted RGB of a few sizes."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import UserError, read_text

HEIF = (".heic", ".heif")  # read where pillow-heif is
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", *HEIF)
METADATA = "metadata.jsonl"  # of Hugging Face's image folders: one {"file_name": ..., "text": ...} a line
MOST_ELONGATED = 2.0  # sides of the longest bucket; what is longer is cropped to it
KEPT = 2 / 3  # of a picture; where its crop keeps less, that is said


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
    original: tuple[int, int] | None = None  # size before it was scaled; None: as it is
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


def corner(own, size, u=0.5, v=0.5):
    """(left, top) of a part of this size in a picture whose own size is `own`; (u, v) in [0, 1] place it, (½, ½) in the
    middle."""
    return tuple(round(t * (whole - side)) for t, whole, side in zip((u, v), own, size))


def crop(image, size, u=0.5, v=0.5, mirror=False):
    """The part of this size at `corner`."""
    left, top = corner(image.size, size, u, v)
    image = image.crop((left, top, left + size[0], top + size[1]))
    return ImageOps.mirror(image) if mirror else image


def to_array(image):
    """(3, H, W) float32 in [−1, 1]."""
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def _pictures_in(folder):
    # a link that leads nowhere is one that cannot be read
    found = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
    return [p for p in found if p.is_file() or (p.is_symlink() and not p.exists())]


def _folders_of_pictures(folder):
    return [p.name for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "." and _pictures_in(p)]


def natural(name):
    """What names are sorted by: 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def find_pictures(path):
    """The picture files of a folder in natural order (2 before 10), or the one file given. UserError if there is none."""
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no such folder or file of pictures: {path}")
    found = _pictures_in(path)
    if not found:
        below = _folders_of_pictures(path)
        where = f"; folders below are not searched, and there are pictures in {_some(below)}" if below else ""
        raise UserError(f"no pictures in {path}: expected files ending in {' '.join(SUFFIXES)}{where}")
    return sorted(found, key=lambda picture: natural(picture.name))


def find_sources(path, prompt=None):
    """The pictures of a folder (or the one file given) with their texts.

    A text comes from the .txt file beside the picture, else from `metadata.jsonl` (keys `file_name`, `text` and, if wanted,
    `repeats`, `subject`, and `input_images`, paths from the folder), else "photo of a <subject>", else it is `prompt`. Files
    that are neither are named on stderr, and folders of pictures, which are not searched. UserError names pictures without
    a text, texts without a picture, and pictures that share a .txt file.
    """
    paths = find_pictures(path)
    for text, count in Counter(picture.with_suffix(".txt") for picture in paths).items():
        if count > 1 and text.is_file():
            shared = [picture.name for picture in paths if picture.with_suffix(".txt") == text]
            raise UserError(f"{text} would be the caption of {' and '.join(shared)}: give each a name of its own")
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
            below = ", or lie in folders below, which are not searched" if any("/" in name for name in lost) else ""
            raise UserError(f"{folder} has texts of pictures that are not there{below}: {_some(lost)}")
        ignored = [p.name for p in others if p.suffix != ".txt" and p.name != METADATA]
        if ignored:
            print(f"{folder} has files that are no pictures and are not used: {_some(ignored)}", file=sys.stderr)
        used = {path.parent for source in sources for path in source.inputs}
        below = [name for name in _folders_of_pictures(folder) if folder / name not in used]
        if below:
            print(f"{folder} has folders of pictures, which are not searched: {_some(below)}", file=sys.stderr)
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


def _read(path):
    """The picture in RGB, and its number of frames or pages."""
    path = Path(path).expanduser()
    if path.suffix.lower() in HEIF:
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise UserError(
                f"cannot read the picture {path}: pip install pillow-heif ({error}), or save it as PNG or JPEG"
            ) from error
        register_heif_opener()
    try:
        with Image.open(path) as image:
            image.load()
            # the second picture in a phone's JPEG is a thumbnail, or how far away things are
            return to_rgb(image), 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # PIL's decoders raise many kinds of error for a damaged file
        reason = str(error).replace(repr(str(path)), "").rstrip(": ")  # which most of them name again
        raise UserError(f"cannot read the picture {path}: {reason}") from error


def read_image(path):
    """The picture in RGB, the first of several frames or pages; UserError names a file that cannot be read."""
    return _read(path)[0]


def check(sources):
    """Reads all pictures, one at a time: UserError names one that cannot be read. Says on stderr what has several frames."""
    paths = dict.fromkeys(path for source in sources for path in (source.path, *source.inputs))
    several = [path.name for path in paths if _read(path)[1] > 1]
    if several:
        print(f"of several frames or pages only the first is used: {_some(several)}", file=sys.stderr)


def warn_of_fit(sources, pictures, whole):
    """Says on stderr which pictures are scaled up, and, unless their `whole` is seen in time by crops at random, of which
    much is cut off."""
    named = [(source.path.name, picture) for source, picture in zip(sources, pictures)]
    show = "{} ({} x {} to {} x {})".format
    small = [show(name, *p.original, *p.size) for name, p in named if min(p.image.size) > min(p.original)]
    if small:
        print(f"warning: pictures smaller than they are trained at are scaled up: {_some(small)}", file=sys.stderr)
    parts = [(name, math.prod(p.size) / math.prod(p.image.size)) for name, p in named]
    cut = [f"{name} ({part:.0%} kept)" for name, part in parts if part < KEPT]
    if cut and not whole:
        print(f"warning: of some pictures much but their middle is cut off: {_some(cut)}", file=sys.stderr)


def load(source, sizes):
    """The picture of a source, scaled to cover the best of `sizes`."""
    image = read_image(source.path)
    size = bucket_of(image.size, sizes)
    inputs = tuple(read_image(path) for path in source.inputs)
    return Picture(cover(image, size), source.caption, size, inputs, image.size, source.subject)
