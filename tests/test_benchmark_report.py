"""What is told of benchmarks: tables, targets, plots, comparisons, README. All from rows; these are made up."""

import json

import pytest

from benchmarks import report
from benchmarks.peers import DEFT, FROZEN, PEFT_DEFT, PEFT_LORA
from benchmarks.suite import SUITES

WHERE = "640x640, T 4096, r 16"


def row(who, seconds, what="forward + backward", where=WHERE, **more):
    shared = {"suite": "layer", "what": what, "where": where, "type": "float32", "floor": FROZEN, "at": {"rank": 16}}
    return shared | {"who": who, "seconds": seconds, "low": 0.98 * seconds, "high": 1.02 * seconds, "ratio": seconds} | more


def result(*rows, **more):
    found = {"device": "a CPU, 2 threads", "driver": "none", "torch": "2", "commit": "abc1234", "clean": True}
    found |= {"size": "small", "peers": [], "suites": list(SUITES), "date": "2026-01-02T03:04:05+00:00"}
    return found | {"rows": list(rows)} | more


def write(folder, found, device="a_CPU_2_threads"):
    file = folder / device / f"{found['commit']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return file


ROWS = [row(FROZEN, 1.0), row(DEFT, 1.2), row(PEFT_LORA, 1.1), row(PEFT_DEFT, 1.5)]


def test_a_table_says_why_there_is_no_figure():
    times = ("seconds", "low", "high", "ratio")
    red = {k: v for k, v in ROWS[3].items() if k not in times} | {"note": "RED: off", "red": True}
    text = report.table([ROWS[0], ROWS[1] | {"limit_seconds": 0.4, "saved": 123_000}, red])
    lines = text.splitlines()
    assert lines[0] == "**forward + backward**, 640x640, T 4096, r 16, float32"
    times = report.TIMES
    assert lines[2] == f"|  | time | 20 % to 80 % | {times} {FROZEN} | {times} limit | saved for the backward |"
    assert lines[5] == f"| {DEFT} | 1.2 s | 1.18 s to 1.22 s | 1.20 | 3.00 | 123 kB |"
    assert lines[6] == f"| {PEFT_DEFT} | RED: off |  |  |  |  |"


@pytest.mark.parametrize(("value", "said"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 µs")])
def test_seconds_are_said_in_their_unit(value, said):
    assert report.seconds(value) == said


def test_targets_are_met_missed_or_not_measured():
    lines = report.checked([result(*ROWS)]).splitlines()
    told = [line for line in lines if line.startswith("| forward") and WHERE in line]
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in told]
    mine, times = {what: rest for what, *rest in cells}, report.TIMES
    about = f"forward + backward, {WHERE}, float32: {DEFT} against"
    assert mine[f"{about} {FROZEN}"] == [f"≤ 1.25 {times}", f"1.20 {times}", "met"]
    assert mine[f"{about} {PEFT_DEFT}"] == [f"≤ 1.00 {times}", f"0.80 {times}", "met"]
    assert mine[f"{about} {PEFT_LORA}"] == [f"≤ 1.00 {times}", f"1.09 {times}", "**missed**"]
    assert f"- Missed, {about} {PEFT_LORA}: not known; next: a profile." in lines
    assert any(line.endswith("| not measured |") for line in lines)
    assert report.checked([result(*ROWS, driver="580")]).count("not measured") > 0
    assert WHERE not in report.checked([result(*ROWS, driver="580")])  # which asks a CPU


def test_a_target_is_the_median_of_each_rounds_ratio_and_says_how_much_faster():
    merge = next(t for t in report.TARGETS if t.bench[1] == "merge" and t.over == PEFT_DEFT and t.device == "cpu")
    shared = dict(zip(("suite", "what", "where", "type"), merge.bench))
    rows = [row(DEFT, 1.0, times=[1.0, 1.0, 4.0]) | shared, row(PEFT_DEFT, 6.0, times=[6.0, 7.0, 8.0]) | shared]
    assert merge.value(rows) == 1 / 6 <= merge.most
    assert merge.said(1 / 6) == f"6 {report.TIMES} faster"
    why = merge.why
    assert why == report.MISSED["cpu", "merge", PEFT_DEFT]
    assert why in report.checked([result(*[r | {"times": [1.0]} for r in rows])])


def test_a_summary_says_where_ours_is_faster_and_slower():
    more = [row(DEFT, 1.0, where="T 77"), row(PEFT_DEFT, 0.5, where="T 77"), row(PEFT_LORA, 1.01, where="T 77")]
    text = report.summary([ROWS, more])
    what, times = "a layer's forward + backward", report.TIMES
    assert f"**{PEFT_DEFT}**: faster in {what} (1.25 {times}); slower in {what} at T 77 (2.00 {times}).\n" in text
    assert f"**{PEFT_LORA}**: as fast in {what}; slower in {what} at {WHERE} (1.09 {times}).\n" in text


def test_what_only_size_full_has_is_listed(monkeypatch):
    monkeypatch.delenv("DEFT_KERNELS_BACKEND", raising=False)
    for driver in ("none", "580"):
        text = "; ".join(report.unmeasured(result(*ROWS, driver=driver)))
        assert all(name in text for name in ("SD 1.5", "FLUX.1", "FLUX.2 klein", "OmniGen", "SDXL's UNet"))


def test_a_comparison_flags_what_is_beyond_noise(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    write(tmp_path, result(*ROWS))
    slower = [row(DEFT, 1.5), row(PEFT_LORA, 1.11), row(PEFT_DEFT, 1.2), row("DEFT here", 1.0, where="new")]
    write(tmp_path, result(*slower, commit="def5678"))
    assert report.compare(["abc1234", "def5678"], "cpu") == 1
    lines = {line.split("|")[2].strip(): line for line in capsys.readouterr().out.splitlines() if WHERE in line}
    assert "| 1.25 | slower |" in lines[DEFT]
    assert "| 1.01 |  |" in lines[PEFT_LORA]
    assert "| 0.80 | faster |" in lines[PEFT_DEFT]
    assert report.compare(["def5678", "abc1234"], "cpu") == 0  # ours got faster
    write(tmp_path, result(*slower, commit="0ddba11", device="another CPU"), "another_CPU")
    assert report.compare(["abc1234", "0ddba11"], "cpu") == 0  # of another device nothing is beyond noise
    assert "slower" not in capsys.readouterr().out.split("after:")[-1]
    write(tmp_path, result(*slower, commit="0ddba11", processor="a newer one of the same name"))
    assert report.compare(["abc1234", str(tmp_path / "a_CPU_2_threads" / "0ddba11.json")], "cpu") == 0


def test_a_comparison_is_not_of_the_machines_other_work_and_tells_what_has_no_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    write(tmp_path, result(*ROWS))
    loaded = [row(who, 1.7 * r, ratio=r) for who, r in ((FROZEN, 1.0), (DEFT, 1.2), (PEFT_LORA, 1.1))]
    write(tmp_path, result(*loaded, commit="def5678"))
    assert report.compare(["abc1234", "def5678"], "cpu") == 0
    assert not any(word in capsys.readouterr().out for word in ("slower |", "faster |"))
    red = {k: v for k, v in ROWS[1].items() if k not in ("seconds", "low", "high", "ratio")}
    write(tmp_path, result(red | {"note": "RED: off", "red": True}, commit="0ddba11"))
    assert report.compare(["abc1234", "0ddba11"], "cpu") == 1
    assert f"| {DEFT} | 1.2 s |  |  | RED: off |" in capsys.readouterr().out


def test_one_result_is_compared_with_the_newest_there_is(tmp_path, capsys, monkeypatch):
    """A changed tree's too, and never itself."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    here = report.measure.environment("cpu")["device"]
    write(tmp_path, result(*ROWS, device=here))
    with pytest.raises(SystemExit, match="abc1234 is this device's newest"):
        report.compare(["abc1234"], "cpu")
    changed = result(row(DEFT, 2.4), device=here, commit="abc1234-dirty", clean=False, date="2027")
    write(tmp_path, changed)
    assert report.compare(["abc1234"], "cpu") == 1
    assert "| 2.00 | slower |" in capsys.readouterr().out
    assert report.find("abc1234-dirty") == changed


def test_an_unknown_result_is_refused_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    write(tmp_path, result(*ROWS))
    with pytest.raises(SystemExit, match="0 results are of 'nothing'.*a_CPU_2_threads/abc1234"):
        report.compare(["nothing"], "cpu")


def test_readme_takes_the_newest_clean_result_of_each_device(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold figures\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", readme)
    write(tmp_path, result(*ROWS))
    write(tmp_path, result(row(DEFT, 9.0), commit="older", date="2025"))
    write(tmp_path, result(row(DEFT, 8.0), commit="dirty", date="2027", clean=False))
    write(tmp_path, result(row(DEFT, 7.0), commit="tiny", date="2027", size="tiny"))
    write(tmp_path, result(row(DEFT, 6.0), commit="part", date="2027", suites=["layer"]))
    write(tmp_path, result(row(DEFT, 55.0), commit="some", date="2027", peers=["LoRA"]))
    for name in ("abc1234-curves", "abc1234-dirty-curves"):
        (tmp_path / "a_CPU_2_threads" / f"{name}.png").touch()
    assert report.write_readme() == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old figures" not in text
    assert "### a CPU, 2 threads" in text and "commit abc1234" in text and f"| **{DEFT}** | 1.2 s | 1.20 |" in text
    assert not any(wrong in text for wrong in ("9 s", "8 s", "7 s", "6 s", "55 s", "-dirty"))
    assert "**Not measured on any GPU**" in text


def test_readme_says_what_the_results_say():
    _, _, rest = report.README.read_text().partition(report.BEGIN)
    assert rest.partition(report.END)[0].strip() == report.section(report.newest()).strip(), "python -m benchmarks --readme"


def test_plots_are_bars_a_roofline_and_curves(tmp_path):
    rates = {"bytes": 10, "flops": 100, "copy_rate": 20.0, "matrix_rate": 50.0}
    rows = [row(who, r / 8, where=f"r {r}", at={"rank": r}) | rates for who in (FROZEN, DEFT) for r in (4, 8, 16)]
    files = report.plot(write(tmp_path, result(*rows)))
    assert {file.name for file in files} == {
        f"abc1234-{name}.{kind}" for name in ("bars-layer", "roofline", "curves") for kind in ("png", "svg")
    }
    benches = report.by_bench(rows)
    (((*_, grows), peers),) = report.curves_of(benches).items()
    assert grows == "rank" and peers[DEFT] == [(4, 0.5), (8, 1.0), (16, 2.0)]
    svg = files[-1].read_text()  # in which matplotlib says each text in a comment
    assert all(f"<!-- {r} -->" in svg for r in (4, 8, 16))
    assert "commit abc1234" in svg
