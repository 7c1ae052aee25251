"""The tables of a comparison: means and intervals by hand, what was printed, what is missing, three ways to write them."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from deft_diffusers.evaluation import tables
from deft_diffusers.evaluation.metrics import mean_interval

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = json.loads((Path(tables.__file__).with_name("published.json")).read_text())
DONE = {"status": "done", "said": "", "missing": []}


def job(row, seed, subject="dog", method="deft", part="table1", scores=None, **more):
    scores = scores or {}
    about = {"job": f"{subject}/{method}-seed{seed}", "subject": subject, "row": row, "method": method, "seed": seed}
    training = {"parameters": 1234567, "seconds": 20.0 + seed, "memory_gb": None}  # which no column is made of
    return DONE | about | {"part": part, "scores": scores, "by_prompt": {"a {}": scores}, "training": training} | more


def results(*rows, subjects=("dog",), part="table1", protocol="dreambooth", scale=1.0, **names):
    about = {"model": "a model", "protocol": protocol, "scale": scale,
             "subjects": dict.fromkeys(subjects) | names, "prompts": ["a {}"],
             "unrelated": [], "encoders": {"clip": {"id": "a/b_c"}}}  # fmt: skip
    return {"parts": {part: about}, "rows": list(rows), "published": PUBLISHED}


def deft(*values, row="DEFT (rank=8)", **more):
    return [job(row, seed, scores={"clip_i": value}, **more) for seed, value in enumerate(values)]


def one(how, found, name):
    return how({name: tables.build(found)[name]})


def lines_of(table):
    return {labels[0]: cells for labels, cells in table.lines}


def test_mean_and_interval_over_seeds():
    found = results(*deft(0.80, 0.82, 0.87), *deft(0.5, row="PaRa (rank=8)"))
    lines = lines_of(tables.build(found)["table1"])
    cell = lines["DEFT (rank=8)"][0]
    # mean 0.83, deviation √(0.0026/2) = 0.0360555, t of 2 degrees 4.302653: ± 4.302653 · 0.0360555 / √3
    assert (cell.mean, cell.n) == (pytest.approx(0.83), 3) and cell.half == pytest.approx(0.0895668, abs=1e-6)
    assert cell.shown == "0.8300 ± 0.0896" and mean_interval([0.80, 0.82, 0.87])[1] == cell.half
    assert lines["PaRa (rank=8)"][0].shown == "0.5000"  # of one seed there is no interval


def test_table_1_has_the_supplements_rows_and_figures():
    table = tables.build(results(*deft(0.8), *deft(0.7, row="Mine")))["table1"]
    assert [labels[0] for labels, _ in table.lines] == [
        "DEFT (rank=8)", "DEFT (rank=4)", "PaRa (rank=4)", "PaRa (rank=8)", "LoRA (rank=4)", "LoRA (rank=8)", "SVDiff",
        "DreamBooth", "Textual Inversion", "Mine",
    ]  # fmt: skip
    lines = lines_of(table)
    assert [cell.text for cell in lines["DEFT (rank=4)"][1:]] == ["0.8339", "0.9280", "0.8721"]  # digits as printed
    assert [cell.text for cell in lines["PaRa (rank=4)"][1:]] == ["0.8271", "0.9315", "0.8780"]
    assert lines["PaRa (rank=4)"][3].note == "the supplement's prose gives 0.8838" and not lines["DEFT (rank=4)"][3].note
    assert lines["DEFT (rank=4)"][0].note == "not in this plan" and lines["Mine"][1].note == "not in the supplement"
    assert table.columns == ["dog", "printed BEAR_PLUSHIE", "printed CAT", "printed DOG8"]
    assert "a [V]" in table.caption and "clip a/b_c" in table.caption and "0 to 1" in table.caption


def test_table_1_of_the_data_sets_own_prompts_is_of_all_of_them():
    found = results(job("DEFT (rank=8)", 0, scores={"clip_i": 0.6}, by_prompt={"a {}": {"clip_i": 0.5}}))
    assert lines_of(tables.build(found)["table1"])["DEFT (rank=8)"][0].mean == 0.5
    found["parts"]["table1"]["prompts"] = "captions"
    table = tables.build(found)["table1"]
    assert lines_of(table)["DEFT (rank=8)"][0].mean == 0.6 and table.caption.startswith("CLIP-I of all the data set's")


def test_table_2_puts_an_image_beside_the_one_that_was_printed():
    scores = {"clip_i": 80.0, "clip_t": 30.0, "dinov1": 70.0, "dinov2": 60.0}
    more = {"part": "table2", "scores": scores, "subject": "live_00_kitten"}
    found = results(job("DEFT (rank=8)", 0, **more), job("DEFT (rank=4)", 0, **more), part="table2", protocol="dreambench++",
                    scale=100.0, subjects=(), live_00_kitten="Kitten 2")  # fmt: skip
    table = tables.build(found)["table2"]
    lines = {tuple(labels[:2]): [cell.shown for cell in cells] for labels, cells in table.lines}
    printed = ["77.8501", "65.0358", "77.6003", "36.7579"]
    for row in ("DEFT (rank=8)", "DEFT (rank=4)"):
        assert lines[row, "Kitten 2"] == ["70.00", "60.00", "80.00", "30.00", *printed]
    assert lines["LoRA", "HORSE"] == ["—"] * 4 + ["83.5538", "72.2653", "81.3446", "34.1923"]
    assert len(lines) == 3 * 4  # two ranks, and LoRA
    notes = " ".join(table.notes())
    assert "the same figures for 'Kitten 2' and 'HORSE'" in notes and "prose compares" in notes


def test_what_is_missing_is_a_dash_with_its_reason():
    failed = {"status": "failed", "said": "out of | memory", "scores": {}, "by_prompt": {}}
    unread = {"missing": [{"what": "0001.png", "why": "cannot be read"}]}
    rows = [*deft(0.8, 0.9), *deft(0.5, 0.6, row="LoRA (rank=8)", method="lora")]
    rows += [job("SVDiff", 0, method="svdiff", **failed), job("DreamBooth", 0, method="dreambooth", scores={"clip_t": 0.3})]
    found = results(*rows)
    found["rows"][3] |= failed
    found["rows"][1] |= unread
    lines = lines_of(tables.build(found)["table1"])
    assert (lines["SVDiff"][0].shown, lines["SVDiff"][0].note) == ("—", "dog/svdiff-seed0 failed: out of | memory")
    assert (lines["LoRA (rank=8)"][0].n, lines["LoRA (rank=8)"][0].note) == (1, "dog/lora-seed1 failed: out of | memory")
    assert (lines["DEFT (rank=8)"][0].n, lines["DEFT (rank=8)"][0].note) == (2, "dog/deft-seed1: 0001.png: cannot be read")
    assert lines["DreamBooth"][0].note == "no CLIP-I"
    text = one(tables._markdown, found, "table1")
    (row,) = (line for line in text.splitlines() if line.startswith("| SVDiff"))
    number = re.match(r"\| SVDiff \|  \| — \[(\d)\] \| 0.7818", row)[1]
    assert f"[{number}] dog/svdiff-seed0 failed: out of | memory" in text and row.count("|") == 7


def test_all_is_the_mean_over_subjects_of_the_seeds_that_all_have():
    rows = [*deft(0.8, 0.6, 0.7), *deft(0.4, 0.2, subject="cat"), job("DEFT (rank=8)", 2, "cat", status="failed"),
            *deft(0.9, row="only dog")]  # fmt: skip
    table = tables.build(results(*rows, subjects=("dog", "cat")))["scores"]
    lines = {tuple(labels[:2]): cells for labels, cells in table.lines}
    assert (
        lines["all", "DEFT (rank=8)"][0].mean == pytest.approx((0.6 + 0.4) / 2) and lines["all", "DEFT (rank=8)"][0].n == 2
    )
    assert "cat/deft-seed2 failed" in lines["all", "DEFT (rank=8)"][0].note
    assert ("all", "only dog") not in lines and lines["dog", "only dog"][0].mean == 0.9
    assert table.columns == ["CLIP-I"]


def test_costs_are_of_every_trained_row():
    rows = [*deft(0.8, 0.6, 0.7), *deft(0.4, 0.2, row="only dog"), job("base", 0, method="base", training={})]
    table = tables.build(results(*rows))["costs"]
    assert table.columns == ["parameters", "training s"] and list(lines_of(table)) == ["DEFT (rank=8)", "only dog"]
    assert [cell.shown for cell in lines_of(table)["DEFT (rank=8)"]] == ["1,234,567", "21 ± 2"]
    assert one(tables._csv, results(*rows), "costs").startswith("method,n,parameters,parameters ±,parameters n,training s,")


def test_a_word_that_changes_no_weight_is_not_the_best_at_forgetting_nothing():
    word = {"row": "Textual Inversion", "method": "textual_inversion"}
    rows = [job(scores={"drift": drift}, seed=seed, **about)
            for about, drift in ((word, 1e-9), ({"row": "a"}, 0.1), ({"row": "b"}, 0.2)) for seed in (0, 1)]  # fmt: skip
    lines = {labels[1]: cells[0] for labels, cells in tables.build(results(*rows))["scores"].lines}
    assert lines["Textual Inversion"].shown == "0.0000" and lines["Textual Inversion"].note == tables.UNMOVED
    assert [name for name, cell in lines.items() if cell.best] == ["a"]


def test_a_caption_tells_model_stand_ins_and_how_many_pictures():
    counts = {"clip_i": 8, "drift": 3}
    rows = [job("DEFT (rank=8)", seed, scores={"clip_i": 0.5, "drift": 0.1}, counts=counts,
                counts_by_prompt={"a {}": {"clip_i": 4}}) for seed in (0, 1)]  # fmt: skip
    found = results(*rows, subjects=(), dog="DOG8")
    found["parts"]["table1"]["encoders"]["judge"] = {"id": "toyworld/judge"}
    built = tables.build(found)
    for table in (built["table1"], built["scores"]):
        assert "Base model a model; protocol dreambooth, scale 0 to 1" in table.caption
        assert "drawings of the embedded world (dog), stand-ins for the printed ones (DOG8)." in table.caption
    assert "A job's figures are of 4 pictures. Mean" in built["table1"].caption
    assert "A job's figures are of 8 pictures, drift on unrelated prompts of 3. Mean" in built["scores"].caption
    assert [cell.pictures for cell in built["scores"].lines[0][1]] == [16, 6]
    (line,) = csv.DictReader(io.StringIO(one(tables._csv, found, "scores")))
    assert (line["CLIP-I pictures"], line["drift pictures"]) == ("16", "6")
    rows[0]["counts"] = {"clip_i": 7, "drift": 3}
    del rows[1]["counts"]
    said = "are of 7 or an unknown number of pictures, drift on unrelated prompts of 3 or an unknown number. Mean"
    assert said in tables.build(found)["scores"].caption
    del found["parts"]["table1"]["encoders"]["judge"]
    assert "stand-ins" not in tables.build(found)["table1"].caption  # of photographs

@pytest.mark.parametrize(
    "a, b, best",
    [
        ((0.80, 0.81), (0.40, 0.41), "a"),
        ((0.40, 0.41), (0.80, 0.81), "b"),
        ((0.80, 0.81), (0.75, 0.82), None),
        ((0.80, 0.82), (0.60, 0.62), None),  # ± 0.127 both
        ((0.8,), (0.4,), None),
    ],
    ids=["first", "second", "overlap", "both-reach", "one-seed"],
)
def test_bold_is_what_no_interval_reaches(a, b, best):
    table = tables.build(results(*deft(*a, row="a"), *deft(*b, row="b"), *deft(0.99, row="of one seed")))["table1"]
    assert [name for name, cells in lines_of(table).items() if cells[0].best] == ([best] if best else [])
    low = [job(row, seed, scores={"drift": v}) for row, values in (("a", a), ("b", b)) for seed, v in enumerate(values)]
    lines = {labels[1]: cells for labels, cells in tables.build(results(*low))["scores"].lines}
    assert [name for name, cells in lines.items() if cells[0].best] == ([{"a": "b", "b": "a"}[best]] if best else [])


def test_bold_is_of_a_subject_and_of_rows_to_compare():
    dog, cat = {"subject": "dog"}, {"subject": "cat"}
    rows = [*deft(0.9, 0.91, row="a", **dog), *deft(0.5, 0.51, row="b", **dog), *deft(0.3, 0.31, row="a", **cat),
            *deft(0.1, 0.11, row="b", **cat)]  # fmt: skip
    built = tables.build(results(*rows, subjects=("dog", "cat")))
    assert [(*labels[:2],) for labels, cells in built["scores"].lines if cells[0].best] == [
        ("all", "a"), ("dog", "a"), ("cat", "a")]  # fmt: skip
    assert [cell.best for cell in lines_of(built["table1"])["a"][:2]] == [True, True]
    plus = {"part": "table2", "subjects": ("dog", "cat"), "protocol": "dreambench++", "scale": 100.0}
    second = tables.build(results(*(row | {"part": "table2"} for row in rows), **plus))["table2"]
    assert [(*labels[:2],) for labels, cells in second.lines if any(c.best for c in cells)] == [("a", "dog"), ("a", "cat")]
    alone = tables.build(results(*deft(0.9, 0.91), *deft(0.5, row="of one seed")))["table1"]
    assert not any(cell.best for _, cells in alone.lines for cell in cells)


def test_subjects_have_their_published_names():
    built = tables.build(results(*deft(0.8, subject="live_00"), *deft(0.7), subjects=("dog",), live_00="Kitten"))
    assert built["table1"].columns[:2] == ["dog", "Kitten"]
    assert [labels[0] for labels, _ in built["scores"].lines] == ["all", "dog", "Kitten"]


def test_csv_has_numbers_and_reasons():
    found = results(*deft(0.8, 0.9), job("SVDiff", 0, status="failed", said='a "quoted", text', scores={}))
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(one(tables._csv, found, "table1")))}
    assert (rows["DEFT (rank=8)"]["dog"], rows["DEFT (rank=8)"]["dog ±"], rows["DEFT (rank=8)"]["dog n"]) == (
        "0.85",
        "0.63531",
        "2",
    )
    assert rows["DEFT (rank=8)"]["dog pictures"] == ""  # not known
    assert rows["DEFT (rank=8)"]["printed CAT"] == "0.9504" and rows["SVDiff"]["dog"] == ""
    nothing = one(tables._csv, results(subjects=("dog",)), "table1")
    assert list(csv.DictReader(io.StringIO(nothing)).fieldnames) == list(rows["SVDiff"])  # whatever is there
    assert 'failed: a "quoted", text' in rows["SVDiff"]["notes"]
    assert [rows["SVDiff"][name] for name in tables.FACTS] == ["a model", "dreambooth", "1.0", "clip a/b_c"]


def test_csv_tells_the_scale_of_every_line():
    plus = {"part": "table2", "protocol": "dreambench++", "scale": 100.0}
    one, other = results(*deft(0.8)), results(*deft(80.0, part="table2"), **plus)
    both = one | {"parts": one["parts"] | other["parts"], "rows": one["rows"] + other["rows"]}
    found = {name: table for name, table in tables.build(both).items() if name.startswith("scores-")}
    assert [table.facts["scale"] for table in found.values()] == ["1.0", "100.0"]  # never in one table that is sorted
    rows = csv.DictReader(io.StringIO(tables._csv(found)))
    found = {row["table"]: (row["protocol"], row["scale"], row["CLIP-I"]) for row in rows}
    assert found == {"table1": ("dreambooth", "1.0", "0.8"), "table2": ("dreambench++", "100.0", "80")}


def test_latex_takes_no_text_for_its_own():
    assert tables.tex("--rank 8 — x") == "-{}-rank 8 --- x"
    assert tables.tex("45%|████▌ → é") == r"45\%\textbar{}????? $\to$ é"  # pdflatex has no such signs
    assert tables.tex("[a] *") == "{[}a] {*}"  # either may begin a line, after the end of one


HOSTILE = r"50 % of a_b & c#1 {x} $y$ ~^\ <“…”> | `é` ██▌ →"


def test_latex_is_balanced_and_escaped():
    found = results(
        *deft(0.9, 0.91), *deft(0.1, 0.11, row=HOSTILE), job("SVDiff", 0, status="failed", said=HOSTILE), dog_8=None
    )
    text = one(tables._latex, found, "table1")
    assert re.findall(r"\\(begin|end)\{([a-z*]+)\}", text) == [
        ("begin", "table*"), ("begin", "tabular"), ("end", "tabular"), ("end", "table*")]  # fmt: skip
    scaled = next(line for line in text.splitlines() if line.startswith(r"\resizebox"))
    text = text.replace(r"\shortstack[r]", "").replace(r"printed\\", "printed ")  # of the columns' heads
    bare = re.sub(r"\\[\\{}$&%#_]", "", text.replace(scaled, "{"))  # without what is escaped
    depth = 0
    for letter in bare:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0
    assert not re.search(r"[%#~|<>`…“±—]", bare.replace("``", "")) and not re.search(r"(?<!\$)\^", bare)
    math = re.sub(r"\$[^$]*\$", "", bare)
    assert "_" not in math and "^" not in math
    body = text[text.index(r"\begin{tabular}") : text.index(r"\end{tabular}")]
    count = len(re.search(r"tabular\}\{([lr]+)\}", body)[1])
    lines = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert len(lines) == 11 and all(len(re.findall(r"(?<!\\)&", line)) == count - 1 for line in lines)
    assert r"\textbf{0.9050 $\pm$ 0.0635}" in text and r"$^{" in text
    commands = set(re.findall(r"\\([a-zA-Z]+)", text.replace(scaled, "")))
    assert commands <= {"begin", "end", "centering", "footnotesize", "caption", "label", "hline", "textbf", "pm", "par",
                        "raggedright", "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater",
                        "textbar", "ldots", "textasciigrave", "to", "setlength", "belowcaptionskip",
                        "tabcolsep", "noalign", "vskip"}  # fmt: skip


def test_latex_is_cut_where_a_page_would_be_too_small():
    rows = [one for k in range(30) for subject in ("dog", "cat") for one in deft(0.8, 0.6, row=f"row {k}", subject=subject)]
    found = results(*rows, subjects=("dog", "cat"))
    built = tables.build(found)
    for line in built["scores"].lines:
        line[1][:] = line[1] * 12
    built["scores"].columns *= 12
    pieces = tables._latex({"scores": built["scores"]}).split(r"\begin{table*}")[1:]
    assert len(pieces) == 6  # columns in two pieces, lines in three: all, dog and cat
    for piece in pieces:
        assert len(re.search(r"tabular\}\{([lr]+)\}", piece)[1]) == 3 + 6
        assert piece.count("row ") == 30  # a subject's lines stand together
    labels = re.findall(r"\\label\{([^}]*)\}", "".join(pieces))
    assert labels == ["tab:scores", *(f"tab:scores-{k}" for k in range(2, 7))]
    assert "Piece 1 of 6." in pieces[0] and "see the caption of its first piece. Piece 6 of 6." in pieces[5]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_latex_compiles_and_fits_the_page(tmp_path):
    found = results(*deft(0.1, 0.11, row=HOSTILE), job("SVDiff", 0, status="failed", said=HOSTILE), dog_8=None)
    for name, table in tables.build(found).items():
        (tmp_path / f"hostile-{name}.tex").write_text(tables._latex({name: table}))
    for path in (ROOT / "benchmarks" / "quality" / "toyworld").glob("*.tex"):
        shutil.copy(path, tmp_path)
    inputs = "".join(rf"\input{{{path.stem}}}" for path in sorted(tmp_path.glob("*.tex")))
    assert inputs.count("input") == 3 + len(list((ROOT / "benchmarks" / "quality" / "toyworld").glob("*.tex")))
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass[twocolumn]{{article}}\usepackage{{graphicx}}\begin{{document}}{inputs}\end{{document}}"
    )
    said = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert "Output written on paper.pdf" in said, said[-3000:]
    assert not re.search(r"Overfull|too large|Missing|Undefined", said), said


def test_files_are_written_for_each_table(tmp_path):
    found = results(*deft(0.8, part=""), part="")
    (tmp_path / "table2.tex").write_text("of another plan")
    assert sorted(path.name for path in tables.write(tmp_path, found)) == sorted(
        f"{name}.{kind}" for name in ("table1", "scores", "costs") for kind in ("md", "csv", "tex"))  # fmt: skip
    assert (tmp_path / "table1.md").read_text().startswith("**table1.** CLIP-I of “a [V]”")
    assert not (tmp_path / "table2.tex").exists()
    assert "\n| subject | method | n | CLIP-I |" in (tmp_path / "scores.md").read_text()  # there are no parts to tell
