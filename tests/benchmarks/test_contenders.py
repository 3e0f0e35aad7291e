"""Kernels of other libraries that run nowhere but on a GPU, or in Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from mixtura.benchmarks.contenders import Size, own_layers, peers
from mixtura.benchmarks.measure import kept_bytes

SIZE = Size(tokens=64, hidden=32, experts=8, top_k=4)
interpreted = pytest.mark.skipif(
    find_spec("scattermoe") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="scattermoe (github.com/shawntan/scattermoe) and Triton's interpreter are not there",
)


def test_scattermoe_is_left_out_where_it_cannot_run():
    found, left_out = peers(SIZE)
    assert ("ScatterMoE" in found) != ("ScatterMoE" in left_out)


@interpreted
def test_scattermoe_computes_what_transformers_does():
    found, _ = peers(SIZE)
    theirs, expected = found["ScatterMoE"], found["transformers Mixtral, eager"]
    with torch.no_grad():
        gate_EFD, up_EFD = expected.experts.gate_up_proj.chunk(2, dim=1)
        theirs.router.weight.copy_(expected.gate.weight)
        theirs.experts.experts.weight.copy_(torch.cat([up_EFD, gate_EFD], dim=1))
        theirs.experts.output_experts.weight.copy_(expected.experts.down_proj)
    x_BLD = SIZE.inputs()
    assert_close(theirs(x_BLD), expected(x_BLD), rtol=1e-4, atol=1e-7)


@interpreted
def test_we_keep_half_of_what_scattermoe_keeps():
    kept = kept_bytes(own_layers(SIZE)["token choice"], SIZE.inputs())
    assert kept < 0.5 * kept_bytes(peers(SIZE)[0]["ScatterMoE"], SIZE.inputs())
