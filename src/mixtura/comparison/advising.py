"""The verb advise: a question becomes advice, and advice lines on the console, a page and JSON.

`mixtura.planning.advice` has the numbers. The page is one HTML file without network, made of the advice and the runs it
stands on.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mixtura.config import DataConfig
from mixtura.config.families import facts_of
from mixtura.data.prepare import prepare_data
from mixtura.errors import UserError, reason_of
from mixtura.files import write_text
from mixtura.pages import page_environment
from mixtura.planning.advice import PLANNED_LENGTH, PLANNED_SEQUENCES, advise_on, expected_difference, widths_in_words
from mixtura.planning.evidence import Evidence, load_evidence
from mixtura.planning.laws import BASELINE
from mixtura.planning.question import Advice, ArmAdvice, Expected, Payoff, Question, question_of
from mixtura.report.cautions import MANY_EPOCHS
from mixtura.report.figures import SYMBOLS
from mixtura.report.wording import (
    NBSP,
    NONE,
    compact,
    count,
    expected_words,
    listing,
    memory,
    number,
    quantity,
    start,
    times,
)

DECIDED, LIKELY = "decided", "likely"
_LIKELY = 0.9
_LEAST_SHARE = 0.01
"""Shares of dense's tokens below it are not told apart."""


def headline(advice: Advice) -> str:
    """The answer in one sentence."""
    question, best = advice.question, advice.best
    where = f"at width {question.width} and {quantity(question.tokens)} tokens"
    if best.refused is not None:
        least = min(advice.arms, key=lambda arm: arm.training_bytes)
        return (
            f"No family fits {memory(question.memory)} {where}: {least.label} needs the least, "
            f"{memory(least.training_bytes)}."
        )
    found = best.at_equal_flops
    if found is None:
        return f"Train dense: {where} {_none_ahead(advice)}."
    sure = {DECIDED: "is expected to be", LIKELY: "is likely to be"}.get(certainty(found), "may be")
    gain = f"{number(-found.mean)} nats ahead of dense at equal FLOPs"
    beyond = " This is extrapolated." if advice.extrapolated or best.extrapolated else ""
    return f"{start(best.label)} {sure} {gain} {where}{_in_time(best.at_equal_seconds)}.{beyond}"


def _none_ahead(advice: Advice) -> str:
    """Why dense is first: no mixture is ahead, or none that fits."""
    too_large = [arm for arm in advice.arms if arm.refused and arm.at_equal_flops and arm.at_equal_flops.mean < 0]
    if not too_large:
        return "no mixture is expected to be ahead of it at equal FLOPs"
    best = too_large[0]
    return (
        f"no mixture that fits {memory(advice.question.memory)} is expected to be ahead of it at equal FLOPs; "
        f"{best.label}, {expected_words(best.at_equal_flops)}, needs {memory(best.training_bytes)}"
    )


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


def payoff(found: Payoff | None) -> str:
    """From which budget an arm pays: "from 2.1 M (1.2 M to 3.5 M)", "from below 1.0 M", "not below 300 M"."""
    if found is None:
        return NONE
    if found.tokens is None:
        return f"not below {compact(found.farthest)}"
    if found.high is not None and found.high <= found.least:
        return f"from below {compact(found.least)}"
    high = f"beyond {compact(found.farthest)}" if found.high is None else compact(found.high)
    if found.tokens <= found.least:
        return f"from below {compact(found.least)} (at most {high})"
    low = f"below {compact(found.least)}" if found.low is None or found.low <= found.least else compact(found.low)
    return f"from {compact(found.tokens)} ({low} to {high})"


def dense_loss(arm: ArmAdvice) -> str:
    """With what share of dense's tokens and time it has dense's loss: "0.62x tokens, 0.75x time"."""
    if arm.pays_flops is None:
        return NONE
    if arm.dense_loss_at is None:
        return "not in ten times"
    if arm.dense_loss_at < _LEAST_SHARE:
        return f"below {times(_LEAST_SHARE)}"
    return f"{times(arm.dense_loss_at)} tokens, {times(arm.dense_loss_at * arm.step.ratio)} time"


def step_ratio(arm: ArmAdvice) -> str:
    """A step's time over dense's, with its 95 % interval: "1.19x (1.11 to 1.27)"."""
    if arm.at_equal_flops is None:
        return times(1.0)
    low, high = (arm.step.ratio * np.exp(sign * 1.96 * arm.step.error) for sign in (-1, 1))
    return f"{times(arm.step.ratio)} ({number(low, 2)} to {number(high, 2)})"


def stands_on(arm: ArmAdvice) -> str:
    """The runs behind an arm: "12 results at width 64, 1.00 M to 10.0 M tokens; nearest: 3 seeds at width 64, ..."."""
    near = arm.nearest
    low, high = (compact(tokens) for tokens in arm.budgets)
    budgets = low if low == high else f"{low} to {high}"
    return (
        f"{count(arm.runs, 'result')} at {widths_in_words(arm.widths)}, {budgets} tokens; nearest: "
        f"{count(near.seeds, 'seed')} at width {near.width} and {compact(near.tokens)}"
    )


def cautions(advice: Advice, evidence: Evidence) -> list[str]:
    """What to know before believing it."""
    setting = evidence.setting
    reasons = [*advice.extrapolated, *(arm.extrapolated for arm in advice.arms if arm.extrapolated)]
    found = [f"Extrapolated: {reason}." for reason in reasons]
    found += _about_text(advice.question)
    thin = [arm.label for arm in advice.arms if arm.nearest.seeds < 2]
    if thin:
        found.append(
            f"One seed only, in the runs nearest to this size and budget: {listing(thin)}; how much seeds scatter is "
            "taken from other runs."
        )
    single = [arm.label for arm in advice.arms if arm.budgets[0] == arm.budgets[1]]
    if single:
        found.append(f"One budget only: {', '.join(single)}; their difference is taken to be the same at others.")
    if advice.law_error is None:
        found.append("Too few budgets to predict the longest runs from shorter ones, so the law is untested.")
    else:
        found.append(
            f"Predicting the longest runs from the shorter ones, the law missed differences to dense by "
            f"{number(advice.law_error)} nats (root mean square); intervals widen by that for every tripling of tokens "
            "or parameters beyond the runs."
        )
    found.append(
        f"Measured with {setting.experts} experts (top {setting.top_k}, groups of {setting.group_size}), "
        f"{setting.layers} layers, {setting.vocabulary} tokens of vocabulary, on {setting.text}; other text, sizes and "
        "numbers of experts are not in it."
    )
    hardware = advice.question.hardware
    found.append(
        f"Time was measured on {setting.machine}: on other hardware a step's ratio differs; --hardware plans it."
        if hardware is None
        else f"Time was planned, not measured: one device of {hardware.name}, {PLANNED_SEQUENCES} sequences of "
        f"{PLANNED_LENGTH:,} tokens, bfloat16. A ratio may be off by a third."
    )
    return found


def _about_text(question: Question) -> list[str]:
    if question.text_tokens is None:
        return []
    passes = question.tokens / question.text_tokens
    times_read = quantity(passes) if passes >= 10 else number(passes, 1)
    has, asked = quantity(question.text_tokens), quantity(question.tokens)
    said = f"Your text has {has} tokens: {asked} are {times_read} passes"
    if passes <= MANY_EPOCHS:
        return [f"{said}."]
    return [f"{said}, and text read more than {MANY_EPOCHS:g} times is worth clearly less than new text: expect less."]


def console_lines(advice: Advice, evidence: Evidence) -> list[str]:
    """The answer for a terminal."""
    losses = [["family", "at equal FLOPs", "sure", "at equal seconds", "dense's loss at"]]
    costs = [["family", "pays, equal FLOPs", "pays, equal seconds", "step", "training memory"]]
    for arm in advice.arms:
        found, seconds = arm.at_equal_flops, expected_words(arm.at_equal_seconds)
        gain = ["baseline", ""] if found is None else [expected_words(found), certainty(found)]
        needs = f"{memory(arm.training_bytes)}{'' if arm.refused is None else f' ({arm.refused})'}"
        losses.append([arm.label, *gain, seconds, dense_loss(arm)])
        costs.append([arm.label, payoff(arm.pays_flops), payoff(arm.pays_seconds), step_ratio(arm), needs])
    standing = [f"  {arm.label}: {stands_on(arm)}" for arm in advice.arms]
    notes = [f"- {caution}" for caution in cautions(advice, evidence)]
    tables = ["Held-out nats minus dense's, below zero is better:", *_columns(losses), "", *_columns(costs)]
    text = [headline(advice), "", *tables, "", "Stands on:", *standing, "", "Before you believe it:", *notes]
    return [line.replace(NBSP, " ") for line in text]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


_TEMPLATES, _POINTS = Path(__file__).parent / "templates", 25
_Trace = dict[str, Any]


def render_advice(advice: Advice, evidence: Evidence) -> str:
    """The page as text."""
    environment = page_environment(_TEMPLATES)
    environment.filters |= {
        "difference": expected_words,
        "payoff": payoff,
        "dense_loss": dense_loss,
        "stands_on": stands_on,
        "memory": memory,
        "step_ratio": step_ratio,
        "quantity": quantity,
        "nats": number,
    }
    shown = [arm for arm in advice.arms if arm.at_equal_flops is not None]
    # A family has the same mark on every page, whatever its rank.
    known = sorted(arm.arm for arm in advice.arms)
    symbols = {arm.arm: SYMBOLS[known.index(arm.arm) % len(SYMBOLS)] for arm in shown}
    return environment.get_template("advice.html.j2").render(
        advice=advice,
        question=advice.question,
        setting=evidence.setting,
        headline=headline(advice),
        cautions=cautions(advice, evidence),
        palette=[(f"arm-{arm.arm}", *facts_of(arm.arm).colours) for arm in advice.arms],
        symbols=symbols,
        shown=shown,
        certainty={arm.arm: certainty(arm.at_equal_flops) for arm in shown if arm.at_equal_flops},
        rows=_evidence_rows(evidence, [arm.arm for arm in advice.arms], advice.question),
        page_data={"figure": difference_figure(advice, evidence), "symbols": symbols},
        plotly_js=Markup(get_plotlyjs()),
    )


@dataclass(frozen=True)
class _EvidenceRow:
    """An arm at a width and a budget: the mean over seeds, and its difference to dense in the same seeds."""

    arm: str
    width: int
    tokens: int
    seeds: int
    loss: float
    difference: float | None


def _evidence_rows(evidence: Evidence, arms: Sequence[str], question: Question) -> list[_EvidenceRow]:
    """Of the losses that the question's advice stands on: as deployed, or in groups."""
    grouped: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
    for row in evidence.rows:
        grouped[row.arm, row.width, row.tokens][row.seed] = row.loss_of(in_groups=not question.token_by_token)
    found = []
    for arm in arms:
        for (name, width, tokens), losses in sorted(grouped.items()):
            if name != arm:
                continue
            dense = grouped.get((BASELINE, width, tokens), {})
            paired = [losses[seed] - dense[seed] for seed in losses.keys() & dense.keys() if arm != BASELINE]
            difference = fmean(paired) if paired else None
            found.append(
                _EvidenceRow(facts_of(arm).words, width, tokens, len(losses), fmean(losses.values()), difference)
            )
    return found


def difference_figure(advice: Advice, evidence: Evidence) -> _Trace:
    """Difference to dense against training tokens at the question's width: the law with its interval, and what was
    measured at that width, as plotly takes it."""
    budgets = sorted({row.tokens for row in evidence.rows})
    last = max(2.0 * budgets[-1], advice.question.tokens)
    tokens = np.geomspace(min(budgets[0], advice.question.tokens), last, _POINTS).tolist()
    traces: list[_Trace] = []
    for arm in advice.arms:
        if arm.at_equal_flops is not None:
            traces += _arm_traces(advice.question, evidence, arm, tokens)
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": advice.question.tokens, "x1": advice.question.tokens}
    layout = {
        "height": 380,
        "xaxis": {"type": "log", "title": {"text": "Training tokens"}},
        "yaxis": {"title": {"text": "Nats minus dense, at equal FLOPs"}, "zeroline": True},
        "shapes": [{**line, "y0": 0, "y1": 1, "line": {"dash": "dot"}}],
    }
    return {"data": traces, "layout": layout}


def _arm_traces(question: Question, evidence: Evidence, arm: ArmAdvice, tokens: list[float]) -> list[_Trace]:
    asked = [Question(**{**vars(question), "tokens": budget}) for budget in tokens]
    found = [expected_difference(each, arm.arm, evidence=evidence) for each in asked]
    band = [each.high for each in found] + [each.low for each in reversed(found)]
    meta = {"arm": arm.arm}
    measured = [row for row in _evidence_rows(evidence, [arm.arm], question) if row.width == question.width]
    points = [row for row in measured if row.difference is not None]
    hover = f"{arm.label}: %{{y:+.3f}} at %{{x:,.3s}} tokens<extra></extra>"
    return [
        {
            "type": "scatter",
            "x": tokens + tokens[::-1],
            "y": band,
            "fill": "toself",
            "mode": "none",
            "hoverinfo": "skip",
            "meta": {**meta, "band": True},
        },
        {
            "type": "scatter",
            "x": tokens,
            "y": [each.mean for each in found],
            "mode": "lines",
            "meta": meta,
            "hovertemplate": hover,
        },
        {
            "type": "scatter",
            "x": [row.tokens for row in points],
            "y": [row.difference for row in points],
            "mode": "markers",
            "meta": meta,
            "hovertemplate": hover,
        },
    ]


def advise(
    *,
    tokens: float,
    width: int | None = None,
    parameters: float | None = None,
    layers: int = 4,
    vocabulary: int = 1024,
    memory: float | None = None,
    hardware: str | None = None,
    text: Path | str | None = None,
    token_by_token: bool = True,
    out: Path | str | None = None,
) -> Advice:
    """Ranks the families for a decoder of a size and a budget, by measured runs and the law fitted to them.

    Args:
        tokens: training tokens.
        width: hidden size of the dense model, whose FLOPs all families match; or give `parameters`.
        parameters: its parameters without embeddings and head.
        layers: decoder layers.
        vocabulary: tokens of the vocabulary, for the memory.
        memory: bytes for weights, gradients and AdamW's moments in float32; None is that of the hardware, or no limit.
        hardware: as of `mixtura plan`, such as "H100" or "8xH200", for which times of steps are planned; None takes
            those that were measured on CPUs.
        text: a text of one's own, as `mixtura compare` reads it, whose tokens are counted to say how often it is read.
        token_by_token: whether the model must answer one request at a time; if not, mixtures of tokens may be served
            in groups, as they train.
        out: an HTML page to write.

    Returns:
        The families from the best at equal FLOPs to the worst, those that do not fit last.

    Raises:
        UserError: a value is out of range, width and parameters are both given or both missing, the text cannot be
            read, or the page cannot be written.
    """
    question = question_of(
        tokens=tokens,
        width=width,
        parameters=parameters,
        layers=layers,
        vocabulary=vocabulary,
        memory=memory,
        hardware=hardware,
        token_by_token=token_by_token,
    )
    if text is not None:
        data = DataConfig(source="local", path=str(text), vocab_size=vocabulary)
        read = prepare_data(data, cache_dir=None).summary["tokens_train"]
        question = dataclasses.replace(question, text_tokens=read)
    advice = advise_on(question)
    if out is not None:
        try:
            write_text(Path(out), render_advice(advice, load_evidence()))
        except OSError as error:
            raise UserError(f"'{out}' cannot be written ({reason_of(error)}): name another file.") from error
    return advice


def plain_advice(advice: Advice) -> dict[str, Any]:
    """Advice as JSON has it."""
    return dataclasses.asdict(advice)
