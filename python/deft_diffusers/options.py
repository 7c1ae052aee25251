"""The options of each command: name, default and help have their only home here; `cli` makes the flags from them.

Names are those of diffusers' training examples where these have one. Nothing here imports torch, so `--help` is quick.
"""

from dataclasses import MISSING, dataclass, field

METHODS = ("deft", "para", "lora", "svdiff", "dreambooth", "textual_inversion")
DECOMPOSITIONS = ("qr", "svd", "relu", "none")
PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
QUANTISATIONS = ("nf4", "fp4", "int8")
TRACKERS = ("tensorboard", "wandb", "none")
PROTOCOLS = ("dreambooth", "dreambench++")


def option(group, help, default=MISSING, **more):
    """A dataclass field that is also a flag. `more`: `choices`, `metavar`, `repeat` (may be given several times),
    `positional` (an argument without a flag)."""
    metadata = {"group": group, "help": help, **more}
    if more.get("repeat"):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


MODEL_HELP = (
    "base model: `toyworld` (embedded), a folder in diffusers' layout, or a hub id; of Stable Diffusion 1, 2 or 3, SDXL, "
    "FLUX.1, FLUX.2 klein or OmniGen"
)

QUANTIZE_HELP = (
    "load the denoiser in 4 bits (nf4 or fp4, of bitsandbytes) or 8 (int8, of torchao); a base that was saved quantised "
    "needs no flag"
)
QUANTIZE_TEXT_HELP = "with --quantize: T5 and Qwen3 too"


@dataclass(kw_only=True)
class TrainOptions:
    """What `deft train` takes."""

    pretrained_model_name_or_path: str = option("Model and data", MODEL_HELP, metavar="MODEL")
    quantize: str | None = option(
        "Model and data", QUANTIZE_HELP + "; for deft, para, lora and textual_inversion", None, choices=QUANTISATIONS
    )
    quantize_text_encoders: bool = option("Model and data", QUANTIZE_TEXT_HELP, False)
    instance_data_dir: str = option(
        "Model and data", "folder of pictures of the subject, or one picture; NAME.txt beside NAME.jpg is its caption, or "
        "metadata.jsonl tells it",
        metavar="PATH",
    )  # fmt: skip
    instance_prompt: str | None = option(
        "Model and data",
        "text of every picture that has no caption, such as 'a photo of sks dog'",
        None,
        metavar="TEXT",
    )
    output_dir: str = option("Model and data", "where the adapter, its checkpoints and its log go", metavar="DIR")
    overwrite_output_dir: bool = option("Model and data", "replace the run that the output folder holds", False)
    resolution: int | None = option(
        "Model and data", "side in pixels of a square training picture; others have as many (default: the model's own)",
        None, metavar="N",
    )  # fmt: skip
    aspect_ratio_buckets: bool = option(
        "Model and data", "train on pictures in about their own proportions; off: on squares cut from them", True
    )
    center_crop: bool = option("Model and data", "cut squares from the middle of pictures, not at random", False)
    random_flip: bool = option("Model and data", "mirror pictures at random", False)
    cache_dir: str | None = option(
        "Model and data", "folder that keeps latents and text embeddings for later runs", None, metavar="DIR"
    )

    cut_mix_prob: float = option(
        "Several subjects", "share of samples that show two subjects side by side, as 'photo of a sks dog on the left and a "
        "xyz cat on the right' (Cut-Mix, arXiv 2303.11305, which takes 0.6); metadata.jsonl tells each picture's `subject`, "
        "'sks dog', and so it may in --class_data_dir", 0.0, metavar="SHARE",
    )  # fmt: skip
    unmix_weight: float | None = option(
        "Several subjects", "for Stable Diffusion 1, 2 and SDXL: weight of a loss that keeps the words of each of the two "
        "away from the half of the other, in cross-attention (Unmix; the paper tells no weight)", None,
    )  # fmt: skip

    class_prompt: str | None = option(
        "Prior preservation", "text of the subject's class, such as 'a dog', of which the model shall keep its idea", None,
        metavar="TEXT",
    )  # fmt: skip
    class_data_dir: str | None = option(
        "Prior preservation", "folder of pictures of the class; missing ones are drawn by the base model "
        "(default: class_images in the output folder)", None, metavar="DIR",
    )  # fmt: skip
    num_class_images: int = option("Prior preservation", "how many pictures of the class there shall be", 200, metavar="N")
    prior_loss_weight: float = option("Prior preservation", "weight of their loss", 1.0)

    method: str = option(
        "Method",
        "deft removes and injects, para only removes, lora only injects; svdiff shifts singular values, dreambooth trains "
        "the whole denoiser, textual_inversion a new word",
        "deft", choices=METHODS,
    )  # fmt: skip
    train_text_encoder: bool = option(
        "Method", "the text encoders learn too: for deft, para and lora by an adapter on the attention of CLIP's encoders, "
        "or of FLUX.2's Qwen3 (not of T5, as in diffusers' trainers), for dreambooth all of them as a whole", False,
    )  # fmt: skip
    placeholder_token: str = option("Method", "for textual_inversion: the new word, which the prompts must contain", "<sks>")
    initializer_token: str | None = option(
        "Method", "for textual_inversion: a word to start from, such as 'dog', or several: their mean (default: the mean of "
        "all words)", None,
    )
    num_vectors: int = option("Method", "for textual_inversion: how many tokens the word is made of", 1, metavar="N")

    rank: int = option("Adapter", "rank of the adapter; 4 to 8 suits one subject", 8, metavar="R")
    alpha: float | None = option("Adapter", "scale of the injection is alpha/rank (default: scale 1)", None)
    decomposition_method: str | None = option(
        "Adapter", "how P becomes a basis (default: qr, an orthogonal projector)", None, choices=DECOMPOSITIONS
    )
    gate: bool = option("Adapter", "learn one scalar per layer that scales the injection", False)
    dropout: float = option("Adapter", "dropout of the injection term", 0.0)
    init_weights: bool = option("Adapter", "start as the base model; off: the reference's random start", True)
    target_modules: str | None = option(
        "Adapter", "of the denoiser: names separated by commas, a regular expression, or all-linear (default: every "
        "attention projection)",
        None, metavar="NAMES",
    )  # fmt: skip

    max_train_steps: int | None = option(
        "Optimisation",
        "optimizer steps (default: as published for the method, deft, lora and svdiff 500, para 1000, dreambooth 400, with "
        "--class_prompt 800, textual_inversion 3000)",
        None, metavar="N",
    )  # fmt: skip
    train_batch_size: int = option("Optimisation", "pictures per process and micro-step", 1, metavar="N")
    gradient_accumulation_steps: int = option("Optimisation", "micro-steps per optimizer step", 1, metavar="N")
    gradient_checkpointing: bool = option("Optimisation", "less memory for more time", False)
    learning_rate: float | None = option(
        "Optimisation",
        "of all that trains, for deft of R (default: as published for the method, deft 1e-3, though its authors took 5e-5 "
        "for SDXL, para and lora 5e-4, svdiff 1e-3, dreambooth 5e-6, with --train_text_encoder 2e-6, textual_inversion 5e-4 "
        "for each picture of a step)",
        None, metavar="LR",
    )  # fmt: skip
    learning_rate_P: float | None = option(
        "Optimisation",
        "of P (default: a tenth of --learning_rate for deft with qr or svd, else the same)",
        None,
        metavar="LR",
    )
    text_encoder_lr: float | None = option(
        "Optimisation",
        "with --train_text_encoder: of the text encoders, for deft of their R (default: the rates of the denoiser)",
        None,
        metavar="LR",
    )
    lr_scheduler: str = option("Optimisation", "shape of the learning rate over the run", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = option("Optimisation", "steps over which the learning rate rises from zero", 0, metavar="N")
    optimizer: str = option(
        "Optimisation", "adamw8bit (bitsandbytes) takes a quarter of the memory; prodigy (prodigyopt) finds its own rate, "
        "which --learning_rate scales (default for it: 1)", "adamw", choices=OPTIMIZERS,
    )  # fmt: skip
    use_ema: bool = option("Optimisation", "save a moving average of what trains", False)
    ema_decay: float = option("Optimisation", "share of the average that a step leaves", 0.999)
    compile: bool = option("Optimisation", "torch.compile the denoiser: slower to start, faster afterwards", False)
    adam_weight_decay: float = option("Optimisation", "of AdamW; it would pull R towards removal, hence off", 0.0)
    max_grad_norm: float = option("Optimisation", "gradients are clipped to this norm", 1.0)
    caption_dropout: float = option(
        "Optimisation", "share of samples that train with an empty text, for guidance without a text; 1: no condition", 0.0
    )
    noise_offset: float = option(
        "Optimisation", "noise added to a channel's mean, for darker and lighter pictures; 0.1 is usual", 0.0
    )
    snr_gamma: float | None = option(
        "Optimisation", "for Stable Diffusion 1, 2 and SDXL: weigh time steps by min(signal-to-noise ratio, this), 5 is "
        "usual (arXiv 2303.09556)", None,
    )  # fmt: skip
    weighting_scheme: str | None = option(
        "Optimisation", "for Stable Diffusion 3, FLUX and OmniGen: which times are drawn, or weigh more (arXiv 2403.03206; "
        "default: logit_normal)", None, choices=WEIGHTING_SCHEMES,
    )  # fmt: skip
    mixed_precision: str | None = option(
        "Optimisation", "of the base model; adapter and VAE stay fp32 (default: accelerate's setting, else no)", None,
        choices=PRECISIONS,
    )  # fmt: skip
    seed: int = option("Optimisation", "one seed gives one adapter, however often the run was stopped", 0)

    checkpointing_steps: int = option("Checkpoints and validation", "steps between two checkpoints", 500, metavar="N")
    checkpoints_total_limit: int | None = option(
        "Checkpoints and validation", "keep only the newest N checkpoints (default: all)", None, metavar="N"
    )
    resume_from_checkpoint: str | None = option(
        "Checkpoints and validation",
        "`latest` (of the output folder; from the beginning if there is none) or a checkpoint's folder",
        None,
        metavar="latest|DIR",
    )
    report_to: str = option(
        "Checkpoints and validation", "where curves and validation pictures go beside the output folder's own log; "
        "tensorboard's lie in its folder logs", "tensorboard", choices=TRACKERS,
    )  # fmt: skip
    validation_prompt: str | None = option(
        "Checkpoints and validation",
        "draw pictures of this text while training and at the end, at --resolution",
        None,
        metavar="TEXT",
    )
    validation_image: list[str] = option(  # noqa: RUF009
        "Checkpoints and validation", "for FLUX.2 klein and OmniGen: picture that goes with this text; repeat for the next "
        "(default: those of the first training picture that has some)", repeat=True, metavar="FILE",
    )  # fmt: skip
    validation_steps: int = option("Checkpoints and validation", "steps between two such drawings", 100, metavar="N")
    num_validation_images: int = option("Checkpoints and validation", "pictures in one drawing", 4, metavar="N")


@dataclass(kw_only=True)
class SampleOptions:
    """What `deft sample` takes."""

    pretrained_model_name_or_path: str = option("Model and adapters", MODEL_HELP, metavar="MODEL")
    adapter: list[str] = option(  # noqa: RUF009
        "Model and adapters",
        "folder or hub id of an adapter, or a LoRA file; repeat for several at once; none: the base model",
        repeat=True,
        metavar="ADAPTER",
    )
    adapter_weight: list[float] = option(  # noqa: RUF009
        "Model and adapters",
        "strength of the adapter given in the same place, any number (default: 1)",
        repeat=True,
        metavar="W",
    )
    merge: bool | None = option(
        "Model and adapters", "fold the adapters into the base weights; off: keep the factors apart, which is exact where "
        "the base is quantised (default: on, off for a quantised base)", None,
    )  # fmt: skip
    quantize: str | None = option("Model and adapters", QUANTIZE_HELP, None, choices=QUANTISATIONS)
    quantize_text_encoders: bool = option("Model and adapters", QUANTIZE_TEXT_HELP, False)
    dtype: str | None = option(
        "Model and adapters", "of the base model; the VAE stays fp32 (default: on a GPU fp16, bf16 for SD 3, FLUX and "
        "OmniGen; else fp32)", None,
        choices=("fp32", "fp16", "bf16"),
    )  # fmt: skip
    device: str | None = option(
        "Model and adapters", "such as cpu or cuda:1 (default: a GPU if there is one)", None, metavar="DEVICE"
    )

    prompt: list[str] = option(  # noqa: RUF009
        "Pictures", "what to draw; repeat for several texts", repeat=True, metavar="TEXT"
    )
    prompts_file: str | None = option("Pictures", "file with one text per line, instead of --prompt", None, metavar="FILE")
    input_image: list[str] = option(  # noqa: RUF009
        "Pictures", "for FLUX.2 klein: picture to draw by; for OmniGen: picture that every text speaks of as "
        "<img><|image_1|></img>; repeat for the next",
        repeat=True, metavar="FILE",
    )  # fmt: skip
    negative_prompt: str | None = option(
        "Pictures", "what to keep out; not for FLUX.2 and OmniGen, and FLUX.1 then takes two passes a step", None,
        metavar="TEXT",
    )  # fmt: skip
    num_images_per_prompt: int = option("Pictures", "picture k of every text has seed --seed + k", 1, metavar="N")
    num_inference_steps: int = option("Pictures", "denoising steps", 50, metavar="N")
    guidance_scale: float | None = option(
        "Pictures", "how much the text counts; 1 is no guidance (default: the pipeline's own, for SD 1 and 2 7.5)", None
    )
    seed: int = option("Pictures", "seed of each text's first picture", 0)
    height: int | None = option("Pictures", "in pixels (default: the model's own)", None, metavar="N")
    width: int | None = option("Pictures", "in pixels (default: the model's own)", None, metavar="N")
    batch_size: int = option("Pictures", "pictures drawn at once; no picture depends on it", 4, metavar="N")
    output_dir: str = option("Pictures", "where 0000.png …, grid.png and samples.json go", "samples", metavar="DIR")
    overwrite_output_dir: bool = option("Pictures", "replace the samples that the output folder holds", False)


@dataclass(kw_only=True)
class SweepOptions:
    """What `deft sweep` takes."""

    plan: str | None = option(
        "What to train", "YAML file with any of pretrained_model_name_or_path, subjects, methods, ranks, seeds, prompts, "
        "and train and sample: options of `deft train` and `deft sample` for all runs; methods may be a list, or give each "
        "its own options: {deft: {gate: true}, lora: {}}; flags come first", None,
        metavar="FILE",
    )  # fmt: skip
    pretrained_model_name_or_path: str | None = option("What to train", MODEL_HELP, None, metavar="MODEL")
    subjects: str | None = option(
        "What to train", "folder in the layout of the DreamBooth data set (a folder for each subject) or of DreamBench++",
        None, metavar="DIR",
    )  # fmt: skip
    subject: list[str] = option(  # noqa: RUF009
        "What to train", "only this one of them; repeat for several (default: all)", repeat=True, metavar="NAME"
    )
    method: list[str] = option(  # noqa: RUF009
        "What to train", "repeat for several (default: deft)", repeat=True, choices=METHODS
    )
    rank: list[int] = option(  # noqa: RUF009
        "What to train", "of adapters; repeat for several (default: 8)", repeat=True, metavar="R"
    )
    seed: list[int] = option("What to train", "repeat for several (default: 0)", repeat=True, metavar="N")  # noqa: RUF009
    token: str = option("What to train", "word that stands for a subject, before its class, in prompts and captions", "sks")
    prompt: list[str] = option(  # noqa: RUF009
        "What to draw", "'a photo of {} in the snow', {} being the subject; repeat for several: every run draws them, and "
        "the base model its class; SUBJECT.png shows them side by side", repeat=True, metavar="TEXT",
    )  # fmt: skip
    output_dir: str = option("What to train", "where each job has its folder; sweep.md says what happened", metavar="DIR")


@dataclass(kw_only=True)
class CompareOptions(SweepOptions):
    """What `deft compare` takes: all that a sweep does, and a plan that says what to score and show."""

    plan: str = option(
        "What to train", "YAML file as `deft sweep` takes it, and besides: shown (prompts that are not scored), unrelated "
        "(texts that tell what was forgotten), evaluate (options of `deft evaluate`), figures, strengths (what to draw at "
        "several weights), only (which subjects, and their names in the published tables, by which they are shown), parts, "
        "each with its own of all that but figures and strengths; an entry of methods may be a row: {PaRa + uncond: "
        "{method: para, ranks: [4], caption_dropout: 1}}; benchmarks/quality has examples", metavar="FILE",
    )  # fmt: skip
    prompt: list[str] = option(  # noqa: RUF009
        "What to draw", "'a photo of {} in the snow', {} being the subject, in the place of the plan's prompts; repeat for "
        "several: every run draws them, and the base model its class", repeat=True, metavar="TEXT",
    )  # fmt: skip
    output_dir: str = option(
        "What to train", "where each job has its folder, and tables, figures and report.html go, of the jobs asked for each "
        "time: after --subject or --seed the same command without them shows all again", metavar="DIR",
    )  # fmt: skip


@dataclass(kw_only=True)
class EvaluateOptions:
    """What `deft evaluate` takes."""

    images: str | None = option(
        "What to score", "folder of pictures: of `deft sample`, a method's in DreamBench++'s layout (src_image, tgt_image, "
        "text), or any, with NAME.txt beside NAME.jpg or with --prompts_file", None, metavar="DIR",
    )  # fmt: skip
    references: str | None = option(
        "What to score", "the subject's own pictures, a folder or one, for CLIP-I, DINOv1 and DINOv2; DreamBench++'s layout "
        "has them", None, metavar="PATH",
    )  # fmt: skip
    prompts_file: str | None = option(
        "What to score", "file with one text per line: for --images that of each picture, else what to draw, which may be "
        "DreamBooth's prompts_and_classes.txt, for its prompts of --class_name, or a file of DreamBench++'s captions", None,
        metavar="FILE",
    )  # fmt: skip
    subject: str | None = option(
        "What to score", "the subject's words in the prompts, such as 'sks dog'; CLIP-T is asked for --class_name in their "
        "place", None, metavar="TEXT",
    )  # fmt: skip
    class_name: str | None = option("What to score", "what the subject is, such as 'dog'", None, metavar="TEXT")
    unrelated_prompt: list[str] = option(  # noqa: RUF009
        "What to score", "a text that is not of the subject; its pictures tell but the drift, what the model has forgotten; "
        "repeat for several", repeat=True, metavar="TEXT",
    )  # fmt: skip
    base_images: str | None = option(
        "What to score", "for --images: the base model's pictures of the unrelated texts, with the same seeds, by "
        "`deft sample`", None, metavar="DIR",
    )  # fmt: skip

    pretrained_model_name_or_path: str | None = option(
        "Draw first", f"instead of --images; {MODEL_HELP}", None, metavar="MODEL"
    )
    adapter: list[str] = option(  # noqa: RUF009
        "Draw first", "folder or hub id of an adapter, or a LoRA file; repeat for several at once; none: the base model",
        repeat=True, metavar="ADAPTER",
    )  # fmt: skip
    prompt: list[str] = option(  # noqa: RUF009
        "Draw first", "'a photo of {} in the snow', {} being --subject; repeat for several", repeat=True, metavar="TEXT"
    )
    num_images_per_prompt: int = option("Draw first", "picture k of every text has seed --seed + k", 4, metavar="N")
    num_inference_steps: int = option("Draw first", "denoising steps", 50, metavar="N")
    guidance_scale: float | None = option("Draw first", "how much the text counts (default: the pipeline's own)", None)
    seed: int = option("Draw first", "seed of each text's first picture", 0)

    protocol: str | None = option(
        "Protocol and encoders", "dreambooth: each picture with all references, cosines as they are; dreambench++: times "
        "100 (default: that of the folder's layout, else dreambooth)", None, choices=PROTOCOLS,
    )  # fmt: skip
    encoders: str | None = option(
        "Protocol and encoders", "toyworld: the embedded encoders, which know the drawn world alone", None,
        choices=("toyworld",),
    )  # fmt: skip
    clip: str | None = option(
        "Protocol and encoders", "hub id, folder, or none (default: openai/clip-vit-base-patch32)", None, metavar="MODEL"
    )
    dinov1: str | None = option(
        "Protocol and encoders", "hub id, folder, torchhub:owner/repo:ref:entry, or none (default: what the "
        "protocol's authors took, for dreambooth facebook/dino-vits16, for dreambench++ facebook/dino-vits8: the weights of "
        "torchhub:facebookresearch/dino:main:dino_vits8 without its need of torchvision; the two do not compare)", None,
        metavar="MODEL",
    )  # fmt: skip
    dinov2: str | None = option(
        "Protocol and encoders", "hub id, folder, or none (default: facebook/dinov2-small)", None, metavar="MODEL"
    )
    individual: str | None = option(
        "Protocol and encoders", "with --encoders toyworld: whom of the drawn world the pictures shall show, such as "
        "bear_plushie (default: the references' folder, if it has such a name)", None, metavar="NAME",
    )  # fmt: skip
    batch_size: int = option("Protocol and encoders", "pictures at once; no score depends on it", 32, metavar="N")
    device: str | None = option(
        "Protocol and encoders", "such as cpu or cuda:1 (default: a GPU if there is one)", None, metavar="DEVICE"
    )
    cache_dir: str | None = option("Protocol and encoders", "folder that keeps features for later runs", None, metavar="DIR")

    output_dir: str = option("Files", "where scores.json and scores.md go, and what is drawn", metavar="DIR")
    overwrite_output_dir: bool = option("Files", "replace the scores, and the samples, that it holds", False)
    dreambench_plus_dir: str | None = option(
        "Files", "write the pictures to this folder of a method in DreamBench++'s layout too, each beside the first "
        "reference, for its own scripts", None, metavar="DIR",
    )  # fmt: skip
    collection_id: str | None = option(
        "Files", "the subject's name there, such as live_subject_animal_00_kitten (default: told by the reference and "
        "--class_name)", None, metavar="NAME",
    )  # fmt: skip


@dataclass(kw_only=True)
class ConvertOptions:
    """What `deft convert` takes."""

    source: str = option(
        "Files",
        "an adapter's folder of this library or of PEFT; a LoRA file (diffusers', Kohya's); or the files of DEFT's authors: "
        "a folder with knowledge_injection_state.bin or para_rank_state.bin, or checkpoint-N/project_replace.pt",
        positional=True, metavar="SOURCE",
    )  # fmt: skip
    output_dir: str = option("Files", "where the converted files go", metavar="DIR")
    overwrite_output_dir: bool = option("Files", "replace the converted files that the output folder holds", False)
    format: str | None = option(
        "Files",
        "deft: a folder for this library (the authors' files keep P and R, and PEFT reads it); diffusers: a LoRA file for "
        "load_lora_weights; kohya: a LoRA file for ComfyUI and Kohya's scripts too; peft: a LoRA folder (default: deft, and "
        "diffusers for what is a deft folder already)",
        None,
        choices=("deft", "diffusers", "kohya", "peft"),
    )
    pretrained_model_name_or_path: str | None = option(
        "Base model", f"{MODEL_HELP}; needed for all but the authors' files to deft: DEFT is a LoRA for one base only", None,
        metavar="MODEL",
    )  # fmt: skip
    adapter_weight: float = option("LoRA", "strength that becomes part of the LoRA", 1.0, metavar="W")
    rank: int | None = option("LoRA", "truncate to this rank; the error is told (default: exact)", None, metavar="R")
    dtype: str = option("LoRA", "of the tensors in a LoRA file", "fp32", choices=("fp32", "fp16", "bf16"))
    decomposition_method: str | None = option(
        "The authors' files", "where they do not tell it (default: what they tell; SDXL runs: none, or qr for PaRa)",
        None, choices=DECOMPOSITIONS,
    )  # fmt: skip


@dataclass(kw_only=True)
class DemoOptions:
    """What `deft demo` takes."""

    output_dir: str = option("Demonstration", "where demo.png and the adapter go", "outputs/demo", metavar="DIR")
    max_train_steps: int = option("Demonstration", "optimizer steps", 600, metavar="N")
    seed: int = option("Demonstration", "of training and pictures", 0)
