"""The verdict: a rule fixed before any number is known, what it says of each arm, and the sentences that say so.

The rule compares arms by the task's measure in the mode they would be deployed in, never as in training groups.
It works on the summary's arms (see `summary.py`): numbers in, words out, nothing is measured here.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from mixtura.report.measures import Yardstick, written_amount, written_value
from mixtura.report.significance import FARTHEST_EXTRAPOLATION, MOT_ANCHOR, paired_difference
from mixtura.report.wording import (
    NBSP,
    capital,
    compact,
    count,
    digits_for,
    interval,
    listing,
    memory,
    number,
    percent,
    quantity,
    signed,
)
from mixtura.results import ArmSummary, Interval, Measure
from mixtura.results.conclusions import Budget, Crossing, Difference, Outcome, Pair, SpeedUp, Verdict


def write_rule(measure: Measure) -> str:
    """The rule in words, for the verdict's measure."""
    unit = f", in {measure.unit}" if measure.unit else ""
    wins, loses = ("below", "above") if measure.better == "lower" else ("above", "below")
    return (
        f"Arms are compared by their {measure.name} as deployed{unit}. An arm beats the baseline if the "
        f"95{NBSP}% interval of the difference, paired by seed, lies {wins} zero, loses if it lies {loses} zero, and "
        "draws otherwise. One seed gives no verdict. Arms that cannot be deployed, see the future or diverged are left "
        "out."
    )


def judge_difference(difference: Interval | None, *, better: Literal["lower", "higher"] = "lower") -> Outcome:
    """The rule for one paired difference: "beats", "loses", "draw" or "one_seed"; "excluded" where there is none."""
    if difference is None:
        return "excluded"
    if difference.low is None or difference.high is None:
        return "one_seed"
    below, above = _SIDES[better]
    return below if difference.high < 0 else above if difference.low > 0 else "draw"


_SIDES: dict[str, tuple[Outcome, Outcome]] = {"lower": ("beats", "loses"), "higher": ("loses", "beats")}
"""What an interval below zero says, and one above."""


@dataclass(frozen=True)
class Judgement:
    """What the rule says of all arms."""

    outcomes: dict[str, Outcome]
    pairs: list[Pair]
    leader: str | None
    """The arm with the best mean."""
    tied: list[str]
    """The arms that the leader does not beat."""
    best: str | None
    """The arm that beats all others."""


def judge(arms: dict[str, ArmSummary], baseline: str, measure: Measure) -> Judgement:
    """Applies the rule to every arm and every pair of arms; the arms' own `outcome` is not looked at."""
    able = [name for name, arm in arms.items() if arm.excluded is None]
    scores = {name: _deployed_values(arms[name], measure) for name in able}
    pairs = []
    for first, second in itertools.combinations(able, 2):
        difference = paired_difference(scores[first], scores[second])
        pairs.append(Pair(first, second, difference, judge_difference(difference, better=measure.better)))
    outcomes: dict[str, Outcome] = {
        name: judge_difference(arms[name].difference.deployed, better=measure.better) if name in able else "excluded"
        for name in arms
    }
    outcomes[baseline] = "baseline" if baseline in able else "excluded"
    means = {name: arms[name].score.deployed for name in able}
    foremost = min if measure.better == "lower" else max
    leader = foremost(means, key=lambda name: means[name] or 0.0, default=None)
    tied = [] if leader is None else [name for name in able if name != leader and not _beats(pairs, leader, name)]
    return Judgement(outcomes, pairs, leader, tied, best=leader if len(able) > 1 and not tied else None)


def _deployed_values(arm: ArmSummary, measure: Measure) -> dict[int, float]:
    """The verdict's measure by seed, of an arm that takes part."""
    assert arm.deployed_mode is not None
    values = zip(arm.seeds, arm.modes[arm.deployed_mode][measure.key].values, strict=True)
    return {seed: value for seed, value in values if value is not None}


def _beats(pairs: list[Pair], winner: str, loser: str) -> bool:
    wanted = {(winner, loser): "beats", (loser, winner): "loses"}
    return any(wanted.get((pair.arm, pair.against)) == pair.outcome for pair in pairs)


def write_verdict(
    arms: dict[str, ArmSummary], judged: Judgement, baseline: str, budget: Budget, stick: Yardstick
) -> Verdict:
    """The sentences at the top of the report, from the judged arms.

    `headline` is one sentence, after another where FLOPs are not equal; `answer` says which arm this data and budget
    ask for; `speed` and `longer` have a sentence or two an arm on training time and on longer training.
    """
    others = [name for name in arms if name != baseline and judged.outcomes[name] != "excluded"]
    # Our own favourite is told first when it loses: nobody should have to look for that.
    others.sort(key=lambda name: not (arms[name].family == "mixture_of_tokens" and _behind(arms[name], stick)))
    longer = [
        *(
            _longer(arms[name].label, arms[baseline].label, found, budget)
            for name in others
            if (found := arms[name].crossing)
        ),
        *_guess([arms[name] for name in others]),
        *_published(arms, budget, stick),
    ]
    return Verdict(
        headline=_unequal(arms, others, baseline, stick) + _headline(arms, judged, others, baseline, budget, stick),
        answer=_answer(arms, judged, baseline, stick),
        speed=[
            _speed(arms[name].label, arms[baseline].label, speed) for name in others if (speed := arms[name].speed_up)
        ],
        longer=[*_about_loss(stick), *longer] if longer else [],
        best=judged.best,
        leader=judged.leader,
        tied=judged.tied,
    )


def _unequal(arms: dict[str, ArmSummary], others: list[str], baseline: str, stick: Yardstick) -> str:
    """Says which arms cost another number of FLOPs than the baseline; nothing where all are matched."""
    dearer = [arms[name] for name in others if stick.unmatched(arms[name].flops_ratio)]
    if not dearer:
        return ""
    costs = listing([f"{arm.label} costs {number(arm.flops_ratio, 2)}" for arm in dearer])
    return f"Equal steps, not equal FLOPs: a token of {costs} times one of {arms[baseline].label}. "


def _about_loss(stick: Yardstick) -> list[str]:
    if stick.on_loss:
        return []
    name = stick.measure.name
    return [
        f"{capital(name)} is measured only at the end of a run: what follows is about the held-out loss, and where two "
        f"arms cross in loss they need not cross in {name}."
    ]


def _behind(arm: ArmSummary, stick: Yardstick) -> bool:
    return stick.behind(_difference(arm).mean)


def _difference(arm: ArmSummary) -> Difference:
    """To the baseline as deployed, of an arm that the rule judged."""
    assert arm.difference.deployed is not None, f"{arm.label} was not compared with the baseline"
    return arm.difference.deployed


def _headline(
    arms: dict[str, ArmSummary],
    judged: Judgement,
    others: list[str],
    baseline: str,
    budget: Budget,
    stick: Yardstick,
) -> str:
    base, outcomes = arms[baseline].label, judged.outcomes
    if outcomes[baseline] == "excluded":
        return f"No verdict: the baseline, {base}, takes no part in it, so there is nothing to compare with."
    if not others:
        return f"No verdict: {base} is the only arm that can be compared."
    size = f"{quantity(budget.tokens)} training tokens"
    if any(outcomes[name] == "one_seed" for name in others):
        clauses = [_single(arms[name], base, stick.measure, unit=name == others[0]) for name in others]
        again = "it" if len(clauses) == 1 else "any of it"
        return f"One seed cannot decide: after {size} {listing(clauses)}, and another seed may reverse {again}."
    decided = [name for name in others if outcomes[name] in ("loses", "beats")]
    won = listing([_decided(arms[n], base, outcomes[n], stick.measure, unit=n == decided[0]) for n in decided])
    draws = ", nor ".join(_draw(arms[name], base, stick.measure) for name in others if outcomes[name] == "draw")
    size += f" and {count(budget.seeds, 'seed')}"
    if not draws:
        rates = "" if budget.rates_settled else " at these learning rates"
        return f"{capital(won)}: decided for {size}{rates}, open for longer training."
    if not decided:
        return f"No winner: {size} cannot tell {draws}; longer training is open."
    return f"{capital(won)}; {size} cannot tell {draws}, and longer training is open."


def _single(arm: ArmSummary, base: str, measure: Measure, *, unit: bool) -> str:
    mean = _difference(arm).mean
    return f"{arm.label} ended {written_amount(measure, mean, unit=unit)} {'above' if mean > 0 else 'below'} {base}"


def _decided(arm: ArmSummary, base: str, outcome: str, measure: Measure, *, unit: bool) -> str:
    amount = written_amount(measure, _difference(arm).mean, unit=unit)
    return f"{arm.label} {'loses to' if outcome == 'loses' else 'beats'} {base} by {amount}"


def _draw(arm: ArmSummary, base: str, measure: Measure) -> str:
    return f"{arm.label} from {base} ({difference_words(arm.difference.deployed, digits=measure.digits)})"


def difference_words(difference: Interval | None, *, digits: int = 3) -> str:
    """A difference with its interval, in words: "-0.050, 95 % interval -0.071 to -0.029"; `digits` or more decimals."""
    if difference is None:
        return "no difference could be computed"
    digits = digits_for(difference.mean, difference.low, difference.high, least=digits)
    mean = signed(difference.mean, digits)
    if difference.low is None:
        return f"{mean}, one seed"
    return f"{mean}, 95{NBSP}% interval {interval(difference.low, difference.high, digits)}"


def _answer(arms: dict[str, ArmSummary], judged: Judgement, baseline: str, stick: Yardstick) -> str | None:
    """Which arm this data and budget ask for, and its price; None where the rule gives no verdict."""
    kinds = set(judged.outcomes.values())
    if "one_seed" in kinds or judged.leader is None or not judged.pairs or judged.outcomes[baseline] == "excluded":
        return None
    leader, base, measure = arms[judged.leader], arms[baseline], stick.measure
    if judged.best is None:
        return _tie(leader, [arms[name] for name in judged.tied], stick)
    value = written_value(measure, leader.score.deployed)
    if judged.best == baseline:
        return f"For this data and budget the answer is {base.label}: {value} as deployed{_own_price(base, stick)}."
    against = number(base.score.deployed, measure.digits)
    return (
        f"For this data and budget the answer is {leader.label}: {value} as deployed, against "
        f"{against} for {base.label}. Its price: {_price(leader, base, stick)}{_at_equal_cost(leader, base, stick)}."
    )


def _tie(leader: ArmSummary, tied: list[ArmSummary], stick: Yardstick) -> str:
    measure = stick.measure
    foremost = f"{'lowest' if measure.better == 'lower' else 'highest'} mean {stick.short}"
    fastest = min([leader, *tied], key=lambda arm: arm.seconds_ratio or 1.0)
    text = (
        f"This budget names no single best arm: {leader.label} has the {foremost} as deployed, "
        f"{number(leader.score.deployed, measure.digits)}, but {listing([arm.label for arm in tied])} cannot "
        f"be told apart from it. Among these, {fastest.label} takes the least time a step"
    )
    if stick.task == "pretraining":
        return f"{text}."
    smallest = min([leader, *tied], key=lambda arm: arm.parameters_trainable)
    lightest = min([leader, *tied], key=lambda arm: arm.peak_memory_bytes or 0)
    return (
        f"{text}, {smallest.label} trains the fewest parameters ({compact(smallest.parameters_trainable)}), and "
        f"{lightest.label} needs the least memory ({memory(lightest.peak_memory_bytes)})."
    )


def _own_price(base: ArmSummary, stick: Yardstick) -> str:
    """What the baseline costs when it is the answer; pretraining's other arms are matched to it."""
    if stick.task == "pretraining":
        return ""
    return (
        f". It trains {compact(base.parameters_trainable)} of {compact(base.parameters_total)} parameters and "
        f"needs {memory(base.peak_memory_bytes)} while training"
    )


def _price(arm: ArmSummary, base: ArmSummary, stick: Yardstick) -> str:
    time = f"{number(arm.seconds_ratio, 2)} times the time a step"
    if stick.task == "pretraining":
        sizes = [compact(side.parameters_total) for side in (arm, base)]
        flops = f", {number(arm.flops_ratio, 2)} times the FLOPs a token" if stick.unmatched(arm.flops_ratio) else ""
        return f"{sizes[0]} parameters in memory instead of {sizes[1]}{flops}, and {time}"
    trained = [compact(side.parameters_trainable) for side in (arm, base)]
    peaks = [memory(side.peak_memory_bytes) for side in (arm, base)]
    return (
        f"{trained[0]} trained parameters instead of {trained[1]}, {time}, and {peaks[0]} of memory while training "
        f"instead of {peaks[1]}"
    )


def _at_equal_cost(arm: ArmSummary, base: ArmSummary, stick: Yardstick) -> str:
    text = ""
    for difference, cost in ((arm.equal_flops, "equal training FLOPs"), (arm.equal_time, "equal training time")):
        said = _EQUAL_COST.get(judge_difference(difference))
        if said is None:
            continue
        about = f". At {cost} it {said}"
        if not stick.on_loss:
            about = f". In held-out loss at {cost} it {said.removeprefix('still ')}"
        text += f"{about} {base.label} ({difference_words(difference)})"
    return text


_EQUAL_COST = {"beats": "still beats", "loses": "loses to", "draw": "draws with"}


def _speed(label: str, base: str, speed: SpeedUp) -> str:
    if speed.ratio_steps is None:
        text = f"{capital(label)} does not reach {base}'s final loss"
        text += f" in {speed.n - speed.reached} of {count(speed.n, 'seed')}" if speed.reached else ""
        back = [step for step in speed.baseline_steps_to_arm_final if step is not None]
        if back and len(back) == speed.n:
            mean = sum(back) / len(back)
            text += f"; {base} passes {label}'s after {mean:.0f} of {speed.baseline_steps:.0f} steps"
        return f"{text}."
    steps, seconds = speed.ratio_steps.mean, speed.ratio_seconds
    text = f"{capital(label)} reaches {base}'s final loss in {_sooner(steps, 'steps')}"
    if seconds is None:
        return f"{text}."
    joined = " and" if (steps >= 1) == (seconds.mean >= 1) else ", but in"
    return f"{text}{joined} {_sooner(seconds.mean, 'time')}."


def _sooner(ratio: float, noun: str) -> str:
    """A speed-up in words: below one it is a slow-down and is called so."""
    fewer = {"steps": ("fewer", "more"), "time": ("less", "more")}[noun][ratio < 1]
    return f"{number(ratio if ratio >= 1 else 1 / ratio, 2)} times {fewer} {noun}"


def _longer(label: str, base: str, found: Crossing, budget: Budget) -> str:
    """At which budget the arm and the baseline would cross, or why this data does not say."""
    names, status, slope = f"{label} and {base}", found.status, found.slope_per_doubling
    if status == "one_seed":
        return f"One seed gives no estimate of the budget at which {names} would cross."
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
            f"{interval(slope.low, slope.high)}): this data gives no budget at which they would cross."
        )
    if status == "widening":
        return f"The gap between {names} widens by {rate}: this data gives no budget at which they would cross."
    subject = (
        f"{capital(label)} is closing on {base}"
        if found.gap.mean > 0
        else (f"{capital(label)}'s lead over {base} shrinks")
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


def _guess(arms: list[ArmSummary]) -> list[str]:
    if not any(arm.crossing and arm.crossing.status == "closing" for arm in arms):
        return []
    return [
        "Such a crossing is a guess, not a measurement: a cosine schedule is tied to its length, so a point on the way "
        "is no finished run of that budget. Only a longer run can tell."
    ]


def _published(arms: dict[str, ArmSummary], budget: Budget, stick: Yardstick) -> list[str]:
    """The published curve that says when MoT overtook dense, beside this run's budget."""
    if not stick.from_scratch or not any(arm.family == "mixture_of_tokens" for arm in arms.values()):
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
