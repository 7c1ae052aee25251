"""The whole way in a few minutes with no GPU: a real photograph, an adapter, pictures before and after, the base back."""

import hashlib
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

import deft_kernels as dk

from . import UserError
from .families import load_family
from .grid import grid
from .options import TrainOptions
from .sample import generate, load_adapters
from .train import check_options, train

MODEL = "toyworld"
FACE = (65, 0, 365, 300)  # the cat's face in scikit-image's `chelsea`, a photograph by Stéfan van der Walt, CC0
PROMPT = "a photo of sks cat"
SCENES = ("in the snow", "on the beach", "in a forest")
PICTURES = 2  # of the subject alone, before and after
DRAW = {"num_inference_steps": 30, "guidance_scale": 4.0}
ADAPTER = {"method": "deft", "decomposition_method": "qr", "rank": 16, "learning_rate": 2e-3, "train_batch_size": 4}


def photograph():
    """The cat's face, a square PIL image."""
    try:
        from skimage import data
    except ImportError as error:
        raise UserError("deft demo takes its photograph from scikit-image: pip install scikit-image") from error
    return Image.fromarray(data.chelsea()).crop(FACE)


def fingerprints(parameters):
    """sha256 of every parameter of a dict, by name."""
    return {
        name: hashlib.sha256(p.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, p in parameters.items()
    }


def _digest(prints):
    return hashlib.sha256("".join(prints.values()).encode()).hexdigest()


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
        instance_data_dir=str(folder / "photo.png"),
        instance_prompt=PROMPT,
        output_dir=str(folder / "adapter"),
        overwrite_output_dir=True,
        max_train_steps=options.max_train_steps,
        seed=options.seed,
        **ADAPTER,
    )
    check_options(training)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    clock = Clock()
    with clock.part("load the base model"):
        photo = photograph()
        family = load_family(MODEL, torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    photo.save(folder / "photo.png")

    jobs = [(PROMPT, options.seed + k) for k in range(PICTURES)]
    jobs += [(f"{PROMPT} {scene}", options.seed) for scene in SCENES]
    base = dict(family.model.named_parameters())  # merging writes into these very tensors, and unmerging puts them back
    pristine = fingerprints(base)
    with clock.part("draw before"):
        before = list(generate(family, jobs, len(jobs), **DRAW))

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
    page = grid([[photo, *before], [photo, *after]], labels, ["before", "after"], f"“{PROMPT}”", cell=192)
    page.save(folder / "demo.png")
    print(f"\nbase parameters: {len(base)}; changed by the merge: {sum(pristine[n] != merged[n] for n in base)}")
    for name, prints in (("before", pristine), ("merged", merged), ("unmerged", restored)):
        print(f"  sha256 {name:<9} {_digest(prints)}")
    changed = [n for n in base if pristine[n] != restored[n]]
    if changed:
        raise RuntimeError(f"unmerging did not restore {len(changed)} base parameters, first {changed[0]}")
    print("the base model is back to the bit\n")
    print(clock.table())
    print(f"\nlook at {folder / 'demo.png'}")
