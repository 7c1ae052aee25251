"""FLUX.1 and FLUX.2 klein: transformers over packed 2x2 patches of latents."""

import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from .. import UserError
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
    """FLUX.2 klein: Qwen3's text; latents are patches already, normalised by the VAE's running statistics. The tokens of
    input pictures, which it draws by or changes, follow those of the picture."""

    pipeline = KleinPipeline
    pipeline_classes = ("Flux2KleinPipeline",)
    guidance_scale = 4.0
    takes_negative_prompt = False
    drops_inputs = False
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

    def check_prompt(self, prompt, inputs=()):
        pass  # a text need not name its input pictures

    def _fit(self, image):
        """An input picture no larger than the pipeline takes it, and the (height, width) that it is then cut to."""
        try:
            self.pipe.image_processor.check_image_input(image)
        except ValueError as error:
            raise UserError(f"an input picture of {image.width} x {image.height} pixels: {error}") from error
        image = self.pipe.image_processor._resize_if_exceeds_area(image)
        return image, tuple(side // self.size_multiple * self.size_multiple for side in (image.height, image.width))

    @torch.no_grad()
    def _encode_input(self, image):
        image, size = self._fit(image)
        return self.encode_images(self.pipe.image_processor.preprocess(image, *size, resize_mode="crop"))[0]

    def encode_prompts(self, prompts, inputs=None):
        texts = self.pipe.encode_prompt(prompts, self.pipe.device, max_sequence_length=TOKENS)[0]
        latents = [[self._encode_input(image) for image in images] for images in inputs or [()] * len(prompts)]
        return {"encoder_hidden_states": texts, "inputs": latents}

    def collate(self, entries):
        texts = [entry["encoder_hidden_states"] for entry in entries]
        inputs = [row for entry, text in zip(entries, texts) for row in entry.get("inputs", [()] * len(text))]
        return {"encoder_hidden_states": torch.cat([text.to(self.pipe.device) for text in texts]), "inputs": inputs}

    def encode_images(self, pixels):
        latents = self.pipe._encode_vae_image(pixels.to(self.pipe.device, self.pipe.vae.dtype), None)
        return latents, torch.zeros_like(latents)  # the most likely ones alone, as diffusers' trainer

    def scale(self, latents):
        return latents

    def shift_of(self, tokens):
        return compute_empirical_mu(tokens, self.STEPS)

    def predict(self, model, noisy, times, conditions):
        pipe, texts, inputs = self.pipe, conditions["encoder_hidden_states"], conditions["inputs"]
        if len({tuple(x.shape for x in row) for row in inputs}) > 1:  # attention has no mask: each of its own length alone
            rows = [{name: value[k : k + 1] for name, value in conditions.items()} for k in range(len(noisy))]
            return torch.cat([self.predict(model, *one) for one in zip(noisy.split(1), times.split(1), rows)])
        ids = pipe._prepare_latent_ids(noisy).to(noisy.device)
        states, all_ids = pipe._pack_latents(noisy), ids
        if inputs[0]:
            seen = [pipe._pack_latents(torch.cat(column)).to(noisy.dtype) for column in zip(*inputs)]
            states = torch.cat([states, *seen], 1)
            more = pipe._prepare_image_ids(list(inputs[0])).to(ids.device).expand(len(noisy), -1, -1)
            all_ids = torch.cat([ids, more], 1)
        predicted = model(
            hidden_states=states,
            timestep=times / 1000,
            guidance=None,
            encoder_hidden_states=texts,
            txt_ids=pipe._prepare_text_ids(texts).to(noisy.device),
            img_ids=all_ids,
            return_dict=False,
        )[0][:, : ids.shape[1]]
        return pipe._unpack_latents_with_ids(predicted, ids, *noisy.shape[2:])

    def guidance(self, scale, negative_prompts):
        return {"guidance_scale": NO_GUIDANCE if self.pipe.config.is_distilled else scale}

    def decode(self, latents, height, width):
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype)).sample

    def default_size(self, input_images=()):
        return self._fit(input_images[0])[1] if input_images else super().default_size()

    def generate(self, prompts, seeds, *args, input_images=(), **settings):
        """As `Family.generate`; every picture is drawn by `input_images`, PIL pictures, and has the first one's size where
        none is asked for."""
        if input_images:
            height, width = self.default_size(input_images)
            settings |= {
                "image": list(input_images), "height": settings.get("height") or height,
                "width": settings.get("width") or width,
            }  # fmt: skip
        return super().generate(prompts, seeds, *args, **settings)
