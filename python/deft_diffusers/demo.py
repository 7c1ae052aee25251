"""The whole way in a few minutes with no GPU: a real photograph, an adapter, pictures before and after, the base back."""

import hashlib
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

import deft_kernels as dk

from . import UserError
from .families import load_family
from .grid import grid
from .options import TrainOptions
from .sample import generate, load_adapters
from .train import complete, train

MODEL = "toyworld"
FACE = (65, 0, 365, 300)  # the cat's face in scikit-image's `chelsea`, a photograph by Stéfan van der Walt, CC0
PROMPT = "a photo of sks cat"
SCENES = ("in the snow", "on the beach", "in a forest")
MARK = ".deft-demo"  # in the output folder: what stands there may be replaced
PICTURES = 2  # of the subject alone, before and after
DRAW = {"num_inference_steps": 30, "guidance_scale": 2.0}
# One photograph that its subject fills says nothing about what the word for it means elsewhere. So the face is also cut
# out and put into scenes that the base model draws; those shown in the end (`SCENES`) are not among them.
PLACES = {
    "in a green field": "a photo of a lush green field",
    "in the city": "a photo of a city",
    "in a garden": "a photo of a garden",
    "in a street market": "a photo of a street market",
    "on a wooden table": "a photo of a wooden table",
    "near a pool": "a photo of a pool with palm trees",
    "in a futuristic city": "a photo of a futuristic city at night",
}
# What the base model draws for these is trained on as well, so that only the new word changes its meaning: DreamBooth's
# prior preservation (arXiv 2208.12242), with captions.
KEEP = ("a photo of a cat", "a photo of a kitten", "a photo of a dog", "a photo of a horse")
COPIES = 6  # of the photograph, among the others
VIEWS = 2  # of each place
KEEP_SEED = 1000  # apart from the seeds of the pictures to compare
# A drawn world is far from a photograph, so every layer takes part, not only attention.
LAYERS = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|time_emb_proj)"
ADAPTER = {
    "method": "deft",
    "decomposition_method": "qr",
    "rank": 16,
    "target_modules": LAYERS,
    "learning_rate": 3e-3,
    "learning_rate_P": 6e-4,
    "lr_scheduler": "cosine",
    "train_batch_size": 4,
}


def photograph():
    """The cat's face, a square PIL image."""
    try:
        from skimage import data
    except ImportError as error:
        raise UserError("deft demo takes its photograph from scikit-image: pip install scikit-image") from error
    return Image.fromarray(data.chelsea()).crop(FACE)


def cut_out(photo, scene, rng):
    """The face, an oval with a soft edge, in the lower middle of a scene."""
    side = int(rng.uniform(0.66, 0.72) * scene.width)
    x, y = (scene.width - side) // 2, scene.height - side - int(rng.uniform(0.04, 0.1) * scene.height)
    oval = Image.new("L", photo.size)
    ImageDraw.Draw(oval).ellipse((8, 2, photo.width - 8, photo.height - 2), fill=255)
    oval = oval.filter(ImageFilter.GaussianBlur(8))
    scene = scene.copy()
    scene.paste(photo.resize((side, side), Image.LANCZOS), (x, max(0, y)), oval.resize((side, side), Image.LANCZOS))
    return scene


def write_pictures(folder, photo, family):
    """The training folder: copies of the photograph, its cut-outs and what to keep, the latter two with their captions."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for k in range(COPIES):
        photo.save(folder / f"photo-{k}.png")
    places = [*PLACES.items()] * VIEWS
    jobs = [(prompt, KEEP_SEED + k) for k, prompt in enumerate([*(scene for _, scene in places), *KEEP])]
    images = list(generate(family, jobs, len(jobs), **DRAW))
    rng = np.random.default_rng(KEEP_SEED)
    captioned = [(f"{PROMPT} {place}", cut_out(photo, scene, rng)) for (place, _), scene in zip(places, images)]
    captioned += zip(KEEP, images[len(places) :])
    for k, (caption, image) in enumerate(captioned):
        image.save(folder / f"drawn-{k}.png")
        (folder / f"drawn-{k}.txt").write_text(caption + "\n")


def fingerprints(parameters):
    """sha256 of every tensor of a dict, by name."""
    return {
        name: hashlib.sha256(p.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, p in parameters.items()
    }


def serving() -> list[str]:
    """The backends that serve here, with the operations of each."""
    table: dict[str, list[str]] = {}
    for operation, row in dk.backends().items():
        table.setdefault(next(name for name, what in row.items() if what == "serves"), []).append(operation)
    return [name if len(table) == 1 else f"{name} ({', '.join(operations)})" for name, operations in table.items()]


def _digest(prints):
    return hashlib.sha256("".join(prints.values()).encode()).hexdigest()


def choose_threads(family):
    """Sets torch to one thread where that is faster: on busy or rationed cores more can be ten times slower."""
    seconds = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            family.generate([PROMPT], [0], num_inference_steps=2)
            seconds[threads] = time.perf_counter() - start
    torch.set_num_threads(min(seconds, key=seconds.get))


class Clock:
    """Adds up what each part took."""

    def __init__(self):
        self.rows = []

    @contextmanager
    def part(self, name):
        start = time.perf_counter()
        yield
        self.rows.append((name, time.perf_counter() - start))

    def table(self):
        rows = [*self.rows, ("total", sum(seconds for _, seconds in self.rows))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {seconds:8.2f} s" for name, seconds in rows)


def demo(options):
    """Runs `deft demo`: takes `DemoOptions`, writes `demo.png`, photograph and adapter, prints what took how long."""
    folder = Path(options.output_dir).expanduser()
    training = TrainOptions(
        pretrained_model_name_or_path=MODEL,
        instance_data_dir=str(folder / "pictures"),
        instance_prompt=PROMPT,
        output_dir=str(folder / "adapter"),
        overwrite_output_dir=True,
        max_train_steps=options.max_train_steps,
        seed=options.seed,
        **ADAPTER,
    )
    complete(training)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    if not (folder / MARK).is_file():
        taken = [name for name in ("pictures", "adapter", "demo.png") if (folder / name).exists()]
        if taken:
            raise UserError(f"{folder / taken[0]} is not this demonstration's; choose another --output_dir")
    clock = Clock()
    with clock.part("load the base model"):
        photo = photograph()
        family = load_family(MODEL, torch.float32)
    with clock.part("choose the threads"):
        choose_threads(family)

    jobs = [(PROMPT, options.seed + k) for k in range(PICTURES)]
    jobs += [(f"{PROMPT} {scene}", options.seed) for scene in SCENES]
    base = dict(family.model.named_parameters())  # merging writes into these very tensors, and unmerging puts them back
    pristine = fingerprints(base)
    with clock.part("draw before"):
        before = list(generate(family, jobs, len(jobs), **DRAW))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("made by `deft demo`, which replaces what stands beside this file\n")
    with clock.part("draw scenes to train on"):
        write_pictures(folder / "pictures", photo, family)
    note = (
        f"Trained on the photograph, on its face cut out and put into {len(PLACES)} other drawn places, and on "
        f"{len(KEEP)} drawings to keep; the three places shown here were not among them."
    )
    print(note)
    with clock.part("train"):
        adapter = train(training, family)
        dk.eject(family.model)
    with clock.part("load and merge the adapter"):
        load_adapters(family, [adapter])
    merged = fingerprints(base)
    with clock.part("draw after"):
        after = list(generate(family, jobs, len(jobs), **DRAW))
    with clock.part("unmerge"):
        dk.unmerge(family.model)
    restored = fingerprints(base)

    labels = ["the photograph", *[f"seed {seed}" for _, seed in jobs[:PICTURES]], *[f"… {scene}" for scene in SCENES]]
    page = grid([[photo, *before], [photo, *after]], labels, ["before", "after"], f"“{PROMPT}”", note)
    page.save(folder / "demo.png")
    print(f"\nbase parameters: {len(base)}; changed by the merge: {sum(pristine[n] != merged[n] for n in base)}")
    for name, prints in (("before", pristine), ("merged", merged), ("unmerged", restored)):
        print(f"  sha256 {name:<9} {_digest(prints)}")
    changed = [n for n in base if pristine[n] != restored[n]]
    if changed:
        raise RuntimeError(f"unmerging did not restore {len(changed)} base parameters, first {changed[0]}")
    print("the base model is back to the bit\n")
    print(f"kernels: {', '.join(serving())}")
    print(clock.table())
    print(f"\nlook at {folder / 'demo.png'}")
