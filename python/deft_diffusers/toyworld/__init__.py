"""The embedded base model: a tiny text-to-image pipeline in Stable Diffusion's format, its drawn world, what looks at it.

`StableDiffusionPipeline.from_pretrained(MODEL_DIR)` loads it; `world` draws its data; `judge` says what a picture shows;
`train` makes all of it again.
"""

from pathlib import Path

from .world import CLASSES, COLOURS, PATTERNS, SCENES, caption, draw, sample

MODEL_DIR = Path(__file__).resolve().parent / "model"

__all__ = ["CLASSES", "COLOURS", "MODEL_DIR", "PATTERNS", "SCENES", "caption", "draw", "sample"]
