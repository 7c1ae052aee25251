"""The benchmarks' commands run and refuse as they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, models, training
from benchmarks.cases import Draw
from benchmarks.peers import DEFT, FROZEN, LORA, PARA, PATCHED, PEFT_DEFT, PEFT_LORA
from benchmarks.suite import Bench, Options, Peer, rows_of
from deft_kernels.ops import _dispatch
from tests.deft_kernels.common import without_native

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(without_native() is not None, reason=f"csrc's CPU kernels: {without_native()}")


def run(*command: str):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs suites in size tiny: the exit status, all that was written, and the folder."""
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "auto")  # which suites set, and which is put back after

    def measure(*arguments: str):
        out = tmp_path / "figures.json"
        words = ["benchmarks", "--size", "tiny", "--device", "cpu", "--output", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        status = command.main()
        return status, json.loads(out.read_text()), tmp_path

    return measure


@pytest.mark.parametrize("suite", command.SUITES)
def test_a_suite_is_gated_measured_and_written(suite, measured, capsys):
    status, found, folder = measured("--suite", suite)
    assert status == 0
    assert {"device", "torch", "triton", "peft", "lycoris", "diffusers", "commit", "clean", "size", "date"} <= set(found)
    assert {row["suite"] for row in found["rows"]} == {suite}
    timed = [row for row in found["rows"] if "seconds" in row]
    assert timed and all(row["low"] <= row["seconds"] <= row["high"] and row["rounds"] > 1 for row in timed)
    assert all(row["note"] for row in found["rows"] if row not in timed)
    assert any("here" in row["who"] or "deft_kernels" in row["who"] for row in timed)
    tables = (folder / "figures.md").read_text()
    assert all(row["who"] in tables for row in found["rows"]) and "RED" not in tables
    plots = {file.suffix for file in folder.glob(f"figures-bars-{suite}.*")}
    assert plots == {".png", ".svg"} and all(file.stat().st_size > 1000 for file in folder.glob("figures-*"))
    assert "These are CPU figures" in capsys.readouterr().out


@needs_native
def test_what_is_wrong_is_red_and_never_timed(measured, monkeypatch, capsys):
    """By one part in a thousand, in the last one of the layers."""
    right, *rest = _dispatch._kernels["project"]["cpp"]

    def wrong(*inputs):
        *others, last = right(*inputs)
        return [*others, last * 1.001]

    monkeypatch.setitem(_dispatch._kernels["project"], "cpp", (wrong, *rest))
    status, found, folder = measured("--suite", "operations")
    assert status == 1
    red = [row for row in found["rows"] if row.get("red")]
    assert {(row["what"], row["who"]) for row in red} == {("project", "deft_kernels (cpp)")}
    assert all(row["note"].startswith("RED: output ") and "seconds" not in row for row in red)
    others = [row for row in found["rows"] if row["what"] == "project" and row not in red]
    assert others and all("seconds" in row for row in others)
    assert "RED" in (folder / "figures.md").read_text() and "RED" in capsys.readouterr().out


@needs_native
def test_a_wrong_gradient_of_ours_is_red_whoever_takes_part(measured, monkeypatch):
    right, *rest = _dispatch._kernels["orthonormalize_backward"]["cpp"]
    wrong = lambda *inputs: [dP * 1.5 for dP in right(*inputs)]
    monkeypatch.setitem(_dispatch._kernels["orthonormalize_backward"], "cpp", (wrong, *rest))
    status, found, _ = measured("--suite", "training", "--peers", "LyCORIS")
    assert status == 1
    assert {row["who"] for row in found["rows"] if row.get("red")} == {DEFT, PARA, PATCHED}


def test_peers_whose_gradients_are_wrong_are_red(measured, monkeypatch):
    """PEFT's DEFT with twice the gradient from one layer on."""
    right = training.adapt

    def wrong(model, who, r):
        right(model, who, r)
        if who == PEFT_DEFT:
            model.mid_block.attentions[0].proj_out.register_full_backward_pre_hook(lambda m, g: (g[0] * 2,))

    monkeypatch.setattr(training, "adapt", wrong)
    status, found, _ = measured("--suite", "training", "--peers", "DEFT")
    assert status == 1
    by = {row["who"]: row for row in found["rows"]}
    assert by[PEFT_DEFT]["note"].startswith("RED: ") and "seconds" not in by[PEFT_DEFT]
    assert all(by[who]["ratio"] > 0 for who in (DEFT, PEFT_LORA, PATCHED))


def test_half_precision_is_compared_with_float32(monkeypatch):
    """And with how far from it the reference is in half precision."""
    torch.manual_seed(0)
    setting = training.Setting(torch.device("cpu"), torch.bfloat16)
    base = training.base_model(setting)
    batch = training.make_batch(setting, base)
    made = lambda: {who: training.Trainee(who, base, setting) for who in (training.FROZEN, DEFT, PARA, LORA, PEFT_LORA)}
    assert training.gate(made(), batch) == {}
    trainees, right = made(), training.Trainee.gradients
    scaled = lambda it, batch: {k: g * (1.2 if it is trainees[PEFT_LORA] else 1) for k, g in right(it, batch).items()}
    monkeypatch.setattr(training.Trainee, "gradients", scaled)
    assert set(training.gate(trainees, batch)) == {PEFT_LORA}


def test_a_result_of_another_setting_is_not_lost(measured, monkeypatch):
    monkeypatch.setattr(command, "run", lambda suite, options: iter([[{"suite": suite, "note": "made up"}]]))
    monkeypatch.setattr(command.report, "markdown", lambda out: "")
    monkeypatch.setattr(command.report, "plot", lambda out: [])
    measured("--suite", "layer")
    _, found, _ = measured("--suite", "models")
    assert [row["suite"] for row in found["rows"]] == found["suites"] == ["layer", "models"]
    with pytest.raises(SystemExit, match="2"):
        measured("--suite", "layer", "--peers", "LoRA")


def test_what_stops_a_run_costs_no_figures(measured, monkeypatch):
    def broken(suite, options):
        yield [{"suite": suite, "note": "made up"}]
        raise MemoryError

    monkeypatch.setattr(command, "run", broken)
    with pytest.raises(MemoryError):
        measured("--suite", "layer")
    found = json.loads(Path(sys.argv[sys.argv.index("--output") + 1]).read_text())
    assert found["rows"] and found["suites"] == []


def test_what_a_step_takes_is_not_the_library(monkeypatch):
    class Peak(measure.peak):
        def __enter__(self):
            assert _dispatch._without_library.cache_info().currsize
            return super().__enter__()

    monkeypatch.setattr(measure, "peak", Peak)
    _dispatch._without_library.cache_clear()
    setting = training.Setting(torch.device("cpu"), torch.float32)
    assert training.memory(DEFT, setting, torch.get_num_threads()) >= 0


def test_a_lora_is_not_counted_what_deft_projects():
    options = Options(torch.device("cpu"), "tiny")
    bench = models.merging("merge", [(64, 96)], "one layer", Draw(options.device, torch.float32), options)
    flops = {row["who"]: row["flops"] for row in rows_of(bench, options)}
    assert flops[DEFT] == flops[PEFT_DEFT] == 4 * 64 * 96 * 16
    assert flops[LORA] == flops[PEFT_LORA] == 2 * 64 * 96 * 16


@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_is_kept_while_merged_is_counted(kind, size):
    options = Options(torch.device("cpu"), "tiny")
    for verb in ("merge", "hot-swap"):
        bench = models.merging(verb, [(64, 96)] * 2, "two layers", Draw(options.device, kind), options)
        kept = {row["who"]: row["kept"] for row in rows_of(bench, options) if "kept" in row}
        assert kept[DEFT] == kept[LORA] == 2 * 64 * 96 * size
        assert kept[PEFT_DEFT] == 2 * 16 * 96 * 4 and kept[PEFT_LORA] == 0  # PEFT's DEFT keeps a factor, to unmerge by


def test_a_ratio_is_of_the_rounds_that_are_kept_and_the_limit_of_the_best_product(monkeypatch):
    calls = {"copy": (10, lambda: None), "slow": (100, lambda: None), "fast": (100, lambda: None)}
    seconds = {FROZEN: [1.0, 2.0, 4.0], DEFT: [2.0, 6.0, 9.0], "copy": [1.0] * 3, "slow": [10.0] * 3, "fast": [5.0] * 3}
    monkeypatch.setattr("benchmarks.suite.machine", lambda *args: calls)
    monkeypatch.setattr(measure, "beside", lambda *args: {who: measure.Times(t, t, []) for who, t in seconds.items()})
    work = {who: Peer([lambda: None]) for who in (FROZEN, DEFT)}
    bench = Bench("layer", "forward", "somewhere", torch.float32, FROZEN, lambda: work, bytes=5, flops=60)
    _, row = rows_of(bench, Options(torch.device("cpu")))
    assert row["times"] == [2.0, 6.0, 9.0] and row["seconds"] == 6.0 and row["ratio"] == 2.25
    assert row["matrix_rate"] == 20.0 and row["limit_seconds"] == 3.0


def test_inputs_rotate_beyond_a_cpus_cache(tmp_path, monkeypatch):
    cpu, size = torch.device("cpu"), tmp_path / "size"
    monkeypatch.setattr(measure, "LAST_CACHE", size)
    assert measure.cache_of(cpu) == measure.CACHE
    size.write_text("1024K\n")
    assert [measure.copies(n, cpu) for n in (1 << 19, (1 << 22) + 1, 100)] == [5, 1, measure.MOST_COPIES]


def test_an_unknown_suite_is_refused():
    done = run("benchmarks", "--suite", "operations,layers")
    assert done.returncode == 2 and done.stderr.endswith(
        "error: no suite is called layers; there are operations, layer, models, sampling, training\n"
    )


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "--device cuda: torch.cuda.is_available() is False here" in capsys.readouterr().err


@pytest.mark.skipif(torch.version.hip is not None, reason="CUDA_VISIBLE_DEVICES hides no GPU from ROCm")
def test_tune_refuses_without_a_gpu():
    done = run("benchmarks.tune")
    assert done.returncode == 2 and done.stderr.startswith("tune: no GPU here") and done.stderr.count("\n") == 1
