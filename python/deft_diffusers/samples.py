"""The stream of training samples.

Every random draw is a function of the seed and of what is drawn: the order of the pictures of the epoch; crop, mirror,
latent noise, noise and timestep of the number of the sample since the start.
"""

import itertools

import numpy as np
import torch
from tqdm import tqdm

from . import cut_mix, data
from .cache import Cache

EPOCH, SAMPLE, STEP, CLASS, MIX = range(5)  # what a seed is for


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def generator_of(*numbers):
    return torch.Generator().manual_seed(seed_of(*numbers))


class Samples:
    """The endless stream of training samples; sample n is the same whenever and wherever it is asked for.

    The samples of one optimizer step are pictures of one size, a bucket's. Over as many steps as there are pictures each
    bucket has as many steps as it has pictures, and each walks through its own pictures, so that all are seen equally often.
    """

    def __init__(self, pictures, family, seed, random_crop, random_flip, images_per_step=1, cache_dir=None, *,
                 caption_dropout=0.0, noise_offset=0.0, encode_texts=True, cut_mix_prob=0.0):  # fmt: skip
        self.caption_dropout, self.noise_offset = caption_dropout, noise_offset
        self.pictures, self.family, self.seed, self.per_step = pictures, family, seed, images_per_step
        self.random_crop, self.random_flip = random_crop, random_flip
        names = dict.fromkeys(p.subject for p in pictures if p.subject)
        self.subjects = {name: [k for k, p in enumerate(pictures) if p.subject == name] for name in names}
        self.cut_mix_prob = cut_mix_prob if len(names) > 1 else 0.0
        texts = [(p.caption, p.inputs) for p in pictures]
        empty = [("", () if family.drops_inputs else p.inputs) for p in pictures]
        keys, empty_keys = ([(text, *map(id, inputs)) for text, inputs in said] for said in (texts, empty))
        said = dict(zip(empty_keys, empty)) if caption_dropout else {}
        said |= dict(zip(keys, texts))
        mixed = {pair: (cut_mix.prompt(*pair), ()) for pair in itertools.permutations(names, 2)} if self.cut_mix_prob else {}
        said |= {("mixed", *pair): text for pair, text in mixed.items()}
        self.texts, rows = list(said.values()), {key: row for row, key in enumerate(said)}
        self.rows = {False: [rows[key] for key in keys], True: [rows.get(key) for key in empty_keys]}  # text dropped or not
        self.mixed_rows = {pair: rows["mixed", *pair] for pair in mixed}
        sizes = list(dict.fromkeys(p.size for p in pictures))
        self.buckets = [[k for k, p in enumerate(pictures) if p.size == size] for size in sizes]
        self.orders = {}
        # Latents are computed once where all that changes from one sight of a picture to the next is which way it faces.
        once = not random_crop or all(p.image.size == p.size for p in pictures)
        texts_by = (family.text_encoders.values(), family.tokenizers) if encode_texts else ((), ())
        encoders = (texts_by, (family.image_parts, ()))
        self.caches = [Cache(cache_dir, family.kind, *by) for by in encoders] if cache_dir else None
        with torch.no_grad():
            self.conditions = self._encode_texts() if encode_texts else None
            self.posteriors = {m: self._encode_all(m) for m in {False, random_flip}} if once else None

    def _encode(self, images):
        return self.family.encode_images(torch.as_tensor(np.stack([data.to_array(image) for image in images])))

    def _see(self, k, view, pair=None):
        """What is seen of picture k, or, in its place, of a pair (`_pair`)."""
        u, v, mirror = view
        p = self.pictures[k]
        if pair:
            return cut_mix.picture(*(self.pictures[other].image for other in pair), p.size, mirror)
        return data.crop(p.image, p.size, u, v, mirror)

    def _encode_all(self, mirror):
        """Means and deviations of all pictures, faced one way."""
        posteriors = []
        hidden = len(self.pictures) < 20
        for k, picture in enumerate(tqdm(self.pictures, desc="encoding pictures", leave=False, disable=hidden)):
            make = lambda k=k: dict(zip(("mean", "deviation"), self._encode([self._see(k, (0.5, 0.5, mirror))])))
            if self.caches:
                entry = self.caches[1].get(repr((picture.size, mirror)).encode() + bytes_of(picture.image), make)
            else:
                entry = make()
            posteriors.append((entry["mean"], entry["deviation"]))
        return posteriors

    def _encode_texts(self):
        encode = self.family.encode_prompts
        cache = self.caches[0] if self.caches and self.family.text_encoders else None
        return [
            cache.get(text.encode(), lambda text=text: encode([text])) if cache and not inputs else encode([text], [inputs])
            for text, inputs in self.texts
        ]

    def _order(self, what, epoch, count):
        """A random order of `count` things, another for each epoch; the last one is kept."""
        if self.orders.get(what, (None,))[0] != epoch:
            order = torch.randperm(count, generator=generator_of(self.seed, EPOCH, *what, epoch)).tolist()
            self.orders[what] = epoch, order
        return self.orders[what][1]

    def _index(self, n):
        step, within = divmod(n, self.per_step)
        turn, bucket = step, 0  # this step is the turn-th of its bucket
        if len(self.buckets) > 1:
            owners = [b for b, pictures in enumerate(self.buckets) for _ in pictures]
            cycle, place = divmod(step, len(owners))
            order = self._order((0,), cycle, len(owners))
            bucket = owners[order[place]]
            turn = cycle * len(self.buckets[bucket]) + sum(owners[k] == bucket for k in order[:place])
        pictures = self.buckets[bucket]
        epoch, place = divmod(turn * self.per_step + within, len(pictures))
        return pictures[self._order((1, bucket), epoch, len(pictures))[place]]

    def _pair(self, n):
        """The pictures that sample n shows (left, right), one of them its own, the other of another subject; mostly None."""
        k = self._index(n)
        own = self.pictures[k].subject
        if not (own and self.cut_mix_prob):
            return None
        mix, subject, picture, side = torch.rand(4, generator=generator_of(self.seed, MIX, n)).tolist()
        others = [pictures for name, pictures in self.subjects.items() if name != own]
        others = others[int(subject * len(others))]
        pair = k, others[int(picture * len(others))]
        return None if mix >= self.cut_mix_prob else pair if side < 0.5 else pair[::-1]

    def pairs(self, numbers):
        """The subjects of samples `numbers`, (left, right) where there are two, else None."""
        pairs = map(self._pair, numbers)
        return [pair and tuple(self.pictures[k].subject for k in pair) for pair in pairs]

    def _view(self, k, view, pair=None):
        """Of picture k, widths first: its own size; the corner, in it as it is scaled and faces, of what is seen of it; the
        size of that. A pair is all there is of it."""
        u, v, mirror = view
        p = self.pictures[k]
        if pair:
            return p.size, (0, 0), p.size
        left, top = data.corner(p.image.size, p.size, u, v)
        return p.original or p.image.size, (p.image.width - p.size[0] - left if mirror else left, top), p.size

    @torch.no_grad()
    def batch(self, numbers, device):
        """Samples `numbers`: (latents, noise, times, conditions), the arguments of the family's `loss` after the model; with
        `encode_texts` off the conditions are still (texts, their input pictures, other conditions)."""
        chosen, pairs = [self._index(n) for n in numbers], [self._pair(n) for n in numbers]
        generators = [generator_of(self.seed, SAMPLE, n) for n in numbers]
        views = []
        for g in generators:
            u, v, side = torch.rand(3, generator=g).tolist()
            views.append((u if self.random_crop else 0.5, v if self.random_crop else 0.5, self.random_flip and side < 0.5))
        seen = list(zip(chosen, views, pairs))
        if self.posteriors is not None:
            found = [self._encode([self._see(*s)]) if s[2] else self.posteriors[s[1][2]][s[0]] for s in seen]
            mean, deviation = (torch.cat([t.to(device) for t in side]) for side in zip(*found))
        else:
            mean, deviation = self._encode([self._see(*s) for s in seen])
        latent_noise, noise, times, dropped = zip(*(self._draw(g, mean.shape[1:]) for g in generators))
        latents = mean + deviation * torch.stack(latent_noise).to(device)
        rows = [self.rows[drop][k] for drop, k in zip(dropped, chosen)]
        # A picture of two subjects keeps its text, which alone asks for such a thing.
        rows = [self.mixed_rows[pair] if pair else row for row, pair in zip(rows, self.pairs(numbers))]
        sizes = self.family.sizes([self._view(*s) for s in seen])
        if self.conditions is None:
            conditions = *zip(*(self.texts[row] for row in rows)), sizes
        else:
            conditions = self.family.collate([self.conditions[row] for row in rows]) | sizes
        return latents, torch.stack(noise).to(device), torch.stack(times).to(device), conditions

    def _draw(self, generator, shape):
        """Latent noise, noise, time, and whether the text is dropped, all of one sample."""
        latent_noise, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        time = self.family.draw_time(generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        dropped = self.caption_dropout > 0 and torch.rand((), generator=generator).item() < self.caption_dropout
        return latent_noise, noise, time, dropped


def bytes_of(image):
    return repr(image.size).encode() + image.tobytes()
