"""Says what a picture of the drawn world shows, and what a prompt asks for, so that a model's obedience can be counted.

A small convolutional network, trained by `train` on drawings, also blurred, noisy and as the autoencoder returns them.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from . import world

JUDGE_DIR = Path(__file__).resolve().parent / "judge"
WEIGHTS = "model.safetensors"
# what it says of a picture -> the answers, in the order of the network's outputs
ANSWERS = {
    "subject": (*world.CLASSES, None),
    "scene": tuple(world.SCENES),
    "style": tuple(world.STYLES),
    "colour": (*world.COLOURS, None),  # None: no colour that has a name, or a style that hides it
    "individual": (*world.INDIVIDUALS, None),
}
_WIDTHS = (24, 48, 72, 96)
_BATCH = 64


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.layers(x)


class Net(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] -> {name of `ANSWERS`: logits (N, number of answers)}."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for k, width in enumerate(_WIDTHS):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers += [_Block(width) for _ in range(min(k, 2))]
            before = width
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, before), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(2 * before, len(answers)) for name, answers in ANSWERS.items()})

    def forward(self, x):
        x = self.body(x)
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)  # scenes fill a picture, marks of a subject are small
        return {name: head(x) for name, head in self.heads.items()}


class Judge:
    """Calls a list of PIL pictures of any size and mode by what they show."""

    def __init__(self, net):
        self.net = net.eval()
        weights = b"".join(value.cpu().numpy().tobytes() for value in net.state_dict().values())
        self.sha256 = hashlib.sha256(weights).hexdigest()
        self.preprocessing = {"by": "the judge's own, PIL", "size": {"height": world.SIZE, "width": world.SIZE},
                              "resample": "lanczos", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip

    @torch.no_grad()
    def __call__(self, images):
        """A dict for each picture, of an answer for each of `ANSWERS`: names of the world, or None."""
        found = []
        device = next(self.net.parameters()).device
        for k in range(0, len(images), _BATCH):
            pixels = np.stack([np.asarray(_fit(image), np.float32) for image in images[k : k + _BATCH]])
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                logits = self.net(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1)
            places = {name: values.argmax(1).tolist() for name, values in logits.items()}
            for row in zip(*places.values()):
                found.append({name: ANSWERS[name][place] for name, place in zip(places, row)})
        for answer in found:  # nobody is an individual of another class
            if answer["individual"] and world.INDIVIDUALS[answer["individual"]].subject != answer["subject"]:
                answer["individual"] = None
        return found


def _fit(image):
    image = image.convert("RGB")
    return image if image.size == (world.SIZE, world.SIZE) else image.resize((world.SIZE, world.SIZE), Image.LANCZOS)


def load_judge(folder=JUDGE_DIR, device="cpu"):
    """The `Judge` whose weights are in `folder`, which computes in float32. FileNotFoundError without them."""
    net = Net()
    net.load_state_dict({name: value.float() for name, value in load_file(Path(folder) / WEIGHTS).items()})
    return Judge(net.to(device))


def _phrases():
    """{what is asked for: {phrase of a prompt: the answer}}."""
    bare = lambda text: re.sub(r"^an? ", "", text)
    return {
        "subject": {name: name for name in world.CLASSES},
        "scene": {p: name for name, (places, alone) in world.SCENES.items() for p in (*places, bare(alone))},
        "style": {bare(p).strip(): name for name, texts in world.STYLES.items() for p in (*texts, name) if p},
    }


_PHRASES = _phrases()


def asked(prompt):
    """What a prompt asks for: {"subject", "scene", "style"}, each the meaning of the longest phrase of the world's captions
    found in it; None where none is, and then "photo" for the style."""
    found = {}
    for what, phrases in _PHRASES.items():
        said = [phrase for phrase in phrases if re.search(rf"\b{phrase}\b", prompt, re.IGNORECASE)]
        found[what] = phrases[max(said, key=len)] if said else None
    return found | {"style": found["style"] or "photo"}
