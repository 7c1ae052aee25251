"""Suite: one forward of a whole denoiser without gradients, and the draw of a picture in a few steps.

No peer is timed before what it predicts, or draws, is within AGREE of the base model on the weights that reference.py makes
in float64 of the same adapter, which is not at its identity. What is merged for its turns is unmerged after them, and
every weight is as it was, to the bit.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import deft_kernels as dk
from benchmarks import measure
from benchmarks.cases import Draw, double
from benchmarks.layer import cannot_compile, patched
from benchmarks.models import adapt, factors, peer, put, share_changed, taking_part, whole
from benchmarks.peers import DEFT, LORA, PATCHED, PEFT_DEFT, PEFT_LORA
from benchmarks.suite import Bench, Options, Peer
from benchmarks.training import AGREE, Setting, apart, base_model, make_batch
from deft_kernels.adapters.inject import match_targets

BASE, MERGED = "base model", "DEFT merged, here"
BASE_COMPILED, MERGED_COMPILED = "base model, compiled", "DEFT merged, compiled, here"
PROMPT, GUIDANCE = "a photo of a cat in the snow", 4.0
STEPS = {"tiny": 2, "small": 8, "full": 20}  # of a draw
WEIGHTS, ADAPTED, ACTIVATIONS = 2.57e9, 0.96e9, 0.5e9  # numbers that SDXL's forward holds, the last at 512 x 512 and batch 1


def benches(options: Options) -> Iterator[Bench]:
    for setting in settings(options):
        yield bench("a denoiser's forward", setting, options, predicting)
    for batch_size in (1, 4) if options.size == "full" else (1,):
        setting = Setting(options.device, kind(options), batch_size=batch_size)
        steps = STEPS[options.size]
        yield bench(f"a draw, {steps} steps", setting, options, functools.partial(drawing, steps))


def bench(what: str, setting: Setting, options: Options, work: Callable) -> Bench:
    made = functools.partial(peers, setting, options, work)
    clock = "device" if work is predicting else "wall"
    few = 3 if setting.model == "sdxl" and options.device.type == "cpu" else None
    return Bench("sampling", what, str(setting), setting.dtype, BASE, made, budget=1.0, rounds=few, clock=clock)


def kind(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.device.type == "cuda" else torch.float32


def settings(options: Options) -> Iterator[Setting]:
    on_gpu, full = options.device.type == "cuda", options.size == "full"
    for batch_size in (1, 4) if full else (1,):
        yield Setting(options.device, kind(options), batch_size=batch_size)
    for resolution in (512, 1024) if full and on_gpu else (512,) if full else ():
        for batch_size in (1, 4) if on_gpu else (1,):
            yield Setting(options.device, kind(options), "sdxl", resolution, batch_size)


# What is done: a maker of it takes a setting and its base model; it takes any denoiser like that one -----------------


def predicting(setting: Setting, base: nn.Module) -> Callable[[nn.Module], Tensor]:
    inputs = {name: value for name, value in make_batch(setting, base).items() if name != "noise"}
    return lambda unet: unet(**inputs)[0]


def drawing(steps: int, setting: Setting, base: nn.Module) -> Callable[[nn.Module], Tensor]:
    from deft_diffusers.toyworld import MODEL_DIR
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIR, unet=base, torch_dtype=setting.dtype).to(setting.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(unet: nn.Module) -> Tensor:
        pipe.unet, seeded = unet, torch.Generator().manual_seed(0)
        prompts = [PROMPT] * setting.batch_size
        return pipe(prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=seeded, output_type="pt").images

    return draw


# The peers ------------------------------------------------------------------------------------------------------------


def peers(setting: Setting, options: Options, work: Callable) -> dict[str, Peer]:
    if not find_spec("diffusers"):
        return {BASE: Peer(note="diffusers is not installed")}
    if setting.model == "sdxl":
        grown = ACTIVATIONS * setting.batch_size * (setting.resolution / 512) ** 2
        if note := measure.lacking(int(setting.dtype.itemsize * (WEIGHTS + 2 * ADAPTED + grown)), setting.device):
            return {DEFT: Peer(note=f"{setting}: {note}")}
    base = base_model(setting).eval()
    names = match_targets(base, dk.DeftConfig())
    W = [base.get_submodule(name).weight.detach() for name in names]
    draw = Draw(setting.device, setting.dtype)
    P = [draw(w.shape[0], setting.rank, scale=w.shape[0] ** -0.5, dtype=torch.float32) for w in W]
    R = [draw(setting.rank, w.shape[1], scale=w.shape[1] ** -0.5, dtype=torch.float32) for w in W]
    does = work(setting, base)
    kept = [w.clone() for w in W]
    plain = functools.partial(call, does, base)
    truths = {lora: by_reference(plain, W, kept, P, R, lora) for lora in (False, True)}
    none = None if work is predicting else contextlib.nullcontext  # a pipeline waits for the device: no CUDA graph of that
    found = {BASE: Peer([plain], around=none)}
    slow = work is not predicting and setting.device.type == "cpu" and options.size != "full"  # another minute each
    later = "in a draw: --size full" if slow else None
    compiled = (BASE_COMPILED, MERGED_COMPILED) if options.size != "tiny" else ()
    for who in taking_part((MERGED, DEFT, LORA, PEFT_DEFT, PATCHED, PEFT_LORA, *compiled), options, found):
        if who in compiled and (reason := cannot_compile(setting.device) or later):
            found[who] = Peer(note=reason)
            continue
        unet = with_adapter(base, names, who, P, R)
        run = functools.partial(call, does, torch.compile(unet, dynamic=False) if who in compiled else unet)
        around = none
        if who in (MERGED, MERGED_COMPILED):
            around = functools.partial(merged, unet, run)
        elif who == PATCHED:
            around = functools.partial(patched, [run], unet)
        with (around or contextlib.nullcontext)():
            distance = apart(run(), plain() if unet is base else truths[who in (LORA, PEFT_LORA)])
        changed = share_changed(W, kept)
        reason = None if distance <= AGREE[setting.dtype] else f"{distance:.1e} away from the reference's"
        if changed:
            reason = f"{changed:.1%} of the weights are not what they were before its turn"
        found[who] = peer(reason, [run], around=around)
    return found


@torch.no_grad()
def call(does: Callable, unet: nn.Module) -> Tensor:
    return does(unet)


@torch.no_grad()
def by_reference(call: Callable[[], Tensor], W, kept, P, R, lora: bool) -> Tensor:
    """What a call gives on the weights W' that the reference makes in float64; W is as it was then."""
    for w, *given in zip(W, kept, P, R):
        w.copy_(whole(*([double(t)] for t in given), lora)[0])
    result = call()
    for w, before in zip(W, kept):
        w.copy_(before)
    return result


def with_adapter(base: nn.Module, names: list[str], who: str, P: list[Tensor], R: list[Tensor]) -> nn.Module:
    """A tree of modules of its own on the base model's weights, with this adapter."""
    if who == BASE_COMPILED:
        return base
    unet = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
    who = {MERGED: DEFT, MERGED_COMPILED: DEFT, PATCHED: PEFT_DEFT}.get(who, who)
    adapt(unet, names, who, P[0].shape[1])
    held = factors(unet, names)
    put(held, (P, R))
    for t in (*held[0], *held[1]) if who == PEFT_LORA else ():
        t.data = t.data.to(base.dtype)  # as PEFT is fastest; its DEFT is float32 whatever it holds
    return unet.eval()


@contextlib.contextmanager
def merged(unet: nn.Module, call: Callable):
    """Merged, in the storage that the base model's weights have; a first call has read them."""
    dk.merge(unet)
    call()
    yield
    dk.unmerge(unet)
