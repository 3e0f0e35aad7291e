"""What several seeds can tell: paired differences, speed-ups, and what longer training would bring.

Arms are paired by seed: the same seed is the same initialisation rule, the same tokens in the same order. So the noise
that a seed brings to every arm cancels in the difference, and the interval of the mean difference is Student's t over
the seeds. With one seed there is no interval, and nothing here invents one.

A held-out curve is a list of (step, loss). A cosine schedule is tied to its length: a point on the way of a long run
has a higher loss than a finished run of that length, so speed-ups and crossings read off curves are approximate. For
longer training there are trends of the gap to the baseline, and the published curve of MoT.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy import stats

from mixtura.report.wording import (
    NBSP,
    Yardstick,
    capital,
    listing,
    number,
    percent,
    quantity,
    signed,
    signed_interval,
    start,
)
from mixtura.results import ArmSummary
from mixtura.results.conclusions import (
    Anchor,
    Budget,
    Crossing,
    Difference,
    EqualCostDifference,
    Fit,
    Interval,
    SpeedUp,
    Trend,
)

CONFIDENCE = 0.95
POWER = 0.8
"""How often a difference must be seen for a comparison to count as able to see it."""
FARTHEST_EXTRAPOLATION = 10
"""A crossing farther away than this many times the run's length is not estimated."""

Curve = Sequence[tuple[float, float]]

MOT_ANCHOR = Anchor(
    source="the curves in the Mixture of Tokens authors' blog post",
    setting="4 layers of width 256, all of them mixtures of 512 experts, each arm at its own learning rate",
    measure="training loss in groups",
    tokens_per_step=65_536,
    behind_until_steps=[5_000, 10_000],
    behind_until_tokens=[327_680_000, 655_360_000],
    slower_until_steps=[10_000, 25_000],
    slower_until_tokens=[655_360_000, 1_638_400_000],
    end_steps=250_000,
    end_tokens=16_384_000_000,
    end_ratio_steps=3.97,
    end_ratio_seconds=3.20,
    replicated=False,
)
"""Where MoT overtook dense in the only published long curve: the yardstick for a budget that shows no crossing."""


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % Student t-interval; `low` and `high` are None for fewer than two values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None, n)
    # Not stats.t.interval, which has no answer where all values are equal.
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, n)


def smallest_visible(difference: Interval) -> float | None:
    """The smallest true difference that as many seeds with this scatter would have decided in four cases of five.

    Student's t: (t_0.975 + t_0.8) standard errors, with n - 1 degrees of freedom. None for fewer than two seeds.
    """
    if difference.high is None:
        return None
    free = difference.n - 1
    t = float(stats.t.ppf(0.5 + CONFIDENCE / 2, free))
    return (difference.high - difference.mean) * (1 + float(stats.t.ppf(POWER, free)) / t)


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Arm minus baseline over the seeds both have: mean, interval, n, and the value of each seed.

    Args:
        arm: loss by seed.
        baseline: loss by seed.

    Returns:
        None when the two share no seed.
    """
    seeds = sorted(set(arm) & set(baseline))
    if not seeds:
        return None
    values = [arm[seed] - baseline[seed] for seed in seeds]
    interval = mean_interval(values)
    return Difference(interval.mean, interval.low, interval.high, interval.n, seeds, values)


def first_reach(curve: Curve, target: float) -> float | None:
    """The step at which a curve first comes down to `target`, interpolated between evaluations; None if never."""
    previous: tuple[float, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if previous is None or previous[1] == loss:
                return float(step)
            return previous[0] + (step - previous[0]) * (previous[1] - target) / (previous[1] - loss)
        previous = (step, loss)
    return None


def loss_at(curve: Curve, step: float) -> float | None:
    """The loss of a curve at a step, interpolated; None before its first or after its last evaluation."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if before <= step <= after:
            return high + (low - high) * (step - before) / (after - before)
    return None


def speed_up(arm: Mapping[int, Curve], baseline: Mapping[int, Curve], *, seconds_ratio: float | None) -> SpeedUp | None:
    """How much sooner an arm reaches the baseline's final held-out loss, seed by seed.

    Args:
        arm: held-out curve by seed.
        baseline: held-out curve by seed, measured at the same steps on the same sequences.
        seconds_ratio: seconds a step of the arm over the baseline's, measured side by side.

    Returns:
        `ratio_steps` and `ratio_seconds`: geometric means over the seeds (above 1: sooner), None unless every seed
        reaches; `baseline_steps_to_arm_final`: the other way round. None when the two share no seed.
    """
    seeds = [seed for seed in sorted(set(arm) & set(baseline)) if arm[seed] and baseline[seed]]
    if not seeds:
        return None
    steps = [first_reach(arm[seed], baseline[seed][-1][1]) for seed in seeds]
    totals = [baseline[seed][-1][0] for seed in seeds]
    reached = [(total, step) for total, step in zip(totals, steps, strict=True) if step is not None]
    ratio_steps = ratio_seconds = None
    if len(reached) == len(seeds):
        logs = mean_interval([math.log(total / step) for total, step in reached])
        ratio_steps = _exponential(logs, 1.0)
        ratio_seconds = _exponential(logs, seconds_ratio) if seconds_ratio else None
    return SpeedUp(
        n=len(seeds),
        seeds=seeds,
        reached=len(reached),
        steps=steps,
        ratio_steps=ratio_steps,
        ratio_seconds=ratio_seconds,
        baseline_steps=totals[0],
        baseline_steps_to_arm_final=[first_reach(baseline[seed], arm[seed][-1][1]) for seed in seeds],
    )


def _exponential(logs: Interval, divisor: float) -> Interval:
    def end(log: float) -> float:
        return math.exp(log) / divisor

    low, high = (None if log is None else end(log) for log in (logs.low, logs.high))
    return Interval(end(logs.mean), low, high, logs.n)


def equal_cost_difference(
    arm: Mapping[int, Curve], baseline: Mapping[int, Curve], *, cost_ratio: float
) -> EqualCostDifference | None:
    """Arm minus baseline where the cheaper of the two ends: the same time, or FLOPs, instead of the same tokens.

    Args:
        arm: held-out curve by seed.
        baseline: held-out curve by seed.
        cost_ratio: seconds a step, or FLOPs a token, of the arm over the baseline's.

    Returns:
        A paired difference with `arm_step` and `baseline_step`; None where a curve does not cover the moment.
    """
    seeds = [seed for seed in sorted(set(arm) & set(baseline)) if arm[seed] and baseline[seed]]
    if not seeds:
        return None
    baseline_step = min(baseline[seeds[0]][-1][0], arm[seeds[0]][-1][0] * cost_ratio)
    arm_step = min(arm[seeds[0]][-1][0], baseline_step / cost_ratio)  # the division may round past the last step
    sides = [
        {seed: loss_at(curves[seed], step) for seed in seeds}
        for curves, step in ((arm, arm_step), (baseline, baseline_step))
    ]
    if any(value is None for side in sides for value in side.values()):
        return None
    first, second = ({seed: value for seed, value in side.items() if value is not None} for side in sides)
    difference = paired_difference(first, second)
    return (
        None
        if difference is None
        else EqualCostDifference(**vars(difference), arm_step=arm_step, baseline_step=baseline_step)
    )


def crossing(arm: Mapping[int, Curve], baseline: Mapping[int, Curve], *, tokens_per_step: float) -> Crossing | None:
    """Whether the gap between two arms is closing, and at which budget it would be zero.

    For each seed the gap (arm minus baseline) over the last half of the run is fitted as a + b ln(step). The gap is
    said to close or to widen only if the 95 % interval of b over the seeds lies on one side of zero.

    Returns:
        `status` is one of
        "one_seed", "few_points": no estimate is possible;
        "level": at the run's end the fitted gap's interval contains zero;
        "closing": `step` and `tokens` name the estimated crossing, `step_range` its spread over seeds;
        "too_far": closing, but the crossing lies beyond 10 times the run's length;
        "steady", "widening": the gap does not measurably close, or grows.
        None when the two share no seed.
    """
    gaps = {seed: _gap(arm[seed], baseline[seed]) for seed in sorted(set(arm) & set(baseline))}
    gaps = {seed: gap for seed, gap in gaps.items() if gap}
    if not gaps:
        return None
    end = max(gap[-1][0] for gap in gaps.values())
    late = {seed: [point for point in gap if point[0] >= end / 2] for seed, gap in gaps.items()}
    result = Crossing(
        status="one_seed",
        n=len(gaps),
        seeds=list(gaps),
        end_step=end,
        end_tokens=end * tokens_per_step,
        gap=mean_interval([gap[-1][1] for gap in gaps.values()]),
    )
    if min(len(points) for points in late.values()) < 3:
        return replace(result, status="few_points")
    fits = [_fit([(math.log(step), gap) for step, gap in points]) for points in late.values()]
    slope = mean_interval([slope for _, slope in fits])
    intercept = math.fsum(fit[0] for fit in fits) / len(fits)
    result = replace(
        result,
        gap=mean_interval([intercept + slope * math.log(end) for intercept, slope in fits]),
        slope_per_doubling=_scaled(slope, math.log(2)),
        fit=Fit(intercept, slope.mean, min(points[0][0] for points in late.values())),
    )
    if len(gaps) < 2:
        return result
    result = replace(result, status=_trend(result.gap, slope))
    return _with_crossing(result, fits, intercept, slope.mean) if result.status == "closing" else result


def _scaled(interval: Interval, factor: float) -> Interval:
    low, high = (None if end is None else end * factor for end in (interval.low, interval.high))
    return Interval(interval.mean * factor, low, high, interval.n)


def _gap(arm: Curve, baseline: Curve) -> list[tuple[float, float]]:
    other = dict(baseline)
    return [(step, loss - other[step]) for step, loss in arm if step in other and step > 0]


def _fit(points: Curve) -> tuple[float, float]:
    """Intercept and slope of the least-squares line."""
    x, y = zip(*points, strict=True)
    found: Any = stats.linregress(x, y)
    return float(found.intercept), float(found.slope)


def _trend(gap: Interval, slope: Interval) -> Trend:
    if _holds_zero(gap):
        return "level"
    if _holds_zero(slope):
        return "steady"
    return "closing" if (slope.mean > 0) != (gap.mean > 0) else "widening"


def _holds_zero(interval: Interval) -> bool:
    assert interval.low is not None and interval.high is not None, "there are several seeds"
    return interval.low <= 0 <= interval.high


def _with_crossing(found: Crossing, fits: list[tuple[float, float]], intercept: float, slope: float) -> Crossing:
    """Where the fitted line meets zero, unless that is too far away to say."""
    farthest = math.log(FARTHEST_EXTRAPOLATION * found.end_step)
    exponent = -intercept / slope
    if exponent > farthest:
        return replace(found, status="too_far")
    # A seed whose own slope points the other way crosses nowhere: its end of the range is open.
    exponents = [-a / b if b * slope > 0 else math.inf for a, b in fits]
    steps = [math.exp(value) if value <= farthest else None for value in (min(exponents), max(exponents))]
    tokens_per_step = found.end_tokens / found.end_step
    return replace(
        found,
        step=math.exp(exponent),
        tokens=math.exp(exponent) * tokens_per_step,
        step_range=steps,
        token_range=[None if step is None else step * tokens_per_step for step in steps],
    )


def write_longer(
    arms: Mapping[str, ArmSummary], others: Sequence[str], baseline: str, budget: Budget, yardstick: Yardstick
) -> list[str]:
    """Sentences on longer training, one or two for each of the `others`; nothing where no curve says anything."""
    judged = [arms[name] for name in others]
    sentences = [
        *_one_seed([arm.label for arm in judged if _status(arm) == "one_seed"], arms[baseline].label),
        *(
            _longer(arm.label, arms[baseline].label, arm.crossing, budget)
            for arm in judged
            if arm.crossing and _status(arm) != "one_seed"
        ),
        *_guess(judged),
        *_published(arms, budget, yardstick),
    ]
    return [*_about_loss(yardstick), *sentences] if sentences else []


def _about_loss(yardstick: Yardstick) -> list[str]:
    if yardstick.on_loss:
        return []
    name = yardstick.measure.name
    return [
        f"{capital(name)} is measured only at the end of a run: what follows is about the held-out loss, and where two "
        f"arms cross in loss they need not cross in {name}."
    ]


def _status(arm: ArmSummary) -> str | None:
    return arm.crossing.status if arm.crossing else None


def _one_seed(labels: Sequence[str], base: str) -> list[str]:
    if not labels:
        return []
    return [f"One seed gives no estimate of the budget at which {listing(labels, 'or')} would cross {base}."]


def _longer(label: str, base: str, found: Crossing, budget: Budget) -> str:
    """At which budget the arm and the baseline would cross, or why this data does not say."""
    names, status, slope = f"{label} and {base}", found.status, found.slope_per_doubling
    if status == "few_points" or slope is None:
        return f"Too few evaluations in the last half of the run to estimate where {names} would cross."
    rate = f"{number(abs(slope.mean))} nats each time the steps double"
    if status == "level":
        return (
            f"At the end of this run the curves of {names} cannot be separated: no crossing beyond it can be estimated."
        )
    if status == "steady":
        return (
            f"Over the last half of this run the gap between {names} neither closes nor widens measurably "
            f"({signed(slope.mean)} nats each time the steps double, 95{NBSP}% interval "
            f"{signed_interval(slope.low, slope.high)}): this data gives no budget at which they would cross."
        )
    if status == "widening":
        return f"The gap between {names} widens by {rate}: this data gives no budget at which they would cross."
    subject = (
        f"{start(label)} is closing on {base}" if found.gap.mean > 0 else (f"{start(label)}'s lead over {base} shrinks")
    )
    if found.tokens is None or found.token_range is None:
        return (
            f"{subject} by {rate}, but the crossing lies beyond {FARTHEST_EXTRAPOLATION} times this budget: too far to "
            "extrapolate, so this data gives no estimate."
        )
    low, high = found.token_range
    spread = f"{quantity(low)} to {quantity(high)}" if high else f"from {quantity(low)}, for one seed never"
    return (
        f"{subject} by {rate}. Extrapolated, the two cross at about {quantity(found.tokens)} tokens, "
        f"{number(found.tokens / budget.tokens, 1)} times this budget ({spread} over the seeds)."
    )


def _guess(arms: Sequence[ArmSummary]) -> list[str]:
    if not any(arm.crossing and arm.crossing.status == "closing" for arm in arms):
        return []
    return [
        "Such a crossing is a guess, not a measurement: a cosine schedule is tied to its length, so a point on the way "
        "is no finished run of that budget. Only a longer run can tell."
    ]


def _published(arms: Mapping[str, ArmSummary], budget: Budget, yardstick: Yardstick) -> list[str]:
    """The published curve that says when MoT overtook dense, beside this run's budget."""
    if not yardstick.from_scratch or not any(arm.family == "mixture_of_tokens" for arm in arms.values()):
        return []
    anchor = MOT_ANCHOR
    first, last = anchor.behind_until_tokens
    share = percent(budget.tokens / first, 1 if budget.tokens > 5e-3 * first else 2)
    return [
        "The only published long curve of MoT, its authors' own, is behind dense until between "
        f"{anchor.behind_until_steps[0]:,} and {anchor.behind_until_steps[1]:,} steps of "
        f"{anchor.tokens_per_step:,} tokens ({first / 1e9:.2f} to {last / 1e9:.2f}{NBSP}billion tokens) and needs "
        f"{number(anchor.end_ratio_steps, 1)} times fewer steps at {anchor.end_steps:,} "
        f"({anchor.measure}; {anchor.setting}). This budget is {share} of {first / 1e9:.2f}{NBSP}billion tokens. "
        "No independent replication of that speed-up has been found."
    ]
