"""Tiny random encoders on disk, in transformers' format, of the kinds that the protocols take."""

import json
from pathlib import Path

import torch

WORDS = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]


def write_tiny_encoders(folder, size=32):
    """`clip`, `dinov1` and `dinov2` of pictures of 32 pixels (`dinov1`: 224, as DINO's). Random, the same each time."""
    from transformers import (
        BitImageProcessorPil,
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTokenizer,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    folder = Path(folder)
    words = folder / "words"
    words.mkdir(parents=True)
    letters = [*WORDS, *(word + "</w>" for word in WORDS[2:])]
    (words / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(letters)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    (words / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 24, "tokenizer_class": "CLIPTokenizer"}))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(
        text_config={**small, "vocab_size": len(letters), "max_position_embeddings": 24, "bos_token_id": 0,
                     "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**small, "image_size": size, "patch_size": 8}, projection_dim=12,
    ))  # fmt: skip
    dinov1 = ViTModel(ViTConfig(**small, image_size=224, patch_size=56), add_pooling_layer=False)
    del small["intermediate_size"]
    dinov2 = Dinov2Model(Dinov2Config(**small, image_size=size, patch_size=8))
    for model in (clip, dinov1, dinov2):
        with torch.no_grad():
            for parameter in model.parameters():  # so that features differ much from picture to picture
                parameter.add_(torch.randn_like(parameter) * 0.3)
    sides = {"size": {"shortest_edge": size + 4}, "crop_size": {"height": size, "width": size}}
    for name, model, processor in (
        ("clip", clip, CLIPImageProcessorPil(**sides)),
        ("dinov1", dinov1, ViTImageProcessorPil()),
        ("dinov2", dinov2, BitImageProcessorPil(**sides)),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    CLIPTokenizer.from_pretrained(words).save_pretrained(folder / "clip")
    return folder
