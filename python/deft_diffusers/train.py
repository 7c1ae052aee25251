"""Trains an adapter on pictures of a subject.

Every sample is a function of the seed and of its number since the start (`samples.py`), dropout of the step and process. So
a run that was stopped and resumed takes the same steps as one that was not, and, without dropout, n processes with batch b
train the same adapter as one with batch n·b.

Only the main process writes. On several machines the others need the output folder for nothing but a resumption, and for
`class_images` where there are any: then it must be one that all of them see.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import resource
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from deft_kernels.adapters.files import PIPELINE_WEIGHTS, base_fingerprint
from deft_kernels.adapters.inject import adaptable, adapted_layers

from . import UserError, cut_mix, data, read_json, sharding
from .families import load_family
from .grid import grid
from .methods import METHODS, Adapter, DreamBooth, SVDiff, TextualInversion, check_base
from .sample import DTYPES, check_size, generate, warn_of_cut_text
from .samples import CLASS, STEP, Samples, bytes_of, seed_of
from .writing import PARTS, alone, discard, remove, replacing, sync, telling

LOG_EVERY = 10  # steps between two reads of the loss on an accelerator, where each read waits for the device
VALIDATION = {"num_inference_steps": 25}
STATE, SETTINGS, LOG, CARD = "state.pt", "training_args.json", "loss.jsonl", "README.md"
RESULT = "result.json"  # what the training took
# What marks an output folder as holding a run, and what --overwrite_output_dir removes besides.
RESULTS = ("adapter_model.safetensors", "adapter_config.json", "spectral_shifts.safetensors", "learned_embeds.safetensors",
           PIPELINE_WEIGHTS, "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # fmt: skip
MARKS = ("checkpoint-[0-9]*", *RESULTS, SETTINGS, LOG, CARD, RESULT)
CLASS_IMAGES = "class_images"
PICTURES = ("validation*.png", PARTS, "logs")
# Options that may change between a checkpoint and the run that resumes from it; any other would make it another run.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps", "checkpointing_steps",
    "checkpoints_total_limit", "validation_prompt", "validation_image", "validation_steps", "num_validation_images",
    "gradient_checkpointing",
    # What these amount to is compared instead: `pictures`, `class_pictures`, `images_per_step` and `base`.
    "instance_data_dir", "instance_prompt", "train_batch_size", "gradient_accumulation_steps", "num_processes",
    "pretrained_model_name_or_path", "cache_dir", "compile", "report_to", "class_data_dir",
}  # fmt: skip


# Options that say something to one kind of method alone.
APPLY_TO = {
    Adapter: "rank alpha decomposition_method gate dropout init_weights target_modules learning_rate_P".split(),
    (Adapter, DreamBooth): ["train_text_encoder", "text_encoder_lr"],
    TextualInversion: ["placeholder_token", "initializer_token", "num_vectors"],
}


# options ------------------------------------------------------------------------------------------------------------


def complete(options):
    """The options with the method's own defaults where none were given. UserError names the first that cannot work."""
    method = METHODS[options.method]
    _check_applicable(options, method)
    published = dict(zip(("learning_rate", "max_train_steps"), method.published(options)))
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
                 "prior_loss_weight", "text_encoder_lr"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name} must be a number from 0 up, got {value}")
    for name in ("alpha", "max_grad_norm", "snr_gamma", "unmix_weight"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be a positive number, got {value}")
    for name in ("learning_rate_P", "text_encoder_lr"):
        if options.optimizer == "prodigy" and getattr(options, name) is not None:
            raise UserError(f"--optimizer prodigy finds one rate for all: --{name} does not apply")
    if options.text_encoder_lr is not None and not options.train_text_encoder:
        raise UserError("--text_encoder_lr needs --train_text_encoder")
    if options.class_prompt is None and options.class_data_dir is not None:
        raise UserError("--class_data_dir needs a --class_prompt: the text of the class's pictures")
    if options.validation_image and options.validation_prompt is None:
        raise UserError("--validation_image needs a --validation_prompt: what to draw by it")
    if not 0 <= options.ema_decay < 1:
        raise UserError(f"--ema_decay must be at least 0 and below 1, got {options.ema_decay}")
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout must be at least 0 and below 1, got {options.dropout}")
    if not 0 <= options.caption_dropout <= 1:
        raise UserError(f"--caption_dropout must be from 0 to 1, got {options.caption_dropout}")
    if options.caption_dropout == 1 and options.method == "textual_inversion":
        raise UserError("--caption_dropout 1 leaves textual_inversion no text with its word")
    if not 0 <= options.cut_mix_prob <= 1:
        raise UserError(f"--cut_mix_prob must be from 0 to 1, got {options.cut_mix_prob}")
    if options.unmix_weight is not None and (options.compile or not options.cut_mix_prob):
        why = "does not go with --compile" if options.compile else "needs --cut_mix_prob: it is of pictures of two subjects"
        raise UserError(f"--unmix_weight {why}")
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


# output folder ------------------------------------------------------------------------------------------------------


def _step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def find_checkpoints(folder):
    """Checkpoints of an output folder, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdecimal() and (p / STATE).is_file()]
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
        if (folder / CARD).exists():  # which is written last
            raise UserError(
                f"{folder} holds a finished run but no checkpoint to resume from; to train anew, put --overwrite_output_dir "
                "in the place of --resume_from_checkpoint"
            )
        return None
    checkpoint = Path(wanted).expanduser()
    if not (checkpoint / STATE).is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint there ({STATE} is missing)")
    if checkpoint.resolve().parent != folder.resolve() and taken and not options.overwrite_output_dir:
        raise UserError(f"{folder} holds another run; add --overwrite_output_dir to replace it")
    return checkpoint


def _agree(resume):
    """The main process's checkpoint, for all; UserError on a machine that does not see it."""
    (agreed,) = broadcast_object_list([resume])
    if agreed and not (agreed / STATE).is_file():
        raise UserError(f"{agreed} is not on this machine: resuming on several needs a folder that all of them see")
    return agreed


def _check_same_run(checkpoint, settings):
    before = read_json(checkpoint / SETTINGS)
    fixed = set(settings) - FREE_TO_CHANGE - {"base"}
    if settings["lr_scheduler"] not in ("constant", "constant_with_warmup"):
        fixed.add("max_train_steps")  # the schedule's length
    if settings["dropout"]:
        fixed |= {"train_batch_size", "gradient_accumulation_steps", "num_processes"}
    for name, value in settings.items():
        if name in fixed and before.get(name) != value:
            raise UserError(
                f"{checkpoint} was trained with {name} {before.get(name)}, not {value}: resume with the same options"
            )
    if before.get("base") != settings["base"]:
        raise UserError(
            f"{checkpoint} was trained on another base model, {before.get('pretrained_model_name_or_path')} as it then was"
        )


def _fingerprint(pictures):
    """sha256 of what is trained on: pixels, texts, subjects, in order, and the pictures' own sizes, which SDXL is told."""
    digest = hashlib.sha256(repr([picture.original for picture in pictures]).encode())
    for picture in pictures:
        digest.update(b"".join(map(bytes_of, (picture.image, *picture.inputs))) + picture.caption.encode())
        digest.update(picture.subject.encode())
    return digest.hexdigest()


def _fingerprint_of_base(family):
    """sha256 of a sample of what is trained on top of."""
    parts = {family.model_name: family.model, **family.text_encoders}
    layers = {f"{part}.{name}": m for part, module in parts.items() for name, m in module.named_modules() if adaptable(m)}
    return hashlib.sha256(base_fingerprint(layers).encode()).hexdigest()


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


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
        self.unmix = cut_mix.Unmix(family) if getattr(family, "unmix_weight", None) else None
        self.text_encoders = torch.nn.ModuleDict(family.text_encoders if encodes_text else {})
        # Every process has loaded the same, and torchao's tensors cannot be sent.
        self._ddp_params_and_buffers_to_ignore = [name for name, p in self.named_parameters() if not p.requires_grad]

    def train(self, mode=True):
        super().train(mode)
        self.text_encoders.eval()  # T5 has dropout, which its users did not train with
        for layer in adapted_layers(self.text_encoders).values():
            layer.train(mode)  # for the adapter's own dropout
        return self

    def forward(self, batches, weights, pairs=()):
        """Sum of weight * loss over batches of `Samples.batch`; for the unmix loss, with their `Samples.pairs`."""
        total = 0.0
        for k, ((latents, noise, times, conditions), weight) in enumerate(zip(batches, weights)):
            if self.encodes_text:
                texts, inputs, more = conditions
                conditions = self.family.encode_prompts(list(texts), inputs) | more
            if self.unmix:
                self.unmix.watch(latents, pairs[k])
            total = total + weight * self.family.loss(self.model, latents, noise, times, conditions)
            if self.unmix:
                total = total + weight * self.family.unmix_weight * self.unmix.loss()
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

    def __init__(
        self, options, accelerator, family, method, samples, settings, folder, resume, fsdp=None, example=("…", ())
    ):
        self.options, self.accelerator, self.family = options, accelerator, family
        self.method, self.samples = method, samples
        self.settings, self.folder, self.step = settings, folder, 0
        self.images_per_step = settings["images_per_step"]
        self.example = example  # a text to draw, and the paths of its input pictures
        self.drawing = {"height": options.resolution, "width": options.resolution}  # None: the model's own
        if example[1]:
            self.drawing["input_images"] = [data.read_image(path) for path in example[1]]
        torch.manual_seed(seed_of(options.seed))  # of the first values
        if resume:
            method.load(resume)
        else:
            method.start()
        objective = Objective(family, method.encodes_text)
        self.split = fsdp is not None
        base = set(family.model.parameters()) if method.trains_base else set()
        self.whole = [p for group in method.groups()[0].values() for p in group if p not in base]
        if fsdp:
            sharding.split(fsdp, accelerator, family.model, self.whole)
        groups, rates = method.groups()
        self.names = [name for name, parameters in groups.items() if parameters]
        self.parameters = [p for name in self.names for p in groups[name]]
        optimizer = make_optimizer(options, [{"params": groups[name], "lr": rates[name]} for name in self.names])
        # Not prepared: accelerate would step it once for every process. Made first, else it warns of fp16's scaler.
        self.schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        if options.gradient_checkpointing:
            family.model.enable_gradient_checkpointing()
        if options.compile:
            family.model.compile()
        if method.trains_base and not fsdp:  # so much that it is worth DDP, which averages during the backward
            self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
            self.whole = []
        else:
            self.objective, self.optimizer = objective, accelerator.prepare_optimizer(optimizer)
        sharding.align(self.whole)
        self.ema = EMAModel(self.parameters, decay=options.ema_decay, use_ema_warmup=True) if options.use_ema else None
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
        for k, values in state["optimizer"]["state"].items():
            state["optimizer"]["state"][k] = {n: sharding.split_like(self.parameters[k], v) for n, v in values.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            averages = [sharding.split_like(p, v) for p, v in zip(self.parameters, state["ema"]["shadow_params"])]
            self.ema.load_state_dict(state["ema"] | {"shadow_params": averages})
            self.ema.to(self.accelerator.device)
            with torch.no_grad():
                for p, value in zip(self.parameters, state["parameters"]):
                    p.copy_(sharding.split_like(p, value))
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.step > self.options.max_train_steps:
            raise UserError(f"{checkpoint} is beyond --max_train_steps {self.options.max_train_steps}")

    def save_checkpoint(self):
        """Writes `checkpoint-<step>` whole or not at all, then drops the oldest beyond the limit."""
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        self.accelerator.wait_for_everyone()
        if main:
            sync(self.folder / LOG)  # a checkpoint is never ahead of it
        with replacing(self.folder / f"checkpoint-{self.step}") if main else contextlib.nullcontext() as part:
            self._save_learned(part)
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            if self.ema:  # the files hold the average
                state |= {"ema": self.ema.state_dict(), "parameters": [p.detach() for p in self.parameters]}
            state = sharding.gathered(state, main)
            if main:
                with open(part / STATE, "wb") as file:  # torch's own file does not tell why it cannot be written
                    torch.save(state, file)
                _write_json(part / SETTINGS, self.settings)
        if main and self.options.checkpoints_total_limit:
            # Later ones, left by a run that was resumed from an earlier one, do not push out what is being written.
            written = [p for p in find_checkpoints(self.folder) if _step_of(p) <= self.step]
            for old in written[: -self.options.checkpoints_total_limit]:
                discard(old)
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
        """Every process takes part; the main one writes into a new folder."""
        with self._averaged(), self.method.whole():
            if self.accelerator.is_main_process:
                folder.mkdir()
                self.method.save(folder)

    # log

    def open_log(self, resume):
        """Main process: starts the log, or cuts a resumed one back to the steps that were kept."""
        path = self.folder / LOG
        if resume and path.is_file():
            lines = path.read_text().splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line
            self.log = [entry for entry in entries if entry["step"] <= self.step]
        with replacing(path) as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in self.log))

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
        if self.accelerator.is_main_process:
            with telling(self.folder / LOG), open(self.folder / LOG, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in good)
        with telling(self.folder / "logs"):
            for entry in good:
                self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
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
            torch.manual_seed(seed_of(o.seed, STEP, self.step, micro, rank))  # of dropout
            with accelerator.accumulate(*([] if self.split else [self.objective])):
                if self.split:
                    self.family.model.set_requires_gradient_sync(accelerator.sync_gradients)
                numbers = range(first, first + batch)
                batches = [s.batch(numbers, accelerator.device) for s in self.samples]
                pairs = [s.pairs(numbers) for s in self.samples]
                with accelerator.autocast():
                    loss = self.objective(batches, (1.0, o.prior_loss_weight), pairs)
                accelerator.backward(loss)
                total = total + loss.detach() / o.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    sharding.average(accelerator, self.whole)
                    norm = accelerator.clip_grad_norm_(self.parameters, o.max_grad_norm)
                    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                self.optimizer.step()
                self.optimizer.zero_grad()
        rates = {f"lr_{name}": rate for name, rate in zip(self.names, self.schedule.get_last_lr())}
        self.schedule.step()
        if self.ema:
            self.ema.step(self.parameters)
        self.step += 1
        self.unread.append((self.step, (total, norm), rates))

    def validate(self, name):
        """Draws the validation prompt with the adapter as it stands, always from the same noise. Every process may call; of
        a base that is split, all draw and the main one keeps the picture."""
        main = self.accelerator.is_main_process
        if self.options.validation_prompt is None or not (main or self.split):
            return
        o = self.options
        jobs = [(o.validation_prompt, o.seed + k) for k in range(o.num_validation_images)]
        with self._averaged(), enough_memory(o, f"while drawing at step {self.step}", self.folder, drawing=True):
            images = list(generate(self.family, jobs, progress=False, **VALIDATION, **self.drawing))
        if not main:
            return
        sheet = grid([images], title=f"step {self.step}: {o.validation_prompt}")
        with replacing(self.folder / name) as part:
            sheet.save(part, "PNG")
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
                with enough_memory(self.options, f"at step {self.step + 1} of {o.max_train_steps}", self.folder):
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

    def finish(self, took):
        """Writes the adapter, a last drawing, what it took, and the card, whose presence says that the run is finished."""
        if unmix := self.accelerator.unwrap_model(self.objective).unmix:
            unmix.remove()
        main, saved = self.accelerator.is_main_process, self.folder / ".results.part"
        with telling(self.folder):
            try:
                self._save_learned(saved)
                for path in saved.iterdir() if main else ():
                    with replacing(self.folder / path.name) as part:
                        os.replace(path, part)
            finally:
                if main:
                    remove(saved)
        self.validate("validation.png")
        if main:
            with replacing(self.folder / RESULT) as part:
                _write_json(part, took)
            with replacing(self.folder / CARD) as part:
                part.write_text(_card(self.options, self.settings, self.log, *self.example))


@contextlib.contextmanager
def enough_memory(options, when, folder, drawing=False):
    """Out of memory inside, of a GPU or not, becomes a UserError that says what to turn down, in order."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        kept = find_checkpoints(folder)
        raise UserError(
            f"out of memory {when}; turn down, in this order: {', '.join(_smaller(options, drawing))}"
            + (f"; last good checkpoint: {kept[-1]}" if kept else "")
        ) from error


def _smaller(options, drawing=False):
    """What makes a run smaller and has not been used yet, what costs least first."""
    o, kind = options, METHODS[options.method]
    batch = o.train_batch_size
    ways = {
        "--num_validation_images 1": drawing and o.num_validation_images > 1,
        "--gradient_checkpointing": not o.gradient_checkpointing,
        f"--train_batch_size 1 --gradient_accumulation_steps {batch * o.gradient_accumulation_steps}": batch > 1,
        "--mixed_precision bf16": o.mixed_precision in (None, "no"),
        "--optimizer adamw8bit": o.optimizer != "adamw8bit",
        "--quantize nf4": not o.quantize and not kind.changes_weights,
        "a smaller --resolution": True,
        f"--rank {o.rank // 2}": kind is Adapter and o.rank > 1,
        f"several GPUs that share the base ({sharding.LAUNCH})": kind is not SVDiff and not sharding.is_asked_for(),
    }
    return [way for way, helps in ways.items() if helps]


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
    """Pictures of the class in squares; the base model draws those that are missing, each process its share."""
    where = Path(options.class_data_dir).expanduser() if options.class_data_dir else folder / CLASS_IMAGES
    numbers = [None]
    if accelerator.is_main_process:
        where.mkdir(parents=True, exist_ok=True)
        present = len(data.find_pictures(where)) if any(where.iterdir()) else 0
        free = (k for k in itertools.count() if not (where / f"{k:04d}.png").exists())
        numbers = [list(itertools.islice(free, max(options.num_class_images - present, 0)))]
    (numbers,) = broadcast_object_list(numbers)
    numbers = numbers[accelerator.process_index :: accelerator.num_processes]
    jobs = [(options.class_prompt, seed_of(options.seed, CLASS, k)) for k in numbers]
    drawn = generate(
        family, jobs, progress=bool(jobs) and accelerator.is_main_process, height=resolution, width=resolution, **VALIDATION
    )
    for k, image in zip(numbers, drawn):
        with replacing(where / f"{k:04d}.png") as part:
            image.save(part, "PNG")
    accelerator.wait_for_everyone()
    sources = data.find_sources(where, options.class_prompt)
    return [data.load(source, [(resolution, resolution)]) for source in sources[: options.num_class_images]]


def _card(options, settings, log, prompt, inputs):
    hidden = ("output_dir", "instance_data_dir")
    shown = {k: v for k, v in settings.items() if not (v is None or v is False or v == [] or k in hidden)}
    cells = [(name, str(value).replace("|", "\\|")) for name, value in shown.items()]  # OmniGen's <|image_1|>
    table = "\n".join(f"| {name} | {text} |" for name, text in cells)
    base = shlex.quote(options.pretrained_model_name_or_path)
    tail = log[-50:]
    losses = f"Mean loss of the last {len(tail)} steps: {sum(e['loss'] for e in tail) / len(tail):.4f}." if tail else ""
    picture = f"\n![{options.validation_prompt}](validation.png)\n" if options.validation_prompt else ""
    more = {"height": options.resolution, "width": options.resolution, "quantize": options.quantize}
    more = "".join(f" --{name} {value}" for name, value in more.items() if value)
    more += " --quantize_text_encoders" * options.quantize_text_encoders
    more += "".join(f" --input_image {shlex.quote(str(path))}" for path in inputs)
    return f"""---
base_model: {json.dumps(options.pretrained_model_name_or_path)}
tags: [text-to-image, diffusers, {options.method}]
---
# {options.method.upper()} adapter{f" for “{options.instance_prompt}”" if options.instance_prompt else ""}
{picture}
```bash
deft sample --pretrained_model_name_or_path {base} \\
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
    subjects = dict.fromkeys(source.subject for source in sources if source.subject)
    if options.cut_mix_prob and len(subjects) < 2:
        raise UserError(
            f"--cut_mix_prob mixes pictures of several subjects, and {options.instance_data_dir} tells of {len(subjects)}: "
            f'write {data.METADATA} with {{"file_name": ..., "subject": "sks dog"}} for each'
        )
    data.check(sources)  # nothing is kept: photographs are large, and their final size is not known yet
    folder = Path(options.output_dir).expanduser()
    resume = _find_resume(options, folder)

    fsdp = sharding.plugin_for(options)
    accelerator = Accelerator(
        fsdp_plugin=fsdp,
        # a text encoder has them whose last layers a pipeline does not use
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=options.train_text_encoder)],
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=folder,
    )
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; use no on a CPU")
    if not torch.distributed.is_initialized():
        fsdp = None  # one process has nobody to share with
    resume = _agree(resume)
    if options.resume_from_checkpoint and not resume and accelerator.is_main_process:
        print(f"no checkpoint in {folder}: starting from the beginning", file=sys.stderr)
    with enough_memory(options, "while the base model was loaded", folder):
        if family is None:
            family = load_family(
                options.pretrained_model_name_or_path, DTYPES.get(precision, torch.float32), options.quantize,
                options.quantize_text_encoders,
            )  # fmt: skip
        family.to(accelerator.device, without_model=fsdp is not None)  # which is split before it goes there
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
        mixed = [cut_mix.prompt(*pair) for pair in itertools.permutations(subjects, 2)] if options.cut_mix_prob else []
        warn_of_cut_text(family, [*(s.caption for s in sources), *mixed, options.validation_prompt or ""])
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
        "base": _fingerprint_of_base(family),
    }
    if resume:
        _check_same_run(resume, settings)
    for name in ("snr_gamma", "weighting_scheme", "unmix_weight"):
        if hasattr(family, name):
            setattr(family, name, getattr(options, name))
        elif getattr(options, name) is not None:
            raise UserError(f"--{name} does not apply to {options.pretrained_model_name_or_path}, {family.kind}")
    method = METHODS[options.method](family, options)
    streams = [pictures]
    replaces = options.overwrite_output_dir and not (resume and resume.resolve().parent == folder.resolve())
    if replaces and accelerator.is_main_process:
        remove(folder / CLASS_IMAGES)
    if options.class_prompt:
        streams.append(class_pictures(options, family, accelerator, resolution, folder))
        settings["class_pictures"] = _fingerprint(streams[1])
        if resume:
            _check_same_run(resume, settings)
    with enough_memory(options, "before the first step", folder):
        samples = [
            Samples(
                stream, family, seed_of(options.seed, k), crop_anywhere, options.random_flip, settings["images_per_step"],
                options.cache_dir, caption_dropout=options.caption_dropout, noise_offset=options.noise_offset,
                encode_texts=not method.encodes_text, cut_mix_prob=options.cut_mix_prob,
            )
            for k, stream in enumerate(streams)
        ]  # fmt: skip
        run = Run(options, accelerator, family, method, samples, settings, folder, resume, fsdp, (prompt, inputs))

    accelerator.wait_for_everyone()  # every process has looked at the folder before one of them changes it
    with alone(folder) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            if replaces:
                for path in _existing(folder, (*MARKS, *PICTURES)):
                    remove(path)
            for path in folder.glob(PARTS):
                remove(path)
            with replacing(folder / SETTINGS) as part:
                _write_json(part, settings)
            run.open_log(resume)
            if options.report_to != "none":
                shown = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
                anew = {"purge_step": run.step + 1}  # what a killed run has told of the steps that are taken again
                name = "logs" if options.report_to == "tensorboard" else "deft"
                accelerator.init_trackers(name, shown, {"tensorboard": anew})
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
        run.finish({
            "parameters": sum(p.numel() for p in run.parameters), "steps": run.step - first, "seconds": round(seconds, 2),
            "images_per_second": round((run.step - first) * run.images_per_step / seconds, 2),
            "memory_gb": round(_memory(), 2),
        })  # fmt: skip
        accelerator.wait_for_everyone()
        accelerator.end_training()  # which ends the process group
        if accelerator.is_main_process:
            print(f"{options.method} in {folder}: {run.step - first} steps in {seconds:.1f} s")
    return folder
