"""Few rows without sorting: equal to the definition, and left to the sorted path where it does not suit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mixtura import kernels
from mixtura.kernels import native, reference, small_batch
from mixtura.layers import Experts, TokenChoiceMoE

SIZES = st.integers(1, 4)
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])


def random_experts(num_experts, hidden, width, activation, gated):
    sizes = {"intermediate_size": width, "num_experts": num_experts, "activation": activation, "gated": gated}
    experts = Experts(hidden, **sizes).double()
    experts.reset_parameters(std=1.0)
    return experts


def weights_of(experts):
    return kernels.ExpertWeights(*experts.weights, experts.activation, experts.gated)


def random_choices(tokens, choices, num_experts, hidden, *, one_input=False, scaled=True):
    x_TKD = torch.randn(tokens, 1 if one_input else choices, hidden, dtype=torch.float64)
    expert_TK = torch.randint(num_experts, (tokens, choices))  # a token may well choose an expert twice
    scale_TK, weight_TK = torch.randn(2, tokens, choices, dtype=torch.float64)
    return x_TKD, expert_TK, scale_TK if scaled else None, weight_TK


def run_chosen(experts, x_TKD, expert_TK, scale_TK, weight_TK):
    return experts(x_TKD, kernels.chosen_ffn, expert_TK, scale_TK, weight_TK)


@GATED
@pytest.mark.parametrize("activation", ["relu", "silu"])
@given(t=st.integers(1, 200), k=SIZES, e=SIZES, d=SIZES, f=SIZES, one_input=st.booleans(), scaled=st.booleans())
def test_chosen_experts_in_c_equal_their_definition(activation, gated, t, k, e, d, f, one_input, scaled):
    experts = random_experts(e, d, f, activation, gated)
    choices = random_choices(t, k, e, d, one_input=one_input, scaled=scaled)
    single = [value.float() if value is not None and value.is_floating_point() else value for value in choices]
    with torch.no_grad():
        expected_TD = reference.small_batch_ffn(*choices, weights_of(experts))
        y_TD = kernels.small_batch_ffn(*single, weights_of(experts.float()))
    assert y_TD.dtype == torch.float32
    assert_close(y_TD.double(), expected_TD, rtol=0, atol=2e-6 * max(1.0, expected_TD.abs().max().item()))


@GATED
@ACTIVATIONS
@given(t=SIZES, k=SIZES, e=SIZES, d=SIZES, f=SIZES, one_input=st.booleans(), scaled=st.booleans())
def test_all_ways_to_run_chosen_experts_equal_their_definition(activation, gated, t, k, e, d, f, one_input, scaled):
    experts = random_experts(e, d, f, activation, gated)
    choices = random_choices(t, k, e, d, one_input=one_input, scaled=scaled)
    arguments = (*choices, weights_of(experts))
    expected_TD = reference.small_batch_ffn(*arguments)
    with torch.no_grad():
        assert_close(kernels.small_batch_ffn(*arguments), expected_TD)
        assert_close(small_batch._from_copies(*arguments), expected_TD)
        assert_close(run_chosen(experts, *choices), expected_TD)
    assert_close(run_chosen(experts, *choices), expected_TD)


def test_gradients_go_the_sorted_way_and_are_those_of_the_definition():
    experts = random_experts(3, 4, 2, "silu", True)
    x_TKD, expert_TK, scale_TK, weight_TK = random_choices(2, 2, 3, 4)
    grads = []
    for function in (
        lambda *inputs: run_chosen(experts, *inputs),
        lambda *inputs: reference.small_batch_ffn(*inputs, weights_of(experts)),
    ):
        x, scale, weight = (tensor.clone().requires_grad_() for tensor in (x_TKD, scale_TK, weight_TK))
        experts.zero_grad()
        function(x, expert_TK, scale, weight).square().sum().backward()
        grads.append([tensor.grad for tensor in [x, scale, weight, *experts.weights]])
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, small_batch.TORCH_ROWS), (torch.float32, small_batch.NATIVE_ROWS)],
    ids=["torch", "C"],
)
def test_only_few_rows_of_inference_are_few(dtype, limit):
    x = torch.zeros(2, 3, dtype=dtype)
    limit = limit if native.can_run("silu", x) or dtype == torch.float64 else small_batch.TORCH_ROWS
    with torch.no_grad():
        assert kernels.is_small_batch(limit, "silu", x)
        assert not kernels.is_small_batch(limit + 1, "silu", x)
        assert not kernels.is_small_batch(0, "silu", x)
    assert not kernels.is_small_batch(limit, "silu", x)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_decoding_step_of_token_choice_does_not_sort(monkeypatch, top_k):
    layer = TokenChoiceMoE(6, intermediate_size=4, num_experts=5, top_k=top_k, num_shared_experts=1)
    x_BLD = torch.randn(2, 1, 6)
    expected_BLD = layer(x_BLD)
    monkeypatch.setattr("mixtura.kernels.dispatch.order_by_expert", lambda *_: pytest.fail("it sorted"))
    with torch.no_grad():
        assert_close(layer(x_BLD), expected_BLD)
        with pytest.raises(pytest.fail.Exception, match="it sorted"):
            layer(torch.randn(2, small_batch.NATIVE_ROWS, 6))


def test_few_rows_run_under_autocast():
    experts, choices = random_experts(3, 8, 4, "gelu", False).float(), random_choices(2, 2, 3, 8)
    choices = [value.float() if value.is_floating_point() else value for value in choices]
    with torch.no_grad():
        expected_TD = run_chosen(experts, *choices)
        with torch.autocast("cpu", torch.bfloat16):
            y_TD = run_chosen(experts, *choices)
    assert y_TD.dtype == torch.bfloat16
    assert_close(y_TD.float(), expected_TD, rtol=0.05, atol=0.02 * expected_TD.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["C", "torch"])
@pytest.mark.parametrize("index", [torch.int8, torch.int32, torch.int64], ids=str)
def test_indices_of_any_whole_dtype_and_strides_are_taken(dtype, index):
    experts = random_experts(4, 6, 5, "silu", True).to(dtype)
    x_TKD, _, _, weight_TK = random_choices(2, 2, 4, 6)
    expert_TK = torch.tensor([[0, 3, 2], [3, 1, 3]]).to(index)[:, ::2]
    with torch.no_grad():
        arguments = (x_TKD.to(dtype), expert_TK, None, weight_TK.to(dtype), weights_of(experts))
        assert_close(kernels.small_batch_ffn(*arguments), reference.small_batch_ffn(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["C", "torch"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"expert": torch.tensor([[0, 4]])}, IndexError, "contains 4: every index must lie between 0 and 3"),
        ({"expert": torch.tensor([[-1, 0]])}, IndexError, "contains -1: every index must lie between 0 and 3"),
        ({"expert": torch.tensor([[0.0, 1.0]])}, TypeError, "expert_TK has dtype torch.float32"),
        ({"weight": torch.ones(1, 3)}, ValueError, r"weight_TK has shape \(1, 3\): it must be"),
        ({"scale": torch.ones(2, 2)}, ValueError, r"scale_TK has shape \(2, 2\): it must be"),
        ({"x": torch.ones(1, 1, 5)}, ValueError, r"x_TKD has shape \(1, 1, 5\): it must be"),
        ({"x": torch.ones(1, 3, 6)}, ValueError, r"x_TKD has shape \(1, 3, 6\): it must be"),
    ],
)
def test_what_would_point_outside_is_refused(dtype, changes, error, message):
    values = {"x": torch.ones(1, 1, 6), "expert": torch.tensor([[0, 1]]), "scale": None, "weight": torch.ones(1, 2)}
    experts = weights_of(random_experts(4, 6, 5, "silu", True).to(dtype))
    cast = {
        name: value if value is None or name == "expert" else value.to(dtype)
        for name, value in (values | changes).items()
    }
    with torch.no_grad(), pytest.raises(error, match=message):
        kernels.small_batch_ffn(*cast.values(), experts)


def test_experts_whose_projections_do_not_fit_are_refused():
    up_EHD, down_EDF = torch.ones(4, 5, 6), torch.ones(4, 6, 5)
    arguments = (torch.ones(1, 1, 6), torch.tensor([[0, 1]]), None, torch.ones(1, 2))
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        kernels.small_batch_ffn(*arguments, kernels.ExpertWeights(up_EHD, down_EDF, "silu", True))  # not gated
