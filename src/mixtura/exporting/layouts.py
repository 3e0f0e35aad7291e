"""The tensors of a mixture layer as the published checkpoints of every container have them.

Shapes: E experts, D hidden, F expert width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mixtura.checkpoints.tensors import PlannedTensor, StoredWeights
from mixtura.exporting.fields import PLACEHOLDER_WIDTH, Traits
from mixtura.models import MixtureConfig

_PARTS = ("gate_proj", "up_proj", "down_proj")


def no_mixture(config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int) -> Iterator[PlannedTensor]:
    """A dense architecture has no mixture layer."""
    raise AssertionError("a model with mixture layers fits no dense container")


def zero_biases(config: MixtureConfig, weights: StoredWeights) -> Iterator[PlannedTensor]:
    """Biases of zeros on queries, keys and values: without them, vLLM's Qwen2 layers read uninitialised memory."""
    for depth in range(config.num_hidden_layers):
        for part in "qkv":
            name = f"model.layers.{depth}.self_attn.{part}_proj"
            weight = weights.tensors[f"{name}.weight"]
            yield _filled(f"{name}.bias", weight.shape[:1], weight.dtype, 0.0)


def mixtral(config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int) -> Iterator[PlannedTensor]:
    """`block_sparse_moe` with w1 (gate), w3 (up) and w2 (down) for every expert."""
    new = f"model.layers.{depth}.block_sparse_moe"
    yield weights.plan(f"model.layers.{depth}.mlp.gate.weight", f"{new}.gate.weight")
    names: dict[str, str] = dict(zip(_PARTS, ("w1", "w3", "w2"), strict=True))
    yield from _each_expert(config, weights, depth, f"{new}.experts", names)


def granite_moe(config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int) -> Iterator[PlannedTensor]:
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


def qwen_moe(config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int) -> Iterator[PlannedTensor]:
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


def glm4_moe(config: MixtureConfig, traits: Traits, weights: StoredWeights, depth: int) -> Iterator[PlannedTensor]:
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
