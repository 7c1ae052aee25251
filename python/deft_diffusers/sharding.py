"""Several processes: what of the model each of them has. FSDP2 is for a base that does not fit one device.

| what | where |
|---|---|
| without FSDP: all, where dreambooth trains it | whole on every process, in DDP, which averages during the backward |
| without FSDP: else | whole on every process; gradients of what trains go through `average` |
| with FSDP: the denoiser, also where it trains | split by blocks (`_no_split_modules`); a block is whole while it runs |
| with FSDP: adapters, new words, text encoders that train | whole on every process, with `average` |

An adapted layer cannot read its weight before its block runs, and so takes the form that calls it instead (`nn/layers.py` of
`deft_kernels`, activation form). Files hold whole tensors: a run may go on with more or fewer processes, split or not.
"""

import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import broadcast
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from deft_kernels.adapters.files import sketch_bases
from deft_kernels.adapters.inject import adapted_layers

from . import UserError

LAUNCH = "accelerate launch --use_fsdp --fsdp_version 2"


def is_asked_for():
    """Whether `accelerate launch --use_fsdp` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def plugin_for(options):
    """The plugin for an Accelerator where FSDP is asked for, else None. UserError names what does not go with it."""
    if not is_asked_for():
        return None
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)  # else the others' text encoders stay empty
    if plugin.fsdp_version != 2:
        raise UserError(f"FSDP needs version 2 here: {LAUNCH}")
    refused = {
        "--fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "--method svdiff, whose singular vectors would not be split,": options.method == "svdiff",
        "--compile": options.compile,
        "--class_prompt, for which the base model draws before it is split,": options.class_prompt is not None,
        f"--optimizer {options.optimizer} for dreambooth": options.method == "dreambooth" and options.optimizer != "adamw",
    }
    for what, asked in refused.items():
        if asked:
            raise UserError(f"{what} does not go with FSDP")
    return plugin


def split(plugin, accelerator, model, whole):
    """Splits a model over the processes, block by block, each on its way to the device; but `whole`, parameters of it or of
    other models, every process has all of. From then on the model is called by all processes together.

    UserError for a quantised model.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        # autocast casts inputs, and keeps what needs float32; but weights that it casts would stay whole till the backward
        "mp_policy": MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False),
        "ignored_params": set(whole),
    }
    sketch_bases(model)  # files tell of the base, which cannot be read later
    if not all(p.is_floating_point() for p in model.parameters()):
        raise UserError("a quantised base is not split: train it without FSDP")
    blocks = set(model._no_split_modules or ())
    for module in reversed([m for m in model.modules() if type(m).__name__ in blocks]):  # inner ones first
        fully_shard(module, **settings)
    fully_shard(model, **settings)
    for p in whole:
        p.data = p.data.to(accelerator.device)
    for layer in adapted_layers(model).values():
        layer.set_adapters(layer.strengths)  # which brings the strengths to the device


def align(parameters):
    """Whole parameters start as the main process's, whatever the others' hardware has rounded otherwise."""
    for p in parameters:
        p.data = broadcast(p.data)


def average(accelerator, parameters):
    """Gradients of whole parameters, over the processes. Those without one have none on any: all run the same model. (DDP
    would give them zeros, which weight decay takes for a gradient.)"""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and accelerator.num_processes > 1:
        flat = accelerator.reduce(_flatten_dense_tensors(gradients), "mean")
        torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))


def gathered(tree, keep):
    """A nested state with its split tensors whole, on the CPU; None for them without `keep`. Every process must call."""

    def gather(tensor):
        whole = tensor.full_tensor()
        return whole.cpu() if keep else None

    return tree_map_only(DTensor, gather, tree)


def split_like(parameter, value):
    """A whole tensor, the same on all processes, split as a parameter is; anything else as it is."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def whole_part(part):
    """A copy of a split part with all its weights, on the CPU of the main process, elsewhere empty; a part that is not split
    is returned as it is. Every process must call."""
    if not any(isinstance(p, DTensor) for p in part.parameters()):
        return part
    state = get_model_state_dict(part, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        copy = type(part).from_config(part.config) if hasattr(part, "from_config") else type(part)(part.config)
    copy.load_state_dict(state, strict=bool(state), assign=True)
    return copy
