"""The encoders that pictures and prompts are compared by: CLIP, DINO and DINOv2, in fp32.

Each protocol says how a picture is prepared (DreamBench++'s `metrics/`): CLIP's and DINOv2's by the model's own processor,
DINO's by the transform that its authors evaluate with. All of it is done by PIL, whether or not torchvision is there, which
would round otherwise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from .. import UserError, data
from ..cache import Cache, digest_of
from ..samples import bytes_of
from .protocols import DREAMBENCH_PLUS, DREAMBOOTH, scale_of

NAMES = ("clip", "dinov1", "dinov2")
# DINO is the ViT-S/16 of DreamBooth's paper (arXiv 2208.12242), which does not tell its CLIP and is older than DINOv2, or
# the ViT-S/8 of DreamBench++. That has it from torch.hub, where its code needs torchvision: the models of these ids have the
# same weights, are shown the same pixels here, and need transformers alone.
DEFAULTS = {
    DREAMBOOTH: ("openai/clip-vit-base-patch32", "facebook/dino-vits16", "facebook/dinov2-small"),
    DREAMBENCH_PLUS: ("openai/clip-vit-base-patch32", "facebook/dino-vits8", "facebook/dinov2-small"),
}
EMBEDDED = Path(__file__).resolve().parent.parent / "toyworld" / "encoders"
TORCHHUB, NONE, TOYWORLD = "torchhub:", "none", "toyworld"
# DINO's evaluation: the shorter side to 256, 224 of the middle, ImageNet's mean and deviation. Its models know 224 alone.
RESIZE, CROP = 256, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAID = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
        "image_mean", "image_std")  # fmt: skip


def dino_transform(image):
    """(3, 224, 224) float32 of an RGB picture: torchvision's Resize(256, BICUBIC), CenterCrop(224), ToTensor and Normalize
    of a PIL image, without torchvision."""
    short, long = sorted(image.size)
    if short != RESIZE:
        other = int(RESIZE * long / short)
        image = image.resize((RESIZE, other) if image.width <= image.height else (other, RESIZE), Image.BICUBIC)
    pixels = np.asarray(data.crop(image, (CROP, CROP)), np.float32) / 255
    return torch.from_numpy((pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).permute(2, 0, 1)


class Encoder:
    """A model that makes unit vectors of pictures and, where it is CLIP, of texts.

    `name` is what it serves as ("clip", "dinov1", "dinov2"), `id` what it was asked for by. `calls` counts batches that went
    through the model: none where all was found in the cache.
    """

    def __init__(self, name, id, model, prepare, preprocessing, tokenizer=None, *, device="cpu", batch_size=32,
                 cache_dir=None):  # fmt: skip
        self.name, self.id, self.preprocessing = name, id, preprocessing
        self.model = model.eval().float().requires_grad_(False)
        self.sha256 = digest_of(self.model).hex()
        kind = f"features {json.dumps(preprocessing, sort_keys=True)}"
        self.cache = cache_dir and Cache(cache_dir, kind, [self.model], [tokenizer] if tokenizer else [])
        self.model.to(device)
        self.prepare, self.tokenizer, self.device = prepare, tokenizer, device
        self.batch_size, self.calls = batch_size, 0

    @property
    def facts(self):
        """What a score must be told with."""
        return {"id": self.id, "revision_or_sha256": self.sha256, "preprocessing": self.preprocessing}

    def images(self, images):
        """(n, d) float32 on the CPU: the unit feature of each PIL picture in RGB; NaN where the model gives NaN."""
        return self._features(images, [b"picture " + bytes_of(image) for image in images], self._encode_images)

    def texts(self, texts):
        """The same of texts, cut where the model's context ends. Only CLIP."""
        return self._features(texts, [b"text " + text.encode() for text in texts], self._encode_texts)

    def cut_text(self, text):
        """Whether the end of a text is beyond the model's context."""
        return len(self.tokenizer(text)["input_ids"]) > self.model.config.text_config.max_position_embeddings

    def _features(self, things, sources, encode):
        kept = self.cache if self.cache is not None else ()
        new, made = {source: thing for source, thing in zip(sources, things) if source not in kept}, {}
        for start in range(0, len(new), self.batch_size):
            part = list(new)[start : start + self.batch_size]
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = torch.nn.functional.normalize(encode([new[source] for source in part]).float(), dim=-1).cpu()
            self.calls += 1
            made |= zip(part, found)
        rows = []
        for source in sources:
            row = made.get(source)
            if self.cache is not None and (row is None or row.isfinite().all()):  # no NaN outlives what was wrong
                row = self.cache.get(source, lambda row=row: {"feature": row})["feature"]
            rows.append(row)
        return torch.stack(rows) if rows else torch.zeros(0, 0)

    def _encode_images(self, images):
        pixels = torch.stack([self.prepare(image) for image in images]).to(self.device)
        if self.name == "clip":
            return self.model.get_image_features(pixel_values=pixels).pooler_output
        found = self.model(pixels)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state[:, 0]  # torch.hub's; CLS, normed

    def _encode_texts(self, texts):
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output


@dataclass
class Encoders:
    """Those that score: any may be missing, and its scores then are. `judge` looks at pictures of the drawn world."""

    clip: Encoder | None = None
    dinov1: Encoder | None = None
    dinov2: Encoder | None = None
    judge: object = None

    @property
    def present(self):
        return {name: encoder for name in NAMES if (encoder := getattr(self, name))}

    @property
    def facts(self):
        """What scores must be told with: of each that makes them."""
        facts = {name: encoder.facts for name, encoder in self.present.items()}
        if self.judge:
            facts["judge"] = {"id": f"{TOYWORLD}/judge", "revision_or_sha256": self.judge.sha256,
                              "preprocessing": self.judge.preprocessing}  # fmt: skip
        return facts


def load_encoders(encoders=None, clip=None, dinov1=None, dinov2=None, *, protocol=DREAMBOOTH, device="cpu", batch_size=32,
                  cache_dir=None):  # fmt: skip
    """The `Encoders` of these ids.

    Args:
        encoders: "toyworld" for those of the drawn world, with its judge; None for the protocol's.
        clip, dinov1, dinov2: a hub id, a folder, for dinov1 also `torchhub:owner/repo:ref:entry`, or "none" to go without;
            None is the default of `encoders`.
        protocol: "dreambooth" or "dreambench++", whose encoders these are by default (`DEFAULTS`).
        cache_dir: folder that keeps features for later runs.

    No model is downloaded (torch.hub's code may fetch its weights): UserError tells of every one that is not here what to
    run and where it is looked for.
    """
    if encoders not in (None, TOYWORLD):
        raise UserError(f"--encoders must be {TOYWORLD}, or left out for --clip, --dinov1 and --dinov2; got {encoders!r}")
    scale_of(protocol)  # that there is such a one
    defaults, judge = dict(zip(NAMES, DEFAULTS[protocol])), None
    if encoders == TOYWORLD:
        from ..toyworld.judge import load_judge

        defaults = {name: str(EMBEDDED / name) for name in NAMES}
        try:
            judge = load_judge(device=device)
        except FileNotFoundError as error:
            raise UserError(f"the embedded encoders are missing from this installation ({EMBEDDED})") from error
    asked = {name: given or defaults[name] for name, given in (("clip", clip), ("dinov1", dinov1), ("dinov2", dinov2))}
    asked = {name: id for name, id in asked.items() if id != NONE}
    if not asked:
        raise UserError("there is nothing to score with: at least one of --clip, --dinov1 and --dinov2 must not be none")
    settings = {"device": device, "batch_size": batch_size, "cache_dir": cache_dir}
    found, missing = {}, []
    for name, id in asked.items():
        try:
            in_hub = name == "dinov1" and id.startswith(TORCHHUB)
            loaded = _from_torchhub(id) if in_hub else _from_transformers(name, id)
            label = f"{TOYWORLD}/{name}" if encoders == TOYWORLD and id == defaults[name] else id
            found[name] = Encoder(name, label, *loaded, **settings)
        except _Missing as error:
            missing.append(f"--{name} {error}")
    if missing:
        raise UserError("; ".join(missing) + "; to go without one, say none")
    return Encoders(**found, judge=judge)


class _Missing(Exception):
    """A model that is not here: what, where, and how to get it."""


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _folder_of(name, id):
    """Where a model of a hub id, or a folder, lies."""
    from huggingface_hub import constants, snapshot_download

    folder = Path(id).expanduser()
    if folder.is_dir():
        return folder
    if id.count("/") != 1 or id[0] in "./~" or ":" in id:
        raise UserError(f"--{name} {id}: no such folder, nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(id, local_files_only=True))
    except (OSError, ValueError) as error:
        where = Path(constants.HF_HUB_CACHE) / f"models--{id.replace('/', '--')}"
        raise _Missing(f"{id} is not downloaded (looked for in {where}): run `hf download {id}`") from error


def _from_transformers(name, id):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = _folder_of(name, id)
    kinds = {"clip": transformers.CLIPModel, "dinov1": transformers.ViTModel, "dinov2": transformers.Dinov2Model}
    wanted = {"clip": "clip", "dinov1": "vit", "dinov2": "dinov2"}[name]
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type != wanted:
            raise UserError(f"--{name} {id} is a model of type {config.model_type}, expected {wanted}")
        more = {"add_pooling_layer": False} if name == "dinov1" else {}
        model, report = kinds[name].from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if name == "clip" else None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        again = "" if Path(id).expanduser().is_dir() else f" (to get it whole, run `hf download {id}` again)"
        raise UserError(f"--{name} {id} cannot be loaded from {folder}: {_first_line(error)}{again}") from error
    if report["missing_keys"]:
        raise UserError(f"--{name} {id} lacks weights, such as {min(report['missing_keys'])}: it is no whole {wanted} model")
    said = processor.to_dict()
    if name == "dinov1" and config.image_size == CROP and said.get("do_center_crop") is None:
        # ViT's processor would squash the picture to a square, which DINO was never evaluated with
        return model, dino_transform, _DINO
    prepare = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]
    facts = {key: _plain(said[key]) for key in SAID if said.get(key) is not None}
    return model, prepare, {"by": f"transformers' {said['image_processor_type']}, PIL"} | facts, tokenizer


_DINO = {"by": "DINO's evaluation transform, PIL", "resize": RESIZE, "resample": "bicubic", "center_crop": CROP,
         "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}  # fmt: skip


def _plain(value):
    return json.loads(json.dumps(value, default=lambda thing: getattr(thing, "value", None) or dict(thing)))


def _from_torchhub(id):
    """A model of torch.hub, whose own code makes it: from the folder where torch.hub keeps it."""
    try:
        repo, ref, entry = id.removeprefix(TORCHHUB).split(":")
    except ValueError:
        raise UserError(f"--dinov1 {id}: expected {TORCHHUB}owner/repo:ref:entry") from None
    folder = Path(torch.hub.get_dir()) / f"{repo}_{ref}".replace("/", "_")
    command = f"""python -c "import torch; torch.hub.load('{repo}:{ref}', '{entry}')\""""
    hub = f"facebook/{entry.replace('_', '-')}"
    same = f" (or take {hub}, the same weights for transformers)" if entry.startswith("dino_vit") else ""
    if not (folder / "hubconf.py").is_file():
        raise _Missing(f"{id} is not downloaded (looked for in {folder}): run `{command}`{same}")
    try:
        model = torch.hub.load(str(folder), entry, source="local")
    except OSError as error:  # its weights are not here, and cannot be fetched
        raise _Missing(f"{id} cannot be loaded from {folder}: {_first_line(error)}: run `{command}`{same}") from error
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--dinov1 {id} cannot be loaded from {folder}: {_first_line(error)}{same}") from error
    model.config = {"torchhub": id}
    return model, dino_transform, _DINO
