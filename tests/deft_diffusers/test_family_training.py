"""`deft train` and `deft sample` on every family of pipeline: what is learned, what moves, and that training asks of a model
what its own pipeline does."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from deft_diffusers import UserError, data
from deft_diffusers.demo import fingerprints
from deft_diffusers.families import flux, load_family
from deft_diffusers.methods import METHODS, Adapter, method_of
from deft_diffusers.options import SampleOptions, TrainOptions
from deft_diffusers.sample import load_adapters, sample
from deft_diffusers.samples import Samples
from deft_diffusers.train import Objective, complete, make_optimizer, train
from safetensors.torch import load_file
from tiny_pipeline import write_picture
from transformers import Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = tuple(tiny_pipelines.FAMILIES)
MODELS = ("stable-diffusion-v", *FAMILIES)  # v-prediction too
FLOW = FAMILIES[2:]
SIZE = {"omnigen": 64}  # side in pixels, 32 elsewhere; OmniGen has no other bucket below 64
STEPS = 2  # of the sampler


def build(family):
    """A tiny pipeline as the tests of adapters have it, but for what training depends on and those leave out."""
    pipe = tiny_pipelines.build(family.removesuffix("-v"))
    torch.manual_seed(0)
    if family == "stable-diffusion-v":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    if family == "sdxl":  # as some of its descendants have
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.0, 2.0])
    if family == "sd3":
        pipe.scheduler = scheduler(shift=3.0)
    if family == "flux":
        config = pipe.transformer.config | {"guidance_embeds": True}
        pipe.register_modules(
            scheduler=scheduler(use_dynamic_shifting=True), transformer=diffusers.FluxTransformer2DModel.from_config(config)
        )
    if family == "flux2-klein":  # three layers of the text, by number, are read
        text = Qwen3Config(**pipe.text_encoder.config.to_dict() | {"num_hidden_layers": 28, "layer_types": None})
        config = pipe.transformer.config | {"joint_attention_dim": 3 * tiny_pipelines.WIDTH}
        pipe.vae.bn.running_mean.normal_()
        pipe.vae.bn.running_var.uniform_(0.5, 2.0)
        pipe.register_modules(
            scheduler=scheduler(use_dynamic_shifting=True), text_encoder=Qwen3ForCausalLM(text).eval(),
            transformer=diffusers.Flux2Transformer2DModel.from_config(config),
        )  # fmt: skip
    if family == "omnigen":
        pipe.scheduler = scheduler(invert_sigmas=True, num_train_timesteps=1)
    return pipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: the folder of its tiny pipeline}."""
    folder = tmp_path_factory.mktemp("models")
    for family in MODELS:
        build(family).save_pretrained(folder / family)
    return {family: str(folder / family) for family in MODELS}


@pytest.fixture
def options(models, photos, tmp_path):
    """Makes options for a short run on square pictures and a long one; keyword arguments replace or add."""
    write_picture(photos / "tall.png", 7, size=(48, 80))

    def make(family, **changes):
        defaults = {
            "pretrained_model_name_or_path": models[family], "instance_data_dir": str(photos), "instance_prompt": "a cat",
            "output_dir": str(tmp_path / "out"), "max_train_steps": 3, "train_batch_size": 2, "report_to": "none",
            "resolution": SIZE.get(family, 32),
        }  # fmt: skip
        return TrainOptions(**defaults | changes)

    return make


def load(models, family):
    return load_family(models[family], torch.float32)


def batch(family, photos, count, prompts=("a cat",), **more):
    """Samples of two square pictures: (latents, noise, times, conditions)."""
    side = SIZE.get(Path(family.pipe.name_or_path).name, 32)
    texts = [prompts[k % len(prompts)] for k in range(2)]
    pictures = [data.load(data.Source(photos / f"{k}.png", text), [(side, side)]) for k, text in enumerate(texts)]
    return Samples(pictures, family, 77, False, False, **more).batch(range(count), torch.device("cpu"))


def pixels(image):
    return np.asarray(image).astype(int)


# each method on each family ----------------------------------------------------------------------------------------------

# Where "deft-gated" differs from "deft": every other decomposition is some family's.
OTHER = dict(zip(MODELS, itertools.cycle(("svd", "relu", "none"))))
DEFT, ADAPTER = {"rank": 4, "learning_rate": 1e-2}, {"rank": 4, "learning_rate": 4e-2}
WORD = {"learning_rate": 0.5, "instance_prompt": "a <sks>", "num_vectors": 2}
# What each is trained with, and which share of the loss of a fixed batch may be left after `TAKEN` steps.
SETTINGS = {
    "deft": (DEFT, 0.98), "deft-gated": ({"rank": 2, "learning_rate": 2e-2, "gate": True}, 0.98), "deft-text": (DEFT, 0.98),
    "para": (ADAPTER, 0.985), "para-text": (ADAPTER, 0.985), "lora": (ADAPTER, 0.92), "lora-text": (ADAPTER, 0.92),
    "svdiff": ({"learning_rate": 2e-2}, 0.9),
    "dreambooth": ({"learning_rate": 1e-3}, 0.9), "dreambooth-text": ({"learning_rate": 1e-3}, 0.9),
    "textual_inversion": (WORD, 0.9995),  # texts say little to models this small and untrained
}  # fmt: skip
TAKEN = 16
CASES = [(f, m) for f in MODELS for m in SETTINGS if not (f == "omnigen" and m.endswith("-text"))]
MADE_ANEW = {"transformer.rope.inv_freq"}  # by every forward of OmniGen


@pytest.fixture(scope="module")
def families(models):
    """{family: loaded}, to be copied."""
    return {family: load_family(folder, torch.float32) for family, folder in models.items()}


def tensors_of(family):
    """Every parameter and buffer of every part of the pipeline, by name."""
    parts = [(name, part) for name, part in family.pipe.components.items() if isinstance(part, torch.nn.Module)]
    held = [(f"{name}.", itertools.chain(part.named_parameters(), part.named_buffers())) for name, part in parts]
    return {part + name: tensor for part, tensors in held for name, tensor in tensors}


@pytest.mark.parametrize("family, case", CASES)
def test_each_method_on_each_family(family, case, families, models, photos, tmp_path, monkeypatch):
    """The loss of a fixed batch falls, nothing moves but what trains, and what is saved draws the same in a fresh model."""
    monkeypatch.setattr(flux, "TOKENS", 32)  # 512 letters through 28 layers would take most of the time
    method, _, more = case.partition("-")
    own, left = SETTINGS[case]
    own = {"instance_prompt": "a cat", "train_text_encoder": more == "text"} | own
    if more == "gated":
        own["decomposition_method"] = OTHER[family]
    paths = {"pretrained_model_name_or_path": models[family], "instance_data_dir": str(photos), "output_dir": str(tmp_path)}
    o = complete(TrainOptions(**paths, method=method, **own))
    wrapped, side = copy.deepcopy(families[family]), SIZE.get(family, 32)
    size = {"num_inference_steps": STEPS, "height": side, "width": side}
    size |= {"max_sequence_length": flux.TOKENS} if family.startswith("flux") else {}
    draw = lambda wrapped: pixels(wrapped.generate([o.instance_prompt], [5], **size)[0])
    base, plain = tensors_of(wrapped), draw(wrapped)
    before = fingerprints(base)

    torch.manual_seed(0)
    trained = METHODS[method](wrapped, o)
    trained.start()
    groups, rates = trained.groups()
    groups = {name: dict(enumerate(parameters)) for name, parameters in groups.items() if parameters}
    starts = {name: fingerprints(parameters) for name, parameters in groups.items()}
    optimizer = make_optimizer(o, [{"params": [*groups[name].values()], "lr": rates[name]} for name in groups])
    *drawn, conditions = batch(wrapped, photos, 4, (o.instance_prompt,), encode_texts=False)
    if not trained.encodes_text:
        with torch.no_grad():
            texts, inputs, sizes = conditions
            conditions = wrapped.encode_prompts(list(texts), inputs) | sizes
    objective, losses = Objective(wrapped, trained.encodes_text).train(), []
    for _ in range(TAKEN + 1):
        loss = objective([(*drawn, conditions)], (1.0,))
        losses.append(loss.item())
        if len(losses) <= TAKEN:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < left * losses[0], losses

    learnt = {id(p) for parameters in groups.values() for p in parameters.values()}
    assert {id(p) for p in wrapped.model.parameters() if p.requires_grad} <= learnt
    after = fingerprints(base)
    assert not [name for name, tensor in base.items() if id(tensor) not in learnt and after[name] != before[name]]
    there = {id(tensor) for tensor in tensors_of(wrapped).values()}
    assert {name for name, tensor in base.items() if id(tensor) not in there} <= MADE_ANEW  # that was none of the others
    for name, parameters in groups.items():  # all but layers that no output comes from, the last one of CLIP in SDXL
        ends = fingerprints(parameters)
        assert sum(ends[k] != start for k, start in starts[name].items()) >= 0.5 * len(ends), name

    with trained.whole():
        trained.save(tmp_path)
    expected = draw(wrapped)
    assert abs(expected - plain).max() >= 1
    for merge in (False, True)[: 1 + (METHODS[method] is Adapter)]:
        fresh = copy.deepcopy(families[family])
        assert method_of(tmp_path, fresh) is METHODS[method]
        load_adapters(fresh, [tmp_path], merge=merge)
        assert abs(draw(fresh) - expected).max() <= merge  # merged weights are rounded once more: a level of 255 at most


def test_which_text_encoders_take_adapters(families):
    """CLIP's and FLUX.2's Qwen3, none of T5's; OmniGen has none."""
    clip, both = {"text_encoder"}, {"text_encoder", "text_encoder_2"}
    expected = dict(zip(MODELS, (clip, clip, both, both, clip, clip, set())))
    assert {name: family.adapted_text_encoders.keys() for name, family in families.items()} == expected


@pytest.mark.parametrize(
    "family, method, more",
    [
        ("sdxl", "dreambooth", {"train_text_encoder": True, "learning_rate": 1e-3}),
        ("sd3", "lora", {"train_text_encoder": True, "learning_rate": 2e-2}),
        ("flux", "deft", {"learning_rate": 5e-2}),
        ("flux2-klein", "textual_inversion", WORD),
        ("omnigen", "svdiff", {"learning_rate": 3e-2}),
    ],
)
def test_trains_saves_and_draws(family, method, more, options, models, tmp_path, capsys):
    """From `deft train` to `deft sample`, on pictures of two sizes."""
    o = complete(options(family, method=method, max_train_steps=8, **more))
    wrapped = load(models, family)
    draw = {"num_inference_steps": STEPS, "height": o.resolution, "width": o.resolution}
    plain = wrapped.generate([o.instance_prompt], [5], **draw)[0]
    folder = train(o, wrapped)
    said = capsys.readouterr().out
    assert f"{o.resolution} x {o.resolution} (3)" in said and said.count("(1)") == 1  # of three pictures and of one
    trained = wrapped.generate([o.instance_prompt], [5], **draw)[0]
    settings = {"prompt": [o.instance_prompt], "seed": 5, "output_dir": str(tmp_path / "drawn"), **draw}
    drawn = sample(SampleOptions(pretrained_model_name_or_path=models[family], adapter=[str(folder)], **settings))[0]
    # the merged weights are rounded once more: a level of 255 at most
    assert abs(pixels(drawn) - pixels(trained)).max() <= 1
    assert abs(pixels(trained) - pixels(plain)).max() >= 2


@pytest.mark.parametrize(
    "family, keys",
    [("sdxl", {"clip_l", "clip_g"}), ("sd3", {"clip_l", "clip_g"}), ("flux", {"<sks>"}), ("flux2-klein", {"<sks>"}),
     ("omnigen", {"<sks>"})],
)  # fmt: skip
def test_new_words_are_named_as_diffusers_trainers_name_them(family, keys, options):
    folder = train(options(family, method="textual_inversion", **WORD | {"max_train_steps": 1}))
    assert load_file(folder / "learned_embeds.safetensors").keys() == keys


# what a model is asked ---------------------------------------------------------------------------------------------------


def spatial(family, states, cells):
    """What a transformer takes, as (N, C, H, W); `cells` is the size in latents of the VAE."""
    if family == "flux":
        return diffusers.FluxPipeline._unpack_latents(states, *cells, 1)
    return states.transpose(1, 2).unflatten(2, [c // 2 for c in cells]) if family == "flux2-klein" else states


def packed(family, latents):
    if family == "flux":
        return diffusers.FluxPipeline._pack_latents(latents, *latents.shape)
    return diffusers.Flux2KleinPipeline._pack_latents(latents) if family == "flux2-klein" else latents


def watch(model, answer=None):
    """Lists the calls of a model, (arguments by name, output); `answer(arguments)` takes its place."""
    calls, forward = [], model.forward
    signature = inspect.signature(forward)

    def listen(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append((arguments, forward(*args, **kwargs) if answer is None else (answer(arguments),)))
        return calls[-1][1]

    model.forward = listen
    return calls


def states_of(arguments):
    return arguments["sample" if "sample" in arguments else "hidden_states"]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_asks_what_the_pipeline_asks(family, models, photos):
    """The same noisy latents, time and text give the model the same output in a step of training and one of sampling."""
    wrapped, side = load(models, family), SIZE.get(family, 32)
    size = {"height": side, "width": side + SIZE.get(family, 32) // 2}
    calls = watch(wrapped.model)
    wrapped.generate(["a cat"], [5], num_inference_steps=STEPS, guidance_scale=1.0, **size)
    arguments, output = calls[-1]
    n = 1 if family != "omnigen" else 2  # which is always drawn with guidance: text, no text
    assert len(states_of(arguments)) == n
    cells = [s * 2 // wrapped.size_multiple for s in size.values()]
    noisy = spatial(family, states_of(arguments)[:1], cells)
    time = arguments["timestep"].reshape(-1)[:1] * (1000 if family.startswith("flux") else 1)
    with torch.no_grad():
        asked = wrapped.predict(wrapped.model, noisy, time, wrapped.encode_prompts(["a cat"]))
    torch.testing.assert_close(calls[-1][1][0], output[0][:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked, spatial(family, output[0][:1], cells), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_model_has_no_loss_and_draws_the_picture(family, models, photos):
    """One oracle, which knows the picture, serves the loss and the pipeline's sampler: the target, the times and the scale
    of the latents are those that the pipeline draws with."""
    wrapped = load(models, family)
    side = SIZE.get(family, 32)
    latents, noise, times, conditions = batch(wrapped, photos, 6)
    latents = latents[:1]
    picture = packed(family, wrapped.scale(latents))

    def perfect(arguments):
        noisy = states_of(arguments)
        t = arguments["timestep"].reshape(-1, *[1] * (noisy.dim() - 1)).to(noisy.dtype)
        if family in FLOW:
            if family == "omnigen":
                return (picture - noisy) / (1 - t)
            return (noisy - picture) / (t / 1000 if family == "sd3" else t)
        kept = wrapped.noise_scheduler.alphas_cumprod[t.long()]
        return (noisy - kept.sqrt() * picture) / (1 - kept).sqrt()

    watch(wrapped.model, perfect)
    with torch.no_grad():
        loss = wrapped.loss(wrapped.model, latents.expand_as(noise), noise, times, conditions)
        expected = wrapped.to_images(wrapped.pipe.vae.decode(raw(family, wrapped, latents)).sample)[0]
    assert loss.item() < 1e-6  # of a target whose variance is 1 and more; divided by small times in float32
    drawn = wrapped.generate(["a cat"], [5], num_inference_steps=STEPS, height=side, width=side)[0]
    assert abs(pixels(drawn) - pixels(expected)).max() <= 1


def raw(family, wrapped, latents):
    """The VAE's own latents."""
    if family != "flux2-klein":
        return latents
    vae = wrapped.pipe.vae
    mean, deviation = (
        v[:, None, None] for v in (vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt())
    )
    return wrapped.pipe._unpatchify_latents(latents * deviation + mean)


@pytest.mark.parametrize("family, steps", [("flux", 5), ("flux2-klein", 50), ("omnigen", 5)])
def test_times_are_shifted_as_the_sampler_shifts_them(family, steps, models):
    wrapped = load(models, family)
    side, seen = SIZE.get(family, 32), []
    watch(wrapped.model, lambda arguments: seen.append(arguments["timestep"][0].item()) or states_of(arguments))
    wrapped.generate(["a cat"], [5], num_inference_steps=steps, height=side, width=side)
    sigmas = torch.linspace(1, 1 / steps, steps)
    cells = side // wrapped.size_multiple * (1 if family == "flux2-klein" else 2)
    shifted = wrapped.shift(sigmas, torch.empty(1, 1, cells, cells))
    assert torch.equal(shifted, sigmas) == (family == "omnigen")
    expected = 1 - shifted if family == "omnigen" else shifted
    torch.testing.assert_close(torch.tensor(sorted(set(seen))), expected.sort().values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_has_the_mean_loss_of_its_samples(family, models, photos):
    wrapped = load(models, family)
    together = batch(wrapped, photos, 2, prompts=("a cat", "a photo of a dog"))
    with torch.no_grad():
        loss = wrapped.loss(wrapped.model, *together).item()
        each = [
            wrapped.loss(
                wrapped.model, *(t[k : k + 1] for t in together[:3]), {n: v[k : k + 1] for n, v in together[3].items()}
            )
            for k in range(2)
        ]
    assert loss == pytest.approx(sum(each).item() / 2, rel=1e-5)
    assert abs(each[0].item() - each[1].item()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_depends_on_its_seed_and_not_on_the_batch(family, models):
    wrapped, side = load(models, family), SIZE.get(family, 32)
    size = {"num_inference_steps": STEPS, "height": side, "width": side}
    prompts = ["a cat", "a photo of a dog", "a cat"]
    together = [pixels(image) for image in wrapped.generate(prompts, [5, 6, 7], **size)]
    for prompt, seed, image in zip(prompts, (5, 6, 7), together):
        assert abs(pixels(wrapped.generate([prompt], [seed], **size)[0]) - image).max() <= 1
    assert abs(together[0] - together[2]).max() > 2
    own = wrapped.pipe(
        prompt=prompts[0], generator=torch.Generator().manual_seed(5), guidance_scale=wrapped.guidance_scale, **size
    )
    assert abs(pixels(own.images[0]) - together[0]).max() <= 1  # what the pipeline itself makes of it


def test_negative_prompts(models, tmp_path):
    for family in FAMILIES:
        wrapped, side = load(models, family), SIZE.get(family, 32)
        size = {"num_inference_steps": STEPS, "height": side, "width": side}
        if wrapped.takes_negative_prompt:
            plain, kept_out = (wrapped.generate(["a cat"], [5], text, **size)[0] for text in (None, "a photo of a dog"))
            assert abs(pixels(plain) - pixels(kept_out)).max() > 0, family
            continue
        o = SampleOptions(
            pretrained_model_name_or_path=models[family],
            prompt=["a cat"],
            negative_prompt="x",
            output_dir=str(tmp_path / "out"),
        )
        with pytest.raises(UserError, match="--negative_prompt does not apply to .*Pipeline"):
            sample(o)
        assert not (tmp_path / "out").exists()
    assert wrapped.kind == "OmniGenPipeline"


def test_sd3_without_its_largest_text_encoder(models, options, tmp_path):
    pipe = build("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "small")
    o = options("sd3", pretrained_model_name_or_path=str(tmp_path / "small"), validation_prompt="a cat")
    folder = train(dataclasses.replace(o, num_validation_images=1))
    assert len((folder / "loss.jsonl").read_text().splitlines()) == 3 and (folder / "validation.png").is_file()
    small, whole = load_family(str(tmp_path / "small"), torch.float32), load(models, "sd3")
    assert tuple(small.text_encoders) == ("text_encoder", "text_encoder_2") == tuple(whole.text_encoders)[:2]
    texts, all_texts = (f.encode_prompts(["a cat"])["encoder_hidden_states"] for f in (small, whole))
    clip = texts.abs().sum(-1) > 0
    assert texts.shape == all_texts.shape and torch.equal(texts[clip], all_texts[clip]) and 0 < clip.sum() < clip.numel()


def test_what_a_text_encoder_does_not_see(models):
    """Of 800 letters, a token each, and two tokens that mark the ends."""
    unseen = {family: len(load(models, family).cut_text("ab" * 400).replace(" ", "")) for family in FAMILIES}
    clip, t5, flux = 800 + 2 - tiny_pipelines.LENGTH, 800 + 2 - 256, 800 + 2 - 512
    expected = {"stable-diffusion": clip, "sdxl": clip, "sd3": t5, "flux": flux, "flux2-klein": flux, "omnigen": 0}
    assert unseen == expected


# the weighting of times --------------------------------------------------------------------------------------------------


def test_weighting_schemes(models, photos):
    """Drawn as SD 3's paper says (section 3.1): means and spreads of the schemes; weights of the loss by sigma."""
    wrapped = load(models, "omnigen")  # whose times are not shifted
    latents, noise, _, conditions = batch(wrapped, photos, 1)

    def times(scheme):
        wrapped.weighting_scheme = scheme
        return torch.stack([wrapped.draw_time(torch.Generator().manual_seed(k)) for k in range(4000)])

    def spread(values):
        return values.mean().item(), values.std().item()

    assert spread(times("none")) == pytest.approx((0.5, 12**-0.5), abs=0.01)
    logit_normal = times("logit_normal")
    assert spread(logit_normal.logit()) == pytest.approx((0, 1), abs=0.05)
    assert torch.equal(times(None), logit_normal)
    u = times("none")
    torch.testing.assert_close(times("mode"), 1 - u - 1.29 * ((math.pi * u / 2).cos() ** 2 - 1 + u))
    for scheme, weight in (("none", 1.0), ("sigma_sqrt", 0.25**-2), ("cosmap", 2 / (math.pi * (1 - 0.5 + 2 * 0.25**2)))):
        wrapped.weighting_scheme = scheme
        with torch.no_grad():
            loss = wrapped.loss(wrapped.model, latents, noise, torch.tensor([0.75]), conditions).item()
        if scheme == "none":
            plain = loss
        assert loss == pytest.approx(weight * plain, rel=1e-5), scheme


def test_options_of_the_other_kind_of_model(options, tmp_path):
    for family in FAMILIES:
        wrong = {"snr_gamma": 5.0} if family in FLOW else {"weighting_scheme": "mode"}
        with pytest.raises(UserError, match=f"--{next(iter(wrong))} does not apply to .*Pipeline"):
            train(options(family, **wrong))
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--resolution must be at most 128, all that the model has positions for, got 144"):
        train(options("omnigen", resolution=144))
    for method in ("deft", "para", "lora", "dreambooth"):
        with pytest.raises(
            UserError, match="--train_text_encoder does not apply to OmniGenPipeline: it has no text encoder"
        ):
            train(options("omnigen", method=method, train_text_encoder=True))


def test_weighting_changes_the_run_and_is_on_record(options, tmp_path):
    runs = {}
    for scheme in (None, "logit_normal", "cosmap"):
        folder = train(options("sd3", weighting_scheme=scheme, output_dir=str(tmp_path / str(scheme))))
        runs[scheme] = [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]
        assert json.loads((folder / "training_args.json").read_text())["weighting_scheme"] == scheme
    assert runs[None] == runs["logit_normal"] != runs["cosmap"]


@pytest.mark.parametrize("family", FAMILIES)
def test_precision_and_guidance_are_the_familys_own_where_none_are_asked_for(family, models):
    wrapped = load_family(models[family], None)
    assert wrapped.dtype == (torch.bfloat16 if family in FLOW else torch.float16)
    assert {part.dtype for part in wrapped.text_encoders.values()} <= {
        wrapped.dtype
    } and wrapped.pipe.vae.dtype == torch.float32
    own = inspect.signature(wrapped.pipe.__call__).parameters["guidance_scale"].default
    assert wrapped.guidance_scale == own


def test_a_family_that_is_not_there(models, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(
        UserError, match="is a KolorsPipeline, .*StableDiffusionXLPipeline.*Flux2KleinPipeline, OmniGenPipeline"
    ):
        load_family(str(tmp_path), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_draws_in_bfloat16(family, options, models, tmp_path):
    """The base in bfloat16, the adapter and the VAE in float32; words and all of the model are cast by autocast."""
    for method in ("deft", "dreambooth", "textual_inversion"):
        o = options(family, method=method, mixed_precision="bf16", max_train_steps=1, output_dir=str(tmp_path / method))
        wrapped = load_family(models[family], torch.bfloat16)
        folder = train(dataclasses.replace(o, instance_prompt="a <sks>"), wrapped)
        assert math.isfinite(json.loads((folder / "loss.jsonl").read_text())["loss"])
        size = {"num_inference_steps": STEPS, "height": SIZE.get(family, 32), "width": SIZE.get(family, 32)}
        assert pixels(wrapped.generate(["a <sks>"], [5], **size)[0]).std() > 1  # as validation does
        o = SampleOptions(
            pretrained_model_name_or_path=models[family], adapter=[str(folder)], prompt=["a cat"], dtype="bf16",
            output_dir=str(tmp_path / f"{method}-drawn"), **size,
        )  # fmt: skip
        assert pixels(sample(o)[0]).std() > 1


# instructions with pictures ----------------------------------------------------------------------------------------------


SPEAKS = "turn <img><|image_1|></img> into a cat"


def test_instructions_with_input_pictures(options, models, photos, tmp_path, capsys):
    """OmniGen's: told in metadata.jsonl, seen in training as the pipeline sees them, drawn with by `deft sample`."""
    (photos / "inputs").mkdir()
    seen = [write_picture(photos / "inputs" / f"{k}.png", 20 + k, size) for k, size in enumerate([(70, 50), (32, 48)])]
    lines = [{"file_name": f"{k}.png", "text": SPEAKS, "input_images": [f"inputs/{k % 2}.png"]} for k in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    o = options("omnigen", rank=2, learning_rate=5e-2, max_train_steps=16, caption_dropout=0.2)
    wrapped = load(models, "omnigen")
    pictures = [data.load(source, [(64, 64)]) for source in data.find_sources(photos, "a cat")]
    assert [len(p.inputs) for p in pictures] == [1, 1, 1, 0]
    samples = Samples(pictures, wrapped, 77, False, False)
    assert len(samples.texts) == 4  # one text with three pictures, one alone
    together = samples.batch(range(4), torch.device("cpu"))
    assert len({len(places) for places in together[3]["places"]}) == 2
    with torch.no_grad():
        loss = wrapped.loss(wrapped.model, *together).item()
        each = [
            wrapped.loss(
                wrapped.model, *(t[k : k + 1] for t in together[:3]), {n: v[k : k + 1] for n, v in together[3].items()}
            )
            for k in range(4)
        ]
    assert loss == pytest.approx(sum(each).item() / 4, rel=1e-5)  # whatever their lengths, and however they are padded

    images = [data.read_image(path) for path in seen]
    calls = watch(wrapped.model)
    drawn = [
        wrapped.generate([SPEAKS], [5], num_inference_steps=STEPS, height=64, width=64, input_images=[i])[0] for i in images
    ]
    arguments, output = calls[-1]
    with torch.no_grad():
        conditions = wrapped.encode_prompts([SPEAKS], [images[1:]])
        asked = wrapped.predict(wrapped.model, states_of(arguments)[:1], arguments["timestep"][:1], conditions)
    torch.testing.assert_close(asked, output[0][:1], rtol=1e-4, atol=1e-5)
    assert abs(pixels(drawn[0]) - pixels(drawn[1])).max() >= 2

    wrapped = load(models, "omnigen")
    folder = train(o, wrapped)
    trained = wrapped.generate([SPEAKS], [5], num_inference_steps=STEPS, height=64, width=64, input_images=images[:1])[0]
    words = {"prompt": [SPEAKS], "seed": 5, "num_inference_steps": STEPS, "height": 64, "width": 64}
    again = SampleOptions(
        pretrained_model_name_or_path=models["omnigen"], adapter=[str(folder)], input_image=[str(seen[0])],
        output_dir=str(tmp_path / "drawn"), **words,
    )  # fmt: skip
    assert abs(pixels(sample(again)[0]) - pixels(trained)).max() <= 1
    assert json.loads((tmp_path / "drawn" / "samples.json").read_text())["settings"]["input_image"] == [str(seen[0])]

    for number, (family, text, inputs, message) in enumerate([
        ("omnigen", SPEAKS, [], "comes with 0 input pictures: name each of them"),
        ("omnigen", "a cat", ["inputs/0.png"], "comes with 1 input pictures: name each of them"),
        ("omnigen", SPEAKS, ["inputs/9.png"], "cannot read the picture .*9.png"),
        ("omnigen", SPEAKS, "inputs/0.png", "line 1: input_images must be a list of paths"),
        ("sdxl", SPEAKS, ["inputs/0.png"], "StableDiffusionXLPipeline takes no input pictures"),
    ]):  # fmt: skip
        line = {"file_name": "0.png", "text": text, "input_images": inputs}
        (photos / "metadata.jsonl").write_text(json.dumps(line))
        with pytest.raises(UserError, match=message):
            train(options(family, output_dir=str(tmp_path / f"wrong{number}")))
        assert not (tmp_path / f"wrong{number}").exists()


def test_a_new_word_beside_input_pictures(options, models, photos):
    """OmniGen's words are learned in its transformer, in instructions with pictures and without."""
    (photos / "inputs").mkdir()
    seen = write_picture(photos / "inputs" / "0.png", 20, (70, 50))
    texts = ["turn <img><|image_1|></img> into a <sks>", "a <sks>"]
    lines = [{"file_name": f"{k}.png", "text": texts[k > 0], "input_images": ["inputs/0.png"][k:]} for k in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    o = options("omnigen", method="textual_inversion", train_batch_size=3, **WORD)
    wrapped, fresh = load(models, "omnigen"), load(models, "omnigen")
    table = wrapped.model.embed_tokens.weight
    folder = train(o, wrapped)
    assert not any(p.grad is not None for p in wrapped.pipe.vae.parameters())  # which the input pictures went through
    spare = torch.nn.Embedding(len(table) + 9, table.shape[1])  # as the real model's has
    spare.weight.data[: len(table)] = table.detach()
    fresh.model.embed_tokens = spare
    load_adapters(fresh, [folder])
    assert fresh.model.embed_tokens is spare and len(fresh.pipe.tokenizer) == len(table) + 2
    rows = load_file(folder / "learned_embeds.safetensors")["<sks>"]
    assert torch.equal(spare.weight[len(table) : len(table) + 2], rows) and not torch.equal(rows[0], rows[1])
    lengths = [fresh.encode_prompts([text])["input_ids"].shape[1] for text in ("a <sks>", "a x")]
    assert lengths[0] - lengths[1] == 2  # two tokens, and a space between them
    draw = {"num_inference_steps": STEPS, "height": 64, "width": 64, "input_images": [data.read_image(seen)]}
    pictures = [family.generate(texts[:1], [5], **draw)[0] for family in (wrapped, fresh, load(models, "omnigen"))]
    assert np.array_equal(*map(pixels, pictures[:2])) and not np.array_equal(*map(pixels, pictures[1:]))
