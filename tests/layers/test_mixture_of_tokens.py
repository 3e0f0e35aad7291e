"""Mixture of Tokens: hand-computed groups, who mixes with whom, and the token alone.

The deployed mode must be exactly what the trained layer computes for a token whose group is otherwise zero.
"""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mixtura import kernels
from mixtura.layers import Experts, MixtureOfTokens, Population
from mixtura.layers.token_by_token import Observation

LN2 = math.log(2)


def doubling_layer(group_size=2):
    """D = E = 2; logits are ln 2 times the token's entries; expert 0 keeps a positive mixture, expert 1 doubles it."""
    layer = MixtureOfTokens(2, intermediate_size=2, num_experts=2, group_size=group_size)
    with torch.no_grad():
        layer.gate.weight.copy_(LN2 * torch.eye(2))
        layer.experts.up_proj.copy_(torch.stack([torch.eye(2), 2 * torch.eye(2)]))
        layer.experts.down_proj.copy_(torch.eye(2).expand(2, 2, 2))
    return layer


def random_layer(**settings):
    """Eight experts on groups of four, in float64, with weights of order one: they start close to undecided."""
    sizes = {"intermediate_size": 6, "num_experts": 8, "group_size": 4}
    layer = MixtureOfTokens(5, **(sizes | settings)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def random_tokens(*shape):
    return torch.randn(*shape, 5, dtype=torch.float64)


def test_a_group_of_two_tokens_by_hand():
    # Dispatch weights over the tokens: (2/3, 1/3) for expert 0, (1/3, 2/3) for expert 1.
    # Mixtures (2/3, 1/3) and (1/3, 2/3); expert outputs (2/3, 1/3) and (2/3, 4/3).
    x_BLD = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    y_BLD, stats = doubling_layer()(x_BLD, return_stats=True)
    assert_close(y_BLD, torch.tensor([[[2 / 3, 2 / 3]], [[2 / 3, 1.0]]]))
    assert_close(stats.tokens_per_expert_E, torch.ones(2))
    assert_close(stats.importance_E, torch.full((2,), 0.5))
    assert_close(stats.router_z_loss.item(), math.log(3) ** 2)
    assert_close(stats.entropy.item(), -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / LN2)
    assert (stats.dropped_tokens, stats.routed_rows) == (0, 2)


@pytest.mark.parametrize(
    ("group_size", "top_k", "factor"),
    [
        pytest.param(2, None, (2 / 3) ** 2 + 2 * (1 / 2) ** 2, id="group of 2"),  # sigmoid(ln 2), sigmoid(0)
        pytest.param(3, None, (1 / 2) ** 2 + 2 * (1 / 3) ** 2, id="group of 3"),  # the same, minus ln 2
        pytest.param(2, 1, (2 / 3) ** 2, id="top 1"),
    ],
)
def test_a_token_alone_by_hand(group_size, top_k, factor):
    layer = doubling_layer(group_size).eval()
    layer.set_inference_mode("alone", top_k=top_k)
    y_BLD, stats = layer(torch.tensor([[[1.0, 0.0]]]), return_stats=True)
    assert_close(y_BLD, torch.tensor([[[factor, 0.0]]]))
    assert stats.routed_rows == 1
    if top_k == 1:
        assert stats.tokens_per_expert_E.tolist() == [1, 0]


def test_permuting_the_examples_of_a_group_permutes_the_outputs():
    layer = random_layer()
    x_BLD = random_tokens(8, 3)
    order_B = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6])
    assert_close(layer(x_BLD[order_B]), layer(x_BLD)[order_B])


def test_groups_and_positions_do_not_see_each_other():
    layer = random_layer()
    x_BLD = random_tokens(8, 6)
    other_BLD = x_BLD.clone()
    other_BLD[1, 4] += 1
    changed_BL = (layer(other_BLD) != layer(x_BLD)).any(-1)
    assert changed_BL.nonzero().tolist() == [[b, 4] for b in range(4)]


def test_groups_over_the_sequence_stay_within_an_example():
    layer = random_layer(group_over="sequence")
    x_BLD = random_tokens(3, 8)
    other_BLD = x_BLD.clone()
    other_BLD[1, 4] += 1
    changed_BL = (layer(other_BLD) != layer(x_BLD)).any(-1)
    assert changed_BL.nonzero().tolist() == [[1, t] for t in range(4, 8)]


def test_a_zero_router_gives_every_token_the_experts_of_the_groups_mean():
    layer = random_layer(activation="gelu")
    torch.nn.init.zeros_(layer.gate.weight)
    x_BLD = random_tokens(4, 3)
    mean_LD = x_BLD.mean(0)
    outputs_ELD = layer.experts(mean_LD.expand(8, 3, 5), kernels.batched_ffn)
    assert_close(layer(x_BLD), (outputs_ELD.sum(0) / 4).expand(4, 3, 5))


def test_gradient_reaches_every_expert_and_every_token():
    layer = random_layer(activation="silu")
    x_BLD = random_tokens(4, 3).requires_grad_()
    layer(x_BLD).square().sum().backward()
    assert (x_BLD.grad != 0).all()
    for parameter in layer.parameters():
        assert (parameter.grad != 0).all()


def test_eval_in_group_mode_is_what_was_trained():
    layer = random_layer(inference_mode="group")
    x_BLD = random_tokens(4, 3)
    assert torch.equal(layer.train()(x_BLD), layer.eval()(x_BLD))


def test_training_uses_groups_whatever_the_inference_mode():
    layer = random_layer(inference_mode="alone", alone_top_k=1).train()
    x_BLD = random_tokens(4, 3)
    trained_BLD = layer(x_BLD)
    layer.set_inference_mode("group")
    assert torch.equal(layer(x_BLD), trained_BLD)
    layer.eval().set_inference_mode("alone")
    assert not torch.allclose(layer(x_BLD), trained_BLD)


@pytest.mark.parametrize("group_over", ["batch", "sequence"])
def test_a_group_that_is_not_full_counts_as_filled_with_zeros_and_says_so(group_over):
    layer = random_layer(group_over=group_over)
    x_BLD = random_tokens(6, 6)
    shape = (8, 6, 5) if group_over == "batch" else (6, 8, 5)
    full_BLD = torch.zeros(shape, dtype=torch.float64)
    full_BLD[:6, :6] = x_BLD
    axis = "examples" if group_over == "batch" else "positions"
    with pytest.warns(UserWarning, match=f"6 {axis} are no multiple of the group size 4: the last group has 2 tokens"):
        y_BLD = layer(x_BLD)
    assert_close(y_BLD, layer(full_BLD)[:6, :6])


@pytest.mark.parametrize("group_over", ["batch", "sequence"])
def test_padding_counts_as_zeros_and_is_not_counted(group_over):
    layer = random_layer(group_over=group_over)
    x_BLD = random_tokens(4, 4)
    mask_BL = torch.ones(4, 4, dtype=torch.long)
    mask_BL[0, 1:] = mask_BL[3, 0] = 0
    real_BL = mask_BL.bool()
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
    assert_close(y_BLD[real_BL], layer(x_BLD * mask_BL[..., None])[real_BL])
    logits_TE = layer.gate(x_BLD[real_BL])
    assert stats.routed_rows == 12
    assert_close(stats.router_z_loss.double(), logits_TE.logsumexp(-1).square().mean(), rtol=1e-5, atol=0)
    logits_BLE = layer.gate(x_BLD * mask_BL[..., None])
    weights_BLE = logits_BLE.softmax(0 if group_over == "batch" else 1)
    assert_close(stats.tokens_per_expert_E.double(), weights_BLE[real_BL].sum(0), rtol=1e-5, atol=0)


def test_statistics_of_a_group_that_is_not_full_leave_out_its_filling():
    layer = random_layer()
    with pytest.warns(UserWarning, match="no multiple"):
        _, stats = layer(random_tokens(6, 3), return_stats=True)
    assert stats.routed_rows == 18
    assert stats.tokens_per_expert_E.sum() < 2 * 3 * 8  # the zeros of the second group took their share of its weights


@pytest.mark.parametrize("combine", ["same", "separate"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("mixtures_per_expert", [1, 3])
def test_alone_equals_the_layer_on_a_group_of_zeros(combine, gated, mixtures_per_expert):
    layer = random_layer(
        combine=combine, gated=gated, mixtures_per_expert=mixtures_per_expert, temperature=0.7, activation="gelu"
    )
    x_LD = random_tokens(7)
    group_BLD = torch.zeros(4, 7, 5, dtype=torch.float64)
    group_BLD[0] = x_LD
    in_group_LD = layer.train()(group_BLD)[0]
    assert_close(layer.eval()(x_LD[None])[0], in_group_LD, rtol=0, atol=1e-10)


def test_alone_with_relu_experts_is_a_token_wise_soft_mixture():
    layer = random_layer().eval()
    x_TD = random_tokens(7)
    m_TE = torch.sigmoid(layer.gate(x_TD) - math.log(3))
    outputs_ETD = layer.experts(x_TD.expand(8, 7, 5), kernels.batched_ffn)
    expected_TD = torch.einsum("te,etd->td", m_TE.square(), outputs_ETD)
    assert_close(layer(x_TD[None])[0], expected_TD, rtol=0, atol=1e-10)


@pytest.mark.parametrize("top_k", [None, 3])
def test_alone_depends_on_nothing_but_the_token(top_k):
    layer = random_layer(alone_top_k=top_k).eval()
    x_BLD = random_tokens(3, 5)  # three examples are no multiple of four, which is no matter here
    one_by_one = torch.stack([torch.cat([layer(x_D[None, None])[0] for x_D in x_LD]) for x_LD in x_BLD])
    assert_close(layer(x_BLD), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixtures_per_expert", [1, 2])
def test_alone_with_as_many_mixtures_as_there_are_runs_all(mixtures_per_expert):
    layer = random_layer(mixtures_per_expert=mixtures_per_expert, combine="separate").eval()
    x_BLD = random_tokens(2, 5)
    all_BLD = layer(x_BLD)
    layer.set_inference_mode("alone", top_k=8 * mixtures_per_expert)
    assert_close(layer(x_BLD), all_BLD)


def test_alone_statistics_count_the_rows_of_real_tokens():
    layer = random_layer(alone_top_k=3).eval()
    x_BLD = random_tokens(2, 5)
    mask_BL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    _, stats = layer(x_BLD, mask_BL, return_stats=True)
    m_TE = torch.sigmoid(layer.gate(x_BLD[mask_BL.bool()]) - math.log(3))
    counts_E = torch.bincount(m_TE.square().topk(3).indices.flatten(), minlength=8)
    assert stats.tokens_per_expert_E.tolist() == counts_E.tolist()
    assert stats.routed_rows == 8
    assert_close(stats.entropy.item(), math.log(3) / math.log(8))
    layer.set_inference_mode("alone")
    _, stats = layer(x_BLD, mask_BL, return_stats=True)
    assert_close(stats.tokens_per_expert_E, m_TE.square().sum(0).float())


@pytest.mark.parametrize("top_k", [None, 2])
def test_alone_runs_under_autocast(top_k):
    layer = random_layer(alone_top_k=top_k).float().eval()
    x_BLD = random_tokens(3, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        y_BLD = layer(x_BLD)
    assert_close(y_BLD.float(), layer(x_BLD), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size is 1: a group needs at least 2 tokens"),
        ({"mixtures_per_expert": 0}, "mixtures_per_expert is 0: it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be greater than zero"),
        ({"group_over": "all"}, "group_over is 'all': it must be batch or sequence"),
        ({"combine": "none"}, "combine is 'none': it must be same or separate"),
        ({"inference_mode": "discrete"}, "inference_mode is 'discrete': it must be group, alone or population"),
        ({"alone_top_k": 9}, "alone_top_k is 9: it must lie between 1 and 8, the number of mixtures"),
        ({"alone_top_k": 0}, "alone_top_k is 0: it must lie between 1 and 8, the number of mixtures"),
        ({"inference_mode": "population"}, "'population' but the layer keeps no population's averages: calibrate it"),
        ({"zero_fill": -0.1}, r"zero_fill is -0\.1: it is a share of the groups and must lie between 0 and 1"),
        ({"zero_fill": 1.5}, r"zero_fill is 1\.5: it is a share of the groups and must lie between 0 and 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        random_layer(**settings)


def test_more_mixtures_an_expert_allow_a_larger_top_k():
    layer = random_layer(mixtures_per_expert=2)
    layer.set_inference_mode("alone", top_k=16)
    assert layer.alone_top_k == 16


def rows_that_ran_alone(layer, x_BLD):
    """(L,) for a batch of one group of examples: whether a training step ran each position as `alone` does."""
    y_BLD = layer.train()(x_BLD)
    together_BLD, alone_BLD = with_zero_fill(layer, 0.0)(x_BLD), layer.eval()(x_BLD)
    alone_L = (y_BLD - alone_BLD).abs().amax((0, 2)) < 1e-12
    assert torch.equal(alone_L, (y_BLD - together_BLD).abs().amax((0, 2)) > 1e-12)
    return alone_L


def with_zero_fill(layer, share):
    twin = copy.deepcopy(layer).train()
    twin.set_zero_fill(share)
    return twin


@pytest.mark.parametrize("top_k", [None, 2])
def test_training_runs_a_share_of_the_groups_as_alone_does_and_the_rest_together(top_k):
    layer, x_BLD = random_layer(alone_top_k=top_k, zero_fill=0.25), random_tokens(4, 12)
    draws = [rows_that_ran_alone(layer, x_BLD) for _ in range(8)]
    assert all(alone_L.sum() == 3 for alone_L in draws)
    assert len({tuple(alone_L.tolist()) for alone_L in draws}) > 1


def test_a_share_below_one_group_takes_one_as_often_as_it_says():
    layer, x_BLD = random_layer(zero_fill=0.1), random_tokens(4, 2)
    counts = torch.tensor([float(rows_that_ran_alone(layer, x_BLD).sum()) for _ in range(300)])
    assert set(counts.tolist()) == {0.0, 1.0}
    assert abs(counts.mean() - 0.2) < 3 * 0.4 / 300**0.5  # three standard errors


def test_zero_fill_of_everything_trains_in_the_deployed_mode_with_any_batch():
    layer, x_BLD = random_layer(alone_top_k=2, zero_fill=1.0), random_tokens(3, 5)
    assert torch.equal(layer.train()(x_BLD), layer.eval()(x_BLD))


def test_zero_fill_changes_nothing_in_evaluation():
    layer, x_BLD = random_layer(zero_fill=0.5, inference_mode="group").eval(), random_tokens(4, 6)
    assert torch.equal(layer(x_BLD), with_zero_fill(layer, 0.0)(x_BLD))


def test_which_groups_are_left_empty_follows_from_torchs_random_state_alone():
    layer, x_BLD = random_layer(zero_fill=0.25), random_tokens(4, 12)
    state = torch.get_rng_state()
    first_BLD = layer(x_BLD)
    assert not torch.equal(layer(x_BLD), first_BLD)
    torch.set_rng_state(state)
    assert torch.equal(layer(x_BLD), first_BLD)


def test_a_layer_that_is_recomputed_leaves_the_same_groups_empty():
    layer, x_BLD = random_layer(zero_fill=0.25), random_tokens(4, 12).requires_grad_()
    state, grads = torch.get_rng_state(), []
    for run in (layer, lambda x_BLD: checkpoint(layer, x_BLD, use_reentrant=False)):
        torch.set_rng_state(state)
        layer.zero_grad()
        run(x_BLD).square().sum().backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradients_are_right_when_some_groups_are_left_empty(top_k):
    layer = random_layer(zero_fill=0.5, alone_top_k=top_k, activation="silu", combine="separate")
    x_BLD, parameters = random_tokens(4, 4).requires_grad_(), dict(layer.named_parameters())

    def function(x_BLD, *values):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x_BLD,))

    assert torch.autograd.gradcheck(function, (x_BLD, *parameters.values()), fast_mode=True)


def test_statistics_cover_groups_and_tokens_alone():
    layer, x_BLD = random_layer(zero_fill=0.25), random_tokens(4, 12)
    state = torch.get_rng_state()
    _, stats = layer(x_BLD, return_stats=True)
    torch.set_rng_state(state)
    alone_L = rows_that_ran_alone(layer, x_BLD)
    _, alone = layer.eval()(x_BLD[:, alone_L], return_stats=True)
    _, together = with_zero_fill(layer, 0.0)(x_BLD[:, ~alone_L], return_stats=True)
    assert stats.routed_rows == 48
    assert_close(stats.tokens_per_expert_E, alone.tokens_per_expert_E + together.tokens_per_expert_E)
    for name in ("importance_E", "router_z_loss", "entropy"):
        assert_close(getattr(stats, name), 0.25 * getattr(alone, name) + 0.75 * getattr(together, name))


def test_statistics_stay_finite_when_a_group_that_is_left_empty_is_all_padding():
    layer, x_BLD = random_layer(zero_fill=0.5), random_tokens(4, 4)
    mask_BL = torch.tensor([1, 0, 0, 0]).expand(4, 4)
    for _ in range(6):
        y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
        assert y_BLD.isfinite().all() and all(value.isfinite().all() for value in stats)
        assert stats.routed_rows == 4


def with_neighbours(layer, others_GD):
    """The layer in `population` mode, its averages those of one real group's other members, given as (G - 1, D)."""
    layer.observing = True
    layer.train()(torch.cat([others_GD, torch.zeros_like(others_GD[:1])])[:, None])
    layer.observing = False
    layer.keep_population().reset()
    layer.population.update(layer.observed, layer.experts)
    layer.eval().set_inference_mode("population")
    return layer


@pytest.mark.parametrize("combine", ["same", "separate"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("mixtures_per_expert", [1, 3])
def test_population_with_a_real_groups_own_averages_equals_the_group(combine, gated, mixtures_per_expert):
    layer = random_layer(
        combine=combine, gated=gated, mixtures_per_expert=mixtures_per_expert, temperature=0.7, activation="gelu"
    )
    group_GD = random_tokens(4)
    in_group_GD = layer.train()(group_GD[:, None])[:, 0]
    for member in range(4):
        others = [other for other in range(4) if other != member]
        with_neighbours(layer, group_GD[others])
        for top_k in (None, 8 * mixtures_per_expert):
            layer.set_inference_mode("population", top_k=top_k)
            assert_close(layer(group_GD[None, [member]])[0, 0], in_group_GD[member], rtol=0, atol=1e-10)


def test_a_population_of_zeros_is_the_token_alone():
    layer, x_BLD = random_layer(population=True, alone_top_k=3).eval(), random_tokens(2, 5)
    alone_BLD = layer(x_BLD)
    layer.set_inference_mode("population", top_k=3)
    assert_close(layer(x_BLD), alone_BLD)


def test_population_by_hand():
    # Neighbour (0, 1): masses (1, 2), mean (0, 1), outputs (0, 1) and (0, 2). The token (1, 0) has weights (2/3, 1/3).
    # Mixtures (2/3, 1/3) and (1/3, 2/3), as in the group of these two; outputs (2/3, 1/3) and (2/3, 4/3).
    layer = with_neighbours(doubling_layer(), torch.tensor([[0.0, 1.0]]))
    x_BLD = torch.tensor([[[1.0, 0.0]]])
    assert_close(layer(x_BLD), torch.tensor([[[2 / 3, 2 / 3]]]))
    layer.set_inference_mode("population", top_k=1)  # expert 1 gives the constant (0, 2), a third of it
    assert_close(layer(x_BLD), torch.tensor([[[4 / 9, 2 / 9 + 2 / 3]]]))


def test_population_depends_on_nothing_but_the_token():
    layer, x_BLD = with_neighbours(random_layer(), random_tokens(3)), random_tokens(3, 5)
    for top_k in (None, 3):
        layer.set_inference_mode("population", top_k=top_k)
        one_by_one = torch.stack([torch.cat([layer(x_D[None, None])[0] for x_D in x_LD]) for x_LD in x_BLD])
        assert_close(layer(x_BLD), one_by_one, rtol=0, atol=1e-12)


def test_averages_are_plain_means_until_the_rate_takes_over():
    population = Population(1, 1, group_size=3)
    experts = Experts(1, intermediate_size=1, num_experts=1)
    for value in (1.0, 2.0, 6.0):
        seen = Observation(torch.tensor([value]), torch.tensor([-value]), torch.tensor([[value]]))
        population.update(seen, experts)
    assert_close(population.log_mass, torch.tensor([3.0]))
    assert_close(population.combine_log_mass, torch.tensor([-3.0]))
    population.update(seen._replace(mean_SD=torch.tensor([[5.0]])), experts, rate=0.5)
    assert_close(population.mean, torch.tensor([[4.0]]))
    assert_close(population.output, experts(torch.tensor([[[4.0]]]), kernels.batched_ffn)[0])
    population.reset()
    assert_close(population.log_mass, torch.tensor([LN2]))
    assert (population.mean, population.output, population.updates) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("gated", [False, True])
def test_the_layer_compiles_as_one_graph_forward_and_backward(gated):
    torch.compiler.reset()  # compilations of the same code are counted, over all tests, and end at a limit
    layer = MixtureOfTokens(8, intermediate_size=4, num_experts=4, group_size=4, activation="silu", gated=gated)
    results = []
    x_BLD = torch.randn(4, 3, 8, requires_grad=True)
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y_BLD = run(x_BLD)
        results.append([y_BLD, *torch.autograd.grad(y_BLD.square().sum(), [x_BLD, *layer.parameters()])])
    assert_close(results[1], results[0])
