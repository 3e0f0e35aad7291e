"""Merged experts: decoding in pieces, beams, and what is refused. Formulas are in test_against_papers."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import MergedExperts


def build(**settings):
    layer = MergedExperts(6, intermediate_size=5, num_experts=3, num_shared_experts=1, **settings).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("merge_by", ["segment", "prefix"])
@pytest.mark.parametrize("pieces", [[1] * 11, [5, 1, 5], [2, 9], [8, 3], [4, 4, 3]], ids=str)
def test_tokens_in_pieces_come_out_as_in_one_pass(merge_by, pieces):
    layer, x_BLD = build(segment_length=4, merge_by=merge_by), torch.randn(3, 11, 6, dtype=torch.float64)
    mask_BL = torch.ones(3, 11, dtype=torch.bool)
    mask_BL[1, :3] = mask_BL[2, :7] = False
    memory, parts = None, []
    for part_BLD, part_BL in zip(x_BLD.split(pieces, 1), mask_BL.split(pieces, 1), strict=True):
        y_BLD, _, memory = layer.go_on(part_BLD, part_BL, False, memory)
        parts.append(y_BLD)
    assert_close(torch.cat(parts, 1)[mask_BL], layer(x_BLD, mask_BL)[mask_BL], rtol=1e-12, atol=1e-12)


def test_the_first_segment_runs_the_plain_average():
    layer, x_BLD = build(segment_length=4), torch.randn(1, 4, 6, dtype=torch.float64)
    other = build(segment_length=4)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            stack = getattr(other.experts, name)
            stack.copy_(stack.mean(0, keepdim=True).expand_as(stack).clone())
    assert_close(other(x_BLD), layer(x_BLD))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_length": 0}, "segment_length is 0: it must be at least 1"),
        ({"merge_by": "all"}, "merge_by is 'all': it must be segment or prefix"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
