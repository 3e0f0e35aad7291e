"""Expert choice: hand-computed choices, the exact capacity, who sees whom, and statistics."""

import math

import pytest
import torch
from torch.testing import assert_close

from mixtura.kernels import reference
from mixtura.layers import ExpertChoiceMoE
from mixtura.layers.routing import sparse_experts


def multiplying_layer(*gate_rows, **settings):
    """D = 2; router rows times ln 2; expert e multiplies a positive token by e + 1."""
    layer = ExpertChoiceMoE(2, intermediate_size=2, num_experts=len(gate_rows), **settings)
    with torch.no_grad():
        layer.gate.weight.copy_(math.log(2) * torch.tensor(gate_rows))
        for e in range(len(gate_rows)):
            layer.experts.up_proj[e] = (e + 1) * torch.eye(2)
            layer.experts.down_proj[e] = torch.eye(2)
    return layer


def test_two_tokens_and_two_experts_by_hand():
    x_BLD = torch.tensor([[[3.0, 0.0]], [[2.0, 0.0]]])  # expert 0 has probability 8/9 and 4/5, expert 1 has 1/9 and 1/5
    y_BLD, stats = multiplying_layer([1.0, 0.0], [0.0, 1.0])(x_BLD, return_stats=True)
    assert_close(y_BLD, torch.tensor([[[3 * 8 / 9, 0.0]], [[2 * 2 / 5, 0.0]]]))
    assert stats.tokens_per_expert_E.tolist() == [1, 1]
    assert (stats.dropped_tokens, stats.routed_rows) == (0, 2)
    assert_close(stats.importance_E, torch.tensor([8 / 9 + 4 / 5, 1 / 9 + 1 / 5]) / 2)
    assert_close(stats.router_z_loss.item(), (math.log(9) ** 2 + math.log(5) ** 2) / 2)


def test_a_token_that_no_expert_takes_gets_zeros_and_is_counted():
    layer = multiplying_layer([1.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    x_BLD = torch.tensor([[[3.0, 0.0]], [[2.0, 0.0]], [[1.0, 0.0]]])
    # One token an expert: two of them want the first most, with 8/17, and the third wants the last most, with 1/5.
    y_BLD, stats = layer(x_BLD, return_stats=True)
    assert_close(y_BLD[:, 0, 0], torch.tensor([3 * (1 + 2) * 8 / 17, 0.0, 1 * 3 / 5]))
    assert (stats.dropped_tokens, stats.routed_rows) == (1, 3)


@pytest.mark.parametrize(("group_over", "groups", "size"), [("batch", 2 * 5, 3), ("all", 1, 30)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_expert_takes_exactly_its_capacity(monkeypatch, group_over, groups, size, top_k):
    seen = []
    monkeypatch.setattr(
        "mixtura.layers.expert_choice.sparse_experts",
        lambda experts, x_TD, routing: (seen.append(routing), sparse_experts(experts, x_TD, routing))[1],
    )
    layer = ExpertChoiceMoE(4, intermediate_size=4, num_experts=4, top_k=top_k, group_size=3, group_over=group_over)
    _, stats = layer(torch.randn(6, 5, 4), return_stats=True)
    takes = groups * math.ceil(size * top_k / 4)
    assert stats.tokens_per_expert_E.tolist() == [takes] * 4
    assert seen[0].tokens_per_expert_E.tolist() == [takes] * 4
    for token_r in seen[0].token_R.split(takes):
        assert len(token_r.unique()) == takes, "an expert takes a token at most once"


def test_over_the_batch_only_the_own_group_and_position_are_seen():
    layer = ExpertChoiceMoE(8, intermediate_size=4, num_experts=4, group_size=2)
    x_BLD = torch.randn(4, 6, 8)
    seen_BL = torch.zeros(4, 6, dtype=torch.bool)
    for _ in range(30):  # one probe may leave the choice as it was
        other_BLD = x_BLD.clone()
        other_BLD[1, 3] = 10 * torch.randn(8)
        seen_BL |= (layer(other_BLD) != layer(x_BLD)).any(-1)
    assert seen_BL.nonzero().tolist() == [[0, 3], [1, 3]]


def test_over_all_tokens_the_future_is_seen():
    layer = ExpertChoiceMoE(8, intermediate_size=4, num_experts=4, group_over="all")
    x_BLD = torch.randn(1, 12, 8)
    seen_L = torch.zeros(12, dtype=torch.bool)
    for _ in range(30):
        other_BLD = x_BLD.clone()
        other_BLD[0, -1] = 10 * torch.randn(8)
        seen_L |= (layer(other_BLD) != layer(x_BLD)).any(-1)[0]
    assert seen_L[:-1].any()


def test_small_probabilities_keep_their_precision():
    layer = multiplying_layer([20.0, 0.0], [0.0, 0.0], top_k=2)
    with torch.no_grad():
        layer.experts.down_proj[0] = 0  # what is left is expert 1, whose probability is about one in a million
    x_BLD = torch.tensor([[[1.0, 0.5]], [[1.1, 0.5]]])
    assert_close(layer(x_BLD), layer.double()(x_BLD.double()).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("group_over", ["batch", "all"])
def test_padding_is_never_preferred_and_is_not_counted(group_over):
    layer = ExpertChoiceMoE(4, intermediate_size=4, num_experts=3, top_k=2, group_size=4, group_over=group_over)
    x_BLD = torch.randn(4, 3, 4)
    mask_BL = torch.ones(4, 3, dtype=torch.long)
    mask_BL[2:, 0] = 0  # of the first position's four tokens two are real, and an expert takes three
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
    other_BLD, other_stats = layer(torch.where(mask_BL.bool()[..., None], x_BLD, 100.0), mask_BL, return_stats=True)
    assert_close(y_BLD[mask_BL.bool()], other_BLD[mask_BL.bool()])
    assert_close(stats, other_stats)
    assert stats.routed_rows == 10
    assert stats.tokens_per_expert_E.tolist() == ([8, 8, 8] if group_over == "all" else [2 + 3 + 3] * 3)
    probs_TE = layer.gate(x_BLD[mask_BL.bool()]).softmax(-1)
    assert_close(stats.importance_E, probs_TE.mean(0))


def test_the_last_group_may_have_fewer_examples():
    layer = ExpertChoiceMoE(4, intermediate_size=4, num_experts=2, group_size=4)
    layer.experts.reset_parameters(std=1.0)
    x_BLD = torch.randn(6, 2, 4)
    y_BLD, stats = layer(x_BLD, return_stats=True)
    assert_close(y_BLD[:4], layer(x_BLD[:4]))
    # The last group has two tokens and every expert takes two, so each token gets every expert, by its probability.
    last_TD = x_BLD[4:].flatten(0, 1)
    probs_TE = layer.gate(last_TD).softmax(-1)
    expected_TD = layer.experts(last_TD, reference.scaled_ffn, torch.ones_like(probs_TE), probs_TE, None)
    assert_close(y_BLD[4:].flatten(0, 1), expected_TD)
    assert stats.routed_rows == 12
    assert stats.tokens_per_expert_E.tolist() == [2 * (2 + 2)] * 2


@pytest.mark.parametrize("batch", [1, 3, 5, 9])
def test_an_expert_takes_a_token_once_whatever_the_last_group_lacks(monkeypatch, batch):
    seen = []
    monkeypatch.setattr(
        "mixtura.layers.expert_choice.sparse_experts",
        lambda experts, x_TD, routing: (seen.append(routing), sparse_experts(experts, x_TD, routing))[1],
    )
    layer = ExpertChoiceMoE(4, intermediate_size=4, num_experts=2, top_k=2, group_size=4)
    layer(torch.randn(batch, 5, 4))
    for token_r in seen[0].token_R.split(seen[0].tokens_per_expert_E.tolist()):
        assert sorted(token_r.tolist()) == list(range(batch * 5)), "with top_k = E every expert takes every token"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0: it must lie between 1 and num_experts, which is 4"),
        ({"group_over": "sequence"}, "group_over is 'sequence': it must be batch or all"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ExpertChoiceMoE(4, intermediate_size=4, num_experts=4, **settings)
