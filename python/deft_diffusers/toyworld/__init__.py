"""The embedded base model: a tiny text-to-image pipeline in Stable Diffusion's format, and its drawn world.

`StableDiffusionPipeline.from_pretrained(MODEL_DIR)` loads it; `world` draws its data; `train` makes it again.
"""

from pathlib import Path

from .world import CLASSES, COLOURS, PATTERNS, SCENES, caption, draw, sample

MODEL_DIR = Path(__file__).resolve().parent / "model"

__all__ = ["CLASSES", "COLOURS", "MODEL_DIR", "PATTERNS", "SCENES", "caption", "draw", "sample"]
