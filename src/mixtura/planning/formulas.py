"""What a model costs: its parameters, the FLOPs of a token, and the bytes that training keeps.

The decoder is Llama's: root-mean-square norms, attention without biases, rotary positions without parameters.

A multiplication and its addition are two floating-point operations. Counted are the matrix products, as
`torch.utils.flop_counter` does: projections, attention scores, experts, routers, mixing and the output head. Norms,
activations, softmaxes, the embedding look-up and the blend of `layer_mix` are not: they grow with D, not with D * D.
FLOPs are per token and may be fractions, since a group shares its mixtures.

Formulas follow from how a family routes (`mixtura.config.families`), not from which family it is. They also give the
expert width at which a mixture costs what the dense layer costs, routing and mixing counted. `shape_of_arm` has the
sizes of a recipe's arm without the libraries that would build its model.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mixtura.config import ArmConfig, Recipe, UserError
from mixtura.config.arm import model_settings
from mixtura.config.families import facts_of
from mixtura.planning.shapes import FeedForwardShape, ModelShape, attention_widths, feed_forward_shapes

BACKWARD = 2
"""A backward pass costs twice its forward pass: a gradient for the input and one for the weight of every product."""

_BYTES = {"float32": 4, "bfloat16": 2}


def expert_parameters(layer: FeedForwardShape) -> int:
    """Parameters of one expert: 2 D F, or 3 D F when gated; for a dense layer, all of it.

    With a latent space D is that of the space.
    """
    return layer.num_projections * (layer.latent_size or layer.hidden_size) * layer.intermediate_size


def shared_parameters(layer: FeedForwardShape) -> int:
    """Parameters that every token passes through besides routed experts and routers.

    Shared experts, which work on hidden states, and the two projections of a latent space.
    """
    shared = layer.num_projections * layer.hidden_size * layer.intermediate_size * layer.shared_experts
    return shared + 2 * layer.hidden_size * (layer.latent_size or 0)


def router_parameters(layer: FeedForwardShape) -> int:
    """Parameters of a layer's routers.

    A column an expert (token choice, expert choice) or a mixture (mixture of tokens, twice with a separate combine);
    Soft MoE has a vector a slot and one scale (arXiv 2308.00951, section 2.3). A selection bias is no parameter.
    Where an example's language names its expert there is no router. A constant expert adds its vector and a router of
    two columns.
    """
    each = layer.hidden_size * layer.router_columns + facts_of(layer.family).router_scalars
    return layer.routers * each + 3 * layer.hidden_size * layer.constant_experts


def layer_parameters(layer: FeedForwardShape) -> int:
    """Parameters of one feed-forward layer: routed and shared experts, and routers."""
    experts = 1 if layer.family == "dense" else layer.num_experts
    return experts * expert_parameters(layer) + shared_parameters(layer) + router_parameters(layer)


def active_layer_parameters(layer: FeedForwardShape, *, deployed: bool = False) -> int:
    """Parameters that one token passes through: its rows' worth of experts, shared experts and routers.

    For token choice these are the top_k experts of a token. A mixing layer runs all its experts on every group, and one
    token pays for E * C / G of them; where it is `deployed` without groups, for those of the mixtures that run alone.
    """
    rows = layer.rows_per_token
    if facts_of(layer.family).routing == "merging":
        rows = 1.0  # the merged one, also where a last segment that is not full makes a token's share of it dearer
    elif deployed and facts_of(layer.family).serving == "token by token":
        rows = min(layer.alone_rows_per_token, layer.num_experts)  # mixtures of one expert share its weights
    return round(rows * expert_parameters(layer) + shared_parameters(layer)) + router_parameters(layer)


def attention_parameters(shape: ModelShape) -> int:
    """Parameters of one attention layer: query, key, value and output projections."""
    query, key_value = attention_widths(shape)
    return shape.hidden_size * (2 * query + 2 * key_value)


def model_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model; a table shared by embedding and head counts once."""
    layers = feed_forward_shapes(shape, sequence_length=1)
    return _without_feed_forward(shape) + sum(layer_parameters(layer) for layer in layers)


def active_parameters(shape: ModelShape, *, sequence_length: int, deployed: bool = False) -> int:
    """Parameters one token passes through: the whole model with `active_layer_parameters` for its mixtures.

    Args:
        shape: Sizes of the model.
        sequence_length: Tokens of a sequence, over which Soft MoE spreads its slots; other families do not look at it.
        deployed: Whether mixture of tokens answers token by token, and not in groups as it trains.
    """
    layers = feed_forward_shapes(shape, sequence_length=sequence_length)
    return _without_feed_forward(shape) + sum(active_layer_parameters(layer, deployed=deployed) for layer in layers)


def _without_feed_forward(shape: ModelShape) -> int:
    num_layers = shape.num_hidden_layers
    tables = 1 if shape.tie_word_embeddings else 2
    norms = (2 * num_layers + 1) * shape.hidden_size
    # A weight for the embeddings and for each layer, and one scale.
    layer_mix = num_layers + 2 if shape.layer_mix else 0
    embeddings = tables * shape.vocab_size * shape.hidden_size
    return embeddings + num_layers * attention_parameters(shape) + norms + layer_mix


def routing_flops(layer: FeedForwardShape) -> float:
    """Forward FLOPs a token in a group pays besides the experts: routers, dispatch and combine.

    2 D E for token choice and expert choice, which gather and scatter without products. A mixing layer pays 2 D E C
    three times, to score, to mix and to spread (llm-random's "FLOP-matched" counts none of the three), and once
    more for the second router of a separate combine. Constant experts pay 6 D each: a router of two columns, a vector.
    """
    if not layer.routers:
        return 0.0
    if facts_of(layer.family).routing == "merging":  # once a segment, the merging of all experts besides the router
        merged = layer.num_experts * (expert_parameters(layer) + layer.hidden_size)
        return 2.0 * merged * layer.segments_per_token
    moved = 2 if facts_of(layer.family).routing == "mixing" else 0
    columns = layer.router_columns * (layer.routers + moved) + 3 * layer.constant_experts
    return 2.0 * layer.hidden_size * columns


def layer_flops(layer: FeedForwardShape) -> float:
    """Forward FLOPs a token pays in one feed-forward layer: expert rows, shared experts, routing and mixing.

    A mean over training where mixture of tokens leaves a share of the groups empty: their tokens pay for the mixtures
    that run for them and for the routers, and nothing is mixed.
    """
    rows, shared = layer.trained_rows_per_token, 2 * shared_parameters(layer)
    grouped = 2 * rows * expert_parameters(layer) + shared + routing_flops(layer)
    if not layer.alone_share:
        return grouped
    alone = 2 * layer.alone_rows_per_token * expert_parameters(layer) + shared + 2 * router_parameters(layer)
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


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes that training keeps from one step to the next, by kind.

    What a step allocates on the way (activations, temporaries) depends on kernels and checkpointing; it is measured by
    `mixtura.diagnostics.health`, not guessed here.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.parameters + self.gradients + self.optimizer


def state_memory(
    shape: ModelShape,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> StateMemory:
    """Bytes of parameters, gradients and the optimizer's moments, all stored as `dtype`.

    AdamW has two moments, Muon one of every matrix that it moves. Training under bfloat16 autocast stores float32.
    AdamW's step counters (4 bytes a tensor) and buffers such as rotary frequencies are left out.
    """
    count, size = model_parameters(shape), _BYTES[dtype]
    by_muon = muon_parameters(shape) if optimizer == "muon" else 0
    return StateMemory(parameters=count * size, gradients=count * size, optimizer=(2 * count - by_muon) * size)


def muon_parameters(shape: ModelShape) -> int:
    """Parameters that Muon moves: the matrices inside the layers but the routers."""
    layers = feed_forward_shapes(shape, sequence_length=1)
    matrices = sum(layer_parameters(layer) - router_parameters(layer) for layer in layers)
    return matrices + shape.num_hidden_layers * attention_parameters(shape)


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
    dense = dataclasses.replace(empty, family="dense", intermediate_size=dense_intermediate_size, latent_size=None)
    budget = layer_flops(dense)
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


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A `ModelShape` that is nothing else; the defaults are a dense decoder's."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    moe_intermediate_size: int = 0
    intermediate_sizes: tuple[int, ...] | None = None
    mlp_layer_types: tuple[str, ...] | None = None
    gated: bool = True
    hidden_act: str = "silu"
    num_experts: int = 1
    num_experts_per_tok: int = 1
    num_shared_experts: int = 0
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    free_expert_balance: float = 0.75
    latent_size: int | None = None
    segment_length: int = 16
    dense_router_gradient: bool = False
    route_by: str = "token"
    group_size: int = 1
    mixtures_per_expert: int = 1
    combine: str = "same"
    alone_top_k: int | None = None
    zero_fill: float = 0.0
    alone_fraction: float = 0.0
    transition_fraction: float = 0.0
    layer_mix: bool = False
    tie_word_embeddings: bool = True


def layer_families(num_layers: int, arm: ArmConfig) -> list[str]:
    """The family of every layer: the arm's in all layers, or in the later half with dense layers before it."""
    first = num_layers // 2 if arm.placement == "later_half" else 0
    return ["dense"] * first + [arm.family] * (num_layers - first)


def shape_of_arm(recipe: Recipe, arm: ArmConfig) -> DecoderShape:
    """The sizes of the model that an arm of a recipe from random weights trains.

    An arm that names no expert width gets the one at which a token costs the FLOPs of the dense arm. The vocabulary is
    the recipe's; a tokenizer may end up with a few tokens less.

    Raises:
        UserError: routing alone costs more than the dense layer.
    """
    model, known = recipe.model, DecoderShape.__dataclass_fields__
    own: Any = {field: getattr(arm, setting.name) for setting, field in model_settings() if field in known}
    own["moe_intermediate_size"] = arm.moe_intermediate_size or model.intermediate_size
    shape = DecoderShape(
        vocab_size=recipe.data.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        intermediate_size=model.intermediate_size,
        mlp_layer_types=tuple(layer_families(model.num_hidden_layers, arm)),
        gated=model.gated,
        hidden_act=model.activation,
        tie_word_embeddings=model.tie_word_embeddings,
        **own,
    )
    if arm.moe_intermediate_size is not None or arm.family == "dense":
        return shape
    last = feed_forward_shapes(shape, sequence_length=recipe.data.sequence_length)[-1]
    width = match_intermediate_size(
        last, dense_intermediate_size=model.intermediate_size, multiple_of=recipe.training.width_multiple
    )
    return dataclasses.replace(shape, moe_intermediate_size=width)
