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
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

from . import world
from .judge import WEIGHTS, load_judge
from .looking import (
    LOOKING,
    cache_drawings,
    clip_figures,
    dino_figures,
    judge_figures,
    share,
    train_clip,
    train_dino,
    train_judge,
)
from .steps import adamw, compute_in_float32, descend, generator, load, many, rate_at, save, settings, to_float
from .text import ADDED_TOKENS, RARE_TOKENS, build_tokenizer, encode, save_tokenizer, text_config, world_words

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
REPORT_PICTURES, REPORT_TIMESTEP = 64, 700  # at 700 a latent is mostly noise, so that the caption matters
# other drawings than training's, whose seeds are --seed + 1 to + 7
REPORT_SEEDS = {"psnr": 71, "loss": 73, "caption": 74, "noise": 0, "prompt": 85, "picture": 0}
REPORT_PROMPTS = 200  # pictures that the base is asked for
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


def read_photos(names):
    """scikit-image's photographs, as RGB pictures."""
    from skimage import data

    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]


_photos = []  # of PHOTOS, read once in each process


def photo_crop(job):
    """A random square of a scikit-image photograph, at 64×64: (seed, index) -> uint8 array."""
    if not _photos:
        _photos.extend(read_photos(PHOTOS))
    rng = np.random.default_rng(job)
    image = _photos[rng.choice(len(_photos), p=_photo_odds())]
    side = int(min(image.size) * rng.uniform(0.2, 1.0))
    x, y = rng.integers(0, image.width - side + 1), rng.integers(0, image.height - side + 1)
    pixels = np.asarray(image.crop((x, y, x + side, y + side)).resize((world.SIZE, world.SIZE), Image.LANCZOS), np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = pixels[..., rng.permutation(3)] if rng.random() < 0.3 else pixels
    pixels = pixels * rng.uniform(0.8, 1.15) + rng.uniform(-15, 15)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _photo_odds():
    odds = np.asarray([3.0 if name in ("astronaut", "coffee", "rocket") else 1.0 for name in PHOTOS])
    return odds / odds.sum()


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
    from transformers import CLIPTextModel

    return CLIPTextModel(text_config(tokenizer, hidden_size=160, intermediate_size=480, num_hidden_layers=2))


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


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each picture, for (N, 3, H, W) in [-1, 1]."""
    return -10 * torch.log10((((a - b) / 2) ** 2).mean((1, 2, 3)))


def train_vae(args, device):
    """The autoencoder, which draws and looks at photographs only if it has steps to go."""
    path = args.output_dir / "vae.pt"
    torch.manual_seed(args.seed)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    start = 0
    if state := load(path, args, device):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        vae.register_to_config(scaling_factor=state["scaling_factor"])
    if start >= args.vae_steps:
        return vae.eval()
    n = args.vae_images
    pixels = many(draw_one, n, args.seed + 1, args.workers, "drawing")
    pixels = [p for p, _ in pixels] + many(dead_leaves, n // 2, args.seed + 2, args.workers, "dead leaves")
    pixels += many(photo_crop, n // 2, args.seed + 3, args.workers, "photographs")
    pixels = torch.as_tensor(np.stack(pixels))
    bar = tqdm(range(start, args.vae_steps), initial=start, total=args.vae_steps, desc="vae", mininterval=5)
    seen = []
    for step in bar:
        g = generator(args.seed, "vae", step)
        x = to_float(pixels[torch.randint(len(pixels), (args.vae_batch_size,), generator=g)], device)
        x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = args.vae_lr * rate_at(step, args.vae_steps, 100, 0.5)
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
                    [vae.encode(to_float(pixels[k : k + 64], device)).latent_dist.mean for k in range(0, min(n, 512), 64)]
                )
            scale = round(1 / latents.float().std().item(), 4)
            vae.register_to_config(scaling_factor=scale)
            save(
                path,
                vae=vae.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                scaling_factor=scale,
                settings=settings(args, "vae"),
            )
    return vae.eval()


def cache_latents(args, device, vae, tokenizer):
    """Draws the training pictures and encodes them: scaled latents (N, 8, 16, 16) fp16, token ids (N, MAX_TOKENS)."""
    path = args.output_dir / "latents.pt"
    if state := load(path, args):
        return state["latents"], state["ids"]
    drawn = many(draw_one, args.images, args.seed + 4, args.workers, "drawing")
    ids = torch.cat([encode(tokenizer, [t for _, t in drawn[k : k + 1000]]) for k in range(0, len(drawn), 1000)])
    latents = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        for k in tqdm(range(0, len(drawn), 64), desc="encoding", mininterval=5):
            x = to_float(np.stack([p for p, _ in drawn[k : k + 64]]), device).contiguous(memory_format=torch.channels_last)
            latents.append((vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor).half().cpu())
    latents = torch.cat(latents).contiguous()
    save(path, latents=latents, ids=ids, settings=settings(args, "latents"))
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
    compute_in_float32(Path(folder) / "text_encoder" / "config.json")


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
    """Trains UNet and text encoder and writes `<output_dir>/model`; returns the losses."""
    from diffusers.models.attention_processor import AttnProcessor

    path = args.output_dir / "unet.pt"
    torch.manual_seed(args.seed + 10)
    text_encoder = new_text_encoder(tokenizer[0]).to(device)
    unet = new_unet(text_encoder.config.hidden_size).to(device)
    if device.type == "cpu":
        # plain products made a step 1.3 times as fast as the fused attention at these sizes (torch 2.13, bf16)
        unet.set_attn_processor(AttnProcessor())
    models = torch.nn.ModuleList([unet, text_encoder]).train()
    ema = copy.deepcopy(models).eval().requires_grad_(False)
    optimizer = adamw(models, args.lr, 0.01, (0.9, 0.99))
    scheduler = new_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = (snr.clamp(max=MIN_SNR) / (snr + 1)).to(device)
    empty = encode(tokenizer[0], [""])[0]
    start, losses = 0, []
    if state := load(path, args, device):
        models.load_state_dict(state["models"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]
        if start == args.unet_steps:  # nothing left to do but to take over a decoder that went on
            export(args.output_dir / "model", vae, ema[1], tokenizer, ema[0])
    bar = tqdm(range(start, args.unet_steps), initial=start, total=args.unet_steps, desc="unet", mininterval=5)
    for step in bar:
        g = generator(args.seed, "unet", step)
        pick = torch.randint(len(latents), (args.batch_size,), generator=g)
        x, tokens = latents[pick].float().to(device), ids[pick].clone()
        tokens[torch.rand(args.batch_size, generator=g) < args.caption_dropout] = empty
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch_size,), generator=g).to(device)
        noise = torch.randn(x.shape, generator=g).to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate_at(step, args.unet_steps, args.warmup, args.fall)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = (v_loss(unet, text_encoder, scheduler, x, tokens.to(device), noise, t) * weight[t]).mean()
        descend(loss, models, ema, optimizer, step, args.ema)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}")
        last = step + 1 == args.unet_steps
        if last or (step + 1) % args.save_every == 0:
            save(
                path,
                models=models.state_dict(),
                ema=ema.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                losses=losses,
                settings=settings(args, "unet"),
            )
            export(args.output_dir / "model", vae, ema[1], tokenizer, ema[0])
        if last or (step + 1) % args.grid_every == 0:
            grid = sample_grid(args.output_dir / "model", GRID_PROMPTS[: args.grid_prompts], device=device)
            grid.save(args.output_dir / f"grid_{step + 1:06d}.png")
    return losses


# report ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def denoising_figures(pipeline):
    """The first figures on the card, {name: value}: PSNR in dB of the autoencoder's round trip, and the mean squared
    error of v on drawings, with the right caption and with one that names a wrong subject, colour or scene."""
    vae = pipeline.vae

    def round_trip(images):
        x = to_float(np.stack([np.asarray(i) for i in images]), vae.device)
        return psnr(x, vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)).tolist()

    fresh = [world.sample(np.random.default_rng((REPORT_SEEDS["psnr"], k)))[0] for k in range(REPORT_PICTURES)]
    photos = [ImageOps.fit(p, (world.SIZE, world.SIZE), Image.LANCZOS) for p in read_photos(REPORT_PHOTOS)]
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
    latents = vae.encode(to_float(np.stack([np.asarray(i) for i in images]), vae.device)).latent_dist.mean
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


@torch.no_grad()
def held_out_figures(pipeline, judge):
    """What the judge sees in the pipeline's photographs of `world.HELD_OUT`, which no training picture shows: the
    share with the asked subject and scene, each alone, the asked colour, and both again by subject and by scene."""
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
    found = {"held out, subject and scene": share(both)}
    found["held out, subject"] = share(a["subject"] == s for a, (s, _, _) in zip(said, asked))
    found["held out, scene"] = share(a["scene"] == p for a, (_, _, p) in zip(said, asked))
    found["held out, colour"] = share(a["colour"] == c for a, (_, c, _) in zip(said, asked))
    for place, names in ((0, world.CLASSES), (2, world.SCENES)):
        for name in names:
            if any(one[place] == name for one in asked):
                found[f"held out, {name}"] = share(b for b, one in zip(both, asked) if one[place] == name)
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
    found = denoising_figures(pipeline) | judge_figures(judge, pipeline.vae) | clip_figures(beside / "encoders" / "clip")
    for name in ("dinov1", "dinov2"):
        found |= dino_figures(beside / "encoders" / name)
    found |= held_out_figures(pipeline, judge)
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
        help="drawings for judge and encoders; 3/8 as many of individuals and half as many pairs beside them",
    )
    for stage, (steps, _, _) in LOOKING.items():
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
