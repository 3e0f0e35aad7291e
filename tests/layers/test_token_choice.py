"""Token choice: hand-computed routing, capacity, balancing bias, shared experts and statistics."""

import math
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import DenseFFN, TokenChoiceMoE

LN2 = math.log(2)


def multiplying_layer(num_experts, **settings):
    """D = 2; logits are ln 2 times the token, then zeros; expert e multiplies a positive token by e + 1."""
    layer = TokenChoiceMoE(2, intermediate_size=2, num_experts=num_experts, **settings)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:2].copy_(LN2 * torch.eye(2))
        for e in range(num_experts):
            layer.experts.up_proj[e] = (e + 1) * torch.eye(2)
            layer.experts.down_proj[e] = torch.eye(2)
    return layer


# Softmax over three experts: (2, 4, 1) / 7 for the first token, (8, 2, 1) / 11 for the second.
TWO_TOKENS = torch.tensor([[[1.0, 2.0], [3.0, 1.0]]])


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        pytest.param({"top_k": 1}, 2 * 4 / 7, 8 / 11, id="top 1"),
        pytest.param({"top_k": 2}, 2 * 4 / 7 + 2 / 7, 8 / 11 + 2 * 2 / 11, id="top 2"),
        pytest.param({"top_k": 2, "normalize_top_k": True}, 2 * 2 / 3 + 1 / 3, 0.8 + 2 * 0.2, id="normalised"),
        pytest.param({"top_k": 1, "score_function": "sigmoid"}, 2 * 4 / 5, 8 / 9, id="sigmoid"),
        pytest.param({"top_k": 1, "routed_scaling_factor": 2.5}, 2.5 * 2 * 4 / 7, 2.5 * 8 / 11, id="scaled"),
    ],
)
def test_two_tokens_and_three_experts_by_hand(settings, first, second):
    y_BLD = multiplying_layer(3, **settings)(TWO_TOKENS)
    assert_close(y_BLD, torch.tensor([[[first, 2 * first], [3 * second, second]]]))


def test_statistics_by_hand():
    _, stats = multiplying_layer(3, top_k=1)(TWO_TOKENS, return_stats=True)
    entropies = [-sum(p * math.log(p) for p in probs) for probs in ((2 / 7, 4 / 7, 1 / 7), (8 / 11, 2 / 11, 1 / 11))]
    assert stats.tokens_per_expert_E.tolist() == [1, 1, 0]
    assert_close(stats.importance_E, torch.tensor([2 / 7 + 8 / 11, 4 / 7 + 2 / 11, 1 / 7 + 1 / 11]) / 2)
    assert_close(stats.router_z_loss.item(), (math.log(7) ** 2 + math.log(11) ** 2) / 2)
    assert_close(stats.entropy.item(), sum(entropies) / 2 / math.log(3))
    assert (stats.dropped_tokens, stats.routed_rows) == (0, 2)


def test_tokens_over_capacity_are_dropped_in_order_of_arrival():
    layer = multiplying_layer(2, top_k=1, capacity_factor=1.0)
    x_BLD = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [0.0, 1.0]]])  # three for expert 0, room for two
    y_BLD, stats = layer(x_BLD, return_stats=True)
    assert_close(y_BLD, torch.tensor([[[2 / 3, 0.0], [8 / 5, 0.0]], [[0.0, 0.0], [0.0, 4 / 3]]]))
    assert stats.tokens_per_expert_E.tolist() == [3, 1]
    assert (stats.dropped_tokens, stats.routed_rows) == (1, 4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_stay_with_no_weight_are_as_good_as_dropped(padded, capacity_factor):
    """In a compiled graph, as on an accelerator, no shape depends on how many rows are padding or over the capacity."""
    torch.compiler.reset()  # compilations of the same code are counted, over all tests, and end at a limit
    layer = TokenChoiceMoE(8, intermediate_size=4, num_experts=4, top_k=2, capacity_factor=capacity_factor).double()
    mask_BL = torch.randn(3, 7) > 0 if padded else None
    x_BLD = (torch.randn(3, 7, 8, dtype=torch.float64) + 1).requires_grad_()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y_BLD, stats = run(x_BLD, mask_BL, return_stats=True)
        assert (stats.dropped_tokens > 0) == (capacity_factor is not None)
        results.append([y_BLD, *stats, *torch.autograd.grad(y_BLD.square().sum(), [x_BLD, *layer.parameters()])])
    assert_close(results[1], results[0])


def test_a_dropped_token_still_gets_the_shared_expert():
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=2, top_k=1, capacity_factor=0.5, num_shared_experts=2)
    x_BLD = torch.randn(1, 1, 4).expand(1, 8, 4)  # one expert, with room for two of the eight
    y_BLD, stats = layer(x_BLD, return_stats=True)
    assert stats.dropped_tokens == 6
    assert_close(y_BLD[:, 2:], layer.shared_expert(x_BLD)[:, 2:])
    assert not torch.allclose(y_BLD[:, :2], layer.shared_expert(x_BLD)[:, :2])
    assert layer.shared_expert.up_proj.weight.shape == (8, 4)


@pytest.mark.parametrize("capacity_factor", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [1, 3])
def test_drop_count_equals_a_count_by_hand(capacity_factor, top_k):
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=5, top_k=top_k, capacity_factor=capacity_factor)
    x_BLD = torch.randn(3, 7, 4) + 1
    _, stats = layer(x_BLD, return_stats=True)
    room = min(21, math.ceil(Fraction(capacity_factor) * 21 * top_k / 5))
    chosen_T = [torch.topk(layer.gate.weight @ x_D, top_k).indices.tolist() for x_D in x_BLD.flatten(0, 1)]
    counts = [sum(e in chosen for chosen in chosen_T) for e in range(5)]
    assert stats.tokens_per_expert_E.tolist() == counts
    assert stats.dropped_tokens == sum(max(0, count - room) for count in counts)
    assert stats.routed_rows == 21 * top_k


def test_dropless_drops_nothing_however_skewed_the_load():
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=8, top_k=1)
    x_BLD = torch.randn(1, 1, 4).expand(2, 50, 4)
    y_BLD, stats = layer(x_BLD, return_stats=True)
    assert sorted(stats.tokens_per_expert_E.tolist()) == [0] * 7 + [100]
    assert stats.dropped_tokens == 0
    assert_close(y_BLD, y_BLD[:1, :1].expand_as(y_BLD))


def test_a_token_of_a_dropless_layer_depends_on_no_other():
    layer = TokenChoiceMoE(8, intermediate_size=4, num_experts=4, top_k=2, num_shared_experts=1).double()
    x_BLD = torch.randn(3, 5, 8, dtype=torch.float64)
    one_by_one = torch.stack([torch.cat([layer(x_1D[None, None])[0] for x_1D in x_LD]) for x_LD in x_BLD])
    assert_close(layer(x_BLD), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_one_expert_is_the_dense_layer(gated):
    sizes = {"intermediate_size": 6, "activation": "silu", "gated": gated}
    layer = TokenChoiceMoE(4, num_experts=1, top_k=1, normalize_top_k=True, **sizes)
    dense = DenseFFN(4, **sizes)
    up_HD, down_DF = (weight[0] for weight in layer.experts.weights)
    state = {"up_proj.weight": up_HD[-6:], "down_proj.weight": down_DF}
    dense.load_state_dict(state | ({"gate_proj.weight": up_HD[:6]} if gated else {}))
    x_BLD = torch.randn(2, 3, 4)
    assert_close(layer(x_BLD), dense(x_BLD))


def test_choosing_all_experts_is_their_weighted_sum():
    layer = TokenChoiceMoE(4, intermediate_size=6, num_experts=3, top_k=3).double()
    x_TD = torch.randn(5, 4, dtype=torch.float64)
    probs_TE = layer.gate(x_TD).softmax(-1)
    up_EFD, down_EDF = layer.experts.weights
    y_TED = torch.einsum("tef,edf->ted", torch.einsum("td,efd->tef", x_TD, up_EFD).relu(), down_EDF)
    assert_close(layer(x_TD[None])[0], (probs_TE[..., None] * y_TED).sum(1))


def test_expert_bias_changes_the_choice_but_not_the_weights():
    layer = multiplying_layer(3, top_k=1, expert_bias=True)
    layer.expert_bias[2] = 10.0
    y_BLD, stats = layer(TWO_TOKENS, return_stats=True)
    assert stats.tokens_per_expert_E.tolist() == [0, 0, 2]
    assert_close(y_BLD, 3 * torch.tensor([[[1 / 7, 2 / 7], [3 / 11, 1 / 11]]]))
    assert_close(stats.importance_E, torch.tensor([2 / 7 + 8 / 11, 4 / 7 + 2 / 11, 1 / 7 + 1 / 11]) / 2)


def test_expert_bias_is_saved_but_never_trained():
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=4, top_k=2, expert_bias=True)
    layer(torch.randn(2, 3, 4)).sum().backward()
    assert layer.expert_bias.grad is None and not layer.expert_bias.requires_grad
    assert "expert_bias" in layer.state_dict() and "expert_bias" not in dict(layer.named_parameters())
    assert "expert_bias" not in TokenChoiceMoE(4, intermediate_size=4, num_experts=4).state_dict()


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_padding_takes_no_room_and_is_not_counted(capacity_factor):
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=3, top_k=2, capacity_factor=capacity_factor)
    x_BLD = torch.randn(2, 6, 4)
    mask_BL = torch.ones(2, 6, dtype=torch.long)
    mask_BL[:, :3] = 0
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
    short_BLD, short_stats = layer(x_BLD[:, 3:], return_stats=True)
    assert_close(y_BLD[:, 3:], short_BLD)
    assert_close(layer(x_BLD, mask_BL)[:, 3:], short_BLD)
    assert_close(stats, short_stats)
    assert stats.routed_rows == 12


def test_sigmoid_scores_are_reported_as_probabilities():
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=3, top_k=2, score_function="sigmoid")
    _, stats = layer(torch.randn(2, 6, 4), return_stats=True)
    assert_close(stats.importance_E.sum().item(), 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0: it must lie between 1 and num_experts, which is 4"),
        ({"top_k": 5}, "top_k is 5: it must lie between 1 and num_experts, which is 4"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0: it must be greater than zero"),
        ({"score_function": "tanh"}, "score_function is 'tanh': it must be softmax or sigmoid"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenChoiceMoE(4, intermediate_size=4, num_experts=4, **settings)


def test_named_experts_give_an_example_what_its_expert_gives():
    layer = TokenChoiceMoE(8, intermediate_size=6, num_experts=3, top_k=1, learned_router=False, num_shared_experts=1)
    layer = layer.double()
    x_BLD, expert_B = torch.randn(4, 5, 8, dtype=torch.float64), torch.tensor([2, 0, 2, 1])
    up_EFD, down_EDF = layer.experts.weights
    expected = torch.stack([(x @ up_EFD[e].T).relu() @ down_EDF[e].T for x, e in zip(x_BLD, expert_B, strict=True)])
    assert_close(layer(x_BLD, expert_B=expert_B), expected + layer.shared_expert(x_BLD), atol=1e-12, rtol=0)
    assert not any("gate" in name for name, _ in layer.named_parameters())


def test_named_experts_count_real_tokens_and_reach_only_their_own_weights():
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=3, top_k=1, learned_router=False)
    mask_BL = torch.tensor([[1, 1, 0], [1, 1, 1]])
    x_BLD = torch.randn(2, 3, 4)
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True, expert_B=torch.tensor([2, 0]))
    assert stats.tokens_per_expert_E.tolist() == [3, 0, 2]
    assert_close(stats.importance_E, torch.tensor([0.6, 0.0, 0.4]))
    assert (stats.router_z_loss, stats.dropped_tokens, stats.routed_rows, stats.entropy) == (0, 0, 5, 0)
    assert_close(y_BLD[mask_BL.bool()], layer(x_BLD, expert_B=torch.tensor([2, 0]))[mask_BL.bool()])
    y_BLD.sum().backward()
    assert (layer.experts.up_proj.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True]


def test_experts_are_named_if_and_only_if_there_is_no_router():
    x_BLD, expert_B = torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    named = TokenChoiceMoE(4, intermediate_size=4, num_experts=2, top_k=1, learned_router=False)
    with pytest.raises(ValueError, match="has no router: give expert_B"):
        named(x_BLD)
    with pytest.raises(ValueError, match="for 2 examples: give one for each"):
        named(x_BLD, expert_B=expert_B[:1])
    with pytest.raises(ValueError, match="has its own router: leave expert_B out"):
        TokenChoiceMoE(4, intermediate_size=4, num_experts=2)(x_BLD, expert_B=expert_B)
    for settings in ({"top_k": 2}, {"capacity_factor": 1.0}, {"expert_bias": True}):
        with pytest.raises(ValueError, match="set them to 1, None and False"):
            TokenChoiceMoE(4, intermediate_size=4, num_experts=2, learned_router=False, **({"top_k": 1} | settings))
