"""Spikes of the loss or the gradient norm, counted by one stated rule.

A value is a spike when it exceeds the median of the up to 50 values before it both by more than 5 scaled median
absolute deviations (1.4826 * MAD, a standard deviation if the noise is normal) and by more than 20 % of that median.
The first part asks for a surprise given the noise, the second for one that matters: a quiet, flat loss has a tiny
deviation. The first 10 values are never spikes. A value that is not finite always is. Neighbouring spikes count as one,
since a loss that jumps and takes twenty steps to come back jumped once.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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
