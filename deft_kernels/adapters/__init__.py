"""Adapters of whole models: into a model and out of it, merged and swapped, in files and back."""

from .authors import import_reference
from .files import adapter_state_dict, load_adapter, save_adapter
from .inject import adapter_parameters, delete_adapter, eject, inject_adapter, route_adapters, set_adapters
from .lora import export_lora, import_lora
from .merge import hotswap, merge, unmerge
from .peft import patch_peft, unpatch_peft

__all__ = [
    "adapter_parameters",
    "adapter_state_dict",
    "delete_adapter",
    "eject",
    "export_lora",
    "hotswap",
    "import_lora",
    "import_reference",
    "inject_adapter",
    "load_adapter",
    "merge",
    "patch_peft",
    "route_adapters",
    "save_adapter",
    "set_adapters",
    "unmerge",
    "unpatch_peft",
]
