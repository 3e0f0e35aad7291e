"""Load of the experts over whole optimizer steps, for balancing and for the report.

The trainer adds up the statistics that layers return. Layers do not count themselves, because under activation
checkpointing a layer runs twice and would count twice. A step's load is that of all its micro-batches
on all ranks.

Shapes: M mixture layers, E experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtura.layers import ExpertThresholdMoE, ReMoE, RoutingStats
from mixtura.layers.remoe import update_l1_coef
from mixtura.results import Facts


class StepTotals(NamedTuple):
    """Sums over micro-batches; tensors without gradient, so that adding them never waits for the device."""

    task_loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    tokens_per_expert_ME: Tensor
    dropped_M: Tensor
    routed_M: Tensor
    entropy_M: Tensor


def micro_batch_totals(
    task_loss: Tensor,
    aux_loss: Tensor | None,
    z_loss: Tensor | None,
    routing: Sequence[RoutingStats | None],
    *,
    share: float,
) -> StepTotals:
    """One micro-batch's part of a step.

    Args:
        task_loss: what this micro-batch adds to the mean loss of the step.
        aux_loss: its mean load-balancing loss, if any layer has one.
        z_loss: its mean router z-loss, likewise.
        routing: statistics of every layer.
        share: 1 / (micro-batches of the step on all ranks), which turns sums of means into means.
    """
    zero = task_loss.new_zeros(())
    stats = [layer for layer in routing if layer is not None]

    def stacked(values: list[Tensor]) -> Tensor:
        return torch.stack(values).detach().float() if values else task_loss.new_zeros(0, dtype=torch.float32)

    return StepTotals(
        task_loss=task_loss.detach().float(),
        aux_loss=(zero if aux_loss is None else aux_loss.detach()).float() * share,
        z_loss=(zero if z_loss is None else z_loss.detach()).float() * share,
        tokens_per_expert_ME=stacked([layer.tokens_per_expert_E for layer in stats]),
        dropped_M=stacked([layer.dropped_tokens for layer in stats]),
        routed_M=stacked([layer.routed_rows for layer in stats]),
        entropy_M=stacked([layer.entropy for layer in stats]) * share,
    )


def add_totals(first: StepTotals | None, second: StepTotals) -> StepTotals:
    """The sum of both; None stands for zero."""
    return second if first is None else StepTotals(*(a + b for a, b in zip(first, second, strict=True)))


def reduce_totals(totals: StepTotals, reduce: Callable[[Tensor], Tensor]) -> StepTotals:
    """Totals over all ranks, in one exchange; `reduce` sums a tensor over the ranks."""
    flat = reduce(torch.cat([part.flatten() for part in totals]))
    parts = flat.split([part.numel() for part in totals])
    return StepTotals(*(part.view(like.shape) for part, like in zip(parts, totals, strict=True)))


class Load(NamedTuple):
    """What the experts of the M mixture layers were given."""

    tokens_per_expert_ME: Tensor
    routed_M: Tensor


def load_of(routing: Sequence[RoutingStats | None]) -> Load:
    """The load that the statistics of all layers have."""
    stats = [layer for layer in routing if layer is not None]
    rows_ME, routed_M = ([getattr(layer, key) for layer in stats] for key in ("tokens_per_expert_E", "routed_rows"))
    return Load(torch.stack(rows_ME), torch.stack(routed_M))


def add_loads(first: Load | None, second: Load) -> Load:
    """The sum of both; None stands for zero."""
    return second if first is None else Load(*(a + b for a, b in zip(first, second, strict=True)))


def with_load(routing: Sequence[RoutingStats | None], load: Load) -> list[RoutingStats | None]:
    """The same statistics with the load of each mixture layer replaced."""
    loads = map(Load._make, zip(*load, strict=True))
    replaced = []
    for layer in routing:
        if layer is not None:
            rows_E, routed = next(loads)
            layer = layer._replace(tokens_per_expert_E=rows_E, routed_rows=routed)
        replaced.append(layer)
    return replaced


@torch.no_grad()
def update_expert_bias(layers: Sequence[nn.Module], tokens_per_expert_ME: Tensor, *, rate: float) -> None:
    """Loss-free balancing (arXiv 2408.15664, algorithm 1): b_e += rate * sign(mean load - load_e).

    Args:
        layers: the M mixture layers; those without an `expert_bias` are left alone.
        tokens_per_expert_ME: rows that every expert got in the whole step.
        rate: how far a bias moves.
    """
    for layer, load_E in zip(layers, tokens_per_expert_ME, strict=True):
        bias_E = getattr(layer, "expert_bias", None)
        if bias_E is not None:
            bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=rate)


@torch.no_grad()
def update_gates(layers: Sequence[nn.Module], totals: StepTotals, *, growth: float) -> None:
    """Weighs ReMoE's penalty anew, by how many experts a token of the whole step ran; see `layers.remoe`.

    Args:
        layers: the M mixture layers; those of other families are left alone.
        totals: sums over the step.
        growth: how much the weight grows or shrinks.
    """
    active_M = totals.tokens_per_expert_ME.sum(-1) / totals.routed_M.clamp_min(1.0)
    found = [(layer, active) for layer, active in zip(layers, active_M, strict=True) if isinstance(layer, ReMoE)]
    if found:
        update_l1_coef([layer for layer, _ in found], torch.stack([active for _, active in found]), factor=1 + growth)


def update_thresholds(layers: Sequence[nn.Module], *, rate: float, reduce: Callable[[Tensor], Tensor]) -> None:
    """Moves the thresholds of experts towards what the step's batches gave; see `layers.expert_threshold`.

    Args:
        layers: the mixture layers; those of other families are left alone.
        rate: the least weight of a step.
        reduce: sums a tensor over the ranks.
    """
    for layer in layers:
        if isinstance(layer, ExpertThresholdMoE) and layer.observed is not None:
            observed, layer.observed = layer.observed, None
            layer.update(reduce(observed), rate=rate)


def load_report(totals: StepTotals, *, steps: int, layers: Sequence[int]) -> Facts:
    """What the metrics record about routing over some steps, as plain numbers; empty for a model without mixtures.

    Args:
        totals: sums over the steps.
        steps: how many.
        layers: depths of the mixture layers.
    """
    if not layers:
        return {}
    load_ME = totals.tokens_per_expert_ME.double()
    share_ME = load_ME / load_ME.sum(-1, keepdim=True).clamp_min(1e-30)
    routed = totals.routed_M.double().sum().clamp_min(1.0)
    return {
        "layers": list(layers),
        "load": share_ME.tolist(),
        "dropped_share": (totals.dropped_M.double().sum() / routed).item(),
        "router_entropy": (totals.entropy_M.double().mean() / steps).item(),
    }
