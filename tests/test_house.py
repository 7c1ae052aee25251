"""The house itself: dependencies run downwards, torch alone is enough, and the wheel holds what it should."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["reference", "config", "triton", "ops", "nn", "adapters"]  # each may import those before it
EXTRAS = {"triton": ["triton"], "adapters": ["safetensors"]}  # and these packages


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
            allowed = {"torch", *sys.stdlib_module_names, *EXTRAS.get(here, ())}
            assert top in allowed, f"{inside} imports {module}"
        elif level == len(inside.parts) and here in LAYERS:  # from the package's own top
            assert LAYERS.index(top) < LAYERS.index(here), f"{inside} imports {module}, which is above it"


def test_torch_alone_is_enough():
    code = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("triton", "diffusers", "transformers", "accelerate", "safetensors", "peft", "PIL"):
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
    assert run.stdout.strip() == "['reference']", run.stderr


def test_wheel(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "out"),
        str(tmp_path / "src"),
    ]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if name.startswith(("deft_kernels", "python")) or "/" not in name:
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                (tmp_path / "src" / name).write_bytes((ROOT / name).read_bytes())
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.startswith("deft_kernels-") and wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    for name in files:
        if name.endswith(".py") and name.startswith(("deft_kernels/", "python/")):
            assert name.removeprefix("python/") in names
    assert "deft_kernels/triton/configs/default.json" in names
    model = {n.removeprefix("python/") for n in files if n.startswith("python/deft_diffusers/toyworld/model/")}
    assert model <= set(names), model - set(names)
    assert not any(n.startswith(("tests", "benchmarks")) for n in names)
    assert "Requires-Dist: torch>=2.11\n" in metadata and "Provides-Extra: diffusers" in metadata
    assert "deft = deft_diffusers.cli:main" in scripts
