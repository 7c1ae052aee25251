"""How the benchmarks take time, how much input they rotate through, and what they say of the machine."""

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

DISTRIBUTIONS = {"lycoris": "lycoris-lora"}  # of packages that have another name
MOST_COPIES = 32  # of the inputs of one small call, which would otherwise be many thousands
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CACHE = 1 << 25  # bytes, where a CPU does not tell


def environment(device: str | None = None, also: tuple[str, ...] = ()) -> dict[str, str]:
    """Device, driver, versions (those in `also` too), time, and commit, which ends in -dirty where the tree has changes."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]  # no tags
    git = subprocess.run(describe, capture_output=True, text=True, check=False)
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    found = {"device": name, "torch": torch.__version__, "commit": git.stdout.strip() or "unknown", "driver": "none"}
    if not on_gpu:
        found["processor"] = _processor()
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for package in ("triton", *also):
        installed = importlib.util.find_spec(package)
        found[package] = importlib.metadata.version(DISTRIBUTIONS.get(package, package)) if installed else "not installed"
    if torch.cuda.is_available() and device != "cpu":
        found["driver"] = f"HIP {torch.version.hip}" if torch.version.hip else "unknown: no nvidia-smi"
        if not torch.version.hip and shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _processor() -> str:
    """What tells apart processors that a virtual machine calls by one name."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        about = {name.strip(): value.strip() for name, _, value in lines}
        numbers = f"family {about['cpu family']} model {about['model']}, "
    except (OSError, KeyError):
        numbers = ""
    return numbers + torch.backends.cpu.get_cpu_capability()


def result_file(found: dict) -> Path:
    """Where results belong: beside those that are committed, where nothing is left out of them."""
    root = Path(__file__).parent
    folder = root.parent / "outputs" / "benchmarks" if found["peers"] or found["size"] == "tiny" else root / "results"
    return folder / file_name(found["device"]) / f"{found['commit']}.json"


def file_name(text: str) -> str:
    """A device's name as part of a path."""
    return re.sub("[^A-Za-z0-9]+", "_", text)


def lacking(needed: int, device: torch.device) -> str | None:
    """Why `needed` bytes cannot be had on a device now, or None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return None if needed < free else f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"


class peak:
    """Within `with peak(device) as it`: the most memory in use, less what was in use before, is then `it.bytes`. On a CPU of
    the whole process, by Linux's count of resident pages; on a GPU of torch's tensors."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *error):
        most = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._resident("VmHWM")
        self.bytes = most - self.before

    @staticmethod
    def _resident(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def cache_of(device: torch.device) -> int:
    """Bytes of the last cache before memory: a GPU's L2, a CPU's L3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return int(LAST_CACHE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return CACHE


def copies(size: int, device: torch.device) -> int:
    """How many inputs of `size` bytes to rotate through, so that none is still in the last cache when its turn comes; of
    those so small that MOST_COPIES do not fill it twice, MOST_COPIES, which is more than the nearer caches hold."""
    cache = cache_of(device)
    return 1 if size > 4 * cache else min(MOST_COPIES, 1 + -(-2 * cache // size))


class Times(NamedTuple):
    """Seconds of one call, round by round: on the device, whose queue is full before the first begins; by the clock on the
    wall, the host included; and of a CUDA graph of the round, with the host left out. On a CPU the first two are one, and
    there is no third."""

    device: list[float]
    wall: list[float]
    graph: list[float]


def beside(
    peers: dict[str, list[Callable]], device: torch.device, budget: float = 0.3, rounds: int | None = None, around=None
):
    """{peer: Times} of some who do the same work, each given as calls of it on several inputs. Every round times each once,
    in an order of its own, so that whatever else the machine does, and what the one before left in the caches, falls on all
    alike. Some `budget` seconds are spent on each, and 5 rounds at least, 100 at most; or as many rounds as asked for.
    `around[peer]` makes a context manager for each of its turns, untimed; as it changes what the host knows, no graph of
    its calls is captured."""
    on_gpu, host, expected, graphs, around = device.type == "cuda", {}, 0.0, {}, around or {}

    def turn(name: str, take: Callable):
        with around.get(name, contextlib.nullcontext)():
            return take(peers[name], device)

    for name, calls in peers.items():
        turn(name, _round)
        host[name], wall = turn(name, _round)
        expected += wall
        if on_gpu and name not in around and (graph := _captured(calls)):
            graphs[name] = graph
    rounds = rounds or min(100, max(5, int(budget * len(peers) / expected)))
    times, order = {name: Times([], [], []) for name in peers}, list(peers)
    for i in range(rounds):
        for name in random.Random(i).sample(order, len(order)):
            calls = peers[name]
            times[name].wall.append(turn(name, _round)[1] / len(calls))
            if on_gpu:
                queued = functools.partial(_queued, host=host[name])
                times[name].device.append(turn(name, queued) / len(calls))
            if name in graphs:
                times[name].graph.append(queued([graphs[name].replay], device) / len(calls))
    return times if on_gpu else {name: t._replace(device=t.wall) for name, t in times.items()}


def ratio(times: list[float], others: list[float]) -> float:
    """The median over rounds of what one takes, over what another does."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def device_seconds(calls: list[Callable], device: torch.device, budget: float = 0.3) -> float:
    """Median seconds of one of `calls` on the device."""
    return statistics.median(beside({"": calls}, device, budget)[""].device)


def _queued(calls: list[Callable], device: torch.device, host: float) -> float:
    """Seconds of all calls on a GPU, which sleeps while the host, in `host` seconds, launches them. (A queue holds about a
    thousand launches; what launches more, or waits for the device in between, is timed with the host.)"""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(1.5 * host * _cycles(device)))
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _captured(calls: list[Callable]):
    """A CUDA graph of all calls, or None where one of them cannot be captured, as what waits for the device cannot. They are
    called on the stream of the capture first: what a library keeps for each stream is then there."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except RuntimeError:  # which leaves torch's generator in the capture
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        return None
    return graph


@functools.lru_cache
def _cycles(device: torch.device) -> float:
    """Cycles of `torch.cuda._sleep` in a second."""
    cycles = 50_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return cycles / (begin.elapsed_time(end) / 1e3)


def _round(calls: list[Callable], device: torch.device) -> tuple[float, float]:
    """Seconds until the host, and until the device, is done with all calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for call in calls:
        call()
    host = time.perf_counter() - start
    wait()
    return host, time.perf_counter() - start
