"""Trains what looks at pictures of the drawn world, on drawings of its own, and measures it: the judge, CLIP and two DINOs.

`train` runs these stages; the figures are those on the base model's card.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from . import world
from .judge import ANSWERS, WEIGHTS, Net
from .steps import adamw, compute_in_float32, descend, generator, load, many, rate_at, save, settings, to_float
from .text import encode, save_tokenizer, text_config

# stage -> steps, pictures (or groups of pairs) in a step, learning rate between warm-up and fall
LOOKING = {
    "judge": (3000, 96, 2e-3),
    "clip": (2000, 128, 1.5e-3),
    "dinov1": (1400, 16, 1.5e-3),
    "dinov2": (1400, 16, 1.5e-3),
}
KIN = 8  # pairs of drawings in a group
STYLE_ODDS = (0.85, 0.05, 0.05, 0.05)  # of individuals, their look-alikes and pairs
WARMUP, FALL, EMA = 100, 0.5, 0.99  # steps, share of the steps, decay of the averaged weights, which are the ones exported
ROUND_TRIPS = 0.25  # share of the judge's drawings that it sees as the autoencoder returns them
TEMPERATURE = 0.1  # of the similarities that pairs of drawings are told apart by
REPORT_LOOKS = 1000  # drawings that judge and encoders are shown for the card
REPORT_SEEDS = {"judge": 81, "individual": 82, "clip": 83, "dino": 84, "noise": 0}  # of other drawings than training's


# data -----------------------------------------------------------------------------------------------------------------


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
    style = list(world.STYLES)[rng.choice(len(world.STYLES), p=STYLE_ODDS)]
    subject, colour, coat, traits = world.INDIVIDUALS[name]
    traits = np.random.default_rng(traits if rng.random() < 0.7 else rng.integers(1 << 32))
    canvas = world.PAINT_SCENE[scene](rng)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            colour, coat = world.jitter(rng, colour, 7), {part: world.jitter(rng, own, 7) for part, own in coat.items()}
    else:
        colour, coat, subject = look_alike(rng, subject, colour, coat)
        name = None
    image = world.compose(rng, canvas, subject, colour, coat=coat, traits=traits, style=style)
    return np.asarray(image), _labels(subject, scene, style, colour, name)


def look_alike(rng, subject, colour, coat):
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
        if not world.is_someone(found[2], found[0], found[1]):
            return found


def draw_pair(job):
    """The same subject (never one of `world.INDIVIDUALS`) twice, each time in a scene and a pose of its own:
    (seed, index) -> (two uint8 arrays, its class's place in `world.CLASSES`).

    The `KIN` pairs of a group share their style, and either their colours, so that the class alone tells them apart, or
    their class, so that only the colours and what has them do.
    """
    group, place = divmod(job[1], KIN)
    rng, own = np.random.default_rng((job[0], group, 0)), np.random.default_rng((*job, 1))
    pattern = world.PATTERNS[rng.choice(len(world.PATTERNS), p=world.PATTERN_ODDS)]
    style = list(world.STYLES)[rng.choice(len(world.STYLES), p=STYLE_ODDS)]
    classes = rng.permutation(len(world.CLASSES))
    kind, of_colour = (classes[0], own) if group % 2 else (classes[place], rng)
    subject, colour, second = world.CLASSES[kind], _any_colour(of_colour), _any_colour(of_colour)
    while True:
        parts, coat = own.permutation(world.PARTS[subject]), {}
        if len(parts) and own.random() < 0.6:
            coat = {str(part): second for part in parts[: own.integers(1, len(parts) + 1)]}
        if subject == "bottle" and own.random() < 0.6:
            coat, colour = {"cap": second, "liquid": colour}, world.CLEAR_PLASTIC
        if not world.is_someone(subject, colour, coat):
            break
        colour = _any_colour(own)
    traits, drawn, scenes = own.integers(1 << 32), [], list(world.PAINT_SCENE.values())
    for _ in range(2):
        canvas, form = scenes[own.integers(len(scenes))](own), np.random.default_rng(traits)
        drawn.append(np.asarray(world.compose(own, canvas, subject, colour, pattern, coat, form, style)))
    return drawn, kind


def cache_drawings(args):
    """Draws what judge and encoders are trained on; {"sampled" (N), "someone" (3N/8), "pairs" (N/2, 2): uint8 pictures
    (…, 64, 64, 3), "captions": N texts, "sampled labels", "someone labels": places in `ANSWERS`, "pair classes": in
    `world.CLASSES`}."""
    path = args.output_dir / "drawings.pt"
    if state := load(path, args):
        return state
    sampled = many(draw_sampled, args.drawings, args.seed + 5, args.workers, "drawing")
    someone = many(draw_someone, max(2, args.drawings * 3 // 8), args.seed + 6, args.workers, "individuals")
    pairs = many(draw_pair, max(2, args.drawings // 2 // KIN) * KIN, args.seed + 7, args.workers, "pairs")
    state = {
        "sampled": torch.as_tensor(np.stack([pixels for pixels, _, _ in sampled])),
        "captions": [text for _, text, _ in sampled],
        "sampled labels": torch.tensor([labels for _, _, labels in sampled]),
        "someone": torch.as_tensor(np.stack([pixels for pixels, _ in someone])),
        "someone labels": torch.tensor([labels for _, labels in someone]),
        "pairs": torch.as_tensor(np.stack([drawn for drawn, _ in pairs])),
        "pair classes": torch.tensor([kind for _, kind in pairs]),
    }
    save(path, **state, settings=settings(args, "drawings"))
    return state


@torch.no_grad()
def round_trips(vae, pixels, g, noise=0.3):
    """uint8 pictures (N, 64, 64, 3) as `vae` returns them from latents with up to `noise` times their deviation added."""
    found, device = [], vae.device
    for k in range(0, len(pixels), 64):
        latents = vae.encode(to_float(pixels[k : k + 64], device)).latent_dist.mean
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


# training -------------------------------------------------------------------------------------------------------------


def _fit(args, device, stage, models, count, loss_of):
    """Trains `models`, a ModuleDict, on `count` examples; returns their averaged weights and the losses.

    `loss_of(models, average, pick, g)` is the loss of the examples at `pick`, `g` the generator of the step.
    """
    path, steps = args.output_dir / f"{stage}.pt", getattr(args, f"{stage}_steps")
    _, batch, rate = LOOKING[stage]
    models.to(device).train()
    average = copy.deepcopy(models).eval().requires_grad_(False)
    optimizer = adamw(models, rate, 0.05, (0.9, 0.98))
    start, losses = 0, []
    if state := load(path, args, device):
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=5)
    for step in bar:
        g = generator(args.seed, stage, step)
        pick = torch.randint(count, (min(batch, count),), generator=g)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps, WARMUP, FALL)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = loss_of(models, average, pick, g)
        descend(loss, models, average, optimizer, step, EMA)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if step + 1 == steps or (step + 1) % args.save_every == 0:
            state = {"models": models.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save(path, **state, step=step + 1, losses=losses, settings=settings(args, stage))
    return average, losses


def train_judge(args, device, drawings, vae):
    """Learns to answer `ANSWERS` and writes `<output_dir>/judge`; returns the losses."""
    pixels = torch.cat([drawings["sampled"], drawings["someone"]])
    labels = torch.cat([drawings["sampled labels"], drawings["someone labels"]])
    g = torch.Generator().manual_seed(args.seed)
    again = torch.randperm(len(pixels), generator=g)[: int(ROUND_TRIPS * len(pixels))]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        pixels = torch.cat([pixels, round_trips(vae, pixels[again], g)])
    labels = torch.cat([labels, labels[again]])

    def loss_of(models, average, pick, g):
        x = vary(to_float(pixels[pick], device), g, 0.15).contiguous(memory_format=torch.channels_last)
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

    text = text_config(tokenizer, hidden_size=96, intermediate_size=384, num_hidden_layers=3).to_dict()
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": world.SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def new_dino(stage):
    """A `ViTModel` for dinov1, a `Dinov2Model` for dinov2."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    config, model = {"dinov1": (ViTConfig, ViTModel), "dinov2": (Dinov2Config, Dinov2Model)}[stage]
    size = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": world.SIZE, "patch_size": 8}
    return model(config(**size, **({"intermediate_size": 384} if stage == "dinov1" else {"mlp_ratio": 4})))


def export_encoder(folder, model, processor):
    """Writes a transformers model, stored in half precision and read as float32, and how pictures are prepared for it."""
    model = copy.deepcopy(model).cpu().half()
    model.save_pretrained(folder)
    compute_in_float32(Path(folder) / "config.json")
    side = {"height": world.SIZE, "width": world.SIZE}
    told = {"image_processor_type": processor, "do_resize": True, "size": {"shortest_edge": world.SIZE}, "resample": 3}
    told |= {"do_center_crop": True, "crop_size": side, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    told |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")


def train_clip(args, device, drawings, tokenizer):
    """Learns which drawing a caption is of (Radford et al. 2021); writes <output_dir>/encoders/clip, returns the losses."""
    pixels, ids = drawings["sampled"], encode(tokenizer[0], drawings["captions"])
    eos = tokenizer[0].eos_token_id

    def loss_of(models, average, pick, g):
        said = ids[pick]
        said = said[:, : int((said != eos).sum(1).max()) + 1].to(device)  # what follows the end is padding
        x = vary(to_float(pixels[pick], device), g, 0.15)
        logits = models["clip"](pixel_values=x, input_ids=said).logits_per_image.float()
        same = (said[:, None] == said[None]).all(-1) & ~torch.eye(len(said), dtype=torch.bool, device=device)
        logits = logits.masked_fill(same, -torch.inf)  # as right as its own caption
        place = torch.arange(len(said), device=device)
        return (F.cross_entropy(logits, place) + F.cross_entropy(logits.T, place)) / 2

    torch.manual_seed(args.seed + 21)
    model = new_clip(tokenizer[0])
    model.set_attn_implementation("eager")  # plain products are faster at these sizes (torch 2.13, CPU, bf16)
    average, losses = _fit(args, device, "clip", torch.nn.ModuleDict({"clip": model}), len(pixels), loss_of)
    folder = args.output_dir / "encoders" / "clip"
    export_encoder(folder, average["clip"], "CLIPImageProcessor")
    save_tokenizer(folder, *tokenizer)
    return losses


def _cls(encoder, x):
    return encoder(pixel_values=x).last_hidden_state[:, 0]


def train_dino(args, device, drawings, stage):
    """Learns to tell pairs of drawings of the same from others and, which makes it quick, to name their class.

    dinov1: a student finds its average, the teacher, among the teacher's of a batch (MoCo v3, Chen et al. 2021);
    dinov2: one network finds its own among all (SimCLR, Chen et al. 2020).
    Writes `<output_dir>/encoders/<stage>`; returns the losses.
    """
    pairs, classes, width, out = drawings["pairs"], drawings["pair classes"], 96, 64

    def mlp(first):
        return torch.nn.Sequential(torch.nn.Linear(first, 192), torch.nn.GELU(), torch.nn.Linear(192, out))

    def views(groups, g):
        pick = (groups[:, None] * KIN + torch.arange(KIN)).flatten()
        return [vary(to_float(pairs[pick, k], device), g, 0.25) for k in range(2)], classes[pick].to(device)

    def student_and_teacher(models, average, pick, g):
        (a, b), kinds = views(pick, g)
        with torch.no_grad():
            keys = [F.normalize(average["head"](_cls(average["encoder"], x)).float()) for x in (b, a)]
        total, place = 0.0, torch.arange(len(a), device=device)
        for x, key in zip((a, b), keys):
            seen = _cls(models["encoder"], x)
            query = F.normalize(models["guess"](models["head"](seen)).float())
            total = total + F.cross_entropy(query @ key.T / TEMPERATURE, place)
            total = total + F.cross_entropy(models["name"](seen).float(), kinds)
        return total / 2

    def alone(models, average, pick, g):
        both, kinds = views(pick, g)
        seen = _cls(models["encoder"], torch.cat(both))
        both = F.normalize(models["head"](seen).float())
        alike = both @ both.T / TEMPERATURE
        alike.fill_diagonal_(-torch.inf)
        found = F.cross_entropy(alike, torch.arange(len(both), device=device).roll(len(both) // 2))
        return found + F.cross_entropy(models["name"](seen).float(), kinds.repeat(2))

    torch.manual_seed(args.seed + 22 + (stage == "dinov2"))
    models = {"encoder": new_dino(stage), "head": mlp(width), "name": torch.nn.Linear(width, len(world.CLASSES))}
    models["encoder"].set_attn_implementation("eager")  # as CLIP's
    if stage == "dinov1":
        models["guess"] = mlp(out)
    loss_of = student_and_teacher if stage == "dinov1" else alone
    average, losses = _fit(args, device, stage, torch.nn.ModuleDict(models), len(pairs) // KIN, loss_of)
    export_encoder(args.output_dir / "encoders" / stage, average["encoder"], "BitImageProcessor")
    return losses


# report ---------------------------------------------------------------------------------------------------------------


def share(values):
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
            found[f"judge, {name}{after}"] = share(r[name] for r in right[:REPORT_LOOKS] if name in r)
        found[f"judge, subject and scene{after}"] = share(r["subject"] and r["scene"] for r in right[:REPORT_LOOKS])
        named = [answer["individual"] for answer in said[REPORT_LOOKS:]]
        truth = [ANSWERS["individual"][row[-1]] for row in labels[REPORT_LOOKS:]]
        found[f"judge, individual, precision{after}"] = share(n == t for n, t in zip(named, truth) if n)
        found[f"judge, individual, recall{after}"] = share(n == t for n, t in zip(named, truth) if t)
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
        found[f"clip, {name}"] = share(n == row[2][k] for n, row in zip(nearest, fresh) if ANSWERS[name][row[2][k]])
    captions = [text for _, text, _ in fresh]
    distinct = [k for k, text in enumerate(captions) if captions.index(text) == k]
    groups = [distinct[k : k + 100] for k in range(0, max(1, len(distinct) - 99), 100)]
    right = [pictures[g] @ said([captions[k] for k in g]).T for g in groups]
    found["clip, caption among 100"] = share((r.argmax(1) == torch.arange(len(r))).float().mean().item() for r in right)
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
            colour, coat, subject = look_alike(rng, one.subject, one.colour, one.coat)
            if subject == one.subject:
                break
        drawn += [np.asarray(world.draw_individual(who, scene, rng)) for scene in (here, there)]
        drawn.append(np.asarray(world.draw(subject, colour, "plain", there, rng, coat)))
    anchor, same, other = _features(folder, drawn)[0].unflatten(0, (-1, 3)).unbind(1)
    found[f"{name}, same individual"] = ((anchor * same).sum(1) > (anchor * other).sum(1)).float().mean().item()
    return found
