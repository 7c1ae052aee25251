"""Latents and text embeddings kept on disk from one run to the next.

An entry's name is a digest of all that it was made from: of the encoder (its configuration and a sample of every weight) and
of the picture or text. So an entry that has become stale is never found, and several runs may share a folder.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import UserError

SAMPLED = 64  # weights of each tensor


def digest_of(module):
    """sha256, as bytes, of a model's configuration and of a sample of every one of its tensors."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}  # where it lies, who saved it
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[index.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.digest()


class Cache:
    """Entries of one encoder in a folder."""

    def __init__(self, folder, encoders):
        self.folder, self.encoder = Path(folder).expanduser(), b"".join(map(digest_of, encoders))
        self.found = self.made = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make --cache_dir {folder}: {error}") from error

    def get(self, source, make):
        """The tensors, on the CPU, that `make()` gives for `source` (bytes); from the disk if they are there."""
        file = self.folder / f"{hashlib.sha256(self.encoder + source).hexdigest()}.safetensors"
        if file.is_file():
            try:
                entry = load_file(file)
            except SafetensorError as error:
                raise UserError(f"{file} is damaged ({error}): delete it and run again") from error
            self.found += 1
            return entry
        entry = {name: tensor.contiguous().cpu() for name, tensor in make().items()}
        part = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(entry, part)
        os.replace(part, file)  # whole or not at all
        self.made += 1
        return entry
