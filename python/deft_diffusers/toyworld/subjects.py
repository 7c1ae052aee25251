"""Writes the individuals of the drawn world, five pictures of each, in the layout of the DreamBooth data set.

    python -m deft_diffusers.toyworld.subjects --output_dir subjects

The embedded model has never seen any of them. A picture of `church_rock`, a place, has a caption of its own beside it.
"""

import argparse
from pathlib import Path

import numpy as np

from .world import INDIVIDUALS, SCENES, draw_individual

PLACES = ("field", "city", "table", "pool", "market")  # where they are seen; the others are left to be asked for
TOLD = ("church_rock",)  # by captions
TOKEN = "sks"


def write_subjects(folder):
    """`<folder>/<name>/0.png` … and `prompts_and_classes.txt`; the same pictures each time. Returns the folder."""
    folder = Path(folder).expanduser()
    listing = ["Classes", "subject_name,class"]
    for number, (name, one) in enumerate(INDIVIDUALS.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k, scene in enumerate(PLACES):
            draw_individual(name, scene, np.random.default_rng((number, k))).save(folder / name / f"{k}.png")
            if name in TOLD:
                text = f"a photo of {TOKEN} {one.subject} {SCENES[scene][0][0]}\n"
                (folder / name / f"{k}.txt").write_text(text)
        listing.append(f"{name},{one.subject}")
    (folder / "prompts_and_classes.txt").write_text("\n".join(listing) + "\n")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", required=True, metavar="DIR")
    print(write_subjects(parser.parse_args().output_dir))
