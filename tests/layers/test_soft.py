"""Soft MoE: hand-computed slots, who mixes with whom, and statistics."""

import math

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import SoftMoE


def test_two_tokens_and_two_experts_by_hand():
    layer = SoftMoE(2, intermediate_size=2, num_experts=2)
    with torch.no_grad():
        layer.slots.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))  # only the directions count
        layer.scale.fill_(math.log(2))
        layer.experts.up_proj.copy_(torch.stack([torch.eye(2), 2 * torch.eye(2)]))
        layer.experts.down_proj.copy_(torch.eye(2).expand(2, 2, 2))
    # Logits are ln 2 where token and slot point the same way, else 0, so every softmax is (2/3, 1/3) or (1/3, 2/3).
    # Slots (2, 2/3) and (1, 4/3); expert outputs (2, 2/3) and (2, 8/3).
    y_BLD, stats = layer(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), return_stats=True)
    assert_close(y_BLD, torch.tensor([[[2.0, 4 / 3], [2.0, 2.0]]]))
    assert_close(stats.tokens_per_expert_E, torch.ones(2))
    assert_close(stats.importance_E, torch.full((2,), 0.5))
    assert_close(stats.entropy.item(), -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2))
    assert (stats.router_z_loss, stats.dropped_tokens, stats.routed_rows) == (0, 0, 2)


def test_sequences_do_not_see_each_other_but_all_positions_of_one_do():
    layer = SoftMoE(8, intermediate_size=8, num_experts=4, num_slots=2)
    x_BLD = torch.randn(2, 5, 8)
    other_BLD = x_BLD.clone()
    other_BLD[0, -1] += torch.randn(8)
    changed_BL = (layer(other_BLD) != layer(x_BLD)).any(-1)
    assert changed_BL[0].all() and not changed_BL[1].any()


def test_permuting_the_tokens_of_a_sequence_permutes_the_outputs():
    layer = SoftMoE(8, intermediate_size=8, num_experts=4).double()
    x_BLD = torch.randn(2, 5, 8, dtype=torch.float64)
    order_L = torch.tensor([3, 0, 4, 1, 2])
    assert_close(layer(x_BLD[:, order_L]), layer(x_BLD)[:, order_L])


def test_the_length_of_a_token_does_not_move_its_combine_weights():
    layer = SoftMoE(8, intermediate_size=8, num_experts=4)
    x_BLD = torch.randn(2, 5, 8)
    _, stats = layer(x_BLD, return_stats=True)
    _, longer = layer(7 * x_BLD, return_stats=True)
    assert_close(stats.importance_E, longer.importance_E)


def test_padding_takes_no_part_and_is_not_counted():
    layer = SoftMoE(8, intermediate_size=8, num_experts=3, num_slots=2)
    x_BLD = torch.randn(2, 6, 8)
    mask_BL = torch.ones(2, 6, dtype=torch.long)
    mask_BL[:, :2] = 0
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
    short_BLD, short_stats = layer(x_BLD[:, 2:], return_stats=True)
    assert_close(y_BLD[:, 2:], short_BLD)
    assert_close(stats, short_stats)
    assert stats.routed_rows == 8


def test_tokens_are_counted_exactly_in_bfloat16():
    layer = SoftMoE(4, intermediate_size=4, num_experts=2).bfloat16()
    _, stats = layer(torch.randn(1, 257, 4, dtype=torch.bfloat16), return_stats=True)
    assert stats.routed_rows == 257
    assert all(value.dtype == torch.float32 for value in stats)


def test_weights_stay_in_float32_under_autocast():
    layer = SoftMoE(64, intermediate_size=8, num_experts=4)
    with torch.no_grad():
        layer.scale.fill_(10)
    x_BLD = torch.randn(2, 16, 64)
    _, stats = layer(x_BLD, return_stats=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, autocast = layer(x_BLD, return_stats=True)
    assert_close(autocast.entropy, stats.entropy, rtol=1e-5, atol=0)


def test_a_layer_without_slots_is_refused():
    with pytest.raises(ValueError, match="num_slots is 0: it must be at least 1"):
        SoftMoE(4, intermediate_size=4, num_experts=2, num_slots=0)
