"""Which family to train: the laws of measured runs, read at a user's size and budget.

Equal FLOPs means the same tokens for all, since every arm costs a dense model's FLOPs a token. Equal seconds means that
an arm has fewer tokens by as much as its step is slower. Beyond an arm's own sizes, and the budgets at the nearest of
them, its intervals widen by what the law got wrong when it had to predict the longest runs from the shorter ones.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from mixtura.config import ArmConfig, Family, Placement
from mixtura.config.families import facts_of
from mixtura.planning.evidence import Evidence, Row, StepRatio, body_parameters, load_evidence
from mixtura.planning.formulas import (
    DecoderShape,
    layer_families,
    match_intermediate_size,
    model_parameters,
    state_memory,
)
from mixtura.planning.hardware import step_time
from mixtura.planning.laws import BASELINE, Law, fit_law, held_out_forecasts, law_replicates
from mixtura.planning.question import (
    LEAST_TOKENS,
    MOST_SHARE,
    Advice,
    ArmAdvice,
    Expected,
    Nearest,
    Payoff,
    Question,
)
from mixtura.planning.shapes import feed_forward_shapes
from mixtura.planning.step_memory import Division, ModelSizes

ROUNDING = 1.05
"""Farther than this beyond the measured runs, a budget or a size is said to be extrapolated."""
FARTHEST = 10
"""A budget more than this many times the longest measured one is not named as one that pays."""
_BUDGETS = 120
"""How many budgets are tried for the one from which on an arm pays."""


def advise_on(question: Question, evidence: Evidence | None = None) -> Advice:
    """Ranks the families for a decoder of a size and a budget, by what measured runs and their law say.

    Args:
        question: what is to be trained.
        evidence: other runs than those that come with Mixtura.
    """
    reading = _read(evidence or load_evidence(), question.token_by_token)
    arms = [_advise_arm(reading, question, arm) for arm in reading.law.floors]
    return Advice(
        question=question,
        arms=_ranked(arms),
        extrapolated=_beyond(reading.evidence, question),
        law_error=reading.law_error,
    )


def expected_difference(question: Question, arm: str, *, evidence: Evidence | None = None) -> Expected:
    """Arm minus dense at the question's budget and equal FLOPs."""
    return _expected(_read(evidence or load_evidence(), question.token_by_token), question, arm)


@dataclass(frozen=True)
class _Reading:
    """Evidence with its law, and how sure the law is."""

    evidence: Evidence
    law: Law
    replicates: list[Law]
    law_error: float | None
    farther: float
    """How many times farther than the fit the forecasts behind `law_error` were."""


@cache
def _read(evidence: Evidence, deployed: bool) -> _Reading:
    arms = [arm for arm in evidence.arms() if arm in _PLACEMENTS]
    ends = evidence.ends(arms, in_groups=not deployed)
    law = fit_law(ends)
    forecasts = held_out_forecasts(ends)
    dense = {
        (each.parameters, each.tokens): each.predicted - each.measured for each in forecasts if each.arm == BASELINE
    }
    errors = [
        each.predicted - each.measured - dense[each.parameters, each.tokens]
        for each in forecasts
        if each.arm != BASELINE and (each.parameters, each.tokens) in dense
    ]
    return _Reading(
        evidence=evidence,
        law=law,
        replicates=law_replicates(ends, law),
        law_error=math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None,
        farther=min((each.farther for each in forecasts), default=3.0),
    )


_PLACEMENTS: dict[str, Placement] = {
    "dense": "all",
    "token_choice": "all",
    "expert_threshold": "all",
    "remoe": "all",
    "mixture_of_tokens": "later_half",
}
"""The arms that are advised on, and which of their layers are mixtures: the form in which they were measured."""
_NO_FORECAST_ERROR = 0.02
"""Taken for the law's error where the evidence has too few budgets to measure it."""


def _advise_arm(reading: _Reading, question: Question, arm: str) -> ArmAdvice:
    evidence, facts = reading.evidence, facts_of(arm)
    shape = _shape(evidence, question, arm)
    needed, step = state_memory(shape).total, _step(evidence, question, arm)
    rows, other = evidence.of(arm), arm != BASELINE
    moving = other and bool(reading.law.betas)
    tokens = [row.tokens for row in rows]
    return ArmAdvice(
        arm=cast(Family, arm),
        label=facts.words,
        parameters=model_parameters(shape),
        training_bytes=needed,
        refused="needs more memory" if question.memory is not None and needed > question.memory else None,
        at_equal_flops=_expected(reading, question, arm) if other else None,
        at_equal_seconds=_expected(reading, question, arm, step) if moving else None,
        step=step,
        dense_loss_at=_dense_loss_at(reading.law, question, arm) if moving else None,
        pays_flops=_payoff(reading, question, arm, 1.0) if moving else None,
        pays_seconds=_payoff(reading, question, arm, step.ratio) if moving else None,
        runs=len(rows),
        budgets=(min(tokens), max(tokens)),
        widths=tuple(sorted({row.width for row in rows})),
        nearest=_nearest(evidence, question, rows),
        extrapolated=_beyond_own(evidence, question, arm),
    )


PLANNED_SEQUENCES, PLANNED_LENGTH = 16, 1024
"""Of a pass on one device, where steps are planned: groups of mixtures of tokens need as many sequences."""
_PLANNED_ERROR = 0.15
"""Standard error of the logarithm of a planned ratio, taken for granted: a third either way in 95 of 100 cases."""


def _step(evidence: Evidence, question: Question, arm: str) -> StepRatio:
    """Measured, or planned for the question's hardware: one of its devices, with products in bfloat16."""
    hardware = question.hardware
    if hardware is None:
        return evidence.step_ratio(arm, width=question.width)
    division = Division(micro_batch=PLANNED_SEQUENCES)
    own, dense = (
        step_time(
            ModelSizes(_shape(evidence, question, name), sequence_length=PLANNED_LENGTH), division, hardware
        ).total
        for name in (arm, BASELINE)
    )
    return StepRatio(ratio=own / dense, error=0.0 if arm == BASELINE else _PLANNED_ERROR, width=None)


def _ranked(arms: Sequence[ArmAdvice]) -> tuple[ArmAdvice, ...]:
    """The best first, and last what cannot be had.

    An arm without runs near the question is not put before the best that has some, unless its interval lies below that.
    """
    near = [_mean(arm) for arm in arms if arm.extrapolated is None and arm.refused is None]
    best = min(near, default=-math.inf)

    def key(arm: ArmAdvice) -> tuple[bool, float, bool]:
        far, found = arm.extrapolated is not None, arm.at_equal_flops
        doubted = far and found is not None and found.high >= best
        return arm.refused is not None, max(_mean(arm), best) if doubted else _mean(arm), far

    return tuple(sorted(arms, key=key))


def _mean(arm: ArmAdvice) -> float:
    return 0.0 if arm.at_equal_flops is None else arm.at_equal_flops.mean


def _difference(law: Law, question: Question, arm: str, *, tokens: float, ratio: float) -> float:
    """Arm minus dense where dense has `tokens`, and the arm what a step `ratio` times as long leaves."""
    size = body_parameters(question.width, layers=question.layers)
    own = law.loss(arm, parameters=size, tokens=tokens / ratio)
    return own - law.loss(BASELINE, parameters=size, tokens=tokens)


def _dense_loss_at(law: Law, question: Question, arm: str) -> float | None:
    size = body_parameters(question.width, layers=question.layers)
    loss = law.loss(BASELINE, parameters=size, tokens=question.tokens)
    share = law.tokens_for(arm, loss, parameters=size) / question.tokens
    return share if share <= MOST_SHARE else None


def _expected(reading: _Reading, question: Question, arm: str, step: StepRatio | None = None) -> Expected:
    """Arm minus dense; with a step's ratio, where both have trained for as long."""
    ratio, doubt = (1.0, 0.0) if step is None else (step.ratio, step.error)

    def difference(law: Law, ratio: float) -> float:
        return _difference(law, question, arm, tokens=question.tokens, ratio=ratio)

    mean = difference(reading.law, ratio)
    drawn = float(np.std([difference(law, ratio) for law in reading.replicates]))
    slower = difference(reading.law, ratio * math.exp(doubt)) - mean
    error = _NO_FORECAST_ERROR if reading.law_error is None else reading.law_error
    own = _times_beyond(reading.evidence, question, question.tokens / ratio, arm)
    dense = _times_beyond(reading.evidence, question, question.tokens, BASELINE)
    steps = sum(math.log(max(times)) for times in zip(own, dense, strict=True)) / math.log(reading.farther)
    spread = math.hypot(drawn, slower, error * steps)
    below = 0.5 * math.erfc(mean / max(spread, 1e-12) / math.sqrt(2))
    return Expected(mean=mean, low=mean - 1.96 * spread, high=mean + 1.96 * spread, ahead=below)


def _payoff(reading: _Reading, question: Question, arm: str, ratio: float) -> Payoff:
    """The budget from which on the law has the arm ahead, and the interval of it that the replicates span."""
    measured = _nearest_rows(reading.evidence, question, reading.evidence.of(arm))
    farthest = float(FARTHEST * max(row.tokens for row in reading.evidence.of(arm)))
    grid = np.geomspace(LEAST_TOKENS, farthest, _BUDGETS).tolist()

    def begins(law: Law) -> float:
        behind = (
            k for k in reversed(range(_BUDGETS)) if _difference(law, question, arm, tokens=grid[k], ratio=ratio) >= 0
        )
        last = next(behind, -1)
        return math.inf if last == _BUDGETS - 1 else grid[last + 1]

    low, high = np.quantile([begins(law) for law in reading.replicates], (0.025, 0.975), method="nearest").tolist()
    tokens, low, high = (budget if math.isfinite(budget) else None for budget in (begins(reading.law), low, high))
    least = float(min(row.tokens for row in measured))
    return Payoff(tokens=tokens, low=low, high=high, least=least, farthest=farthest)


def _nearest_rows(evidence: Evidence, question: Question, rows: Sequence[Row]) -> list[Row]:
    """Those of the width nearest to the question in parameters."""
    size = math.log(body_parameters(question.width, layers=question.layers))

    def distance(width: int) -> float:
        return abs(math.log(body_parameters(width, layers=evidence.setting.layers)) - size)

    nearest = min(sorted({row.width for row in rows}), key=distance)
    return [row for row in rows if row.width == nearest]


def _nearest(evidence: Evidence, question: Question, rows: Sequence[Row]) -> Nearest:
    near = _nearest_rows(evidence, question, rows)
    tokens = min(sorted({row.tokens for row in near}), key=lambda budget: abs(math.log(budget / question.tokens)))
    seeds = len({row.seed for row in near if row.tokens == tokens})
    return Nearest(width=near[0].width, tokens=tokens, seeds=seeds)


def _times_beyond(evidence: Evidence, question: Question, tokens: float, arm: str | None = None) -> tuple[float, float]:
    """How many times the largest, or a how-manieth part of the smallest, budget and size measured; 1 is within.

    Those of one arm, or of all: an arm whose runs are shorter than the others' is extrapolated sooner. Budgets are
    those at the nearest size.
    """
    size = body_parameters(question.width, layers=question.layers)
    rows = evidence.rows if arm is None else evidence.of(arm)
    sizes = [body_parameters(row.width, layers=evidence.setting.layers) for row in rows]
    budgets = [row.tokens for row in _nearest_rows(evidence, question, rows)]
    return _outside(tokens, budgets), _outside(size, sizes)


def _outside(value: float, measured: Sequence[float]) -> float:
    beyond = max(value / max(measured), min(measured) / value)
    return beyond if beyond > ROUNDING else 1.0


def _beyond(evidence: Evidence, question: Question) -> tuple[str, ...]:
    budget, size = _times_beyond(evidence, question, question.tokens)
    found = []
    if budget > 1:
        near = _nearest_rows(evidence, question, evidence.rows)
        found.append(f"{question.tokens:,.0f} tokens lie outside the {_budgets(near)} measured at {_widths(near)}")
    if size > 1:
        found.append(
            f"width {question.width} with {question.layers} layer{'s' * (question.layers > 1)} lies outside the "
            f"measured {_widths(evidence.rows)} with {evidence.setting.layers} layers"
        )
    return tuple(found)


def _beyond_own(evidence: Evidence, question: Question, arm: str) -> str | None:
    """What lies beyond the runs of one arm, where these are fewer than all."""
    rows, words = evidence.of(arm), facts_of(arm).words
    budget, size = _times_beyond(evidence, question, question.tokens, arm)
    near, others = (_nearest_rows(evidence, question, of) for of in (rows, evidence.rows))
    at_other_widths = size > 1 and _widths(rows) != _widths(evidence.rows)
    on_other_budgets = budget > 1 and (_budgets(near), _widths(near)) != (_budgets(others), _widths(others))
    if not (at_other_widths or on_other_budgets):
        return None
    where = f" at {_widths(rows)} only" if at_other_widths else ""
    what = f"{',' * at_other_widths} on {_budgets(near)} tokens at {_widths(near)}" if on_other_budgets else ""
    return f"{words} was trained{where}{what}"


def _budgets(rows: Sequence[Row]) -> str:
    """The tokens of the shortest run and of the longest, in words."""
    least, most = min(row.tokens for row in rows), max(row.tokens for row in rows)
    return f"{least:,} to {most:,}" if least < most else f"{least:,}"


def _widths(rows: Sequence[Row]) -> str:
    return widths_in_words({row.width for row in rows})


def widths_in_words(widths: Collection[int]) -> str:
    """For example "width 64" or "widths 32, 64 and 128"."""
    *others, last = map(str, sorted(widths))
    return f"widths {', '.join(others)} and {last}" if others else f"width {last}"


def _shape(evidence: Evidence, question: Question, arm: str) -> DecoderShape:
    """The arm in the form that was measured, at the size that is asked about."""
    setting, width = evidence.setting, question.width
    dense = 8 * max(1, round(width / 3))
    placed = ArmConfig(family=cast(Family, arm), placement=_PLACEMENTS[arm])

    def of_expert_width(expert: int) -> DecoderShape:
        return DecoderShape(
            vocab_size=question.vocabulary,
            hidden_size=width,
            num_hidden_layers=question.layers,
            intermediate_size=dense,
            moe_intermediate_size=expert,
            num_attention_heads=1,
            mlp_layer_types=tuple(layer_families(question.layers, placed)),
            alone_top_k=2,
            num_experts=setting.experts,
            num_experts_per_tok=setting.top_k,
            group_size=setting.group_size,
        )

    last = feed_forward_shapes(of_expert_width(dense), sequence_length=setting.context)[-1]
    return of_expert_width(match_intermediate_size(last, dense_intermediate_size=dense))
