"""The verdict: a rule fixed before any number is known, what it says of each arm, and the sentences that say so.

The rule compares arms by the task's measure in the mode they would be deployed in, never as in training groups.
It works on the summary's arms (see `summary.py`): numbers in, words out, nothing is measured here.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mixtura.report.significance import paired_difference, write_longer
from mixtura.report.wording import (
    NBSP,
    TIMES,
    Yardstick,
    compact,
    count,
    digits_for,
    is_zero,
    listing,
    margin,
    memory,
    number,
    quantity,
    signed,
    signed_interval,
    start,
    written_amount,
    written_value,
)
from mixtura.results import ArmSummary, Interval, Measure
from mixtura.results.conclusions import Budget, Difference, Outcome, Pair, SpeedUp, Verdict

_MOST_NAMED = 2
"""With more arms than these beside the baseline, only the best is given with its number."""


def write_headline(
    arms: Mapping[str, ArmSummary],
    outcomes: Mapping[str, Outcome],
    others: Sequence[str],
    baseline: str,
    yardstick: Yardstick,
) -> str:
    """The headline.

    Args:
        arms: the summary's, by name.
        outcomes: what the rule says of each.
        others: the judged arms besides the baseline, in the order in which they are named.
        baseline: its name.
        yardstick: what they are judged by.
    """
    base = arms[baseline].label
    if outcomes[baseline] == "excluded":
        return f"No verdict: {base} is left out"
    if not others:
        return f"No verdict: nothing to compare with {base}"
    if any(outcomes[name] == "one_seed" for name in others):
        return "No verdict: one seed"
    decided = [name for outcome in ("beats", "loses") for name in others if outcomes[name] == outcome]
    draws = [name for name in others if outcomes[name] == "draw"]
    if not decided:
        return f"No winner: {_names(arms, draws)} {_verb('draw', draws)} with {base}"
    numbered = decided if len(others) <= _MOST_NAMED else [_best(arms, decided, yardstick)]
    clauses = [_clause(arms[name], outcomes[name], base if name == numbered[0] else "", yardstick) for name in numbered]
    for outcome in ("beats", "loses", "draw"):
        left = [name for name in others if outcomes[name] == outcome and name not in numbered]
        if left:
            clauses.append(f"{_names(arms, left)} {_verb(outcome, left)}")
    first = arms[numbered[0]].label
    return start(first) + "; ".join(clauses).removeprefix(first)


def _best(arms: Mapping[str, ArmSummary], decided: Sequence[str], yardstick: Yardstick) -> str:
    foremost = min if yardstick.measure.better == "lower" else max
    return foremost(decided, key=lambda name: arms[name].score.deployed or 0.0)


def _clause(arm: ArmSummary, outcome: Outcome, base: str, yardstick: Yardstick) -> str:
    """One arm with its number: "MoT loses to dense by 0.118 ± 0.010"; `base` is empty where it was named before."""
    difference, measure = arm.difference.deployed, yardstick.measure
    assert difference is not None, f"{arm.label} was not compared with the baseline"
    amount = margin(difference, least=measure.digits)
    amount += f" {'points' if measure.unit == '%' else measure.unit}" if measure.unit in ("%", "points") else ""
    dearer = f" at {number(arm.flops_ratio, 2)}{TIMES} its FLOPs" if yardstick.unmatched(arm.flops_ratio) else ""
    if outcome == "beats":
        return f"{arm.label} beats {base or 'it'} by {amount}{dearer}"
    return f"{arm.label} loses{f' to {base}' if base else ''} by {amount}{dearer}"


def _names(arms: Mapping[str, ArmSummary], names: Sequence[str]) -> str:
    if len(names) > _MOST_NAMED:
        return f"{len(names)} arms"
    return listing([arms[name].label for name in names])


def _verb(outcome: Outcome, names: Sequence[str]) -> str:
    """The outcome as a verb, which agrees with how many arms it is about."""
    many = {"beats": "beat it", "loses": "lose", "draw": "draw"}
    single = {"beats": "beats it", "loses": "loses", "draw": "draws"}
    return (many if len(names) > 1 else single)[outcome]


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
    arms: dict[str, ArmSummary], judged: Judgement, baseline: str, budget: Budget, yardstick: Yardstick
) -> Verdict:
    """The sentences at the top of the report, from the judged arms.

    `headline` is a few words; `finding` the same in a sentence with the budget, after another where FLOPs are not
    equal; `answer` says which arm this data and budget
    ask for; `speed` and `longer` have a sentence or two an arm on training time and on longer training.
    """
    others = [name for name in arms if name != baseline and judged.outcomes[name] != "excluded"]
    # Our own favourite comes first when it loses, so that nobody has to look for that.
    others.sort(key=lambda name: not (arms[name].family == "mixture_of_tokens" and _behind(arms[name], yardstick)))
    return Verdict(
        headline=write_headline(arms, judged.outcomes, others, baseline, yardstick),
        finding=_unequal(arms, others, baseline, yardstick)
        + _finding(arms, judged, others, baseline, budget, yardstick),
        answer=_answer(arms, judged, baseline, yardstick),
        speed=[
            _speed(arms[name].label, arms[baseline].label, speed) for name in others if (speed := arms[name].speed_up)
        ],
        longer=write_longer(arms, others, baseline, budget, yardstick),
        best=judged.best,
        leader=judged.leader,
        tied=judged.tied,
    )


def _unequal(arms: dict[str, ArmSummary], others: list[str], baseline: str, yardstick: Yardstick) -> str:
    """Says which arms cost another number of FLOPs than the baseline; nothing where all are matched."""
    dearer = [arms[name] for name in others if yardstick.unmatched(arms[name].flops_ratio)]
    if not dearer:
        return ""
    costs = listing([f"{arm.label} costs {number(arm.flops_ratio, 2)}" for arm in dearer])
    return f"Equal steps, not equal FLOPs: a token of {costs} times one of {arms[baseline].label}. "


def _behind(arm: ArmSummary, yardstick: Yardstick) -> bool:
    return yardstick.behind(_difference(arm).mean)


def _difference(arm: ArmSummary) -> Difference:
    """To the baseline as deployed, of an arm that the rule judged."""
    assert arm.difference.deployed is not None, f"{arm.label} was not compared with the baseline"
    return arm.difference.deployed


def _finding(
    arms: dict[str, ArmSummary],
    judged: Judgement,
    others: list[str],
    baseline: str,
    budget: Budget,
    yardstick: Yardstick,
) -> str:
    base, outcomes = arms[baseline].label, judged.outcomes
    if outcomes[baseline] == "excluded":
        return f"No verdict: the baseline, {base}, takes no part in it, so there is nothing to compare with."
    if not others:
        return f"No verdict: {base} is the only arm that can be compared."
    size = f"{quantity(budget.tokens)} training tokens"
    if any(outcomes[name] == "one_seed" for name in others):
        clauses = [_single(arms[name], base, yardstick.measure, unit=name == others[0]) for name in others]
        again = "it" if len(clauses) == 1 else "any of it"
        return f"One seed cannot decide: after {size} {listing(clauses)}, and another seed may reverse {again}."
    decided = [name for name in others if outcomes[name] in ("loses", "beats")]
    won = listing([_decided(arms[n], base, outcomes[n], yardstick.measure, unit=n == decided[0]) for n in decided])
    first = arms[decided[0]].label if decided else ""
    won = start(first) + won.removeprefix(first)
    draws = ", nor ".join(_draw(arms[name], base, yardstick.measure) for name in others if outcomes[name] == "draw")
    size += f" and {count(budget.seeds, 'seed')}"
    if not draws:
        rates = "" if budget.rates_settled else " at these learning rates"
        return f"{won}: decided for {size}{rates}, open for longer training."
    if not decided:
        return f"No winner: {size} cannot tell {draws}; longer training is open."
    return f"{won}; {size} cannot tell {draws}, and longer training is open."


def _single(arm: ArmSummary, base: str, measure: Measure, *, unit: bool) -> str:
    mean = _difference(arm).mean
    if not mean:
        return f"{arm.label} ended equal to {base}"
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
    if is_zero(difference):
        return "equal"
    digits = digits_for(difference.mean, difference.low, difference.high, least=digits)
    mean = signed(difference.mean, digits)
    if difference.low is None:
        return f"{mean}, one seed"
    return f"{mean}, 95{NBSP}% interval {signed_interval(difference.low, difference.high, digits)}"


def _answer(arms: dict[str, ArmSummary], judged: Judgement, baseline: str, yardstick: Yardstick) -> str | None:
    """Which arm this data and budget ask for, and its price; None where the rule gives no verdict."""
    kinds = set(judged.outcomes.values())
    if "one_seed" in kinds or judged.leader is None or not judged.pairs or judged.outcomes[baseline] == "excluded":
        return None
    leader, base, measure = arms[judged.leader], arms[baseline], yardstick.measure
    if judged.best is None:
        return _tie(leader, [arms[name] for name in judged.tied], yardstick)
    value = written_value(measure, leader.score.deployed)
    if judged.best == baseline:
        return f"For this data and budget the answer is {base.label}: {value} as deployed{_own_price(base, yardstick)}."
    against = number(base.score.deployed, measure.digits)
    return (
        f"For this data and budget the answer is {leader.label}: {value} as deployed, against "
        f"{against} for {base.label}. Its price: {_price(leader, base, yardstick)}"
        f"{_at_equal_cost(leader, base, yardstick)}."
    )


def _tie(leader: ArmSummary, tied: list[ArmSummary], yardstick: Yardstick) -> str:
    measure, arms = yardstick.measure, [leader, *tied]
    foremost = f"{'lowest' if measure.better == 'lower' else 'highest'} mean {yardstick.short}"
    merits = [(min(arms, key=lambda arm: arm.seconds_ratio or 1.0), "takes the least time a step")]
    if yardstick.task != "pretraining":
        smallest = min(arms, key=lambda arm: arm.parameters_trainable)
        lightest = min(arms, key=lambda arm: arm.peak_memory_bytes or 0)
        merits += [
            (smallest, f"trains the fewest parameters ({compact(smallest.parameters_trainable)})"),
            (lightest, f"needs the least memory ({memory(lightest.peak_memory_bytes)})"),
        ]
    by_label: dict[str, list[str]] = {}
    for arm, merit in merits:
        by_label.setdefault(arm.label, []).append(merit)
    return (
        f"This budget names no single best arm: {leader.label} has the {foremost} as deployed, "
        f"{number(leader.score.deployed, measure.digits)}, but the seeds do not separate "
        f"{listing([arm.label for arm in tied], 'or')} from it. Among these, "
        f"{listing([f'{label} {listing(of)}' for label, of in by_label.items()])}."
    )


def _own_price(base: ArmSummary, yardstick: Yardstick) -> str:
    """What the baseline costs when it is the answer; pretraining's other arms are matched to it."""
    if yardstick.task == "pretraining":
        return ""
    return (
        f". It trains {compact(base.parameters_trainable)} of {compact(base.parameters_total)} parameters and "
        f"needs {memory(base.peak_memory_bytes)} while training"
    )


def _price(arm: ArmSummary, base: ArmSummary, yardstick: Yardstick) -> str:
    time = f"{number(arm.seconds_ratio, 2)} times the time a step"
    if yardstick.task == "pretraining":
        sizes = [compact(side.parameters_total) for side in (arm, base)]
        flops = (
            f", {number(arm.flops_ratio, 2)} times the FLOPs a token" if yardstick.unmatched(arm.flops_ratio) else ""
        )
        return f"{sizes[0]} parameters in memory instead of {sizes[1]}{flops}, and {time}"
    trained = [compact(side.parameters_trainable) for side in (arm, base)]
    peaks = [memory(side.peak_memory_bytes) for side in (arm, base)]
    return (
        f"{trained[0]} trained parameters instead of {trained[1]}, {time}, and {peaks[0]} of memory while training "
        f"instead of {peaks[1]}"
    )


def _at_equal_cost(arm: ArmSummary, base: ArmSummary, yardstick: Yardstick) -> str:
    text = ""
    for difference, cost in ((arm.equal_flops, "equal training FLOPs"), (arm.equal_time, "equal training time")):
        words = _EQUAL_COST.get(judge_difference(difference))
        if words is None:
            continue
        about = f". At {cost} it {words}"
        if not yardstick.on_loss:
            about = f". In held-out loss at {cost} it {words.removeprefix('still ')}"
        text += f"{about} {base.label} ({difference_words(difference)})"
    return text


_EQUAL_COST = {"beats": "still beats", "loses": "loses to", "draw": "draws with"}


def _speed(label: str, base: str, speed: SpeedUp) -> str:
    if speed.ratio_steps is None:
        text = f"{start(label)} does not reach {base}'s final loss"
        text += f" in {speed.n - speed.reached} of {count(speed.n, 'seed')}" if speed.reached else ""
        back = [step for step in speed.baseline_steps_to_arm_final if step is not None]
        if back and len(back) == speed.n:
            mean = sum(back) / len(back)
            text += f"; {base} passes {label}'s after {mean:.0f} of {speed.baseline_steps:.0f} steps"
        return f"{text}."
    steps, seconds = speed.ratio_steps.mean, speed.ratio_seconds
    text = f"{start(label)} reaches {base}'s final loss in {_sooner(steps, 'steps')}"
    if seconds is None:
        return f"{text}."
    joined = " and" if (steps >= 1) == (seconds.mean >= 1) else ", but in"
    return f"{text}{joined} {_sooner(seconds.mean, 'time')}."


def _sooner(ratio: float, noun: str) -> str:
    """A speed-up in words: below one it is a slow-down and is called so."""
    if number(ratio, 2) == "1.00":
        return {"steps": "as many steps", "time": "the same time"}[noun]
    fewer = {"steps": ("fewer", "more"), "time": ("less", "more")}[noun][ratio < 1]
    return f"{number(ratio if ratio >= 1 else 1 / ratio, 2)} times {fewer} {noun}"
