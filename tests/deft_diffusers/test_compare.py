"""`deft compare`: the shipped plans from end to end on stand-in folders, resumed, shared, and with what fails named."""

import contextlib
import csv
import dataclasses
import fcntl
import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from deft_diffusers import UserError, sweep
from deft_diffusers.evaluation import compare as module
from deft_diffusers.evaluation.compare import compare
from deft_diffusers.options import CompareOptions
from deft_diffusers.toyworld.subjects import write_plus as write_world_plus
from deft_diffusers.toyworld.subjects import write_subjects
from tiny_encoders import write_tiny_encoders
from tiny_pipeline import write_picture
from tiny_pipelines import build

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
TABLES = ("table1", "table2", "scores")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = write_tiny_encoders(tmp_path_factory.mktemp("encoders") / "tiny")
    return {name: str(folder / name) for name in ("clip", "dinov1", "dinov2")}


def write_dreambooth(folder, **classes):
    """Two pictures of each subject."""
    for n, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            write_picture(folder / name / f"{k:02d}.png", 10 * n + k)
    lines = "\n".join(f"{name},{kind}" for name, kind in classes.items())
    (folder / "prompts_and_classes.txt").write_text(f"Classes\nsubject_name,class\n{lines}\n")


def write_plus(folder, *kinds):
    for n, kind in enumerate(kinds):
        for part in ("images", "captions"):
            (folder / part / "live_subject" / "animal").mkdir(parents=True, exist_ok=True)
        write_picture(folder / "images" / "live_subject" / "animal" / f"{n:02d}.png", 40 + n)
        lines = [kind, *(f"a {kind} {k}" for k in range(8)), "nobody"]
        (folder / "captions" / "live_subject" / "animal" / f"{n:02d}.txt").write_text("\n".join(lines) + "\n")


def write_data(folder):
    """Stand-ins for what the plans of the big models read."""
    write_dreambooth(folder / "dreambooth", bear_plushie="stuffed animal", cat="cat", dog8="dog")
    write_plus(folder / "dreambench_plus", "kitten", "stork", "kitten", "horse")
    write_dreambooth(folder / "scenes", church_rock="church rock", table="table")


@pytest.fixture
def plan(tmp_path, encoders):
    """Writes a plan, short for all that it asks, and makes the options that run it."""

    def make(given, model, output="out", **flags):
        short = {
            "pretrained_model_name_or_path": str(model),
            "train": {"max_train_steps": 1, "resolution": 32, "checkpoints_total_limit": 1},
            "sample": {"num_inference_steps": 1, "height": 32, "width": 32},
            "evaluate": encoders,
        }
        file = tmp_path / "plans" / "quality" / "plan.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        first = {"evaluate": given.get("evaluate", {})}
        own = {k: given.get(k, {}) | v | first.get(k, {}) if isinstance(v, dict) else v for k, v in short.items()}
        file.write_text(json.dumps(given | own))  # JSON is YAML
        return CompareOptions(plan=str(file), output_dir=str(tmp_path / output), **flags)

    return make


@pytest.fixture
def small(tmp_path, tiny, plan):
    """A comparison of two rows on one subject, two seeds."""

    def make(output="out", **changes):
        if not (tmp_path / "dataset").exists():
            write_dreambooth(tmp_path / "dataset", dog8="dog", cat="cat")
        given = {
            "subjects": "../../dataset", "only": {"dog8": "DOG8"}, "ranks": [2], "seeds": [0, 1],
            "methods": {"lora": None, "PaRa + uncond": {"method": "para", "caption_dropout": 1}},
            "prompts": ["a photo of {}", "a {} on a hill"], "unrelated": ["a red car"],
        }  # fmt: skip
        flags = changes.pop("flags", {})
        return plan(given | changes, tiny, output, **flags)

    return make


def results_of(options):
    return json.loads((Path(options.output_dir) / "results.json").read_text())


def texts_of(options):
    """The tables, without those of the costs."""
    return {p.name: p.read_text() for name in TABLES for p in Path(options.output_dir).glob(f"{name}.*")}


@pytest.mark.parametrize("name, jobs", [("toyworld", 117), ("toyworld-quick", 25), ("sdxl", 112), ("omnigen", 9)])
def test_shipped_plans_draw_all_that_their_figures_show(name, jobs, tmp_path):
    write_data(tmp_path / "data")
    write_subjects(tmp_path / "outputs" / "subjects")
    write_world_plus(tmp_path / "outputs" / "plus")
    (tmp_path / "benchmarks" / "quality").mkdir(parents=True)
    file = shutil.copy(QUALITY / f"{name}.yaml", tmp_path / "benchmarks" / "quality")
    plan = sweep.read_plan(CompareOptions(plan=str(file), output_dir="out"))
    assert len(plan.jobs) == jobs
    drawn = {(job.subject.name, module.title(job)): plan.prompts(job) for job in plan.jobs}
    for spec in (*plan.given["figures"].values(), plan.given["strengths"]):
        for subject, row in itertools.product(spec["subjects"], spec["rows"]):
            assert set(spec["prompts"]) <= set(drawn[subject, row])
    for part in plan.parts.values():
        assert all("{}" in prompt for prompt in part.shown) and part.unrelated
    if name == "toyworld":
        rows = {(job.subject.name, module.title(job)) for job in plan.jobs if job.part == "table1"}
        named = [entry["row"] for entry in json.loads(module.PUBLISHED.read_text())["table1"]["rows"]]
        assert {(s, row) for s in ("bear_plushie", "cat", "dog") for row in named} <= rows
        seeds = {job.seed for job in plan.jobs if job.part == "table2" and job.method == "lora"}
        assert seeds == {0, 1, 2} and all(len(plan.scored(job)) == 9 for job in plan.jobs if job.part == "table2")


@pytest.mark.parametrize("family", ["sdxl", "omnigen"])
def test_shipped_plans_from_end_to_end(family, plan, tmp_path, commands, capsys, one_thread):
    build(family).save_pretrained(tmp_path / "model")
    write_data(tmp_path / "data")
    given = yaml.safe_load((QUALITY / f"{family}.yaml").read_text())
    for part in given["parts"].values():
        part["sample"] = {"num_images_per_prompt": 1}
    given["train"] = {}
    subjects = ["dog8", "live_subject_animal_00_kitten", "live_subject_animal_03_horse"]
    flags = {"subject": subjects, "seed": [0]} if family == "sdxl" else {}
    o = plan(given, tmp_path / "model", **flags)
    assert compare(o) == 0
    root, results = Path(o.output_dir), results_of(o)
    assert all(row["status"] == "done" and row["scores"] and not row["missing"] for row in results["rows"])
    names = {"sdxl": ["figure3"], "omnigen": ["figure1", "figure2", "figure4", "figure5"]}[family]
    for name in names:
        assert (root / "figures" / f"{name}.pdf").stat().st_size and (root / "figures" / f"{name}.png").stat().st_size
    assert "missing" not in capsys.readouterr().err and (root / "report.html").is_file()
    first = (root / "table1.md").read_text()
    assert "| DEFT (rank=8) | 1 |" in first and "| 0.8415 | 0.9504 | 0.8882 |" in first
    if family == "sdxl":
        row = next(line for line in first.splitlines() if line.startswith("| Textual Inversion"))
        assert re.fullmatch(r"\| Textual Inversion \| 1 \| 0\.\d{4} \| 0\.7421 \[\d\] \| 0\.8048 \| 0\.7432 \|", row), row
        second = (root / "table2.md").read_text().splitlines()
        row = next(line for line in second if line.startswith("| LoRA (rank=8) | HORSE | 1"))
        ours, printed = (row.split(" | ")[k : k + 4] for k in (3, 7))
        assert all(re.fullmatch(r"-?\d+\.\d\d", one) for one in ours) and printed[1] == "72.2653"
        scored = results["parts"]["table2"], json.loads((root / results["rows"][-1]["folder"] / "scores.json").read_text())
        assert scored[0]["scale"] == 100 and [s["prompt"] for s in scored[1]["samples"]][7:9] == ["a sks horse 7", "nobody"]
        drift = [row["scores"]["drift"] for row in results["rows"] if row["method"] != "base"]
        assert all(value >= 0 for value in drift) and max(drift) > 0
    else:
        rows = {row["row"] for row in results["rows"]}
        assert {"base", "PaRa (rank=8)", "PaRa + uncond (rank=8)"} <= rows


def test_an_interrupted_comparison_ends_with_the_same_tables(small, commands, monkeypatch, tmp_path):
    whole = small("whole")
    assert compare(whole) == 0
    o, run, done = small("resumed"), sweep._call, []

    def stop(command, *args):
        done.append(command)
        return sweep.INTERRUPTED if len(done) == 5 else run(command, *args)

    monkeypatch.setattr(sweep, "_call", stop)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        compare(o)
    assert not (tmp_path / "resumed" / "results.json").exists()
    with monkeypatch.context() as broken:  # and once more, among the scores
        score = module._score

        def until_seed_1(job, *args):
            if job.seed:
                raise KeyboardInterrupt
            score(job, *args)

        broken.setattr(module, "_score", until_seed_1)
        with pytest.raises(KeyboardInterrupt):
            compare(o)
    assert (tmp_path / "resumed/dog8/lora-r2-seed0/scores.json").is_file() and not list(tmp_path.glob("resumed/*.md"))
    assert compare(o) == 0
    assert texts_of(o) == texts_of(whole)
    for one, other in zip(results_of(o)["rows"], results_of(whole)["rows"]):
        assert one["scores"].keys() == other["scores"].keys() and len(one["scores"]) == 4 + (one["method"] != "base")
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)

    commands.clear()
    monkeypatch.setattr(module, "_score", None)  # nothing is drawn or scored again
    before = texts_of(o)
    (tmp_path / "resumed" / "table1.md").unlink()
    assert compare(o) == 0 and not commands and texts_of(o) == before


def test_what_fails_is_named_and_the_rest_is_whole(small, commands, tmp_path):
    whole = small("whole", only=["cat", "dog8"], seeds=[0])
    assert compare(whole) == 0
    kept = tmp_path / "dataset" / "cat" / "00.png"
    picture = kept.read_bytes()
    kept.write_bytes(b"broken")
    o = small(only=["cat", "dog8"], seeds=[0])
    with pytest.raises(UserError, match=r"2 of 6 jobs failed: see .*sweep\.md"):
        compare(o)
    root = tmp_path / "out"
    line = next(line for line in (root / "table1.md").read_text().splitlines() if line.startswith("| LoRA (rank=2)"))
    assert re.match(r"\| LoRA \(rank=2\) \| 1 \| — \[\d+\] \| 0\.\d{4} \|", line)
    assert re.search(r"\[\d+\] cat/lora-r2-seed0 failed: .*cannot read the picture", (root / "table1.md").read_text())
    expected = {row["job"]: row["scores"] for row in results_of(whole)["rows"]}
    for row in results_of(o)["rows"]:
        if row["subject"] == "dog8":
            assert row["scores"] == pytest.approx(expected[row["job"]], abs=1e-5)
    lines = list(csv.DictReader((root / "scores.csv").open()))
    there = [line["CLIP-I"] != "" for line in lines if line["subject"] in ("all", "dog8")]
    assert there == [True, False, False, True, True, True]  # base, lora and para: of both subjects, and of one
    (base,) = (row for row in results_of(o)["rows"] if row["job"] == "cat/base")
    assert base["scores"]["clip_i"] and "00.png" in base["missing"][0]["what"]  # of the one reference that can be read
    assert base["missing"][0]["why"] == "cannot read the picture: cannot identify image file"  # which is named once
    scored = (root / "cat" / "base" / "scores.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="2 of 6 jobs failed"):
        compare(o)
    assert (root / "cat" / "base" / "scores.json").stat().st_mtime_ns == scored  # what is missing is so still
    assert (root / "report.html").is_file() and not (root / "cat" / "lora-r2-seed0" / "scores.json").exists()

    kept.write_bytes(picture)
    assert compare(o) == 0 and texts_of(o)["table1.md"] == texts_of(whole)["table1.md"]
    assert not any(row["missing"] for row in results_of(o)["rows"])
    (root / "cat" / "base" / "scores.json").unlink()
    for file in kept.parent.glob("*.png"):
        file.unlink()
    assert compare(o) == 0
    (base,) = (row for row in results_of(o)["rows"] if row["job"] == "cat/base")
    assert base["missing"][0]["what"] == "references" and "no pictures in" in base["missing"][0]["why"]


def test_who_trained_drew_scored_and_wrote_is_told(small, commands, monkeypatch, tmp_path):
    commit = iter(f"c{k}" for k in itertools.count())
    for where in (sweep, module):
        monkeypatch.setattr(where, "origin", lambda: {"commit": next(commit), "time": "2026-11-24"})
    o, root = small(methods=["lora"], seeds=[0]), tmp_path / "out"
    assert compare(o) == 0
    one = lambda commit, jobs=1: {"commit": commit, "jobs": jobs, "first": "2026-11-24", "last": "2026-11-24"}
    made = {"trained": [one("c1")], "drawn": [one("c0"), one("c2")], "scored": [one("c3"), one("c4")]}
    assert results_of(o)["made"] == made | {"tables": [{"commit": "c5", "time": "2026-11-24"}]}
    assert compare(o) == 0 and results_of(o)["made"] == made | {"tables": [{"commit": "c6", "time": "2026-11-24"}]}
    job = root / "dog8" / "lora-r2-seed0" / "job.json"
    told = json.loads(job.read_text())
    assert {step: made["commit"] for step, made in told["made"].items()} == {"trained": "c1", "drawn": "c2"}
    commands.clear()
    changed = small(methods=["lora"], seeds=[0], prompts=["a {} in a wood"])
    assert compare(changed) == 0 and {words[3] for words in commands} == {"sample"}
    assert results_of(o)["made"]["trained"] == [one("c1")]  # which is what it was
    told.pop("made")
    job.write_text(json.dumps(told | {"drawn": json.loads(job.read_text())["drawn"]}))
    assert compare(changed) == 0
    unknown = {"commit": None, "jobs": 1, "first": None, "last": None}
    assert results_of(o)["made"]["trained"] == [unknown]  # by an earlier version, which told nothing


def test_a_job_that_was_killed_says_so(small, monkeypatch, tmp_path):
    def killed(command, environment, output, claim):
        output.write("\rsteps:  45%|████▌     | 226/500")
        return -signal.SIGKILL

    monkeypatch.setattr(sweep, "_call", killed)
    with pytest.raises(UserError, match="jobs failed"):
        compare(small(seeds=[0]))
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "failed: killed by SIGKILL, as the system does where memory runs out" in text and "█" not in text


def test_scores_follow_what_is_drawn_and_asked_and_not_the_batch(small, commands, monkeypatch, tmp_path):
    figure = {"subjects": ["dog8"], "rows": ["base"], "prompts": ["a photo of {}"]}
    o, root = small(figures={1: figure}), tmp_path / "out"
    assert compare(o) == 0 and (root / "figures" / "figure1.png").is_file()
    before = results_of(o)
    for scored in root.glob("*/*/scores.json"):
        scored.unlink()
    shutil.rmtree(root / module.FEATURES)
    commands.clear()
    assert compare(small(evaluate={"batch_size": 3})) == 0 and not commands
    assert not list(root.glob("figures/figure1.*")) and list(root.glob("figures/fidelity_*"))  # this plan has none
    for one, other in zip(results_of(o)["rows"], before["rows"]):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)

    para = lambda found: next(row["scores"] for row in found["rows"] if row["method"] == "para")
    assert compare(small(unrelated=["a blue car"])) == 0 and {words[3] for words in commands} == {"sample"}
    other = para(results_of(o))
    assert other["drift"] != para(before)["drift"] and other["clip_i"] == pytest.approx(para(before)["clip_i"], abs=1e-5)

    commands.clear()
    assert compare(small(unrelated=["a blue car"], evaluate={"dinov1": "none"})) == 0
    assert not any("dinov1" in row["scores"] for row in results_of(o)["rows"])
    evaluate = {"dinov1": "none", "protocol": "dreambench++"}
    assert compare(small(unrelated=["a blue car"], evaluate=evaluate)) == 0 and not commands
    after = results_of(o)
    assert after["parts"][""]["scale"] == 100
    assert para(after)["clip_i"] == pytest.approx(100 * other["clip_i"], abs=1e-3)
    assert "printed CLIP-T" in (root / "table2.csv").read_text() and not list(root.glob("table1.*"))

    fewer = {"prompts": ["a photo of {}"], "shown": ["a {} on a hill"], "unrelated": ["a blue car"],
             "evaluate": evaluate}  # fmt: skip
    assert compare(small(**fewer)) == 0 and not commands
    scored = [json.loads(file.read_text()) for file in root.glob("*/*/scores.json")]
    assert all({s.get("template") for s in file["samples"]} <= {"a photo of {}", None} for file in scored)
    assert [file["samples"][0].get("text") for file in scored].count("a photo of dog") == 4  # all but the base model's
    assert para(results_of(o))["drift"] == pytest.approx(other["drift"], abs=1e-5)
    (root / "dog8" / "base" / "job.json").unlink()
    score, again = module._score, []
    with monkeypatch.context() as counted:
        counted.setattr(module, "_score", lambda job, *args: again.append(job.row) or score(job, *args))
        assert compare(small(**fewer)) == 0 and len(commands) == 1
    assert sorted(again) == ["PaRa + uncond"] * 2 + ["base"] + ["lora"] * 2  # the drift is from the base model's pictures
    commands.clear()
    load = module._load
    judge = lambda images: [{"individual": None, "scene": None} for _ in images]
    judge.sha256, judge.preprocessing = "of another judge", {}
    monkeypatch.setattr(module, "_load", lambda *asked: dataclasses.replace(load(*asked), judge=judge))
    assert compare(small(**fewer)) == 0 and not commands
    scored = [json.loads(file.read_text()) for file in root.glob("*/*/scores.json")]
    assert {file["encoders"]["judge"]["revision_or_sha256"] for file in scored} == {"of another judge"}


def test_the_last_process_writes_the_tables(small, commands, monkeypatch, tmp_path, capsys):
    o, root, score = small(seeds=[0]), tmp_path / "out", module._score
    root.mkdir()

    def alone(job, *args):
        with open(root / ".claim", "a") as third, sweep.claimed(root / job.name) as claim:
            assert not sweep.lock(third, fcntl.LOCK_EX | fcntl.LOCK_NB) and claim is None
        score(job, *args)

    monkeypatch.setattr(module, "_score", alone)
    with open(root / ".claim", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert compare(o) == 0
    assert "the last one writes tables" in capsys.readouterr().err and not (root / "results.json").exists()
    scored = {file.parent.name: file for file in root.glob("dog8/*/scores.json")}
    assert set(scored) == {"base", "lora-r2-seed0", "para-uncond-r2-seed0"}

    commands.clear()
    scored["lora-r2-seed0"].unlink()
    with sweep.claimed(root / "dog8" / "lora-r2-seed0"):  # by one that scores it
        assert compare(o) == 0 and not commands and not scored["lora-r2-seed0"].exists()
    scores = {row["job"]: row["scores"] for row in results_of(o)["rows"]}
    assert [name for name, found in scores.items() if not found] == ["dog8/lora-r2-seed0"]
    assert compare(o) == 0 and not commands and all(row["scores"] for row in results_of(o)["rows"])

    scored["lora-r2-seed0"].unlink()
    lock, another = sweep.lock, contextlib.ExitStack()
    another.enter_context(sweep.claimed(root / "dog8" / "lora-r2-seed0"))

    def killed_meanwhile(file, how):
        if how == fcntl.LOCK_UN:
            another.close()
        return lock(file, how)

    monkeypatch.setattr(sweep, "lock", killed_meanwhile)
    assert compare(o) == 0 and not commands and all(row["scores"] for row in results_of(o)["rows"])


def test_what_is_done_for_another_plan_waits(small, commands, tmp_path):
    assert compare(small(seeds=[0])) == 0
    o, root = small(seeds=[0], prompts=["a {} in a wood"]), tmp_path / "out"
    with sweep.claimed(root / "dog8" / "lora-r2-seed0"), pytest.raises(UserError, match="1 of 3 jobs failed"):
        compare(o)
    (row,) = (row for row in results_of(o)["rows"] if row["method"] == "lora")
    assert (row["status"], row["said"], row["scores"]) == ("waiting", "", {})
    assert "| dog8/lora-r2-seed0 | waiting |" in (root / "sweep.md").read_text()
    assert "dog8/lora-r2-seed0 waiting\n" in (root / "table1.md").read_text().replace("  \n", "\n")


def test_what_a_training_took_that_was_stopped_is_not_known(small, commands, tmp_path):
    o = small(methods=["lora"], seeds=[0, 1])
    assert compare(o) == 0
    job = tmp_path / "out" / "dog8" / "lora-r2-seed1" / "job.json"
    told = json.loads(job.read_text())
    told["training"]["steps"] = 0  # of the process that went on
    job.write_text(json.dumps(told))
    assert compare(o) == 0
    _, first, second = (row["training"] for row in results_of(o)["rows"])
    assert first["seconds"] and second["seconds"] is second["memory_gb"] is None and second["steps"] == first["steps"] == 1
    line = next(line for line in csv.DictReader((tmp_path / "out/costs.csv").open()) if line["method"] == "LoRA (rank=2)")
    assert (line["n"], line["training s n"], float(line["training s"])) == ("2", "1", pytest.approx(first["seconds"]))
    assert "training s: dog8/lora-r2-seed1: not known, as it was stopped and went on" in line["notes"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": []}, "there is nothing to score without `prompts`"),
        ({"prompts": "captions"}, "prompts_and_classes.txt has no prompts for dog"),
        ({"prompts": "a {}"}, "`prompts` is 'a {}', expected a list of texts, or `captions`"),
        ({"unrelated": ["a {}"]}, "the unrelated prompt 'a {}' is no text without {}"),
        ({"shown": ["a dog"]}, "the prompt 'a dog' has no {}"),
        ({"only": ["dog"]}, "`only`: there is no subject dog, did you mean dog8?; there are cat, dog8"),
        ({"only": {"dog8": None}}, "`only`: dog8 is None, expected a name in the published tables"),
        ({"only": {"dog8": "DOG8", "cat": "DOG8"}}, "`only`: dog8 is 'DOG8', expected a name in the published tables, each"),
        ({"methods": {"mine": {"caption_dropout": 1}}}, "unknown method mine"),
        ({"methods": {"mine": {"method": "para", "ranks": 4}}}, "`mine`: `ranks` is 4, expected a list of numbers"),
        ({"methods": {"mine": {"method": "para", "ranks": []}}}, "ranks are [], expected a list of numbers from 1 up"),
        ({"methods": {"mine": {"method": "para", "subjects": ["cow"]}}}, "`mine`: there is no subject cow"),
        ({"methods": {"My row": {"method": "para"}, "my row": {"method": "lora"}}}, "two jobs would be dog8/my-row-r2-seed"),
        ({"parts": {"one": {}, "two": {}}}, "two jobs would be dog8/base: a subject has its place in one part"),
        ({"parts": {"one": {"parts": {}}}}, "`one`: unknown parts"),
        ({"parts": {"one": None}}, "`one`: expected pretrained_model_name_or_path, subjects"),
        ({"evaluate": {"cache_dir": "x"}}, "`evaluate` cannot set cache_dir: every job has its own"),
        ({"evaluate": {"clip": "nobody/nothing"}}, "nobody/nothing is not downloaded"),
        ({"evaluate": {"device": "gpu"}}, "cannot use --device gpu"),
        ({"evaluate": {"batch_size": 0}}, "`evaluate`: batch_size is 0, expected a number from 1 up"),
        ({"evaluate": {"clip": ["a"]}}, "`evaluate`: clip is ['a'], expected a text"),
        ({"figures": {"figure1": {"subjects": ["cat"]}}}, "figure1 says no rows"),
    ],
)
def test_plans_that_cannot_be(changes, message, small, commands):
    with pytest.raises(UserError, match=re.escape(message)):
        compare(small(**changes))
    assert not commands
