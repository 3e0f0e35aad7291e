"""What a checkpoint of ours asks of an architecture (`Traits`), and the configuration that every container gets."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

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

from mixtura.config import UserError
from mixtura.config.families import facts_of, never_served
from mixtura.models import MixtureConfig

Gates = Literal["softmax", "normalised softmax", "sigmoid", "normalised sigmoid"]
Biases = Literal["none", "qkv", "qkvo"]
DenseLayers = Literal["none", "leading", "any", "all"]
Windows = Literal["none", "some", "all"]


class Traits(NamedTuple):
    """What an architecture must have to compute the same as our model."""

    gates: Gates
    """How logits become the weights of the chosen experts."""
    biases: Biases
    """Which of the attention's projections have biases."""
    qk_norm: bool
    """Whether queries and keys are normalised, head by head."""
    window: Windows
    """In which layers attention looks at the last tokens only."""
    free_head_dim: bool
    """Whether a head is not hidden_size / num_attention_heads wide."""
    shared: bool
    """Whether every token passes through a shared expert too."""
    expert_bias: bool
    """Whether the choice has a bias that the weights do not have."""
    dense_layers: DenseLayers
    """Which layers are no mixtures."""


def traits_of(config: MixtureConfig, names: Collection[str]) -> Traits:
    """The traits of a model with this configuration and tensors of these names.

    The traits of attention are read from the tensors, since the configuration may disagree with them.
    """
    attention = "model.layers.0.self_attn"
    biased = {part for part in "qkvo" if f"{attention}.{part}_proj.bias" in names}
    sure = config.norm_topk_prob or config.num_experts_per_tok == config.num_experts
    normalized = config.norm_topk_prob if config.scoring_func == "sigmoid" else sure
    return Traits(
        gates=("normalised " if normalized else "") + config.scoring_func,  # pyright: ignore[reportArgumentType]
        biases="none" if not biased else "qkvo" if "o" in biased else "qkv",
        qk_norm=f"{attention}.q_norm.weight" in names,
        window=windows(config),
        free_head_dim=config.head_dim != config.hidden_size // config.num_attention_heads,
        shared=config.num_shared_experts > 0 and "token_choice" in (config.mlp_layer_types or []),
        expert_bias=any(name.endswith(".mlp.expert_bias") for name in names),
        dense_layers=_dense_layers(config),
    )


def windows(config: Any) -> Windows:
    """In which layers a model's attention looks at the last `sliding_window` tokens only."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if getattr(config, "sliding_window", None) is None or "sliding_attention" not in kinds:
        return "none"
    return "all" if len(kinds) == 1 else "some"


def _dense_layers(config: MixtureConfig) -> DenseLayers:
    dense = [family == "dense" for family in config.mlp_layer_types or []]
    if all(dense):
        return "all"
    if not any(dense):
        return "none"
    return "leading" if dense == sorted(dense, reverse=True) else "any"


def check_deployable(config: MixtureConfig) -> None:
    """Raises UserError where the model cannot answer one request alone, in whatever format it is exported."""
    for family in never_served(config.mlp_layer_types or []):
        raise UserError(
            f"A model with {family} layers cannot be served: a token's output depends on tokens to come; train "
            "token_choice or mixture_of_tokens layers instead."
        )
    if "token_choice" in (config.mlp_layer_types or []) and config.capacity_factor is not None:
        raise UserError(
            f"Experts drop tokens over a capacity_factor of {config.capacity_factor:g}, so that an answer would "
            "depend on other requests: set it to null in config.json, after which none is dropped."
        )
    if config.n_group > 1 and "token_choice" in (config.mlp_layer_types or []):
        raise UserError(
            f"Tokens choose from {config.topk_group} of {config.n_group} groups of experts (expert_groups), which no "
            "exported file computes: train with expert_groups = 1."
        )
    free = config.zero_experts + config.copy_experts + config.constant_experts
    if (free or config.latent_size) and "token_choice" in (config.mlp_layer_types or []):
        what = f"{free} zero, copy or constant experts" if free else f"a latent_size of {config.latent_size}"
        raise UserError(f"The layers have {what}, which no exported file computes: serve the model with Mixtura.")
    if config.route_by != "token":
        raise UserError(
            f"The model routes by {config.route_by}, which needs an expert's name with every request: take one "
            "language's model with mixtura.models.transition.extract_language_model and export that."
        )


def check_stock(config: MixtureConfig) -> None:
    """Raises UserError where no architecture of transformers computes the feed-forward layers, whatever its options."""
    families = config.mlp_layer_types or []
    if "mixture_of_tokens" in families:
        raise UserError(
            "No stock architecture has mixture_of_tokens layers: export with --to remote_code, or turn them into token "
            "choice first with `mixtura transition`."
        )
    for family in families:
        if not facts_of(family).has_stock_form:
            raise UserError(f"No stock architecture has {family} layers: export with --to remote_code.")
    if not config.gated or config.hidden_act != "silu":
        kind = f"{'gated' if config.gated else 'plain'} {config.hidden_act}"
        raise UserError(
            f"No stock architecture has {kind} experts, only gated silu ones: export with --to remote_code, or train "
            "with gated = true and activation = 'silu'."
        )
    if config.layer_mix:
        raise UserError("No stock architecture mixes the outputs of its layers: export with --to remote_code.")
    widths = {
        width for width, family in zip(config.intermediate_sizes or [], families, strict=False) if family == "dense"
    }
    if len(widths) > 1:
        raise UserError(
            f"Dense layers have {len(widths)} different widths, and no stock architecture does: export with --to "
            "remote_code."
        )


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
    """The width of a head: not every class declares the field, but all layers read it."""
    return {"head_dim": config.head_dim}


def _dense_width(config: MixtureConfig) -> int:
    """The width of the dense layers; all are equally wide."""
    families = config.mlp_layer_types or []
    widths = config.intermediate_sizes or [config.intermediate_size] * len(families)
    return next((width for width, family in zip(widths, families, strict=True) if family == "dense"), widths[0])


def _window(config: MixtureConfig, traits: Traits) -> int | None:
    return getattr(config, "sliding_window", None) if traits.window == "all" else None


def _qwen_window(config: MixtureConfig, traits: Traits) -> dict[str, Any]:
    if traits.window == "none":
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
    """As Mixtral, with an ungated shared expert if there is one; Granite's multipliers are set to have no effect."""
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
