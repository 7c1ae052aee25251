"""What every launcher shares on the host: what kernels can serve, tables of pointers, configurations, and the launch.

A table holds one row of integers (pointers, sizes, strides) for each layer. Its device copy is kept by the *value* of all
those integers, so a tensor that has moved makes another table, and a kept one says nothing but what is asked for.
"""

import functools
import json
import math
import re
from array import array
from contextlib import nullcontext
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
MAX_RANK = 128
CONFIGS = Path(__file__).parent / "configs"
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# What can be served --------------------------------------------------------------------------------------------------


def cannot_serve(layers: dict[str, list[Tensor | None]], ranks: list[int], float32: tuple[str, ...] = ()) -> str | None:
    """Why the tensors of these layers (role -> one for each layer) cannot be served, or None. The roles in `float32` must
    be that; the ranks are the layers'."""
    kinds = {(t.device, t.dtype, t.layout) for tensors in layers.values() for t in tensors if t is not None}
    if not kinds:
        return None
    device = next(t.device for tensors in layers.values() for t in tensors if t is not None)
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"tensors on the {device.type}, not on a GPU"
    for role, tensors in layers.items():
        types = (torch.float32,) if role in float32 else TYPES
        if any(d != device or dtype not in types or layout != torch.strided for d, dtype, layout in kinds):
            for i, t in enumerate(tensors):
                if t is None:
                    continue
                if t.device != device:
                    return f"layer {i}: tensors on {device} and {t.device}"
                if t.dtype not in types or t.layout != torch.strided:
                    return f"layer {i}: {role} is {t.dtype}, {t.layout}; the kernels take {names_of(types)}, strided"
    for i, rank in enumerate(ranks):
        if rank > MAX_RANK:
            return f"layer {i}: rank {rank} is more than the {MAX_RANK} that a kernel keeps on chip"
    return None


def names_of(types) -> str:
    return " or ".join(str(t).removeprefix("torch.") for t in types)


def address(tensor: Tensor | None, layer: int = 0) -> int:
    """Where a tensor's memory is; 0 for None.

    Raises RuntimeError where the memory has been given back (as sharding and offloading do) while the tensor lives on.
    """
    if tensor is None or tensor.numel() == 0:
        return 0
    found = tensor.data_ptr()
    if found == 0:
        raise RuntimeError(f"layer {layer}: the memory of a tensor {tuple(tensor.shape)} has been freed")
    return found


# How float32 is multiplied --------------------------------------------------------------------------------------------


def precision(exact: bool = False) -> str:
    """How tl.dot multiplies float32: single TF32 products where torch's own setting allows them, otherwise three, which
    keep float32's accuracy. AMD's matrix units take float32 as it is. `exact` ignores the setting."""
    if INTERPRETED or torch.version.hip:
        return "ieee"
    asked = torch.backends.cuda.matmul.fp32_precision
    asked = torch.backends.fp32_precision if asked == "none" else asked
    return "tf32" if asked == "tf32" and not exact else "tf32x3"


def pieces(dtype: torch.dtype) -> int:
    """In how many pieces of a half type float32 goes to the matrix units, by the same setting (see tile.py)."""
    if precision() != "tf32":
        return 3
    return 2 if dtype == torch.bfloat16 else 1


# Configurations -------------------------------------------------------------------------------------------------------


@functools.lru_cache
def tuned(device_name: str) -> dict:
    """The default's configurations and choices, overlaid with those that `benchmarks/tune.py` measured on a device."""
    found = json.loads((CONFIGS / "default.json").read_text())
    file = CONFIGS / f"{re.sub('[^A-Za-z0-9]+', '_', device_name)}.json"
    if file.is_file():
        measured = json.loads(file.read_text())
        for kernel, entries in measured["kernels"].items():
            found["kernels"][kernel] = found["kernels"][kernel] | entries
        found["choices"] |= measured["choices"]
    return found


@functools.lru_cache
def _tuned(device: torch.device) -> dict:
    return tuned(torch.cuda.get_device_name(device) if device.type == "cuda" else "default")


def _class(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


@functools.lru_cache(maxsize=1024)
def configuration(kernel: str, dtype: torch.dtype, rank: int, device: torch.device, vectors: bool = True) -> dict:
    """Block sizes, warps and stages of a kernel for operands of `dtype` and a padded rank; a kernel may have others where
    matrices cannot be read in vectors."""
    entries, key = _tuned(device)["kernels"][kernel], f"{_class(dtype)} {rank}"
    found = entries[key] if vectors else entries.get(f"{key} scattered", entries[key])
    if torch.version.hip:  # 64 KiB of shared memory, and no asynchronous copies to fill more than two stages
        return found | {"num_stages": min(found["num_stages"], 2)}
    return found


@functools.lru_cache(maxsize=4096)
def choice(what: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> str:
    """A form from the table, by the nearest shape (by ratios of its sizes): the fastest by measurement where
    `benchmarks/tune.py` has run on this device, an estimate by counts of bytes where only the default is there."""
    entries = _tuned(device)["choices"][what][_class(dtype)]
    sizes = [math.log(max(size, 1)) for size in shape]
    return min(entries, key=lambda entry: sum((a - math.log(b)) ** 2 for a, b in zip(sizes, entry["shape"])))["form"]


def cdiv(size: int, block: int) -> int:
    """Blocks that cover a size. (Triton's own is many times slower on the host, and is called for every layer.)"""
    return -(-size // block)


def padded(rank: int) -> int:
    """The rank as kernels hold it: a power of two, and no less than the matrix units' smallest side."""
    return max(16, triton.next_power_of_2(rank))


@functools.lru_cache
def chip(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and bytes of L2 cache; an H100's where the interpreter plays the device."""
    if device.type != "cuda":
        return 132, 50 << 20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


# Tables and launches --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _kept(values: bytes, device: torch.device, stream: int) -> Tensor:
    return _upload(values, device)[1]


def _upload(values: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    host = torch.frombuffer(bytearray(values), dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host, host.to(device, non_blocking=True)


_captured: list[tuple[Tensor, Tensor]] = []  # tables of CUDA graphs, which may be replayed as long as the process lives


def _on_device(values: bytes, device: torch.device) -> Tensor:
    """An int64 tensor with these values. What a stream being captured uploads is there only when the graph is replayed,
    so such a table serves this one graph, and host and device copy stay."""
    if device.type != "cuda":
        return _kept(values, device, 0)
    if not torch.cuda.is_current_stream_capturing():
        return _kept(values, device, torch.cuda.current_stream(device).cuda_stream)
    _captured.append(_upload(values, device))
    return _captured[-1][1]


@functools.lru_cache(maxsize=64)
def _jobs(tiles: tuple[int, ...]) -> bytes:
    jobs = array("q")
    for layer, count in enumerate(tiles):
        jobs.extend(range(layer << 32, (layer << 32) + count))
    return jobs.tobytes()


def launch_layers(kernel, rows: list[tuple[int, ...]], tiles: list[int], *arguments, device: torch.device, **meta) -> None:
    """One launch for many layers: layer i's row of the table, and as many programs as it has tiles."""
    if programs := sum(tiles):
        table = array("q", [field for row in rows for field in row])
        jobs = _on_device(_jobs(tuple(tiles)), device)
        launch(kernel, programs, _on_device(table.tobytes(), device), jobs, *arguments, device=device, **meta)


def launch(kernel, programs: int | tuple[int, ...], *arguments, device: torch.device, **meta) -> None:
    """A launch on the device of its tensors, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[programs if isinstance(programs, tuple) else (programs,)](*arguments, **meta)


def groups(kernel: str, wide: list[list[Tensor | None]], ranks: list[int], *narrow: list[Tensor | None]):
    """The layers that can share a launch: (indices, device, the kernel's compile-time arguments) for each group.

    `wide` are lists of matrices (m, n), the weights first; `narrow` lists of contiguous float32 factors. Layers share a
    launch where their weights are of one type and all their matrices can, or cannot, be read in 16-byte vectors. A layer
    without a weight joins any that cannot.
    """
    weights = wide[0]
    if not weights:
        return
    rank = padded(max(ranks))
    device = next(t.device for tensors in (*wide, *narrow) for t in tensors if t is not None)
    common = next((w.dtype for w in weights if w is not None), torch.float32)
    found: dict[tuple, list[int]] = {}
    for i, w in enumerate(weights):
        vectors = w is not None and ranks[i] % 4 == 0 and all(in_vectors(t[i]) for t in wide)
        vectors = vectors and all(address(t[i], i) % 16 == 0 for t in narrow)
        found.setdefault((common if w is None else w.dtype, vectors), []).append(i)
    for (dtype, vectors), members in found.items():
        meta = {"DTYPE": TYPES[dtype], "RANK": rank, "ALIGNED": vectors, "PIECES": pieces(dtype), "PRECISION": precision()}
        yield members, device, meta | configuration(kernel, dtype, rank, device, vectors)


def in_vectors(matrix: Tensor) -> bool:
    """Whether a matrix can be read in vectors along its second dimension: what `tile.pointer` and `tile.size` promise."""
    (rows, columns), start = matrix.stride(), matrix.data_ptr()
    return columns == 1 and rows % 16 == 0 and matrix.shape[1] % 16 == 0 and start % 16 == 0
