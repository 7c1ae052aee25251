"""Figures and plots are of the pictures and scores that the jobs have left, labelled, and say what is missing."""

import io
import json
import re
import shutil
import struct
import textwrap
import zlib

import matplotlib
import numpy as np
import pytest
import yaml
from comparison import PROMPTS, ROWS, write_comparison
from deft_diffusers import UserError
from deft_diffusers.evaluation import figures, report
from deft_diffusers.evaluation.figures import (
    CELL,
    DPI,
    MARKERS,
    STYLE,
    at_print_size,
    draw_all,
    draw_figure,
    draw_grid,
    draw_plot,
    find_job,
    plots,
    points,
    read_figure,
    read_figures,
    read_samples,
    remove_all,
)
from PIL import Image

BEACH, SNOW = list(PROMPTS)[1:3]
FIGURES = {
    1: {"title": "Two strategies", "subjects": ["dog"], "rows": ["base", "DEFT (rank=8)"], "prompts": [BEACH, SNOW]},
    "figure3": {"subjects": ["cat", "dog"], "rows": ["LoRA (rank=4)", "Nobody"], "prompts": [SNOW], "seed": 1},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A comparison with a picture that is gone and one that is none, what was drawn of it, and what was missing."""
    root = tmp_path_factory.mktemp("comparison")
    rows = [row for row in ROWS if row[0] in ("base", "DEFT (rank=8)", "LoRA (rank=4)")]
    results = write_comparison(
        root, rows=rows, seeds=(0, 1), prompts={p: PROMPTS[p] for p in (BEACH, SNOW)}, figures=FIGURES
    )
    (root / "dog/deft-r8-seed0/samples/0000.png").unlink()
    (root / "cat/lora-r4-seed1/samples/0001.png").write_bytes(b"no picture")
    return root, results, draw_all(root, results, results["plan"])


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_files_are_there_in_print_quality(drawn):
    root, _, _ = drawn
    made = sorted(path.name for path in (root / "figures").iterdir())
    grids = [f"figure{n}.{kind}" for n in (1, 3) for kind in ("pdf", "png")]
    plotted = ("fidelity_drift", "fidelity_prompt", "individual_scene")
    assert made == sorted([*grids, *(f"{name}.{kind}" for name in plotted for kind in ("pdf", "png", "svg"))])
    for path in (root / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
    for path in (root / "figures").glob("*.pdf"):
        pdf = path.read_bytes()
        assert len(re.findall(rb"/Type /Page\b", pdf)) == 1
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded


def test_pictures_are_in_the_files_to_the_pixel(drawn):
    root, _, _ = drawn
    picture = at_print_size(Image.open(root / "dog/base/samples/0001.png"))
    assert picture.size == (CELL, CELL)
    with Image.open(root / "figures/figure1.png") as image:
        page = np.asarray(image.convert("RGB"))
    wanted = np.asarray(picture)
    first = np.argwhere((page[: -CELL + 1, : -CELL + 1] == wanted[0, 0]).all(-1))
    places = [(y, x) for y, x in first if np.array_equal(page[y : y + CELL, x : x + CELL], wanted)]
    assert len(places) == 1
    assert sum(np.array_equal(found, wanted) for found in pictures_in(root / "figures/figure1.pdf")) == 1


def pictures_in(file):
    """The RGB pictures of a PDF, which matplotlib writes as PNG does, the last line first."""
    for head, data in re.findall(rb"/Subtype /Image(.*?)\nstream\n(.*?)\nendstream", file.read_bytes(), re.DOTALL):
        assert b"/DeviceRGB" in head and b"/Predictor 10" in head
        width, height = (int(re.search(rb"/%s (\d+)" % key, head)[1]) for key in (b"Width", b"Height"))
        png = b"\x89PNG\r\n\x1a\n"
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        for kind, chunk in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
            png += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
        yield np.asarray(Image.open(io.BytesIO(png)))[::-1]


def test_pictures_larger_than_a_cell_are_reduced_and_smaller_ones_are_whole_squares():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8))
    grown = np.asarray(at_print_size(noise))
    assert np.array_equal(grown, np.asarray(noise).repeat(3, 0).repeat(3, 1))
    assert at_print_size(noise.resize((1024, 512))).size == (CELL, CELL // 2)


def test_a_grid_is_labelled_and_says_how_it_was_made(drawn):
    root, results, _ = drawn
    with matplotlib.rc_context(STYLE):
        figure, missing = draw_figure(root, results, "figure1", FIGURES[1])
    said = texts(figure)
    assert said[0] == "Figure 1. Two strategies"
    note = "base model toyworld, 500 training steps, 30 denoising steps, guidance 4, training seed 0, picture seed 0"
    assert " ".join(said[1 : said.index(next(text for text in said if "[V]" in text))]) == note
    assert {"base", "DEFT (rank=8)", "dog"} <= set(said)
    assert "<b>snow</b> & wind" in " ".join(said)  # as it is, in a picture
    assert missing == [f"figure1: dog/deft-r8-seed0 has no picture of {BEACH!r}"]
    cells = [axes for axes in figure.axes if axes.images]
    assert len(cells) == 4  # the photograph, and four less the one that is missing
    assert [t.get_text() for axes in figure.axes for t in axes.texts] == ["missing"]
    photograph = at_print_size(Image.open(root / "subjects/dog/0.png"))
    assert np.array_equal(cells[0].images[0].get_array(), np.asarray(photograph))


def test_steps_stand_beside_the_rows_where_these_differ(drawn):
    root, results, _ = drawn
    longer = lambda row: row | {"training": row["training"] | {"steps": 1000}} if row["method"] == "lora" else row
    rows = [longer(row) for row in results["rows"]]
    spec = {"subjects": ["dog"], "rows": ["base", "DEFT (rank=8)", "LoRA (rank=4)"], "prompts": [SNOW]}
    with matplotlib.rc_context(STYLE):
        figure, _ = draw_figure(root, results | {"rows": rows}, "figure1", spec)
    said = " ".join(texts(figure))
    assert "base DEFT (rank=8), 500 training steps LoRA (rank=4), 1000 training steps" in said
    assert said.count("training steps") == 2 and "30 denoising steps" in said


def test_the_first_picture_of_a_prompt_is_shown_under_the_subjects_name(drawn, tmp_path):
    root, results, _ = drawn
    copy = shutil.copytree(root, tmp_path / "copy")
    record = copy / "dog/base/samples/samples.json"
    told = json.loads(record.read_text())
    told["samples"].append(told["samples"][1] | {"file": "9999.png", "seed": 1})
    record.write_text(json.dumps(told))
    Image.new("RGB", (64, 64), "red").save(record.parent / "9999.png")
    results = results | {"parts": {"": results["parts"][""] | {"subjects": {"cat": None, "dog": "DOG8"}}}}
    spec = {"subjects": ["dog"], "rows": ["base"], "prompts": [SNOW]}
    with matplotlib.rc_context(STYLE):
        figure, _ = draw_figure(copy, results, "figure2", spec)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert np.array_equal(shown[1], np.asarray(at_print_size(Image.open(root / "dog/base/samples/0001.png"))))
    assert "Figure 2. DOG8" in texts(figure) and "DOG8" in texts(figure) and "dog" not in texts(figure)
    assert {point["subject"] for point in plots(results)["fidelity_prompt"][0]} == {"cat", "DOG8"}


def test_what_is_missing_is_named_and_the_rest_is_drawn(drawn, capsys):
    root, results, missing = drawn
    assert missing == [
        f"figure1: dog/deft-r8-seed0 has no picture of {BEACH!r}",
        f"figure3: cat/lora-r4-seed1 has no picture of {SNOW!r}",
        "figure3: there is no job of cat, Nobody",
        "figure3: there is no job of dog, Nobody",
    ]
    figure, _ = draw_figure(root, results, "figure3", FIGURES["figure3"])
    assert sum(len(axes.images) for axes in figure.axes) == 3  # two photographs, one picture
    assert "training seed 1" in " ".join(texts(figure))
    assert find_job(results, "cat", "base", 1)["job"] == "cat/base"  # which has one seed, for every figure


def test_names_of_several_lines_stay_on_the_page_and_off_the_pictures():
    picture = Image.new("RGB", (64, 64), "red")
    names = ["live_subject_animal_00_kitten", "live_subject_animal_03_horse"]
    with matplotlib.rc_context(STYLE):
        figure = draw_grid([(name, picture, [("DEFT", [picture])]) for name in names], ["a [V]"], "Figure 3", "")
    shown = [text for text in figure.texts if re.search("live|00|03", text.get_text())]
    assert [text.get_text() for text in shown] == ["live subject animal", "00 kitten", "live subject animal", "03 horse"]
    for text in shown:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)


def test_pictures_that_are_not_scored_are_shown(drawn, tmp_path):
    root, results, _ = drawn
    copy = shutil.copytree(root, tmp_path / "copy")
    for file in copy.rglob("scores.json"):
        file.unlink()
    figure, missing = draw_figure(copy, results, "figure1", FIGURES[1])
    assert sum(len(axes.images) for axes in figure.axes) == 4
    assert len(missing) == 1


def test_a_photograph_that_is_gone_is_named(drawn, tmp_path):
    root, results, _ = drawn
    copy = shutil.copytree(root, tmp_path / "copy")
    for file in copy.glob("dog/*/job.json"):
        file.write_text(file.read_text().replace("subjects/dog", "nowhere"))
    _, missing = draw_figure(copy, results, "figure1", FIGURES[1])
    assert missing[1:] == ["figure1: there is no photograph of dog"]


def test_scores_of_a_picture_that_was_drawn_over_are_not_shown(drawn, tmp_path):
    folder = shutil.copytree(drawn[0] / "dog/base", tmp_path / "base")
    told = json.loads((folder / "samples/samples.json").read_text())
    told["samples"][0]["prompt"] = "another"
    (folder / "samples/samples.json").write_text(json.dumps(told))
    first, second, _ = read_samples(folder)
    assert first["prompt"] == "another" and "clip_t" not in first and "clip_t" in second


def test_what_was_drawn_of_other_results_is_removed(drawn, tmp_path):
    root, results, _ = drawn
    shutil.copytree(root / "figures", tmp_path / "figures")
    (tmp_path / "figures" / "mine.png").touch()
    remove_all(tmp_path, results)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["mine.png"]


def test_a_figure_is_the_same_file_each_time(drawn, tmp_path):
    root, results, _ = drawn
    draw_all(tmp_path, results, {})
    for kind in ("png", "pdf", "svg"):
        name = f"figures/fidelity_drift.{kind}"
        assert (root / name).read_bytes() == (tmp_path / name).read_bytes(), kind


WRONG = {
    "no mapping": ([1], "expected names with title, subjects, rows, prompts, seed"),
    "no figure": ({2: "DEFT"}, "figure2 is 'DEFT'"),
    "unknown key": ({2: {"promts": []}}, "figure2 has unknown promts, did you mean prompts?"),
    "wrong kind": ({2: {"rows": "DEFT"}}, "figure2: `rows` is 'DEFT', expected a list"),
    "no text": ({2: {"subjects": ["cat"], "prompts": [3]}}, "figure2: `prompts` has 3, expected texts"),
    "nothing to show": ({2: {"rows": ["DEFT"], "prompts": ["a {}"]}}, "figure2 says no subjects"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_figures_that_cannot_be_are_refused(wrong):
    figures, message = WRONG[wrong]
    with pytest.raises(UserError, match=re.escape(message)):
        read_figures({"figures": figures})


# plots --------------------------------------------------------------------------------------------------------------


def row(subject="cat", label="DEFT", seed=0, part="", **scores):
    return {"subject": subject, "row": label, "seed": seed, "part": part, "method": "deft", "rank": 8, "scores": scores}


def test_points_are_means_with_intervals_over_seeds():
    rows = [row(seed=k, clip_t=0.2 + k / 10, dinov2=y) for k, y in enumerate((0.5, 0.5, 0.8))]
    rows += [row(label="LoRA", clip_t=0.1, dinov2=0.4), row(label="PaRa", clip_t=0.1)]
    deft, lora = points(rows, "clip_t", "dinov2")
    # t = 4.30265 with 2 degrees of freedom; deviations 0.1 and 0.3 / sqrt(3)
    assert (deft["x"], deft["y"], deft["n"]) == (pytest.approx(0.3), pytest.approx(0.6), 3)
    assert deft["dx"] == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-5)
    assert deft["dy"] == pytest.approx(4.30265 * 0.3 / 3, rel=1e-5)
    assert (lora["row"], lora["x"], lora["dx"], lora["n"]) == ("LoRA", 0.1, None, 1)  # PaRa has no y


def test_many_subjects_are_one_point():
    subjects = [f"subject {k}" for k in range(len(MARKERS) + 1)]
    rows = [row(s, seed=seed, clip_t=k, dinov2=seed) for k, s in enumerate(subjects) for seed in (0, 1)]
    (point,) = points(rows, "clip_t", "dinov2")
    assert (point["x"], point["y"], point["n"], point["subject"]) == (4, 0.5, 2, "all")
    del rows[-1]["scores"]["dinov2"]  # of the last subject's seed 1, whose mean would be of others
    (point,) = points(rows, "clip_t", "dinov2")
    assert (point["y"], point["n"]) == (0, 1)


def test_parts_are_plotted_apart_with_the_scores_they_have():
    rows = [row(part="table1", label=label, clip_t=0.3, clip_i=0.8, drift=0.1) for label in ("DEFT", "LoRA")]
    rows += [row(subject, part="table2", clip_t=30, dinov1=70, clip_i=80) for subject in ("cat", "dog")]
    rows += [row(part="rock", clip_t=0.3, clip_i=k) | {"method": m, "row": m} for k, m in enumerate(("base", "deft"))]  # one
    found = plots({"parts": {name: {"subjects": {"cat": None}} for name in ("table1", "table2", "rock")}, "rows": rows})
    assert {name: plot[1:3] for name, plot in found.items()} == {
        "table1-fidelity_prompt": ("clip_t", "clip_i"),
        "table1-fidelity_drift": ("drift", "clip_i"),
        "table2-fidelity_prompt": ("clip_t", "dinov1"),
    }
    assert [len(plot[0]) for plot in found.values()] == [2, 2, 2]


def test_every_point_of_a_plot_says_what_it_is(drawn):
    root, results, _ = drawn
    svg = (root / "figures/fidelity_prompt.svg").read_text()
    titles = re.findall(r'<g id="point-(\d+)"><title>([^<]*)</title>', svg)
    (found, *_) = plots(results)["fidelity_prompt"]
    assert [int(k) for k, _ in titles] == list(range(len(found))) and len(found) == 6  # base, DEFT, LoRA of two subjects
    scores = [r["scores"] for r in results["rows"] if (r["row"], r["subject"]) == ("DEFT (rank=8)", "dog")]
    mean = sum(s["clip_t"] for s in scores) / 2
    assert any(f"DEFT (rank=8), dog: CLIP-T {mean:.4g} ± " in title and "; 2 seeds" in title for _, title in titles)
    assert any(title.startswith("base, cat: CLIP-T") and "±" not in title for _, title in titles)
    axes = ("CLIP-T (toyworld), 0 to 1", "DINOv2 (toyworld), 0 to 1")
    for text in (*axes, "LoRA (rank=4)", "Fidelity against following the prompt"):
        assert f">{text}</text>" in svg


def test_an_axis_names_encoder_and_scale():
    part = {"scale": 100.0, "encoders": {"dinov2": {"id": "a/b"}, "judge": {"id": "toyworld/judge"}}}
    axes = draw_plot([], "individual", "dinov2", "", part).axes[0]
    assert axes.get_ylabel() == "DINOv2 (a/b), times 100"
    assert axes.get_xlabel() == "share that shows this individual (toyworld/judge)"  # a share, whatever the scale
    drift, clip = (draw_plot([], x, "dinov2", "", part).axes[0].get_xlabel() for x in ("drift", "clip_t"))
    assert drift == "drift on unrelated prompts, less is better (a/b)" and clip == "CLIP-T, times 100"


@pytest.mark.parametrize("module, key", [(figures, "figures"), (report, "strengths")])
def test_the_example_of_the_documentation_can_be_read(module, key):
    example = yaml.safe_load(textwrap.dedent(re.search(rf"(?m)^ +{key}:.*\n(?: +.*\n)*", module.__doc__)[0]))
    for name, spec in (example[key] if key == "figures" else example).items():
        assert read_figure(name, spec)["prompts"] == ["a photo of {} on the beach"]


def test_a_plan_may_come_from_json(drawn):
    _, results, _ = drawn
    assert read_figures(json.loads(json.dumps(results["plan"]))) == read_figures({"figures": FIGURES})


def test_the_highest_rank_of_a_method_is_filled():
    same = {"subject": "dog", "method": "deft", "n": 1, "x": 0.1, "y": 0.5, "dx": None, "dy": None}
    found = [same | {"row": f"DEFT (rank={rank})", "rank": rank} for rank in (4, 8)]
    legend = draw_plot(found, "clip_t", "dinov2", "", {}).axes[0].artists[0]
    shown = {text.get_text(): line.get_fillstyle() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert shown == {"DEFT (rank=8)": "full", "DEFT (rank=4)": "none"}


def test_a_rank_looks_the_same_beside_a_method_of_another_name():
    same = {"subject": "dog", "method": "para", "n": 1, "x": 0.1, "y": 0.5, "dx": None, "dy": None}
    rows = (("PaRa (rank=8)", 8), ("PaRa (rank=4)", 4), ("PaRa + uncond (rank=8)", 8))
    found = [same | {"row": row, "rank": rank} for row, rank in rows]
    legend = draw_plot(found, "clip_t", "dinov2", "", {}).axes[0].artists[0]
    shown = {text.get_text(): line.get_fillstyle() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert shown == {"PaRa (rank=8)": "full", "PaRa (rank=4)": "none", "PaRa + uncond (rank=8)": "bottom"}


def test_shares_are_plotted_between_none_and_all():
    found = [
        {"row": "DEFT", "subject": "dog", "method": "deft", "rank": 8, "n": 2, "x": 1.0, "y": 0.5, "dx": 3.0, "dy": 2.0}
    ]
    axes = draw_plot(found, "scene", "individual", "", {}).axes[0]
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert -0.1 < low < 0 and 1 < high < 1.1
    low, high = draw_plot(found, "clip_t", "dinov2", "", {}).axes[0].get_xlim()
    assert low < -2 and high > 4
