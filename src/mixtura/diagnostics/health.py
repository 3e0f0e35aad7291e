"""Two signs of how training goes: how evenly the experts are used, and spikes of the loss or the gradient norm.

A value is a spike when it exceeds the median of the up to 50 values before it both by more than 5 scaled median
absolute deviations (1.4826 * MAD, a standard deviation if the noise is normal) and by more than 20 % of that median.
The first part asks for a surprise given the noise, the second for one that matters: a quiet, flat loss has a tiny
deviation. The first 10 values are never spikes. A value that is not finite always is. Neighbouring spikes count as one,
since a loss that jumps and takes twenty steps to come back jumped once.

Shapes: E experts.
"""

import math
import statistics
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


WINDOW = 50
WARMUP = 10
DEVIATIONS = 5.0
MINIMUM_RISE = 0.2

_MAD_TO_STANDARD_DEVIATION = 1.4826


@dataclass(frozen=True, kw_only=True)
class SeriesSummary:
    """One run's losses or gradient norms in three numbers."""

    mean: float
    """Over the finite values."""
    maximum: float
    """Over the finite values."""
    spikes: int


def find_spikes(values: Sequence[float]) -> list[int]:
    """Indices at which a spike begins, by the rule of this module."""
    starts = []
    inside = False
    for index, value in enumerate(values):
        before = [v for v in values[max(0, index - WINDOW) : index] if math.isfinite(v)]
        spike = _is_spike(value, before)
        if spike and not inside:
            starts.append(index)
        inside = spike
    return starts


def count_spikes(values: Sequence[float]) -> int:
    """How many spikes a series of losses or gradient norms has, by the rule of this module."""
    return len(find_spikes(values))


def summarize_series(values: Sequence[float]) -> SeriesSummary:
    """Mean and maximum of the finite values (nan when there is none), and the number of spikes."""
    finite = [value for value in values if math.isfinite(value)]
    return SeriesSummary(
        mean=statistics.fmean(finite) if finite else math.nan,
        maximum=max(finite, default=math.nan),
        spikes=count_spikes(values),
    )


def _is_spike(value: float, before: list[float]) -> bool:
    if not math.isfinite(value):
        return True
    if len(before) < WARMUP:
        return False
    median = statistics.median(before)
    deviation = _MAD_TO_STANDARD_DEVIATION * statistics.median(abs(v - median) for v in before)
    rise = value - median
    return rise > DEVIATIONS * deviation and rise > MINIMUM_RISE * abs(median)
