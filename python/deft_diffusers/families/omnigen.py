"""OmniGen: one transformer for the instruction and the picture, and no text encoder."""

import sys

import torch
from diffusers import OmniGenPipeline

from .. import UserError
from .base import FlowMatching


def _positions(attention_mask, tokens):
    """Positions (N, length of text, time and picture) without a gap.

    diffusers' rotary embedding (0.42.1) gives all of a batch the positions of its first row, where its collator counts from
    zero behind the padding: wrong for every other row that is longer. Attention knows distances alone, and padding is on
    the left, so that one row without a gap is right for all.
    """
    return torch.arange(attention_mask.shape[-1] + 1 + max(tokens)).repeat(len(attention_mask), 1)


class OmniGen(FlowMatching):
    """OmniGen (arXiv 2409.11340)."""

    pipeline = OmniGenPipeline
    pipeline_classes = ("OmniGenPipeline",)
    guidance_scale = 2.5
    takes_negative_prompt = False

    @classmethod
    def load(cls, source, dtype):
        if not hasattr(sys.modules[OmniGenPipeline.__module__], "OmniGenMultiModalProcessor"):
            raise UserError("diffusers' OmniGenPipeline needs torchvision: pip install torchvision")
        return super().load(source, dtype)

    def __init__(self, pipe):
        super().__init__(pipe)
        pipe.multimodal_processor.collator.create_position = _positions

    def cut_text(self, prompt):
        return ""

    def encode_prompts(self, prompts):
        """Token numbers of the instructions, (N, L), padded on the left, and 1 where they are meant."""
        process = self.pipe.multimodal_processor.process_multi_modal_prompt
        ids = [process(prompt, None)["input_ids"] for prompt in prompts]
        return self._pad(ids)

    def _pad(self, ids):
        ids, mask, _ = self.pipe.multimodal_processor.collator.pad_input_ids(ids, {})
        return {"input_ids": ids.to(self.pipe.device), "attention_mask": mask.to(self.pipe.device)}

    def collate(self, entries):
        rows = [row for entry in entries for row in zip(entry["input_ids"], entry["attention_mask"])]
        return self._pad([ids[mask == 1].tolist() for ids, mask in rows])

    def predict(self, model, noisy, times, conditions):
        collator, mask = self.pipe.multimodal_processor.collator, conditions["attention_mask"].cpu()
        patches = [noisy.shape[2] * noisy.shape[3] // self.model.config.patch_size**2] * len(noisy)
        positions, (attention, _) = collator.create_position(mask, patches), collator.create_mask(mask, patches)
        return model(
            noisy,
            times,
            input_ids=conditions["input_ids"],
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=attention.to(noisy.device),
            position_ids=positions.to(noisy.device),
            return_dict=False,
        )[0]
