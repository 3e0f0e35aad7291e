"""Expert threshold: by hand, who sees whom, thresholds over steps and ranks, and what is saved."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import ExpertChoiceMoE, ExpertThresholdMoE


def multiplying_layer(*gate_rows, **settings):
    """D = 2; expert e multiplies a positive token by e + 1."""
    layer = ExpertThresholdMoE(2, intermediate_size=2, num_experts=len(gate_rows), **settings)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor(gate_rows))
        for e in range(len(gate_rows)):
            layer.experts.up_proj[e] = (e + 1) * torch.eye(2)
            layer.experts.down_proj[e] = torch.eye(2)
    return layer


def random_layer(**settings):
    layer = ExpertThresholdMoE(8, intermediate_size=4, num_experts=4, **settings)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer.updates.fill_(1.0)
    return layer


def test_tokens_enter_the_experts_whose_thresholds_they_pass():
    layer = multiplying_layer([1.0, 0.0], [0.0, 1.0]).eval()
    layer.threshold.copy_(torch.tensor([1.0, 2.0]))
    x_BLD = torch.tensor(
        [[[2.0, 3.0], [1.0, 0.0], [0.0, 4.0]]]
    )  # both experts; none, as it only reaches one; the second
    y_BLD, stats = layer(x_BLD, return_stats=True)
    first, second = torch.tensor([2.0, 3.0]).sigmoid()
    expected = [(first + 2 * second) * x_BLD[0, 0], torch.zeros(2), 2 * torch.tensor(4.0).sigmoid() * x_BLD[0, 2]]
    assert_close(y_BLD[0], torch.stack(expected))
    assert stats.tokens_per_expert_E.tolist() == [1, 2]
    assert (stats.dropped_tokens, stats.routed_rows) == (1, 3)


def test_before_the_first_update_training_is_expert_choice_over_all_tokens():
    layer = random_layer(top_k=2)
    layer.updates.zero_()
    other = ExpertChoiceMoE(8, intermediate_size=4, num_experts=4, top_k=2, group_over="all")
    other.load_state_dict(layer.state_dict(), strict=False)
    _, stats = layer(torch.randn(3, 7, 8), return_stats=True)
    _, other_stats = other(torch.randn(3, 7, 8), return_stats=True)
    assert stats.tokens_per_expert_E.tolist() == other_stats.tokens_per_expert_E.tolist() == [11] * 4


@pytest.mark.parametrize("training", [True, False])
def test_no_token_sees_another(training):
    layer, x_BLD = random_layer().train(training), torch.randn(4, 6, 8)
    y_BLD = layer(x_BLD)
    for _ in range(20):
        other_BLD = x_BLD.clone()
        other_BLD[1, 3] = 10 * torch.randn(8)
        changed_BL = (layer(other_BLD) != y_BLD).any(-1)
        changed_BL[1, 3] = False
        assert not changed_BL.any()


def test_while_choosing_over_the_batch_the_future_is_seen():
    layer, x_BLD = random_layer(), torch.randn(1, 12, 8)
    layer.choosing_over_batch = True
    seen_L = torch.zeros(12, dtype=torch.bool)
    for _ in range(30):
        other_BLD = x_BLD.clone()
        other_BLD[0, -1] = 10 * torch.randn(8)
        seen_L |= (layer(other_BLD) != layer(x_BLD)).any(-1)[0]
    assert seen_L[:-1].any()
    assert torch.equal(layer.eval()(x_BLD)[:, :-1], layer(other_BLD)[:, :-1]), "a trained layer never does"


def test_the_load_is_right_on_average_over_batches_of_one_kind():
    layer = random_layer(top_k=1)
    for _ in range(50):
        layer(torch.randn(8, 32, 8))
        layer.update(layer.observed, rate=0.02)
        layer.observed = None
    _, stats = layer.eval()(torch.randn(64, 64, 8), return_stats=True)
    assert (stats.tokens_per_expert_E / stats.routed_rows).tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_micro_batches_and_ranks_count_by_their_tokens():
    layer, x_BLD = random_layer(), torch.randn(4, 6, 8)
    layer(x_BLD[:1])
    layer(x_BLD[1:])
    layer(x_BLD[:0])
    both = layer.observed
    layer.observed = None
    layer(x_BLD[:1])
    first, layer.observed = layer.observed, None
    layer(x_BLD[1:])
    assert_close(first + layer.observed, both)
    assert both[-1] == 24
    layer.updates.zero_()
    layer.update(both, rate=0.1)
    assert_close(layer.threshold, both[:-1] / 24)


def test_a_batch_that_is_computed_again_for_its_gradient_moves_the_thresholds_as_before():
    layer, x_BLD = random_layer(), torch.randn(2, 6, 8, requires_grad=True)
    layer(x_BLD).sum().backward()
    once, layer.observed = layer.observed, None
    plain = layer.gate.weight.grad.clone()
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x_BLD, use_reentrant=False).sum().backward()
    assert_close(layer.observed[:-1] / layer.observed[-1], once[:-1] / once[-1])
    assert_close(layer.gate.weight.grad, plain)


def test_a_batch_of_padding_moves_nothing():
    layer = random_layer()
    layer(torch.randn(2, 3, 8), torch.zeros(2, 3))
    assert layer.observed.tolist() == [0.0] * 5


def test_evaluation_moves_nothing():
    layer = random_layer().eval()
    layer(torch.randn(2, 3, 8))
    assert layer.observed is None


def test_a_top_k_that_makes_no_sense_is_named():
    with pytest.raises(ValueError, match="top_k is 5: it must lie between 1 and num_experts, which is 4"):
        random_layer(top_k=5)
