"""What training all stages of the embedded weights has in common: checkpoints that are refused when made with other
arguments, learning rates, drawing in many processes, and storing a model in half precision."""

import json
import math
import multiprocessing
import os

import torch
from tqdm import tqdm

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
TRAINED = ("vae", "unet", "judge", "clip", "dinov1", "dinov2")  # by steps, each with random numbers of its own


def many(function, count, seed, workers, what):
    """[function((seed, k)) for k below count], in `workers` processes; `what` names the progress bar."""
    jobs = [(seed, k) for k in range(count)]
    if workers < 2:
        return [function(job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return list(tqdm(pool.imap(function, jobs, chunksize=64), total=count, desc=what, mininterval=5))


def to_float(pixels, device):
    """uint8 (N, 64, 64, 3) -> float (N, 3, 64, 64) in [-1, 1]."""
    return torch.as_tensor(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def save(path, **state):
    """Writes a checkpoint so that a run killed meanwhile leaves the one before."""
    torch.save(state, str(path) + ".part")
    os.replace(str(path) + ".part", path)


def settings(args, stage):
    """The arguments that the file of `stage` depends on."""
    names, before = [], stage
    while before:
        before, own = STAGES[before]
        names = [*own, *names]
    values = {name: getattr(args, name) for name in names}
    if stage != "vae" and "encoder_steps" in values:  # the latents are those of the encoder as far as it was trained
        values["encoder_steps"] = min(args.encoder_steps, args.vae_steps)
    return values


def load(path, args, device="cpu"):
    """The state in `path`, or None without that file; SystemExit if it was made with other arguments."""
    if not path.exists():
        return None
    state = torch.load(path, map_location=device)
    way_out = f"give that again, or delete {path.name} and the files of later stages, or take another --output_dir"
    for name, value in settings(args, path.stem).items():
        was = state.get("settings", {}).get(name)
        if was != value:
            raise SystemExit(f"{path} was made with {name} = {was}, not {value}: {way_out}")
    steps = getattr(args, f"{path.stem}_steps", math.inf)
    if state.get("step", 0) > steps:
        raise SystemExit(f"{path} has done step {state['step']}, past --{path.stem}_steps {steps}: {way_out}")
    return state


def rate_at(step, steps, warm, fall):
    """Share of the full learning rate: linear warm-up, constant, then a cosine over the last `fall` of the steps."""
    down = max(1, int(steps * fall))
    return min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0, step - steps + down) / down)))


def adamw(models, lr, weight_decay, betas):
    """The optimizer of all parameters, which decays matrices alone."""
    several = [p for p in models.parameters() if p.ndim > 1], [p for p in models.parameters() if p.ndim < 2]
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(several, (weight_decay, 0.0))]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def descend(loss, models, average, optimizer, step, decay):
    """One step of the optimizer, with gradients of norm 1 at most; `average`, the weights averaged by `decay`, follows."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():  # sooner at first, when the weights are far from where they will be
        decay = min(decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - decay)


def generator(seed, stage, step):
    """The randomness of one step of `stage`, the same however often the run was interrupted."""
    return torch.Generator().manual_seed((seed * len(TRAINED) + TRAINED.index(stage)) * 10_000_000 + step)


def compute_in_float32(config):
    """Says so in a model's config.json, whatever the weights are stored in."""
    values = json.loads(config.read_text())
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        if "dtype" in part or part is values:
            part["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n")
