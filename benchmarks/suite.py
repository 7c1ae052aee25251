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

SUITES = ("operations", "layer", "models", "sampling", "training")
SIZES = ("tiny", "small", "full")  # seconds, to try the code; minutes on any machine; everything
TINY_ROUNDS = 3
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}


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
    for who, peer in peers.items():
        row = shared | {"who": who} | peer.more
        if not peer.calls:
            yield row | {"note": peer.note} | ({"red": True} if peer.red else {})
            continue
        mine = times[who]
        low, *_, high = statistics.quantiles(mine.device, n=5, method="inclusive")
        row |= {"seconds": statistics.median(mine.device), "low": low, "high": high, "rounds": len(mine.device)}
        if mine.graph:
            row["graph_seconds"] = statistics.median(mine.graph)
        if mine.wall is not mine.device:
            row["wall_seconds"] = statistics.median(mine.wall)
        if bench.floor in times:  # round by round
            row["ratio"] = statistics.median(a / b for a, b in zip(mine.device, times[bench.floor].device))
        if rates:
            row |= {"copy_rate": rates["copy"], "matrix_rate": rates["matrix"]}
            row["limit_seconds"] = max(row["bytes"] / rates["copy"], row["flops"] / rates["matrix"])
        yield row


@functools.lru_cache
def machine(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[int, Callable]]:
    """{"copy": (bytes read and written, call), "matrix": (flops, call)}: what a machine can do at best. On a CPU the matrix
    rate is that of float32, whatever the type: libraries multiply halves no faster there."""
    size, side = COPY_BYTES[device.type], MATRIX_SIDE[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    kind = dtype if device.type == "cuda" else torch.float32
    left = torch.randn(side, side, device=device).to(kind)
    out = torch.empty_like(left)
    return {
        "copy": (2 * size, functools.partial(torch.empty_like(source).copy_, source)),
        "matrix": (2 * side**3, functools.partial(torch.mm, left, left, out=out)),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
