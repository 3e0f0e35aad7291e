"""From a recipe to a model configuration."""

from mixtura.config import ArmConfig, ModelConfig
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.planning.matching import match_intermediate_size


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

    An arm that names no expert width gets the one at which it costs the dense arm's FLOPs a token, routing and mixing
    counted, rounded to a multiple of `width_multiple`. `expert_names` are the languages or pairs of the experts that
    they name.

    Raises:
        UserError: routing alone costs more than the dense layer.
    """
    return MixtureConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        hidden_size=recipe_model.hidden_size,
        intermediate_size=recipe_model.intermediate_size,
        moe_intermediate_size=_expert_width(recipe_model, arm, max_position_embeddings, width_multiple),
        num_hidden_layers=recipe_model.num_hidden_layers,
        num_attention_heads=recipe_model.num_attention_heads,
        num_key_value_heads=recipe_model.num_key_value_heads,
        hidden_act=recipe_model.activation,
        gated=recipe_model.gated,
        tie_word_embeddings=recipe_model.tie_word_embeddings,
        initializer_range=recipe_model.initializer_range,
        mlp_layer_types=layer_families(recipe_model.num_hidden_layers, arm),
        num_experts=arm.num_experts,
        num_experts_per_tok=arm.top_k,
        scoring_func=arm.score_function,
        norm_topk_prob=arm.normalize_top_k,
        capacity_factor=arm.capacity_factor,
        router_aux_loss_coef=arm.router_aux_loss_coef,
        router_z_loss_coef=arm.router_z_loss_coef,
        balance_over=arm.balance_over,
        expert_bias_update_rate=arm.expert_bias_update_rate,
        num_shared_experts=arm.num_shared_experts,
        route_by=arm.route_by,
        expert_names=expert_names,
        group_size=arm.group_size,
        group_over=arm.group_over,
        mixtures_per_expert=arm.mixtures_per_expert,
        temperature=arm.temperature,
        combine=arm.combine,
        inference_mode=arm.inference_mode,
        alone_top_k=arm.alone_top_k,
        zero_fill=arm.zero_fill,
        zero_fill_unit=arm.zero_fill_unit,
        alone_fraction=arm.alone_fraction,
        transition_to=arm.transition_to,
        transition_fraction=arm.transition_fraction,
        population=arm.population_rate > 0,
        population_rate=arm.population_rate,
    )


def layer_families(num_layers: int, arm: ArmConfig) -> list[str]:
    """The family of every layer: the arm's in all layers or in the later half, dense before."""
    first = num_layers // 2 if arm.placement == "later_half" else 0
    return ["dense"] * first + [arm.family] * (num_layers - first)


def _expert_width(model: ModelConfig, arm: ArmConfig, sequence_length: int, multiple_of: int) -> int:
    if arm.moe_intermediate_size is not None:
        return arm.moe_intermediate_size
    if arm.family == "dense":
        return model.intermediate_size
    return match_intermediate_size(
        arm.family,
        hidden_size=model.hidden_size,
        dense_intermediate_size=model.intermediate_size,
        gated=model.gated,
        num_experts=arm.num_experts,
        top_k=arm.top_k,
        num_shared_experts=arm.num_shared_experts,
        group_size=arm.group_size,
        mixtures_per_expert=arm.mixtures_per_expert,
        combine=arm.combine,
        sequence_length=sequence_length,
        learned_router=arm.route_by == "token",
        multiple_of=multiple_of,
    )
