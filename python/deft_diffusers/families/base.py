"""What the families share: `Family` for all, `FlowMatching` for those whose model predicts a velocity from noise to data."""

import math

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

from deft_kernels.config import TARGETS
from deft_kernels.nn.quantised import hold, quantised

from .. import UserError
from .quantise import quantise


class Family:
    """A pipeline to train and to draw with; `model` is the part that an adapter goes into."""

    pipeline: type  # of diffusers; it may be a subclass here
    pipeline_classes: tuple[str, ...]  # as model_index.json names them
    half: torch.dtype  # precision to draw in on a GPU where none is asked for
    model_name: str  # of the part that an adapter goes into, in the pipeline and in its folder
    guidance_scale: float  # to draw with where none is asked for, the pipeline's own default
    takes_negative_prompt = True
    drops_inputs = True  # whether guidance is away from a picture without the text's input pictures too
    max_inference_steps = math.inf
    max_size = math.inf  # side in pixels

    def __init__(self, pipe):
        self.pipe = pipe
        self.model = getattr(pipe, self.model_name)
        self.dtype = self.model.dtype  # read here: an adapter's parameters may have another
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, source, dtype, **missing):
        """From a folder or hub id; `missing`: None for each part that it lacks. The VAE is always float32: in float16 some
        overflow to black pictures."""
        return cls(cls.pipeline.from_pretrained(source, dtype={"default": dtype, "vae": torch.float32}, **missing))

    def quantise(self, kind, text_encoders=False):
        """Puts the denoiser, or also T5 and Qwen3, into 4 or 8 bits; see `quantise`. Call it before `to`."""
        large = [part for part in self.text_encoders.values() if not type(part).__name__.startswith("CLIP")]
        if text_encoders and not large:
            raise UserError(f"--quantize_text_encoders does not apply to {self.kind}: it has none of T5 and Qwen3")
        for part in (self.model, *(large if text_encoders else ())):
            quantise(part, kind, self.dtype)

    def to(self, device, without_model=False):
        """Moves the pipeline; `without_model`: all but the part that an adapter goes into."""
        if not without_model:
            self.pipe.to(device)
        else:
            for part in self.pipe.components.values():
                if isinstance(part, torch.nn.Module) and part is not self.model:
                    part.to(device)
        for part in (self.model, *self.text_encoders.values()):
            for module in part.modules():
                hold(module)  # layers without an adapter too: gradients pass through them
        return self

    @property
    def quantisation(self):
        """What the denoiser's or a text encoder's weights are quantised as, by its name; None where all are dense."""
        for part in (self.model, *self.text_encoders.values()):
            for module in part.modules():
                if (held := quantised(module)) is not None:
                    return held.name
        return None

    @property
    def kind(self):
        """The name of the pipeline's class, for messages."""
        return self.pipeline_classes[0]

    @property
    def target_modules(self):
        """What an adapter goes to by default."""
        return TARGETS[type(self.model).__name__]

    @property
    def text_encoders(self):
        """What texts are encoded by, by name in the pipeline."""
        parts = sorted(self.pipe.components.items())
        return {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}

    @property
    def tokenizers(self):
        """What turns texts into the text encoders' numbers."""
        parts = sorted(self.pipe.components.items())
        return [part for name, part in parts if name.startswith("tokenizer") and part is not None]

    @property
    def word_encoders(self):
        """Tokenizer and text encoder that a new word is learned for, by the name of its embedding in a file of several."""
        names = [name for name, part in self.text_encoders.items() if type(part).__name__.startswith("CLIP")]
        pairs = [(getattr(self.pipe, name.replace("text_encoder", "tokenizer")), getattr(self.pipe, name)) for name in names]
        return dict(zip(("clip_l", "clip_g"), pairs))

    @property
    def adapted_text_encoders(self):
        """The text encoders that adapters go into, by name in the pipeline: not T5, as in diffusers' trainers."""
        words = [encoder for _, encoder in self.word_encoders.values()]
        return {name: part for name, part in self.text_encoders.items() if any(part is word for word in words)}

    @property
    def image_parts(self):
        """What pictures are encoded by."""
        return (self.pipe.vae,)

    @property
    def resolution(self):
        """Side in pixels of the pictures that the model was made for."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    @property
    def size_multiple(self):
        """What must divide height and width: a token is 2x2 latents."""
        return 2 * self.pipe.vae_scale_factor

    @property
    def text_limit(self):
        """The tokenizer of the text encoder that sees most of a prompt, and how many tokens it sees."""
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    def cut_text(self, prompt):
        """The end of the prompt that the text encoder will not see; empty if all fits."""
        tokenizer, limit = self.text_limit
        ids = tokenizer(prompt).input_ids
        return tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else ""

    def check_prompt(self, prompt, inputs=()):
        """UserError if a prompt does not go with its input pictures."""
        if inputs:
            raise UserError(f"{self.kind} takes no input pictures: {prompt!r} comes with {len(inputs)}")

    def default_inputs(self, prompt, inputs):
        """Those of `inputs`, a training picture's, that a text to draw goes with where nothing is said."""
        return inputs

    def encode_prompts(self, prompts, inputs=None):
        """Conditions for `loss`: a dict of tensors, first dimension len(prompts). `inputs`: the pictures of each prompt."""
        raise NotImplementedError

    def sizes(self, views):
        """More conditions, of what is seen of each training picture: its own size, the corner of the part seen in the scaled
        picture, and that part's size, each (width, height)."""
        return {}

    def collate(self, entries):
        """The conditions of several prompts, on the pipeline's device, from those of each."""
        return {name: torch.cat([entry[name] for entry in entries]).to(self.pipe.device) for name in entries[0]}

    def encode_images(self, pixels):
        """Mean and deviation, float32, of the latents of pictures (N, 3, H, W) in [−1, 1]."""
        posterior = self.pipe.vae.encode(pixels.to(self.pipe.device, self.pipe.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def _mean_and_scale(self, like):
        """What turns the VAE's latents into the denoiser's, (latents - mean) * scale."""
        config = self.pipe.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, deviation = (like.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
            return mean, config.scaling_factor / deviation
        return config.shift_factor or 0.0, config.scaling_factor

    def scale(self, latents):
        """The denoiser's latents from those of `encode_images`."""
        mean, scale = self._mean_and_scale(latents)
        return (latents - mean) * scale

    def decode(self, latents, height, width):
        """Pixels (N, 3, H, W) of latents as the pipeline leaves them."""
        mean, scale = self._mean_and_scale(latents)
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype) / scale + mean).sample

    def predict(self, model, noisy, times, conditions):
        """What `model` (this family's, perhaps wrapped) says of noisy latents at its own kind of times."""
        raise NotImplementedError

    def default_size(self, input_images=()):
        """Height and width to draw where none are asked for."""
        return self.resolution, self.resolution

    def guidance(self, scale, negative_prompts):
        """Guidance in the pipeline's arguments."""
        return {"guidance_scale": scale} | ({"negative_prompt": negative_prompts} if negative_prompts else {})

    def to_images(self, pixels):
        """PIL pictures."""
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")

    @torch.no_grad()
    def generate(self, prompts, seeds, negative_prompt=None, guidance_scale=None, height=None, width=None, **settings):
        """One picture for each prompt from the noise of its own seed, whatever else is in the batch.

        Sizes are in pixels; size and guidance are the family's own by default. `settings`, such as `num_inference_steps`:
        as the pipeline takes them.
        """
        height, width = height or self.resolution, width or self.resolution
        negative_prompts = None if negative_prompt is None else [negative_prompt] * len(prompts)
        settings |= self.guidance(self.guidance_scale if guidance_scale is None else guidance_scale, negative_prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
        # A denoiser that trains as a whole is float32, beside text encoders in half precision.
        with torch.autocast(self.pipe.device.type, self.dtype, enabled=self.model.dtype != self.dtype):
            drawn = self.pipe(
                prompt=prompts, generator=generators, output_type="latent", height=height, width=width, **settings
            )
        return self.to_images(self.decode(drawn.images, height, width))


class Diffusion(Family):
    """A UNet that predicts the noise ε or the velocity v of a discrete noise schedule."""

    model_name = "unet"
    half = torch.float16
    size_multiple = 8  # what the pipelines ask for
    snr_gamma = None  # of min-SNR weighting of the loss
    unmix_weight = None  # of `cut_mix.Unmix`

    def __init__(self, pipe):
        super().__init__(pipe)
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = self.noise_scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"the model predicts {self.prediction_type}; supported: epsilon, v_prediction")

    @property
    def resolution(self):
        size = self.model.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor

    @property
    def max_inference_steps(self):
        """A sampler cannot take more steps than the noise schedule has."""
        return self.noise_scheduler.config.num_train_timesteps

    def draw_time(self, generator):
        """A random timestep of the training noise schedule."""
        return torch.randint(self.noise_scheduler.config.num_train_timesteps, (), generator=generator)

    def loss(self, model, latents, noise, times, conditions):
        """Mean squared error of `model` on latents of `encode_images`, a scalar."""
        latents = self.scale(latents)
        noisy = self.noise_scheduler.add_noise(latents, noise, times)
        velocity = self.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, times) if velocity else noise
        predicted = self.predict(model, noisy.to(self.dtype), times, conditions)
        errors = (predicted.float() - target.float()).square()
        if self.snr_gamma is None:
            return errors.mean()
        snr = compute_snr(self.noise_scheduler, times)
        weights = snr.clamp(max=self.snr_gamma) / (snr + 1 if velocity else snr)
        return (errors.flatten(1).mean(1) * weights).mean()


class FlowMatching(Family):
    """A transformer that predicts the velocity of straight paths x_σ = (1 - σ) x + σ ε (arXiv 2209.03003), ε - x.

    Where the pipeline's scheduler turns its times round (OmniGen), times grow towards the data and the velocity is x - ε.
    """

    model_name = "transformer"
    half = torch.bfloat16
    patch = 2  # side in latents of a token
    weighting_scheme = None  # of times and losses (arXiv 2403.03206, section 3.1); None: the default below
    WEIGHTING, LOGIT_MEAN, LOGIT_STD, MODE_SCALE = "logit_normal", 0.0, 1.0, 1.29  # defaults of diffusers' trainers

    def __init__(self, pipe):
        super().__init__(pipe)
        self.noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def draw_time(self, generator):
        """A time in [0, 1) before the scheduler's shift, 1 being the data."""
        return compute_density_for_timestep_sampling(
            self.weighting_scheme or self.WEIGHTING, 1, self.LOGIT_MEAN, self.LOGIT_STD, self.MODE_SCALE, generator=generator
        )[0]

    def shift_of(self, tokens):
        """The pipeline's resolution-dependent shift, mu, for pictures of so many tokens."""
        c = self.noise_scheduler.config
        return calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)

    def shift(self, sigmas, latents):
        """σ as the pipeline's scheduler shifts it for latents of this size."""
        scheduler = self.noise_scheduler
        if scheduler.config.use_dynamic_shifting:
            tokens = latents.shape[2] * latents.shape[3] // self.patch**2
            return scheduler.time_shift(self.shift_of(tokens), 1.0, sigmas)
        return scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)

    def loss(self, model, latents, noise, times, conditions):
        """Weighted mean squared error of `model` on latents of `encode_images`, a scalar."""
        latents = self.scale(latents)
        sigmas = self.shift(1 - times, latents)
        broad = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - broad) * latents + broad * noise
        target, clock = noise - latents, sigmas
        if self.noise_scheduler.config.invert_sigmas:
            target, clock = -target, 1 - sigmas
        clock = clock * self.noise_scheduler.config.num_train_timesteps
        predicted = self.predict(model, noisy.to(self.dtype), clock, conditions)
        weights = compute_loss_weighting_for_sd3(self.weighting_scheme or self.WEIGHTING, broad)
        return (weights * (predicted.float() - target.float()).square()).mean()
