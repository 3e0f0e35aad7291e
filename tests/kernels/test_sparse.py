"""Sparse experts against their definition: output and gradients, on every path that runs them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mixtura.kernels import ExpertWeights, reference, sparse_ffn
from mixtura.kernels.sparse import _grouped, _grouped_mm_runs

ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def random_inputs(counts, *, tokens=6, hidden_size=4, width=4, gated=False, dtype=torch.float64):
    """Inputs of `sparse_ffn` in which expert e has counts[e] different tokens."""
    rows_per_token = 2 * width if gated else width
    token_R = torch.cat([torch.randperm(tokens)[:count].sort().values for count in counts])
    floats = [
        torch.randn(tokens, hidden_size, dtype=dtype),
        torch.rand(len(token_R), dtype=dtype) + 0.1,
        torch.randn(len(counts), rows_per_token, hidden_size, dtype=dtype),
        torch.randn(len(counts), hidden_size, width, dtype=dtype),
    ]
    x_TD, weight_R, up_EHD, down_EDF = (tensor.requires_grad_() for tensor in floats)
    return x_TD, token_R, weight_R, torch.tensor(counts), up_EHD, down_EDF


def assert_same(function, inputs, activation, gated, *, tolerance, cotangent=None):
    """Output and all gradients of `function` against those of the definition in float64."""
    results = []
    for run, dtype in ((function, None), (reference.sparse_ffn, torch.float64)):
        copies = [t.detach().to(dtype or t.dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
        y_TD = run(*copies[:-2], ExpertWeights(*copies[-2:], activation, gated))
        (y_TD if cotangent is None else y_TD * cotangent.to(y_TD.dtype)).sum().backward()
        results.append([y_TD] + [t.grad for t in copies if t.is_floating_point()])
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_loop_over_experts_equals_the_definition(counts, activation, gated, dtype):
    inputs = random_inputs(counts, gated=gated, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_same(sparse_ffn, inputs, activation, gated, tolerance=tolerance, cotangent=torch.randn(6, 4))


@pytest.mark.parametrize(
    "counts", [[6], [0, 0, 6], [6, 0, 0], [1, 0, 6, 0, 1], [2, 2, 2]], ids=lambda counts: "-".join(map(str, counts))
)
@GATED
def test_empty_and_skewed_experts_pass_gradcheck(counts, gated):
    x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF = random_inputs(counts, gated=gated, hidden_size=3, width=2)

    def function(x_TD, weight_R, up_EHD, down_EDF):
        return sparse_ffn(x_TD, token_R, weight_R, counts_E, ExpertWeights(up_EHD, down_EDF, "silu", gated))

    assert torch.autograd.gradcheck(function, (x_TD, weight_R, up_EHD, down_EDF))


@ACTIVATIONS
def test_every_activation_passes_gradcheck(activation):
    x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF = random_inputs([3, 2], hidden_size=3, width=2)

    def function(x_TD, weight_R, up_EHD, down_EDF):
        return sparse_ffn(x_TD, token_R, weight_R, counts_E, ExpertWeights(up_EHD, down_EDF, activation, False))

    assert torch.autograd.gradcheck(function, (x_TD, weight_R, up_EHD, down_EDF))


@GATED
def test_an_upstream_gradient_without_memory_of_its_own_is_taken(gated):
    inputs = random_inputs([2, 3], gated=gated)
    assert_same(sparse_ffn, inputs, "relu", gated, tolerance=1e-10)  # y.sum().backward(): strides of zero


def test_an_expert_without_rows_gets_a_gradient_of_zeros():
    *inputs, up_EHD, down_EDF = random_inputs([2, 0, 3])
    sparse_ffn(*inputs, ExpertWeights(up_EHD, down_EDF, "relu", False)).square().sum().backward()
    assert (up_EHD.grad[1] == 0).all() and (down_EDF.grad[1] == 0).all()
    assert (down_EDF.grad[0] != 0).any() and (down_EDF.grad[2] != 0).any()


def test_non_contiguous_inputs_give_the_same():
    x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF = random_inputs([2, 0, 3])
    turned = [t.detach().transpose(-2, -1).contiguous().transpose(-2, -1).requires_grad_() for t in (x_TD, up_EHD)]
    assert not turned[0].is_contiguous()
    inputs = (turned[0], token_R, weight_R, counts_E, turned[1], down_EDF)
    assert_same(sparse_ffn, inputs, "gelu", False, tolerance=1e-10, cotangent=torch.randn(4, 6).T)


@GATED
def test_grouped_gemm_equals_the_definition(gated):
    inputs = random_inputs([2, 0, 6, 1], hidden_size=8, width=4, gated=gated, dtype=torch.float32)
    assert_same(_grouped, inputs, "silu", gated, tolerance=1e-5, cotangent=torch.randn(6, 8))


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "width", "takes"),
    [
        pytest.param(torch.bfloat16, 16, 8, True, id="aligned"),
        pytest.param(torch.bfloat16, 12, 8, False, id="hidden size not aligned"),
        pytest.param(torch.bfloat16, 16, 6, False, id="width not aligned"),
        pytest.param(torch.float32, 16, 8, False, id="float32 keeps its precision"),
        pytest.param(torch.float64, 16, 8, False, id="float64 has no kernel"),
    ],
)
def test_grouped_gemm_is_used_only_where_it_can_run(dtype, hidden_size, width, takes):
    x_TD, _, _, _, up_EHD, down_EDF = random_inputs([2, 3], hidden_size=hidden_size, width=width, dtype=dtype)
    assert _grouped_mm_runs(x_TD, ExpertWeights(up_EHD, down_EDF, "relu", False)) is takes


@GATED
@ACTIVATIONS
def test_operators_for_the_compiler_are_well_formed(activation, gated):
    inputs = random_inputs([2, 0, 3], gated=gated)
    torch.library.opcheck(torch.ops.mixtura.sparse_ffn, (*inputs, activation, gated))
    x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF = (tensor.detach() for tensor in inputs)
    y_TD, u_RH = torch.ops.mixtura.sparse_ffn(x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF, activation, gated)
    backward = (torch.randn_like(y_TD), x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF, u_RH, activation, gated)
    torch.library.opcheck(torch.ops.mixtura.sparse_ffn_backward, backward)


@GATED
def test_compiled_equals_the_definition(gated):
    compiled = torch.compile(sparse_ffn, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = random_inputs([2, 0, 3], gated=gated)
    assert_same(compiled, inputs, "silu", gated, tolerance=1e-10, cotangent=torch.randn(6, 4))


def test_autocast_computes_in_bfloat16_and_hands_back_float32_gradients():
    inputs = random_inputs([3, 4, 6], hidden_size=16, width=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = sparse_ffn(*inputs[:-2], ExpertWeights(*inputs[-2:], "relu", False))
    y_TD.float().square().sum().backward()
    assert y_TD.dtype == torch.bfloat16
    expected_TD = reference.sparse_ffn(*inputs[:-2], ExpertWeights(*inputs[-2:], "relu", False))
    assert_close(y_TD.float(), expected_TD, rtol=0.05, atol=0.02 * expected_TD.abs().max().item())
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs if tensor.is_floating_point())


@pytest.mark.gpu
@GATED
@pytest.mark.parametrize("hidden_size", [16, 12], ids=["grouped GEMM", "loop"])
def test_accelerator_equals_the_definition(hidden_size, gated, device):
    inputs = random_inputs([6, 0, 3, 1], hidden_size=hidden_size, width=16, gated=gated, dtype=torch.bfloat16)
    inputs = [tensor.detach().to(device) for tensor in inputs]
    assert_same(sparse_ffn, inputs, "silu", gated, tolerance=0.02, cotangent=torch.randn(6, hidden_size, device=device))
