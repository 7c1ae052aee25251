"""The names that Kohya's trainers give to a model's layers, which are the model's names in its authors' own code.

Told by the modules that a model has, as Kohya's trainers and ComfyUI tell them, so that one table serves both ways.
Sources: kohya-ss/sd-scripts `networks/lora*.py`, diffusers `loaders/lora_conversion_utils.py`, ComfyUI `comfy/lora.py`.
"""

import re

from torch import nn

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _parts(block: str, names) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
# Kohya's name -> the layers of diffusers' model that it stands for, side by side along their outputs. Layers outside of the
# blocks have no entry: diffusers drops them from a Kohya file without a word.
FLUX = {
    "double_blocks.{i}.img_attn.qkv": _parts(f"{_DOUBLE}.attn", _QKV),
    "double_blocks.{i}.txt_attn.qkv": _parts(f"{_DOUBLE}.attn", _ADDED),
    "double_blocks.{i}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{i}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{i}.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{i}.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{i}.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{i}.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.{i}.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{i}.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "single_blocks.{i}.linear1": (*_parts(f"{_SINGLE}.attn", _QKV), f"{_SINGLE}.proj_mlp"),
    "single_blocks.{i}.linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks.{i}.modulation.lin": (f"{_SINGLE}.norm.linear",),
}
# The modulation of the context of the last block is left out: its halves are the other way round in diffusers.
SD3 = {
    "joint_blocks.{i}.x_block.attn.qkv": _parts(f"{_DOUBLE}.attn", _QKV),
    "joint_blocks.{i}.x_block.attn2.qkv": _parts(f"{_DOUBLE}.attn2", _QKV),
    "joint_blocks.{i}.context_block.attn.qkv": _parts(f"{_DOUBLE}.attn", _ADDED),
    "joint_blocks.{i}.x_block.attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "joint_blocks.{i}.x_block.attn2.proj": (f"{_DOUBLE}.attn2.to_out.0",),
    "joint_blocks.{i}.context_block.attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "joint_blocks.{i}.x_block.mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "joint_blocks.{i}.x_block.mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "joint_blocks.{i}.context_block.mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "joint_blocks.{i}.context_block.mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "joint_blocks.{i}.x_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1.linear",),
}
TRANSFORMERS = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}

# Of a UNet in the layout of latent-diffusion, as SDXL's files have it.
_RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def _latent_diffusion(name: str, per_block: int, names) -> str | None:
    """The name in latent-diffusion of one of a UNet's layers `names`; None for one that has none there."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return _OUTSIDE.get(name)
    side, block, kind, k, rest = found.groups()
    if kind == "resnets":
        rest = _RESNET.get(rest)
        if rest is None:
            return None
    if side is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(k)}.{rest}"
    first, k = int(block) * (per_block + 1), int(k)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.op"
    if kind == "upsamplers":
        after = any(n.startswith(f"up_blocks.{block}.attentions.") for n in names)
        return f"output_blocks.{first + per_block}.{1 + after}.conv"
    where = f"input_blocks.{1 + first + k}" if side == "down" else f"output_blocks.{first + k}"
    return f"{where}.{1 if kind == 'attentions' else 0}.{rest}"


def kohya_names(model: nn.Module, names) -> dict[str, tuple[str, ...]] | None:
    """{Kohya's name, with dots: the layers that it stands for} of a model's layers `names`; None for a kind of model that
    Kohya's files are not known of here. Layers without a name there are left out."""
    kind = type(model).__name__
    if kind in TRANSFORMERS:
        blocks = {int(i) for name in names for i in re.findall(r"transformer_blocks\.(\d+)\.", name)}
        entries = [(k.format(i=i), tuple(p.format(i=i) for p in ps)) for i in blocks for k, ps in TRANSFORMERS[kind].items()]
        return {key: parts for key, parts in entries if all(part in names for part in parts)}
    if "UNet2DCondition" in kind:
        if is_sdxl(model) and isinstance(model.config.layers_per_block, int):
            pairs = ((_latent_diffusion(name, model.config.layers_per_block, names), name) for name in names)
            return {k: (name,) for k, name in pairs if k is not None}
        return {name: (name,) for name in names}
    if kind.startswith("CLIPText"):  # transformers has dropped `text_model` from some of them
        return {(name if name.startswith("text_") else f"text_model.{name}"): (name,) for name in names}
    return {name: (name,) for name in names} if kind == "T5EncoderModel" else None


def kohya_prefix(component: str, model: nn.Module, encoders: int) -> str:
    """What a component's keys begin with: `lora_unet` for any denoiser, `lora_te` for a text encoder, numbered where a
    pipeline has several `encoders`."""
    if not component.startswith("text_encoder"):
        return "lora_unet"
    if type(model).__name__.startswith("T5"):
        return "lora_te3"
    return "lora_te" if encoders == 1 else f"lora_te{component.removeprefix('text_encoder').lstrip('_') or 1}"


def is_fused(model: nn.Module) -> bool:
    """Whether some of Kohya's layers are several of this model's."""
    return type(model).__name__ in TRANSFORMERS


def is_sdxl(model: nn.Module) -> bool:
    """Whether this is a UNet of SDXL's kind: conditioned on sizes and a pooled text."""
    return getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time"
