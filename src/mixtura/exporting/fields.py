"""The configuration of every container, from ours."""

from typing import Any

from transformers import (
    Glm4MoeConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mixtura.exporting.traits import Traits
from mixtura.models import MixtureConfig

PLACEHOLDER_WIDTH = 32
"""Width of a shared expert that adds nothing, where an engine insists on one: a block of most quantised formats."""

_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "dtype",
)


def _common(config: MixtureConfig, architecture: str) -> dict[str, Any]:
    """What all architectures have, under the same names."""
    shared = {name: getattr(config, name) for name in _COMMON}
    return {**shared, "rope_parameters": dict(config.rope_parameters or {}), "architectures": [architecture]}


def _head_dim(config: MixtureConfig) -> dict[str, Any]:
    """Not every class declares the field, but all layers read it."""
    return {"head_dim": config.head_dim}


def _dense_width(config: MixtureConfig) -> int:
    """The width of the dense layers; all are equally wide."""
    families = config.mlp_layer_types or []
    widths = config.intermediate_sizes or [config.intermediate_size] * len(families)
    return next((width for width, family in zip(widths, families, strict=True) if family == "dense"), widths[0])


def _window(config: MixtureConfig, traits: Traits) -> int | None:
    return getattr(config, "sliding_window", None) if traits.window else None


def _qwen_window(config: MixtureConfig, traits: Traits) -> dict[str, Any]:
    if not traits.window:
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": getattr(config, "sliding_window", None),
        "layer_types": list(getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers),
    }


def _dense_depths(config: MixtureConfig) -> list[int]:
    return [depth for depth, family in enumerate(config.mlp_layer_types or []) if family == "dense"]


def _experts(config: MixtureConfig, count: str = "num_experts") -> dict[str, Any]:
    return {
        count: config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def llama(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Dense, with biases on all projections of the attention or on none."""
    return LlamaConfig(
        **_common(config, "LlamaForCausalLM"),
        intermediate_size=_dense_width(config),
        **_head_dim(config),
        attention_bias=traits.biases == "qkvo",
    )


def mistral(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Dense, with a window in every layer or in none."""
    return MistralConfig(
        **_common(config, "MistralForCausalLM"),
        intermediate_size=_dense_width(config),
        **_head_dim(config),
        sliding_window=_window(config, traits),
    )


def qwen2(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Dense, with biases on queries, keys and values."""
    return Qwen2Config(
        **_common(config, "Qwen2ForCausalLM"), **_qwen_window(config, traits), intermediate_size=_dense_width(config)
    )


def qwen3(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Dense, with norms on queries and keys."""
    return Qwen3Config(
        **_common(config, "Qwen3ForCausalLM"),
        **_qwen_window(config, traits),
        intermediate_size=_dense_width(config),
        **_head_dim(config),
        attention_bias=traits.biases == "qkvo",
    )


def mixtral(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Mixtures in all layers, whose weights sum to one; no biases."""
    return MixtralConfig(
        **_common(config, "MixtralForCausalLM"),
        **_experts(config, "num_local_experts"),
        intermediate_size=config.moe_intermediate_size,
        **_head_dim(config),
        sliding_window=_window(config, traits),
    )


def granite_moe(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """As Mixtral, with an ungated shared expert where there is one; its multipliers do nothing."""
    settings = {
        **_common(config, f"GraniteMoe{'Shared' if traits.shared else ''}ForCausalLM"),
        **_experts(config, "num_local_experts"),
        "intermediate_size": config.moe_intermediate_size,
        "attention_multiplier": config.head_dim**-0.5,  # pyright: ignore[reportOptionalOperand]
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    if not traits.shared:
        return GraniteMoeConfig(**settings)
    return GraniteMoeSharedConfig(
        **settings, shared_intermediate_size=config.num_shared_experts * config.moe_intermediate_size
    )


def qwen3_moe(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Norms on queries and keys, dense layers anywhere, and weights that sum to one or not."""
    return Qwen3MoeConfig(
        **_common(config, "Qwen3MoeForCausalLM"),
        **_experts(config),
        **_qwen_window(config, traits),
        intermediate_size=_dense_width(config),
        moe_intermediate_size=config.moe_intermediate_size,
        **_head_dim(config),
        attention_bias=traits.biases == "qkvo",
        norm_topk_prob=traits.gates == "normalised softmax",
        mlp_only_layers=_dense_depths(config),
        decoder_sparse_step=1,
    )


def qwen2_moe(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Biases on queries, keys and values, if of zeros, dense layers anywhere, a shared expert or none.

    llama.cpp never normalises the weights of this architecture, and loads it only with a shared expert. So where the
    weights do not sum to one, an absent shared expert is a narrow one that adds zero, and all engines agree; where they
    do, it is left out, so that llama.cpp refuses the file instead of computing something else.
    """
    normalized = traits.gates == "normalised softmax"
    shared = config.num_shared_experts * config.moe_intermediate_size if traits.shared else 0
    return Qwen2MoeConfig(
        **_common(config, "Qwen2MoeForCausalLM"),
        **_experts(config),
        **_qwen_window(config, traits),
        intermediate_size=_dense_width(config),
        moe_intermediate_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=shared or (0 if normalized else PLACEHOLDER_WIDTH),
        qkv_bias=True,
        norm_topk_prob=normalized,
        mlp_only_layers=_dense_depths(config),
        decoder_sparse_step=1,
    )


def glm4_moe(config: MixtureConfig, traits: Traits) -> PreTrainedConfig:
    """Sigmoid gates with a factor and a bias on the choice, leading dense layers, and always a shared expert."""
    rope = {**dict(config.rope_parameters or {}), "partial_rotary_factor": 1.0}
    return Glm4MoeConfig(
        **{**_common(config, "Glm4MoeForCausalLM"), "rope_parameters": rope, "partial_rotary_factor": 1.0},
        num_experts_per_tok=config.num_experts_per_tok,
        n_routed_experts=config.num_experts,
        n_shared_experts=config.num_shared_experts if traits.shared else 1,
        intermediate_size=_dense_width(config),
        moe_intermediate_size=config.moe_intermediate_size,
        **_head_dim(config),
        attention_bias=traits.biases == "qkv",
        use_qk_norm=traits.qk_norm,
        norm_topk_prob=traits.gates == "normalised sigmoid",
        routed_scaling_factor=config.routed_scaling_factor,
        first_k_dense_replace=len(_dense_depths(config)),
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
    )
