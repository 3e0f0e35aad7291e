"""From a recipe to a model configuration, from that to the layers, and how wide their weights are drawn."""

import copy
import pkgutil
from typing import Any

from torch import Tensor, nn
from transformers import initialization as init

from mixtura.config import ArmConfig, ModelConfig
from mixtura.config.arm import model_settings
from mixtura.config.families import facts_of
from mixtura.config.initialization import INITIALIZER_RANGE, start_scales
from mixtura.layers import Experts, FeedForward
from mixtura.layers.experts import LatentProjection
from mixtura.layers.feed_forward import Projection
from mixtura.layers.routing import FreeExperts, Router
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.planning.formulas import layer_families, match_intermediate_size
from mixtura.planning.shapes import feed_forward_shapes


def build_model_config(
    recipe_model: ModelConfig,
    arm: ArmConfig,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    expert_names: list[str] | None = None,
    width_multiple: int = 4,
) -> MixtureConfig:
    """The configuration of one arm: the recipe's decoder with the arm's feed-forward layers.

    An arm that names no expert width gets the one at which it costs as many FLOPs a token as the dense arm, routing and
    mixing counted, rounded to a multiple of `width_multiple`. `expert_names` are the languages or language pairs that
    have an expert each, where those choose the expert.

    Raises:
        UserError: routing alone costs more than the dense layer.
    """
    own = {field: getattr(arm, setting.name) for setting, field in model_settings()}
    own |= start_scales(arm, recipe_model)
    config = MixtureConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        hidden_size=recipe_model.hidden_size,
        intermediate_size=recipe_model.intermediate_size,
        num_hidden_layers=recipe_model.num_hidden_layers,
        num_attention_heads=recipe_model.num_attention_heads,
        num_key_value_heads=recipe_model.num_key_value_heads,
        hidden_act=recipe_model.activation,
        gated=recipe_model.gated,
        tie_word_embeddings=recipe_model.tie_word_embeddings,
        initializer_range=recipe_model.initializer_range or INITIALIZER_RANGE,
        mlp_layer_types=layer_families(recipe_model.num_hidden_layers, arm),
        expert_names=expert_names,
        population=arm.population_rate > 0,
        **(own | {"moe_intermediate_size": arm.moe_intermediate_size or recipe_model.intermediate_size}),
    )
    if arm.moe_intermediate_size is None:
        last = feed_forward_shapes(config, sequence_length=max_position_embeddings)[-1]
        config.moe_intermediate_size = match_intermediate_size(
            last, dense_intermediate_size=recipe_model.intermediate_size, multiple_of=width_multiple
        )
    return config


def shared_width_config(config: MixtureConfig) -> MixtureConfig:
    """Of a model with shared experts the dense one that is left without the routed experts and their routers."""
    families = config.mlp_layer_types or []
    shared = config.num_shared_experts * config.moe_intermediate_size
    changed = copy.deepcopy(config)
    changed.intermediate_sizes = [config.intermediate_size if family == "dense" else shared for family in families]
    changed.mlp_layer_types = ["dense"] * len(families)
    changed.control = "shared_width"
    return changed


def build_feed_forward(config: MixtureConfig, layer_idx: int) -> FeedForward:
    """The feed-forward layer of decoder layer `layer_idx`, given the settings that the table has for its family."""
    family = (config.mlp_layer_types or [])[layer_idx]
    layer_class = pkgutil.resolve_name(facts_of(family).layer)
    layer = layer_class(config.hidden_size, **_arguments(config, family, layer_idx))
    for module in layer.modules() if config.control is not None else ():
        if isinstance(module, Router):
            module.fix()
    return layer


def _arguments(config: MixtureConfig, family: str, layer_idx: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"activation": config.hidden_act, "gated": config.gated}
    if family == "dense":
        widths = config.intermediate_sizes
        arguments["intermediate_size"] = config.intermediate_size if widths is None else widths[layer_idx]
    for setting, field in model_settings(family):
        argument = setting.argument(family)
        if argument is not None:
            arguments[argument] = setting.to_layer(getattr(config, field))
    return arguments | {name: getattr(config, name) for name in facts_of(family).model_settings}


def draw_at_scale(config: MixtureConfig, module: nn.Module) -> bool:
    """Draws the weights of a feed-forward projection, of experts or of a router; whether the module is one of these."""
    if isinstance(module, FreeExperts) and module.constant is not None:
        init.normal_(module.constant, mean=0.0, std=config.initializer_range)
    if not isinstance(module, Projection | Router | Experts | LatentProjection):
        return False
    for weight, std in _deviations(config, module):
        init.normal_(weight, mean=0.0, std=std)
    return True


def _deviations(
    config: MixtureConfig, module: Projection | Router | Experts | LatentProjection
) -> list[tuple[Tensor, float]]:
    """The weights of a module of the feed-forward layers, each with the standard deviation it is drawn at."""
    if isinstance(module, Router):
        return [(module.weight, config.start_deviation(module.in_features, of="router_scale"))]
    if isinstance(module, LatentProjection):  # linear, so that it should neither shrink nor enlarge
        named = config.dense_scale is None
        return [(module.weight, config.initializer_range if named else module.in_features**-0.5)]
    if isinstance(module, Projection):
        std = config.start_deviation(module.in_features, of="dense_scale", down=module.down)
        return [(module.weight, std)]
    up, down = module.weights
    return [
        (up, config.start_deviation(module.input_size, of="expert_scale")),
        (down, config.start_deviation(module.intermediate_size, of="expert_scale", down=True)),
    ]
