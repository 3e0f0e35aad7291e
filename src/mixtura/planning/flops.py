"""How many floating-point operations one token costs, routing and mixing counted.

A multiplication and its addition are two operations. Counted are the matrix products, as
`torch.utils.flop_counter` does: projections, attention scores, experts, routers, mixing and the output head. Norms,
activations, softmaxes, the embedding look-up and the blend of `layer_mix` are not: they grow with D, not with D * D.

Numbers are per token and may be fractions, since a group shares its mixtures.
"""

from mixtura.planning.parameters import attention_parameters, expert_parameters, router_parameters
from mixtura.planning.shapes import FeedForwardShape, ModelShape, attention_widths, feed_forward_shapes

BACKWARD = 2
"""A backward pass costs twice its forward pass: a gradient for the input and one for the weight of every product."""


def routing_flops(layer: FeedForwardShape) -> float:
    """Forward FLOPs a token in a group pays besides the experts: routers, dispatch and combine.

    2 D E for token choice and expert choice, which gather and scatter without products. A mixing layer pays 2 D E C
    three times, to score, to mix and to spread (llm-random's "FLOP-matched" counts none of the three), and once
    more for the second router of a separate combine.
    """
    if layer.family == "dense" or not layer.learned_router:
        return 0.0
    one_product = 2.0 * layer.hidden_size * layer.num_experts
    if layer.family in ("token_choice", "expert_choice"):
        return one_product
    separate = layer.family == "mixture_of_tokens" and layer.combine == "separate"
    return one_product * layer.mixtures_per_expert * (4 if separate else 3)


def layer_flops(layer: FeedForwardShape) -> float:
    """Forward FLOPs a token pays in one feed-forward layer: expert rows, shared experts, routing and mixing.

    A mean over training where mixture of tokens leaves a share of the groups empty: their tokens pay for the mixtures
    that run for them and for the routers, and nothing is mixed.
    """
    rows = layer.rows_per_token + layer.shared_experts
    grouped = 2 * rows * expert_parameters(layer) + routing_flops(layer)
    if not layer.alone_share:
        return grouped
    alone = 2 * layer.alone_rows_per_token * expert_parameters(layer) + 2 * router_parameters(layer)
    return (1 - layer.alone_share) * grouped + layer.alone_share * alone


def attention_flops(shape: ModelShape, *, sequence_length: int) -> float:
    """Forward FLOPs a token pays in one attention layer: the projections, scores and weighted values.

    Scores are counted for all pairs of positions, masked ones too, as kernels that do not skip them compute.
    """
    scores_and_values = 2 * 2.0 * sequence_length * attention_widths(shape)[0]
    return 2.0 * attention_parameters(shape) + scores_and_values


def head_flops(shape: ModelShape) -> float:
    """Forward FLOPs of the product with the output table: 2 D V."""
    return 2.0 * shape.hidden_size * shape.vocab_size


def flops_per_token(shape: ModelShape, *, sequence_length: int, backward: bool = True) -> float:
    """FLOPs one token costs in the whole model, in training or (backward=False) in a forward pass.

    Args:
        shape: Sizes of the model.
        sequence_length: Tokens of a sequence: attention scores and Soft MoE's slots depend on it.
        backward: Count the backward pass too. What activation checkpointing computes again is not counted.
    """
    layers = feed_forward_shapes(shape, sequence_length=sequence_length)
    forward = sum(attention_flops(shape, sequence_length=sequence_length) + layer_flops(layer) for layer in layers)
    forward += head_flops(shape)
    return forward * (1 + BACKWARD) if backward else forward
