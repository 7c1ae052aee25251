"""A training step of a whole denoiser beside its peers.

A step is forward, backward, gradient clipping and AdamW, the same batch and the same optimizer for every peer, at the same
rank on the same layers (OFT's rank is, as PEFT has it, the number of its blocks). The peak of memory is what a fresh
process of each peer takes beside the base model, the median of three. No peer is timed before

- its prediction at the start is the base model's (but PaRa's, which has no such start);
- away from the start, its prediction and all its gradients are those of the same model whose adapted layers are
  reference.py's, whoever else takes part (but OFT's, whose layer alone is compared, in the suite "layer").

In float32 these agree to AGREE and GRADIENTS. In bfloat16 the truth is that model in float32, and the prediction, and the
median gradient, may be OWN_ERROR times as far from it as the reference's in bfloat16 is. (One layer's gradient may be all
rounding there: each layer by itself is compared in the suite "layer".)
"""

import contextlib
import copy
import functools
import gc
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import deft_kernels as dk
from benchmarks import measure, shapes
from benchmarks.peers import DEFT, LORA, LYCORIS, LYCORIS_BYPASS, PARA, PATCHED, PEFT_DEFT, PEFT_LORA, PEFT_OFT, is_here
from benchmarks.suite import Bench, Options, Peer
from deft_kernels import reference
from deft_kernels.nn import DeftLayer

FROZEN = "frozen model"
HERE = (FROZEN, DEFT, PARA, LORA)
OTHERS = (PEFT_LORA, PEFT_DEFT, PATCHED, PEFT_OFT, LYCORIS, LYCORIS_BYPASS)
NEEDS = {who: "peft" if "PEFT" in who else "lycoris" for who in OTHERS}
# Who here has the same parameters
COUNTERPARTS = dict.fromkeys((LORA, PEFT_LORA, LYCORIS, LYCORIS_BYPASS), LORA)
COUNTERPARTS |= dict.fromkeys((DEFT, PEFT_DEFT, PATCHED), DEFT) | {PARA: PARA}
MODELS = {"toyworld": "the embedded UNet", "sdxl": "SDXL's UNet"}
PER_LATENT = {"toyworld": 4, "sdxl": 8}  # pixels along a side
TOKENS = {"toyworld": 32, "sdxl": 77}
# Relative distances that two ways to the same prediction, or gradient of one layer, may have through a whole denoiser
AGREE, GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}, 1e-3
OWN_ERROR = 2  # seen, in ten draws of the embedded UNet's adapters: 1.1 of predictions, 1.7 of gradients
# Numbers that SDXL's step holds: the weights; what LyCORIS makes of the adapted ones; activations at 512 x 512, by a count
# at 256 x 256
WEIGHTS, TRAINED, ACTIVATIONS = 2.57e9, 1e9, 2e9
PROCESSES = 3  # whose median is the peak of memory


@dataclass(frozen=True)
class Setting:
    """A denoiser and its batch."""

    device: torch.device
    dtype: torch.dtype
    model: str = "toyworld"  # the embedded UNet; or "sdxl", with random weights
    resolution: int = 64  # pixels along a side
    batch_size: int = 1
    gradient_checkpointing: bool = False
    rank: int = 8

    def __str__(self) -> str:
        pixels = f"{self.resolution} x {self.resolution}"
        return f"{MODELS[self.model]}, {pixels}, batch {self.batch_size}" + ", checkpointing" * self.gradient_checkpointing


def benches(options: Options) -> Iterator[Bench]:
    for setting in settings(options):
        yield Bench(
            "training", "a training step", str(setting), setting.dtype, floor=PEFT_LORA,
            peers=functools.partial(peers, setting, options),
            at={"rank": setting.rank, "batch": setting.batch_size, "pixels": setting.resolution**2},
            budget=5.0 if options.size == "full" else 1.5, clock="wall",
        )  # fmt: skip


def settings(options: Options) -> Iterator[Setting]:
    on_gpu = options.device.type == "cuda"
    one = functools.partial(Setting, options.device, torch.bfloat16 if on_gpu else torch.float32)
    for batch_size in (1,) if options.size == "tiny" else (1, 4):
        yield one(batch_size=batch_size)
    if options.size == "full":
        for resolution in (512, 1024) if on_gpu else (256, 512):
            for checkpointing in (False, True):
                yield one("sdxl", resolution, gradient_checkpointing=checkpointing)


# The model and its batch ----------------------------------------------------------------------------------------------


def base_model(setting: Setting) -> nn.Module:
    """The frozen denoiser, as it trains."""
    from diffusers import UNet2DConditionModel

    if setting.model == "toyworld":
        from deft_diffusers.toyworld import MODEL_DIR

        unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet", torch_dtype=setting.dtype)
        unet = unet.to(setting.device)
    else:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**shapes.SDXL_UNET).to(setting.dtype)
        fill(unet.to_empty(device=setting.device))
    if setting.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.requires_grad_(False).train()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights that keep activations near 1, at the cost of a copy: all are parts of one row of random numbers."""
    most, at = 1 << 23, 0
    row = torch.randn(2 * most, device=next(model.parameters()).device)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 1:
                p.fill_(float(name == "weight"))  # of a norm; or a bias
                continue
            for part in p.view(-1).split(most):
                part.copy_(row[at : at + part.numel()]).mul_(p[0].numel() ** -0.5)
                at = (at + 7919) % most  # no two weights of a shape are alike


def make_batch(setting: Setting, unet: nn.Module) -> dict:
    """What a step takes: noisy latents, noise, times and texts; all random."""
    n, side = setting.batch_size, setting.resolution // PER_LATENT[setting.model]
    kind = {"device": setting.device, "dtype": setting.dtype}
    texts, extra = torch.randn(n, TOKENS[setting.model], unet.config.cross_attention_dim, **kind), None
    if setting.model == "sdxl":
        ids = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]], **kind) * setting.resolution
        extra = {"text_embeds": torch.randn(n, 1280, **kind), "time_ids": ids.repeat(n, 1)}
    inputs = {"encoder_hidden_states": texts, "added_cond_kwargs": extra, "return_dict": False}
    noisy, noise = torch.randn(2, n, unet.config.in_channels, side, side, **kind)
    return {"sample": noisy, "timestep": torch.randint(1000, (n,), device=setting.device), "noise": noise} | inputs


# The peers ------------------------------------------------------------------------------------------------------------


class Trainee:
    """A tree of modules of its own on the base model's weights, with what trains in it, and its batch."""

    def __init__(self, who: str, base: nn.Module, setting: Setting):
        self.setting, self.patched = setting, who == PATCHED
        self.model = model = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
        adapt(model, who, setting.rank)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for p in self.trained.values():
            p.data = p.data.to(setting.device, torch.float32)  # as diffusers' trainers: masters in float32
        self.parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True) if self.parameters else None

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss and the prediction."""
        inputs, dtype = {k: v for k, v in batch.items() if k != "noise"}, self.setting.dtype
        if not self.parameters:
            inputs["sample"] = inputs["sample"].clone().requires_grad_()
        with torch.autocast(self.setting.device.type, dtype, enabled=dtype != torch.float32):
            prediction = self.model(**inputs)[0]
        return F.mse_loss(prediction.float(), batch["noise"].float()), prediction.detach()

    def step(self, batch: dict) -> None:
        self.loss(batch)[0].backward()
        if self.parameters:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self, batch: dict) -> dict[str, Tensor]:
        """Those of all that trains, if anything does, by name; and the prediction."""
        loss, prediction = self.loss(batch)
        grads = torch.autograd.grad(loss, self.parameters) if self.parameters else ()
        return {"prediction": prediction} | {twin(name): g for name, g in zip(self.trained, grads)}

    def exact(self, batch: dict) -> dict[str, Tensor]:
        """`gradients` of the same by the reference in float32."""
        other = copy.copy(self)
        other.setting, other.model = replace(self.setting, dtype=torch.float32), copy.deepcopy(self.model).float()
        other.trained = {name: p for name, p in other.model.named_parameters() if p.requires_grad}
        other.parameters = list(other.trained.values())
        wide = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        with by_reference(other.model):
            return other.gradients(wide)

    @contextlib.contextmanager
    def turn(self, batch: dict):
        """What is of the whole process. What a patch keeps beside PEFT's layers is made in the first step after it."""
        if self.patched:
            dk.patch_peft(self.model)
            self.gradients(batch)
        yield
        if self.patched:
            dk.unpatch_peft()


def adapt(model: nn.Module, who: str, r: int) -> None:
    """Give a denoiser the adapters that a peer trains, on the layers that are adapted by default."""
    targets = list(dk.config.TARGETS[type(model).__name__])
    if who in (DEFT, PARA):
        dk.inject_adapter(model, dk.DeftConfig(r=r, para=who == PARA))
    elif who == LORA:
        dk.inject_adapter(model, dk.LoraConfig(r=r))
    elif who in (LYCORIS, LYCORIS_BYPASS):
        from lycoris.modules.locon import LoConModule

        for layer in [m for name, m in model.named_modules() if name.endswith(tuple(f".{t}" for t in targets))]:
            layer.lycoris = LoConModule("", layer, lora_dim=r, alpha=r, bypass_mode=who == LYCORIS_BYPASS)
            layer.lycoris.apply_to()
    elif who != FROZEN:
        import peft

        config = {
            PEFT_LORA: lambda: peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets),
            PEFT_OFT: lambda: peft.OFTConfig(r=r, oft_block_size=0, target_modules=targets),
        }.get(who, lambda: peft.DeftConfig(r=r, decomposition_method="qr", target_modules=targets))
        peft.inject_adapter_in_model(config(), model)


def twin(name: str) -> str:
    """What a parameter of PEFT's or LyCORIS's is called here."""
    for theirs in ("lora_B.default.weight", "lycoris.lora_up.weight"):
        name = name.replace(theirs, "deft_P.default")
    for theirs in ("lora_A.default.weight", "lycoris.lora_down.weight"):
        name = name.replace(theirs, "deft_R.default")
    return name


# The gate -------------------------------------------------------------------------------------------------------------


def apart(got: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return ((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()


@contextlib.contextmanager
def by_reference(model: nn.Module):
    """Its adapted layers are reference.py's, differentiated by autograd."""
    layers = [module for module in model.modules() if isinstance(module, DeftLayer)]
    for layer in layers:
        layer.forward = functools.partial(of_reference, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def of_reference(layer: DeftLayer, x: Tensor) -> Tensor:
    tensors, lora = layer.adapter_tensors("default"), isinstance(layer.configs["default"], dk.LoraConfig)
    P, R = tensors["P"], tensors.get("R")
    with torch.autocast(x.device.type, enabled=False):
        B, A = (P, R) if lora else reference.factors(layer.weight.to(P.dtype), P, R)
        x = x.to(layer.weight.dtype)
        return reference.lowrank_linear(x, layer.weight, layer.bias, B.to(x.dtype), A.to(x.dtype))


def gate(trainees: dict[str, Trainee], batch: dict) -> dict[str, str]:
    """{peer: why it is not to be timed}."""
    wrong, (truth, own) = {}, expected_of(trainees[FROZEN], batch)
    for who, trainee in tqdm(trainees.items(), desc="checks", leave=False, disable=None):
        if who == PARA:
            continue
        with trainee.turn(batch), torch.no_grad():
            prediction = trainee.loss(batch)[1]
        if reason := too_far({"prediction": prediction}, truth, own):
            wrong[who] = f"at its start {reason}"
    for ours in (DEFT, PARA, LORA):
        for p in trainees[ours].parameters:
            p.data.add_(torch.randn_like(p) * 0.02)
        truth, own = expected_of(trainees[ours], batch)
        for who in (who for who, other in COUNTERPARTS.items() if other == ours and who in trainees):
            for key, p in trainees[who].trained.items():
                p.data.copy_(trainees[ours].trained[twin(key)])
            with trainees[who].turn(batch):
                found = trainees[who].gradients(batch)
            if reason := too_far(found, truth, own):
                wrong[who] = reason
    return wrong


def expected_of(trainee: Trainee, batch: dict) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a model by the reference predicts, and its gradients; in half precision those in float32, and the distances of
    its own from them."""
    with by_reference(trainee.model):
        found = trainee.gradients(batch)
    if trainee.setting.dtype == torch.float32:
        return found, {}
    exact = trainee.exact(batch)
    return exact, {key: apart(value, exact[key]) for key, value in found.items()}


def too_far(found: dict[str, Tensor], truth: dict[str, Tensor], own: dict[str, float]) -> str | None:
    """Which of the distances is too large, or None."""
    limits = {key: OWN_ERROR * error for key, error in own.items()}
    limits = limits or dict.fromkeys(found, GRADIENTS) | {"prediction": AGREE[torch.float32]}
    excess = {key: apart(value, truth[key]) / limits[key] for key, value in found.items()}
    if own and len(excess) > 1:
        excess = {"prediction": excess.pop("prediction"), "the median gradient": statistics.median(excess.values())}
    worst = max(excess, key=excess.get)
    if all(value <= 1 for value in excess.values()):
        return None
    return f"{worst} is {excess[worst]:.2g} times as far from the reference's as it may be"


# Together -------------------------------------------------------------------------------------------------------------


def peers(setting: Setting, options: Options) -> dict[str, Peer]:
    """All of them on the same weights and the same batch."""
    wanted = [who for who in HERE + OTHERS if who in HERE or is_here(who) or who == PEFT_LORA or options.wants(who)]
    if reason := absent("diffusers") or too_large(setting):
        return {who: Peer(note=reason) for who in wanted}
    notes = {who: Peer(note=reason) for who in wanted if (reason := who in NEEDS and absent(NEEDS[who]))}
    used: dict[str, dict] = {}
    measured = [] if options.size == "tiny" else [who for who in wanted if who not in notes]
    for who in tqdm(measured, "memory", leave=False, disable=None):
        try:
            used[who] = {"memory": statistics.median(in_fresh_process(who, setting) for _ in range(PROCESSES))}
        except (torch.OutOfMemoryError, BrokenProcessPool):  # the second where the system ends what takes too much
            notes[who] = Peer(note="out of memory")
    if FROZEN in notes:
        return {who: Peer(note="out of memory") for who in wanted}
    base = base_model(setting)
    batch = make_batch(setting, base)
    trainees = {who: Trainee(who, base, setting) for who in wanted if who not in notes}
    wrong = gate(trainees, batch)
    found = {}
    for who, trainee in trainees.items():
        more = used.get(who, {}) | {"trained": sum(p.numel() for p in trainee.parameters)}
        if who in wrong:
            found[who] = Peer(note=f"RED: {wrong[who]}", red=True, more=more)
            continue
        step, turn = functools.partial(trainee.step, batch), functools.partial(trainee.turn, batch)
        found[who] = Peer([step], more=more, around=turn)  # all have one: no step is captured as a CUDA graph
    return {who: (found | notes)[who] for who in wanted}


def absent(library: str) -> str:
    return "" if find_spec(library) else f"{library} is not installed"


def too_large(setting: Setting) -> str | None:
    """Why a setting is left out on this machine, or None."""
    gc.collect()  # the last one's models
    if setting.model != "sdxl":
        return None
    activations = ACTIVATIONS / (3 if setting.gradient_checkpointing else 1) * (setting.resolution / 512) ** 2
    size = setting.dtype.itemsize + 4 * (setting.dtype != torch.float32)  # half precision is compared with float32
    return measure.lacking(int(size * (WEIGHTS + TRAINED + activations * setting.batch_size)), setting.device)


def memory(who: str, setting: Setting, threads: int) -> int:
    """Most bytes that some steps of a peer take beside the base model, in this process."""
    torch.set_num_threads(threads)
    base = base_model(setting)
    batch = make_batch(setting, base)
    dk.backends()  # csrc's library is loaded, as PEFT is: that is not what a step takes
    gc.collect()
    with measure.peak(setting.device.type) as peak:
        trainee = Trainee(who, base, setting)
        with trainee.turn(batch):
            for _ in range(2):
                trainee.step(batch)
    return peak.bytes


def in_fresh_process(who: str, setting: Setting) -> int:
    """`memory` in a process that has done nothing but import."""
    context = multiprocessing.get_context("spawn" if setting.device.type == "cuda" else "forkserver")
    if setting.device.type == "cpu":  # no device that a fork would break
        context.set_forkserver_preload(["__main__", __name__, "diffusers", "peft", "lycoris.modules.locon"])
    with ProcessPoolExecutor(1, context) as one:
        return one.submit(memory, who, setting, torch.get_num_threads()).result()
