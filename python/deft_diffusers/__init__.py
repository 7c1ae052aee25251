"""Personalises text-to-image pipelines with DEFT adapters: `deft train`, `sweep`, `compare`, `sample`, `evaluate`, `convert`
and `demo`.

Importing this package is cheap; torch and diffusers are imported by the modules that need them.
"""

import difflib
import json
from pathlib import Path

__version__ = "0.1.0"


class UserError(ValueError):
    """Something the user can put right: the command line prints it as one line and exits with code 2."""


def near(word, known):
    """End of a message about an unknown word: the known one that it is near to, or nothing."""
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f", did you mean {found[0]}?" if found else ""


def read_json(path):
    """What a JSON file holds; UserError names one that cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_text(path):
    """A text file in UTF-8, with or without a byte-order mark; UserError names one that is not."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error
