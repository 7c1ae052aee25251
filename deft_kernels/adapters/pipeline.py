"""Pipelines: the parts of one that adapters go into. Told by duck type: diffusers is no dependency here."""

from torch import nn

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def components(target) -> dict[str, nn.Module]:
    """The modules that adapters go into, by their name in the pipeline, which is also the prefix of their keys in a
    pipeline's files: `{"unet": ..., "text_encoder": ...}`; `{"": target}` where target is a module itself.

    Raises TypeError for what is neither a module nor a pipeline with one of these parts.
    """
    if isinstance(target, nn.Module):
        return {"": target}
    held = getattr(target, "components", None)
    if isinstance(held, dict):
        found = {name: held[name] for name in (*DENOISERS, *TEXT_ENCODERS) if isinstance(held.get(name), nn.Module)}
        if found:
            return found
    raise TypeError(f"{type(target).__name__} is neither a module nor a pipeline with a denoiser ({', '.join(DENOISERS)})")
