"""ReMoE: by hand, who sees whom, and how the penalty makes it sparse. Formulas are in test_against_papers."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import ReMoE
from mixtura.layers.remoe import l1_penalty, update_l1_coef


def test_a_token_runs_the_experts_of_positive_logits():
    layer = ReMoE(2, intermediate_size=2, num_experts=2)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        for e in range(2):
            layer.experts.up_proj[e] = (e + 1) * torch.eye(2)
            layer.experts.down_proj[e] = torch.eye(2)
    x_BLD = torch.tensor([[[2.0, 3.0], [0.0, 0.0], [-1.0, 4.0]]])
    y_BLD, stats = layer(x_BLD, return_stats=True)
    expected = [[2 * 2 + 3 * 2 * 2, 2 * 3 + 3 * 2 * 3], [0.0, 0.0], [0.0, 4 * 2 * 4]]
    assert_close(y_BLD[0], torch.tensor(expected))
    assert stats.tokens_per_expert_E.tolist() == [1, 2]
    assert_close(stats.importance_E, torch.tensor([2.0, 7.0]) / 3)
    assert (stats.dropped_tokens, stats.routed_rows) == (1, 3)
    assert_close(l1_penalty(stats, top_k=1).item(), 2 * (1 / 3 * 2 / 3 + 2 / 3 * 7 / 3))


def test_no_token_sees_another():
    layer, x_BLD = ReMoE(8, intermediate_size=4, num_experts=4), torch.randn(4, 6, 8)
    other_BLD = x_BLD.clone()
    other_BLD[1, 3] = 10 * torch.randn(8)
    assert (layer(other_BLD) != layer(x_BLD)).any(-1).nonzero().tolist() == [[1, 3]]


def test_the_penalty_brings_the_experts_a_token_runs_to_top_k():
    torch.manual_seed(0)
    layer = ReMoE(8, intermediate_size=8, num_experts=8, top_k=2)
    torch.nn.init.normal_(layer.gate.weight, std=0.3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    active = []
    for _ in range(300):
        x_BLD = torch.randn(4, 32, 8) + 1  # with symmetric inputs and no bias half of the logits are always positive
        y_BLD, stats = layer(x_BLD, return_stats=True)
        loss = (y_BLD - x_BLD.sin()).square().mean() + layer.l1_coef * l1_penalty(stats, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        active.append((stats.tokens_per_expert_E.sum() / stats.routed_rows).item())
        update_l1_coef([layer], torch.tensor(active[-1:]), factor=1.2)
    assert active[0] > 3.5, "training starts with half of the experts"
    assert sum(active[-100:]) / 100 == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0: it must lie between 1 and num_experts, which is 4"),
        ({"l1_coef_start": 0.0}, "l1_coef_start is 0.0: it must be greater than zero, or it never grows"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ReMoE(4, intermediate_size=4, num_experts=4, **settings)
