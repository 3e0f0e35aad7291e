"""Which layer a configuration asks for at a given depth."""

from collections.abc import Callable

from mixtura.layers import DenseFFN, ExpertChoiceMoE, FeedForward, MixtureOfTokens, SoftMoE, TokenChoiceMoE
from mixtura.models.configuration_mixture import MixtureConfig


def build_feed_forward(config: MixtureConfig, layer_idx: int) -> FeedForward:
    """The feed-forward layer of decoder layer `layer_idx`."""
    families = config.mlp_layer_types or []
    if families[layer_idx] == "dense":
        return _dense(config, layer_idx)
    return _BUILDERS[families[layer_idx]](config)


def _shape(config: MixtureConfig) -> dict:
    return {
        "intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "activation": config.hidden_act,
        "gated": config.gated,
    }


def _dense(config: MixtureConfig, layer_idx: int) -> FeedForward:
    widths = config.intermediate_sizes
    return DenseFFN(
        config.hidden_size,
        intermediate_size=config.intermediate_size if widths is None else widths[layer_idx],
        activation=config.hidden_act,
        gated=config.gated,
    )


def _token_choice(config: MixtureConfig) -> FeedForward:
    return TokenChoiceMoE(
        config.hidden_size,
        **_shape(config),
        top_k=config.num_experts_per_tok,
        score_function=config.scoring_func,  # pyright: ignore[reportArgumentType]
        normalize_top_k=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
        capacity_factor=config.capacity_factor,
        expert_bias=config.expert_bias_update_rate > 0,
        num_shared_experts=config.num_shared_experts,
        learned_router=config.route_by == "token",
    )


def _expert_choice(config: MixtureConfig) -> FeedForward:
    return ExpertChoiceMoE(
        config.hidden_size,
        **_shape(config),
        top_k=config.num_experts_per_tok,
        group_size=config.group_size,
        group_over=config.group_over,  # pyright: ignore[reportArgumentType]
    )


def _soft(config: MixtureConfig) -> FeedForward:
    return SoftMoE(config.hidden_size, **_shape(config), num_slots=config.mixtures_per_expert)


def _mixture_of_tokens(config: MixtureConfig) -> FeedForward:
    return MixtureOfTokens(
        config.hidden_size,
        **_shape(config),
        group_size=config.group_size,
        mixtures_per_expert=config.mixtures_per_expert,
        group_over=config.group_over,  # pyright: ignore[reportArgumentType]
        temperature=config.temperature,
        combine=config.combine,  # pyright: ignore[reportArgumentType]
        inference_mode=config.inference_mode,  # pyright: ignore[reportArgumentType]
        alone_top_k=config.alone_top_k,
        zero_fill=config.zero_fill,
        population=config.population,
    )


_BUILDERS: dict[str, Callable[[MixtureConfig], FeedForward]] = {
    "token_choice": _token_choice,
    "expert_choice": _expert_choice,
    "soft": _soft,
    "mixture_of_tokens": _mixture_of_tokens,
}
