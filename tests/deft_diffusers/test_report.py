"""The report in a real browser: what it shows, what a click does, and that it needs nothing but itself."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import PROMPTS, UNRELATED, write_comparison
from deft_diffusers.evaluation import figures, report
from deft_diffusers.families import load_family
from deft_diffusers.options import SampleOptions
from deft_diffusers.sample import sample
from PIL import Image

import deft_kernels as dk

PLAIN, BEACH, SNOW, FOREST = PROMPTS
EVIL = 'PaRa <i onclick="x">&amp;</i>'
ROWS = (("base", "base", None), ("DEFT (rank=8)", "deft", 8), ("LoRA (rank=4)", "lora", 4), (EVIL, "para", 4))
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()  # fmt: skip


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison with a job that failed, one that is not scored, a picture that is gone, and a strip of two weights."""
    root = tmp_path_factory.mktemp("comparison")
    figure = {"title": "Tom & <Jerry>", "subjects": ["cat"], "rows": ["base", EVIL], "prompts": [SNOW]}
    results = write_comparison(root, rows=ROWS, seeds=(0, 1), figures={1: figure})
    jobs = {row["job"]: row for row in results["rows"]}
    failed = jobs["cat/lora-r4-seed1"]
    failed.update(status="failed", said="CUDA <out> of memory", scores={}, by_prompt={}, training={})
    shutil.rmtree(root / failed["folder"])
    unscored = jobs["dog/deft-r8-seed0"]
    unscored.update(scores={}, by_prompt={}, missing=[{"what": "CLIP-I", "why": "no encoder"}])
    (root / unscored["folder"] / "scores.json").unlink()
    (root / "dog/base/samples/0001.png").unlink()
    for weight in (1.0, 0.25):
        folder = root / f"cat/deft-r8-seed0/strength/{weight:g}"
        shutil.copytree(root / "cat/deft-r8-seed0/samples", folder)
        record = json.loads((folder / "samples.json").read_text())
        record["settings"]["adapter_weight"] = [weight]
        (folder / "samples.json").write_text(json.dumps(record | {"samples": record["samples"][1:2]}))
    figures.draw_all(root, results, results["plan"])
    report.write(root, results)
    return root, results


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright").sync_playwright
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("needs Chromium: a package of the system, or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(comparison, browser):
    """Opens the report; what it asked for and what went wrong is checked at the end."""
    opened, asked, wrong = [], [], []

    def run(**settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((comparison[0] / report.REPORT).as_uri())
        opened.append(context)
        return page

    yield run
    for context in opened:
        context.close()
    pages = [url for url in asked if not url.startswith("data:")]
    assert pages == [(comparison[0] / report.REPORT).as_uri()] * len(opened)
    assert wrong == []


def thumb(page, row, template, subject="cat", seed="0"):
    places = {"subject": subject, "row": row, "prompt": template} | ({} if row == "base" else {"seed": seed})
    quoted = "".join(f"[data-{key}={json.dumps(value)}]" for key, value in places.items())
    return page.locator(f"#gallery .shot{quoted}")


def test_everything_is_on_the_page(visit, comparison):
    page, (_, results) = visit(), comparison
    assert page.title() == page.locator("h1").inner_text() == "Comparison on toyworld"
    anchors = page.locator("nav a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert anchors == [f"#{id}" for id in page.locator("h2").evaluate_all("heads => heads.map(h => h.id)")]
    assert anchors == [
        "#noise",
        "#tables",
        "#plots",
        "#figures",
        "#pictures",
        "#strength",
        "#costs",
        "#settings",
        "#missing",
    ]
    photographs, drawn = 2 * 3, (len(results["rows"]) - 1) * (len(PROMPTS) + 1)
    assert page.locator("#gallery .shot").count() == photographs + drawn
    assert page.locator("output").inner_text() == f"{photographs + drawn} of {photographs + drawn} pictures"
    assert page.locator(".plot svg").count() == 3
    assert page.locator("main img:not([loading=lazy])").count() == 0  # a page of thousands decodes what is looked at
    pictures = """async all => {
        for (const image of all) image.loading = "eager";
        await Promise.all(all.map(image => image.decode()));
        return all.filter(image => image.naturalWidth > 0).length;
    }"""
    assert page.locator("main img").evaluate_all(pictures) == photographs + drawn - 1 + 2 + 1  # one gone, strip, figure
    for said in ("c7afd82", "AMD EPYC, 2 threads", "0123456789abcdef", "2.13.0", "learning_rate", "protocol", "dreambooth"):
        assert said in page.locator("main").inner_text()
    costs = page.locator("#costs ~ .scroll tbody tr").all_inner_texts()
    assert costs[0].split("\t") == ["DEFT (rank=8)", "2", "987,648", "0.400", "500", "62 ± 6", "8.2"]
    assert costs[1].split("\t")[:2] == ["LoRA (rank=4)", "1"]  # the job that failed has told nothing
    made = page.locator("dl").first.inner_text()
    assert "commit: b5e1f00; jobs: 2; first: 2026-11-22; last: 2026-11-23\ndrawn\ncommit: not recorded; jobs: 2\n" in made
    assert "tables, figures and this page\ncommit: c7afd82; time: 2026-11-23T22:40:00+00:00" in made


def test_what_is_missing_is_said_with_the_reason(visit):
    page = visit()
    assert page.locator("#missing ~ ul li").all_inner_texts() == [
        "cat/lora-r4-seed1: failed. CUDA <out> of memory",
        "scores of dog/deft-r8-seed0: nothing has scored it",
        "dog/deft-r8-seed0, CLIP-I: no encoder",
        "dog/base/samples/0001.png: it is not there",
    ]
    assert thumb(page, "base", BEACH, "dog").inner_text().startswith("missing")
    assert thumb(page, "DEFT (rank=8)", BEACH, "dog").locator("img").count() == 1  # drawn, if not scored
    noise = " ".join(page.locator("#noise ~ p").all_inner_texts())
    assert "2 training seeds (0, 1)" in noise and "8.98 standard deviations" in noise  # 12.706 / sqrt(2)


def test_texts_are_text(visit):
    page = visit()
    assert page.locator("main :is(b, i, out)").count() == 0
    assert page.locator("h3", has_text=EVIL).count() == 4
    assert page.locator("select[name=prompt] option").all_inner_texts() == [
        "all", *(text.replace("{}", "[V]") for text in (*PROMPTS, UNRELATED))
    ]  # fmt: skip
    assert EVIL in page.locator(".plot svg").first.inner_html().replace("&lt;", "<").replace("&gt;", ">").replace(
        "&amp;", "&"
    )
    thumb(page, EVIL, SNOW).click()
    assert page.locator("#shown").inner_text() == SNOW.replace("{}", "sks cat")


def test_a_click_shows_a_picture_and_the_keys_go_on(visit, comparison):
    page, (root, _) = visit(), comparison
    shot, dialog = thumb(page, "DEFT (rank=8)", SNOW, seed="1"), page.locator("dialog")
    assert not dialog.is_visible()
    shot.click()
    assert dialog.is_visible()
    assert page.locator("#shown").inner_text() == SNOW.replace("{}", "sks cat")
    facts = "cat · DEFT (rank=8) · training seed 1 · picture seed 0"
    assert page.locator("dialog .facts").inner_text() == (
        f"{facts} · CLIP-I 0.83 · CLIP-T 0.31 · DINOv2 0.71 · this individual: yes · that scene: no"
    )
    file = "cat/deft-r8-seed1/samples/0002.png"
    assert page.locator("dialog .file").inner_text() == file and page.locator("dialog a").count() == 0  # it may not be there
    source = page.locator("dialog img").get_attribute("src")
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (root / file).read_bytes()
    page.keyboard.press("ArrowRight")
    assert page.locator("#shown").inner_text() == FOREST.replace("{}", "sks cat")
    page.keyboard.press("ArrowLeft")
    page.get_by_text("← previous").click()
    assert page.locator("#shown").inner_text() == BEACH.replace("{}", "sks cat")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    focused = page.evaluate("document.activeElement.dataset.prompt")
    assert focused == BEACH  # where one was
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    page.get_by_text("close").click()
    assert not dialog.is_visible()
    page.locator("#gallery button.shot").first.click()
    page.keyboard.press("ArrowLeft")  # round to the last
    counted = page.locator("#gallery button.shot").count()
    assert page.locator("dialog .bar span").inner_text() == f"{counted} / {counted}"
    page.mouse.click(5, 5)  # beside it
    assert not dialog.is_visible()
    thumb(page, "DEFT (rank=8)", UNRELATED).click()
    assert "unrelated to the subject" in page.locator("dialog .facts").inner_text()


def test_strips_and_figures_are_shown_in_their_own_order(visit):
    page = visit()
    strip = page.locator("#strength ~ section")
    assert strip.count() == 1
    assert strip.locator(".shot span").all_inner_texts() == ["0.25", "1"]
    strip.locator(".shot").first.click()
    assert page.locator("dialog .facts").inner_text().endswith("weight 0.25")
    assert page.locator("dialog .bar span").inner_text() == "1 / 2"
    page.keyboard.press("Escape")
    page.locator(".figure").click()
    assert page.locator("#shown").inner_text() == "Figure 1. Tom & <Jerry>"
    box = page.locator("dialog img").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 900


def column(page, k):
    return page.locator("#table1-table tbody tr").evaluate_all(f"rows => rows.map(row => row.cells[{k}].textContent.trim())")


def test_tables_are_sorted_by_a_click(visit):
    page = visit()
    before = column(page, 0)
    assert before[:3] == ["DEFT (rank=8)", "DEFT (rank=4)", "PaRa (rank=4)"]
    head = page.locator("#table1-table th", has_text="cat").first
    for direction, sign in (("descending", -1), ("ascending", 1)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        shown = column(page, 2)
        numbers = [float(text.split()[0]) for text in shown if text[0] != "—"]
        assert len(numbers) == 3 and numbers == sorted(numbers, key=lambda n: sign * n)
        assert all(text[0] == "—" for text in shown[3:])  # what is missing, last
    noted = page.locator("#table1-table tbody td:last-child", has_text="0.8780")
    assert noted.locator("sup").count() == 1 and noted.get_attribute("data-value") == "0.8780"  # without the note's number
    noted.evaluate("cell => { cell.dataset.value = 2; }")
    page.locator("#table1-table th", has_text="printed DOG8").locator("button").click()
    assert column(page, 0)[0] == "PaRa (rank=4)"
    names = page.locator("#table1-table th").first
    names.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(page, 0) == sorted(before, key=str.casefold)
    assert head.get_attribute("aria-sort") == "none"


def test_filters_hide_what_is_not_wanted(visit):
    page = visit()
    visible = page.locator("#gallery .shot:visible")
    page.select_option("select[name=row]", "DEFT (rank=8)")
    page.select_option("select[name=subject]", "dog")
    page.select_option("select[name=seed]", "1")
    # the photographs have no row and no seed: they stay, to be compared with
    assert visible.count() == 3 + len(PROMPTS) + 1
    assert page.locator("#gallery .job:visible h3").all_inner_texts()[0] == "dog · photographs"
    assert page.locator("#gallery .job:visible").count() == 2
    page.select_option("select[name=prompt]", SNOW)
    assert visible.count() == 3 + 1
    assert page.locator("output").inner_text().startswith("4 of ")
    visible.last.click()
    assert page.locator("dialog .bar span").inner_text() == "4 / 4"
    page.keyboard.press("Escape")
    for name in report.FILTERS:
        page.select_option(f"select[name={name}]", "")
    assert visible.count() == page.locator("#gallery .shot").count()


def test_a_page_of_many_pictures_begins_with_some(tmp_path, browser):
    results = write_comparison(tmp_path, ("cat", "dog"), ROWS[:2], (0, 1), {PLAIN: "field"})
    for record in (*tmp_path.rglob("samples.json"), *tmp_path.rglob("scores.json")):
        told = json.loads(record.read_text())
        told["samples"] = [told["samples"][0] | {"seed": k} for k in range(40)]
        record.write_text(json.dumps(told))
    page = browser.new_page()
    page.goto(report.write(tmp_path, results).as_uri())
    assert [page.locator(f"select[name={name}]").input_value() for name in report.FILTERS] == ["cat", "", "0", ""]
    assert page.locator("output").inner_text() == "83 of 246 pictures"  # photographs, base, DEFT
    page.select_option("select[name=seed]", "")
    assert page.locator("output").inner_text() == "123 of 246 pictures"
    page.close()


def test_points_tell_what_they_are_to_mouse_and_keyboard(visit):
    page = visit()
    tip, point = page.locator("#tip"), page.locator(".plot").first.locator("[tabindex]")
    assert point.count() == 8
    assert not tip.is_visible()
    point.nth(1).focus()
    assert re.fullmatch(r"DEFT \(rank=8\), cat: CLIP-T 0\.\d+ ± 0\.\d+, DINOv2 0\.\d+ ± 0\.\d+; 2 seeds", tip.inner_text())
    point.nth(0).hover(force=True)
    assert tip.inner_text().startswith("base, cat: CLIP-T")
    page.mouse.move(1, 1)
    assert not tip.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(visit, scheme):
    page = visit(color_scheme=scheme)
    shown = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert np.median(shown) > 240 if scheme == "light" else np.median(shown) < 40
    colours = page.evaluate("""() => ['ink', 'soft', 'accent', 'paper', 'card'].map(name => {
        document.body.style.color = `var(--${name})`;
        return getComputedStyle(document.body).color.match(/[0-9]+/g).map(Number);
    })""")

    def light(rgb):  # WCAG 2.2, relative luminance
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    *texts, paper, card = map(light, colours)
    for ground in (paper, card):
        for text in texts:
            assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5  # its level AA


def test_a_narrow_window_shows_all_of_it(visit):
    page = visit(viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    thumb(page, "base", SNOW).click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    image = page.locator("dialog img").bounding_box()
    assert image["width"] > 250
    assert page.get_by_text("close").is_visible()


def test_it_is_accessible(visit):
    page = visit()
    assert page.locator("main img:not([alt]), main img[alt='']").count() == 0
    alt = thumb(page, "DEFT (rank=8)", SNOW).locator("img").get_attribute("alt")
    assert alt.startswith("cat · DEFT (rank=8) · training seed 0") and alt.endswith(SNOW.replace("{}", "sks cat"))
    ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    markers = "all => all.every(use => document.getElementById(use.href.baseVal.slice(1)))"
    assert page.locator(".plot use").evaluate_all(markers)
    assert page.get_by_role("rowheader", name="DEFT (rank=8)").count() >= 2
    assert page.get_by_role("button", name=alt, exact=True).count() == 1  # the prompt is not read twice
    for note in page.locator("sup a").all():
        target = page.locator(f"[id='{note.get_attribute('href')[1:]}']")
        assert target.inner_text() == note.get_attribute("title")
    for select in page.locator("select").all():
        assert select.evaluate("select => select.labels.length") == 1


# how it is made -----------------------------------------------------------------------------------------------------


def test_a_page_of_one_seed_claims_no_interval(tmp_path):
    results = write_comparison(tmp_path, ("cat",), ROWS[:2], (3,), {PLAIN: "field"})
    (text,) = re.findall(r"No row has [^<]*", report.write(tmp_path, results).read_text())
    assert text == (
        "No row has more than one of the training seed (3): no interval can be given, and no difference told from chance."
    )


def test_subjects_models_and_options_are_those_of_the_comparison(tmp_path):
    spec = {"subjects": ["cat"], "rows": ["base"], "prompts": [PLAIN]}
    results = write_comparison(tmp_path, ("cat",), ROWS[:2], (0,), {PLAIN: "field"}, figures={1: spec})
    results["parts"][""]["subjects"] = {"cat": "Kitten 2"}
    results["settings"]["pretrained_model_name_or_path"] = "mine"  # a flag, which comes before the plan
    (tmp_path / "cat/base/job.json").unlink()  # has not run
    page = report.write(tmp_path, results).read_text()
    for said in ("Kitten 2 · DEFT (rank=8) · training seed 0", '<option value="cat">Kitten 2</option>', "Kitten 2 (cat)",
                 "Figure 1. Kitten 2", "Kitten 2 · photograph", "<h1>Comparison on mine</h1>"):  # fmt: skip
        assert said in page
    assert "cat · " not in page and "photographs of cat" not in page
    made = "Options of training, where they are not the defaults"
    assert dict(report._settings(results))[made] == [("DEFT (rank=8)", '{"learning_rate": 0.001}')]
    results["rows"].append(results["rows"][1] | {"part": "other", "options": {"learning_rate": 1}})
    assert dict(report._settings(results))[made] == [
        ("DEFT (rank=8)", '{"": {"learning_rate": 0.001}, "other": {"learning_rate": 1}}')
    ]


SEEDS = {
    "all": ([0, 1, 2], "a mean over 3 training seeds (0, 1, 2); ±", "2.48 standard deviations with 3 seeds. Where"),
    "some": ([0], "a mean over 1 to 3 training seeds (0, 1, 2); ±", "with 3 seeds, and is not known with one. Where"),
}


@pytest.mark.parametrize("case", SEEDS)
def test_the_page_says_how_many_seeds_a_row_has(case):
    others, *wanted = SEEDS[case]
    job = {"part": "", "subject": "cat", "called": "cat", "method": "deft", "scores": {"clip_i": 1}}
    jobs = [job | {"row": name, "seed": seed}
            for name, seeds in (("DEFT", [0, 1, 2]), ("other", others)) for seed in seeds]  # fmt: skip
    assert all(text in report._noise({"rows": jobs})[0] for text in wanted)


@pytest.fixture
def noise(tmp_path):
    """Pictures that no format makes small, and how many bytes each takes on the page as it is."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (600, 300, 3), dtype=np.uint8)).save(file)
    return files, files[0].stat().st_size * 4 / 3


def test_pictures_are_as_large_as_the_budget_allows(noise):
    files, size = noise
    assert report.choose_side(files, 3.1 * size) is None
    assert report.choose_side(files, 2.9 * size) == 1024  # as WebP, of the same width and height
    assert report.choose_side(files, 0.02 * size) == 128
    assert report.choose_side(files, 0) == report.SIDES[-1]
    assert report.choose_side([], 0) is None


def test_embedded_pictures_are_files_or_small_webps(noise):
    (file, *_), _ = noise
    kind, data = report.encode(file, None).split(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:image/png", file.read_bytes())
    whole = Image.open(io.BytesIO(base64.b64decode(report.encode(file, 600).split(",")[1])))
    assert (whole.format, whole.size) == ("WEBP", (300, 600))
    kind, data = report.encode(file, 256).split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, image.format, image.size) == ("data:image/webp", "WEBP", (128, 256))


def test_drawings_that_are_smaller_as_they_are_stay_so(tmp_path):
    board = Image.fromarray(np.indices((64, 64)).sum(0) % 2 == 0)
    board.save(tmp_path / "board.png")
    assert report.encode(tmp_path / "board.png", 512) == report.encode(tmp_path / "board.png", None)


def test_photographs_are_shown_as_any_browser_and_camera_has_them(tmp_path):
    image = Image.new("RGB", (64, 32), "red")
    image.save(tmp_path / "print.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.resize((640, 320)).save(tmp_path / "turned.jpg", exif=exif)
    kind, data = report.encode(tmp_path / "print.tif", None).split(";base64,")
    assert (kind, Image.open(io.BytesIO(base64.b64decode(data))).size) == ("data:image/webp", (64, 32))
    _, data = report.encode(tmp_path / "turned.jpg", 64).split(";base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 64)


@pytest.mark.parametrize("side", [64, 600])
def test_a_page_over_the_budget_is_made_smaller_and_says_so(tmp_path, side):
    rng = np.random.default_rng(0)
    shots, missing = [], []
    for k in range(3):
        shots.append({"path": tmp_path / f"{k}.png", "file": f"{k}.png"})
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(shots[-1]["path"])
    budget = 0.9 * 4 * side * side * len(shots)  # three bytes a pixel are four as text
    said = report._embed(shots, missing, budget)
    assert re.search(r"are WebP and at most (1024|512) pixels wide and high, \d+ MB in all", said)
    assert sum(len(shot["uri"]) for shot in shots) <= budget and missing == []


def test_half_a_picture_is_missing(noise):
    (file, *_), _ = noise
    file.write_bytes(file.read_bytes()[:1000])
    shot, missing = {"path": file, "file": "0.png"}, []
    report._embed([shot], missing)
    assert missing == [("0.png", "it is no picture")] and "uri" not in shot


# strength -----------------------------------------------------------------------------------------------------------


ROW = {"job": "cat/deft", "subject": "cat", "called": "cat", "row": "DEFT", "method": "deft", "rank": 2, "seed": 0,
       "status": "done", "folder": "cat/deft"}  # fmt: skip
PLAN = {"strengths": {"subjects": ["cat"], "rows": ["DEFT"], "prompts": ["{} in the snow"]}}
WEIGHTS = ["0", "0.25", "0.5", "0.75", "1", "1.25"]


def write_job(folder, method):
    told = {"method": method, "drawn": {"prompt": ["{}", "{} in the snow"]}}
    (folder / "job.json").write_text(json.dumps(told))


def picture(file):
    return np.asarray(Image.open(file), int)


def test_strengths_go_from_the_base_to_the_adapter_and_beyond(one_thread, tiny, tmp_path):
    folder = tmp_path / "cat" / "deft"
    model = load_family(str(tiny), torch.float32).model
    torch.manual_seed(0)
    dk.inject_adapter(model, dk.DeftConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for group in dk.adapter_parameters(model).values():
            for p in group:
                p.add_(torch.randn_like(p))
    dk.save_adapter(model, folder)
    options = SampleOptions(
        pretrained_model_name_or_path=str(tiny), adapter=[str(folder)], prompt=["a cat", "snow"], seed=7,
        num_inference_steps=2, num_images_per_prompt=2, batch_size=1, output_dir=str(folder / "samples"),
    )  # fmt: skip
    sample(options)
    write_job(folder, "deft")

    assert report.draw_strengths(tmp_path, {"rows": [ROW]}, PLAN) == []
    drawn = {path.name: picture(path / "0000.png") for path in (folder / "strength").iterdir()}
    assert sorted(drawn, key=float) == WEIGHTS
    assert np.array_equal(drawn["1"], picture(folder / "samples/0002.png"))  # the first of the second prompt
    base = dataclasses.replace(options, adapter=[], output_dir=str(tmp_path / "base"))
    assert np.array_equal(drawn["0"], np.asarray(sample(base)[2], int))
    away = {weight: np.abs(drawn[weight] - drawn["0"]).mean() for weight in WEIGHTS}
    assert away["0.25"] < away["1"] and len({p.tobytes() for p in drawn.values()}) == len(WEIGHTS)

    shutil.rmtree(folder / "strength/0.5")
    os.utime(folder / "strength/1/samples.json", (0, 0))  # older than the samples: the job was trained again
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("strength/*/*.png")}
    assert report.draw_strengths(tmp_path, {"rows": [ROW]}, PLAN) == []
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("strength/*/*.png")}
    drawn = {path.parent.name for path in again if path.name == "0000.png" and again[path] != times.get(path)}
    assert drawn == {"0.5", "1"}
    times = again
    assert report.draw_strengths(tmp_path, {"rows": [ROW]}, PLAN) == []
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("strength/*/*.png")}
    (strip,) = report._strips(tmp_path, {"rows": [ROW]})
    assert [shot["label"] for shot in strip["shots"]] == WEIGHTS
    assert strip["scores"] == "snow" and "picture seed 7" in strip["shots"][2]["facts"]


LACKING = {
    "no job": ({"rows": ["LoRA"]}, {}, "cat, LoRA: there is no such job"),
    "not done": ({}, {"status": "failed"}, "cat, DEFT: the job is not done"),
    "no picture": ({"prompts": ["{} on the beach"]}, {}, "has no picture of '{} on the beach'"),
    "a word": ({}, {"method": "textual_inversion"}, "cat, DEFT: textual_inversion has no strength"),
}


@pytest.mark.parametrize("case", LACKING)
def test_strengths_that_cannot_be_drawn_are_named(case, tmp_path, capsys):
    spec, changes, message = LACKING[case]
    folder, record = tmp_path / "cat" / "deft", {"file": "0000.png", "prompt": "snow", "seed": 0}
    (folder / "samples").mkdir(parents=True)
    write_job(folder, changes.get("method", "deft"))
    told = {"settings": {"prompt": ["a cat", "snow"]}, "samples": [record]}
    (folder / "samples/samples.json").write_text(json.dumps(told))
    (missing,) = report.draw_strengths(tmp_path, {"rows": [ROW | changes]}, {"strengths": PLAN["strengths"] | spec})
    assert missing.startswith("strengths: ") and message in missing
    assert f"warning: {missing}" in capsys.readouterr().err
    assert not (folder / "strength").exists()


def test_a_plan_without_strengths_asks_for_none():
    assert report.draw_strengths("nowhere", {"rows": []}, {}) == []
