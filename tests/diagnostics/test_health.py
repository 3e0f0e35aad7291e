import math

import numpy
import pytest
import torch

from mixtura.config import UserError
from mixtura.diagnostics import dropped_share, load_shares, summarize_load
from mixtura.layers import RoutingStats, TokenChoiceMoE


def test_an_even_load_is_perfect() -> None:
    summary = summarize_load([5.0, 5.0, 5.0, 5.0])
    assert summary.imbalance == 1.0
    assert summary.coefficient_of_variation == 0.0
    assert summary.dead_fraction == 0.0
    assert summary.effective_fraction == pytest.approx(1.0)


def test_an_uneven_load_by_hand() -> None:
    summary = summarize_load([6.0, 2.0, 0.0, 0.0])
    assert summary.imbalance == pytest.approx(3.0)
    # Deviations from the mean 2 are 4, 0, -2, -2.
    assert summary.coefficient_of_variation == pytest.approx(math.sqrt(24 / 4) / 2)
    assert summary.dead_fraction == 0.5
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert summary.effective_fraction == pytest.approx(math.exp(entropy) / 4)


def test_a_collapsed_router_uses_one_expert() -> None:
    summary = summarize_load([0.0, 0.0, 8.0, 0.0])
    assert (summary.imbalance, summary.dead_fraction) == (4.0, 0.75)
    assert summary.effective_fraction == pytest.approx(0.25)


def test_nearly_unused_experts_are_dead_too() -> None:
    assert summarize_load([1000.0, 1000.0, 5.0]).dead_fraction == pytest.approx(1 / 3)
    assert summarize_load([1000.0, 1000.0, 50.0]).dead_fraction == 0.0


@pytest.mark.parametrize(
    "load", [[1, 3], numpy.array([1, 3]), torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([1, 3])], ids=str
)
def test_lists_arrays_and_tensors_have_the_same_shares(load: object) -> None:
    assert load_shares(load).tolist() == [0.25, 0.75]  # pyright: ignore[reportArgumentType]


def test_real_statistics_are_summarised() -> None:
    layer = TokenChoiceMoE(8, intermediate_size=4, num_experts=4, top_k=1, capacity_factor=0.5)
    _, stats = layer(torch.randn(4, 8, 8), return_stats=True)
    assert isinstance(stats, RoutingStats)
    assert load_shares(stats) == pytest.approx(stats.tokens_per_expert_E.numpy() / 32)
    assert dropped_share(stats) == float(stats.dropped_tokens) / 32 > 0


@pytest.mark.parametrize(
    "load", [[0.0, 0.0], [1.0, -1.0, 2.0], [1.0, math.nan], [math.inf, 1.0], [[1.0, 2.0]]], ids=str
)
def test_loads_without_shares_are_refused(load: list) -> None:
    with pytest.raises(UserError, match="has no shares"):
        load_shares(load)
