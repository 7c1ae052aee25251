"""FLUX.1 and FLUX.2 klein: transformers over packed 2x2 patches of latents."""

import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from .base import FlowMatching

TOKENS = 512  # of a prompt, the pipelines' default
NO_GUIDANCE = 1.0  # what a model with distilled guidance is told while it learns, as in diffusers' trainers


class Flux(FlowMatching):
    """FLUX.1: CLIP's pooled text and T5's. Guidance is distilled into the model, which is told its scale.

    With a negative prompt the scale is that of classifier-free guidance instead, and the distilled one is off.
    """

    pipeline = FluxPipeline
    pipeline_classes = ("FluxPipeline",)
    guidance_scale = 3.5

    @property
    def text_limit(self):
        return self.pipe.tokenizer_2, TOKENS

    def encode_prompts(self, prompts, inputs=None):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, device=self.pipe.device, max_sequence_length=TOKENS)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, model, noisy, times, conditions):
        n, channels, height, width = noisy.shape
        pipe, where = self.pipe, {"device": noisy.device, "dtype": noisy.dtype}
        guided = self.model.config.guidance_embeds
        predicted = model(
            hidden_states=pipe._pack_latents(noisy, n, channels, height, width),
            timestep=times / 1000,  # the transformer multiplies it again
            guidance=torch.full((n,), NO_GUIDANCE, device=noisy.device) if guided else None,
            **conditions,
            txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, **where),
            img_ids=pipe._prepare_latent_image_ids(n, height // 2, width // 2, **where),
            return_dict=False,
        )[0]
        factor = pipe.vae_scale_factor
        return pipe._unpack_latents(predicted, height * factor, width * factor, factor)

    def guidance(self, scale, negative_prompts):
        if negative_prompts is None:
            return {"guidance_scale": scale}
        return {"guidance_scale": NO_GUIDANCE, "true_cfg_scale": scale, "negative_prompt": negative_prompts}

    def decode(self, latents, height, width):
        return super().decode(self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor), height, width)


class KleinPipeline(TextualInversionLoaderMixin, Flux2KleinPipeline):
    """Knows new words, which diffusers' own does not load."""

    def encode_prompt(self, prompt, *args, **more):
        return super().encode_prompt(self.maybe_convert_prompt(prompt, self.tokenizer), *args, **more)


class Flux2Klein(FlowMatching):
    """FLUX.2 klein: Qwen3's text; latents are patches already, normalised by the VAE's running statistics."""

    pipeline = KleinPipeline
    pipeline_classes = ("Flux2KleinPipeline",)
    guidance_scale = 4.0
    takes_negative_prompt = False
    patch = 1
    STEPS = 50  # the pipeline's default, on which its shift depends

    @property
    def word_encoders(self):
        return {"qwen3": (self.pipe.tokenizer, self.pipe.text_encoder)}

    def cut_text(self, prompt):
        message = [{"role": "user", "content": ""}]
        frame = self.pipe.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        room = TOKENS - len(self.pipe.tokenizer(frame).input_ids)
        return self.pipe.tokenizer.decode(self.pipe.tokenizer(prompt, add_special_tokens=False).input_ids[room:]).strip()

    def encode_prompts(self, prompts, inputs=None):
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompts, self.pipe.device, max_sequence_length=TOKENS)[0]}

    def encode_images(self, pixels):
        latents = self.pipe._encode_vae_image(pixels.to(self.pipe.device, self.pipe.vae.dtype), None)
        return latents, torch.zeros_like(latents)  # the most likely ones alone, as diffusers' trainer

    def scale(self, latents):
        return latents

    def shift_of(self, tokens):
        return compute_empirical_mu(tokens, self.STEPS)

    def predict(self, model, noisy, times, conditions):
        pipe, texts = self.pipe, conditions["encoder_hidden_states"]
        ids = pipe._prepare_latent_ids(noisy).to(noisy.device)
        predicted = model(
            hidden_states=pipe._pack_latents(noisy),
            timestep=times / 1000,
            guidance=None,
            encoder_hidden_states=texts,
            txt_ids=pipe._prepare_text_ids(texts).to(noisy.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return pipe._unpack_latents_with_ids(predicted, ids, *noisy.shape[2:])

    def guidance(self, scale, negative_prompts):
        return {"guidance_scale": NO_GUIDANCE if self.pipe.config.is_distilled else scale}

    def decode(self, latents, height, width):
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype)).sample
