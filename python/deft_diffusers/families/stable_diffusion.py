"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, ε- or v-prediction."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr

from .. import UserError


class StableDiffusion:
    """A `StableDiffusionPipeline` to train and to draw with; `model` is the part that an adapter goes into."""

    pipeline_classes = ("StableDiffusionPipeline",)
    target_modules = ("to_q", "to_k", "to_v", "to_out.0")  # every attention projection, as in the paper's SDXL runs
    model_name = "unet"  # of the part that an adapter goes into, in the pipeline and in its folder
    snr_gamma = None  # of min-SNR weighting of the loss
    size_multiple = 8  # what the pipeline asks of height and width

    def __init__(self, pipe):
        self.pipe = pipe
        self.model = pipe.unet
        self.dtype = pipe.unet.dtype  # read here: an adapter's parameters may have another
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = self.noise_scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"the model predicts {self.prediction_type}; supported: epsilon, v_prediction")
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, source, dtype):
        """From a folder or hub id. The VAE is always float32: in float16 some overflow to black pictures."""
        return cls(StableDiffusionPipeline.from_pretrained(source, dtype={"default": dtype, "vae": torch.float32}))

    def to(self, device):
        self.pipe.to(device)
        return self

    @property
    def text_encoders(self):
        """What texts are encoded by, by name in the pipeline."""
        return {"text_encoder": self.pipe.text_encoder}

    @property
    def word_encoders(self):
        """Tokenizer and text encoder that a new word is learned for, by the name of its embedding in a file."""
        return {"text_encoder": (self.pipe.tokenizer, self.pipe.text_encoder)}

    @property
    def image_parts(self):
        """What pictures are encoded by."""
        return (self.pipe.vae,)

    @property
    def resolution(self):
        """Side in pixels of the pictures that the model was made for."""
        size = self.model.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor

    @property
    def max_inference_steps(self):
        """A sampler cannot take more steps than the noise schedule has."""
        return self.noise_scheduler.config.num_train_timesteps

    def cut_text(self, prompt):
        """The end of the prompt that the text encoder will not see; empty if all fits."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(prompt).input_ids
        limit = tokenizer.model_max_length
        return tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else ""

    def encode_prompts(self, prompts):
        """Conditions for `loss`: a dict of tensors, first dimension len(prompts)."""
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompts, self.pipe.device, 1, False)[0]}

    def encode_images(self, pixels):
        """Mean and deviation, float32, of the latents of pictures (N, 3, H, W) in [−1, 1]."""
        posterior = self.pipe.vae.encode(pixels.to(self.pipe.device, self.pipe.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def draw_time(self, generator):
        """A random timestep of the training noise schedule."""
        return torch.randint(self.noise_scheduler.config.num_train_timesteps, (), generator=generator)

    def loss(self, model, latents, noise, times, conditions):
        """Mean squared error of `model` (this family's, perhaps wrapped) on raw latents of the VAE, a scalar."""
        latents = latents * self.pipe.vae.config.scaling_factor
        noisy = self.noise_scheduler.add_noise(latents, noise, times)
        velocity = self.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, times) if velocity else noise
        predicted = model(noisy.to(self.dtype), times, **conditions, return_dict=False)[0]
        if self.snr_gamma is None:
            return F.mse_loss(predicted.float(), target.float())
        snr = compute_snr(self.noise_scheduler, times)
        weights = snr.clamp(max=self.snr_gamma) / (snr + 1 if velocity else snr)
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
        return (errors * weights).mean()

    @torch.no_grad()
    def generate(self, prompts, seeds, negative_prompt=None, **settings):
        """One picture for each prompt from the noise of its own seed, whatever else is in the batch.

        `settings`: `num_inference_steps`, `guidance_scale`, `height`, `width`, as the pipeline takes them.
        """
        pipe = self.pipe
        if negative_prompt is not None:
            negative_prompt = [negative_prompt] * len(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
        latents = pipe(
            prompts, negative_prompt=negative_prompt, generator=generators, output_type="latent", **settings
        ).images
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        pixels, unsafe = pipe.run_safety_checker(pixels, pixels.device, self.dtype)
        keep = [not u for u in unsafe] if unsafe is not None else [True] * len(prompts)
        return pipe.image_processor.postprocess(pixels, output_type="pil", do_denormalize=keep)
