"""The benchmarks' commands run and refuse as they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*command: str):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DEFT_KERNELS_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_operations_are_gated_and_measured(tmp_path):
    done = run("benchmarks.operations", "--quick", "--device-json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert "These are CPU figures" in done.stdout and "RED" not in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"device", "torch", "triton", "commit"} <= set(figures)


@pytest.mark.skipif(torch.version.hip is not None, reason="CUDA_VISIBLE_DEVICES hides no GPU from ROCm")
def test_tune_refuses_without_a_gpu():
    done = run("benchmarks.tune")
    assert done.returncode == 2 and done.stderr.startswith("tune: no GPU here") and done.stderr.count("\n") == 1
