"""Trains an adapter on pictures of a subject.

Every random draw is a function of the seed and of what is drawn: the order of the pictures of the epoch; crop, mirror,
latent noise, noise and timestep of the number of the sample since the start; dropout of the step and process. So a run that
was stopped and resumed takes the same steps as one that was not, and, without dropout, n processes with batch b train the
same adapter as one with batch n·b.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from . import UserError, data, read_json
from .cache import Cache
from .families import load_family
from .grid import grid
from .methods import METHODS, Adapter, DreamBooth, TextualInversion, check_base
from .sample import DTYPES, check_size, generate, warn_of_cut_text

LOG_EVERY = 10  # steps between two reads of the loss on an accelerator, where each read waits for the device
VALIDATION = {"num_inference_steps": 25}
STATE, SETTINGS, LOG, CARD = "state.pt", "training_args.json", "loss.jsonl", "README.md"
# What marks an output folder as holding a run, and what --overwrite_output_dir removes besides.
RESULTS = ("adapter_model.safetensors", "adapter_config.json", "spectral_shifts.safetensors", "learned_embeds.safetensors",
           "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # fmt: skip
MARKS = ("checkpoint-[0-9]*", *RESULTS, SETTINGS, LOG, CARD)
CLASS_IMAGES = "class_images"
PICTURES = ("validation*.png", ".checkpoint-[0-9]*", "logs", CLASS_IMAGES)
# Options that may change between a checkpoint and the run that resumes from it; any other would make it another run.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps", "checkpointing_steps",
    "checkpoints_total_limit", "validation_prompt", "validation_image", "validation_steps", "num_validation_images",
    "gradient_checkpointing",
    # What these amount to is compared instead: `pictures`, `images_per_step` and, by `load_adapter`, the base weights.
    "instance_data_dir", "instance_prompt", "train_batch_size", "gradient_accumulation_steps", "num_processes",
    "pretrained_model_name_or_path", "cache_dir", "compile", "report_to", "class_data_dir",
}  # fmt: skip


# Options that say something to one kind of method alone.
APPLY_TO = {
    Adapter: "rank alpha decomposition_method gate dropout init_weights target_modules learning_rate_P".split(),
    DreamBooth: ["train_text_encoder"],
    TextualInversion: ["placeholder_token", "initializer_token", "num_vectors"],
}


# options ------------------------------------------------------------------------------------------------------------


def complete(options):
    """The options with the method's own defaults where none were given. UserError names the first that cannot work."""
    method = METHODS[options.method]
    _check_applicable(options, method)
    published = {name: getattr(method, name) for name in ("learning_rate", "max_train_steps")}
    if options.optimizer == "prodigy":
        published["learning_rate"] = 1.0
    options = dataclasses.replace(options, **{k: v for k, v in published.items() if getattr(options, k) is None})
    at_least_one = (
        "rank max_train_steps train_batch_size gradient_accumulation_steps checkpointing_steps validation_steps "
        "num_validation_images resolution checkpoints_total_limit num_vectors num_class_images"
    )
    for name in at_least_one.split():
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    for name in ("learning_rate", "learning_rate_P", "lr_warmup_steps", "adam_weight_decay", "seed", "noise_offset",
                 "prior_loss_weight"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name} must be a number from 0 up, got {value}")
    for name in ("alpha", "max_grad_norm", "snr_gamma"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be a positive number, got {value}")
    if options.optimizer == "prodigy" and options.learning_rate_P is not None:
        raise UserError("--optimizer prodigy finds one rate for all: --learning_rate_P does not apply")
    if options.class_prompt is None and options.class_data_dir is not None:
        raise UserError("--class_data_dir needs a --class_prompt: the text of the class's pictures")
    if options.validation_image and options.validation_prompt is None:
        raise UserError("--validation_image needs a --validation_prompt: what to draw by it")
    if not 0 <= options.ema_decay < 1:
        raise UserError(f"--ema_decay must be at least 0 and below 1, got {options.ema_decay}")
    for name in ("dropout", "caption_dropout"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, got {getattr(options, name)}")
    if options.lr_warmup_steps and options.lr_scheduler == "constant":
        raise UserError("--lr_warmup_steps does nothing with --lr_scheduler constant; use constant_with_warmup")
    if options.method == "para" and (options.gate or options.learning_rate_P is not None):
        raise UserError("--method para has no R: --gate does not apply, and P's learning rate is --learning_rate")
    if options.method == "para" and (options.dropout or options.alpha is not None or not options.init_weights):
        raise UserError("--method para injects nothing: --dropout, --alpha and --no-init_weights do not apply")
    if options.method == "lora" and (options.decomposition_method or options.gate):
        raise UserError("--decomposition_method and --gate do not apply to --method lora")
    return options


def _check_applicable(options, method):
    """UserError names an option that was set but belongs to other methods."""
    own = {field.name: getattr(field.default, "value", field.default) for field in dataclasses.fields(options)}
    for kind, names in APPLY_TO.items():
        if not issubclass(method, kind):
            for name in names:
                if getattr(options, name) != own[name]:
                    raise UserError(f"--{name} does not apply to --method {options.method}")


# randomness ---------------------------------------------------------------------------------------------------------


EPOCH, SAMPLE, STEP, CLASS = range(4)  # what a seed is for


def _seed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _generator(*numbers):
    return torch.Generator().manual_seed(_seed(*numbers))


class Samples:
    """The endless stream of training samples; sample n is the same whenever and wherever it is asked for.

    The samples of one optimizer step are pictures of one size, a bucket's. Over as many steps as there are pictures each
    bucket has as many steps as it has pictures, and each walks through its own pictures, so that all are seen equally often.
    """

    def __init__(self, pictures, family, seed, random_crop, random_flip, images_per_step=1, cache_dir=None, *,
                 caption_dropout=0.0, noise_offset=0.0, encode_texts=True):  # fmt: skip
        self.caption_dropout, self.noise_offset = caption_dropout, noise_offset
        self.pictures, self.family, self.seed, self.per_step = pictures, family, seed, images_per_step
        self.random_crop, self.random_flip = random_crop, random_flip
        texts = [(p.caption, p.inputs) for p in pictures]
        empty = [("", () if family.drops_inputs else p.inputs) for p in pictures]
        keys, empty_keys = ([(text, *map(id, inputs)) for text, inputs in said] for said in (texts, empty))
        said = dict(zip(empty_keys, empty)) if caption_dropout else {}
        said |= dict(zip(keys, texts))
        self.texts, rows = list(said.values()), {key: row for row, key in enumerate(said)}
        self.rows = {False: [rows[key] for key in keys], True: [rows.get(key) for key in empty_keys]}  # text dropped or not
        sizes = list(dict.fromkeys(p.size for p in pictures))
        self.buckets = [[k for k, p in enumerate(pictures) if p.size == size] for size in sizes]
        self.orders = {}
        # Latents are computed once where all that changes from one sight of a picture to the next is which way it faces.
        once = not random_crop or all(p.image.size == p.size for p in pictures)
        texts_by = (family.text_encoders.values(), family.tokenizers) if encode_texts else ((), ())
        encoders = (texts_by, (family.image_parts, ()))
        self.caches = [Cache(cache_dir, family.kind, *by) for by in encoders] if cache_dir else None
        with torch.no_grad():
            self.conditions = self._encode_texts() if encode_texts else None
            self.posteriors = {m: self._encode_all(m) for m in {False, random_flip}} if once else None

    def _encode(self, pictures, views):
        pixels = [data.to_array(data.crop(p.image, p.size, u, v, mirror)) for p, (u, v, mirror) in zip(pictures, views)]
        return self.family.encode_images(torch.as_tensor(np.stack(pixels)))

    def _encode_all(self, mirror):
        """Means and deviations of all pictures, faced one way."""
        posteriors = []
        for picture in tqdm(self.pictures, desc="encoding pictures", leave=False, disable=len(self.pictures) < 20):
            make = lambda p=picture: dict(zip(("mean", "deviation"), self._encode([p], [(0.5, 0.5, mirror)])))
            if self.caches:
                entry = self.caches[1].get(repr((picture.size, mirror)).encode() + _bytes_of(picture.image), make)
            else:
                entry = make()
            posteriors.append((entry["mean"], entry["deviation"]))
        return posteriors

    def _encode_texts(self):
        encode = self.family.encode_prompts
        cache = self.caches[0] if self.caches and self.family.text_encoders else None
        return [
            cache.get(text.encode(), lambda text=text: encode([text])) if cache and not inputs else encode([text], [inputs])
            for text, inputs in self.texts
        ]

    def _order(self, what, epoch, count):
        """A random order of `count` things, another for each epoch; the last one is kept."""
        if self.orders.get(what, (None,))[0] != epoch:
            order = torch.randperm(count, generator=_generator(self.seed, EPOCH, *what, epoch)).tolist()
            self.orders[what] = epoch, order
        return self.orders[what][1]

    def _index(self, n):
        step, within = divmod(n, self.per_step)
        turn, bucket = step, 0  # this step is the turn-th of its bucket
        if len(self.buckets) > 1:
            owners = [b for b, pictures in enumerate(self.buckets) for _ in pictures]
            cycle, place = divmod(step, len(owners))
            order = self._order((0,), cycle, len(owners))
            bucket = owners[order[place]]
            turn = cycle * len(self.buckets[bucket]) + sum(owners[k] == bucket for k in order[:place])
        pictures = self.buckets[bucket]
        epoch, place = divmod(turn * self.per_step + within, len(pictures))
        return pictures[self._order((1, bucket), epoch, len(pictures))[place]]

    def _view(self, k, u, v, mirror):
        """Of picture k, widths first: its own size; the corner, in it as it is scaled and faces, of what is seen of it; the
        size of that."""
        p = self.pictures[k]
        left, top = data.corner(p.image.size, p.size, u, v)
        return p.original or p.image.size, (p.image.width - p.size[0] - left if mirror else left, top), p.size

    @torch.no_grad()
    def batch(self, numbers, device):
        """Samples `numbers`: (latents, noise, times, conditions), the arguments of the family's `loss` after the model; with
        `encode_texts` off the conditions are still (texts, their input pictures, other conditions)."""
        chosen = [self._index(n) for n in numbers]
        generators = [_generator(self.seed, SAMPLE, n) for n in numbers]
        views = []
        for g in generators:
            u, v, side = torch.rand(3, generator=g).tolist()
            views.append((u if self.random_crop else 0.5, v if self.random_crop else 0.5, self.random_flip and side < 0.5))
        if self.posteriors is not None:
            seen = [self.posteriors[mirror][k] for k, (_, _, mirror) in zip(chosen, views)]
            mean, deviation = (torch.cat(t).to(device) for t in zip(*seen))
        else:
            mean, deviation = self._encode([self.pictures[k] for k in chosen], views)
        latent_noise, noise, times, dropped = zip(*(self._draw(g, mean.shape[1:]) for g in generators))
        latents = mean + deviation * torch.stack(latent_noise).to(device)
        rows = [self.rows[drop][k] for drop, k in zip(dropped, chosen)]
        sizes = self.family.sizes([self._view(k, *view) for k, view in zip(chosen, views)])
        if self.conditions is None:
            conditions = *zip(*(self.texts[row] for row in rows)), sizes
        else:
            conditions = self.family.collate([self.conditions[row] for row in rows]) | sizes
        return latents, torch.stack(noise).to(device), torch.stack(times).to(device), conditions

    def _draw(self, generator, shape):
        """Latent noise, noise, time, and whether the text is dropped, all of one sample."""
        latent_noise, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        time = self.family.draw_time(generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        dropped = self.caption_dropout > 0 and torch.rand((), generator=generator).item() < self.caption_dropout
        return latent_noise, noise, time, dropped


# output folder ------------------------------------------------------------------------------------------------------


def _step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def find_checkpoints(folder):
    """Checkpoints of an output folder, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit() and (p / STATE).is_file()]
    return sorted(found, key=_step_of)


def _existing(folder, patterns):
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _find_resume(options, folder):
    """The checkpoint to go on from, or None for a fresh start. UserError if the output folder must not be used."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    wanted, taken = options.resume_from_checkpoint, _existing(folder, MARKS)
    if wanted is None:
        if taken and not options.overwrite_output_dir:
            raise UserError(
                f"{folder} holds a run already ({taken[0].name}); choose another --output_dir, "
                "or add --overwrite_output_dir or --resume_from_checkpoint latest"
            )
        return None
    if wanted == "latest":
        checkpoints = find_checkpoints(folder)
        if checkpoints:
            return checkpoints[-1]
        if _existing(folder, RESULTS):
            raise UserError(f"{folder} holds a finished run but no checkpoint to resume from")
        print(f"no checkpoint in {folder}: starting from the beginning", file=sys.stderr)
        return None
    checkpoint = Path(wanted).expanduser()
    if not (checkpoint / STATE).is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint there ({STATE} is missing)")
    if checkpoint.resolve().parent != folder.resolve() and taken and not options.overwrite_output_dir:
        raise UserError(f"{folder} holds another run; add --overwrite_output_dir to replace it")
    return checkpoint


def _check_same_run(checkpoint, settings):
    before = read_json(checkpoint / SETTINGS)
    if _step_of(checkpoint) > settings["max_train_steps"]:
        raise UserError(f"{checkpoint} is beyond --max_train_steps {settings['max_train_steps']}")
    fixed = set(settings) - FREE_TO_CHANGE
    if settings["lr_scheduler"] not in ("constant", "constant_with_warmup"):
        fixed.add("max_train_steps")  # the schedule's length
    if settings["dropout"]:
        fixed |= {"train_batch_size", "gradient_accumulation_steps", "num_processes"}
    for name, value in settings.items():
        if name in fixed and before.get(name) != value:
            raise UserError(
                f"{checkpoint} was trained with {name} {before.get(name)}, not {value}: resume with the same options"
            )


def _bytes_of(image):
    return repr(image.size).encode() + image.tobytes()


def _fingerprint(pictures):
    """sha256 of what is trained on: pixels and texts, in order, and the pictures' own sizes, which SDXL is told."""
    digest = hashlib.sha256(repr([picture.original for picture in pictures]).encode())
    for picture in pictures:
        digest.update(b"".join(map(_bytes_of, (picture.image, *picture.inputs))) + picture.caption.encode())
    return digest.hexdigest()


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def _publish(part, target):
    """Puts the finished folder `part` in place of `target` in one step, so that nobody ever sees half of it."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)


# training -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_signals():
    """Yields a list that fills when Ctrl-C or a termination is asked for; a second Ctrl-C stops at once."""
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Objective(torch.nn.Module):
    """The loss of a batch as a module, so that all that trains is called through it, whatever wraps it."""

    def __init__(self, family, encodes_text):
        super().__init__()
        self.family, self.encodes_text = family, encodes_text
        self.model = family.model
        self.text_encoders = torch.nn.ModuleDict(family.text_encoders if encodes_text else {})
        # Every process has loaded the same, and torchao's tensors cannot be sent.
        self._ddp_params_and_buffers_to_ignore = [name for name, p in self.named_parameters() if not p.requires_grad]

    def train(self, mode=True):
        super().train(mode)
        self.text_encoders.eval()  # T5 has dropout, which its users did not train with
        return self

    def forward(self, batches, weights):
        """Sum of weight * loss over batches of `Samples.batch`."""
        total = 0.0
        for (latents, noise, times, conditions), weight in zip(batches, weights):
            if self.encodes_text:
                texts, inputs, more = conditions
                conditions = self.family.encode_prompts(list(texts), inputs) | more
            total = total + weight * self.family.loss(self.model, latents, noise, times, conditions)
        return total


def make_optimizer(options, groups):
    """The optimizer of the options over parameter groups. UserError if its library is missing."""
    common = {"weight_decay": options.adam_weight_decay}
    if options.optimizer == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, fused=fused, **common)
    try:
        if options.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **common)
        from prodigyopt import Prodigy
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[options.optimizer]
        raise UserError(f"--optimizer {options.optimizer} needs {package}: pip install {package} ({error})") from error
    groups = [group | {"lr": options.learning_rate} for group in groups]  # it takes one for all
    return Prodigy(groups, safeguard_warmup=options.lr_warmup_steps > 0, use_bias_correction=True, **common)


class Run:
    """One training run: the model and what trains of it, its optimizer, and what it leaves in the output folder."""

    def __init__(self, options, accelerator, family, method, samples, settings, folder, resume, example=("…", ())):
        self.options, self.accelerator, self.family = options, accelerator, family
        self.method, self.samples = method, samples
        self.settings, self.folder, self.step = settings, folder, 0
        self.images_per_step = settings["images_per_step"]
        self.example = example  # a text to draw, and the paths of its input pictures
        self.drawing = {"height": options.resolution, "width": options.resolution}  # None: the model's own
        if example[1]:
            self.drawing["input_images"] = [data.read_image(path) for path in example[1]]
        torch.manual_seed(_seed(options.seed))  # of the first values
        if resume:
            method.load(resume)
        else:
            method.start()
        groups, rates = method.groups()
        self.names = [name for name, parameters in groups.items() if parameters]
        self.parameters = [p for name in self.names for p in groups[name]]
        optimizer = make_optimizer(options, [{"params": groups[name], "lr": rates[name]} for name in self.names])
        self.ema = EMAModel(self.parameters, decay=options.ema_decay, use_ema_warmup=True) if options.use_ema else None
        if options.gradient_checkpointing:
            family.model.enable_gradient_checkpointing()
        if options.compile:
            family.model.compile()
        self.objective, self.optimizer = accelerator.prepare(Objective(family, method.encodes_text), optimizer)
        # Not prepared: accelerate would step it once for every process.
        self.schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        if resume:
            self._restore(resume)
        self.unread = []  # (step, loss, gradient norm, learning rates) not yet read from the device
        self.log = []

    # checkpoints

    def _restore(self, checkpoint):
        try:
            state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {checkpoint / STATE}: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            with torch.no_grad():
                for p, value in zip(self.parameters, state["parameters"]):
                    p.copy_(value)
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def save_checkpoint(self):
        """Writes `checkpoint-<step>` whole or not at all, then drops the oldest beyond the limit."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            part = self.folder / f".checkpoint-{self.step}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            self._save_learned(part)
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            if self.ema:  # the files hold the average
                state |= {"ema": self.ema.state_dict(), "parameters": [p.detach() for p in self.parameters]}
            torch.save(state, part / STATE)
            _write_json(part / SETTINGS, self.settings)
            _publish(part, self.folder / f"checkpoint-{self.step}")
            if self.options.checkpoints_total_limit:
                # Later ones, left by a run that was resumed from an earlier one, do not push out what is being written.
                written = [p for p in find_checkpoints(self.folder) if _step_of(p) <= self.step]
                for old in written[: -self.options.checkpoints_total_limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _averaged(self):
        """With --use_ema, the moving average in place of the parameters."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _save_learned(self, folder):
        with self._averaged():
            self.method.save(folder)

    # log

    def open_log(self, resume):
        """Main process: starts the log, or cuts a resumed one back to the steps that were kept."""
        path = self.folder / LOG
        if resume and path.is_file():
            lines = path.read_text().splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line
            self.log = [entry for entry in entries if entry["step"] <= self.step]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.log))

    def read_losses(self, asked=()):
        """Reads the losses since the last call, logs them, and agrees between the processes whether to stop.

        UserError names the step at which the loss or the gradient was not finite.
        """
        columns = [torch.stack([values[k].float() for _, values, _ in self.unread]) for k in (0, 1)]
        stop = torch.full_like(columns[0], float(bool(asked)))
        table = self.accelerator.reduce(torch.stack([*columns, stop]), "mean").tolist()
        new = [
            {"step": step, "loss": loss, "gradient_norm": norm, **rates}
            for (step, _, rates), loss, norm in zip(self.unread, *table[:2])
        ]
        self.unread.clear()
        # With fp16 the loss scaler skips a step whose gradient overflows, and lowers the scale.
        watched = ("loss",) if self.accelerator.scaler else ("loss", "gradient_norm")
        bad = next((e["step"] for e in new if not all(math.isfinite(e[name]) for name in watched)), None)
        good = [entry for entry in new if bad is None or entry["step"] < bad]
        self.log += good
        for entry in good:
            self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
        if self.accelerator.is_main_process:
            with open(self.folder / LOG, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in good)
        if bad is not None:
            kept = find_checkpoints(self.folder)
            raise UserError(
                f"the loss is not finite at step {bad} of {self.options.max_train_steps}; try a lower --learning_rate"
                + (f"; last good checkpoint: {kept[-1]}" if kept else "")
            )
        return table[2][-1] > 0

    # steps

    def _train_step(self):
        o, accelerator = self.options, self.accelerator
        processes, rank, batch = accelerator.num_processes, accelerator.process_index, o.train_batch_size
        self.objective.train()
        total = 0.0
        for micro in range(o.gradient_accumulation_steps):
            first = self.step * self.images_per_step + (micro * processes + rank) * batch
            torch.manual_seed(_seed(o.seed, STEP, self.step, micro, rank))  # of dropout
            with accelerator.accumulate(self.objective):
                batches = [s.batch(range(first, first + batch), accelerator.device) for s in self.samples]
                loss = self.objective(batches, (1.0, o.prior_loss_weight))
                accelerator.backward(loss)
                total = total + loss.detach() / o.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, o.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        rates = {f"lr_{name}": rate for name, rate in zip(self.names, self.schedule.get_last_lr())}
        self.schedule.step()
        if self.ema:
            self.ema.step(self.parameters)
        self.step += 1
        self.unread.append((self.step, (total, norm), rates))

    def validate(self, name):
        """Main process: draws the validation prompt with the adapter as it stands, always from the same noise."""
        if self.options.validation_prompt is None or not self.accelerator.is_main_process:
            return
        o = self.options
        jobs = [(o.validation_prompt, o.seed + k) for k in range(o.num_validation_images)]
        with self._averaged():
            images = list(generate(self.family, jobs, progress=False, **VALIDATION, **self.drawing))
        sheet = grid([images], title=f"step {self.step}: {o.validation_prompt}")
        sheet.save(self.folder / name)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet.convert("RGB"))[None]}, step=self.step, **layout)

    def train(self):
        """Runs to `max_train_steps`. Ctrl-C or a termination writes a checkpoint and raises KeyboardInterrupt."""
        o = self.options
        every = 1 if self.accelerator.device.type == "cpu" else LOG_EVERY
        bar = tqdm(total=o.max_train_steps, initial=self.step, desc="training", disable=not self.accelerator.is_main_process)
        start, first = time.perf_counter(), self.step
        with bar, _stop_signals() as asked:
            while self.step < o.max_train_steps:
                self._train_step()
                bar.update()
                last = self.step == o.max_train_steps
                save = self.step % o.checkpointing_steps == 0
                draw = self.step % o.validation_steps == 0 and not last
                alone = self.accelerator.num_processes == 1
                if not (save or draw or last or self.step % every == 0 or (alone and asked)):
                    continue
                stop = self.read_losses(asked) and not last
                rate = (self.step - first) * self.images_per_step / (time.perf_counter() - start)
                lr = " ".join(f"{name} {r:.1e}" for name, r in zip(self.names, self.schedule.get_last_lr()))
                bar.set_postfix_str(f"loss {self.log[-1]['loss']:.4f}, lr {lr}, {rate:.1f} images/s, {_memory():.1f} GB")
                if save or stop:
                    self.save_checkpoint()
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step} of {o.max_train_steps}, checkpoint written; "
                        "go on with --resume_from_checkpoint latest"
                    )
                if draw:
                    self.validate(f"validation-{self.step}.png")

    def finish(self):
        """Main process: writes the adapter, its settings, a last drawing and the card."""
        if not self.accelerator.is_main_process:
            return
        self._save_learned(self.folder)
        self.validate("validation.png")
        (self.folder / CARD).write_text(_card(self.options, self.settings, self.log, *self.example))


def _memory():
    """Most memory used so far, in GB: of the GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB, on macOS in bytes
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def _sizes(pictures):
    """`64 x 64`, or `64 x 64 (3), 48 x 80 (2)`."""
    counts = collections.Counter(p.size for p in pictures)
    return ", ".join(f"{w} x {h}" + f" ({n})" * (len(counts) > 1) for (w, h), n in counts.most_common())


def class_pictures(options, family, accelerator, resolution, folder):
    """Pictures of the class in squares; the base model draws those that are missing."""
    where = Path(options.class_data_dir).expanduser() if options.class_data_dir else folder / CLASS_IMAGES
    if accelerator.is_main_process:
        where.mkdir(parents=True, exist_ok=True)
        present = len(data.find_pictures(where)) if any(where.iterdir()) else 0
        seeds = range(present, options.num_class_images)
        jobs = [(options.class_prompt, _seed(options.seed, CLASS, k)) for k in seeds]
        drawn = generate(family, jobs, height=resolution, width=resolution, **VALIDATION)
        for k, image in zip(seeds, drawn):
            part = where / f".{k:04d}.png"
            image.save(part)
            os.replace(part, where / part.name[1:])
    accelerator.wait_for_everyone()
    sources = data.find_sources(where, options.class_prompt)
    return [data.load(source, [(resolution, resolution)]) for source in sources[: options.num_class_images]]


def _card(options, settings, log, prompt, inputs):
    hidden = ("output_dir", "instance_data_dir")
    shown = {k: v for k, v in settings.items() if v not in (None, False, []) and k not in hidden}
    table = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    tail = log[-50:]
    losses = f"Mean loss of the last {len(tail)} steps: {sum(e['loss'] for e in tail) / len(tail):.4f}." if tail else ""
    picture = f"\n![{options.validation_prompt}](validation.png)\n" if options.validation_prompt else ""
    more = {"height": options.resolution, "width": options.resolution, "quantize": options.quantize}
    more = "".join(f" --{name} {value}" for name, value in more.items() if value)
    more += " --quantize_text_encoders" * options.quantize_text_encoders
    more += "".join(f" --input_image {shlex.quote(str(path))}" for path in inputs)
    return f"""---
base_model: {options.pretrained_model_name_or_path}
tags: [text-to-image, diffusers, {options.method}]
---
# {options.method.upper()} adapter{f" for “{options.instance_prompt}”" if options.instance_prompt else ""}
{picture}
```bash
deft sample --pretrained_model_name_or_path {options.pretrained_model_name_or_path} \\
    --adapter {shlex.quote(str(options.output_dir))} --prompt {shlex.quote(prompt)}{more}
```

{losses}

| setting | value |
|---|---|
{table}
"""


def train(options, family=None):
    """Runs `deft train`: takes `TrainOptions`, writes the adapter into the output folder and returns the folder.

    `family` is the base model if the caller has it loaded already (in float32); it keeps the adapter.
    Errors in what the user gave are UserErrors, found before anything is written.
    """
    options = complete(options)
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise UserError(f"--report_to {options.report_to}: pip install {options.report_to}, or --report_to none")
    sources = data.find_sources(options.instance_data_dir, options.instance_prompt)
    METHODS[options.method].check(options, [source.caption for source in sources])
    data.check(sources)  # nothing is kept: photographs are large, and their final size is not known yet
    folder = Path(options.output_dir).expanduser()
    resume = _find_resume(options, folder)

    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=folder,
    )
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; use no on a CPU")
    if family is None:
        family = load_family(
            options.pretrained_model_name_or_path, DTYPES.get(precision, torch.float32), options.quantize,
            options.quantize_text_encoders,
        )  # fmt: skip
    family.to(accelerator.device)
    check_base(METHODS[options.method], family)
    check_size("resolution", options.resolution, family)
    resolution = options.resolution or family.resolution
    for source in sources:
        family.check_prompt(source.caption, source.inputs)
    prompt = options.validation_prompt or options.instance_prompt or sources[0].caption
    inputs = next((source.inputs for source in sources if source.inputs), ())
    inputs = options.validation_image or family.default_inputs(prompt, inputs)
    if options.validation_prompt:
        family.check_prompt(prompt, inputs)
    family.check_prompt(options.class_prompt or "")
    if accelerator.is_main_process:
        warn_of_cut_text(family, [*(s.caption for s in sources), options.validation_prompt or ""])
    sizes = data.buckets(resolution, family.size_multiple, squares=not options.aspect_ratio_buckets)
    sizes = [size for size in sizes if max(size) <= family.max_size]
    loaded = [data.load(source, sizes) for source in sources]
    crop_anywhere = not (options.center_crop or options.aspect_ratio_buckets)  # a bucket leaves little to choose from
    if accelerator.is_main_process:
        data.warn_of_fit(sources, loaded, crop_anywhere)
    pictures = [picture for source, picture in zip(sources, loaded) for _ in range(source.repeats)]
    settings = dataclasses.asdict(options) | {
        "resolution": resolution,
        "mixed_precision": precision,
        "num_processes": accelerator.num_processes,
        "images_per_step": options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes,
        "pictures": _fingerprint(pictures),
    }
    if resume:
        _check_same_run(resume, settings)
    for name in ("snr_gamma", "weighting_scheme"):
        if hasattr(family, name):
            setattr(family, name, getattr(options, name))
        elif getattr(options, name) is not None:
            raise UserError(f"--{name} does not apply to {options.pretrained_model_name_or_path}, {family.kind}")
    method = METHODS[options.method](family, options)
    streams = [pictures]
    if options.class_prompt:
        streams.append(class_pictures(options, family, accelerator, resolution, folder))
    samples = [
        Samples(
            stream, family, _seed(options.seed, k), crop_anywhere, options.random_flip, settings["images_per_step"],
            options.cache_dir, caption_dropout=options.caption_dropout, noise_offset=options.noise_offset,
            encode_texts=not method.encodes_text,
        )
        for k, stream in enumerate(streams)
    ]  # fmt: skip
    run = Run(options, accelerator, family, method, samples, settings, folder, resume, (prompt, inputs))

    accelerator.wait_for_everyone()  # every process has looked at the folder before one of them changes it
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if options.overwrite_output_dir and not (resume and resume.resolve().parent == folder.resolve()):
            for path in _existing(folder, (*MARKS, *PICTURES)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _write_json(folder / SETTINGS, settings)
        run.open_log(resume)
        if options.report_to != "none":
            shown = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("logs" if options.report_to == "tensorboard" else "deft", shown)
        print(
            f"training {sum(p.numel() for p in run.parameters):,} parameters ({method.describe()}) on {len(sources)} "
            f"picture{'s' * (len(sources) != 1)} at {_sizes(pictures)} pixels, "
            f"{run.images_per_step} per step, from step {run.step} to {options.max_train_steps}"
        )
        for cache, what in zip(samples[0].caches or (), ("texts", "latents")):
            print(f"{what} from {options.cache_dir}: {cache.found} found, {cache.made} made")
    start, first = time.perf_counter(), run.step
    run.train()
    seconds = time.perf_counter() - start
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()  # which ends the process group
    if accelerator.is_main_process:
        print(f"{options.method} in {folder}: {run.step - first} steps in {seconds:.1f} s")
    return folder
