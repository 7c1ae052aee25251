"""What every suite of benchmarks is made of: something that several can do, checked, and timed side by side.

A suite is a module of this package with `benches(options)`, which yields `Bench`es; `rows_of` measures one. A row is a dict
that goes into the results as it is: what was done by whom, and either figures or a note that says why there are none.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks import measure
from deft_kernels.ops import _dispatch

SUITES = ("operations", "layer", "models", "sampling", "training")
SIZES = ("tiny", "small", "full")  # seconds, to try the code; minutes on any machine; everything
TINY_ROUNDS = 3
COPY_BYTES = 1 << 26  # at least, and twice the last cache
PRODUCTS = {"cpu": [(1024, 1024, 1024), (4096, 640, 640)], "cuda": [(8192, 8192, 8192), (4096, 8192, 4096)]}  # m, k, n
MERGED, MERGED_RANK = 768, 128  # the layer, which the caches hold, that csrc merges for its rate


@dataclass(frozen=True)
class Options:
    """What is asked of every suite."""

    device: torch.device
    size: str = "small"  # of SIZES
    peers: tuple[str, ...] = ()  # parts of names; empty: all

    def wants(self, who: str) -> bool:
        """Whether a peer takes part. The floor and what is measured here always do, whatever this says."""
        return not self.peers or any(part.lower() in who.lower() for part in self.peers)


@dataclass
class Peer:
    """One who takes part."""

    calls: list[Callable] = field(default_factory=list)  # the same work on several inputs, in turn; none: not timed
    note: str = ""  # why not
    red: bool = False  # because its results are wrong
    around: Callable | None = None  # makes what is entered before each of its turns and left after it, untimed
    # what else was measured of it: bytes saved for the backward, memory; and its bytes or flops, where its work is another's
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """One piece of work. Each input is read once, each output written once, a multiply-add is two flops; what is recomputed
    or read again counts against who does so."""

    suite: str
    what: str  # "merge", "a training step"
    where: str  # "SDXL, 560 layers", "640x640, T 4096"
    dtype: torch.dtype
    floor: str  # the peer whose time counts as 1
    peers: Callable[[], dict[str, Peer]]  # makes them all on the same inputs, and checks them
    bytes: int = 0  # 0: not counted
    flops: int = 0
    at: dict = field(default_factory=dict)  # numbers along which costs are plotted: rank, tokens, layers
    budget: float = 0.3  # seconds for each peer
    clock: str = "device"  # of Times; "wall" where a user waits for the host too
    rounds: int | None = None  # or so many rounds


def rows_of(bench: Bench, options: Options) -> Iterator[dict]:
    """A row for each peer. What the machine can do (a copy, a product of large matrices) is timed in the same rounds."""
    shared = {"suite": bench.suite, "what": bench.what, "where": bench.where, "type": name_of(bench.dtype)}
    shared |= {"floor": bench.floor, "at": bench.at}
    if bench.bytes:
        shared |= {"bytes": bench.bytes, "flops": bench.flops}
    peers = bench.peers()
    running = {who: peer.calls for who, peer in peers.items() if peer.calls}
    limits = machine(options.device, bench.dtype) if bench.bytes and running else {}
    amounts = {who: amount for who, (amount, _) in limits.items()}
    calls = running | {who: [call] for who, (_, call) in limits.items()}
    around = {who: peers[who].around for who in running if peers[who].around}
    rounds = TINY_ROUNDS if options.size == "tiny" else bench.rounds
    times = measure.beside(calls, options.device, bench.budget, rounds, around) if running else {}
    rates = {who: amount / statistics.median(times[who].device) for who, amount in amounts.items()}
    copy, matrix = rates.pop("copy", None), max(rates.values(), default=None)
    taken = {who: getattr(times[who], bench.clock) for who in running}
    for who, peer in peers.items():
        row = shared | {"who": who} | peer.more
        if not peer.calls:
            yield row | {"note": peer.note} | ({"red": True} if peer.red else {})
            continue
        mine = taken[who]
        low, *_, high = statistics.quantiles(mine, n=5, method="inclusive")
        row |= {"seconds": statistics.median(mine), "low": low, "high": high, "rounds": len(mine)}
        row["times"] = [float(f"{t:.4g}") for t in mine]  # round by round, so that any two can be divided
        for clock, other in times[who]._asdict().items():
            if other and other is not mine:
                row[f"{clock}_seconds"] = statistics.median(other)
        if bench.floor in taken:
            row["ratio"] = measure.ratio(mine, taken[bench.floor])
        if limits:
            row |= {"copy_rate": copy, "matrix_rate": matrix}
            row["limit_seconds"] = max(row["bytes"] / copy, row["flops"] / matrix)
        yield row


@functools.lru_cache
def machine(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[int, Callable]]:
    """{"copy": (bytes read and written, call), one product: (flops, call), another ...}: what a machine can do. The best of
    the products counts, one of which on a CPU is csrc's own merge: a library may use half of a processor's vectors. Types
    there are float32, whatever is asked for: halves are multiplied no faster."""
    size = max(COPY_BYTES, 2 * measure.cache_of(device))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    found = {"copy": (2 * size, functools.partial(torch.empty_like(source).copy_, source))}
    draw = functools.partial(torch.randn, device=device, dtype=dtype if device.type == "cuda" else torch.float32)
    for m, k, n in PRODUCTS[device.type]:
        found[f"{m}x{k}x{n}"] = 2 * m * k * n, functools.partial(torch.mm, draw(m, k), draw(k, n), out=draw(m, n))
    if device.type == "cpu" and _dispatch._without_library() is None:
        W, out, B, A = draw(MERGED, MERGED), draw(MERGED, MERGED), draw(MERGED, MERGED_RANK), draw(MERGED_RANK, MERGED)
        merge = functools.partial(_dispatch.native.merge, [out], [W], [B], [B], [A])
        found["csrc's merge"] = 4 * MERGED**2 * MERGED_RANK, merge
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
