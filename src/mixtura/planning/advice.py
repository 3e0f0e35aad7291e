"""Which family to train: the laws of measured runs, read at a user's size and budget.

Equal FLOPs means the same tokens for all, since every arm costs a dense model's FLOPs a token. Equal seconds means that
an arm has fewer tokens by as much as its step is slower. Beyond an arm's own sizes and budgets its intervals widen by
what the law got wrong when it had to predict the longest runs from the shorter ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from mixtura.config import ArmConfig, Family, Placement, UserError
from mixtura.config.families import facts_of
from mixtura.planning.evidence import (
    BASELINE,
    HIDDEN_MULTIPLE,
    Evidence,
    Law,
    Row,
    body_parameters,
    fit_law,
    held_out_forecasts,
    law_replicates,
    load_evidence,
)
from mixtura.planning.formulas import (
    DecoderShape,
    layer_families,
    match_intermediate_size,
    model_parameters,
    state_memory,
)
from mixtura.planning.shapes import feed_forward_shapes

LEAST_TOKENS, MOST_TOKENS = 1e5, 1e10
"""Budgets between which it is asked where an arm begins to pay."""
MOST_SHARE = 10.0
LEAST_WIDTH = 8
ROUNDING = 1.05
"""Farther than this beyond the measured runs, a budget or a size is said to be extrapolated."""
FARTHEST = 10
"""A budget more than this many times the longest measured one is not named as one that pays."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a user wants to train."""

    tokens: float
    width: int = 64
    """D of the dense model, whose FLOPs all families match."""
    layers: int = 4
    vocabulary: int = 1024
    memory: float | None = None
    """Bytes for weights, gradients and AdamW's moments in float32; None is no limit."""
    token_by_token: bool = True
    """Whether the model answers one request at a time; False lets mixtures of tokens run in groups as they train."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A difference to dense in held-out nats a token: below zero is better."""

    mean: float
    low: float
    high: float
    """95 % interval."""
    ahead: float
    """Probability that the difference is below zero."""

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """From which budget an arm is ahead of dense."""

    tokens: float | None
    """None: nowhere up to `farthest`."""
    always: bool
    """At every measured budget already."""
    farthest: float
    """The largest budget that was asked about."""


@dataclass(frozen=True, kw_only=True)
class ArmAdvice:
    """What the evidence says of one arm."""

    arm: Family
    label: str
    parameters: int
    training_bytes: int
    refused: str | None
    """Why it cannot be had; None if it can."""
    at_equal_flops: Expected | None
    """None of dense."""
    at_equal_seconds: Expected | None
    """None of dense, and where dense has runs of one budget, which say nothing of others; likewise what pays."""
    step_ratio: float
    """Time of a step over dense's, measured at `ratio_width`."""
    ratio_width: int
    dense_loss_at: float | None
    """The share of dense's tokens at which it has dense's loss; more than `MOST_SHARE` is None, as it is of dense."""
    pays_flops: Payoff | None
    pays_seconds: Payoff | None
    runs: int
    """How many run ends it stands on."""
    seeds: int
    budgets: tuple[int, int]
    """The least and the most tokens among them."""
    widths: tuple[int, ...]
    extrapolated: str | None
    """What lies beyond its own runs, where these are fewer than all; None within them."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer: arms from the best to the worst, those that cannot be had last."""

    question: Question
    arms: tuple[ArmAdvice, ...]
    extrapolated: tuple[str, ...]
    """What lies beyond the measured runs of all arms; empty within them."""
    law_error: float | None
    """Root mean square of the held-out errors in the difference to dense; None where nothing could be held out."""

    @property
    def best(self) -> ArmAdvice:
        """The first."""
        return self.arms[0]


def question_of(
    *,
    tokens: float,
    width: int | None = None,
    parameters: float | None = None,
    layers: int = 4,
    vocabulary: int = 1024,
    memory: float | None = None,
    token_by_token: bool = True,
) -> Question:
    """A question whose values make sense; parameters without embeddings become the nearest width.

    Raises:
        UserError: a value is out of range, or width and parameters are both given or both missing.
    """
    if (width is None) == (parameters is None):
        raise UserError("Give either the width of the dense model or its parameters without embeddings.")
    for name, value, least in (
        ("tokens", tokens, 1),
        ("layers", layers, 1),
        ("width", width, LEAST_WIDTH),
        ("parameters", parameters, 1000),
        ("vocabulary", vocabulary, 2),
        ("memory", memory, 1),
    ):
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name} is {value:g}: give {least:,} or more.")
    if width is None:
        width = 8 * max(1, round(math.sqrt((parameters or 0) / (HIDDEN_MULTIPLE * layers)) / 8))
    return Question(
        tokens=tokens,
        width=width,
        layers=layers,
        vocabulary=vocabulary,
        memory=memory,
        token_by_token=token_by_token,
    )


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
        arms=tuple(sorted(arms, key=_rank)),
        extrapolated=_beyond(reading.evidence, question),
        law_error=reading.law_error,
    )


def expected_difference(
    question: Question, arm: str, *, ratio: float = 1.0, evidence: Evidence | None = None
) -> Expected:
    """Arm minus dense at the question's budget; an arm whose steps take `ratio` times as long has so many fewer."""
    return _expected(_read(evidence or load_evidence(), question.token_by_token), question, arm, ratio)


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
    needed, ratio = state_memory(shape).total, evidence.step_ratio(arm, width=question.width)
    rows, other = evidence.of(arm), arm != BASELINE
    moving = other and bool(reading.law.betas)
    tokens = [row.tokens for row in rows]
    return ArmAdvice(
        arm=cast(Family, arm),
        label=facts.words,
        parameters=model_parameters(shape),
        training_bytes=needed,
        refused="needs more memory" if question.memory is not None and needed > question.memory else None,
        at_equal_flops=_expected(reading, question, arm, 1.0) if other else None,
        at_equal_seconds=_expected(reading, question, arm, ratio[0]) if moving else None,
        step_ratio=ratio[0],
        ratio_width=ratio[1],
        dense_loss_at=_dense_loss_at(reading.law, question, arm) if moving else None,
        pays_flops=_payoff(reading, question, arm, 1.0) if moving else None,
        pays_seconds=_payoff(reading, question, arm, ratio[0]) if moving else None,
        runs=len(rows),
        seeds=len({row.seed for row in rows}),
        budgets=(min(tokens), max(tokens)),
        widths=tuple(sorted({row.width for row in rows})),
        extrapolated=_beyond_own(evidence, question, arm),
    )


def _rank(arm: ArmAdvice) -> tuple[bool, float]:
    return arm.refused is not None, 0.0 if arm.at_equal_flops is None else arm.at_equal_flops.mean


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


def _expected(reading: _Reading, question: Question, arm: str, ratio: float) -> Expected:
    drawn = [_difference(law, question, arm, tokens=question.tokens, ratio=ratio) for law in reading.replicates]
    mean = _difference(reading.law, question, arm, tokens=question.tokens, ratio=ratio)
    error = _NO_FORECAST_ERROR if reading.law_error is None else reading.law_error
    own, dense = (_times_beyond(reading.evidence, question, name) for name in (arm, BASELINE))
    steps = sum(math.log(max(times)) for times in zip(own, dense, strict=True)) / math.log(reading.farther)
    spread = math.hypot(float(np.std(drawn)), error * steps)
    below = 0.5 * math.erfc(mean / max(spread, 1e-12) / math.sqrt(2))
    return Expected(mean=mean, low=mean - 1.96 * spread, high=mean + 1.96 * spread, ahead=below)


def _payoff(reading: _Reading, question: Question, arm: str, ratio: float) -> Payoff:
    """The budget from which on the law has the arm ahead."""
    measured = [row.tokens for row in reading.evidence.of(arm)]
    farthest = FARTHEST * max(measured)
    grid = np.geomspace(LEAST_TOKENS, farthest, 400)
    ahead = [_difference(reading.law, question, arm, tokens=float(d), ratio=ratio) < 0 for d in grid]
    if not ahead[-1]:
        return Payoff(tokens=None, always=False, farthest=farthest)
    first = max((k + 1 for k, better in enumerate(ahead) if not better), default=0)
    start = float(grid[first])
    return Payoff(tokens=start, always=start <= min(measured), farthest=farthest)


def _times_beyond(evidence: Evidence, question: Question, arm: str | None = None) -> tuple[float, float]:
    """How many times the largest, or a how-manieth part of the smallest, budget and size measured; 1 is within.

    Those of one arm, or of all: an arm whose runs are shorter than the others' is extrapolated sooner.
    """
    size = body_parameters(question.width, layers=question.layers)
    rows = evidence.rows if arm is None else evidence.of(arm)
    sizes = [body_parameters(row.width, layers=evidence.setting.layers) for row in rows]
    return _outside(question.tokens, [row.tokens for row in rows]), _outside(size, sizes)


def _outside(value: float, measured: Sequence[float]) -> float:
    beyond = max(value / max(measured), min(measured) / value)
    return beyond if beyond > ROUNDING else 1.0


def _beyond(evidence: Evidence, question: Question) -> tuple[str, ...]:
    setting, (budget, size) = evidence.setting, _times_beyond(evidence, question)
    widths = sorted({row.width for row in evidence.rows})
    found = []
    if budget > 1:
        found.append(f"{question.tokens:,.0f} tokens lie outside the {_budgets(evidence.rows)} measured")
    if size > 1:
        named = ", ".join(map(str, widths))
        found.append(
            f"width {question.width} with {question.layers} layers lies outside the measured widths {named} with "
            f"{setting.layers} layers"
        )
    return tuple(found)


def _beyond_own(evidence: Evidence, question: Question, arm: str) -> str | None:
    """What lies beyond the runs of one arm, where these are fewer than all."""
    rows, words = evidence.of(arm), facts_of(arm).words
    budget, size = _times_beyond(evidence, question, arm)
    found = []
    if budget > 1 and _budgets(rows) != _budgets(evidence.rows):
        found.append(f"{question.tokens:,.0f} tokens lie outside the {_budgets(rows)} of {words}")
    if size > 1 and (widths := {row.width for row in rows}) != {row.width for row in evidence.rows}:
        named = ", ".join(map(str, sorted(widths)))
        found.append(f"width {question.width} with {question.layers} layers lies outside the widths {named} of {words}")
    return "; ".join(found) or None


def _budgets(rows: Sequence[Row]) -> str:
    """The tokens of the shortest run and of the longest, in words."""
    least, most = min(row.tokens for row in rows), max(row.tokens for row in rows)
    return f"{least:,} to {most:,}" if least < most else f"{least:,}"


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
