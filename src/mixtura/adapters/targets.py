"""Which modules of a pretrained model an adapter goes to, and what training it costs.

The feed-forward layers are found by the names of their parts. Costs are trained parameters, FLOPs and the optimizer's
state; the formulas are exact and tested against real modules.

Shapes: I inputs and O outputs of a linear layer, D hidden, E experts, R rank.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixtura.checkpoints.quantized import weights
from mixtura.config import AdapterConfig, UserError
from mixtura.kernels.expert_weights import activate
from mixtura.layers import FeedForward


class Kind(NamedTuple):
    """How one family of models names the linear layers of a feed-forward layer."""

    gate: str | None
    up: str
    down: str


KINDS = (
    Kind("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM; a gated DenseFFN
    Kind("w1", "w3", "w2"),
    Kind("wi_0", "wi_1", "wo"),  # T5 1.1
    Kind(None, "up_proj", "down_proj"),  # a plain DenseFFN
    Kind(None, "fc1", "fc2"),  # Phi, NLLB-MoE
    Kind(None, "lin1", "lin2"),  # DistilBERT
    Kind(None, "wi", "wo"),  # T5, ModernBERT's plain form
    Kind(None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon
)
FUSED = (
    Kind(None, "gate_up_proj", "down_proj"),  # Phi-3, GLM: gate and up in one matrix
    Kind(None, "Wi", "Wo"),  # ModernBERT
)
"""Layers that have targets for one routing a linear layer, but no gate and up of their own for one routing in all."""
SPLIT = Kind(None, "intermediate.dense", "output.dense")  # BERT, RoBERTa, ELECTRA, MiniLM: two modules make the layer
LOOSE = Kind(None, "fc1", "fc2")  # Marian, M2M100, NLLB, BART, OPT: two linear layers beside the attention, no module
_ACTIVATIONS = ("act_fn", "intermediate_act_fn", "activation_fn", "activation", "act")


class Block(NamedTuple):
    """A feed-forward layer of a model."""

    name: str
    """The module that an adapter of the whole layer replaces; of a split layer, its first half."""
    kind: Kind | None
    """The names of its linear layers, relative to `name` or, when split, to its parent; None for a mixture."""
    split: bool = False

    @property
    def linears(self) -> list[str]:
        """Full names of the linear layers, in the order gate, up, down."""
        if self.kind is None:
            return []
        root = self.name.rpartition(".")[0] if self.split else self.name
        return [f"{root}.{part}".lstrip(".") for part in self.kind if part is not None]


class Projections(NamedTuple):
    """The parts of a dense feed-forward layer: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]


def find_blocks(model: nn.Module, *, mixtures: bool = False) -> list[Block]:
    """The feed-forward layers of a model, from the first to the last.

    Args:
        model: any model, without adapters.
        mixtures: also layers that are mixtures already, which have no linear layers of their own.
    """
    found: list[Block] = []
    experts = tuple(f"{name}.experts." for name, module in model.named_modules() if _is_mixture(module))
    for name, module in model.named_modules():
        # A mixture's expert gets some tokens in no order, so nothing could say of which example, or group, each is.
        if name.startswith(experts) or (found and name.startswith(f"{found[-1].name}.")):
            continue
        kind = _kind_of(module)
        if kind is not None:
            found.append(Block(name, kind))
        elif _is_split(module):
            found.append(Block(f"{name}.intermediate".lstrip("."), SPLIT, split=True))
        elif _is_loose(module):
            found.append(Block(f"{name}.{LOOSE.up}".lstrip("."), LOOSE, split=True))
        elif mixtures and _is_mixture(module):
            found.append(Block(name, None))
    return [block for block in found if block.name]


def has_mixtures(model: nn.Module) -> bool:
    """Whether the model has mixtures whose experts are stacked tensors, which are no linear layers."""
    return any(_is_mixture(module) for module in model.modules())


def feed_forward_linears(model: nn.Module) -> list[str]:
    """Full names of the linear layers of all feed-forward layers.

    Raises:
        UserError: there are none; the message names the linear layers that there are.
    """
    names = [name for block in find_blocks(model) for name in block.linears]
    if not names:
        there = "no dense feed-forward layer, only experts in stacked tensors" if has_mixtures(model) else "none"
        raise UserError(
            f"This adapter goes to the linear layers of feed-forward layers, and {type(model).__name__} has {there}: "
            f"name linear layers in 'adapter.targets', some of {_listed(linear_suffixes(model))}."
        )
    return names


def match_linears(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full names of the linear layers that end in one of `targets`, such as "q_proj" or "output.dense".

    Raises:
        UserError: a target matches no linear layer.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched: set[str] = set()
    for target in targets:
        names = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not names:
            raise UserError(
                f"'adapter.targets' has '{target}', which is no linear layer of {type(model).__name__}: choose from "
                f"{_listed(linear_suffixes(model))}."
            )
        matched.update(names)
    return [name for name in linears if name in matched]


def linear_suffixes(model: nn.Module) -> list[str]:
    """The last names of all linear layers, each once, in the order of the model."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def projections(
    module: nn.Module, kind: Kind, down: nn.Module | None = None, activation: Callable[[Tensor], Tensor] | None = None
) -> Projections:
    """The parts of a dense feed-forward layer.

    Args:
        module: the layer; of a split one, its first half.
        kind: the names of its parts.
        down: the last linear layer, when it is not in `module`.
        activation: what lies between the two, when `module` is the first linear layer itself.
    """
    if down is not None and activation is not None:
        return Projections(None, module, down, activation)
    if down is not None:
        return Projections(None, module.get_submodule("dense"), down, activation_of(module))
    gate = None if kind.gate is None else module.get_submodule(kind.gate)
    return Projections(gate, module.get_submodule(kind.up), module.get_submodule(kind.down), activation_of(module))


def activation_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation of a feed-forward layer, which models keep under different names.

    Raises:
        UserError: there is none.
    """
    for name in _ACTIVATIONS:
        act: Any = getattr(module, name, None)
        if isinstance(act, str):
            activation = act
            return lambda u: activate(u, activation, gated=False)
        if callable(act):
            return act  # pyright: ignore[reportReturnType]
    raise UserError(
        f"The activation of {type(module).__name__} is under none of the names {', '.join(_ACTIVATIONS)}: set "
        "'adapter.scope' to \"linear\"."
    )


def _kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module that is one whole dense feed-forward layer and holds nothing else that is trained."""
    parts = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    for kind in (*KINDS, *FUSED):
        names = {name for name in kind if name is not None}
        if parts == names and all(isinstance(module.get_submodule(name), nn.Linear) for name in names):
            return kind
    return None


def _is_split(module: nn.Module) -> bool:
    first, second = getattr(module, "intermediate", None), getattr(module, "output", None)
    return isinstance(getattr(first, "dense", None), nn.Linear) and isinstance(
        getattr(second, "dense", None), nn.Linear
    )


def loose_down(parent: nn.Module, name: str) -> nn.Module | None:
    """The linear layer that ends a loose feed-forward layer whose first is `parent`'s child `name`; None for others."""
    return getattr(parent, LOOSE.down) if name == LOOSE.up and _is_loose(parent) else None


def _is_loose(module: nn.Module) -> bool:
    """Whether both linear layers are its children, beside others."""
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in (LOOSE.up, LOOSE.down))


def _is_mixture(module: nn.Module) -> bool:
    if isinstance(module, FeedForward):
        return True
    return hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "(it has no linear layers)"


class RankCost(NamedTuple):
    """Trained parameters as a function of the rank: `fixed + per_rank * rank`."""

    per_rank: int
    fixed: int

    def parameters(self, rank: int) -> int:
        """Trained parameters at a rank."""
        return self.fixed + self.per_rank * rank

    def largest_rank(self, parameters: int) -> int:
        """The largest rank that trains no more than `parameters`; may be below 1."""
        return (parameters - self.fixed) // self.per_rank


def lora_cost(shapes: Sequence[tuple[int, int]]) -> RankCost:
    """Plain LoRA on linear layers of shapes (I, O): R (I + O) each."""
    return RankCost(sum(i + o for i, o in shapes), 0)


def mixture_lora_cost(
    layers: Sequence[Sequence[tuple[int, int]]], config: AdapterConfig, *, num_experts: int
) -> RankCost:
    """A mixture of LoRA.

    Args:
        layers: for every routing the shapes (I, O) of the linear layers under it; the router reads the first one's I.
        config: router and sharing.
        num_experts: E, which for task routing is the number of tasks.

    Returns:
        R (I + E O) or E R (I + O) each, with E D for a router and D + 1 for a threshold.
    """
    rows_a = 1 if config.share_a else num_experts
    per_rank = sum(rows_a * i + num_experts * o for shapes in layers for i, o in shapes)
    width = sum(shapes[0][0] for shapes in layers)
    fixed = 0 if config.router == "task" else num_experts * width
    if config.router == "threshold":
        fixed += width + len(layers)
    return RankCost(per_rank, fixed)


def mot_adapter_cost(widths: Sequence[int], *, num_experts: int) -> RankCost:
    """Mixture-of-tokens adapters beside layers of width D: 2 E R D, and E D for the router."""
    return RankCost(2 * num_experts * sum(widths), num_experts * sum(widths))


def lora_flops(shapes: Sequence[tuple[int, int]], *, rank: int) -> int:
    """Forward FLOPs a token beyond the frozen layers': 2 R (I + O) each."""
    return 2 * rank * sum(i + o for i, o in shapes)


def mixture_lora_flops(
    layers: Sequence[Sequence[tuple[int, int]]],
    config: AdapterConfig,
    *,
    num_experts: int,
    rank: int,
    experts_per_token: int | None = None,
) -> int:
    """Forward FLOPs a token beyond the frozen layers'.

    One routing for each linear layer runs the ranks of all experts, whatever the router chose: 2 R (I + E O) or
    2 E R (I + O). One for a whole layer runs those of the chosen experts: 2 K R (I + O) for each of its linear layers.

    Args:
        layers: as for `mixture_lora_cost`.
        config: scope, router and sharing.
        num_experts: E.
        rank: R.
        experts_per_token: K, which a threshold decides anew for every token; None is top_k, 1 by task, else E.
    """
    width = sum(shapes[0][0] for shapes in layers)
    router = 0 if config.router == "task" else 2 * num_experts * width
    if config.router == "threshold":
        router += 2 * width
    if config.scope == "feed_forward":
        chosen = experts_per_token or {"top_k": config.top_k, "task": 1}.get(config.router, num_experts)
        return router + sum(2 * chosen * rank * (i + o) for shapes in layers for i, o in shapes)
    rows_a = 1 if config.share_a else num_experts
    return router + sum(2 * rank * (rows_a * i + num_experts * o) for shapes in layers for i, o in shapes)


def mot_adapter_flops(
    widths: Sequence[int], *, num_experts: int, rank: int, group_size: int | None, alone_top_k: int | None = None
) -> float:
    """Forward FLOPs a token beyond the frozen layers'.

    In groups 6 E D for router, mixing and spreading, and 4 R D E / G for the experts; alone (`group_size` None) 2 E D
    for the router and 4 R D for each expert that runs.
    """
    if group_size is None:
        return sum((2 * num_experts + 4 * rank * (alone_top_k or num_experts)) * width for width in widths)
    return sum((6 * num_experts + 4 * rank * num_experts / group_size) * width for width in widths)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters of a model, and those that are trained; shared ones count once, packed ones as before packing."""
    sizes = [(shape.numel(), parameter.requires_grad) for parameter, shape, _ in weights(model)]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def measured_flops_per_token(model: nn.Module, run: Callable[[], Any], tokens: int) -> float:
    """FLOPs of one forward and backward, by torch's counter, for each of `tokens` tokens.

    Args:
        model: only its gradients are touched: they are None afterwards.
        run: one forward that returns a scalar loss.
        tokens: how many tokens it runs over.
    """
    with FlopCounterMode(display=False) as counter:
        loss: Tensor = run()
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return counter.get_total_flops() / tokens


def optimizer_state_bytes(model: nn.Module) -> int:
    """Bytes that AdamW keeps: two float32 moments, or wider, for each trained parameter."""
    sizes = [
        2
        * parameter.numel()
        * torch.empty((), dtype=torch.promote_types(parameter.dtype, torch.float32)).element_size()
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    return sum(sizes)
