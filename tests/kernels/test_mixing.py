"""Mixing, spreading and the batched experts against their definitions, output and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mixtura import kernels
from mixtura.kernels import ExpertWeights, reference

N, G, E, C, D, F, T = 3, 4, 3, 2, 5, 2, 6
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def run(function, inputs, dtype, *options):
    """Output and gradients for a random upstream gradient, the same at every call on inputs of the same shapes."""
    copies = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    if options:  # the last two are the experts' weights, of that activation and kind
        copies_and_experts = [*copies[:-2], ExpertWeights(*copies[-2:], *options)]
    y = function(*(copies_and_experts if options else copies))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))
    return [y.detach().double()] + [copy.grad.double() for copy in copies]


def assert_same(name, inputs, *options):
    expected = run(getattr(reference, name), inputs, torch.float64, *options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for actual, value in zip(run(getattr(kernels, name), inputs, dtype, *options), expected, strict=True):
            assert_close(actual, value, rtol=0, atol=tolerance * max(1, value.abs().max().item()))


SIZES = st.integers(1, 4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=SIZES, g=SIZES, e=SIZES, c=SIZES, d=SIZES)
def test_mixing_and_spreading_equal_their_definitions(n, g, e, c, d):
    assert_same("mix", leaves((n, g, d), (n, g, e, c)))
    assert_same("spread", leaves((e, n * c, d), (n, g, e, c)))


@GATED
@ACTIVATIONS
@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=SIZES, g=SIZES, e=SIZES, c=SIZES, d=SIZES, f=SIZES)
def test_mixed_experts_equal_their_definition(activation, gated, n, g, e, c, d, f):
    weights = leaves((e, 2 * f if gated else f, d), (e, d, f))
    assert_same("mixed_ffn", [*leaves((n, g, d), (n, g, e, c), (n, g, e, c)), *weights], activation, gated)


@GATED
@ACTIVATIONS
@settings(max_examples=15, deadline=None, derandomize=True)
@given(e=SIZES, rows=SIZES, d=SIZES, f=SIZES)
def test_experts_equal_their_definitions(activation, gated, e, rows, d, f):
    weights = leaves((e, 2 * f if gated else f, d), (e, d, f))
    assert_same("batched_ffn", leaves((e, rows, d)) + weights, activation, gated)

    def reorder(function):
        return lambda x_TD, scale_TE, weight_TE, up_EHD, down_EDF, mean_ED=None: function(
            x_TD, scale_TE, weight_TE, mean_ED, ExpertWeights(up_EHD, down_EDF, activation, gated)
        )

    inputs = leaves((rows, d), (rows, e), (rows, e)) + weights
    for means in ([], leaves((e, d))):
        expected = run(reorder(reference.scaled_ffn), inputs + means, torch.float64)
        for actual, value in zip(
            run(reorder(kernels.scaled_ffn), inputs + means, torch.float64), expected, strict=True
        ):
            assert_close(actual, value, rtol=0, atol=1e-12 * max(1, value.abs().max().item()))


def test_mixing_and_spreading_pass_gradcheck():
    assert torch.autograd.gradcheck(kernels.mix, leaves((N, G, D), (N, G, E, C)))
    assert torch.autograd.gradcheck(kernels.spread, leaves((E, N * C, D), (N, G, E, C)))


@GATED
@ACTIVATIONS
def test_experts_pass_gradcheck(activation, gated):
    up_EHD, down_EDF = leaves((E, 2 * F if gated else F, D), (E, D, F))
    x_ERD, x_TD, scale_TE, weight_TE = leaves((E, 3, D), (T, D), (T, E), (T, E))
    assert torch.autograd.gradcheck(
        lambda x, up, down: kernels.batched_ffn(x, ExpertWeights(up, down, activation, gated)),
        (x_ERD, up_EHD, down_EDF),
    )
    assert torch.autograd.gradcheck(
        lambda x, scale, weight, up, down: kernels.scaled_ffn(
            x, scale, weight, None, ExpertWeights(up, down, activation, gated)
        ),
        (x_TD, scale_TE, weight_TE, up_EHD, down_EDF),
    )


def test_an_upstream_gradient_without_memory_of_its_own_is_taken():
    inputs = leaves((E, 4, D), (E, F, D), (E, D, F))
    kernels.batched_ffn(inputs[0], ExpertWeights(*inputs[1:], "relu", False)).sum().backward()
    gradients = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    reference.batched_ffn(inputs[0], ExpertWeights(*inputs[1:], "relu", False)).sum().backward()
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert_close(gradient, tensor.grad)


def test_weights_get_gradients_in_their_own_layout():
    x_ERD, up_EHD, down_EDF = leaves((E, 4, D), (E, F, D), (E, D, F))
    kernels.batched_ffn(x_ERD, ExpertWeights(up_EHD, down_EDF, "relu", False)).sum().backward()
    assert up_EHD.grad.is_contiguous() and down_EDF.grad.is_contiguous()


def test_autocast_computes_in_bfloat16_and_hands_back_float32_gradients():
    inputs = leaves((E, 4, 16), (E, 16, 16), (E, 16, 16), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y_ERD = kernels.batched_ffn(inputs[0], ExpertWeights(*inputs[1:], "relu", False))
    y_ERD.float().sum().backward()
    expected_ERD = reference.batched_ffn(inputs[0], ExpertWeights(*inputs[1:], "relu", False))
    assert y_ERD.dtype == torch.bfloat16
    assert_close(y_ERD.float(), expected_ERD, rtol=0.05, atol=0.02 * expected_ERD.abs().max().item())
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)
