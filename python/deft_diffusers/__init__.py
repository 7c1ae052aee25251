"""Personalises text-to-image pipelines with DEFT adapters: `deft train`, `deft sample`, `deft demo`.

Importing this package is cheap; torch and diffusers are imported by the modules that need them.
"""

__version__ = "0.1.0"


class UserError(ValueError):
    """Something the user can put right: the command line prints it as one line and exits with code 2."""
