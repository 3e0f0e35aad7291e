"""The page of advice: one HTML file without network, made of the advice and the runs it stands on."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mixtura.comparison import advice_words
from mixtura.config.families import facts_of
from mixtura.pages import page_environment
from mixtura.planning.advice import Advice, ArmAdvice, Question, expected_difference
from mixtura.planning.evidence import Evidence, Row
from mixtura.planning.laws import BASELINE
from mixtura.report.figures import SYMBOLS
from mixtura.report.wording import memory, number, quantity, times

_TEMPLATES = Path(__file__).parent / "templates"
_POINTS = 25
_Trace = dict[str, Any]


def render_advice(advice: Advice, evidence: Evidence) -> str:
    """The page as text."""
    environment = page_environment(_TEMPLATES)
    environment.filters |= {
        "difference": advice_words.difference,
        "payoff": advice_words.payoff,
        "dense_loss": advice_words.dense_loss,
        "stands_on": advice_words.stands_on,
        "memory": memory,
        "times": times,
        "quantity": quantity,
        "nats": number,
    }
    shown = [arm for arm in advice.arms if arm.at_equal_flops is not None]
    symbols = {arm.arm: SYMBOLS[index % len(SYMBOLS)] for index, arm in enumerate(shown)}
    return environment.get_template("advice.html.j2").render(
        advice=advice,
        question=advice.question,
        setting=evidence.setting,
        headline=advice_words.headline(advice),
        cautions=advice_words.cautions(advice, evidence),
        palette=[(f"arm-{arm.arm}", *facts_of(arm.arm).colours) for arm in advice.arms],
        symbols=symbols,
        shown=shown,
        certainty={arm.arm: advice_words.certainty(arm.at_equal_flops) for arm in shown if arm.at_equal_flops},
        rows=_evidence_rows(evidence, [arm.arm for arm in advice.arms]),
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


def _evidence_rows(evidence: Evidence, arms: Sequence[str]) -> list[_EvidenceRow]:
    grouped: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in evidence.rows:
        grouped[row.arm, row.width, row.tokens].append(row)
    found = []
    for arm in arms:
        for (name, width, tokens), rows in sorted(grouped.items()):
            if name == arm:
                dense = {row.seed: row.loss for row in grouped.get((BASELINE, width, tokens), [])}
                paired = [row.loss - dense[row.seed] for row in rows if row.seed in dense and arm != BASELINE]
                loss = fmean(row.loss for row in rows)
                found.append(
                    _EvidenceRow(facts_of(arm).words, width, tokens, len(rows), loss, fmean(paired) if paired else None)
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
    measured = [row for row in _evidence_rows(evidence, [arm.arm]) if row.width == question.width]
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
