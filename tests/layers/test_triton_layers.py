"""Layers give the same on Triton's kernels, run by its interpreter, as on torch's operators: output and gradients."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from mixtura import kernels
from mixtura.kernels import accelerator, dispatch
from mixtura.layers import ExpertChoiceMoE, MixtureOfTokens, TokenChoiceMoE

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="an accelerator is there: kernels compile"),
]
SIZES = {"intermediate_size": 8, "num_experts": 4, "activation": "silu", "gated": True}
LAYERS = {
    "token choice": lambda: TokenChoiceMoE(12, top_k=2, **SIZES),
    "token choice with a capacity": lambda: TokenChoiceMoE(12, top_k=2, capacity_factor=1.0, **SIZES),
    "expert choice": lambda: ExpertChoiceMoE(12, top_k=1, group_size=4, **SIZES),
    "mixture of tokens": lambda: MixtureOfTokens(12, group_size=4, mixtures_per_expert=2, **SIZES),
    "mixture of tokens, separate": lambda: MixtureOfTokens(12, group_size=4, combine="separate", **SIZES),
    "mixture of tokens over the sequence": lambda: MixtureOfTokens(12, group_size=3, group_over="sequence", **SIZES),
}


def passed(layer, x_BLD):
    """Output, load, and the gradients of the input and of every parameter."""
    x_BLD = x_BLD.clone().requires_grad_()
    y_BLD, stats = layer(x_BLD, return_stats=True)
    leaves = [x_BLD, *layer.parameters()]
    return [y_BLD, stats.tokens_per_expert_E, *torch.autograd.grad(y_BLD.square().sum(), leaves)]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_compute_the_same_on_either_path(make, monkeypatch):
    layer, x_BLD = make(), torch.randn(8, 3, 12)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    expected = passed(layer, x_BLD)
    ran = []
    for name in ("grouped_ffn", "logits_mixed_ffn"):
        kernel = getattr(accelerator, name)
        monkeypatch.setattr(
            accelerator, name, lambda *args, kernel=kernel, **more: ran.append(1) or kernel(*args, **more)
        )
    monkeypatch.setattr(kernels, "logits_mixed_ffn", accelerator.logits_mixed_ffn)
    monkeypatch.setattr(kernels, "can_run_groups", lambda x_OPGD: True)
    monkeypatch.setattr(dispatch, "can_sort_choices", lambda expert_TK: True)
    monkeypatch.setattr(accelerator, "can_run_rows", lambda *tensors: True)
    for actual, wanted in zip(passed(layer, x_BLD), expected, strict=True):
        assert_close(actual, wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))
    assert ran
