"""A comparison's folder as `deft compare` leaves it, with drawings for pictures: made for tests, nothing is trained."""

import json
from pathlib import Path

import numpy as np
from deft_diffusers import read_json
from deft_diffusers.evaluation import tables
from deft_diffusers.toyworld.world import INDIVIDUALS, draw, draw_individual

ROWS = (("base", "base", None), ("DEFT (rank=8)", "deft", 8), ("DEFT (rank=4)", "deft", 4), ("PaRa (rank=4)", "para", 4),
        ("LoRA (rank=4)", "lora", 4), ("LoRA (rank=8)", "lora", 8), ("SVDiff", "svdiff", None),
        ("DreamBooth", "dreambooth", None), ("Textual Inversion", "textual_inversion", None))  # fmt: skip
PROMPTS = {
    "a photo of {}": "field",
    "a photo of {} on the beach": "beach",
    'a "photo" of {} in the <b>snow</b> & wind': "snow",
    "a photo of {} in a forest": "forest",
}
UNRELATED = "a photo of a teapot on a wooden table"
ENCODER = {"id": "toyworld", "revision_or_sha256": "0123456789abcdef", "preprocessing": {"size": 64, "resample": "bicubic"}}
ENCODERS = {"clip": ENCODER, "dinov2": ENCODER}


def write_comparison(root, subjects=("cat", "dog"), rows=ROWS, seeds=(0, 1, 2), prompts=PROMPTS, figures=None):
    """Writes `results.json`, tables, jobs and photographs, and returns the results."""
    entries = []
    for n, name in enumerate(subjects):
        photos = root / "subjects" / name
        photos.mkdir(parents=True)
        for k, scene in enumerate(("field", "city", "table")):
            draw_individual(name, scene, np.random.default_rng((n, k))).save(photos / f"{k}.png")
        for k, (row, method, rank) in enumerate(rows):
            for seed in seeds if method != "base" else seeds[:1]:
                rng = np.random.default_rng((n, k, seed))
                entries.append(_write_job(root, name, (row, method, rank, seed), prompts, k / len(rows), rng))
    results = {
        "plan": {"pretrained_model_name_or_path": "toyworld", "subjects": "subjects", "prompts": list(prompts),
                 "seeds": list(seeds), "figures": figures or {}},
        "settings": {"plan": "small.yaml"},
        "parts": {"": {"model": "toyworld", "protocol": "dreambooth", "subjects": dict.fromkeys(subjects),
                       "prompts": list(prompts), "unrelated": [UNRELATED], "scale": 1.0, "encoders": ENCODERS}},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "diffusers": "0.42.1", "deft_kernels": "0.1.0"},
        "device": "AMD EPYC, 2 threads",
        "made": {"trained": [{"commit": "b5e1f00", "jobs": 2, "first": "2026-11-22", "last": "2026-11-23"}],
                 "drawn": [{"commit": None, "jobs": 2, "first": None, "last": None}],
                 "tables": [{"commit": "c7afd82", "time": "2026-11-23T22:40:00+00:00"}]},
        "rows": entries,
        "published": read_json(Path(tables.__file__).with_name("published.json")),
    }  # fmt: skip
    (root / "results.json").write_text(json.dumps(results))
    return results


def _write_job(root, name, job, prompts, strength, rng):
    row, method, rank, seed = job
    folder = root / name / ("base" if method == "base" else f"{method}{f'-r{rank}' if rank else ''}-seed{seed}")
    (folder / "samples").mkdir(parents=True)
    kind = INDIVIDUALS[name].subject
    words = kind if method == "base" else f"sks {kind}"
    samples = []
    for template, scene in (*prompts.items(), (UNRELATED, "table")):
        file = f"{len(samples):04d}.png"
        if template == UNRELATED:
            image = draw("teapot", "blue", "plain", scene, rng)
        elif method == "base":
            image = draw(kind, "brown", "plain", scene, rng)
        else:
            image = draw_individual(name, scene, rng)
        image.save(folder / "samples" / file)
        samples.append({"file": file, "prompt": template.replace("{}", words), "seed": 0})
    settings = {"pretrained_model_name_or_path": "toyworld", "num_inference_steps": 30, "guidance_scale": 4,
                "prompt": [sample["prompt"] for sample in samples]}  # fmt: skip
    subject = {"name": name, "instance_data_dir": str(root / "subjects" / name), "instance_prompt": f"a photo of {words}",
               "class_name": kind, "words": words}  # fmt: skip
    scores = {key: round(start + change * strength + float(rng.normal(0, abs(change) / 60)), 4) for key, start, change in (
        ("clip_i", 0.7, 0.2), ("clip_t", 0.32, -0.06), ("dinov1", 0.5, 0.3), ("dinov2", 0.45, 0.4), ("diversity", 0.3, -0.1),
        ("drift", 0.0, 0.2), ("individual", 0.0, 0.9), ("scene", 0.95, -0.2))}  # fmt: skip
    scored = [
        sample | {"template": template, "unrelated": template == UNRELATED, "clip_t": 0.31}
        | ({} if template == UNRELATED else {"clip_i": 0.83, "dinov2": 0.71, "individual": True, "scene": False})
        for sample, template in zip(samples, (*prompts, UNRELATED))
    ]  # fmt: skip
    base = method == "base"
    training = {} if base else {"parameters": 123_456 * (rank or 1), "steps": 500, "seconds": 61.2 + seed,
                                "images_per_second": 8.2, "memory_gb": None, "size_mb": 0.4}  # fmt: skip
    told = {
        "samples/samples.json": {"settings": settings, "samples": samples},
        "job.json": {"subject": subject, "method": method, "rank": rank, "seed": seed, "status": "done",
                     "drawn": {"prompt": [*prompts], "unrelated": [UNRELATED]}},
        "scores.json": {"protocol": "dreambooth", "scale": 1.0, "encoders": ENCODERS, "scores": scores, "samples": scored},
    }  # fmt: skip
    for file, content in told.items():
        (folder / file).write_text(json.dumps(content))
    where = str(folder.relative_to(root))
    return {"job": where, "part": "", "subject": name, "row": row, "method": method, "rank": rank, "seed": seed,
            "status": "done", "said": "", "scores": scores,
            "counts": dict.fromkeys(scores, len(prompts)) | {"drift": 1},
            "by_prompt": {template: {"clip_i": scores["clip_i"]} for template in prompts}, "missing": [],
            "counts_by_prompt": {template: {"clip_i": 1} for template in prompts}, "made": {},
            "training": training, "options": {} if base else {"learning_rate": 1e-3}, "folder": where}  # fmt: skip
