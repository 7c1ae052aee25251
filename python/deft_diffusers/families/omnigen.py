"""OmniGen: one transformer for the instruction, the pictures it speaks of, and the picture that it asks for."""

import re
import sys

import torch
from diffusers import OmniGenPipeline
from diffusers.pipelines.omnigen.processor_omnigen import crop_image

from .. import UserError, data
from .base import FlowMatching


def _positions(attention_mask, tokens):
    """Positions (N, length of text, time and picture) without a gap.

    diffusers' rotary embedding (0.42.1) gives all of a batch the positions of its first row, where its collator counts from
    zero behind the padding: wrong for every other row that is longer. Attention knows distances alone, and padding is on
    the left, so that one row without a gap is right for all.
    """
    return torch.arange(attention_mask.shape[-1] + 1 + max(tokens)).repeat(len(attention_mask), 1)


class OmniGen(FlowMatching):
    """OmniGen (arXiv 2409.11340). A text that speaks of input pictures names them <img><|image_1|></img> and so on."""

    pipeline = OmniGenPipeline
    pipeline_classes = ("OmniGenPipeline",)
    guidance_scale = 2.5
    takes_negative_prompt = False

    @classmethod
    def load(cls, source, dtype, **missing):
        if not hasattr(sys.modules[OmniGenPipeline.__module__], "OmniGenMultiModalProcessor"):
            raise UserError("diffusers' OmniGenPipeline needs torchvision: pip install torchvision")
        return super().load(source, dtype, **missing)

    def __init__(self, pipe):
        super().__init__(pipe)
        self.processor = pipe.multimodal_processor
        self.processor.collator.create_position = _positions
        self.processor.process_image = self._to_pixels
        pipe.encode_input_images = self._encode_inputs  # the pipeline's own draws latents with no generator

    def _to_pixels(self, image):
        """(3, H, W) float32 in [−1, 1], cut to multiples of 16 and scaled down to what the processor allows."""
        return torch.as_tensor(data.to_array(crop_image(image, self.processor.max_image_size)))

    def _encode_inputs(self, pixels, device=None):
        return [self.scale(self.encode_images(p)[0]) for p in pixels]

    @property
    def max_size(self):
        return self.model.config.pos_embed_max_size * self.size_multiple

    def cut_text(self, prompt):
        return ""

    def check_prompt(self, prompt, inputs=()):
        named = {int(number) for number in re.findall(r"<img><\|image_(\d+)\|></img>", prompt)}
        if named != set(range(1, len(inputs) + 1)) or prompt.count("<|image_") != prompt.count("<img><|image_"):
            raise UserError(
                f"{prompt!r} comes with {len(inputs)} input pictures: name each of them, and no other, as "
                "<img><|image_1|></img> and so on"
            )

    def default_inputs(self, prompt, inputs):
        return inputs if "<|image_" in prompt else ()

    def encode_prompts(self, prompts, inputs=None):
        """Of each instruction: token numbers, (N, L) padded on the left, and 1 where they are meant; the latents of its
        input pictures, and where among the tokens they go."""
        entries = []
        for prompt, images in zip(prompts, inputs or [()] * len(prompts)):
            self.check_prompt(prompt, images)
            read = self.processor.process_multi_modal_prompt(prompt, [self._to_pixels(image) for image in images])
            latents = self._encode_inputs([pixels[None] for pixels in read["pixel_values"] or ()])
            ids = torch.tensor([read["input_ids"]])
            places = [read["image_sizes"] or []]
            entries.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "inputs": [latents], "places": places})
        return self.collate(entries)

    def collate(self, entries):
        rows = [row for entry in entries for row in zip(*entry.values())]
        ids = [ids[mask == 1].tolist() for ids, mask, *_ in rows]
        padding = [int((mask == 0).sum()) for _, mask, *_ in rows]
        places = {k: [[at - pad for at in place] for place in row[3]] for k, (row, pad) in enumerate(zip(rows, padding))}
        ids, mask, places = self.processor.collator.pad_input_ids(ids, places)
        to = self.pipe.device
        return {
            "input_ids": ids.to(to), "attention_mask": mask.to(to), "inputs": [latents for _, _, latents, _ in rows],
            "places": list(places.values()),
        }  # fmt: skip

    def predict(self, model, noisy, times, conditions):
        collator, mask = self.processor.collator, conditions["attention_mask"].cpu()
        places = {row: places for row, places in enumerate(conditions["places"]) if places}
        tokens = [noisy.shape[2] * noisy.shape[3] // self.model.config.patch_size**2] * len(noisy)
        attention = collator.adjust_attention_for_input_images(collator.create_mask(mask, tokens)[0], places)
        return model(
            noisy,
            times,
            input_ids=conditions["input_ids"],
            input_img_latents=[latents for row in conditions["inputs"] for latents in row],
            input_image_sizes=places,
            attention_mask=attention.to(noisy.device),
            position_ids=collator.create_position(mask, tokens).to(noisy.device),
            return_dict=False,
        )[0]

    def generate(self, prompts, seeds, *args, input_images=(), **settings):
        """As `Family.generate`; every prompt speaks of `input_images`, PIL pictures."""
        for prompt in prompts:
            self.check_prompt(prompt, input_images)
        if input_images:
            settings["input_images"] = [list(input_images)] * len(prompts)
        return super().generate(prompts, seeds, *args, **settings)
