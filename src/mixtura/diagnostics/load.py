"""How evenly the experts of a layer are used.

Shapes: E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from mixtura.config import UserError
from mixtura.layers import RoutingStats

Load = RoutingStats | Tensor | numpy.ndarray | Sequence[float]
"""Rows, or any other measure of use, of each expert (E,)."""

DEAD_SHARE = 0.01
"""An expert with less than this part of an even share is dead."""


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """How uneven one load is; the values in brackets are a perfectly even load's."""

    imbalance: float
    """Largest load over the mean (1)."""
    coefficient_of_variation: float
    """Standard deviation over the mean (0)."""
    dead_fraction: float
    """Share of experts that get less than `DEAD_SHARE` of an even share (0)."""
    effective_fraction: float
    """exp(entropy of the shares) / E: the share of experts that are in use (1)."""


def load_shares(load: Load) -> numpy.ndarray:
    """(E,) -> (E,) float64: each expert's part of the whole, summing to one.

    Raises:
        UserError: no load at all, or a negative or infinite one.
    """
    if isinstance(load, RoutingStats):
        load = load.tokens_per_expert_E
    if isinstance(load, Tensor):
        load = load.detach().to("cpu", torch.float64).numpy()
    load_E = numpy.asarray(load, dtype=numpy.float64)
    total = load_E.sum()
    if load_E.ndim != 1 or not 0 < total < numpy.inf or load_E.min() < 0:
        raise UserError(f"The load {load_E.tolist()} has no shares: give one number of zero or more for each expert.")
    return load_E / total


def summarize_load(load: Load) -> LoadSummary:
    """How uneven a load (E,) is; add up several batches' loads before, not their summaries after.

    Raises:
        UserError: see `load_shares`.
    """
    share_E = load_shares(load)
    relative_E = share_E * len(share_E)
    used_U = share_E[share_E > 0]
    return LoadSummary(
        imbalance=float(relative_E.max()),
        coefficient_of_variation=float(relative_E.std()),
        dead_fraction=float((relative_E < DEAD_SHARE).mean()),
        effective_fraction=float(numpy.exp(-(used_U * numpy.log(used_U)).sum()) / len(share_E)),
    )


def dropped_share(stats: RoutingStats) -> float:
    """Part of the routed rows that was dropped, 0 for dropless layers."""
    return float(stats.dropped_tokens) / max(float(stats.routed_rows), 1.0)
