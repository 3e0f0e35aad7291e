"""Means, sums, counts and entropy over the tokens that are real."""

import math

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers.statistics import count_real, mean_of_real, normalized_entropy, sum_of_real


@pytest.mark.parametrize(
    ("probs", "entropy"),
    [([0.25] * 4, 1.0), ([1.0, 0, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 0.5), ([1.0], 0.0)],
    ids=["uniform", "one-hot", "half of them", "a single choice"],
)
def test_entropy_is_a_share_of_its_maximum(probs, entropy):
    assert_close(normalized_entropy(torch.tensor([probs, probs]), dim=-1).item(), entropy)


def test_entropy_is_taken_along_the_given_dimension():
    probs_TE = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    assert_close(normalized_entropy(probs_TE, dim=0).item(), 0.5)
    rows = [-(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)) / math.log(2), 0.0]
    assert_close(normalized_entropy(torch.tensor([[1 / 3, 2 / 3], [1.0, 0.0]]), dim=1).item(), sum(rows) / 2)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2)], ids=str)
def test_what_is_not_real_is_as_good_as_left_out(shape):
    x_T, real_T = torch.randn(shape, requires_grad=True), torch.tensor([True, False, True, True, False, False])
    x_T.data[1] = math.nan
    assert_close(mean_of_real(x_T, real_T), x_T[real_T].mean(0))
    assert_close(sum_of_real(x_T, real_T), x_T[real_T].sum(0))
    assert count_real(x_T, real_T) == 3 and count_real(x_T, None) == 6
    mean_of_real(x_T, real_T).sum().backward()
    assert_close(x_T.grad, real_T.view(-1, *[1] * (x_T.dim() - 1)).expand_as(x_T) / 3)


def test_all_tokens_are_real_without_a_mask():
    x_T, all_T = torch.randn(5, 2), torch.ones(5, dtype=torch.bool)
    assert_close(mean_of_real(x_T, None), mean_of_real(x_T, all_T))
    assert_close(sum_of_real(x_T, None), sum_of_real(x_T, all_T))


def test_entropy_of_the_real_distributions_alone():
    probs_TE = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    assert normalized_entropy(probs_TE, -1, torch.tensor([True, False, True])) == 1
