"""Stock architectures that hold our checkpoints exactly: what each can express, its configuration and its tensors.

A checkpoint that none of them can hold is exported with its own code: files of ours that import nothing else of ours
but each other.

Tensors are named as the published checkpoints of each architecture have them, which is what other engines read;
transformers' own names in memory differ.

Shapes: E experts, D hidden, F expert width.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mixtura.checkpoints.source import expected_shapes
from mixtura.checkpoints.tensors import PlannedTensor, StoredWeights
from mixtura.config import UserError
from mixtura.config.model_settings import written_out
from mixtura.exporting import fields
from mixtura.exporting.fields import PLACEHOLDER_WIDTH, Traits, check_deployable, check_stock, traits_of
from mixtura.models import MixtureConfig, configuration_mixture, standalone

_PARTS = ("gate_proj", "up_proj", "down_proj")


def _no_mixture(config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int) -> Iterator[PlannedTensor]:
    """A dense architecture has no mixture layer."""
    raise AssertionError("a model with mixture layers fits no dense container")


def _zero_biases(config: MixtureConfig, weights: StoredWeights) -> Iterator[PlannedTensor]:
    """Biases of zeros on queries, keys and values: without them, vLLM's Qwen2 layers read uninitialised memory."""
    for depth in range(config.num_hidden_layers):
        for part in "qkv":
            name = f"model.layers.{depth}.self_attn.{part}_proj"
            weight = weights.tensors[f"{name}.weight"]
            yield _filled(f"{name}.bias", weight.shape[:1], weight.dtype, 0.0)


def _mixtral_tensors(
    config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int
) -> Iterator[PlannedTensor]:
    """`block_sparse_moe` with w1 (gate), w3 (up) and w2 (down) for every expert."""
    new = f"model.layers.{depth}.block_sparse_moe"
    yield weights.plan(f"model.layers.{depth}.mlp.gate.weight", f"{new}.gate.weight")
    names: dict[str, str] = dict(zip(_PARTS, ("w1", "w3", "w2"), strict=True))
    yield from _each_expert(config, weights, depth, f"{new}.experts", names)


def _granite_moe_tensors(
    config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int
) -> Iterator[PlannedTensor]:
    """All experts in two stacked tensors, and the shared expert's first projections in one."""
    old, new = f"model.layers.{depth}.mlp", f"model.layers.{depth}.block_sparse_moe"
    yield weights.plan(f"{old}.gate.weight", f"{new}.router.layer.weight")
    yield weights.plan(f"{old}.experts.gate_up_proj", f"{new}.input_linear.weight")
    yield _scaled(config, weights, f"{old}.experts.down_proj", f"{new}.output_linear.weight")
    if not traits.shared:
        return
    first = [f"{old}.shared_expert.{part}.weight" for part in ("gate_proj", "up_proj")]
    width, hidden = weights.tensors[first[0]].shape
    yield PlannedTensor(
        f"model.layers.{depth}.shared_mlp.input_linear.weight",
        (2 * width, hidden),
        weights.tensors[first[0]].dtype,
        lambda: torch.cat([weights.read(name) for name in first]),
    )
    yield weights.plan(f"{old}.shared_expert.down_proj.weight", f"model.layers.{depth}.shared_mlp.output_linear.weight")


def _qwen_moe_tensors(
    config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int
) -> Iterator[PlannedTensor]:
    """`mlp.experts.K` by name; the shared expert is twice ours, since its gate of zeros halves it again."""
    old = f"model.layers.{depth}.mlp"
    yield weights.plan(f"{old}.gate.weight")
    yield from _each_expert(config, weights, depth, f"{old}.experts", {part: part for part in _PARTS})
    hidden, dtype = config.hidden_size, weights.tensors[f"{old}.gate.weight"].dtype
    if traits.shared:
        down = weights.tensors[f"{old}.shared_expert.down_proj.weight"]
        yield weights.plan(f"{old}.shared_expert.gate_proj.weight")
        yield weights.plan(f"{old}.shared_expert.up_proj.weight")
        yield PlannedTensor(
            f"{old}.shared_expert.down_proj.weight",
            down.shape,
            down.dtype,
            lambda: 2 * weights.read(f"{old}.shared_expert.down_proj.weight"),
        )
        yield _filled(f"{old}.shared_expert_gate.weight", (1, hidden), dtype, 0.0)
    elif not traits.qk_norm and traits.gates == "softmax":
        yield from _placeholder(f"{old}.shared_expert", PLACEHOLDER_WIDTH, hidden, dtype)
        # llama.cpp takes the sigmoid of g to be silu(g) / g, which is no number at zero.
        yield _filled(f"{old}.shared_expert_gate.weight", (1, hidden), dtype, 1.0)


def _glm4_moe_tensors(
    config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int
) -> Iterator[PlannedTensor]:
    """As Qwen's, with a bias on the choice; a shared expert that we do not have adds zero."""
    old = f"model.layers.{depth}.mlp"
    yield weights.plan(f"{old}.gate.weight")
    if traits.expert_bias:
        yield weights.plan(f"{old}.expert_bias", f"{old}.gate.e_score_correction_bias")
    else:
        yield _filled(f"{old}.gate.e_score_correction_bias", (config.num_experts,), torch.float32, 0.0)
    yield from _each_expert(config, weights, depth, f"{old}.experts", {part: part for part in _PARTS}, scale=False)
    if traits.shared:
        for part in _PARTS:
            yield weights.plan(f"{old}.shared_expert.{part}.weight", f"{old}.shared_experts.{part}.weight")
    else:
        dtype = weights.tensors[f"{old}.gate.weight"].dtype
        yield from _placeholder(f"{old}.shared_experts", config.moe_intermediate_size, config.hidden_size, dtype)


def _each_expert(
    config: MixtureConfig,
    weights: StoredWeights,
    depth: int,
    prefix: str,
    names: dict[str, str],
    *,
    scale: bool = True,
) -> Iterator[PlannedTensor]:
    """Three matrices an expert, out of the stacked (E, 2F, D) and (E, D, F); each is read by itself."""
    old = f"model.layers.{depth}.mlp.experts"
    up, down = weights.tensors[f"{old}.gate_up_proj"], weights.tensors[f"{old}.down_proj"]
    experts, double_width, hidden = up.shape
    width = double_width // 2
    factor = config.routed_scaling_factor if scale else 1.0
    for expert in range(experts):
        for number, part in enumerate(_PARTS[:2]):

            def half(expert: int = expert, number: int = number) -> Tensor:
                return weights.read(f"{old}.gate_up_proj", expert).chunk(2)[number]

            yield PlannedTensor(f"{prefix}.{expert}.{names[part]}.weight", (width, hidden), up.dtype, half)

        def second(expert: int = expert) -> Tensor:
            return _times(weights.read(f"{old}.down_proj", expert), factor)

        yield PlannedTensor(f"{prefix}.{expert}.{names['down_proj']}.weight", (hidden, width), down.dtype, second)


def _scaled(config: MixtureConfig, weights: StoredWeights, name: str, new_name: str) -> PlannedTensor:
    planned = weights.plan(name, new_name)
    return planned._replace(make=lambda: _times(weights.read(name), config.routed_scaling_factor))


def _times(weight: Tensor, factor: float) -> Tensor:
    """The second projection times a factor, which scales the experts' outputs by it, exactly but for rounding."""
    return weight if factor == 1 else (weight.float() * factor).to(weight.dtype)


def _placeholder(prefix: str, width: int, hidden: int, dtype: torch.dtype) -> Iterator[PlannedTensor]:
    """A shared expert that adds zero."""
    yield _filled(f"{prefix}.gate_proj.weight", (width, hidden), dtype, 0.0)
    yield _filled(f"{prefix}.up_proj.weight", (width, hidden), dtype, 0.0)
    yield _filled(f"{prefix}.down_proj.weight", (hidden, width), dtype, 0.0)


def _filled(name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float) -> PlannedTensor:
    return PlannedTensor(name, shape, dtype, lambda: torch.full(shape, value, dtype=dtype))


_SOFTMAX = frozenset({"normalised softmax"})
_ANY_SOFTMAX = frozenset({"softmax", "normalised softmax"})
_ANY_SIGMOID = frozenset({"sigmoid", "normalised sigmoid"})
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
    always_biased: bool = False
    """Whether queries, keys and values have biases in any case, so that absent ones are zeros."""


def _can(**values: frozenset[Any]) -> Any:
    """For each trait the values given here; for all others, only the value that a plain Llama has."""
    plain = {
        "gates": _SOFTMAX,
        "biases": frozenset({"none"}),
        "window": frozenset({"none"}),
        "dense_layers": frozenset({"none"}),
    }
    return Traits(**{name: values.get(name, plain.get(name, _NO)) for name in Traits._fields})  # pyright: ignore[reportArgumentType]


_NO_QKV = frozenset({"none", "qkv"})
_NO_QKVO = frozenset({"none", "qkvo"})
_NO_OR_ALL = frozenset({"none", "all"})
_ANY_WINDOW = _NO_OR_ALL | {"some"}
_DENSE = {"gates": _ANY_SOFTMAX | _ANY_SIGMOID, "dense_layers": _ALL, "free_head_dim": _BOTH}

CONTAINERS: dict[str, Container] = {
    "llama": Container(_can(**_DENSE, biases=_NO_QKVO), fields.llama, _no_mixture),
    "mistral": Container(_can(**_DENSE, window=_NO_OR_ALL), fields.mistral, _no_mixture),
    "qwen2": Container(
        _can(**(_DENSE | {"free_head_dim": _NO}), biases=frozenset({"qkv"}), window=_ANY_WINDOW),
        fields.qwen2,
        _no_mixture,
    ),
    "qwen3": Container(
        _can(**_DENSE, biases=_NO_QKVO, qk_norm=frozenset({True}), window=_ANY_WINDOW), fields.qwen3, _no_mixture
    ),
    "mixtral": Container(_can(free_head_dim=_BOTH, window=_NO_OR_ALL), fields.mixtral, _mixtral_tensors),
    "granite_moe": Container(_can(shared=_BOTH), fields.granite_moe, _granite_moe_tensors),
    "qwen3_moe": Container(
        _can(
            gates=_ANY_SOFTMAX,
            biases=_NO_QKVO,
            qk_norm=frozenset({True}),
            free_head_dim=_BOTH,
            dense_layers=_MIXED,
        ),
        fields.qwen3_moe,
        _qwen_moe_tensors,
    ),
    "qwen2_moe": Container(
        _can(gates=_ANY_SOFTMAX, biases=_NO_QKV, shared=_BOTH, dense_layers=_MIXED),
        fields.qwen2_moe,
        _qwen_moe_tensors,
        always_biased=True,
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
        _glm4_moe_tensors,
    ),
}
"""By name, in the order in which they are tried."""

REMOTE_CODE = "remote_code"
DESTINATIONS = ("auto", *CONTAINERS, "flex_olmo", REMOTE_CODE)

_WORDS: dict[str, Callable[[Any], str]] = {
    "gates": lambda value: f"{value} gates",
    "biases": lambda value: {"none": "attention without biases", "qkv": "biases on queries, keys and values"}.get(
        value, "biases on all projections of its attention"
    ),
    "qk_norm": lambda value: f"{'' if value else 'no '}norms on queries and keys",
    "window": lambda value: f"sliding-window attention{' in some layers' if value == 'some' else ''}",
    "free_head_dim": lambda _: "heads of a width of their own",
    "shared": lambda _: "a shared expert",
    "expert_bias": lambda _: "a bias on the choice of experts",
    "dense_layers": lambda value: {"none": "mixtures in all layers", "all": "dense layers only"}.get(
        value, "dense layers among its mixtures" if value == "any" else "leading dense layers"
    ),
}


def missing_traits(name: str, traits: Traits) -> list[str]:
    """The traits of a model that the container lacks, in words; none when it holds the model exactly."""
    can = CONTAINERS[name].can
    return [_WORDS[trait](value) for trait, value in traits._asdict().items() if value not in getattr(can, trait)]


def choose_container(config: MixtureConfig, traits: Traits, wanted: str = "auto") -> str:
    """The container by that name, or for "auto" the first that holds the model exactly.

    Raises:
        UserError: that one does not, or none does; names what does.
    """
    if wanted not in DESTINATIONS:
        raise UserError(f"There is no container '{wanted}': choose one of {', '.join(DESTINATIONS)}.")
    check_stock(config)
    missing = {name: missing_traits(name, traits) for name in CONTAINERS}
    fitting = [name for name in CONTAINERS if not missing[name]]
    if wanted == "auto" and fitting:
        return fitting[0]
    if wanted in fitting:
        return wanted
    instead = f"export with --to {' or '.join([*fitting, REMOTE_CODE])}."
    if wanted == "flex_olmo":
        raise UserError(f"A flex_olmo model normalises after its layers, and this one does before: {instead}")
    if wanted == "auto":
        dense = traits.dense_layers == "all"
        alike = [name for name in CONTAINERS if (CONTAINERS[name].can.dense_layers == _ALL) == dense]
        nearest = min(alike, key=lambda name: len(missing[name]))
        raise UserError(
            f"No stock architecture holds this model exactly; the nearest, {nearest}, cannot have "
            f"{' and '.join(missing[nearest])}: {instead}"
        )
    raise UserError(f"A {wanted} model cannot have {' and '.join(missing[wanted])}, as this one has: {instead}")


def plan_tensors(config: MixtureConfig, traits: Traits, weights: StoredWeights, container: str) -> list[PlannedTensor]:
    """All tensors of the export, in order; the checkpoint must be complete, and none of its tensors is left out."""
    mixtures = {d for d, family in enumerate(config.mlp_layer_types or []) if family == "token_choice"}
    prefixes = tuple(f"model.layers.{depth}.mlp." for depth in mixtures)
    planned = [weights.plan(name) for name in weights.tensors if not name.startswith(prefixes)]
    if CONTAINERS[container].always_biased and traits.biases == "none":
        planned += _zero_biases(config, weights)
    for depth in sorted(mixtures):
        planned += CONTAINERS[container].mixture(config, traits, weights, depth)
    return planned


CONFIG_MODULE, MODEL_MODULE = "configuration_mixture", "modeling_mixtura"


def remote_code() -> dict[str, str]:
    """The files by name; they import torch and transformers alone."""
    table = "from mixtura.config.model_settings import CHOICES, FAMILY_NAMES, ModelSettings"
    ours, theirs = "from mixtura.models.configuration_mixture import", f"from .{CONFIG_MODULE} import"
    return {
        f"{CONFIG_MODULE}.py": _replace_import(inspect.getsource(configuration_mixture), table, written_out()),
        f"{MODEL_MODULE}.py": _replace_import(inspect.getsource(standalone), ours, theirs),
    }


def check_standalone(config: MixtureConfig) -> None:
    """Raises UserError where the files of `remote_code` lack a family of the model."""
    for family in set(config.mlp_layer_types or []) - {"dense", *standalone.MIXTURES}:
        raise UserError(
            f"A model with {family} layers cannot be exported: no architecture of transformers has them, and "
            "mixtura.models.standalone does not either; serve it with Mixtura."
        )


def _replace_import(source: str, ours: str, theirs: str) -> str:
    assert source.count("from mixtura.") == 1 and ours in source, "the file must import nothing else of ours"
    return source.replace(ours, theirs)


def stock_containers(config: MixtureConfig) -> list[str]:
    """The stock architectures that hold a model with this configuration exactly; nothing where none does."""
    try:
        check_stock(config)
    except UserError:
        return []
    traits = traits_of(config, expected_shapes(config))
    return [name for name in CONTAINERS if not missing_traits(name, traits)]


def export_outlook(config: MixtureConfig) -> str:
    """A sentence on where a model with this configuration can go once it is trained, without its subject."""
    try:
        check_deployable(config)
        if found := stock_containers(config):
            return f"can be exported to {found[0]}, which other engines serve"
        check_standalone(config)
    except UserError as error:
        return f"cannot be exported as it is: {error}"
    try:
        check_stock(config)
    except UserError as error:
        why = str(error).partition(": ")[0]
        return f"can be exported with its own code only (--to remote_code): {why[0].lower()}{why[1:]}"
    return "can be exported with its own code only (--to remote_code): no stock architecture has all its traits"
