"""Drop-in modules: frozen layers with DEFT, PaRa and LoRA adapters on them, and the bank that prepares them together."""

from .bank import Bank
from .functional import deft_linear, deft_weight
from .layers import DeftConv2d, DeftLayer, DeftLinear

__all__ = ["Bank", "DeftConv2d", "DeftLayer", "DeftLinear", "deft_linear", "deft_weight"]
