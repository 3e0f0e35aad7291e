"""What every family of feed-forward layer promises, whatever it computes."""

import copy

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import (
    DenseFFN,
    ExpertChoiceMoE,
    ExpertThresholdMoE,
    FeedForward,
    MergedExperts,
    MixtureOfTokens,
    ReMoE,
    RoutingStats,
    SoftMoE,
    TokenChoiceMoE,
)

B, L, D, E = 4, 6, 8, 4
SIZES = {"intermediate_size": 8, "activation": "silu"}


def expert_threshold(**more):
    layer = ExpertThresholdMoE(D, **SIZES, **more, num_experts=E, top_k=2)
    layer.updates.fill_(
        1.0
    )  # thresholds of zero from a batch of the past; without one, training chooses over the batch
    return layer


BUILDERS = {
    "dense": lambda **more: DenseFFN(D, **SIZES, **more),
    "token_choice": lambda **more: TokenChoiceMoE(
        D, **SIZES, **more, num_experts=E, top_k=2, expert_bias=True, num_shared_experts=1
    ),
    "token_choice_dense_gradient": lambda **more: TokenChoiceMoE(
        D, **SIZES, **more, num_experts=E, top_k=2, dense_router_gradient=True, normalize_top_k=True
    ),
    "token_choice_in_groups": lambda **more: TokenChoiceMoE(
        D, **SIZES, **more, num_experts=E, top_k=2, expert_groups=2, score_function="sigmoid"
    ),
    "token_choice_free_experts": lambda **more: TokenChoiceMoE(
        D, **SIZES, **more, num_experts=2, top_k=2, copy_experts=1, constant_experts=1, latent_size=4
    ),
    "token_choice_with_capacity": lambda **more: TokenChoiceMoE(
        D, **SIZES, **more, num_experts=E, top_k=2, capacity_factor=1.0
    ),
    "expert_choice": lambda **more: ExpertChoiceMoE(D, **SIZES, **more, num_experts=E, top_k=2, group_size=2),
    "expert_threshold": expert_threshold,
    "remoe": lambda **more: ReMoE(D, **SIZES, **more, num_experts=E, top_k=2, num_shared_experts=1),
    "merged_experts": lambda **more: MergedExperts(D, **SIZES, **more, num_experts=E, segment_length=2),
    "merged_experts_prefix": lambda **more: MergedExperts(
        D, **SIZES, **more, num_experts=E, segment_length=2, merge_by="prefix", num_shared_experts=1
    ),
    "expert_choice_shared": lambda **more: ExpertChoiceMoE(
        D, **SIZES, **more, num_experts=E, group_size=2, num_shared_experts=1
    ),
    "soft_shared": lambda **more: SoftMoE(D, **SIZES, **more, num_experts=E, num_shared_experts=2),
    "mixture_of_tokens_shared": lambda **more: MixtureOfTokens(
        D, **SIZES, **more, num_experts=E, group_size=2, inference_mode="group", num_shared_experts=1
    ),
    "soft": lambda **more: SoftMoE(D, **SIZES, **more, num_experts=E, num_slots=2),
    "mixture_of_tokens": lambda **more: MixtureOfTokens(
        D, **SIZES, **more, num_experts=E, group_size=2, combine="separate", inference_mode="group"
    ),
    "mixture_of_tokens_alone": lambda **more: MixtureOfTokens(
        D, **SIZES, **more, num_experts=E, group_size=2, mixtures_per_expert=2
    ).eval(),
    "mixture_of_tokens_alone_top_k": lambda **more: MixtureOfTokens(
        D, **SIZES, **more, num_experts=E, group_size=2, alone_top_k=2
    ).eval(),
    "mixture_of_tokens_population": lambda **more: MixtureOfTokens(
        D, **SIZES, **more, num_experts=E, group_size=2, population=True, inference_mode="population", alone_top_k=2
    ).eval(),
}


@pytest.fixture(params=BUILDERS)
def family(request):
    return request.param


def build(family, **more):
    layer = BUILDERS[family](**more)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def tokens(dtype=torch.float32):
    return torch.randn(B, L, D, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_output_has_the_inputs_shape_and_dtype(family, dtype, gated):
    y_BLD = build(family, gated=gated).to(dtype)(tokens(dtype))
    assert y_BLD.shape == (B, L, D) and y_BLD.dtype == dtype
    assert y_BLD.isfinite().all() and (y_BLD != 0).any()


def test_gradient_reaches_the_input_and_every_parameter(family):
    layer, x_BLD = build(family), tokens().requires_grad_()
    layer(x_BLD).square().sum().backward()
    assert (x_BLD.grad != 0).any(-1).sum() > B * L / 2
    for name, parameter in layer.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_gradients_are_right_in_float64(family):
    layer, x_BLD = build(family).double(), tokens(torch.float64).requires_grad_()
    if "dense_gradient" in family:
        layer.eval()  # what trains its router is no gradient of the output
    parameters = dict(layer.named_parameters())

    def function(x_BLD, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x_BLD,))

    assert torch.autograd.gradcheck(function, (x_BLD, *parameters.values()), fast_mode=True)


def test_the_same_input_gives_the_same_bits(family):
    x_BLD = tokens()
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        layer = build(family)
        layer(x_BLD).sum().backward()
        results.append([layer(x_BLD)] + [parameter.grad for parameter in layer.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_eval_equals_train_unless_tokens_run_alone(family):
    layer, x_BLD = build(family), tokens()
    answered, trained = layer.eval()(x_BLD), layer.train()(x_BLD)
    if family == "token_choice_dense_gradient":  # training adds and takes away what has a gradient alone, and rounds
        torch.testing.assert_close(answered, trained, rtol=1e-5, atol=1e-6)
        return
    same = torch.equal(answered, trained)
    assert same is ("alone" not in family and "population" not in family)


def test_a_deep_copy_computes_the_same_and_shares_nothing(family):
    layer, x_BLD = build(family), tokens()
    twin = copy.deepcopy(layer)
    expected = layer(x_BLD)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(twin(x_BLD), expected)


def test_a_state_dict_carries_the_whole_layer(family):
    layer, other, x_BLD = build(family), build(family), tokens()
    for buffer in layer.buffers():
        buffer.normal_()
    assert not torch.equal(other(x_BLD), layer(x_BLD))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x_BLD), layer(x_BLD))


def test_an_input_that_is_laid_out_differently_gives_the_same(family):
    layer, x_BLD = build(family), tokens()
    for dims in ((0, 1), (1, 2)):
        turned = x_BLD.transpose(*dims).contiguous().transpose(*dims)
        assert not turned.is_contiguous()
        assert_close(layer(turned), layer(x_BLD))


def test_statistics_are_tensors_that_add_up(family):
    layer, x_BLD = build(family), tokens().requires_grad_()
    y_BLD, stats = layer(x_BLD, return_stats=True)
    assert torch.equal(y_BLD, layer(x_BLD))
    if family == "dense":
        assert stats is None
        return
    assert isinstance(stats, RoutingStats)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in stats)
    assert [value.shape for value in stats] == [(E,), (E,), (), (), (), (), ()]
    assert not stats.tokens_per_expert_E.requires_grad
    if family != "remoe":  # its gates are no probabilities
        assert_close(stats.importance_E.sum().item(), 1.0)
    assert stats.routed_rows == B * L * (2 if "token_choice" in family else 1)
    assert 0 <= stats.dropped_tokens < stats.routed_rows
    assert 0 < stats.entropy < 1
    if "token_choice" in family or "soft" in family:
        assert_close(stats.tokens_per_expert_E.sum(), stats.routed_rows)


def test_statistics_cost_nothing_when_nobody_asks(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a statistic was computed")

    for module in ("statistics", "soft"):  # all that compute any
        monkeypatch.setattr(f"mixtura.layers.{module}.normalized_entropy", refuse)
        monkeypatch.setattr(f"mixtura.layers.{module}.RoutingStats", refuse)
    for family in BUILDERS:
        layer = build(family)
        layer(tokens(), torch.ones(B, L))
        if family != "dense":
            with pytest.raises(AssertionError, match="a statistic was computed"):
                layer(tokens(), return_stats=True)


NOTHING = BUILDERS | {
    "token_choice_by_sequence": lambda **more: TokenChoiceMoE(D, **SIZES, num_experts=E, balance_by_sequence=True),
    "expert_choice_over_all": lambda **more: ExpertChoiceMoE(D, **SIZES, num_experts=E, group_over="all"),
    "mixture_of_tokens_zero_fill": lambda **more: MixtureOfTokens(
        D, **SIZES, num_experts=E, group_size=2, zero_fill=0.5, population=True
    ),
    "mixture_of_tokens_over_sequence": lambda **more: MixtureOfTokens(
        D, **SIZES, num_experts=E, group_size=2, group_over="sequence", inference_mode="group"
    ),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, L), (B, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_batch_without_tokens_gives_no_output_and_gradients_of_zero(name, training, shape, masked):
    layer = NOTHING[name]().train(training)
    x_BLD = torch.randn(*shape, D, requires_grad=True)
    mask_BL = torch.ones(shape) if masked else None
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
    assert y_BLD.shape == layer(x_BLD, mask_BL).shape == (*shape, D) and y_BLD.dtype == x_BLD.dtype
    loss = y_BLD.sum()
    if name != "dense":
        assert all(value.dtype == torch.float32 and (value == 0).all() for value in stats)
        assert [value.shape for value in stats] == [(E,), (E,), (), (), (), (), ()]
        loss = loss + stats.importance_E.sum() + stats.router_z_loss + stats.sequence_loss
    loss.backward()
    assert x_BLD.grad.shape == x_BLD.shape
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in layer.parameters())


def test_a_batch_of_padding_alone_has_statistics_of_zero(family):
    if family == "dense":
        return
    y_BLD, stats = build(family)(tokens(), torch.zeros(B, L), return_stats=True)
    assert y_BLD.isfinite().all()
    assert all(value.isfinite().all() for value in stats) and stats.routed_rows == 0
    assert torch.equal(stats.importance_E, torch.zeros(E)) and stats.router_z_loss == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_a_mask_of_any_dtype_hides_what_padding_holds(family, dtype):
    layer, x_BLD = build(family), tokens()
    real_BL = torch.rand(B, L) < 0.7
    other_BLD = torch.where(real_BL[..., None], x_BLD, 50 * torch.randn(B, L, D))
    mask_BL = real_BL.to(dtype)
    assert_close(layer(other_BLD, mask_BL)[real_BL], layer(x_BLD, mask_BL)[real_BL])
    y_BLD, stats = layer(x_BLD, mask_BL, return_stats=True)
    assert_close(y_BLD[real_BL], layer(x_BLD, mask_BL)[real_BL])
    _, other_stats = layer(other_BLD, mask_BL, return_stats=True)
    if family != "dense":
        assert_close(stats, other_stats)
        assert stats.routed_rows == real_BL.sum() * (2 if "token_choice" in family else 1)


def test_a_mask_of_ones_changes_nothing(family):
    layer, x_BLD = build(family), tokens()
    plain, masked = layer(x_BLD, return_stats=True), layer(x_BLD, torch.ones(B, L), return_stats=True)
    assert_close(masked[0], plain[0])
    if family != "dense":
        assert_close(masked[1], plain[1])


@pytest.mark.parametrize("shape", [(D,), (L, D), (1, B, L, D)], ids=str)
def test_an_input_of_another_rank_is_refused(family, shape):
    with pytest.raises(ValueError, match=r"it must be \(batch, length, hidden_size\)"):
        build(family)(torch.randn(shape))


def test_autocast_stays_close_and_keeps_float32_gradients(family):
    layer, x_BLD = build(family), tokens()
    expected_BLD, expected_stats = layer(x_BLD, return_stats=True)
    with torch.autocast("cpu", torch.bfloat16):
        y_BLD, stats = layer(x_BLD, return_stats=True)
        y_BLD.float().sum().backward()
    assert_close(y_BLD.float(), expected_BLD, rtol=0.05, atol=0.03 * expected_BLD.abs().max().item())
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    if family != "dense":
        assert_close(stats, expected_stats, rtol=0.01, atol=0.01)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiling_in_one_graph_changes_nothing(family, backend, masked):
    torch.compiler.reset()  # compilations of the same code are counted, over all tests, and end at a limit
    layer, x_BLD = build(family), tokens().requires_grad_()
    mask_BL = None
    if masked:
        mask_BL = torch.ones(B, L, dtype=torch.long)
        mask_BL[1, :2] = mask_BL[0, -1] = 0
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        layer.zero_grad()
        x_BLD.grad = None
        y_BLD, stats = function(x_BLD, mask_BL, return_stats=True)
        loss = y_BLD.square().sum() + (0 if stats is None else stats.router_z_loss + stats.importance_E[0])
        loss.backward()
        results.append([y_BLD.detach(), x_BLD.grad] + [parameter.grad.clone() for parameter in layer.parameters()])
        results[-1] += [] if stats is None else [value.detach() for value in stats]
    assert_close(results[1], results[0])


def test_every_family_is_a_feed_forward_layer():
    assert {type(build(family)) for family in BUILDERS} == _layer_classes(FeedForward)


def _layer_classes(of: type) -> set[type]:
    """Those that are built: classes that others inherit from only hold what these share."""
    below = set(of.__subclasses__())
    return set().union(*({each} if not each.__subclasses__() else _layer_classes(each) for each in below))
