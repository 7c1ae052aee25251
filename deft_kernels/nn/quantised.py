"""Quantised base layers: what they hold, as the matrix that it stands for, and that matrix put back.

    bitsandbytes  8-bit (LLM.int8, arXiv 2208.07339), 4-bit nf4 and fp4 (QLoRA, arXiv 2305.14314)
    torchao       tensor subclasses in an ordinary nn.Linear: int8, float8, intx; others are read if they can be
    GGUF          diffusers' GGUFLinear

Layers are told by the class of their weight, so that none of these libraries is a dependency; a model that has such a layer
has its library. Every conversion is the library's own.
"""

import copy

import torch
from torch import Tensor, nn

# torchao's tensors that can be made from a matrix by what they say of themselves
TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


class Quantised:
    """A layer's quantised weight. `name` is the type as its users know it, `requantises` whether the library can make it
    from a matrix."""

    name: str
    requantises = True

    @property
    def tensors(self) -> list[Tensor]:
        """All that changes with W, as the layer holds it: writing to them in place changes the layer."""
        raise NotImplementedError

    def dequantise(self, tensors: list[Tensor] | None = None) -> Tensor | None:
        """W (m, n), float32, as the library reads `tensors` (None: those that the layer holds). None where the library has
        no such function."""
        raise NotImplementedError

    def quantise(self, W: Tensor) -> list[Tensor]:
        """What `tensors` are for W (m, n), of the same type."""
        raise NotImplementedError


class _Bitsandbytes4bit(Quantised):
    def __init__(self, base: nn.Module):
        self.base = base
        if getattr(base.weight, "quant_state", None) is None:
            raise ValueError("its 4-bit weight has no quantisation state yet: move the layer to its device first")
        _unpack(base)
        self.state = base.weight.quant_state
        self.name = f"bitsandbytes {self.state.quant_type}" + (" with double quantisation" if self.state.nested else "")

    def _list(self, codes, state):
        return [codes, state.absmax] + ([state.offset, state.state2.absmax] if state.nested else [])

    @property
    def tensors(self):
        return self._list(self.base.weight.data, self.state)

    def dequantise(self, tensors=None):
        from bitsandbytes.functional import dequantize_4bit

        codes, absmax, *second = tensors or self.tensors
        state = copy.copy(self.state)
        state.absmax = absmax
        if second:
            state.state2 = copy.copy(state.state2)
            state.offset, state.state2.absmax = second
        return dequantize_4bit(codes, state).float()

    def quantise(self, W):
        from bitsandbytes.functional import quantize_4bit

        old = self.state
        codes, state = quantize_4bit(
            W, blocksize=old.blocksize, compress_statistics=old.nested, quant_type=old.quant_type,
            quant_storage=self.base.weight.dtype,
        )  # fmt: skip
        return self._list(codes, state)


class _Bitsandbytes8bit(Quantised):
    name = "bitsandbytes 8-bit"

    def __init__(self, base: nn.Module):
        self.base = base
        if any(t is None for t in self.tensors):
            raise ValueError("its 8-bit weight has lost its row scales (SCB), without which W cannot be had: load it again")

    @property
    def tensors(self):
        weight, state = self.base.weight, self.base.state  # to which the first forward moves them
        return [state.CB if weight.CB is None else weight.CB, state.SCB if weight.SCB is None else weight.SCB]

    def dequantise(self, tensors=None):
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(*(tensors or self.tensors)).float()

    def quantise(self, W):
        from bitsandbytes.functional import int8_vectorwise_quant

        return list(int8_vectorwise_quant(W.half())[:2])


class _Torchao(Quantised):
    def __init__(self, base: nn.Module):
        self.weight = base.weight
        kind = type(self.weight).__name__
        self.requantises = kind in TORCHAO
        self.name = f"torchao {kind}" + (f" of {self.weight.target_dtype}" if hasattr(self.weight, "target_dtype") else "")
        self.names = [n for n in ("qdata", "scale", "zero_point") if getattr(self.weight, n, None) is not None]

    @property
    def tensors(self):
        return [getattr(self.weight, name) for name in self.names]

    def dequantise(self, tensors=None):
        weight = self.weight
        if not hasattr(weight, "dequantize"):
            return None
        if tensors is not None:
            names, context = weight.__tensor_flatten__()
            inner = {name: getattr(weight, name) for name in names} | dict(zip(self.names, tensors))
            weight = type(weight).__tensor_unflatten__(inner, context, None, None)
        return weight.dequantize().float()

    def quantise(self, W):
        from torchao.quantization.granularity import PerBlock
        from torchao.quantization.quant_primitives import MappingType

        old, W = self.weight, W.to(self.weight.dtype)
        blocks = PerBlock(tuple(old.block_size))
        offset = "zero_point" in self.names and bool(old.zero_point.any())
        mapping = MappingType.ASYMMETRIC if offset else MappingType.SYMMETRIC
        kind = type(old).__name__
        if kind == "Int8Tensor":
            new = type(old).from_hp(W, blocks, mapping_type=mapping, reduce_range=old.reduce_range)
        elif kind == "Float8Tensor":
            new = type(old).from_hp(W, old.qdata.dtype, blocks, kernel_preference=old.kernel_preference)
        else:
            new = type(old).from_hp(W, tuple(old.block_size), old.target_dtype, mapping_type=mapping)
        return [getattr(new, name) for name in self.names]


class _GGUF(Quantised):
    def __init__(self, base: nn.Module):
        from gguf import GGMLQuantizationType

        self.weight = base.weight
        self.type = GGMLQuantizationType(self.weight.quant_type)
        self.name = f"GGUF {self.type.name}"

    @property
    def requantises(self) -> bool:
        from gguf import GGML_QUANT_SIZES

        try:  # the package knows more types than it can make
            self.quantise(torch.zeros(1, GGML_QUANT_SIZES[self.type][0]))
        except NotImplementedError:
            return False
        return True

    @property
    def tensors(self):
        return [self.weight.as_tensor().detach()]

    def dequantise(self, tensors=None):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        weight = self.weight if tensors is None else type(self.weight)(tensors[0], quant_type=self.type)
        return dequantize_gguf_tensor(weight).detach().float()

    def quantise(self, W):
        from gguf.quants import quantize

        return [torch.from_numpy(quantize(W.float().cpu().numpy(), self.type)).to(W.device)]


def quantised(base: nn.Module) -> Quantised | None:
    """What a layer holds if that is a quantised weight, else None. ValueError where it lacks what it needs to be read."""
    weight = base._parameters.get("weight")
    if weight is None or weight.is_meta:
        return None
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _Bitsandbytes4bit(base)
    if kind == "Int8Params":  # with float weights the layer quantises them anew in every forward
        return _Bitsandbytes8bit(base) if weight.dtype == torch.int8 else None
    if kind == "GGUFParameter":
        return _GGUF(base)
    return _Torchao(base) if any(c.__name__ == "TorchAOBaseTensor" for c in type(weight).__mro__) else None


def is_hooked(base: nn.Module) -> bool:
    """Whether something else acts when the layer is called, so that its weight does not tell what it does."""
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)


def hold(base: nn.Module) -> None:
    """Keep a layer's weight in the one layout that can be read, differentiated and put back.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 packs a 4-bit weight anew, in place, in the first forward that needs no
    gradient. That rounds the scales to bfloat16, fails for shapes that are no multiples of 32 and 64, and passes no gradient
    on, or a wrong one. The 4-bit layers of adapted models do without, until `release`.
    """
    if getattr(base, "support_avx512bf16_for_cpu", False):
        base.support_avx512bf16_for_cpu = False
        base._held_by_deft = True
        _unpack(base)


def _unpack(base: nn.Module) -> None:
    state = getattr(base.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base.state_dict()  # by which bitsandbytes takes the weight out of that layout
        if state.absmax.dim() == 2:  # but 0.50.2 leaves the scales by column where they are not quantised themselves
            state.absmax = state.absmax.t().reshape(-1).float()


def release(base: nn.Module) -> None:
    """Undo `hold`."""
    if base.__dict__.pop("_held_by_deft", False):
        base.support_avx512bf16_for_cpu = True
