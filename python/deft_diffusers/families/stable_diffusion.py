"""Stable Diffusion 1.x, 2.x and SDXL: CLIP's text encoders, a UNet, ε- or v-prediction."""

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from .base import Diffusion


class StableDiffusion(Diffusion):
    """Stable Diffusion 1.x and 2.x: one text encoder."""

    pipeline = StableDiffusionPipeline
    guidance_scale = 7.5
    pipeline_classes = ("StableDiffusionPipeline",)

    def encode_prompts(self, prompts, inputs=None):
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompts, self.pipe.device, 1, False)[0]}

    def predict(self, model, noisy, times, conditions):
        return model(noisy, times, **conditions, return_dict=False)[0]

    def to_images(self, pixels):
        pixels, unsafe = self.pipe.run_safety_checker(pixels, pixels.device, self.dtype)
        keep = [not u for u in unsafe] if unsafe is not None else [True] * len(pixels)
        return self.pipe.image_processor.postprocess(pixels, output_type="pil", do_denormalize=keep)


class StableDiffusionXL(Diffusion):
    """SDXL (arXiv 2307.01952): two text encoders; the UNet is told the size of the picture too."""

    pipeline = StableDiffusionXLPipeline
    guidance_scale = 5.0
    pipeline_classes = ("StableDiffusionXLPipeline",)

    def encode_prompts(self, prompts, inputs=None):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def sizes(self, views):
        """As diffusers' trainers tell them: (N, 6), the original size, the corner and the size seen, heights first."""
        ids = [[side for pair in view for side in reversed(pair)] for view in views]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32, device=self.pipe.device)}

    def predict(self, model, noisy, times, conditions):
        extra = {name: value for name, value in conditions.items() if name != "encoder_hidden_states"}
        if "time_ids" not in extra:  # as the pipeline has it: all of a picture of this size
            size = [side * self.pipe.vae_scale_factor for side in reversed(noisy.shape[2:])]
            extra |= self.sizes([(size, (0, 0), size)] * len(noisy))
        states = conditions["encoder_hidden_states"]
        return model(noisy, times, encoder_hidden_states=states, added_cond_kwargs=extra, return_dict=False)[0]
