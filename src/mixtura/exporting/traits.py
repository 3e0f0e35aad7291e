"""What a checkpoint of ours asks of the architecture that is to hold it, from its configuration and its tensors."""

from collections.abc import Collection
from typing import Literal, NamedTuple

from mixtura.config import UserError
from mixtura.config.families import facts_of, never_served
from mixtura.models import MixtureConfig

Gates = Literal["softmax", "normalised softmax", "sigmoid", "normalised sigmoid"]
Biases = Literal["none", "qkv", "qkvo"]
DenseLayers = Literal["none", "leading", "any", "all"]


class Traits(NamedTuple):
    """What another architecture must have, so that it computes the same."""

    gates: Gates
    """How logits become the weights of the chosen experts."""
    biases: Biases
    """Which of the attention's projections have biases."""
    qk_norm: bool
    """Whether queries and keys are normalised, head by head."""
    window: bool
    """Whether attention looks at the last tokens only, in some layer."""
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

    Attention is read from the tensors, which cannot be wrong about it.
    """
    attention = "model.layers.0.self_attn"
    biased = {part for part in "qkvo" if f"{attention}.{part}_proj.bias" in names}
    sure = config.norm_topk_prob or config.num_experts_per_tok == config.num_experts
    normalized = config.norm_topk_prob if config.scoring_func == "sigmoid" else sure
    return Traits(
        gates=("normalised " if normalized else "") + config.scoring_func,  # pyright: ignore[reportArgumentType]
        biases="none" if not biased else "qkvo" if "o" in biased else "qkv",
        qk_norm=f"{attention}.q_norm.weight" in names,
        window=_has_window(config),
        free_head_dim=config.head_dim != config.hidden_size // config.num_attention_heads,
        shared=config.num_shared_experts > 0 and "token_choice" in (config.mlp_layer_types or []),
        expert_bias=any(name.endswith(".mlp.expert_bias") for name in names),
        dense_layers=_dense_layers(config),
    )


def _has_window(config: MixtureConfig) -> bool:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) is not None and "sliding_attention" in kinds


def _dense_layers(config: MixtureConfig) -> DenseLayers:
    dense = [family == "dense" for family in config.mlp_layer_types or []]
    if all(dense):
        return "all"
    if not any(dense):
        return "none"
    return "leading" if dense == sorted(dense, reverse=True) else "any"


def check_deployable(config: MixtureConfig) -> None:
    """Raises UserError where no file format helps: the model cannot answer one request by itself."""
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
    if config.route_by != "token":
        raise UserError(
            f"The model routes by {config.route_by}, which needs an expert's name with every request: take one "
            "language's model with mixtura.models.extract and export that."
        )


def check_stock(config: MixtureConfig) -> None:
    """Raises UserError where no architecture of transformers computes the feed-forward layers, whatever its options."""
    families = config.mlp_layer_types or []
    if "mixture_of_tokens" in families:
        raise UserError(
            "No stock architecture has mixture_of_tokens layers: export with --to remote_code, or turn them into token "
            "choice first with mixtura.models.transition."
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
