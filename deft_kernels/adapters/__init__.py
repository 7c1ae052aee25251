"""Adapters of whole models: into a model and out of it, merged and swapped, in files and back."""

from .authors import import_reference
from .lora import export_lora, import_lora
from .peft import patch_peft, unpatch_peft
from .pipeline import (
    adapter_parameters,
    adapter_state_dict,
    delete_adapter,
    eject,
    hotswap,
    inject_adapter,
    list_adapters,
    load_adapter,
    merge,
    route_adapters,
    save_adapter,
    set_adapters,
    unmerge,
)

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
    "list_adapters",
    "load_adapter",
    "merge",
    "patch_peft",
    "route_adapters",
    "save_adapter",
    "set_adapters",
    "unmerge",
    "unpatch_peft",
]
