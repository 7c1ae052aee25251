"""A training step of a whole denoiser beside its peers: `python -m benchmarks.training --help`.

A step is forward, backward, gradient clipping and AdamW, the same batch and the same optimizer for every peer, at the same
rank on the same layers. Each round times every peer once, in turn; a figure is the median over the rounds, a ratio the
median of the rounds' ratios to PEFT's LoRA. The peak of memory is what a fresh process of each peer takes beside the base
model. No peer is timed before

- its prediction at the start is the base model's (of PaRa, which has no such start: every adapted layer's output is
  reference.py's);
- away from the start, its prediction and all its gradients are its counterpart's: PEFT's LoRA and LoRA here, PEFT's DEFT,
  patched or not, and DEFT here.

One that is not says RED instead, and the exit status is 1.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from deft_diffusers.toyworld import MODEL_DIR
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

import deft_kernels as dk
from benchmarks import measure, shapes
from deft_kernels import reference
from deft_kernels.nn import DeftLayer

PEERS = {
    "frozen": "frozen model",
    "deft": "DEFT here",
    "para": "PaRa here",
    "lora": "LoRA here",
    "peft_lora": "LoRA, PEFT",
    "peft_deft": "DEFT, PEFT",
    "peft_deft_patched": "DEFT, PEFT patched",
}
COUNTERPARTS = {"peft_lora": "lora", "peft_deft": "deft", "peft_deft_patched": "deft"}
FLOOR, UNIT = "frozen", "peft_lora"
LATENT = {"toyworld": 4, "sdxl": 8}  # pixels along a latent's side
TOKENS = {"toyworld": 32, "sdxl": 77}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative distances that two ways to the same prediction, or gradient of one layer, may have through a whole denoiser
AGREE = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 0.5)}


# The model and its batch ----------------------------------------------------------------------------------------------


def base_model(options) -> UNet2DConditionModel:
    """The frozen denoiser, as it trains."""
    dtype = DTYPES[options.dtype]
    if options.model == "toyworld":
        unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet", torch_dtype=dtype).to(options.device)
    else:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**shapes.SDXL_UNET).to(dtype)
        fill(unet.to_empty(device=options.device))
    if options.gradient_checkpointing:
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


def make_batch(options, width: int) -> dict:
    """What a step takes: noisy latents, noise, times and texts of this width; all random."""
    n, side = options.batch_size, options.resolution // LATENT[options.model]
    kind = {"device": options.device, "dtype": DTYPES[options.dtype]}
    texts, extra = torch.randn(n, TOKENS[options.model], width, **kind), None
    if options.model == "sdxl":
        ids = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]], **kind) * options.resolution
        extra = {"text_embeds": torch.randn(n, 1280, **kind), "time_ids": ids.repeat(n, 1)}
    inputs = {"encoder_hidden_states": texts, "added_cond_kwargs": extra, "return_dict": False}
    noisy, noise = torch.randn(2, n, 4, side, side, **kind)
    return {"sample": noisy, "timestep": torch.randint(1000, (n,), device=options.device), "noise": noise} | inputs


# The peers ------------------------------------------------------------------------------------------------------------


class Peer:
    """A tree of modules of its own on the base model's weights, with what trains in it."""

    def __init__(self, name: str, base: nn.Module, options):
        self.options, self.patched = options, name == "peft_deft_patched"
        self.model = model = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
        r, targets = options.rank, list(dk.config.TARGETS[type(base).__name__])
        if name in ("deft", "para"):
            dk.inject_adapter(model, dk.DeftConfig(r=r, para=name == "para"))
        elif name == "lora":
            dk.inject_adapter(model, dk.LoraConfig(r=r))
        elif name == "peft_lora":
            peft.inject_adapter_in_model(peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets), model)
        elif name != FLOOR:
            config = peft.DeftConfig(r=r, decomposition_method="qr", target_modules=targets)
            peft.inject_adapter_in_model(config, model)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for p in self.trained.values():
            p.data = p.data.float()  # as diffusers' trainers: masters in float32
        self.parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True) if self.parameters else None

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss and the prediction."""
        inputs = {k: v for k, v in batch.items() if k != "noise"}
        if not self.parameters:
            inputs["sample"] = inputs["sample"].clone().requires_grad_()
        with torch.autocast(self.options.device, DTYPES[self.options.dtype], enabled=self.options.dtype != "float32"):
            prediction = self.model(**inputs)[0]
        return F.mse_loss(prediction.float(), batch["noise"].float()), prediction.detach()

    def step(self, batch: dict) -> None:
        self.loss(batch)[0].backward()
        if self.parameters:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self, batch: dict) -> dict[str, Tensor]:
        """Those of all that trains, by name; and the prediction."""
        loss, prediction = self.loss(batch)
        grads = torch.autograd.grad(loss, self.parameters)
        return {"prediction": prediction} | {twin(name): g for name, g in zip(self.trained, grads)}

    def enter(self, batch: dict) -> None:
        """This peer's turn begins. What a patch keeps beside PEFT's layers is made in the first step after it."""
        if self.patched:
            dk.patch_peft(self.model)
            self.gradients(batch)

    def leave(self) -> None:
        if self.patched:
            dk.unpatch_peft()


def seconds(peer: Peer, batch: dict) -> float:
    wait = torch.cuda.synchronize if peer.options.device == "cuda" else lambda: None
    peer.enter(batch)
    wait()
    start = time.perf_counter()
    peer.step(batch)
    wait()
    taken = time.perf_counter() - start
    peer.leave()
    return taken


# The gate -------------------------------------------------------------------------------------------------------------


def apart(got: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return ((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()


def at_reference(peer: Peer, batch: dict) -> float:
    """How far the outputs of PaRa's layers are from reference.py's, at most."""
    worst = [0.0]

    def compare(layer, args, y):
        x, W, bias = args[0].float(), layer.weight.float(), None if layer.bias is None else layer.bias.float()
        factors = reference.factors(W, layer.deft_P["default"], None)
        worst.append(apart(y, reference.lowrank_linear(x, W, bias, *factors)))

    hooks = [m.register_forward_hook(compare) for m in peer.model.modules() if isinstance(m, DeftLayer)]
    with torch.no_grad():
        peer.loss(batch)
    for hook in hooks:
        hook.remove()
    return max(worst) if len(worst) > 1 else math.inf


def twin(name: str) -> str:
    """What a parameter of PEFT's is called here."""
    return name.replace("lora_B.default.weight", "deft_P.default").replace("lora_A.default.weight", "deft_R.default")


def gate(peers: dict[str, Peer], batch: dict) -> dict[str, str]:
    """{peer: why it is not to be timed}."""
    wrong, (same, similar) = {}, AGREE[peers[FLOOR].options.dtype]
    with torch.no_grad():
        truth = peers[FLOOR].loss(batch)[1]
    for name, peer in tqdm(peers.items(), desc="checks", leave=False):
        peer.enter(batch)
        with torch.no_grad():
            distance = at_reference(peer, batch) if name == "para" else apart(peer.loss(batch)[1], truth)
        peer.leave()
        if not distance <= same:
            wrong[name] = f"its start is {distance:.1e} away from what it has to be"
    for ours in dict.fromkeys(COUNTERPARTS.values()):
        rivals = [name for name, other in COUNTERPARTS.items() if other == ours and name in peers]
        if ours not in peers or not rivals:
            continue
        for p in peers[ours].parameters:
            p.data.add_(torch.randn_like(p) * 0.02)
        expected = peers[ours].gradients(batch)
        for name in rivals:
            for key, p in peers[name].trained.items():
                p.data.copy_(peers[ours].trained[twin(key)])
            peers[name].enter(batch)
            distances = {key: apart(value, expected[key]) for key, value in peers[name].gradients(batch).items()}
            peers[name].leave()
            first = distances.pop("prediction")
            worst = max(distances, key=distances.get)
            if not (first <= same and distances[worst] <= similar):
                reason = f"prediction {first:.1e}, gradient of {worst} {distances[worst]:.1e} away"
                wrong[name], wrong[ours] = f"{reason} from {PEERS[ours]}'s", f"{reason} from {PEERS[name]}'s"
    return wrong


# Time and memory ------------------------------------------------------------------------------------------------------


def timed(names: list[str], options) -> tuple[dict[str, dict], dict[str, str]]:
    """{peer: its figures} of those that pass the gate, and {peer: why not} of the others."""
    base = base_model(options)
    batch = make_batch(options, base.config.cross_attention_dim)
    peers = {name: Peer(name, base, options) for name in names}
    wrong = gate(peers, batch)
    peers = {name: peer for name, peer in peers.items() if name not in wrong}
    for peer in peers.values():
        seconds(peer, batch)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in tqdm(range(options.steps), desc="rounds", leave=False):
        order = list(peers)
        for name in order[i % len(order) :] + order[: i % len(order)]:  # so that none always follows the same one
            times[name].append(seconds(peers[name], batch))
    figures = {}
    for name, taken in times.items():
        low, *_, high = statistics.quantiles(taken, n=5) if len(taken) > 1 else taken * 2
        median = statistics.median(taken)
        figures[name] = {
            "seconds": median, "low": low, "high": high, "images_per_second": options.batch_size / median,
            "ratio": statistics.median(t / u for t, u in zip(taken, times[UNIT])) if UNIT in times else None,
            "trained": sum(p.numel() for p in peers[name].parameters), "rounds": taken,
        }  # fmt: skip
    return figures, wrong


def memory(name: str, options) -> int:
    """Most bytes that some steps of a peer take beside the base model, in this process."""
    base = base_model(options)
    batch = make_batch(options, base.config.cross_attention_dim)
    gc.collect()
    with measure.peak(options.device) as peak:
        peer = Peer(name, base, options)
        peer.enter(batch)
        for _ in range(2):
            peer.step(batch)
    return peak.bytes


def in_fresh_process(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--memory_of", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


# The command ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = "|time per step|20 % to 80 %|images/s|time, LoRA by PEFT = 1|memory beside the model|trained".split("|")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        used = "" if row["memory"] is None else f"{row['memory'] / 1e6:.0f} MB"
        if "seconds" not in row:
            lines.append(f"| {row['who']} | RED: {row['red']} | | | | | |")
            continue
        ms, low, high = (f"{row[k] * 1e3:.1f}" for k in ("seconds", "low", "high"))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['who']} | {ms} ms | {low} to {high} | {row['images_per_second']:.2f} | {ratio} | {used} "
                     f"| {row['trained']:,} |")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", choices=LATENT, default="toyworld", help="the embedded UNet, or SDXL's at random")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--resolution", type=int, help="pixels along a side; default 64, and 256 of sdxl")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16: weights, and autocast (a GPU's)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, help="rounds; default 40, and 3 of sdxl on a CPU")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS),
                        help="some of them; the frozen model and PEFT's LoRA always run")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json",
                        help="default: benchmarks/results/<device>/<commit>-training-…; a .md beside it")  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--memory_of", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.resolution = options.resolution or (64 if options.model == "toyworld" else 256)
    options.steps = options.steps or (3 if options.model == "sdxl" and options.device == "cpu" else 40)
    torch.manual_seed(0)
    if options.memory_of:
        print(memory(options.memory_of, options))
        return 0
    names = [name for name in PEERS if name in (FLOOR, UNIT, *options.peers)]
    found = measure.environment(options.device, ("peft", "diffusers"))
    setting = {k: getattr(options, k) for k in
               "model resolution batch_size gradient_checkpointing dtype rank steps".split()}  # fmt: skip
    figures, wrong = timed(names, options)
    gc.collect()  # before others take as much
    turns = tqdm(names, desc="memory", leave=False, disable=options.no_memory)
    used = {name: None if options.no_memory else in_fresh_process(name) for name in turns}
    rows = [
        {"peer": name, "who": PEERS[name], "memory": used[name]} | (figures.get(name) or {"red": wrong[name]})
        for name in names
    ]
    suffix = f"-training-{options.model}-{options.resolution}-batch{options.batch_size}"
    suffix += "-checkpointing" * options.gradient_checkpointing + "-bfloat16" * (options.dtype == "bfloat16")
    out = measure.save(found, options.output, suffix, **setting, rows=rows)
    said = [", ".join(f"{k} {v}" for k, v in part.items()) for part in (found, setting)]
    text = "\n\n".join([*said, table(rows)]) + "\n"
    out.with_suffix(".md").write_text(text)
    print(f"{text}\nwritten to {out}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
