"""A tiny random pipeline of every family, built from configurations: random weights, the same each time, no download."""

import sys
from types import SimpleNamespace

import diffusers
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

PROMPT = "a photo of sks dog"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .,:<>|_\n"]
WIDTH, LENGTH = 16, 24  # of the text encoders, and of their prompts


def tokenizer(length=LENGTH):
    """A token for each character. CLIP's models want </s> at the end, where they pool."""
    by_letter = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    by_letter.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    by_letter.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=by_letter, model_max_length=length, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )  # fmt: skip


def clip(kind):
    return kind(CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip


def t5(width=WIDTH):
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def vae(channels=4, blocks=2, kind=diffusers.AutoencoderKL, **options):
    return kind(
        block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=channels, sample_size=32, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **options,
    )  # fmt: skip


def unet(**options):
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def stable_diffusion():
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer(), text_encoder=clip(CLIPTextModel), vae=vae(), unet=unet(cross_attention_dim=WIDTH),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizer(), text_encoder=clip(CLIPTextModel), vae=vae(), scheduler=diffusers.EulerDiscreteScheduler(),
        tokenizer_2=tokenizer(), text_encoder_2=clip(CLIPTextModelWithProjection), add_watermarker=False,
        unet=unet(
            cross_attention_dim=2 * WIDTH, transformer_layers_per_block=(1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
    )  # fmt: skip


def sd3():
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer(), text_encoder=clip(CLIPTextModelWithProjection), tokenizer_2=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_3=tokenizer(), text_encoder_3=t5(2 * WIDTH),
        vae=vae(shift_factor=0.1), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
        ),
    )  # fmt: skip


def flux():
    return diffusers.FluxPipeline(
        tokenizer=tokenizer(), text_encoder=clip(CLIPTextModel), tokenizer_2=tokenizer(), text_encoder_2=t5(),
        vae=vae(shift_factor=0.1), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
        ),
    )  # fmt: skip


def flux2_klein():
    return diffusers.Flux2KleinPipeline(
        tokenizer=tokenizer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(kind=diffusers.AutoencoderKLFlux2),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        )),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        ),
    )  # fmt: skip


def omnigen():
    module = sys.modules[diffusers.OmniGenPipeline.__module__]
    if not hasattr(module, "OmniGenMultiModalProcessor"):  # for want of torchvision, which only input pictures go through
        from diffusers.pipelines.omnigen import processor_omnigen

        inert = dict.fromkeys(("Compose", "Lambda", "ToTensor", "Normalize"), lambda *args, **kwargs: None)
        processor_omnigen.transforms = SimpleNamespace(**inert)
        module.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
    return diffusers.OmniGenPipeline(
        tokenizer=tokenizer(256), vae=vae(blocks=4), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.OmniGenTransformer2DModel(
            in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
            num_layers=2, pad_token_id=0, vocab_size=len(WORDS), max_position_embeddings=512, time_step_dim=32,
            original_max_position_embeddings=512, pos_embed_max_size=8,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        ),
    )  # fmt: skip


FAMILIES = {
    "stable-diffusion": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux2-klein": flux2_klein,
    "omnigen": omnigen,
}
ARGUMENTS = {
    "sd3": {"max_sequence_length": LENGTH},
    "flux": {"max_sequence_length": LENGTH},
    "flux2-klein": {"max_sequence_length": LENGTH, "text_encoder_out_layers": (1,)},
}


def build(family):
    """A pipeline of a family, on the CPU in float32, to be drawn with; its random state is its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = FAMILIES[family]()
    with torch.no_grad():
        for p in denoiser(pipe).parameters():
            if p.dim() == 2:
                p.mul_(2)  # untrained blocks hardly change what passes by them, and a picture would show nothing of them
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe):
    """The part of a pipeline that is called at every step."""
    return getattr(pipe, "unet", None) or pipe.transformer


def draw(pipe, family, prompt=PROMPT, **more):
    """A picture of 32x32 pixels in two steps, (32, 32, 3) in [0, 1]."""
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "guidance_scale": 3.0, **ARGUMENTS.get(family, {})}
    generator = torch.Generator().manual_seed(3)
    image = pipe(prompt=prompt, generator=generator, output_type="np", **options, **more).images[0]
    return torch.from_numpy(image)


def difference(a, b):
    """Largest difference of two pictures."""
    return (a - b).abs().max().item()


def state_of(pipe):
    """Every tensor of the pipeline's modules that belongs to no adapter, as bytes."""
    state = {}
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for name, t in module.state_dict().items():
                if "deft_" not in name:
                    state[f"{part}.{name.replace('.base_layer', '')}"] = t.reshape(-1).clone().view(torch.uint8)
    return state


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
