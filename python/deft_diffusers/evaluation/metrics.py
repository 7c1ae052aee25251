"""The scores, of features alone: every argument is a matrix of unit rows, float32, one row a picture or a text.

A cosine lies in [−1, 1], of pictures mostly in 0–1; what a protocol prints (as it is, or ×100) is its scale, which
`evaluate.score` applies.
"""

import math

from scipy.special import stdtrit

# The encoder that each score is of, "judge" for the drawn world's. DINO's features see another picture where CLIP's see the
# same thing said: diversity and drift are of them.
ENCODER_OF = {"clip_i": "clip", "clip_t": "clip", "dinov1": "dinov1", "dinov2": "dinov2", "diversity": "dinov1",
              "drift": "dinov2", "individual": "judge", "scene": "judge"}  # fmt: skip


def pairwise(generated, references):
    """(n,) float64 for (n, d) and (m, d): each generated picture's mean cosine with all references.

    The mean of these is DreamBooth's CLIP-I and DINO (arXiv 2208.12242, section 4.1): over all pairs of generated and real
    pictures of a subject.
    """
    return (generated.double() @ references.double().T).mean(1)


def paired(one, other):
    """(n,) float64 for (n, d) twice: the cosine of row k with row k. CLIP-T, of texts and pictures (arXiv 2208.12242); and
    DreamBench++'s scores (arXiv 2406.16855), of pairs of files, whose flat mean is the method's."""
    return (one.double() * other.double()).sum(1)


def similarity_within(references):
    """The mean cosine of pairs of different pictures, of (m, d), or None for fewer than two. Of the real pictures of a
    subject it is the most that can be wished for (DreamBooth's "real images", DINO ≈ 0.77): what lies above it copies."""
    m = len(references)
    if m < 2:
        return None
    cosines = references.double() @ references.double().T
    return ((cosines.sum() - cosines.diagonal().sum()) / (m * (m - 1))).item()


def diversity(features, prompts):
    """How much pictures of the same prompt differ: the mean of 1 − cosine over the pairs within each prompt, then over the
    prompts; 0 (all the same) to 2, or None where no prompt has two pictures.

    DreamBooth's DIV (arXiv 2208.12242, section 4.3) is the same mean of LPIPS. That needs the weights of an AlexNet or VGG,
    which come with torchvision; DINO's features see less of texture and layout, so that its figures do not compare.
    """
    rows = {prompt: [k for k, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
    within = [similarity_within(features[own]) for own in rows.values() if len(own) > 1]
    return 1 - sum(within) / len(within) if within else None


def drift(base, adapted):
    """(1 − mean cosine) / 2 of the base model's and the adapted model's pictures of unrelated prompts, row by row with the
    same prompt and seed: 0 (nothing was forgotten) to 1. PEFT's harness (`method_comparison/image-gen`), whose features are
    dinov2-base's: figures of another DINOv2 do not compare with its own."""
    return max(0.0, 1 - paired(base, adapted).mean().item()) / 2  # unit rows in float32 may have a cosine just above 1


def t_quantile(degrees, probability=0.975):
    """Student's t below which `probability` lies, of so many degrees of freedom."""
    return float(stdtrit(degrees, probability))


def mean_interval(values, probability=0.95):
    """(mean, half the width of its t-interval) of independent values, such as a score over seeds; the half is None for one
    value, which tells nothing of its noise."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, t_quantile(n - 1, (1 + probability) / 2) * deviation / math.sqrt(n)
