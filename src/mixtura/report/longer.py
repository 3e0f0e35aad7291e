"""What a comparison says of longer training: trends of the gap to the baseline, and the published curve of MoT."""

from collections.abc import Mapping, Sequence

from mixtura.report.measures import Yardstick
from mixtura.report.significance import FARTHEST_EXTRAPOLATION, MOT_ANCHOR
from mixtura.report.wording import NBSP, capital, listing, number, percent, quantity, signed, signed_interval, start
from mixtura.results import ArmSummary
from mixtura.results.conclusions import Budget, Crossing


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
