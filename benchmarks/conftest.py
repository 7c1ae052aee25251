"""What every benchmark says of itself: device, versions, commit; and a table of the peers' ratios at the end."""

import platform
import subprocess

import torch

TABLES: list[tuple[str, dict[str, tuple[float, float, float, float]]]] = []  # title, peer -> median, 20 %, 80 %, ratio


def context(device: str | None = None) -> dict[str, str]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "commit": git.stdout.strip() or "unknown"}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(context())


def pytest_terminal_summary(terminalreporter):
    if not TABLES:
        return
    write = terminalreporter.write_line
    write("")
    write(", ".join(f"{k} {v}" for k, v in context().items()))
    for title, rows in TABLES:
        write(title)
        for peer, (median, low, high, ratio) in rows.items():
            write(f"  {peer:<18} {median * 1e3:8.2f} ms  ({low * 1e3:.2f} to {high * 1e3:.2f})   {ratio:5.2f} x")
