"""Stock architectures that hold our checkpoints exactly: what each can express, its configuration and its tensors.

Tensors are named as the published checkpoints of each architecture have them, which is what other engines read;
transformers' own names in memory differ.

Shapes: E experts, D hidden, F expert width.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from mixtura.config import UserError
from mixtura.conversion import fields, layouts
from mixtura.conversion.tensors import PlannedTensor, StoredWeights
from mixtura.conversion.traits import Traits, check_stock
from mixtura.models import MixtureConfig

_SOFTMAX = frozenset({"normalized softmax"})
_ANY_SOFTMAX = frozenset({"softmax", "normalized softmax"})
_ANY_SIGMOID = frozenset({"sigmoid", "normalized sigmoid"})
_ALL = frozenset({"all"})
_MIXED = frozenset({"none", "leading", "any"})
_BOTH = frozenset({False, True})
_NO = frozenset({False})


class Container(NamedTuple):
    """An architecture: the traits that it can have, and how a checkpoint is written for it."""

    can: Traits | Any
    """For each trait the set of values that the architecture has."""
    config: Callable[[MixtureConfig, Traits], PreTrainedConfig]
    mixture: Callable[[MixtureConfig, Traits, StoredWeights, int], Iterator[PlannedTensor]]
    """The feed-forward tensors of a mixture layer, given its depth."""


def _can(**values: frozenset[Any]) -> Any:
    """For each trait, what is named here, or else only what a plain Llama has."""
    plain = {
        "gates": _SOFTMAX,
        "biases": frozenset({"none"}),
        "dense_layers": frozenset({"none"}),
    }
    return Traits(**{name: values.get(name, plain.get(name, _NO)) for name in Traits._fields})  # pyright: ignore[reportArgumentType]


_NO_QKV = frozenset({"none", "qkv"})
_NO_QKVO = frozenset({"none", "qkvo"})
_DENSE = {"gates": _ANY_SOFTMAX | _ANY_SIGMOID, "dense_layers": _ALL, "free_head_dim": _BOTH}

CONTAINERS: dict[str, Container] = {
    "llama": Container(_can(**_DENSE, biases=_NO_QKVO), fields.llama, layouts.no_mixture),
    "mistral": Container(_can(**_DENSE, window=_BOTH), fields.mistral, layouts.no_mixture),
    "qwen2": Container(
        _can(**(_DENSE | {"free_head_dim": _NO}), biases=frozenset({"qkv"}), window=_BOTH),
        fields.qwen2,
        layouts.no_mixture,
    ),
    "qwen3": Container(
        _can(**_DENSE, biases=_NO_QKVO, qk_norm=frozenset({True}), window=_BOTH), fields.qwen3, layouts.no_mixture
    ),
    "mixtral": Container(_can(free_head_dim=_BOTH, window=_BOTH), fields.mixtral, layouts.mixtral),
    "granite_moe": Container(_can(shared=_BOTH), fields.granite_moe, layouts.granite_moe),
    "qwen3_moe": Container(
        _can(
            gates=_ANY_SOFTMAX,
            biases=_NO_QKVO,
            qk_norm=frozenset({True}),
            free_head_dim=_BOTH,
            dense_layers=_MIXED,
        ),
        fields.qwen3_moe,
        layouts.qwen_moe,
    ),
    "qwen2_moe": Container(
        _can(gates=_ANY_SOFTMAX, biases=_NO_QKV, shared=_BOTH, dense_layers=_MIXED),
        fields.qwen2_moe,
        layouts.qwen_moe,
    ),
    "glm4_moe": Container(
        _can(
            gates=_ANY_SIGMOID,
            biases=_NO_QKV,
            qk_norm=_BOTH,
            free_head_dim=_BOTH,
            shared=_BOTH,
            expert_bias=_BOTH,
            dense_layers=frozenset({"none", "leading"}),
        ),
        fields.glm4_moe,
        layouts.glm4_moe,
    ),
}
"""By name, in the order in which they are tried."""

_WORDS: dict[str, Callable[[Any], str]] = {
    "gates": lambda value: f"{value} gates",
    "biases": lambda value: {"none": "attention without biases", "qkv": "biases on queries, keys and values"}.get(
        value, "biases on all projections of its attention"
    ),
    "qk_norm": lambda value: f"{'' if value else 'no '}norms on queries and keys",
    "window": lambda _: "sliding-window attention",
    "free_head_dim": lambda _: "heads of a width of their own",
    "shared": lambda _: "a shared expert",
    "expert_bias": lambda _: "a bias on the choice of experts",
    "dense_layers": lambda value: {"none": "mixtures in all layers", "all": "dense layers only"}.get(
        value, "dense layers among its mixtures" if value == "any" else "leading dense layers"
    ),
}


def missing_trait(name: str, traits: Traits) -> str | None:
    """The first trait that the container does not have, in words; None when it holds the model exactly."""
    for trait, value in traits._asdict().items():
        if value not in getattr(CONTAINERS[name].can, trait):
            return _WORDS[trait](value)
    return None


def choose_container(config: MixtureConfig, traits: Traits, wanted: str = "auto") -> str:
    """The container by that name, or for "auto" the first that holds the model exactly.

    Raises:
        UserError: that one does not, or none does; names what does.
    """
    if wanted != "auto" and wanted not in (*CONTAINERS, "flex_olmo"):
        known = ", ".join(["auto", *CONTAINERS, "flex_olmo", "remote_code"])
        raise UserError(f"There is no container '{wanted}': choose one of {known}.")
    check_stock(config)
    fitting = [name for name in CONTAINERS if missing_trait(name, traits) is None]
    if wanted in fitting or (wanted == "auto" and fitting):
        return wanted if wanted in fitting else fitting[0]
    instead = f"export with --to {' or '.join([*fitting, 'remote_code'])}"
    if wanted == "auto":
        nearest = "qwen2_moe" if traits.dense_layers != "all" else "llama"
        raise UserError(
            f"No stock architecture holds this model exactly: {nearest} has no "
            f"{missing_trait(nearest, traits)}, {instead}."
        )
    if wanted == "flex_olmo":
        raise UserError(f"flex_olmo normalises after its layers, and this model does before: {instead}.")
    raise UserError(f"{wanted} does not have {missing_trait(wanted, traits)}, as this model does: {instead}.")


def plan_tensors(config: MixtureConfig, traits: Traits, weights: StoredWeights, container: str) -> list[PlannedTensor]:
    """All tensors of the export, in order; none of the checkpoint is left out.

    Raises:
        UserError: the checkpoint lacks a tensor, or has one that has no place.
    """
    mixtures = {d for d, family in enumerate(config.mlp_layer_types or []) if family == "token_choice"}
    prefixes = tuple(f"model.layers.{depth}.mlp." for depth in mixtures)
    planned = [weights.plan(name) for name in weights.tensors if not name.startswith(prefixes)]
    for depth in sorted(mixtures):
        planned += CONTAINERS[container].mixture(config, traits, weights, depth)
    return planned
