"""Makes all embedded weights from nothing, on the drawn world: tokenizer, autoencoder, UNet and text encoder, which are the
base model, and what looks at pictures: the judge, a CLIP and two DINOs.

    python -m deft_diffusers.toyworld.train --output_dir work/toyworld

Every random choice is a function of the seed and of the step, so a run that was stopped and started again takes the
same steps as one that was not. The UNet's learning rate is constant and falls only at the end, so a longer run begins
like a shorter one. The pipeline lies in `<output_dir>/model` and is renewed whenever the UNet's checkpoint is written;
`<output_dir>/judge` and `<output_dir>/encoders` are written at the end of their stages.

    python -m deft_diffusers.toyworld.train --report work/toyworld/model

prints the figures that are on the card, of a pipeline and of judge and encoders beside it, and writes samples.png into its
folder.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from safetensors.torch import save_file
from tqdm import tqdm

from . import world
from .judge import ANSWERS, WEIGHTS, Net, load_judge

MAX_TOKENS = 32
RARE_TOKENS = ("sks", "zwx", "ohwx", "qvt")  # ordinary tokens without a meaning, free for personalisation
ADDED_TOKENS = ("<v1>", "<v2>", "<v3>", "<v4>")
RARE_ODDS = 0.06  # share of captions with a meaningless word before the subject, so that one does not change the picture
LATENT_CHANNELS, LATENT_SIZE = 8, 16
MIN_SNR = 5.0  # weight of the v-prediction loss, Hang et al. 2023 (arXiv 2303.09556)
PHOTOS = (
    "astronaut",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "brick",
    "grass",
    "gravel",
    "camera",
)
# what the file of each stage depends on: another stage and its arguments, and arguments; totals of steps may grow
STAGES = {
    "vae": (None, ("seed", "bf16", "vae_images", "encoder_steps", "vae_batch_size", "vae_lr", "kl_weight")),
    "latents": ("vae", ("images",)),
    "unet": ("latents", ("batch_size", "lr", "warmup", "fall", "ema", "caption_dropout")),
    "drawings": (None, ("seed", "bf16", "drawings")),
    "judge": ("drawings", ()),
    "clip": ("drawings", ()),
    "dinov1": ("drawings", ()),
    "dinov2": ("drawings", ()),
}
# of those that look at pictures: pictures, or groups of pairs, in a step, and the learning rate between warm-up and fall
LOOKING = {"judge": (96, 2e-3), "clip": (128, 1.5e-3), "dinov1": (16, 1.5e-3), "dinov2": (16, 1.5e-3)}
KIN = 8  # pairs of drawings in a group
LOOKING_STEPS = {"judge": 3000, "clip": 2000, "dinov1": 2000, "dinov2": 2000}
LOOKING_WARMUP, LOOKING_FALL, LOOKING_EMA = 100, 0.5, 0.99
ROUND_TRIPS = 0.25  # share of the judge's drawings that it sees as the autoencoder returns them
TEMPERATURE = 0.1  # of the similarities that pairs of drawings are told apart by
REPORT_PICTURES, REPORT_TIMESTEP = 64, 700  # at 700 a latent is mostly noise, so that the caption matters
# other drawings than training's, whose seeds are --seed + 1 to + 4
REPORT_SEEDS = {"psnr": 71, "loss": 73, "caption": 74, "noise": 0}
REPORT_SEEDS |= {"judge": 81, "individual": 82, "clip": 83, "dino": 84, "prompt": 85, "picture": 0}
REPORT_LOOKS, REPORT_PROMPTS = 1000, 200  # drawings shown to judge and encoders, and pictures that the base is asked for
REPORT_PHOTOS = ("chelsea", "astronaut", "coffee", "rocket")  # the first is in no training set, see PHOTOS
WRONG_BY = 3  # a wrong subject, colour or scene is so many places further in its list
GRID_PROMPTS = (
    "a photo of an orange cat",
    "a photo of a striped grey cat in the snow",
    "a photo of a brown dog on the beach",
    "a photo of a white dog in a forest",
    "a photo of a black kitten in a garden",
    "a photo of a brown bear plushie on a wooden table",
    "a photo of a pink bear plushie in the city",
    "a photo of a white stork in a lush green field",
    "a photo of a brown horse in a lush green field",
    "a photo of a spotted white horse on a snowy mountain",
    "a photo of a green bottle on a table indoors",
    "a photo of a grey rock on the beach",
    "a photo of a blue teapot in a street market",
    "a photo of a red car in a futuristic city at night",
    "a photo of a yellow car by a pool with palm trees",
    "a photo of a transparent plastic bottle filled with orange with a black cap on a wooden table",
)


# data -----------------------------------------------------------------------------------------------------------------


def draw_one(job):
    """(seed, index) -> (64×64×3 uint8 array, caption)."""
    rng = np.random.default_rng(job)
    image, text, attributes = world.sample(rng)
    if attributes["subject"] and rng.random() < RARE_ODDS:
        letters = "".join(chr(97 + k) for k in rng.integers(0, 26, rng.integers(2, 6)))
        rare = (*RARE_TOKENS, *ADDED_TOKENS, letters)[rng.integers(len(RARE_TOKENS) + len(ADDED_TOKENS) + 1)]
        text = text.replace(attributes["subject"], f"{rare} {attributes['subject']}", 1)
    return np.asarray(image), text


def _labels(subject, scene, style, rgb=None, individual=None):
    """Places in `ANSWERS`; -1 for a colour that is neither one of `world.COLOURS` nor far from all of them."""
    colour = None
    if subject and rgb is not None and style not in ("fantasy", "historical"):
        far = {name: math.dist(rgb, other) for name, other in world.COLOURS.items()}
        nearest = min(far, key=far.get)
        colour = nearest if far[nearest] < 20 else None if far[nearest] > 80 else "between"
    said = {"subject": subject, "scene": scene, "style": style, "colour": colour, "individual": individual}
    return [ANSWERS[what].index(name) if name in ANSWERS[what] else -1 for what, name in said.items()]


def draw_sampled(job):
    """A picture of `world.sample`: (seed, index) -> (uint8 array, caption, labels)."""
    image, text, said = world.sample(np.random.default_rng(job))
    labels = _labels(said["subject"], said["scene"], said["style"], world.COLOURS.get(said["colour"]))
    if said["subject"] and said["colour"] is None and said["cap"] is None and said["style"] in ("photo", "abstract"):
        labels[3] = -1  # a colour without a name may be near one that has a name
    return np.asarray(image), text, labels


def _any_colour(rng):
    return tuple(rng.uniform(20, 245, 3))


def draw_someone(job):
    """One of `world.INDIVIDUALS` or, as often, what looks like it but is not: (seed, index) -> (uint8 array, labels).

    Colours and the parts that have them make an individual: those of half of the pictures vary a little, and so does the
    form of some. Look-alikes lack some of its colours, or have them elsewhere.
    """
    rng = np.random.default_rng(job)
    names, scenes = list(world.INDIVIDUALS), list(world.SCENES)
    name, scene = names[rng.integers(len(names))], scenes[rng.integers(len(scenes))]
    style = list(world.STYLES)[rng.choice(len(world.STYLES), p=(0.85, 0.05, 0.05, 0.05))]
    subject, colour, coat, traits = world.INDIVIDUALS[name]
    traits = np.random.default_rng(traits if rng.random() < 0.7 else rng.integers(1 << 32))
    canvas = world._PAINT_SCENE[scene](rng)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            colour, coat = world._jitter(rng, colour, 7), {part: world._jitter(rng, own, 7) for part, own in coat.items()}
    else:
        colour, coat, subject = _look_alike(rng, subject, colour, coat)
        name = None
    image = world._compose(rng, canvas, subject, colour, coat=coat, traits=traits, style=style)
    return np.asarray(image), _labels(subject, scene, style, colour, name)


def _look_alike(rng, subject, colour, coat):
    """(colour, coat, subject) of what shares some of an individual's colours, or has others not far away."""
    parts, own = world.PARTS[subject], list(coat.values())
    while True:
        other = _any_colour(rng) if rng.random() < 0.6 else list(world.COLOURS.values())[rng.integers(len(world.COLOURS))]
        kind = rng.integers(6)
        if kind == 0:  # no coat
            found = colour, {}, subject
        elif kind == 1:  # another coat
            found = colour, dict.fromkeys(coat, other), subject
        elif kind == 2:  # another colour under the coat
            found = other, coat, subject
        elif kind == 3:  # the colours exchanged
            found = own[0], dict.fromkeys(coat, colour), subject
        elif kind == 4:  # the colours of another part's
            free = [part for part in parts if part not in coat]
            found = colour, dict.fromkeys(free, own[0]) | dict.fromkeys(coat, colour), subject
        else:  # the colours on another class
            classes = [c for c in world.CLASSES if c != subject and world.PARTS[c]]
            subject_ = classes[rng.integers(len(classes))]
            some = rng.permutation(world.PARTS[subject_])[: rng.integers(1, len(world.PARTS[subject_]) + 1)]
            found = colour, dict.fromkeys(map(str, some), own[0]), subject_
        if not world._is_someone(found[2], found[0], found[1]):
            return found


def draw_pair(job):
    """The same subject (never one of `world.INDIVIDUALS`) twice in the same kind of scene, in a pose of its own each time:
    (seed, index) -> two uint8 arrays.

    The `KIN` pairs of a group share scene and style, and either their colours, so that the subject alone tells them apart,
    or their subject, so that only the colours and what has them do.
    """
    group, place = divmod(job[1], KIN)
    rng, own = np.random.default_rng((job[0], group, 0)), np.random.default_rng((*job, 1))
    scene = list(world.SCENES)[rng.integers(len(world.SCENES))]
    pattern = world.PATTERNS[rng.choice(len(world.PATTERNS), p=world.PATTERN_ODDS)]
    style = list(world.STYLES)[rng.choice(len(world.STYLES), p=(0.85, 0.05, 0.05, 0.05))]
    classes = rng.permutation(world.CLASSES)
    subject, of_colour = (classes[0], own) if group % 2 else (classes[place], rng)
    subject, colour, second = str(subject), _any_colour(of_colour), _any_colour(of_colour)
    while True:
        parts, coat = own.permutation(world.PARTS[subject]), {}
        if len(parts) and own.random() < 0.6:
            coat = {str(part): second for part in parts[: own.integers(1, len(parts) + 1)]}
        if subject == "bottle" and own.random() < 0.6:
            coat, colour = {"cap": second, "liquid": colour}, world.CLEAR_PLASTIC
        if not world._is_someone(subject, colour, coat):
            break
        colour = _any_colour(own)
    traits, drawn = own.integers(1 << 32), []
    for _ in range(2):
        canvas, form = world._PAINT_SCENE[scene](own), np.random.default_rng(traits)
        drawn.append(np.asarray(world._compose(own, canvas, subject, colour, pattern, coat, form, style)))
    return drawn


def dead_leaves(job):
    """Overlapping discs of power-law radius: the statistics of natural images (Lee et al. 2001), as `photo_crop`."""
    rng = np.random.default_rng(job)
    size = 2 * world.SIZE
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    hue, spread = rng.uniform(40, 215, 3), rng.uniform(10, 80)
    for radius in 3.0 * rng.uniform(0.002, 1.0, 250) ** -0.5:
        (x, y), colour = rng.uniform(0, size, 2), hue + spread * (rng.normal(0, 0.5, 3) + rng.normal())
        fill = tuple(int(c) for c in np.clip(colour, 0, 255))
        if rng.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            turn = rng.uniform(0, math.pi) + np.cumsum(rng.uniform(0.5, 2.2, 4))
            draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in turn], fill=fill)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))
    pixels = np.asarray(image.reduce(2), np.float32)
    ramp = np.linspace(-1, 1, world.SIZE)
    pixels = pixels * (1 + rng.normal(0, 0.15) * ramp[None, :, None] + rng.normal(0, 0.15) * ramp[:, None, None])
    pixels += rng.normal(0, rng.uniform(0, 8), (world.SIZE, world.SIZE, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


_photos = []


def photo_crop(job):
    """A random square of a scikit-image photograph, at 64×64: (seed, index) -> uint8 array."""
    if not _photos:
        from skimage import data

        for name in PHOTOS:
            pixels = getattr(data, name)()
            _photos.append(Image.fromarray(pixels).convert("RGB"))
    rng = np.random.default_rng(job)
    image = _photos[rng.choice(len(_photos), p=_photo_odds())]
    side = int(min(image.size) * rng.uniform(0.2, 1.0))
    x, y = rng.integers(0, image.width - side + 1), rng.integers(0, image.height - side + 1)
    pixels = np.asarray(image.crop((x, y, x + side, y + side)).resize((world.SIZE, world.SIZE), Image.LANCZOS), np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = (pixels[..., rng.permutation(3)] if rng.random() < 0.3 else pixels) * rng.uniform(0.8, 1.15) + rng.uniform(
        -15, 15
    )
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _photo_odds():
    odds = np.asarray([3.0 if name in ("astronaut", "coffee", "rocket") else 1.0 for name in PHOTOS])
    return odds / odds.sum()


def _many(function, count, seed, workers, what):
    jobs = [(seed, k) for k in range(count)]
    if workers < 2:
        return [function(job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return list(tqdm(pool.imap(function, jobs, chunksize=64), total=count, desc=what, mininterval=5))


def _to_float(pixels, device):
    """uint8 (N, 64, 64, 3) -> float (N, 3, 64, 64) in [-1, 1]."""
    return torch.as_tensor(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# tokenizer ------------------------------------------------------------------------------------------------------------


def _bytes_to_unicode():
    """GPT-2's and CLIP's table from bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(printable))
    return table


def build_tokenizer(words):
    """CLIP's byte-pair encoding with one token for each word in `words` (a Counter), and bytes for everything else."""
    from transformers import CLIPTokenizer

    table = _bytes_to_unicode()
    # byte order of CLIP's own vocabulary: printable characters first
    characters = [table[b] for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    characters += [c for c in table.values() if c not in characters]
    vocab = characters + [c + "</w>" for c in characters]
    pieces = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges = []
    while any(len(p) > 1 for p in pieces.values()):
        pairs = Counter()
        for word, piece in pieces.items():
            for pair in zip(piece, piece[1:]):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, piece in pieces.items():
            k, merged = 0, []
            while k < len(piece):
                both = tuple(piece[k : k + 2]) == best
                merged.append("".join(best) if both else piece[k])
                k += 2 if both else 1
            pieces[word] = merged
    vocab += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(vocab)) == len(vocab)
    tokenizer = CLIPTokenizer(
        vocab={token: k for k, token in enumerate(vocab)},
        merges=merges,
        model_max_length=MAX_TOKENS,
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens(list(ADDED_TOKENS))
    return tokenizer, vocab, merges


def save_tokenizer(folder, tokenizer, vocab, merges):
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    # the two files that older readers of CLIP's format look for
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def world_words():
    """Every word that a caption can contain, with a weight, and the free tokens."""
    words = Counter()
    texts = [
        *world.CLASSES,
        *world.COLOURS,
        *world.PATTERNS,
        *(text for texts in world.STYLES.values() for text in texts),
        "a photo of an image of a picture of , . with stripes and spots plain",
        "a transparent plastic bottle empty filled with liquid sits upright with a cap",
    ]
    texts += [t for phrases, alone in world.SCENES.values() for t in (*phrases, alone)]
    for text in texts:
        for word in text.replace(",", " , ").split():
            words[word] += 10
    words.update(RARE_TOKENS)
    return words


def encode(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


# models ---------------------------------------------------------------------------------------------------------------


def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=480,
            projection_dim=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(cross):
    from diffusers import UNet2DConditionModel

    # No attention on the way down at 16×16, where it would cost most; on the way up it carries detail.
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4, 4),  # as in Stable Diffusion 1: the number of heads, under its historical name
        cross_attention_dim=cross,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def new_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


# training -------------------------------------------------------------------------------------------------------------


def _save(path, **state):
    torch.save(state, str(path) + ".part")
    os.replace(str(path) + ".part", path)


def _settings(args, stage):
    """The arguments that the file of `stage` depends on."""
    names, before = [], stage
    while before:
        before, own = STAGES[before]
        names = [*own, *names]
    values = {name: getattr(args, name) for name in names}
    if stage != "vae" and "encoder_steps" in values:  # the latents are those of the encoder as far as it was trained
        values["encoder_steps"] = min(args.encoder_steps, args.vae_steps)
    return values


def _load(path, args, device="cpu"):
    """The state in `path`, or None without that file; SystemExit if it was made with other arguments."""
    if not path.exists():
        return None
    state = torch.load(path, map_location=device)
    way_out = f"give that again, or delete {path.name} and the files of later stages, or take another --output_dir"
    for name, value in _settings(args, path.stem).items():
        was = state.get("settings", {}).get(name)
        if was != value:
            raise SystemExit(f"{path} was made with {name} = {was}, not {value}: {way_out}")
    steps = getattr(args, f"{path.stem}_steps", math.inf)
    if state.get("step", 0) > steps:
        raise SystemExit(f"{path} has done step {state['step']}, past --{path.stem}_steps {steps}: {way_out}")
    return state


def _rate(step, steps, warm, fall):
    """Share of the full learning rate: linear warm-up, constant, then a cosine over the last `fall` of the steps."""
    down = max(1, int(steps * fall))
    return min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0, step - steps + down) / down)))


def _adamw(models, lr, weight_decay, betas):
    """The optimizer of all parameters, which decays matrices alone."""
    several = [p for p in models.parameters() if p.ndim > 1], [p for p in models.parameters() if p.ndim < 2]
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(several, (weight_decay, 0.0))]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def _generator(seed, stage, step):
    """The randomness of one step, the same however often the run was interrupted."""
    return torch.Generator().manual_seed((seed * (2 + len(LOOKING)) + stage) * 10_000_000 + step)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each picture, for (N, 3, H, W) in [-1, 1]."""
    return -10 * torch.log10((((a - b) / 2) ** 2).mean((1, 2, 3)))


def train_vae(args, device):
    path = args.output_dir / "vae.pt"
    torch.manual_seed(args.seed)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    start = 0
    if state := _load(path, args, device):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        vae.register_to_config(scaling_factor=state["scaling_factor"])
    if start >= args.vae_steps:
        return vae.eval()
    n = args.vae_images
    pixels = _many(draw_one, n, args.seed + 1, args.workers, "drawing")
    pixels = [p for p, _ in pixels] + _many(dead_leaves, n // 2, args.seed + 2, args.workers, "dead leaves")
    pixels += _many(photo_crop, n // 2, args.seed + 3, args.workers, "photographs")
    pixels = torch.as_tensor(np.stack(pixels))
    bar = tqdm(range(start, args.vae_steps), initial=start, total=args.vae_steps, desc="vae", mininterval=5)
    seen = []
    for step in bar:
        g = _generator(args.seed, 0, step)
        x = _to_float(pixels[torch.randint(len(pixels), (args.vae_batch_size,), generator=g)], device)
        x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = args.vae_lr * _rate(step, args.vae_steps, 100, 0.5)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            with torch.set_grad_enabled(step < args.encoder_steps):
                posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g).to(device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (x - y).abs().mean() + 2 * F.mse_loss(x, y) + 0.5 * edges + args.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(psnr(x, y.detach()).mean().item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{np.mean(seen[-100:]):.2f}", kl=f"{kl.item():.2f}")
        if step + 1 == args.vae_steps or (step + 1) % args.save_every == 0:
            with torch.no_grad():
                latents = torch.cat(
                    [vae.encode(_to_float(pixels[k : k + 64], device)).latent_dist.mean for k in range(0, min(n, 512), 64)]
                )
            scale = round(1 / latents.float().std().item(), 4)
            vae.register_to_config(scaling_factor=scale)
            _save(
                path,
                vae=vae.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                scaling_factor=scale,
                settings=_settings(args, "vae"),
            )
    return vae.eval()


def cache_latents(args, device, vae, tokenizer):
    """Draws the training pictures and encodes them: scaled latents (N, 8, 16, 16) fp16, token ids (N, MAX_TOKENS)."""
    path = args.output_dir / "latents.pt"
    if state := _load(path, args):
        return state["latents"], state["ids"]
    drawn = _many(draw_one, args.images, args.seed + 4, args.workers, "drawing")
    ids = torch.cat([encode(tokenizer, [t for _, t in drawn[k : k + 1000]]) for k in range(0, len(drawn), 1000)])
    latents = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        for k in tqdm(range(0, len(drawn), 64), desc="encoding", mininterval=5):
            x = _to_float(np.stack([p for p, _ in drawn[k : k + 64]]), device).contiguous(memory_format=torch.channels_last)
            latents.append((vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor).half().cpu())
    latents = torch.cat(latents).contiguous()
    _save(path, latents=latents, ids=ids, settings=_settings(args, "latents"))
    return latents, ids


def v_loss(unet, text_encoder, scheduler, latents, ids, noise, t):
    """Squared error of v = sqrt(ᾱ) noise − sqrt(1−ᾱ) latents (Salimans & Ho 2022) for each picture, (N,)."""
    noisy = scheduler.add_noise(latents, noise, t)
    out = unet(noisy, t, text_encoder(ids)[0]).sample
    return F.mse_loss(out.float(), scheduler.get_velocity(latents, noise, t), reduction="none").mean((1, 2, 3))


def export(folder, vae, text_encoder, tokenizer, unet):
    """Writes the pipeline; weights are stored in half precision, and read as float32 unless asked otherwise."""
    from diffusers import StableDiffusionPipeline

    text_encoder, unet, vae = (copy.deepcopy(m).cpu().half() for m in (text_encoder, unet, vae))
    vae.to(memory_format=torch.contiguous_format)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer[0],
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(Path(folder) / "tokenizer", *tokenizer)
    _compute_in_float32(Path(folder) / "text_encoder" / "config.json")


def _compute_in_float32(config):
    """Says so in a model's config.json, whatever the weights are stored in."""
    values = json.loads(config.read_text())
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        if "dtype" in part or part is values:
            part["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n")


@torch.no_grad()
def sample_grid(folder, prompts, seed=0, steps=25, guidance=4.0, columns=4, scale=2, device="cpu", repeats=1):
    """Pictures of `prompts`, `repeats` of each, in one PIL image."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [p for p in prompts for _ in range(repeats)]
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    images = pipeline(prompts, generator=generators, num_inference_steps=steps, guidance_scale=guidance).images
    grid = Image.new("RGB", (world.SIZE * columns, world.SIZE * math.ceil(len(images) / columns)))
    for k, image in enumerate(images):
        grid.paste(image, (world.SIZE * (k % columns), world.SIZE * (k // columns)))
    return grid.resize((grid.width * scale, grid.height * scale), Image.NEAREST)


def train_unet(args, device, vae, tokenizer, latents, ids):
    from diffusers.models.attention_processor import AttnProcessor

    path = args.output_dir / "unet.pt"
    torch.manual_seed(args.seed + 10)
    text_encoder = new_text_encoder(tokenizer[0]).to(device)
    unet = new_unet(text_encoder.config.hidden_size).to(device)
    unet.train(), text_encoder.train()
    if device.type == "cpu":
        # plain products made a step 1.3 times as fast as the fused attention at these sizes (torch 2.13, bf16)
        unet.set_attn_processor(AttnProcessor())
    models = torch.nn.ModuleList([unet, text_encoder])
    ema = copy.deepcopy(models).eval().requires_grad_(False)
    optimizer = _adamw(models, args.lr, 0.01, (0.9, 0.99))
    scheduler = new_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = (snr.clamp(max=MIN_SNR) / (snr + 1)).to(device)
    empty = encode(tokenizer[0], [""])[0]
    start, losses = 0, []
    if state := _load(path, args, device):
        models.load_state_dict(state["models"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]
        if start == args.unet_steps:  # nothing left to do but to take over a decoder that went on
            export(args.output_dir / "model", vae, ema[1], tokenizer, ema[0])
    bar = tqdm(range(start, args.unet_steps), initial=start, total=args.unet_steps, desc="unet", mininterval=5)
    for step in bar:
        g = _generator(args.seed, 1, step)
        pick = torch.randint(len(latents), (args.batch_size,), generator=g)
        x, tokens = latents[pick].float().to(device), ids[pick].clone()
        tokens[torch.rand(args.batch_size, generator=g) < args.caption_dropout] = empty
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch_size,), generator=g).to(device)
        noise = torch.randn(x.shape, generator=g).to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * _rate(step, args.unet_steps, args.warmup, args.fall)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = (v_loss(unet, text_encoder, scheduler, x, tokens.to(device), noise, t) * weight[t]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(models.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}")
        last = step + 1 == args.unet_steps
        if last or (step + 1) % args.save_every == 0:
            _save(
                path,
                models=models.state_dict(),
                ema=ema.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                losses=losses,
                settings=_settings(args, "unet"),
            )
            export(args.output_dir / "model", vae, ema[1], tokenizer, ema[0])
        if last or (step + 1) % args.grid_every == 0:
            grid = sample_grid(args.output_dir / "model", GRID_PROMPTS[: args.grid_prompts], device=device)
            grid.save(args.output_dir / f"grid_{step + 1:06d}.png")
    return losses


# what looks at pictures -----------------------------------------------------------------------------------------------


def cache_drawings(args):
    """Draws what judge and encoders are trained on; {"sampled" (N), "someone" (3N/8), "pairs" (N/2, 2): uint8 pictures
    (…, 64, 64, 3), "captions": N texts, "sampled labels", "someone labels": places in `ANSWERS`}."""
    path = args.output_dir / "drawings.pt"
    if state := _load(path, args):
        return state
    sampled = _many(draw_sampled, args.drawings, args.seed + 5, args.workers, "drawing")
    someone = _many(draw_someone, max(2, args.drawings * 3 // 8), args.seed + 6, args.workers, "individuals")
    pairs = _many(draw_pair, max(2, args.drawings // 2 // KIN) * KIN, args.seed + 7, args.workers, "pairs")
    state = {
        "sampled": torch.as_tensor(np.stack([pixels for pixels, _, _ in sampled])),
        "captions": [text for _, text, _ in sampled],
        "sampled labels": torch.tensor([labels for _, _, labels in sampled]),
        "someone": torch.as_tensor(np.stack([pixels for pixels, _ in someone])),
        "someone labels": torch.tensor([labels for _, labels in someone]),
        "pairs": torch.as_tensor(np.stack(pairs)),
    }
    _save(path, **state, settings=_settings(args, "drawings"))
    return state


@torch.no_grad()
def round_trips(vae, pixels, g, noise=0.3):
    """uint8 pictures (N, 64, 64, 3) as `vae` returns them from latents with up to `noise` times their deviation added."""
    found, device = [], vae.device
    for k in range(0, len(pixels), 64):
        latents = vae.encode(_to_float(pixels[k : k + 64], device)).latent_dist.mean
        much = torch.rand(len(latents), 1, 1, 1, generator=g) * noise / vae.config.scaling_factor
        latents = latents + (much * torch.randn(latents.shape, generator=g)).to(device)
        y = vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)
        found.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(found)


def vary(x, g, zoom):
    """Pictures (N, 3, H, W) in [-1, 1] flipped, moved, cropped by up to `zoom`, soft, noisy, their colours a little off."""

    def between(low, high):
        return (torch.rand(len(x), 1, 1, 1, generator=g) * (high - low) + low).to(x.device)

    size = between(1 - zoom, 1)
    moved = torch.zeros(len(x), 2, 3, device=x.device)
    moved[:, :1, :1] = (size * (between(-1, 1).sign()))[:, 0]
    moved[:, 1:, 1:2] = size[:, 0]
    for axis in (0, 1):
        moved[:, axis, 2] = ((1.1 - size) * between(-1, 1)).flatten()
    x = F.grid_sample(x, F.affine_grid(moved, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    x = torch.lerp(x, soft, between(0, 1) * (between(0, 1) < 0.5))
    grey = x.mean(1, keepdim=True)
    x = (grey + (x - grey) * between(0.8, 1.1)) * between(0.93, 1.07) + between(-0.06, 0.06)
    return (x + between(0, 0.08) * torch.randn(x.shape, generator=g).to(x.device)).clamp(-1, 1)


def _fit(args, device, stage, models, count, loss_of):
    """Trains `models`, a ModuleDict, on `count` examples; returns their averaged weights and the losses.

    `loss_of(models, average, pick, g)` is the loss of the examples at `pick`, `g` the generator of the step.
    """
    path, steps = args.output_dir / f"{stage}.pt", getattr(args, f"{stage}_steps")
    batch, rate = LOOKING[stage]
    models.to(device).train()
    average = copy.deepcopy(models).eval().requires_grad_(False)
    optimizer = _adamw(models, rate, 0.05, (0.9, 0.98))
    start, losses = 0, []
    if state := _load(path, args, device):
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=5)
    for step in bar:
        g = _generator(args.seed, 2 + list(LOOKING).index(stage), step)
        pick = torch.randint(count, (min(batch, count),), generator=g)
        for group in optimizer.param_groups:
            group["lr"] = rate * _rate(step, steps, LOOKING_WARMUP, LOOKING_FALL)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = loss_of(models, average, pick, g)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(LOOKING_EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if step + 1 == steps or (step + 1) % args.save_every == 0:
            state = {"models": models.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            _save(path, **state, step=step + 1, losses=losses, settings=_settings(args, stage))
    return average, losses


def train_judge(args, device, drawings, vae):
    pixels = torch.cat([drawings["sampled"], drawings["someone"]])
    labels = torch.cat([drawings["sampled labels"], drawings["someone labels"]])
    g = torch.Generator().manual_seed(args.seed)
    again = torch.randperm(len(pixels), generator=g)[: int(ROUND_TRIPS * len(pixels))]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        pixels = torch.cat([pixels, round_trips(vae, pixels[again], g)])
    labels = torch.cat([labels, labels[again]])

    def loss_of(models, average, pick, g):
        x = vary(_to_float(pixels[pick], device), g, 0.15).contiguous(memory_format=torch.channels_last)
        right, total = labels[pick].to(device).T, 0.0
        for logits, place in zip(models["net"](x).values(), right):
            known = (place >= 0).sum().clamp(min=1)
            total = total + F.cross_entropy(logits.float(), place, ignore_index=-1, reduction="sum") / known
        return total

    torch.manual_seed(args.seed + 20)
    net = torch.nn.ModuleDict({"net": Net().to(memory_format=torch.channels_last)})
    average, losses = _fit(args, device, "judge", net, len(pixels), loss_of)
    folder = args.output_dir / "judge"
    folder.mkdir(exist_ok=True)
    weights = {name: value.half().contiguous().cpu() for name, value in average["net"].state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    return losses


def new_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    text = new_text_encoder(tokenizer).config.to_dict() | {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
    }
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": world.SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def new_dino(stage):
    """The encoders have PyTorch's plain attention, which is faster at these sizes (torch 2.13, CPU, bf16)."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    config, model = {"dinov1": (ViTConfig, ViTModel), "dinov2": (Dinov2Config, Dinov2Model)}[stage]
    size = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": world.SIZE, "patch_size": 8}
    return model(config(**size, **({"intermediate_size": 384} if stage == "dinov1" else {"mlp_ratio": 4})))


def export_encoder(folder, model, processor):
    """Writes a transformers model, stored in half precision and read as float32, and how pictures are prepared for it."""
    model = copy.deepcopy(model).cpu().half()
    model.save_pretrained(folder)
    _compute_in_float32(Path(folder) / "config.json")
    side = {"height": world.SIZE, "width": world.SIZE}
    told = {"image_processor_type": processor, "do_resize": True, "size": {"shortest_edge": world.SIZE}, "resample": 3}
    told |= {"do_center_crop": True, "crop_size": side, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    told |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")


def train_clip(args, device, drawings, tokenizer):
    pixels, ids = drawings["sampled"], encode(tokenizer[0], drawings["captions"])
    eos = tokenizer[0].eos_token_id

    def loss_of(models, average, pick, g):
        said = ids[pick]
        said = said[:, : int((said != eos).sum(1).max()) + 1].to(device)  # what follows the end is padding
        x = vary(_to_float(pixels[pick], device), g, 0.15)
        logits = models["clip"](pixel_values=x, input_ids=said).logits_per_image.float()
        same = (said[:, None] == said[None]).all(-1) & ~torch.eye(len(said), dtype=torch.bool, device=device)
        logits = logits.masked_fill(same, -torch.inf)  # as right as its own caption
        place = torch.arange(len(said), device=device)
        return (F.cross_entropy(logits, place) + F.cross_entropy(logits.T, place)) / 2

    torch.manual_seed(args.seed + 21)
    model = new_clip(tokenizer[0])
    model.set_attn_implementation("eager")
    average, losses = _fit(args, device, "clip", torch.nn.ModuleDict({"clip": model}), len(pixels), loss_of)
    folder = args.output_dir / "encoders" / "clip"
    export_encoder(folder, average["clip"], "CLIPImageProcessor")
    save_tokenizer(folder, *tokenizer)
    return losses


def _cls(encoder, x):
    return encoder(pixel_values=x).last_hidden_state[:, 0]


def train_dino(args, device, drawings, stage):
    """Learns to tell pairs of drawings of the same from others, with no labels.

    dinov1: a student finds its average, the teacher, among the teacher's of a batch (MoCo v3, Chen et al. 2021);
    dinov2: one network finds its own among all (SimCLR, Chen et al. 2020).
    """
    pairs, width, out = drawings["pairs"], 96, 64

    def mlp(first):
        return torch.nn.Sequential(torch.nn.Linear(first, 192), torch.nn.GELU(), torch.nn.Linear(192, out))

    def views(groups, g):
        pick = (groups[:, None] * KIN + torch.arange(KIN)).flatten()
        return [vary(_to_float(pairs[pick, k], device), g, 0.25) for k in range(2)]

    def student_and_teacher(models, average, pick, g):
        a, b = views(pick, g)
        with torch.no_grad():
            keys = [F.normalize(average["head"](_cls(average["encoder"], x)).float()) for x in (b, a)]
        total, place = 0.0, torch.arange(len(a), device=device)
        for x, key in zip((a, b), keys):
            query = models["guess"](models["head"](_cls(models["encoder"], x)))
            total = total + F.cross_entropy(F.normalize(query.float()) @ key.T / TEMPERATURE, place)
        return total / 2

    def alone(models, average, pick, g):
        both = F.normalize(models["head"](_cls(models["encoder"], torch.cat(views(pick, g)))).float())
        alike = both @ both.T / TEMPERATURE
        alike.fill_diagonal_(-torch.inf)
        return F.cross_entropy(alike, torch.arange(len(both), device=device).roll(len(both) // 2))

    torch.manual_seed(args.seed + 22 + (stage == "dinov2"))
    models = {"encoder": new_dino(stage), "head": mlp(width)}
    models["encoder"].set_attn_implementation("eager")
    if stage == "dinov1":
        models["guess"] = mlp(out)
    loss_of = student_and_teacher if stage == "dinov1" else alone
    average, losses = _fit(args, device, stage, torch.nn.ModuleDict(models), len(pairs) // KIN, loss_of)
    export_encoder(args.output_dir / "encoders" / stage, average["encoder"], "BitImageProcessor")
    return losses


# report ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def figures(pipeline):
    """The figures on the card, {name: value}: PSNR in dB of the autoencoder's round trip, and the denoising loss of drawings
    (mean squared error of v) with the right caption and with one that names a wrong subject, colour or scene."""
    from skimage import data

    vae = pipeline.vae

    def round_trip(images):
        x = _to_float(np.stack([np.asarray(i) for i in images]), vae.device)
        return psnr(x, vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)).tolist()

    fresh = [world.sample(np.random.default_rng((REPORT_SEEDS["psnr"], k)))[0] for k in range(REPORT_PICTURES)]
    photos = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in REPORT_PHOTOS]
    photos = [ImageOps.fit(p, (world.SIZE, world.SIZE), Image.LANCZOS) for p in photos]
    found = {"PSNR, fresh drawings": float(np.mean(round_trip(fresh)))}
    found |= {f"PSNR, {name}": value for name, value in zip(REPORT_PHOTOS, round_trip(photos))}

    lists = world.CLASSES, list(world.COLOURS), list(world.SCENES)
    images, texts = [], {"right caption": [], "wrong subject": [], "wrong colour": [], "wrong scene": []}
    for k in range(REPORT_PICTURES):
        rng = np.random.default_rng((REPORT_SEEDS["loss"], k))
        chosen = [rng.integers(len(names)) for names in lists]
        subject, colour, scene = (names[c] for names, c in zip(lists, chosen))
        images.append(world.draw(subject, colour, "plain", scene, rng))
        for wrong, said in zip((None, 0, 1, 2), texts.values()):
            moved = [c + WRONG_BY * (place == wrong) for place, c in enumerate(chosen)]
            subject, colour, scene = (names[c % len(names)] for names, c in zip(lists, moved))
            said.append(world.caption(subject, colour, None, scene, np.random.default_rng((REPORT_SEEDS["caption"], k))))
    latents = vae.encode(_to_float(np.stack([np.asarray(i) for i in images]), vae.device)).latent_dist.mean
    latents = latents * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(REPORT_SEEDS["noise"])).to(vae.device)
    t = torch.full((len(latents),), REPORT_TIMESTEP, device=vae.device)
    losses = {}
    for name, said in texts.items():
        ids = encode(pipeline.tokenizer, said).to(vae.device)
        losses[name] = v_loss(pipeline.unet, pipeline.text_encoder, pipeline.scheduler, latents, ids, noise, t)
        found[f"loss, {name}"] = losses[name].mean().item()
        if name != "right caption":
            found[f"loss, {name}, share higher"] = (losses[name] > losses["right caption"]).float().mean().item()
    return found


def _share(values):
    return float(np.mean(list(values)))


@torch.no_grad()
def judge_figures(judge, vae):
    """The judge's figures on the card: the share of fresh drawings of which it says what is right, precision and recall of
    individuals, half of the pictures being look-alikes; and the same of drawings as the autoencoder returns them."""
    sampled = [draw_sampled((REPORT_SEEDS["judge"], k)) for k in range(REPORT_LOOKS)]
    someone = [draw_someone((REPORT_SEEDS["individual"], k)) for k in range(REPORT_LOOKS)]
    drawn, labels = [[one[k] for one in (*sampled, *someone)] for k in (0, -1)]
    g, found = torch.Generator().manual_seed(REPORT_SEEDS["noise"]), {}
    for after, pixels in (("", drawn), (", after the autoencoder", round_trips(vae, np.stack(drawn), g).numpy())):
        said = judge([Image.fromarray(p) for p in pixels])
        right = [
            {n: answer[n] == ANSWERS[n][p] for n, p in zip(ANSWERS, row) if p >= 0} for answer, row in zip(said, labels)
        ]
        for name in ("subject", "scene", "style", "colour"):
            found[f"judge, {name}{after}"] = _share(r[name] for r in right[:REPORT_LOOKS] if name in r)
        found[f"judge, subject and scene{after}"] = _share(r["subject"] and r["scene"] for r in right[:REPORT_LOOKS])
        named = [answer["individual"] for answer in said[REPORT_LOOKS:]]
        truth = [ANSWERS["individual"][row[-1]] for row in labels[REPORT_LOOKS:]]
        found[f"judge, individual, precision{after}"] = _share(n == t for n, t in zip(named, truth) if n)
        found[f"judge, individual, recall{after}"] = _share(n == t for n, t in zip(named, truth) if t)
    return found


def _features(folder, images):
    """Normalised features (N, d) of the encoder in `folder`: image embeddings of a CLIP, else the class token's."""
    from transformers import AutoImageProcessor, AutoModel

    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for k in range(0, len(images), 100):
        x = processor([Image.fromarray(p) for p in images[k : k + 100]], return_tensors="pt").pixel_values
        clip = model.config.model_type == "clip"
        found.append(model.get_image_features(pixel_values=x).pooler_output if clip else _cls(model, x))
    return F.normalize(torch.cat(found)), model


@torch.no_grad()
def clip_figures(folder):
    """CLIP's figures on the card: zero-shot subject and scene of fresh drawings, and how often a drawing finds its caption
    among 100 different ones."""
    from transformers import CLIPTokenizer

    fresh = [draw_sampled((REPORT_SEEDS["clip"], k)) for k in range(REPORT_LOOKS)]
    pictures, model = _features(folder, [pixels for pixels, _, _ in fresh])
    tokenizer = CLIPTokenizer.from_pretrained(folder)

    def said(texts):
        return F.normalize(model.get_text_features(input_ids=encode(tokenizer, texts)).pooler_output)

    texts = [f"a photo of a {subject} {places[0]}" for subject in world.CLASSES for places, _ in world.SCENES.values()]
    texts, found = said(texts).unflatten(0, (len(world.CLASSES), -1)), {}
    for k, name in enumerate(("subject", "scene")):
        nearest = (pictures @ F.normalize(texts.mean(1 - k)).T).argmax(1).tolist()
        found[f"clip, {name}"] = _share(n == row[2][k] for n, row in zip(nearest, fresh) if ANSWERS[name][row[2][k]])
    captions = [text for _, text, _ in fresh]
    distinct = [k for k, text in enumerate(captions) if captions.index(text) == k]
    groups = [distinct[k : k + 100] for k in range(0, max(1, len(distinct) - 99), 100)]
    right = [pictures[g] @ said([captions[k] for k in g]).T for g in groups]
    found["clip, caption among 100"] = _share((r.argmax(1) == torch.arange(len(r))).float().mean().item() for r in right)
    return found


@torch.no_grad()
def dino_figures(folder):
    """A DINO's figures on the card: subject and scene by the 5 nearest of four times as many drawings, and how often a
    drawing of an individual is nearer to another one of it than to a look-alike of its class, both in one other scene."""
    name, rng = Path(folder).name, np.random.default_rng(REPORT_SEEDS["dino"])
    fresh = [draw_sampled((REPORT_SEEDS["dino"], k)) for k in range(5 * REPORT_LOOKS // 2)]
    features, _ = _features(folder, [pixels for pixels, _, _ in fresh])
    asked, found = REPORT_LOOKS // 2, {}
    nearest = (features[:asked] @ features[asked:].T).topk(5).indices + asked
    for k, what in enumerate(("subject", "scene")):
        labels = torch.tensor([row[2][k] for row in fresh])
        found[f"{name}, {what}"] = (labels[nearest].mode(1).values == labels[:asked]).float().mean().item()
    drawn = []
    for k in range(REPORT_LOOKS // 2):
        who, one = list(world.INDIVIDUALS.items())[k % len(world.INDIVIDUALS)]
        here, there = rng.permutation(list(world.SCENES))[:2]
        while True:
            colour, coat, subject = _look_alike(rng, one.subject, one.colour, one.coat)
            if subject == one.subject:
                break
        drawn += [np.asarray(world.draw_individual(who, scene, rng)) for scene in (here, there)]
        drawn.append(np.asarray(world.draw(subject, colour, "plain", there, rng, coat)))
    anchor, same, other = _features(folder, drawn)[0].unflatten(0, (-1, 3)).unbind(1)
    found[f"{name}, same individual"] = ((anchor * same).sum(1) > (anchor * other).sum(1)).float().mean().item()
    return found


@torch.no_grad()
def base_figures(pipeline, judge):
    """What the judge sees in the pipeline's photographs of `world.HELD_OUT`, which no training picture shows: the share with
    the asked subject and scene, also by each of them, and with the asked colour."""
    asked = sorted(world.HELD_OUT)[:: len(world.HELD_OUT) // REPORT_PROMPTS][:REPORT_PROMPTS]
    texts = [
        world.caption(s, c, None, p, np.random.default_rng((REPORT_SEEDS["prompt"], k))) for k, (s, c, p) in enumerate(asked)
    ]
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for k in range(0, len(texts), 20):
        generators = [torch.Generator().manual_seed(REPORT_SEEDS["picture"] + k + j) for j in range(len(texts[k : k + 20]))]
        images += pipeline(texts[k : k + 20], generator=generators, num_inference_steps=30, guidance_scale=4.0).images
    said = judge(images)
    both = [a["subject"] == s and a["scene"] == p for a, (s, _, p) in zip(said, asked)]
    found = {"held out, subject and scene": _share(both)}
    found["held out, subject"] = _share(a["subject"] == s for a, (s, _, _) in zip(said, asked))
    found["held out, scene"] = _share(a["scene"] == p for a, (_, _, p) in zip(said, asked))
    found["held out, colour"] = _share(a["colour"] == c for a, (_, c, _) in zip(said, asked))
    for place, names in ((0, world.CLASSES), (2, world.SCENES)):
        for name in names:
            if any(one[place] == name for one in asked):
                found[f"held out, {name}"] = _share(b for b, one in zip(both, asked) if one[place] == name)
    return found


def report(args):
    """Prints the figures of the pipeline in `args.report`, and of judge and encoders beside it, as the rows of the card's
    table, and writes samples.png there."""
    from diffusers import StableDiffusionPipeline

    beside = args.report.resolve().parent
    needed = [args.report / "model_index.json", beside / "judge" / WEIGHTS]
    needed += [beside / "encoders" / name / "config.json" for name in ("clip", "dinov1", "dinov2")]
    for file in needed:
        if not file.exists():
            raise SystemExit(f"{args.report} has no pipeline, or no judge and encoders beside it: there is no {file}")
    pipeline = StableDiffusionPipeline.from_pretrained(args.report).to(args.device)
    judge = load_judge(beside / "judge", args.device)
    found = figures(pipeline) | judge_figures(judge, pipeline.vae) | clip_figures(beside / "encoders" / "clip")
    for name in ("dinov1", "dinov2"):
        found |= dino_figures(beside / "encoders" / name)
    found |= base_figures(pipeline, judge)
    for name, value in found.items():
        print(f"| {name} | {value:.{1 if name.startswith('PSNR') else 3}f} |")
    grid = sample_grid(args.report, GRID_PROMPTS[: args.grid_prompts], columns=8, device=args.device, repeats=2)
    grid.save(args.report / "samples.png", optimize=True)
    return found


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--output_dir",
        type=Path,
        help="train; where checkpoints, grids and model/ go; run again with the same folder and arguments to resume",
    )
    what.add_argument("--report", type=Path, metavar="DIR", help="print the card's figures of the pipeline in DIR")
    add("--seed", type=int, default=0, help="seed of everything drawn and trained")
    add(
        "--vae_images",
        type=int,
        default=8000,
        help="drawings for the autoencoder; as many again, half and half, are dead leaves and photographs",
    )
    add("--vae_steps", type=int, default=3000, help="steps of the autoencoder")
    add(
        "--encoder_steps",
        type=int,
        default=2500,
        help="steps after which the encoder stands still and the decoder goes on",
    )
    add("--vae_batch_size", type=int, default=16)
    add("--vae_lr", type=float, default=1.5e-3, help="falls to zero over the second half")
    add(
        "--kl_weight",
        type=float,
        default=3e-4,
        help="weight of the mean KL divergence of a latent; small: the latents need only be bounded",
    )
    add("--images", type=int, default=48000, help="drawings for the UNet, encoded once")
    add("--unet_steps", type=int, default=15000, help="steps of UNet and text encoder together")
    add("--batch_size", type=int, default=16)
    add("--lr", type=float, default=7e-4, help="learning rate of UNet and text encoder between warm-up and fall")
    add("--warmup", type=int, default=300, help="steps of linear warm-up")
    add("--fall", type=float, default=0.35, help="share of the steps, at the end, over which the rate falls to zero")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights, which are the ones exported")
    add("--caption_dropout", type=float, default=0.1, help="share of empty captions, for classifier-free guidance")
    add(
        "--drawings",
        type=int,
        default=32000,
        help="drawings for judge and encoders; 3/8 as many of individuals and as many of pairs beside them",
    )
    for stage, steps in LOOKING_STEPS.items():
        add(f"--{stage}_steps", type=int, default=steps, help=f"steps of {stage}")
    add(
        "--stages",
        nargs="+",
        choices=("unet", *LOOKING),
        default=("unet", *LOOKING),
        help="what to train; the VAE is for all",
    )
    add("--save_every", type=int, default=250, help="steps between checkpoints; each also renews <output_dir>/model")
    add("--grid_every", type=int, default=500, help="steps between sample grids")
    add("--grid_prompts", type=int, default=len(GRID_PROMPTS), help="prompts in a grid")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16 where autocast allows")
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw; 1 draws in this one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.report:
        return report(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    tokenizer = build_tokenizer(world_words())
    vae, losses = train_vae(args, device), {}
    if "unet" in args.stages:
        latents, ids = cache_latents(args, device, vae, tokenizer[0])
        losses["unet"] = train_unet(args, device, vae, tokenizer, latents, ids)
    if set(args.stages) != {"unet"}:
        drawings = cache_drawings(args)
    if "judge" in args.stages:
        losses["judge"] = train_judge(args, device, drawings, vae)
    if "clip" in args.stages:
        losses["clip"] = train_clip(args, device, drawings, tokenizer)
    for stage in ("dinov1", "dinov2"):
        if stage in args.stages:
            losses[stage] = train_dino(args, device, drawings, stage)
    return losses


if __name__ == "__main__":
    main()
