"""The balancing loss and the z-loss by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import TokenChoiceMoE
from mixtura.layers.statistics import load_balancing_loss, router_z_loss


@pytest.mark.parametrize("num_experts", [2, 8])
@pytest.mark.parametrize("rows", [1, 300], ids=["few rows", "many rows"])
def test_balancing_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed(num_experts, rows):
    uniform_E = torch.full((num_experts,), 1 / num_experts)
    collapsed_E = torch.eye(num_experts)[0]
    assert_close(load_balancing_loss(rows * torch.ones(num_experts), uniform_E).item(), 1.0)
    assert_close(load_balancing_loss(rows * collapsed_E, collapsed_E).item(), float(num_experts))
    assert_close(load_balancing_loss(rows * collapsed_E, uniform_E).item(), 1.0)


def test_balancing_loss_by_hand():
    importance_E = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    tokens_per_expert_E = torch.tensor([6, 3, 1])
    loss = load_balancing_loss(tokens_per_expert_E, importance_E)
    assert_close(loss.item(), 3 * (0.6 * 0.5 + 0.3 * 0.3 + 0.1 * 0.2))
    loss.backward()
    assert_close(importance_E.grad, 3 * torch.tensor([0.6, 0.3, 0.1]))


def test_balancing_loss_of_no_rows_is_finite():
    assert load_balancing_loss(torch.zeros(4), torch.full((4,), 0.25)) == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_descending_the_balancing_loss_evens_the_load(top_k):
    layer = TokenChoiceMoE(8, intermediate_size=4, num_experts=4, top_k=top_k)
    x_BLD = torch.randn(1, 256, 8) + 1
    optimizer = torch.optim.Adam([layer.gate.weight], lr=0.03)
    losses = []
    for _ in range(100):
        _, stats = layer(x_BLD, return_stats=True)
        loss = load_balancing_loss(stats.tokens_per_expert_E, stats.importance_E)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.2 and losses[-1] < 1.01
    assert stats.tokens_per_expert_E.max() < 1.1 * 256 * top_k / 4


def test_z_loss_by_hand():
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert_close(router_z_loss(logits_TE).item(), (math.log(2) ** 2 + math.log(4) ** 2) / 2)
