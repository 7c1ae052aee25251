"""Which backend serves which operation: one table, one rule, no silent fallback.

Every kernel registers itself under an operation's name with a predicate that says why it cannot serve given arguments.
`DEFT_KERNELS_BACKEND=auto` (default) takes the first backend of `BACKENDS` that can; any other value forces one, and a
forced backend that cannot serve raises.
"""

import os
from collections.abc import Callable

import torch

BACKENDS = ("cuda", "triton", "cpp", "reference")  # order of preference under `auto`

library = torch.library.Library("deft_kernels", "DEF")
_kernels: dict[str, dict[str, tuple[Callable, Callable | None]]] = {}


def define(schema: str, through: Callable | None = None) -> None:
    """Declare an operation by its schema. Its kernel is whatever backend `_pick` chooses at the call, or, for an
    operation that only wraps another one, the function `through`."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if through is not None:
        library.impl(name, through, "CompositeExplicitAutograd")
        return
    _kernels[name] = {}

    def kernel(*args):
        serve = _pick(name, args)
        device = _device(args)
        if torch.is_autocast_enabled(device):  # the caller has chosen dtypes; matmuls in here must not be recast
            with torch.autocast(device, enabled=False):
                return serve(*args)
        return serve(*args)

    library.impl(name, kernel, "CompositeExplicitAutograd")


def fake(name: str):
    """Register the shape function of an operation."""
    return torch.library.register_fake(f"deft_kernels::{name}", lib=library)


def differentiable(name: str, function: Callable) -> None:
    """Register `function`, which applies an autograd.Function, as the operation's autograd kernel."""
    library.impl(name, function, "Autograd")


below_autograd = torch._C._AutoDispatchBelowAutograd  # for an operation's Function to reach its own kernel


def kernel(name: str, backend: str, cannot: Callable[..., str | None] | None = None):
    """Register a backend's kernel for an operation; `cannot(*args)` returns why it cannot serve, or None."""
    assert backend in BACKENDS and name in _kernels

    def register(fn: Callable) -> Callable:
        _kernels[name][backend] = (fn, cannot)
        return fn

    return register


def requested() -> str:
    """The value of DEFT_KERNELS_BACKEND, checked."""
    backend = os.environ.get("DEFT_KERNELS_BACKEND", "auto")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"DEFT_KERNELS_BACKEND={backend!r}: expected auto, {', '.join(BACKENDS)}")
    return backend


def _pick(name: str, args: tuple) -> Callable:
    forced = requested()
    for backend in BACKENDS if forced == "auto" else (forced,):
        reason = _why_not(name, backend, args)
        if reason is None:
            return _kernels[name][backend][0]
    raise RuntimeError(f"DEFT_KERNELS_BACKEND={forced} cannot serve deft_kernels::{name}: {reason}")


def _why_not(name: str, backend: str, args: tuple) -> str | None:
    if backend not in _kernels[name]:
        return f"this build has no {backend} kernel for it"
    cannot = _kernels[name][backend][1]
    return None if cannot is None else cannot(*args)


def _device(args: tuple) -> str:
    """Device type of the first tensor among the arguments (lists looked into); cpu where there is none."""
    for arg in args:
        for item in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(item, torch.Tensor):
                return item.device.type
    return "cpu"


def backends() -> dict[str, dict[str, str]]:
    """What serves each operation here, and why another backend does not.

    Returns:
        `{operation: {backend: "serves" | "available" | "<why not>"}}` under the current `DEFT_KERNELS_BACKEND`;
        "serves" marks the one that is asked first, "available" one that could be forced.
    """
    forced = requested()
    table: dict[str, dict[str, str]] = {}
    for name, kernels in _kernels.items():
        order = [b for b in BACKENDS if b in kernels and forced in ("auto", b)]
        table[name] = {}
        for backend in BACKENDS:
            if backend not in kernels:
                table[name][backend] = f"this build has no {backend} kernel for it"
            elif order and backend == order[0]:
                table[name][backend] = "serves"
            else:
                table[name][backend] = "available"
    return table
