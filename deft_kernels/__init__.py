"""deft_kernels: DEFT adapters (arXiv 2509.22793) as cheap as they can be, on fused kernels, as drop-in torch modules."""

from .adapters import (
    adapter_parameters,
    adapter_state_dict,
    delete_adapter,
    eject,
    export_lora,
    hotswap,
    import_lora,
    import_reference,
    inject_adapter,
    list_adapters,
    load_adapter,
    merge,
    patch_peft,
    route_adapters,
    save_adapter,
    set_adapters,
    unmerge,
    unpatch_peft,
)
from .config import DeftConfig, LoraConfig
from .nn import DeftConv2d, DeftLinear, deft_linear, deft_weight
from .ops import backends

__version__ = "0.1.0"

__all__ = [
    "DeftConfig",
    "DeftConv2d",
    "DeftLinear",
    "LoraConfig",
    "adapter_parameters",
    "adapter_state_dict",
    "backends",
    "deft_linear",
    "deft_weight",
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
