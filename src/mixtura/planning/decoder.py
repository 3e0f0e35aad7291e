"""The model of a recipe's arm as plain sizes, without the libraries that would build it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixtura.config import ArmConfig, Recipe
from mixtura.config.arm import model_settings
from mixtura.planning.formulas import match_intermediate_size
from mixtura.planning.shapes import feed_forward_shapes


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
