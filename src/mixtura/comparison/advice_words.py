"""What advice says, in words and in columns; `mixtura.planning.advice` has the numbers."""

from mixtura.planning.advice import Advice, ArmAdvice, Expected, Payoff
from mixtura.planning.evidence import Evidence
from mixtura.report.wording import (
    NBSP,
    NONE,
    compact,
    count,
    memory,
    number,
    quantity,
    signed,
    signed_interval,
    start,
    times,
)

DECIDED, LIKELY = "decided", "likely"
_LIKELY = 0.9


def headline(advice: Advice) -> str:
    """The answer in one sentence."""
    question, best = advice.question, advice.best
    where = f"at width {question.width} and {quantity(question.tokens)} tokens"
    if best.refused is not None:
        return f"No family fits {memory(question.memory)} {where}: even the best here {best.refused}."
    found = best.at_equal_flops
    if found is None:
        return f"Train dense: {where} no mixture is expected to be ahead of it at equal FLOPs."
    sure = {DECIDED: "is expected to be", LIKELY: "is likely to be"}.get(certainty(found), "may be")
    gain = f"{number(-found.mean)} nats ahead of dense at equal FLOPs"
    return f"{start(best.label)} {sure} {gain} {where}{_in_time(best.at_equal_seconds)}."


def _in_time(found: Expected | None) -> str:
    if found is None:
        return ""
    side = "ahead" if found.mean < 0 else "behind"
    return f", and {number(abs(found.mean))} {side} at equal seconds"


def certainty(found: Expected) -> str:
    """How sure a difference is: "decided" if its interval leaves zero out, "likely" from 9 in 10 on, else "open"."""
    if found.decided:
        return DECIDED
    return LIKELY if max(found.ahead, 1 - found.ahead) >= _LIKELY else "open"


def difference(found: Expected | None) -> str:
    """A difference with its interval: "-0.052 (-0.071 to -0.033)"; an en dash where there is none."""
    if found is None:
        return NONE
    return f"{signed(found.mean)} ({signed_interval(found.low, found.high)})"


def payoff(found: Payoff | None) -> str:
    """From which budget an arm pays: "from 2.1 M", "from the smallest measured", "not below 300 M"."""
    if found is None:
        return NONE
    if found.tokens is None:
        return f"not below {compact(found.farthest)}"
    return "at every budget measured" if found.always else f"from {compact(found.tokens)}"


def dense_loss(arm: ArmAdvice) -> str:
    """With what share of dense's tokens and time it has dense's loss: "0.62x tokens, 0.75x time"."""
    if arm.pays_flops is None:
        return NONE
    if arm.dense_loss_at is None:
        return "not in ten times"
    return f"{times(arm.dense_loss_at)} tokens, {times(arm.dense_loss_at * arm.step_ratio)} time"


def stands_on(arm: ArmAdvice) -> str:
    """The runs behind an arm: "12 results, 3 seeds, 1.00 M to 10.0 M tokens, width 64"."""
    widths = ", ".join(map(str, arm.widths))
    low, high = (compact(tokens) for tokens in arm.budgets)
    budgets = low if low == high else f"{low} to {high}"
    return f"{count(arm.runs, 'result')}, {count(arm.seeds, 'seed')}, {budgets} tokens, width {widths}"


def cautions(advice: Advice, evidence: Evidence) -> list[str]:
    """What to know before believing it."""
    setting = evidence.setting
    found = [f"Extrapolated: {reason}." for reason in advice.extrapolated]
    thin = [arm.label for arm in advice.arms if arm.seeds < 2]
    if thin:
        found.append(f"One seed only: {', '.join(thin)}; how much seeds scatter is taken from other runs.")
    single = [arm.label for arm in advice.arms if arm.budgets[0] == arm.budgets[1]]
    if single:
        found.append(f"One budget only: {', '.join(single)}; their difference is taken to be the same at others.")
    if advice.law_error is None:
        found.append("Too few budgets to predict the longest runs from shorter ones, so the law is untested.")
    else:
        found.append(
            f"Predicting the longest runs from the shorter ones, the law missed differences to dense by "
            f"{number(advice.law_error)} nats (root mean square); beyond the measured budgets intervals widen by that."
        )
    found.append(
        f"Measured with {setting.experts} experts (top {setting.top_k}, groups of {setting.group_size}), "
        f"{setting.layers} layers, {setting.vocabulary} tokens of vocabulary, on {setting.text}; other text, sizes and "
        "numbers of experts are not in it."
    )
    found.append(f"Time was measured on {setting.machine}: on other hardware a step's ratio differs.")
    return found


def console_lines(advice: Advice, evidence: Evidence) -> list[str]:
    """The answer for a terminal."""
    head = [
        "family",
        "equal FLOPs, nats to dense",
        "equal seconds",
        "sure",
        "dense's loss at",
        "pays (FLOPs)",
        "pays (seconds)",
        "step",
    ]
    rows = [[*head, "training memory"], *(_cells(arm) for arm in advice.arms)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    standing = [f"  {arm.label}: {stands_on(arm)}" for arm in advice.arms]
    notes = [f"- {caution}" for caution in cautions(advice, evidence)]
    text = [headline(advice), "", *table, "", "Stands on:", *standing, "", "Before you believe it:", *notes]
    return [line.replace(NBSP, " ") for line in text]


def _cells(arm: ArmAdvice) -> list[str]:
    sure = "" if arm.at_equal_flops is None else certainty(arm.at_equal_flops)
    return [
        arm.label,
        "baseline" if arm.at_equal_flops is None else difference(arm.at_equal_flops),
        difference(arm.at_equal_seconds),
        arm.refused or sure,
        dense_loss(arm),
        payoff(arm.pays_flops),
        payoff(arm.pays_seconds),
        times(arm.step_ratio),
        memory(arm.training_bytes),
    ]
