"""The dense layer by hand, and its parameters."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import DenseFFN


def test_two_tokens_by_hand():
    layer = DenseFFN(2, intermediate_size=2)
    layer.load_state_dict({"up_proj.weight": torch.eye(2), "down_proj.weight": torch.tensor([[1.0, 1.0], [0.0, 2.0]])})
    y_BLD = layer(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))
    assert_close(y_BLD, torch.tensor([[[3.0, 4.0], [3.0, 0.0]]]))


def test_a_gated_token_by_hand():
    layer = DenseFFN(2, intermediate_size=1, gated=True)
    layer.load_state_dict(
        {
            "gate_proj.weight": torch.tensor([[1.0, 1.0]]),
            "up_proj.weight": torch.tensor([[2.0, 0.0]]),
            "down_proj.weight": torch.tensor([[1.0], [-1.0]]),
        }
    )
    assert_close(layer(torch.tensor([[[1.0, 2.0], [-4.0, 1.0]]])), torch.tensor([[[6.0, -6.0], [0.0, 0.0]]]))


def test_nothing_is_routed_so_there_are_no_statistics():
    y_BLD, stats = DenseFFN(4, intermediate_size=8)(torch.randn(2, 3, 4), return_stats=True)
    assert y_BLD.shape == (2, 3, 4) and stats is None


def test_parameters_are_named_as_in_llama():
    shapes = {name: tuple(p.shape) for name, p in DenseFFN(4, intermediate_size=8, gated=True).named_parameters()}
    assert shapes == {"gate_proj.weight": (8, 4), "up_proj.weight": (8, 4), "down_proj.weight": (4, 8)}


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation is 'tanh': it must be one of relu, gelu, gelu_tanh, silu"):
        DenseFFN(4, intermediate_size=8, activation="tanh")
