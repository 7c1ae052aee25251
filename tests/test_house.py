"""The house itself: dependencies run downwards, torch alone is enough, and the wheel holds what it should."""

import ast
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LAYERS = ["reference", "config", "triton", "ops", "nn", "adapters"]  # each may import those before it
EXTRAS = {"triton": ["triton"], "adapters": ["safetensors", "huggingface_hub"]}  # and these packages
EXTRAS["nn/quantised.py"] = ["bitsandbytes", "torchao", "gguf", "diffusers"]  # where a layer is theirs
EXTRAS["adapters/lora.py"] = ["diffusers"]  # its converters of names
EXTRAS["adapters/peft.py"] = ["peft"]


def imports(file: Path):
    """(level, module) of every import in a file; `level` counts the dots."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", sorted((ROOT / "deft_kernels").rglob("*.py")), ids=lambda f: f.stem)
def test_dependencies_run_downwards(file):
    inside = file.relative_to(ROOT / "deft_kernels")
    here = inside.parts[0].removesuffix(".py")
    for level, module in imports(file):
        top = module.split(".")[0]
        if level == 0:
            allowed = {"torch", *sys.stdlib_module_names, *EXTRAS.get(here, ()), *EXTRAS.get(inside.as_posix(), ())}
            assert top in allowed, f"{inside} imports {module}"
        elif level == len(inside.parts) and here in LAYERS:  # from the package's own top
            assert LAYERS.index(top) < LAYERS.index(here), f"{inside} imports {module}, which is above it"


def test_torch_alone_is_enough():
    code = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("triton", "diffusers", "transformers", "accelerate", "safetensors", "peft", "PIL",
                                  "bitsandbytes", "torchao", "gguf"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch, deft_kernels as dk
layer = dk.DeftLinear(torch.nn.Linear(4, 3).requires_grad_(False), dk.DeftConfig(r=2))
layer(torch.randn(5, 4)).sum().backward()
dk.merge(layer), dk.unmerge(layer)
print(sorted(k for k, v in dk.backends()["merge"].items() if v == "serves"))
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    compiled = any((ROOT / "deft_kernels").glob("_cpu*.so"))
    assert run.stdout.strip() == str(["cpp" if compiled else "reference"]), run.stderr


def build_wheel(tmp_path: Path, folders: tuple[str, ...], **environment: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Build a wheel from what git tracks in some folders and at the top."""
    source, out = tmp_path / "src", tmp_path / "out"
    for name in tracked():
        if name.startswith(folders) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    return subprocess.run(
        command, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True, check=False
    ), out


def tracked() -> list[str]:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in files if (ROOT / name).is_file()]


PYTHON = ("deft_kernels", "python")


def test_wheel_without_a_compiler(tmp_path):
    run, out = build_wheel(tmp_path, (*PYTHON, "csrc"), CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr[-2000:]
    said = [line for line in run.stdout.split("\n") if "no cpu kernels are built" in line]
    assert said and "no-such-compiler is not installed; everything works without them" in said[0]
    (wheel,) = out.iterdir()
    assert wheel.name.startswith("deft_kernels-") and wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    for name in tracked():
        if name.endswith(".py") and name.startswith(("deft_kernels/", "python/")):
            assert name.removeprefix("python/") in names
    assert "deft_kernels/triton/configs/default.json" in names
    assert {f"deft_diffusers/evaluation/{name}" for name in ("published.json", "report.html")} <= set(names)
    weights = tuple(f"python/deft_diffusers/toyworld/{folder}/" for folder in ("model", "judge", "encoders"))
    weights = {n.removeprefix("python/") for n in tracked() if n.startswith(weights)}
    assert weights <= set(names), weights - set(names)
    assert not any(n.startswith(("tests", "benchmarks", "csrc")) for n in names)
    assert "Requires-Dist: torch>=2.11\n" in metadata and "Provides-Extra: diffusers" in metadata
    assert "deft = deft_diffusers.cli:main" in scripts


def test_what_a_build_is_asked_for_it_does_or_says_why_not(tmp_path):
    for asked, words in (("cpu", "DEFT_KERNELS_BUILD=cpu, but no-such-compiler is not installed"),
                         ("gpu", "DEFT_KERNELS_BUILD='gpu': expected none, cpu or cuda")):  # fmt: skip
        run, _ = build_wheel(tmp_path / asked, (*PYTHON, "csrc"), CXX="no-such-compiler", DEFT_KERNELS_BUILD=asked)
        assert run.returncode != 0 and words in run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_wheel_with_the_native_library(tmp_path):
    """One file for every Python and, by the stable ABI alone, every torch from 2.11 on."""
    start = time.perf_counter()
    run, out = build_wheel(tmp_path, (*PYTHON, "csrc"), DEFT_KERNELS_BUILD="cpu")
    assert run.returncode == 0, run.stderr[-2000:]
    assert time.perf_counter() - start < 180
    (wheel,) = out.iterdir()
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("deft_kernels/_cpu.abi3.so", tmp_path)
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in listed.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert not [s for s in symbols if s.startswith("Py") or "c10" in s or "2at" in s or "5torch" in s]


@pytest.mark.skipif(
    "DEFT_KERNELS_OTHER_PYTHON" not in os.environ, reason="DEFT_KERNELS_OTHER_PYTHON names no python with another torch"
)
def test_the_same_library_under_another_torch():
    """The file that was built against this torch, in a python that has another: numbers and an error's message."""
    code = """
import torch, deft_kernels as dk
assert dk.backends()["merge"]["cpp"] == "serves", dk.backends()["merge"]["cpp"]
P = [torch.randn(40, 3), torch.randn(1280, 16)]
for q, p in zip(torch.ops.deft_kernels.orthonormalize(P), P):
    torch.testing.assert_close(q, torch.linalg.qr(p).Q, rtol=1e-4, atol=1e-5)
W, R = torch.randn(40, 30), torch.randn(3, 30)
torch.testing.assert_close(torch.ops.deft_kernels.merge([W], P[:1], [None], [R])[0], W + P[0] @ R)
try:
    torch.ops.deft_kernels_native.merge([W], [W], P[:1], [None], [R[:2]])
except RuntimeError as error:
    assert "merge: R[0] has shape (2, 30), expected (3, 30)" in str(error)
print(torch.__version__)
"""
    command = [os.environ["DEFT_KERNELS_OTHER_PYTHON"], "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().split("+")[0] != torch.__version__.split("+")[0]
