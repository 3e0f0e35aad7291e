"""The products of a decoding step: equal to the definition, the same for a token in any batch, and of no other pass."""

import pytest
import torch
from torch.testing import assert_close

from mixtura import kernels
from mixtura.kernels import dispatch, native, reference
from mixtura.layers import MixtureOfTokens, TokenChoiceMoE

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or torch's library has no sgemm")
KINDS = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
LARGE = {"hidden": 512, "width": 520}
"""Sizes of which three experts have weights enough for several threads to share them."""


def inputs(expert_TK, *, hidden, width, experts=5, activation="silu", gated=True, scaled=True):
    tokens, choices = expert_TK.shape
    up_EHD = torch.randn(experts, 2 * width if gated else width, hidden) / hidden**0.5
    weights = kernels.ExpertWeights(up_EHD, torch.randn(experts, hidden, width) / width**0.5, activation, gated)
    scale_TK, weight_TK = torch.rand(2, tokens, choices)
    return torch.randn(tokens, 1, hidden), expert_TK, scale_TK if scaled else None, weight_TK, weights


def run(x_TKD, expert_TK, scale_TK, weight_TK, experts, *, decoding=True):
    with torch.no_grad():
        return kernels.small_batch_ffn(x_TKD, expert_TK, scale_TK, weight_TK, experts, decoding=decoding)


def assert_equals_definition(values):
    double = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values]
    double[-1] = values[-1]._replace(up=values[-1].up.double(), down=values[-1].down.double())
    expected_TD = reference.small_batch_ffn(*double)
    atol = 2e-6 * max(1.0, expected_TD.abs().max().item())
    assert_close(run(*values).double(), expected_TD, rtol=0, atol=atol)


@KINDS
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("rows", [*range(1, 14), 19])
def test_every_number_of_rows_equals_the_definition(rows, activation, gated):
    # Expert 1 has all the rows, expert 3 one of them twice, the others none; widths leave parts of vectors and strips.
    expert_TK = torch.ones(rows, 2, dtype=torch.int64)
    expert_TK[:, 1] = 3
    expert_TK[0] = 3
    for hidden, width in ((1, 3), (7, 16), (16, 33), (37, 5), (64, 70)):
        sizes = {"hidden": hidden, "width": width, "activation": activation, "gated": gated}
        assert_equals_definition(inputs(expert_TK, **sizes))
        assert_equals_definition(inputs(expert_TK, scaled=False, **sizes))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_that_c_does_not_know_are_left_to_torch(activation):
    assert_equals_definition(inputs(torch.tensor([[0, 1], [1, 1]]), hidden=9, width=6, activation=activation))


def test_every_choice_may_have_an_input_of_its_own():
    x_T1D, *others = inputs(torch.randint(5, (9, 3)), hidden=20, width=12)
    assert_equals_definition([torch.randn(len(x_T1D), 3, 20), *others])


def test_more_rows_than_a_block_equal_the_definition():
    assert_equals_definition(inputs(torch.randint(5, (native.BLOCK_ROWS // 2 + 40, 3)), hidden=20, width=12))


@KINDS
@pytest.mark.parametrize("threads", [2, 3, 5], indirect=True)
def test_threads_do_not_change_a_bit(threads, gated):
    values = inputs(torch.randint(1, 5, (11, 2)), gated=gated, **LARGE)
    shared_TD = run(*values)
    assert_equals_definition(values)
    torch.set_num_threads(1)
    assert torch.equal(run(*values), shared_TD)


def test_a_token_has_the_same_output_in_any_batch():
    x_T1D, expert_TK, scale_TK, weight_TK, experts = inputs(torch.randint(5, (40, 2)), hidden=70, width=33)
    together_TD = run(x_T1D, expert_TK, scale_TK, weight_TK, experts)
    for size in (1, 3, 8):
        some = [t[:size].contiguous() for t in (x_T1D, expert_TK, scale_TK, weight_TK)]
        assert torch.equal(run(*some, experts), together_TD[:size])


def test_tokens_do_not_see_what_others_hold():
    x_T1D, *others = inputs(torch.tensor([[1, 3]] * 7), hidden=33, width=20)
    clean_TD = run(x_T1D, *others)
    changed_T1D = x_T1D.clone()
    changed_T1D[2] = float("nan")
    others_T = torch.arange(7) != 2
    assert torch.equal(run(changed_T1D, *others)[others_T], clean_TD[others_T])


@pytest.mark.parametrize("outside", [-1, 5, 2**40])
def test_an_expert_that_there_is_not_is_refused(outside):
    values = inputs(torch.tensor([[0, outside], [1, 1]]), hidden=8, width=4)
    with pytest.raises(IndexError, match=f"contains {outside}: every index must lie between 0 and 4"):
        run(*values)


@pytest.mark.parametrize("length", [1, 2], ids=["decoding", "sequence"])
def test_only_passes_of_one_token_a_sequence_are_decoding_steps(monkeypatch, length):
    asked = []
    few, by_token = dispatch.small_batch_ffn, kernels.token_by_token_ffn
    monkeypatch.setattr(dispatch, "small_batch_ffn", lambda *a, decoding: (asked.append(decoding), few(*a))[1])
    monkeypatch.setattr(kernels, "token_by_token_ffn", lambda *a: (asked.append(a[-2]), by_token(*a))[1])
    x_BLD = torch.randn(3, length, 16)
    mixture = MixtureOfTokens(16, intermediate_size=8, num_experts=4, group_size=4, alone_top_k=2).eval()
    with torch.no_grad():
        for layer in (TokenChoiceMoE(16, intermediate_size=8, num_experts=4, top_k=2), mixture):
            layer(x_BLD)
    assert asked == [length == 1] * 2


def test_whole_sequences_keep_the_products_of_blas():
    x_T1D, expert_TK, _, weight_TK, experts = inputs(torch.randint(5, (30, 2)), hidden=96, width=160)
    routed = (x_T1D.squeeze(1), expert_TK, weight_TK, experts)
    with torch.no_grad():
        assert torch.equal(kernels.routed_ffn(*routed), run(x_T1D, expert_TK, None, weight_TK, experts, decoding=False))
        assert torch.equal(kernels.routed_ffn(*routed, decoding=True), run(x_T1D, expert_TK, None, weight_TK, experts))


@pytest.mark.parametrize("population", [False, True], ids=["alone", "population"])
def test_a_decoding_step_that_runs_all_mixtures_equals_the_sequence(population):
    mode = {"inference_mode": "population", "population": True} if population else {}
    layer = MixtureOfTokens(
        24, intermediate_size=20, num_experts=4, group_size=8, mixtures_per_expert=2, activation="silu", **mode
    ).eval()
    if population:
        with torch.no_grad():
            layer.population.mean.normal_()
            layer.population.log_mass.normal_()
            layer.population.refresh(layer.experts)
    x_BLD = torch.randn(5, 3, 24)
    with torch.no_grad():
        expected_BLD = layer(x_BLD)
        for place in range(3):
            assert_close(layer(x_BLD[:, place : place + 1]), expected_BLD[:, place : place + 1])


def step_reference(x_TD, logits_TE, top_k, softmax, normalize, factor, experts):
    """In float64, by the definition of the choice and of the experts."""
    scores_TE = logits_TE.double().softmax(-1) if softmax else logits_TE.double().sigmoid()
    weight_TK, choice_TK = scores_TE.topk(top_k, dim=-1)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    double = experts._replace(up=experts.up.double(), down=experts.down.double())
    return reference.small_batch_ffn(x_TD.double().unsqueeze(1), choice_TK, None, factor * weight_TK, double)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False], ids=["summing to one", "as they are"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_step_of_token_choice_equals_its_definition(top_k, normalize, softmax, activation):
    for tokens, spread in ((1, 1.0), (9, 3.0), (4, 200.0)):
        x_T1D, _, _, _, experts = inputs(torch.zeros(tokens, 1, dtype=torch.int64), hidden=20, width=33)
        experts = experts._replace(activation=activation)
        # A sigmoid of much more than three is one for several experts.
        logits_TE = (spread if softmax else min(spread, 3.0)) * torch.randn(tokens, 5)
        values = (x_T1D.squeeze(1), logits_TE, top_k, softmax, normalize, 1.7, experts)
        expected_TD = step_reference(*values)
        with torch.no_grad():
            found_TD = kernels.token_choice_ffn(*values)
        atol = 3e-6 * max(1.0, expected_TD.abs().max().item())
        assert_close(found_TD.double(), expected_TD, rtol=0, atol=atol)


def test_a_step_of_token_choice_checks_its_shapes():
    x_T1D, _, _, _, experts = inputs(torch.zeros(3, 1, dtype=torch.int64), hidden=8, width=4)
    with torch.no_grad(), pytest.raises(ValueError, match="logits_TE"):
        kernels.token_choice_ffn(x_T1D.squeeze(1), torch.randn(3, 4), 2, True, True, 1.0, experts)
    with torch.no_grad(), pytest.raises(ValueError, match="x_TD"):
        kernels.token_choice_ffn(torch.randn(3, 7), torch.randn(3, 5), 2, True, True, 1.0, experts)


SETTINGS = {
    "plain": {},
    "sigmoid": {"score_function": "sigmoid", "normalize_top_k": True, "routed_scaling_factor": 2.5},
    "latent": {"latent_size": 8},
    "shared": {"num_shared_experts": 1},
    "bias": {"expert_bias": True},
    "groups": {"expert_groups": 2, "groups_per_token": 1},
    "free": {"zero_experts": 1, "copy_experts": 1},
    "capacity": {"capacity_factor": 2.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_takes_one_kernel_where_nothing_speaks_against_it(name, monkeypatch):
    asked = []
    step = kernels.token_choice_ffn
    monkeypatch.setattr(kernels, "token_choice_ffn", lambda *a: (asked.append(1), step(*a))[1])
    sizes = {"intermediate_size": 12, "num_experts": 4, "activation": "silu", "gated": True}
    layer = TokenChoiceMoE(16, **sizes, top_k=2, **SETTINGS[name]).eval()
    if layer.expert_bias is not None:
        layer.expert_bias.copy_(torch.tensor([3.0, 0.0, 0.0, -3.0]))
    x_BLD = torch.randn(5, 3, 16)
    with torch.no_grad():
        expected_BLD, _ = layer(x_BLD, return_stats=True)
        for place in range(3):
            assert_close(layer(x_BLD[:, place : place + 1]), expected_BLD[:, place : place + 1], rtol=1e-5, atol=1e-6)
    assert len(asked) == (3 if name in ("plain", "sigmoid", "latent", "shared") else 0)
    asked.clear()
    handle = layer.choice_tap.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        layer(x_BLD[:, :1])
    handle.remove()
    layer.train()
    with torch.no_grad():
        layer(x_BLD[:, :1])
    layer.eval()(x_BLD[:, :1].requires_grad_()).sum().backward()
    assert not asked
