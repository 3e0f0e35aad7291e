"""Activations and their hand-written derivatives."""

import math

import pytest
import torch
from torch.testing import assert_close

from mixtura.kernels.expert_weights import activate, activate_backward, check_activation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relu", 1.5),
        ("gelu", 1.5 * 0.5 * (1 + math.erf(1.5 / math.sqrt(2)))),
        ("gelu_tanh", 0.75 * (1 + math.tanh(math.sqrt(2 / math.pi) * (1.5 + 0.044715 * 1.5**3)))),
        ("silu", 1.5 / (1 + math.exp(-1.5))),
    ],
)
def test_values_by_hand(name, value):
    assert_close(activate(torch.tensor([[1.5]]), name, gated=False).item(), value, rtol=1e-6, atol=0)
    assert_close(activate(torch.tensor([[1.5, -2.0]]), name, gated=True).item(), -2 * value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_derivatives_equal_autograds(name, gated):
    u_RH = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    h_RF = activate(u_RH, name, gated)
    grad_RF = torch.randn_like(h_RF)
    h_RF.backward(grad_RF)
    assert_close(activate_backward(grad_RF, u_RH.detach(), name, gated), u_RH.grad, rtol=0, atol=1e-12)


def test_an_unknown_name_lists_the_known_ones():
    check_activation("silu")
    with pytest.raises(ValueError, match="activation is 'Silu': it must be one of relu, gelu, gelu_tanh, silu"):
        check_activation("Silu")
