"""The headline: what the rule says, in a few words that a reader takes in at one glance.

The verdict's other sentences (see `verdict.py`) have the budget, the intervals and the price.
"""

from collections.abc import Mapping, Sequence

from mixtura.report.measures import Yardstick
from mixtura.report.wording import TIMES, listing, margin, number, start
from mixtura.results import ArmSummary
from mixtura.results.conclusions import Outcome

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
