"""Stable Diffusion 1.x, 2.x and SDXL: CLIP's text encoders, a UNet, ε- or v-prediction."""

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

    def predict(self, model, noisy, times, conditions):
        # A training picture is all of its bucket, as if it had been taken so.
        size = tuple(side * self.pipe.vae_scale_factor for side in noisy.shape[2:])
        pooled = conditions["text_embeds"]
        ids = self.pipe._get_add_time_ids(size, (0, 0), size, pooled.dtype, pooled.shape[-1])
        extra = {"text_embeds": pooled, "time_ids": ids.to(noisy.device).repeat(len(noisy), 1)}
        states = conditions["encoder_hidden_states"]
        return model(noisy, times, encoder_hidden_states=states, added_cond_kwargs=extra, return_dict=False)[0]
