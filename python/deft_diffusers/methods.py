"""The methods: what each of them trains of a model, and how that is saved. The trainer is the same for all.

| method | trains | saved as |
|---|---|---|
| deft, para, lora | an adapter's factors (`deft_kernels`) | PEFT's `adapter_model.safetensors` |
| the same with text encoders | | `pytorch_deft_weights.safetensors` |
| svdiff | a shift of every weight's singular values (arXiv 2303.11305) | `spectral_shifts.safetensors` |
| dreambooth | the denoiser itself (arXiv 2208.12242) | the denoiser's folder, in diffusers' layout |
| textual_inversion | the embedding of a new word (arXiv 2208.01618) | `learned_embeds.safetensors` |
"""

import contextlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import deft_kernels as dk
from deft_kernels.adapters.files import FOUND

from . import UserError, sharding

WORD = "placeholder_token"  # key of a file's metadata
P_RATE = 0.1  # of R's learning rate, for an orthogonal basis: the reference trainer's ratio
PUBLISHED = {  # learning rate and steps of adapters
    "deft": (1e-3, 500),  # the authors' rate for OmniGen, and the steps of their SDXL runs
    "para": (5e-4, 1000),  # the paper's steps; the rate is LoRA's
    "lora": (5e-4, 500),  # diffusers' trainer
}


class Method:
    """One method on one family's model. `start` or `load` comes first, once; then `groups` and `save`."""

    files: tuple[str, ...] = ()  # that `save` writes; the first tells a folder of this method
    encodes_text = False  # whether the loss must encode texts itself, for their encoders to learn
    trains_base = False  # whether the base's own weights train
    changes_weights = ""  # how, where that needs dense ones

    def __init__(self, family, options):
        self.family, self.options = family, options

    @staticmethod
    def published(options):
        """Learning rate (of R where there is one) and number of steps, as published, for options that leave them open."""
        raise NotImplementedError

    @staticmethod
    def check(options, captions):
        """UserError if there is nothing to learn from these texts."""

    def start(self):
        """Puts what trains on the model, at its first values."""
        raise NotImplementedError

    def load(self, folder):
        """Puts what trains on the model, as `save` wrote it."""
        raise NotImplementedError

    def groups(self):
        """What trains, {name: parameters}, and {name: learning rate}."""
        raise NotImplementedError

    def whole(self):
        """The context that `save` needs: every process enters it, so that the main one has split weights whole."""
        return contextlib.nullcontext()

    def save(self, folder):
        """Writes what has been learned into an existing folder."""
        raise NotImplementedError

    def describe(self):
        """For the log, in a few words."""
        return self.options.method

    @staticmethod
    def apply(family, folder, weight):
        """Changes the family's model for good by what a folder holds, at any strength. (Adapters come off again.)"""
        raise NotImplementedError


class Adapter(Method):
    """DEFT, PaRa, LoRA; with `--train_text_encoder` on the text encoders too."""

    files = ("adapter_model.safetensors", "adapter_config.json")

    @staticmethod
    def published(options):
        return PUBLISHED[options.method]

    @property
    def encodes_text(self):
        return self.options.train_text_encoder

    @property
    def _adapted(self):
        """What the adapter's verbs take: the denoiser, or the pipeline."""
        return self.family.pipe if self.options.train_text_encoder else self.family.model

    def start(self):
        config = self._config(_targets(self.options.target_modules, self.family))
        if self.options.train_text_encoder:
            _check_text_encoders(self.family, self.family.adapted_text_encoders)
            texts = dict.fromkeys(self.family.adapted_text_encoders, self._config(None))
            config = {self.family.model_name: config} | texts
        dk.inject_adapter(self._adapted, config)

    def load(self, folder):
        dk.load_adapter(self._adapted, folder, trainable=True)

    def groups(self):
        groups, rates = dk.adapter_parameters(self.family.model), adapter_rates(self.options)
        if self.options.train_text_encoder:
            for part in self.family.adapted_text_encoders.values():
                for role, parameters in dk.adapter_parameters(part).items():
                    groups.setdefault(f"text_{role}", []).extend(parameters)
            rates |= {f"text_{role}": rate for role, rate in adapter_rates(self.options, text=True).items()}
        groups = {name: parameters for name, parameters in groups.items() if parameters}
        self.layers = sum(len(groups[name]) for name in ("P", "text_P") if name in groups)
        return groups, {name: rates[name] for name in groups}

    def save(self, folder):
        dk.save_adapter(self._adapted, folder)

    def describe(self):
        return f"{self.options.method}, rank {self.options.rank}, {self.layers} layers"

    def _config(self, targets):
        o = self.options
        common = {"r": o.rank, "alpha": o.alpha, "dropout": o.dropout, "init_weights": o.init_weights,
                  "target_modules": targets}  # fmt: skip
        if o.method == "lora":
            return dk.LoraConfig(**common)
        return dk.DeftConfig(
            **common, decomposition_method=o.decomposition_method or "qr", para=o.method == "para", gate=o.gate
        )


def adapter_rates(options, text=False):
    """Learning rate of each group of an adapter's parameters, in the denoiser or in the text encoders."""
    orthogonal = options.method == "deft" and options.decomposition_method in (None, "qr", "svd")
    own = text and options.text_encoder_lr is not None
    rate = options.text_encoder_lr if own else options.learning_rate
    rate_p = None if own else options.learning_rate_P
    if rate_p is None:
        rate_p = rate * (P_RATE if orthogonal else 1.0)
    return {"P": rate_p, "R": rate, "gate": rate}


def _check_text_encoders(family, found):
    if not found:
        raise UserError(f"--train_text_encoder does not apply to {family.kind}: it has no text encoder")


def _targets(text, family):
    """What `--target_modules` means: a list of names, or a regular expression or keyword as one string."""
    if text is None:
        return list(family.target_modules)
    if text == "all-linear" or not all(c.isalnum() or c in "_., " for c in text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


class Spectral(nn.Module):
    """W' = U diag(relu(σ + δ)) V^T with W = U diag(σ) V^T (SVDiff's eq. 2), as a parametrization; only δ trains, 0 at first.

    Convolutions are taken as (out, in*kh*kw), a vector as one column, whose only singular value is its length.
    """

    def __init__(self, weight):
        super().__init__()
        U, S, Vh = torch.linalg.svd(self._matrix(weight.detach()).float(), full_matrices=False)
        for name, value in (("U", U), ("S", S), ("Vh", Vh)):
            self.register_buffer(name, value.contiguous(), persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(S))

    @staticmethod
    def _matrix(weight):
        return weight.reshape(weight.shape[0], -1)

    def forward(self, weight):
        # as a change of W, which is then W itself where δ is 0
        change = (self.U * (F.relu(self.S + self.delta) - self.S)) @ self.Vh
        return weight + change.view(weight.shape).to(weight.dtype)


class SVDiff(Method):
    """Spectral shifts of every weight of the denoiser."""

    files = ("spectral_shifts.safetensors",)
    VECTOR_RATE = 1e-3  # of the others', for 1-D weights: the paper's 1e-6 to 1e-3
    changes_weights = "svdiff shifts the singular values of exact weights"

    @staticmethod
    def published(options):
        return 1e-3, 500

    def start(self):
        self.family.model.requires_grad_(False)
        self.shifts = {}
        layers = [(name, m) for name, m in self.family.model.named_modules() if _has_weight(m)]
        for name, layer in tqdm(layers, desc="singular values", leave=False, disable=len(layers) < 200):
            parametrize.register_parametrization(layer, "weight", Spectral(layer.weight))
            self.shifts[name] = layer.parametrizations.weight[0].delta

    def load(self, folder):
        self.start()
        file = Path(folder) / self.files[0]
        read = _read(file)
        _check_shifts(file, self.family.model, read, {name: len(delta) for name, delta in self.shifts.items()})
        with torch.no_grad():
            for name, delta in read.items():
                self.shifts[name].copy_(delta)

    def groups(self):
        matrices = [d for d in self.shifts.values() if d.numel() > 1]
        vectors = [d for d in self.shifts.values() if d.numel() == 1]
        rate = self.options.learning_rate
        return {"delta": matrices, "delta_1d": vectors}, {"delta": rate, "delta_1d": rate * self.VECTOR_RATE}

    def save(self, folder):
        shifts = {name: delta.detach().cpu().clone() for name, delta in self.shifts.items()}
        _save(shifts, Path(folder) / self.files[0])

    @staticmethod
    def apply(family, folder, weight):
        """W' = U diag(relu(σ + weight δ)) V^T; the shifts of several folders add up (SVDiff, section 3.4)."""
        file = Path(folder) / SVDiff.files[0]
        read, summed = _read(file), getattr(family, "spectral_shifts", {})
        layers = {name: m for name, m in family.model.named_modules() if _has_weight(m)}
        _check_shifts(file, family.model, read, {name: min(Spectral._matrix(m.weight).shape) for name, m in layers.items()})
        for name, layer in layers.items():
            if name not in summed:
                summed[name] = layer.weight.detach().clone(), Spectral(layer.weight)
            pristine, spectral = summed[name]
            with torch.no_grad():
                spectral.delta.add_(read[name].to(spectral.delta), alpha=weight)
                layer.weight.copy_(spectral(pristine))
        family.spectral_shifts = summed


def _has_weight(module):
    return isinstance(getattr(module, "weight", None), nn.Parameter) and not isinstance(module, nn.Embedding)


def _check_shifts(file, model, read, sizes):
    wrong = sorted(set(read) ^ set(sizes)) or [k for k in read if read[k].shape != (sizes[k],)]
    if wrong:
        raise UserError(f"{file} does not fit {type(model).__name__}: {len(wrong)} weights differ, {wrong[0]} the first")


class DreamBooth(Method):
    """The whole denoiser; with `--train_text_encoder` the text encoders too."""

    trains_base = True
    changes_weights = "dreambooth trains the weights themselves"

    @staticmethod
    def published(options):  # diffusers' guide to DreamBooth
        return 2e-6 if options.train_text_encoder else 5e-6, 800 if options.class_prompt else 400

    @property
    def parts(self):
        """Folders in diffusers' layout, and what they hold."""
        found = {self.family.model_name: self.family.model}
        return found | (self.family.text_encoders if self.options.train_text_encoder else {})

    @property
    def files(self):
        return tuple(self.parts)

    @property
    def encodes_text(self):
        return self.options.train_text_encoder

    def start(self):
        if self.options.train_text_encoder:
            _check_text_encoders(self.family, self.family.text_encoders)
        for part in self.parts.values():
            part.float().requires_grad_(True)  # half precision is autocast's, which keeps small steps

    def load(self, folder):
        self.start()
        for name, part in self.parts.items():
            self._blend(part, Path(folder) / name, 1.0)

    @staticmethod
    def apply(family, folder, weight):
        """W + weight (W' - W), of every part that the folder holds."""
        for name, part in {family.model_name: family.model, **family.text_encoders}.items():
            if (Path(folder) / name).is_dir():
                DreamBooth._blend(part, Path(folder) / name, weight)

    @staticmethod
    @torch.no_grad()
    def _blend(part, folder, weight):
        try:
            saved = type(part).from_pretrained(folder).state_dict()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} is no {type(part).__name__}: {error}") from error
        state = part.state_dict()
        wrong = sorted(set(saved) ^ set(state)) or [k for k in saved if saved[k].shape != state[k].shape]
        if wrong:
            raise UserError(f"{folder} does not fit the base model: {len(wrong)} weights differ, {wrong[0]} the first")
        for key, own in state.items():
            own.copy_(saved[key] if weight == 1 else torch.lerp(own.float(), saved[key].to(own.device).float(), weight))

    def groups(self):
        groups = {name: [p for p in part.parameters() if p.requires_grad] for name, part in self.parts.items()}
        o = self.options
        text_rate = o.learning_rate if o.text_encoder_lr is None else o.text_encoder_lr
        return groups, dict.fromkeys(groups, text_rate) | {self.family.model_name: o.learning_rate}

    @contextlib.contextmanager
    def whole(self):
        self.saved = {name: sharding.whole_part(part) for name, part in self.parts.items()}
        yield
        del self.saved

    def save(self, folder):
        for name, part in self.saved.items():
            part.save_pretrained(Path(folder) / name)


class NewRows(nn.Module):
    """A token embedding with rows (count, dim), which alone train, for the ids from `first` up."""

    def __init__(self, base, rows, first):
        super().__init__()
        self.base, self.first = base, first
        self.new = nn.Embedding.from_pretrained(rows, freeze=False)  # behind the base, whose dtype is the model's

    @property
    def rows(self):
        return self.new.weight

    def forward(self, ids):
        new = self.new((ids - self.first).clamp_min(0)).to(self.base.weight.dtype)
        return torch.where((ids >= self.first)[..., None], new, self.base(ids.clamp_max(self.first - 1)))


class TextualInversion(Method):
    """A new word for the subject: its embedding in every text encoder that shares the first one's kind of tokens."""

    files = ("learned_embeds.safetensors",)
    encodes_text = True

    @staticmethod
    def published(options):  # diffusers' trainer with --scale_lr
        processes = int(os.environ.get("WORLD_SIZE", 1))  # as launchers tell it
        return 5e-4 * options.train_batch_size * options.gradient_accumulation_steps * processes, 3000

    @staticmethod
    def check(options, captions):
        word = options.placeholder_token
        if not any(word in caption for caption in captions):
            raise UserError(f"no text has the placeholder {word}: write --instance_prompt 'a photo of {word}'")

    def start(self):
        o = self.options
        if not self.family.word_encoders:
            raise UserError(f"--method textual_inversion does not apply to {self.family.kind}: it has no text encoder")
        self.family.model.requires_grad_(False)
        self.embeddings = {}
        for key, (tokenizer, encoder) in self.family.word_encoders.items():
            encoder.requires_grad_(False)
            words = [o.placeholder_token, *(f"{o.placeholder_token}_{k}" for k in range(1, o.num_vectors))]
            table, old = encoder.get_input_embeddings(), len(tokenizer)
            known = tokenizer.get_vocab()
            for word in words:
                if {word, f"{word}</w>", f"▁{word}", f"Ġ{word}"} & known.keys():  # as tokenizers mark it
                    raise UserError(f"--placeholder_token {word} is a word of the model already: choose another")
            tokenizer.add_tokens(words)
            ids = tokenizer.encode(o.initializer_token or "", add_special_tokens=False)
            if o.initializer_token is not None and not ids:
                raise UserError(f"--initializer_token {o.initializer_token!r} is no word to this model")
            first = table.weight.detach()[ids or slice(None)].mean(0, keepdim=True)
            rows = first.float().repeat(o.num_vectors, 1)
            encoder.set_input_embeddings(NewRows(table, rows, old))
            self.embeddings[key] = encoder.get_input_embeddings()
        if len(self.embeddings) == 1:  # as diffusers' `load_textual_inversion` reads it
            self.embeddings = {o.placeholder_token: next(iter(self.embeddings.values()))}

    def load(self, folder):
        self.start()
        file = Path(folder) / self.files[0]
        read = _read(file)
        with torch.no_grad():
            for key, embedding in self.embeddings.items():
                rows = read.get(key)
                if rows is None or rows.shape != embedding.rows.shape:
                    raise UserError(f"{file} does not hold {tuple(embedding.rows.shape)} values for {key}")
                embedding.rows.copy_(rows)

    @staticmethod
    def apply(family, folder, weight):
        """The word becomes one of the tokenizers'. A word has no strength."""
        if weight != 1:
            raise UserError(f"{folder} holds a new word, which has no strength: its --adapter_weight can only be 1")
        file, encoders = Path(folder) / TextualInversion.files[0], family.word_encoders
        read = _read(file)
        with safe_open(file, "pt") as opened:
            word = (opened.metadata() or {}).get(WORD) or next(iter(read))
        if len(encoders) == 1:
            encoders = {word: next(iter(encoders.values()))}
        if set(read) != set(encoders):
            raise UserError(f"{file} holds {', '.join(read)}; {family.kind} takes {', '.join(encoders)}")
        for key, (tokenizer, encoder) in encoders.items():
            try:
                family.pipe.load_textual_inversion(read[key], token=word, tokenizer=tokenizer, text_encoder=encoder)
            except ValueError as error:
                raise UserError(f"{file}: {error}") from error

    def groups(self):
        rows = [embedding.rows for embedding in self.embeddings.values()]
        return {"words": rows}, {"words": self.options.learning_rate}

    def save(self, folder):
        rows = {key: embedding.rows.detach().cpu().clone() for key, embedding in self.embeddings.items()}
        _save(rows, Path(folder) / self.files[0], {WORD: self.options.placeholder_token})


METHODS = {
    "deft": Adapter, "para": Adapter, "lora": Adapter,
    "svdiff": SVDiff, "dreambooth": DreamBooth, "textual_inversion": TextualInversion,
}  # fmt: skip


def check_base(method, family):
    """UserError if a method needs dense weights and the family's are quantised."""
    if method.changes_weights and family.quantisation:
        raise UserError(
            f"{method.changes_weights}, and this base's are quantised ({family.quantisation}): use a dense base, or deft, "
            "para, lora or textual_inversion"
        )


def method_of(folder, family):
    """The class of the method whose results a folder holds. UserError if it holds none."""
    found = [kind for kind in (Adapter, SVDiff, TextualInversion) if (Path(folder) / kind.files[0]).is_file()]
    parts = (family.model_name, *family.text_encoders)
    others = (*FOUND, *(f"{part}/{Adapter.files[0]}" for part in parts))  # LoRA files, adapters of several parts
    if not found and any((Path(folder) / name).is_file() for name in others):
        found = [Adapter]
    if not found and (Path(folder) / family.model_name).is_dir():
        found = [DreamBooth]
    if not found:
        files = ", ".join(kind.files[0] for kind in (Adapter, SVDiff, TextualInversion))
        raise UserError(
            f"{folder} holds nothing that `deft train` writes: none of {files}, nor a folder {family.model_name}"
        )
    return found[0]


def _save(tensors, file, metadata=None):
    part = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, part, metadata)
    os.replace(part, file)


def _read(file):
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    bad = [name for name, t in tensors.items() if not math.isfinite(t.double().sum())]
    if bad:
        raise UserError(f"{file}: {bad[0]} has values that are not finite")
    return tensors
