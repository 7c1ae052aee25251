"""The operations, `torch.ops.deft_kernels.*`: schema, fake, dispatch and autograd, one file each."""

from ._dispatch import BACKENDS, backends
from .lowrank_linear import LowRankLinear, activation_is_cheaper, lowrank_linear_shared
from .merge import merge
from .orthonormalize import orthonormalize
from .project import project

__all__ = [
    "BACKENDS",
    "LowRankLinear",
    "activation_is_cheaper",
    "backends",
    "lowrank_linear_shared",
    "merge",
    "orthonormalize",
    "project",
]
