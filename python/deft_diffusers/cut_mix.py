"""Cut-Mix-Unmix, for several subjects in one model (SVDiff, arXiv 2303.11305, section 3.3).

Pictures of two subjects side by side, with a text that says which is where, teach a model not to mix them. The unmix loss
keeps the words of one from attending to the half of the other.
"""

import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from . import data

BEFORE, BETWEEN, AFTER = "photo of a", "on the left and a", "on the right"  # the subjects, as the paper words it


def prompt(left, right):
    """The text of two subjects side by side."""
    return f"{BEFORE} {left} {BETWEEN} {right} {AFTER}"


def picture(left, right, size, mirror=False):
    """Two pictures side by side, each the middle of its own, faced as `mirror` says."""
    mixed, middle = Image.new("RGB", size), size[0] // 2
    for image, start, end in ((left, 0, middle), (right, middle, size[0])):
        half = (end - start, size[1])
        mixed.paste(data.crop(data.cover(image, half), half, mirror=mirror), (start, 0))
    return mixed


class Unmix:
    """The unmix loss of a UNet: of every cross-attention and head, the mean square of what a subject's words are attended
    with in the half of the other subject, where it shall be 0.

    Probabilities are computed anew, for the samples that need them, as attention itself does not keep them.
    """

    def __init__(self, family):
        self.family, self.pairs, self.size, self.terms = family, [], None, None
        layers = [m for m in family.model.modules() if isinstance(m, Attention) and m.is_cross_attention]
        self.hooks = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in layers]

    def remove(self):
        """Leaves the model as it was."""
        for hook in self.hooks:
            hook.remove()

    def watch(self, latents, pairs):
        """Before a forward on latents (N, C, H, W): of every sample its (left, right) subject, or None."""
        self.size, self.terms = latents.shape[2:], []
        self.pairs = [(row, pair) for row, pair in enumerate(pairs) if pair]

    def loss(self):
        """After it: the mean over the layers, a scalar; 0 where no sample is of two subjects."""
        terms, self.terms = self.terms, None
        return torch.stack(terms).mean() if terms else 0.0

    def tokens(self, left, right):
        """Which tokens of their prompt are the left subject, and which the right one."""
        pipe, tokenizer = self.family.pipe, self.family.pipe.tokenizer
        parts, ends = (BEFORE, left, BETWEEN, right), []
        for k in range(len(parts)):
            words = pipe.maybe_convert_prompt(" ".join(parts[: k + 1]), tokenizer)  # a new word may be of several tokens
            ends.append(1 + len(tokenizer.encode(words, add_special_tokens=False)))  # behind the token of the start
        last = tokenizer.model_max_length - 1
        return [slice(min(start, last), min(end, last)) for start, end in (ends[:2], ends[2:])]

    def _see(self, attention, args, kwargs):
        if not (self.pairs and attention.training):
            return
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        texts = kwargs["encoder_hidden_states"]
        rows = [row for row, _ in self.pairs]
        query, key = attention.to_q(states[rows]), attention.to_k(texts[rows])
        seen = attention.get_attention_scores(*map(attention.head_to_batch_dim, (query, key)))
        seen = seen.unflatten(0, (len(rows), attention.heads)).float()
        height, width = self.size
        while height * width > states.shape[1]:  # every level of a UNet halves both sides, rounding up
            height, width = (height + 1) // 2, (width + 1) // 2
        seen = seen.unflatten(2, (height, width))  # (samples, heads, height, width, tokens)
        strayed = []
        for (_, pair), here in zip(self.pairs, seen):
            left, right = self.tokens(*pair)
            strayed += [here[:, :, (width + 1) // 2 :, left], here[:, :, : width // 2, right]]
        strayed = torch.cat([s.square().flatten() for s in strayed])
        if self.terms is not None and len(strayed):  # not where a checkpointed layer runs again in the backward
            self.terms.append(strayed.mean())
