"""Subjects x methods x ranks: found in the layouts of the data sets, each trained once, whatever fails or is stopped."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from deft_diffusers import UserError, data
from deft_diffusers import sweep as module
from deft_diffusers.cli import main
from deft_diffusers.grid import MARGIN
from deft_diffusers.options import SweepOptions
from deft_diffusers.sweep import CLAIM, _command, _train_command, find_subjects, read_plan, say, sweep, table
from PIL import Image
from safetensors import safe_open
from tiny_pipeline import python_environment, write_picture


@pytest.fixture
def dreambooth(tmp_path):
    folder = tmp_path / "dataset"
    for name, count in (("dog2", 2), ("vase", 1)):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            write_picture(folder / name / f"{k:02d}.png", k)
    (folder / "prompts_and_classes.txt").write_text("Classes\nsubject_name,class\ndog2,dog\n\nPrompts\n'a {0} {1}'\n")
    return folder


@pytest.fixture
def options(tiny, dreambooth, tmp_path):
    def make(**changes):
        plan = tmp_path / "plan.yaml"
        defaults = {"train": {"max_train_steps": 2, "resolution": 32}, "ranks": [2]}
        plan.write_text(json.dumps(defaults | changes.pop("plan", {})))  # JSON is YAML
        own = {"pretrained_model_name_or_path": str(tiny), "subjects": str(dreambooth), "output_dir": str(tmp_path / "runs")}
        return SweepOptions(plan=str(plan), **own | changes)

    return make


def statuses(root):
    lines = (root / "sweep.md").read_text().splitlines()[2:]
    return dict(re.match(r"\| (\S+) \| (\w+) ", line).groups() for line in lines)


def sweep_quietly(o):
    """How many jobs have failed."""
    try:
        return sweep(o)
    except UserError as error:
        return int(str(error).split()[0])


def test_subjects_of_dreambooth(dreambooth):
    dog, vase = find_subjects(dreambooth, "xyz")
    assert (dog.name, dog.instance_prompt, dog.class_name) == ("dog2", "a photo of xyz dog", "dog")
    assert (vase.name, vase.class_name) == ("vase", "vase")  # not listed: by its name
    (dreambooth / "2024").mkdir()
    assert find_subjects(dreambooth)[0].class_name == "2024"
    assert dog.instance_data_dir == str(dreambooth / "dog2")


def test_subjects_of_dreambench_plus(tmp_path):
    for kind, number, name in (("live_subject/animal", "00", "kitten"), ("object", "07", "tea pot")):
        for part, suffix in (("images", "png"), ("captions", "txt")):
            (tmp_path / part / kind).mkdir(parents=True)
            file = tmp_path / part / kind / f"{number}.{suffix}"
            write_picture(file, 1) if suffix == "png" else file.write_text(f"{name}\na {name} on the beach\n")
    kitten, pot = find_subjects(tmp_path)
    assert (kitten.name, kitten.instance_prompt) == ("live_subject_animal_00_kitten", "a photo of sks kitten")
    assert (pot.name, pot.class_name) == ("object_07_tea_pot", "tea pot")
    (tmp_path / "captions" / "object" / "07.txt").write_text("\n")
    with pytest.raises(UserError, match=r"07\.txt does not name its subject"):
        find_subjects(tmp_path)


def test_every_job_once_whatever_fails(options, tmp_path, dreambooth, capsys, commands):
    (dreambooth / "vase" / "00.png").write_bytes(b"broken")
    o, root = options(method=["lora", "svdiff"], rank=[1]), tmp_path / "runs"
    with pytest.raises(UserError, match=r"2 of 4 jobs failed: see .*sweep\.md"):
        sweep(o)
    expected = {f"dog2/{m}-seed0": "done" for m in ("lora-r1", "svdiff")}
    expected |= {name.replace("dog2", "vase"): "failed" for name in expected}
    assert statuses(root) == expected
    assert "cannot read the picture" in (root / "sweep.md").read_text()
    done = root / "dog2" / "lora-r1-seed0"
    assert (done / "adapter_model.safetensors").is_file() and "training" in (done / "output.txt").read_text()
    settings = json.loads((done / "training_args.json").read_text())
    assert (settings["instance_prompt"], settings["rank"], settings["max_train_steps"]) == ("a photo of sks dog", 1, 2)
    stamp = (done / "job.json").stat().st_mtime_ns

    write_picture(dreambooth / "vase" / "00.png", 3)
    assert sweep(o) == 0
    assert set(statuses(root).values()) == {"done"} and (done / "job.json").stat().st_mtime_ns == stamp
    said = capsys.readouterr().out
    training = json.loads((done / "result.json").read_text())
    assert training["parameters"] > 0 and training["steps"] == 2 and training["images_per_second"] > 0
    row = re.search(r"\| dog2/lora-r1-seed0 \| done \| (\d+) \| [\d.]+ \| ([\d.]+) \|", said)
    assert row.groups() == (str(training["parameters"]), str(training["images_per_second"]))
    assert "| vase/svdiff-seed0 | done |" in said
    with pytest.raises(UserError, match="lora-r1-seed0 is done, with another max_train_steps: delete it"):
        sweep(options(method=["lora", "svdiff"], rank=[1], plan={"train": {"max_train_steps": 3, "resolution": 32}}))
    with pytest.raises(UserError, match="lora-r1-seed0 is done, with another instance_prompt: delete it"):
        sweep(options(method=["lora", "svdiff"], rank=[1], token="zwx"))


def test_a_job_that_was_killed_goes_on_from_its_checkpoint(options, tmp_path, commands):
    o = options(method=["lora"], plan={"train": {"max_train_steps": 4, "checkpointing_steps": 2}})
    root = tmp_path / "runs"
    jobs = read_plan(o).jobs
    sweep(o)
    whole = [json.loads(line)["loss"] for line in (root / "dog2/lora-r2-seed0/loss.jsonl").read_text().splitlines()]
    folder = root / jobs[0].name
    for name in ("job.json", "README.md", "adapter_model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-4")
    (root / jobs[1].name / "job.json").unlink()
    with open(root / jobs[1].name / CLAIM) as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        sweep(o)
    assert "from step 2 to 4" in (folder / "output.txt").read_text()
    assert [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()] == whole
    assert statuses(root) == {jobs[0].name: "done", jobs[1].name: "waiting"}  # another process has that one
    assert "waiting" in table(root, read_plan(o))
    commands.clear()
    assert sweep(o) == 0 and not commands  # its training was whole, which only had not been noted

    for name in ("job.json", "README.md", "adapter_model.safetensors"):
        (folder / name).unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert sweep(o) == 0  # killed before its first checkpoint
    assert "from step 0 to 4" in (folder / "output.txt").read_text()


def test_a_stop_is_passed_on_and_waited_for(tmp_path):
    child = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved'), sys.exit(0)));"
        "print('ready', flush=True); time.sleep(5)"
    )
    mine = (
        "import sys; from pathlib import Path; from deft_diffusers.sweep import _call, claimed; folder = Path(sys.argv[1])\n"
        "with claimed(folder) as claim, open(folder / 'said', 'w') as output:\n"
        "    sys.exit(_call([sys.executable, '-c', sys.argv[2]], None, output, claim))"
    )
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, "-c", mine, str(tmp_path), child], env=python_environment())
        while process.poll() is None and not ((tmp_path / "said").is_file() and (tmp_path / "said").read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait() == code
        assert ("saved" in (tmp_path / "said").read_text()) == (number == signal.SIGTERM)
        with module.claimed(tmp_path) as claim:  # the job of a process that was killed goes on, and nobody else takes it
            assert (claim is None) == (number == signal.SIGKILL)
        (tmp_path / "said").unlink()


def test_every_run_draws_and_a_figure_shows_them_side_by_side(options, tmp_path, commands, monkeypatch):
    prompts = ["a photo of a {}", "a {} on a hill"]
    plan = {"train": {"max_train_steps": 1}, "methods": ["lora"],
            "sample": {"num_inference_steps": 1, "num_images_per_prompt": 2}}  # fmt: skip
    changes = {"method": ["deft", "textual_inversion"], "plan": plan}  # flags come first
    o, root = options(prompt=prompts, **changes), tmp_path / "runs"
    assert sweep(o) == 0
    names = ("base", "deft-r2-seed0", "textual_inversion-seed0")
    assert statuses(root) == {f"{s}/{name}": "done" for s in ("dog2", "vase") for name in names}
    drawn = [words for words in commands if words[3] == "sample"]
    said = [[w.removeprefix("--prompt=") for w in words if w.startswith("--prompt=")] for words in drawn]
    subjects = ("dog", "vase", "sks dog", "sks dog", "sks vase", "sks vase")
    assert said == [[f"a photo of a {s}", f"a {s} on a hill"] for s in subjects]
    assert [any(w.startswith("--adapter=") for w in words) for words in drawn] == [False] * 2 + [True] * 4
    samples = json.loads((root / "dog2/deft-r2-seed0/samples/samples.json").read_text())["samples"]
    assert [s["seed"] for s in samples] == [0, 1, 0, 1]
    for name, own in (("dog2", 2), ("vase", 1)):
        page = data.read_image(root / f"{name}.png")
        cells = [np.asarray(page)[(row - 4) * (192 + MARGIN) :][:192] for row in range(4)]
        right = [cell[:, -MARGIN - 192 : -MARGIN] for cell in cells]  # own pictures, base, deft, textual inversion
        assert [bool((cell != 255).any()) for cell in right] == [own == 2, True, True, True]
        last = Image.open(root / name / "textual_inversion-seed0/samples/0002.png").convert("RGB").resize((192, 192), 3)
        assert np.array_equal(right[3], np.asarray(last))  # the first picture of the second prompt

    commands.clear()
    assert sweep(o) == 0 and not commands  # nothing is drawn twice
    costs = {file: json.loads(file.read_text())["seconds"] for file in root.glob("vase/deft*/job.json")}
    assert sweep(options(prompt=["an old {}"], subject=["vase"], **changes)) == 0
    assert [words[3] for words in commands] == ["sample"] * 3  # and nothing trained twice
    assert all("/vase/" in words[5] for words in commands)
    assert costs == {file: json.loads(file.read_text())["seconds"] for file in costs} and all(costs.values())

    def kill(*args):
        raise MemoryError

    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(module, "_call", kill)
        sweep(options(prompt=["a new {}"], subject=["vase"], **changes))
    commands.clear()  # of the pictures of the earlier prompt some may be gone
    assert sweep(options(prompt=["an old {}"], subject=["vase"], **changes)) == 0
    assert [(words[3], words[5].split("/")[-2]) for words in commands] == [("sample", "base")]


@pytest.mark.parametrize(
    "prompt, subject, said",
    [("a photo of a {}", "old car", "a photo of an old car"), ("A {}", "car", "A car"), ("an {}", "car", "a car"),
     ("a pizza {}", "artist", "a pizza artist")],
)  # fmt: skip
def test_articles(prompt, subject, said):
    assert say(prompt, subject) == said


def test_options_of_a_plan_become_flags():
    words = {"gate": False, "use_ema": True, "init_weights": False, "alpha": None, "validation_image": ["a", "b"]}
    expected = ["--use_ema", "--no-init_weights", "--validation_image=a", "--validation_image=b"]
    assert _command("train", words)[4:] == expected


def test_options_of_one_method(options, tmp_path):
    own = {"methods": {"deft": {"gate": True}, "dreambooth": None, "textual_inversion": {"initializer_token": "cat"}}}
    o = options(plan=own, subject=["vase"])
    plan = read_plan(o)
    deft, dreambooth, word = ([w for w in _train_command(j, plan, tmp_path) if "_dir" not in w] for j in plan.jobs)
    assert "--gate" in deft and "--gate" not in dreambooth and not any("placeholder" in w for w in deft)
    assert {"--placeholder_token=sks vase", "--initializer_token=cat", "--instance_prompt=a photo of sks vase"} < set(word)
    (lora,) = read_plan(options(plan=own, subject=["vase"], method=["lora"])).jobs
    assert lora.method == "lora"


def test_captions_name_the_subject_of_textual_inversion(options, dreambooth, tmp_path, commands):
    (dreambooth / "vase" / "00.txt").write_text("a photo of sks vase on a table")
    assert sweep(options(subject=["vase"], method=["textual_inversion"])) == 0
    learned = tmp_path / "runs" / "vase" / "textual_inversion-seed0" / "learned_embeds.safetensors"
    with safe_open(learned, "pt") as file:
        assert file.metadata() == {"placeholder_token": "sks vase"} and file.keys() == ["sks vase"]


def test_a_job_tells_where_its_photographs_are_from_any_folder(options, dreambooth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_call", lambda *_: 1)
    assert sweep_quietly(options(subjects=dreambooth.name, method=["lora"], subject=["vase"])) == 1
    (job,) = tmp_path.glob("runs/vase/*/job.json")
    assert json.loads(job.read_text())["subject"]["instance_data_dir"] == str(dreambooth / "vase")


def test_every_prompt_is_drawn_once(options):
    plan = read_plan(options(prompt=["a {}", "a {}"], plan={"shown": ["the {}", "a {}"], "unrelated": ["x", "x"]}))
    assert plan.drawing(plan.jobs[0]) == {"subject": "dog", "prompt": ["a {}", "the {}"], "unrelated": ["x"]}


@pytest.mark.parametrize(
    "said, count, local, given",
    [(None, 4, 2, "2"), ("5,7", 2, 1, "7"), ("5", 1, 1, "5"), (None, 1, 3, "0"), (None, 0, 1, None), ("", 0, 1, "")],
)
def test_processes_of_a_launcher_have_a_gpu_each_as_far_as_they_go(said, count, local, given, options, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_call", lambda words, env, *_: seen.append(env.get("CUDA_VISIBLE_DEVICES")) or 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert sweep_quietly(options(method=["lora"], subject=["vase"])) == 1 and seen == [given]


def test_a_job_that_failed_is_not_repeated_by_the_other_processes(options, tmp_path, dreambooth, commands, monkeypatch):
    (dreambooth / "vase" / "00.png").write_bytes(b"broken")
    o = options(method=["lora"], subject=["vase"])
    assert sweep_quietly(o) == 1 and len(commands) == 1
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this one began before
    assert sweep_quietly(o) == 0 and len(commands) == 1


def test_processes_of_a_launcher_share_the_jobs(options, tmp_path, dreambooth):
    o = options(method=["lora"])
    (dreambooth / "vase" / "00.png").write_bytes(b"broken")
    words = [sys.executable, "-m", "deft_diffusers", "sweep", *(f"--{k}={v}" for k, v in vars(o).items()
             if v and not isinstance(v, list)), "--method=lora"]  # fmt: skip
    environment = python_environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    ranks = [subprocess.Popen(words, env=environment | {"RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(2)]
    assert [p.wait(timeout=300) for p in ranks] == [0, 0]
    root = tmp_path / "runs"
    assert statuses(root) == {"dog2/lora-r2-seed0": "done", "vase/lora-r2-seed0": "failed"}
    assert "training" in (root / "dog2/lora-r2-seed0/output.txt").read_text()


def one_subject(**more):
    entry = {"instance_data_dir": "x", "instance_prompt": "a zwx cat"} | more
    return {"subjects": None, "plan": {"subjects": {"cat": entry}}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plan": {"subject": "x"}}, "unknown subject, did you mean subjects?; expected"),
        ({"plan": {"train": {"learning_rat": 3}}}, "`train` has unknown learning_rat, did you mean learning_rate?"),
        ({"plan": {"train": {"rank": 3}}}, "`train` cannot set rank: every job has its own"),
        ({"plan": {"train": ["gate"]}}, "`train` is ['gate'], expected options of `deft train`"),
        ({"plan": {"methods": {"deft": {"gat": True}}}}, "`deft` has unknown gat, did you mean gate?"),
        ({"plan": {"methods": {"deft": 4}}}, "`deft` is 4, expected options of `deft train`"),
        ({"plan": {"methods": "deft"}}, "`methods` is 'deft', expected a list of methods"),
        ({"plan": {"methods": {"drembooth": {}}}}, "unknown method drembooth, did you mean dreambooth?"),
        ({"plan": {"prompts": "a {}"}}, "`prompts` is 'a {}', expected a list of texts"),
        ({"plan": {"prompts": [3]}}, "the prompt 3 has no {}"),
        ({"plan": {"ranks": ["four"]}}, "expected a list of numbers"),
        ({"rank": [0]}, "ranks are [0], expected a list of numbers from 1 up"),
        ({"plan": {"methods": ["dora"]}}, "unknown method dora"),
        ({"subjects": "nowhere"}, "no such folder of subjects"),
        ({"subject": ["vase", "cat"]}, "there is no subject cat; there are dog2, vase"),
        ({"subject": ["vas"]}, "there is no subject vas, did you mean vase?"),
        ({"prompt": ["a dog"]}, "the prompt 'a dog' has no {}"),
        ({"plan": {"sample": {"prompt": "x"}}}, "`sample` cannot set prompt"),
        ({"prompt": ["{}"], **one_subject()}, "to draw it, its prompt must say 'sks cat'"),
        ({"method": ["textual_inversion"], **one_subject()}, "for textual_inversion, its prompt must say 'sks cat'"),
        (one_subject(kind="x"), "subject cat has unknown kind; expected instance_data_dir"),
        ({"subjects": None}, "which subjects?"),
        ({"pretrained_model_name_or_path": None}, "which base model?"),
        ({"subjects": None, "plan": {"subjects": {"cat": {"instance_data_dir": "x"}}}}, "subject cat: expected"),
    ],
)
def test_plans_that_cannot_be(changes, message, options):
    with pytest.raises(UserError, match=re.escape(message)):
        sweep(options(**changes))


def test_on_the_command_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("a: [")
    assert main(["sweep", "--plan", str(tmp_path / "bad.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "is no YAML" in capsys.readouterr().err
