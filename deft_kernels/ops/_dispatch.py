"""Which backend serves which operation: one table, one rule, no silent fallback.

Every kernel registers itself under an operation's name with a predicate that says why it cannot serve given arguments.
`DEFT_KERNELS_BACKEND=auto` (default) takes the first backend of `BACKENDS` that can; any other value forces one, and a
forced backend that cannot serve raises.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

BACKENDS = ("cuda", "triton", "cpp", "reference")  # order of preference under `auto`
ON_CPU = ("cpp", "reference")  # those that then serve tensors on a CPU: to ask the others too takes as long as a kernel

library = torch.library.Library("deft_kernels", "DEF")
_kernels: dict[str, dict[str, tuple[Callable, Callable | None, Callable[[], str | None] | None]]] = {}


def define(schema: str, check: Callable | None = None, writes: int | None = None, through: Callable | None = None) -> None:
    """Declare an operation by its schema. `check(*args)` raises ValueError where no backend could be right. Its kernel is
    the backend's that `_pick` chooses at the call; an operation that only wraps another one has a function, `through`.
    `writes`: the argument, a list, whose tensors are written to, which autograd is told."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if through is not None:
        library.impl(name, through, "CompositeExplicitAutograd")
        return
    _kernels[name] = {}

    def kernel(*args):
        check(*args)
        device = _device(args)
        serve = _pick(name, args, device)
        if torch.is_autocast_enabled(device):  # the caller has chosen dtypes; matmuls in here must not be recast
            with torch.autocast(device, enabled=False):
                result = serve(*args)
        else:
            result = serve(*args)
        if writes is not None:
            torch.autograd.graph.increment_version([t for t in args[writes] if not t.is_inference()])
        return result

    library.impl(name, kernel, "CompositeExplicitAutograd")


def fake(name: str):
    """Register the shape function of an operation."""
    return torch.library.register_fake(f"deft_kernels::{name}", lib=library)


def differentiable(name: str, function: Callable) -> None:
    """Register `function`, which applies an autograd.Function, as the operation's autograd kernel; where nothing asks for a
    gradient it is passed by, since for hundreds of layers it would cost more than the operation."""
    operation = getattr(torch.ops.deft_kernels, name)

    def kernel(*args):
        forward_mode = torch.autograd.forward_ad._current_level >= 0  # which the Function refuses by name
        if forward_mode or (torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args))):
            return function(*args)
        with below_autograd():
            return operation(*args)

    library.impl(name, kernel, "Autograd")


below_autograd = torch._C._AutoDispatchBelowAutograd  # for an operation's Function to reach its own kernel


def kernel(name: str, backend: str, cannot: Callable[..., str | None] | None = None, absent=None):
    """Register a backend's kernel for an operation. `cannot(*args)` returns why it cannot serve these arguments, or None;
    `absent()` why it cannot serve any on this machine."""
    assert backend in BACKENDS and name in _kernels

    def register(fn: Callable) -> Callable:
        _kernels[name][backend] = (fn, cannot, absent)
        return fn

    return register


def triton_kernels(file: str, *names: str) -> None:
    """Register the functions of these names in ../triton/<file>.py, each with its `cannot_<name>`. Triton is imported when
    the first of them is asked for: it need not be installed."""

    def function(name: str) -> Callable:
        return getattr(importlib.import_module(f"..triton.{file}", __package__), name)

    for name in names:
        kernel(
            name,
            "triton",
            cannot=lambda *args, name=name: _without_triton() or function(f"cannot_{name}")(*args),
            absent=_without_triton,
        )(lambda *args, name=name: function(name)(*args))


def _without_triton() -> str | None:
    if not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "no GPU: torch.cuda.is_available() is False"
        if requested() != "triton":
            return "no GPU, and Triton's slow interpreter serves only where it is forced"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


# csrc's operations, once `_without_library` has loaded them
native, native_cuda = torch.ops.deft_kernels_native, torch.ops.deft_kernels_cuda


def contiguous(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def cpp_kernel(name: str, also: Callable[..., str | None] = lambda *args: None, **roles: str):
    """Register a function that runs an operation on csrc's CPU kernels. `roles` says of the operation's arguments, in their
    order, what those kernels need of them: "weights" float32, bfloat16 or float16 with contiguous rows, "float32" that,
    or "" nothing; `also(*args)` is asked besides."""
    return kernel(
        name,
        "cpp",
        cannot=lambda *args: _without_library() or _cannot_cpp(dict(zip(roles, args)), roles) or also(*args),
        absent=_without_library,
    )


_CPP_TYPES = {"weights": (torch.float32, torch.bfloat16, torch.float16), "float32": (torch.float32,)}


def _cannot_cpp(arguments: dict, roles: dict[str, str]) -> str | None:
    for name, argument in arguments.items():
        if not roles[name]:
            continue
        types, is_list = _CPP_TYPES[roles[name]], isinstance(argument, (list, tuple))
        tensors = [t for t in (argument if is_list else (argument,)) if t is not None]
        kinds = {(t.dtype, t.is_cpu, t.layout) for t in tensors}  # of all at once, since there may be hundreds
        if all(dtype in types and cpu and layout is torch.strided for dtype, cpu, layout in kinds):
            if types is not _CPP_TYPES["weights"] or all(t.is_contiguous() for t in tensors):
                continue
        for i, t in enumerate(argument) if is_list else [("", argument)]:
            if t is None:
                continue
            if t.device.type != "cpu" or t.dtype not in types or t.layout != torch.strided:
                what = f"{name}[{i}]" if is_list else name
                expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
                return f"{what} is {t.dtype}, {t.layout} on {t.device}; the CPU kernels take {expected}, strided, on the CPU"
            if types is _CPP_TYPES["weights"] and t.dim() == 2 and t.shape[1] > 1 and t.stride(1) != 1:
                return f"{name}[{i}] has rows that are not contiguous (strides {t.stride()})"
    return None


def cuda_kernel(name: str, cannot: Callable[..., str | None]):
    """Register a function that runs an operation on csrc's CUDA kernels. They serve where they are forced: none has yet
    been measured to be faster than Triton's, which `auto` takes."""

    def absent() -> str | None:
        if not torch.cuda.is_available() or torch.version.hip:
            return "no GPU: torch.cuda.is_available() is False" if not torch.version.hip else "an AMD GPU"
        if requested() != "cuda":
            return "serves only where it is forced: not measured to be faster than triton"
        return _without_library("cuda")

    return kernel(name, "cuda", cannot=lambda *args: absent() or cannot(*args), absent=absent)


@functools.lru_cache
def _without_library(kind: str = "cpu") -> str | None:
    """Load csrc's library of a kind, or say why not. DEFT_KERNELS_LIBRARY names another build of the CPU's, say with a
    sanitizer."""
    found = os.environ.get("DEFT_KERNELS_LIBRARY") if kind == "cpu" else None
    found = found or next(map(str, Path(__file__).parents[1].glob(f"_{kind}*.so")), None)
    if found is None:
        return f"built without {kind} kernels: no compiler for them, or DEFT_KERNELS_BUILD said so"
    try:
        torch.ops.load_library(found)
    except OSError as error:
        warnings.warn(f"deft_kernels: {found} does not load, other backends serve: {error}", stacklevel=2)
        return f"{found} does not load: {error}"
    return None


def check_lists(operation: str, **lists: list) -> None:
    """The border of an operation over lists: one entry for each layer in every list."""
    (first, layers), *others = ((name, len(values)) for name, values in lists.items())
    for name, count in others:
        if count != layers:
            raise ValueError(f"{operation}: {layers} {first} but {count} {name}, expected one for each layer")


def check_layers(operation: str, W: list[torch.Tensor | None], **others: list[torch.Tensor | None]) -> None:
    """And of each layer: a matrix of a floating type, and everything on its device."""
    devices = {t.device for tensors in (W, *others.values()) for t in tensors if t is not None}
    if len(devices) <= 1 and all(w is None or (w.dim() == 2 and w.is_floating_point()) for w in W):
        return
    for i, w in enumerate(W):
        if w is None:
            continue
        if w.dim() != 2:
            raise ValueError(f"{operation}: W[{i}] has shape {tuple(w.shape)}, expected (m, n)")
        if not w.is_floating_point():
            raise ValueError(f"{operation}: W[{i}] is {w.dtype}, expected a floating type")
        for name, tensors in others.items():
            if (t := tensors[i]) is not None and t.device != w.device:
                raise ValueError(f"{operation}: W[{i}] is on {w.device}, {name}[{i}] on {t.device}")


def requested() -> str:
    """The value of DEFT_KERNELS_BACKEND, checked."""
    backend = os.environ.get("DEFT_KERNELS_BACKEND", "auto")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"DEFT_KERNELS_BACKEND={backend!r}: expected auto, {', '.join(BACKENDS)}")
    return backend


def _pick(name: str, args: tuple, device: str) -> Callable:
    forced = requested()
    for backend in (forced,) if forced != "auto" else ON_CPU if device == "cpu" else BACKENDS:
        reason = _why_not(name, backend, args)
        if reason is None:
            return _kernels[name][backend][0]
    raise RuntimeError(f"DEFT_KERNELS_BACKEND={forced} cannot serve deft_kernels::{name}: {reason}")


def _why_not(name: str, backend: str, args: tuple) -> str | None:
    if backend not in _kernels[name]:
        return f"this build has no {backend} kernel for it"
    cannot = _kernels[name][backend][1]
    return None if cannot is None else cannot(*args)


def _tensors(args: tuple):
    """The tensors among the arguments, lists looked into."""
    for arg in args:
        for item in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(item, torch.Tensor):
                yield item


def _device(args: tuple) -> str:
    """Device type of the first tensor among the arguments; cpu where there is none."""
    return next((t.device.type for t in _tensors(args)), "cpu")


def backends() -> dict[str, dict[str, str]]:
    """What serves each operation here, and why another backend does not.

    Returns:
        `{operation: {backend: what}}` under the current `DEFT_KERNELS_BACKEND`, where `what` is "serves" for the backend
        that is asked first, "serves what those before it cannot" for one that `auto` falls back to, for instance for
        tensors on another device or in float64, "available" for one that is not asked now but could be, or the reason why
        a backend is absent.
    """
    forced = requested()
    table: dict[str, dict[str, str]] = {}
    for name, kernels in _kernels.items():
        row = table[name] = {}
        for backend in BACKENDS:
            if backend not in kernels:
                row[backend] = f"this build has no {backend} kernel for it"
            elif (reason := kernels[backend][2] and kernels[backend][2]()) is not None:
                row[backend] = reason
            elif forced not in ("auto", backend):
                row[backend] = "available"
            else:
                row[backend] = "serves what those before it cannot" if "serves" in row.values() else "serves"
    return table
