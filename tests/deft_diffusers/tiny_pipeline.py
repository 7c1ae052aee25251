"""A tiny random Stable Diffusion pipeline on disk, pictures to train it on, and an environment for subprocesses."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from deft_diffusers import data
from PIL import Image


def write_tiny_pipeline(folder, prediction_type="epsilon"):
    """A StableDiffusionPipeline folder: 32×32 pixels, 16×16 latents, 8 tokens. Random weights, the same each time."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[c + "</w>" for c in letters]]
    folder = Path(folder)
    vocabulary = folder.parent / (folder.name + "-words")
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    (vocabulary / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 8, "tokenizer_class": "CLIPTokenizer"})
    )
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        ).eval(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval(),
        unet=UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
            cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval(),
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def write_picture(path, seed=0, size=(32, 32)):
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(path)
    return path


def python_environment(**more):
    """For a subprocess: one thread, and the packages that this process sees."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def picture(path, caption="a cat", size=(32, 32)):
    """A training picture made of a file."""
    return data.Picture(data.cover(data.read_image(path), size), caption, size)
