"""Latents and text embeddings kept on disk from one run to the next.

An entry's name is a digest of all that it was made from: the encoders' configurations and weights, every one of them; the
tokenizers; the kind of pipeline and the versions of the libraries; the picture or text. So an entry that has become stale is
never found, and several runs may share a folder.
"""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import UserError, __version__


def _plain(tensor):
    """The tensors that a tensor is made of: itself, but for torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in _plain(getattr(tensor, name))]


def digest_of(module):
    """sha256, as bytes, of a model's class, configuration and weights. (All of them: with SHA instructions a processor reads
    some 2 GB/s, T5-XXL in bfloat16 in 5 s.)"""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}  # where it lies, who saved it
    digest = hashlib.sha256((type(module).__name__ + json.dumps(config, sort_keys=True, default=str)).encode())
    for name, tensor in module.state_dict().items():
        for plain in _plain(tensor):
            digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
            digest.update(plain.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def digest_of_tokenizer(tokenizer):
    """sha256, as bytes, of all that decides which numbers a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    rules.pop("truncation", None), rules.pop("padding", None)  # the last call's
    said = [rules, tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).digest()


class Cache:
    """Entries of the encoders, and tokenizers, of one kind of pipeline in a folder."""

    def __init__(self, folder, kind, encoders, tokenizers=()):
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "transformers")]
        digests = [*map(digest_of, encoders), *map(digest_of_tokenizer, tokenizers)]
        self.encoder = " ".join([kind, __version__, *versions]).encode() + b"".join(digests)
        self.folder = Path(folder).expanduser()
        self.found = self.made = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make --cache_dir {folder}: {error}") from error

    def _file(self, source):
        return self.folder / f"{hashlib.sha256(self.encoder + source).hexdigest()}.safetensors"

    def __contains__(self, source):
        return self._file(source).is_file()

    def get(self, source, make):
        """The tensors, on the CPU, that `make()` gives for `source` (bytes); from the disk if they are there."""
        file = self._file(source)
        if file.is_file():
            try:
                entry = load_file(file)
            except SafetensorError as error:
                raise UserError(f"{file} is damaged ({error}): delete it and run again") from error
            self.found += 1
            return entry
        entry = {name: tensor.contiguous().cpu() for name, tensor in make().items()}
        part = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            save_file(entry, part)
            os.replace(part, file)  # whole or not at all
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise UserError(
                f"cannot write to --cache_dir {self.folder}: {error}; what it holds is whole. Make room, choose another "
                "folder, or go without"
            ) from error
        self.made += 1
        return entry
