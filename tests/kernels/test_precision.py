"""Kernels follow autocast, which custom autograd functions would otherwise ignore."""

import torch

from mixtura.kernels.expert_weights import at_autocast_dtype


def test_tensors_take_autocasts_dtype_only_while_it_is_on():
    tensors = (torch.randn(2), torch.randn(2, dtype=torch.bfloat16))
    assert at_autocast_dtype(*tensors) == tensors
    with torch.autocast("cpu", torch.bfloat16):
        assert [tensor.dtype for tensor in at_autocast_dtype(*tensors)] == [torch.bfloat16] * 2
        with torch.autocast("cpu", enabled=False):
            assert at_autocast_dtype(*tensors) == tensors
