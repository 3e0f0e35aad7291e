"""What fine-tuning costs: trained parameters, FLOPs and optimizer state, as formulas and as measured.

Formulas are exact and tested against real modules; docs/adapters.md lists them.

Shapes: I inputs and O outputs of a linear layer, D hidden, E experts, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixtura.config import AdapterConfig


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
    """All parameters of a model, and those that are trained; shared ones count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
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
