"""Expert widths that make a mixture cost what the dense layer costs, routing and mixing counted."""

import dataclasses

from mixtura.config import UserError
from mixtura.planning.formulas import flops_per_token, layer_flops
from mixtura.planning.shapes import FeedForwardShape, ModelShape

FLOPS_TOLERANCE = 0.01
"""Farther than this from the baseline's, an arm's FLOPs a token are not called equal to them."""


def match_intermediate_size(layer: FeedForwardShape, *, dense_intermediate_size: int, multiple_of: int = 4) -> int:
    """The width of one expert at which a token costs the FLOPs of the dense layer.

    Solves layer_flops(width) = layer_flops(dense) and rounds to the nearest multiple of `multiple_of` (16 bytes of
    float32, which GPU kernels want; of 16-bit numbers that is 8), at least one such multiple. `flops_ratio` says what
    the rounding left over. A mixture of tokens is matched as it runs in groups.

    Args:
        layer: the layer with any width.
        dense_intermediate_size: width of the dense layer.
        multiple_of: what the result is a multiple of.

    Raises:
        UserError: routing and mixing alone cost as much as the dense layer.
    """
    if layer.family == "dense":
        return dense_intermediate_size
    empty = dataclasses.replace(layer, intermediate_size=0, alone_share=0.0)
    budget = layer_flops(dataclasses.replace(empty, family="dense", intermediate_size=dense_intermediate_size))
    routing = layer_flops(empty)
    if routing >= budget:
        raise UserError(
            f"Routing and mixing of {layer.family} with {layer.num_experts} experts cost {routing:,.0f} FLOPs a token, "
            f"but a dense layer of width {dense_intermediate_size} costs only {budget:,.0f}: "
            f"use fewer experts or raise 'model.intermediate_size'."
        )
    # FLOPs are linear in the width.
    per_unit = layer_flops(dataclasses.replace(empty, intermediate_size=1)) - routing
    return max(1, round((budget - routing) / per_unit / multiple_of)) * multiple_of


def flops_ratio(shape: ModelShape, *, baseline: ModelShape, sequence_length: int) -> float:
    """Training FLOPs a token of a model relative to its baseline's: 1.0 is a perfect match."""
    own = flops_per_token(shape, sequence_length=sequence_length)
    return own / flops_per_token(baseline, sequence_length=sequence_length)
