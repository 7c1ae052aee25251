"""Scores of features whose cosines are known by hand."""

import math

import pytest
import torch
from deft_diffusers.evaluation import metrics

E1, E2, E3 = torch.eye(3)
HALF = (E1 + E2) / math.sqrt(2)  # 45 degrees from both


def test_every_picture_with_every_reference():
    found = metrics.pairwise(torch.stack([E1, HALF]), torch.stack([E1, E2, E3]))
    assert found.tolist() == pytest.approx([1 / 3, math.sqrt(2) / 3])


def test_each_picture_with_its_own():
    assert metrics.paired(torch.stack([E1, E1, E1]), torch.stack([E2, HALF, -E1])).tolist() == pytest.approx(
        [0, math.sqrt(0.5), -1]
    )


def test_references_among_themselves():
    assert metrics.similarity_within(torch.stack([E1, E2, HALF])) == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert metrics.similarity_within(E1[None]) is None


def test_diversity_is_within_a_prompt_and_each_counts_alike():
    features = torch.stack([E1, E1, E2, E2, E2, E3])
    prompts = ["snow", "beach", "snow", "beach", "beach", "alone"]
    # snow: one pair, 1 apart. beach: E1 and twice E2, so two of three pairs are 1 apart. alone: no pair.
    assert metrics.diversity(features, prompts) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.diversity(features, list("abcdef")) is None
    assert metrics.diversity(torch.stack([E1, E1]), ["a", "a"]) == pytest.approx(0)


def test_drift_is_none_for_the_same_and_one_for_the_opposite():
    same, half = torch.stack([E1, E2]), torch.stack([E1, HALF])
    assert metrics.drift(same, same) == pytest.approx(0)
    assert metrics.drift(same, half) == pytest.approx((1 - (1 + math.sqrt(0.5)) / 2) / 2)
    assert metrics.drift(same, -same) == pytest.approx(1)
    longer = torch.tensor([[1.0 + 1e-6, 0.0]])  # as float32 rounds a unit row
    assert f"{metrics.drift(longer, longer):.4f}" == "0.0000"  # and not -0.0000


@pytest.mark.parametrize("degrees, expected", [(1, 12.7062047362), (2, 4.3026527297), (3, 3.1824463053),
                                               (4, 2.7764451052), (9, 2.2621571628), (30, 2.0422724563),
                                               (1000, 1.9623390808)])  # fmt: skip
def test_student_t(degrees, expected):
    """Printed tables' values, and those of scipy.stats.t.ppf(0.975, degrees)."""
    assert metrics.t_quantile(degrees) == pytest.approx(expected, rel=1e-9)


def test_mean_and_interval():
    mean, half = metrics.mean_interval([0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.8) and half == pytest.approx(4.3026527297 * 0.1 / math.sqrt(3))
    assert metrics.mean_interval([0.5]) == (0.5, None)
    assert metrics.mean_interval([0.25] * 4) == (0.25, 0.0)
