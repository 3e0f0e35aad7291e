"""Laws of the held-out loss over parameters and tokens, fitted to runs of several sizes and budgets.

A law says what it does not know. For arm a, a model of N parameters outside the embeddings (those of its dense
counterpart) and D training tokens

    L_a(N, D) = c_a + n_a N^-alpha + b_a D^-beta_a

where mixtures learn from tokens at a pace of their own, as in the joint law for dense models and mixtures (arXiv
2502.05172, equation 3, whose exponent of D moves with the number of experts): one beta for all arms missed the
differences at 30 million tokens by twice as much (docs/log.md). Given the exponents the rest is linear, so only they
are searched. An arm with runs of two budgets takes beta_a from dense, and one of one budget b_a too: its
difference is taken to stay. An arm of one size takes the mean n_a of the mixtures that have several, whose leads shrink
as models grow; dense's if there are none. If dense has one size or budget, that term is left out, and part of c_a.

Where runs differ from the law is noise of two kinds: of a whole run, whose budgets share their first weights and most
of their data, and of a single end. `law_replicates` draws both again and again and fits each time.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

BASELINE = "dense"
"""The arm that all others are compared with."""
REPLICATES = 200
UNKNOWN_NOISE = 0.02
"""Standard deviation between seeds, in nats, where no arm has two: what runs of this kind had (docs/log.md)."""
_EXPONENTS = (0.05, 1.0)
"""Between which exponents are searched."""
_OWN_EXPONENT = 3
"""Budgets from which on an arm has an exponent of its own: with its floor and factor it has three unknowns."""


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """The loss at one budget of one run."""

    arm: str
    parameters: float
    """N, of the dense counterpart, without embeddings and head."""
    tokens: float
    seed: int
    loss: float
    """Held-out nats a token."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """The law with its numbers."""

    alpha: float | None
    """None where dense has one N."""
    betas: dict[str, float]
    """Of every arm; empty where dense has one D."""
    floors: dict[str, float]
    """c of every arm."""
    size_terms: dict[str, float]
    """n of every arm; empty where alpha is None."""
    data_terms: dict[str, float]
    """b of every arm; empty where dense has one D."""

    def loss(self, arm: str, *, parameters: float, tokens: float) -> float:
        """Held-out nats a token."""
        size = 0.0 if self.alpha is None else self.size_terms[arm] * parameters**-self.alpha
        data = self.data_terms[arm] * tokens ** -self.betas[arm] if self.betas else 0.0
        return self.floors[arm] + size + data

    def tokens_for(self, arm: str, loss: float, *, parameters: float) -> float:
        """How many tokens bring an arm down to a loss; infinite if none do, or the law knows one budget."""
        rest = loss - self.loss(arm, parameters=parameters, tokens=math.inf)
        if not self.betas or rest <= 0:
            return math.inf
        return (self.data_terms[arm] / rest) ** (1 / self.betas[arm])


def fit_law(ends: Sequence[RunEnd], *, near: Law | None = None) -> Law:
    """The law with the least squared error.

    Args:
        ends: of dense and of any other arms.
        near: a law of the same arms whose exponents are close, which saves time.
    """
    arms = sorted({end.arm for end in ends})
    table = _Table(ends, arms)
    count = sum(len(term.exponents) for term in table.terms)
    found: list[float] = []
    if count:
        start, bounds = [0.3] * count if near is None else table.exponents_of(near), [_EXPONENTS] * count
        found = minimize(lambda at: table.solve(at)[1], start, bounds=bounds, method="L-BFGS-B").x.tolist()
    factors = table.solve(found)[0].tolist()
    floors, factors = dict(zip(arms, factors[: len(arms)], strict=True)), factors[len(arms) :]
    terms: dict[str, dict[str, float]] = {"size": {}, "data": {}}
    exponents: dict[str, dict[str, float]] = {"size": {}, "data": {}}
    for term in table.terms:
        own = factors[: len(term.arms)]
        terms[term.name] = {
            arm: math.fsum(share * factor for share, factor in zip(term.shares(arm), own, strict=True)) for arm in arms
        }
        exponents[term.name] = {arm: found[term.exponent(arm)] for arm in arms}
        factors, found = factors[len(term.arms) :], found[len(term.exponents) :]
    return Law(
        alpha=exponents["size"].get(BASELINE),
        betas=exponents["data"],
        floors=floors,
        size_terms=terms["size"],
        data_terms=terms["data"],
    )


class _Term:
    """A power of one quantity: which arms have a factor and an exponent of their own, and what the others take."""

    def __init__(
        self, name: str, ends: Sequence[RunEnd], values: Sequence[float], *, own_exponent: float, of_mixtures: bool
    ) -> None:
        """Counts every arm's values.

        Args:
            name: of the quantity.
            ends: the runs.
            values: the quantity, of each of them.
            own_exponent: from how many values on an arm has an exponent of its own.
            of_mixtures: whether an arm of one value takes the mean factor of the mixtures that have one, not dense's.
        """
        seen: dict[str, set[float]] = defaultdict(set)
        for end, value in zip(ends, values, strict=True):
            seen[end.arm].add(value)
        others = sorted(arm for arm in seen if arm != BASELINE)
        self.name = name
        self.arms = [BASELINE, *(arm for arm in others if len(seen[arm]) > 1)]
        self.exponents = [BASELINE, *(arm for arm in others if len(seen[arm]) >= own_exponent)]
        self.known = len(seen[BASELINE]) > 1
        self.values = np.array(values)[:, None]
        self.of_mixtures = of_mixtures and len(self.arms) > 1
        self.of_column = np.array([self.shares(end.arm) for end in ends])
        self.exponent_of_column = [self.exponent(arm) for arm in self.arms]

    def shares(self, arm: str) -> list[float]:
        """Of which of the factors an arm's is the mean: the share of each."""
        own = {arm} if arm in self.arms else set(self.arms[1:]) if self.of_mixtures else {BASELINE}
        return [(name in own) / len(own) for name in self.arms]

    def exponent(self, arm: str) -> int:
        """Which of the exponents an arm has."""
        return self.exponents.index(arm) if arm in self.exponents else 0


class _Table:
    """Runs as the arrays of a linear problem, whose unknowns are all but the exponents."""

    def __init__(self, ends: Sequence[RunEnd], arms: Sequence[str]) -> None:
        self.losses = np.array([end.loss for end in ends])
        self.of_arm = np.array([[end.arm == arm for arm in arms] for end in ends], dtype=float)
        terms = [
            _Term("data", ends, [end.tokens for end in ends], own_exponent=_OWN_EXPONENT, of_mixtures=False),
            _Term("size", ends, [end.parameters for end in ends], own_exponent=math.inf, of_mixtures=True),
        ]
        self.terms = [term for term in terms if term.known]

    def exponents_of(self, law: Law) -> list[float]:
        """A law's exponents in the order in which they are searched."""
        return [
            law.betas[arm] if term.name == "data" else law.alpha or 0.0 for term in self.terms for arm in term.exponents
        ]

    def solve(self, exponents: Sequence[float]) -> tuple[np.ndarray, float]:
        """The best factors for given exponents, those of each term in turn, and the sum of squared errors."""
        columns, rest = [self.of_arm], np.asarray(exponents)
        for term in self.terms:
            columns.append(term.of_column * term.values ** -rest[term.exponent_of_column])
            rest = rest[len(term.exponents) :]
        table = np.concatenate(columns, axis=1)
        scale = np.abs(table).max(0)
        factors = np.linalg.lstsq(table / scale, self.losses, rcond=None)[0] / scale
        return factors, float(np.square(table @ factors - self.losses).sum())


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How runs scatter around a law, as standard deviations in nats."""

    of_run: float
    of_end: float


def noise_of(ends: Sequence[RunEnd], law: Law) -> Noise:
    """The scatter of runs of one arm and size between seeds, and that of ends within a run, lack of fit included."""
    rest: dict[tuple[str, float, int], list[float]] = defaultdict(list)
    for end in ends:
        expected = law.loss(end.arm, parameters=end.parameters, tokens=end.tokens)
        rest[end.arm, end.parameters, end.seed].append(end.loss - expected)
    seeds: dict[tuple[str, float], list[float]] = defaultdict(list)
    for (arm, parameters, _), values in rest.items():
        seeds[arm, parameters].append(math.fsum(values) / len(values))
    between = [(value - math.fsum(group) / len(group)) ** 2 for group in seeds.values() for value in group]
    within = [(value - math.fsum(values) / len(values)) ** 2 for values in rest.values() for value in values]
    free_between, free_within = len(between) - len(seeds), len(within) - len(rest)
    return Noise(
        of_run=math.sqrt(math.fsum(between) / free_between) if free_between else UNKNOWN_NOISE,
        of_end=math.sqrt(math.fsum(within) / free_within) if free_within > 0 else 0.0,
    )


def law_replicates(ends: Sequence[RunEnd], law: Law, *, replicates: int = REPLICATES, seed: int = 0) -> list[Law]:
    """Laws of as many drawn sets of runs (parametric bootstrap), whose spread is what the seeds leave open."""
    noise, random = noise_of(ends, law), np.random.default_rng(seed)
    runs = sorted({(end.arm, end.parameters, end.seed) for end in ends})
    laws = []
    for _ in range(replicates):
        shift = dict(zip(runs, random.normal(0.0, noise.of_run, len(runs)), strict=True))
        single = random.normal(0.0, noise.of_end, len(ends))
        drawn = [
            RunEnd(
                arm=end.arm,
                parameters=end.parameters,
                tokens=end.tokens,
                seed=end.seed,
                loss=law.loss(end.arm, parameters=end.parameters, tokens=end.tokens)
                + float(shift[end.arm, end.parameters, end.seed] + own),
            )
            for end, own in zip(ends, single, strict=True)
        ]
        laws.append(fit_law(drawn, near=law))
    return laws


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a law of shorter runs says of the longest, and what they had: means over the seeds."""

    arm: str
    parameters: float
    tokens: float
    farther: float
    """How many times the longest budget of the fit."""
    predicted: float
    measured: float


def held_out_forecasts(ends: Sequence[RunEnd]) -> list[Forecast]:
    """Forecasts of every arm's longest runs of each size, where it has at least two shorter budgets there."""
    budgets: dict[tuple[str, float], list[float]] = defaultdict(list)
    for key, tokens in sorted({((end.arm, end.parameters), end.tokens) for end in ends}):
        budgets[key].append(tokens)
    longest = {key: tokens[-1] for key, tokens in budgets.items() if len(tokens) > 2}
    kept = [end for end in ends if longest.get((end.arm, end.parameters)) != end.tokens]
    usable = {arm for arm, _ in longest if len({end.tokens for end in kept if end.arm == arm}) > 1}
    if not usable:
        return []
    law = fit_law([end for end in kept if end.arm in usable])
    forecasts = []
    for (arm, parameters), tokens in longest.items():
        losses = [end.loss for end in ends if (end.arm, end.parameters, end.tokens) == (arm, parameters, tokens)]
        forecasts.append(
            Forecast(
                arm=arm,
                parameters=parameters,
                tokens=tokens,
                farther=tokens / budgets[arm, parameters][-2],
                predicted=law.loss(arm, parameters=parameters, tokens=tokens),
                measured=math.fsum(losses) / len(losses),
            )
        )
    return forecasts


def published_loss(*, active_parameters: float, tokens: float, experts: int) -> float:
    """The joint law for dense models and mixtures (arXiv 2502.05172): Switch's top 1, 79 million parameters and more.

    Args:
        active_parameters: N.
        tokens: D.
        experts: E; 1 is dense.
    """
    start, most = 2.0732, 290.4521
    e = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    log_e = math.log(e)
    size = 35.91 * e**-0.2285 * active_parameters ** (-0.1889 + 0.0098 * log_e)
    data = 35.98 * e**0.5529 * tokens ** (-0.1775 - 0.0259 * log_e)
    return size + data + 1.3637
