"""What an adapter is: `DeftConfig` for DEFT and PaRa, `LoraConfig` for LoRA on the same layers."""

import math
import re
from dataclasses import dataclass

from .reference import DECOMPOSITIONS

# The attention projections of diffusers' models: what DEFT's authors, and LoRA's trainers, adapt.
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*DEFAULT_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # the text's projections beside them
# What is adapted by default, by the model's class; DEFAULT_TARGETS for one that is not listed.
TARGETS = {
    "UNet2DConditionModel": DEFAULT_TARGETS,  # Stable Diffusion 1.x, 2.x, SDXL: the authors' runs
    "SD3Transformer2DModel": _JOINT,  # as diffusers' LoRA trainers
    "FluxTransformer2DModel": _JOINT,
    "Flux2Transformer2DModel": (*_JOINT, "to_qkv_mlp_proj", "linear_in", "linear_out"),  # PEFT's record, FLUX.2 klein
    "OmniGenTransformer2DModel": DEFAULT_TARGETS,  # the authors' qkv_proj and o_proj, which diffusers splits
    "CLIPTextModel": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "CLIPTextModelWithProjection": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "T5EncoderModel": ("q", "k", "v", "o"),
    "Qwen3ForCausalLM": ("q_proj", "k_proj", "v_proj", "o_proj"),  # FLUX.2 klein's text encoder
}


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass
class DeftConfig:
    """A DEFT adapter: W' = W - B K^T W + s B R (arXiv 2509.22793), with PEFT's option names.

    Args:
        r: rank, at least 1; capped at a layer's out_features there.
        alpha: the injection is scaled by s = alpha / r; None: s = 1. The removal is never scaled.
        decomposition_method: how the bases B and K come from the trained P: "qr" (B = K = Q of P = QR), "svd" (left
            singular vectors), "relu" (B = P, K = relu(P); PEFT's default), "none" (B = K = P).
        para: PaRa: remove only, inject nothing; there is no R.
        dropout: probability, applied to the input of the injection only.
        gate: scale the injection by sigmoid(g) with a trained scalar g per layer, 0.5 at the start.
        init_weights: True starts at the identity (R = K^T W / s; impossible for PaRa); False at random, as the
            reference code does.
        target_modules: layers to adapt: a list of names or name endings, a regular expression that matches full names,
            or "all-linear". None: the attention projections, as `TARGETS` lists them by the model's class.
        exclude_modules: layers not to adapt, by list or regular expression.
        init_scale: factor on the standard deviation 0.02 of a random R.

    Raises:
        ValueError: an option outside its range; the message names it.
    """

    r: int = 8
    alpha: float | None = None
    decomposition_method: str = "qr"
    para: bool = False
    dropout: float = 0.0
    gate: bool = False
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_scale: float = 1.0

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}, expected a rank of at least 1")
        if self.decomposition_method not in DECOMPOSITIONS:
            raise ValueError(
                f"unknown decomposition_method {self.decomposition_method!r}: expected one of {', '.join(DECOMPOSITIONS)}"
            )
        if not (_finite(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout is {self.dropout!r}, expected a probability of at least 0 and below 1")
        if self.alpha is not None and not (_finite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha!r}, expected a positive number or None")
        if not _finite(self.init_scale):
            raise ValueError(f"init_scale is {self.init_scale!r}, expected a finite number")
        if self.para and self.gate:
            raise ValueError("gate scales the injection, and para=True has none: choose one of the two")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{name} {value!r} is no regular expression: {error}") from None
            elif value is not None and not isinstance(value, str):
                setattr(self, name, sorted(value))
        if self.target_modules == []:
            raise ValueError("target_modules is an empty list: name at least one layer, or None for the default")

    @property
    def method(self) -> str:
        """How a layer takes its bases from P: a decomposition, or "lora"."""
        return self.decomposition_method

    def scale(self, r: int) -> float:
        """s, the factor on the injection, for a layer where the rank is r."""
        return 1.0 if self.alpha is None else self.alpha / r


@dataclass
class LoraConfig(DeftConfig):
    """A LoRA adapter through the same layers: W' = W + (alpha / r) B A, arXiv 2106.09685. Nothing is removed.

    `init_weights` True starts with B = 0 and A as a linear layer's weight (PEFT's start); `alpha` None is alpha = r.
    DEFT's own options do not apply.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.para or self.gate or self.decomposition_method != "qr":
            raise ValueError("para, gate and decomposition_method belong to DeftConfig; LoRA has none of them")

    @property
    def method(self) -> str:
        return "lora"
