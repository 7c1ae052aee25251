"""Writes the individuals of the drawn world as DreamBooth's data set is laid out, five pictures of each, or DreamBench++'s.

    python -m deft_diffusers.toyworld.subjects --output_dir subjects
    python -m deft_diffusers.toyworld.subjects --output_dir plus --layout dreambench++

The embedded model has never seen any of them. A picture of a place (`church_rock`, `table`) has a caption of its own.
"""

import argparse
from pathlib import Path

import numpy as np

from .world import INDIVIDUALS, SCENES, STYLES, draw_individual, draw_table, table_caption

PLACES = ("field", "city", "table", "pool", "market")  # where they are seen; the others are left to be asked for
TOLD = ("church_rock",)  # by captions
TABLE, TABLE_CLASS = "table", "wooden table"
BOTTLES = (
    ("red", "white"),
    (None, "blue"),
    ("orange", "black"),
    ("green", "yellow"),
    (None, "red"),
)  # filling and cap, on it
PLUS = ("kitten", "stork", "kitten_2", "horse")  # DreamBench++'s live_subject/animal/00 to 03, one picture each
TOKEN = "sks"
DRAWN = {style: texts[0].strip() for style, texts in STYLES.items()}  # "a photo of" …


def _number(name):
    """Of its random generators."""
    return list(INDIVIDUALS).index(name)


def prompts(live):
    """DreamBooth's 25 prompts, for live subjects or for objects, of what this world can draw; with {0} for the token and
    {1} for the class."""
    found = [f"a {{0}} {{1}} {places[0]}" for places, _ in SCENES.values()]
    places = ("in the snow", "on the beach", "in a forest")
    found += [f"{text} a {{0}} {{1}} {place}" for style, text in DRAWN.items() if style != "photo" for place in places]
    if live:
        return found + [
            f"a {{0}} {{1}} {place}" for place in ("in a cityscape", "in the mountains", "near a pool", "indoors")
        ]
    return found + [f"a {look} {{0}} {{1}}" for look in ("red", "blue", "striped", "spotted")]


def write_subjects(folder):
    """DreamBooth's layout: `<folder>/<name>/0.png` … and `prompts_and_classes.txt`; the same pictures each time. Returns the
    folder."""
    folder = Path(folder).expanduser()
    classes = {name: one.subject for name, one in INDIVIDUALS.items()} | {TABLE: TABLE_CLASS}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, one in INDIVIDUALS.items():
        for k, scene in enumerate(PLACES):
            draw_individual(name, scene, np.random.default_rng((_number(name), k))).save(folder / name / f"{k}.png")
            if name in TOLD:
                text = f"a photo of {TOKEN} {one.subject} {SCENES[scene][0][0]}\n"
                (folder / name / f"{k}.txt").write_text(text)
    for k, (colour, cap) in enumerate(BOTTLES):
        draw_table(colour, cap, np.random.default_rng((len(INDIVIDUALS), k))).save(folder / TABLE / f"{k}.png")
        (folder / TABLE / f"{k}.txt").write_text(table_caption(TOKEN, colour, cap) + "\n")
    lines = ["Classes", "", "subject_name,class", *(f"{name},{kind}" for name, kind in classes.items()), "", "Prompts", ""]
    for title, live in (("Object Prompts", False), ("Live Subject Prompts", True)):
        listed = ",\n".join(f"'{text}'.format(unique_token, class_token)" for text in prompts(live))
        lines += [title, "", "prompt_list = [", listed, "]", ""]
    (folder / "prompts_and_classes.txt").write_text("\n".join(lines))
    return folder


def write_plus(folder):
    """DreamBench++'s layout: `images/live_subject/animal/NN.png`, the first of `write_subjects`, and in `captions/` a text:
    the subject, then nine prompts: four photographs, three styles, two that are imaginative. Returns the folder."""
    folder = Path(folder).expanduser()
    images, captions = (folder / kind / "live_subject" / "animal" for kind in ("images", "captions"))
    for path in (images, captions):
        path.mkdir(parents=True, exist_ok=True)
    asked = [scene for scene in SCENES if scene not in PLACES]
    for number, name in enumerate(PLUS):
        kind = INDIVIDUALS[name].subject
        draw_individual(name, PLACES[0], np.random.default_rng((_number(name), 0))).save(images / f"{number:02d}.png")
        where = [SCENES[asked[(number + k) % len(asked)]][0][0] for k in range(7)]
        lines = [kind, *(f"{DRAWN['photo']} a {kind} {place}" for place in where[:4])]
        lines += [f"{DRAWN[s]} a {kind} {place}" for s, place in zip(("abstract", "fantasy", "historical"), where[4:])]
        lines += [f"an abstract picture of a {kind} in a futuristic city at night"]
        lines += [f"a fantasy picture of a {kind} by a pool with palm trees"]
        (captions / f"{number:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


LAYOUTS = {"dreambooth": write_subjects, "dreambench++": write_plus}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", required=True, metavar="DIR")
    parser.add_argument("--layout", choices=LAYOUTS, default="dreambooth")
    args = parser.parse_args()
    print(LAYOUTS[args.layout](args.output_dir))
