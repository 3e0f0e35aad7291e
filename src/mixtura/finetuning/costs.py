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
