"""Stable Diffusion 3 and 3.5: CLIP's two text encoders and T5's, which may be missing, and a transformer."""

from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin

from .base import FlowMatching

TOKENS = 256  # of a prompt for T5, the pipeline's default


class Pipeline(TextualInversionLoaderMixin, StableDiffusion3Pipeline):
    """Knows new words, which diffusers' own does not load. T5 reads a prompt as it was written."""

    def encode_prompt(self, prompt, prompt_2, prompt_3, **more):
        written = self.maybe_convert_prompt(prompt, self.tokenizer)
        return super().encode_prompt(written, prompt_2 or written, prompt_3 or prompt, **more)


class StableDiffusion3(FlowMatching):
    """Stable Diffusion 3 (arXiv 2403.03206)."""

    pipeline = Pipeline
    pipeline_classes = ("StableDiffusion3Pipeline",)
    guidance_scale = 7.0

    @property
    def max_size(self):
        return self.model.config.pos_embed_max_size * self.size_multiple

    @property
    def text_limit(self):
        if self.pipe.text_encoder_3 is None:
            return super().text_limit
        return self.pipe.tokenizer_3, TOKENS

    def encode_prompts(self, prompts, inputs=None):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.pipe.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, model, noisy, times, conditions):
        return model(noisy, timestep=times, **conditions, return_dict=False)[0]
