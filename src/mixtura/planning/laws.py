"""Laws of the held-out loss over parameters and tokens, fitted to runs, with what they do not know.

For arm a, a model of N parameters outside the embeddings (those of its dense counterpart) and D training tokens

    L_a(N, D) = c_a + n_a N^-alpha + b_a D^-beta

with exponents that all arms share, as the joint law for dense models and mixtures (arXiv 2502.05172, equation 3) does
but for small terms: few budgets cannot tell an exponent for each arm. Given the exponents the rest is linear, so only
they are searched. An arm with runs of one width takes n_a from dense; if dense has one width too, the second term is
left out, and part of c_a.

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
_EXPONENTS = (0.05, 1.0)
"""Between which exponents are searched."""


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
    """None where all runs have one N."""
    beta: float
    size_terms: dict[str, float]
    """n of every arm; empty likewise."""
    floors: dict[str, float]
    """c of every arm."""
    data_terms: dict[str, float]
    """b of every arm."""

    def loss(self, arm: str, *, parameters: float, tokens: float) -> float:
        """Held-out nats a token."""
        size = 0.0 if self.alpha is None else self.size_terms[arm] * parameters**-self.alpha
        return self.floors[arm] + size + self.data_terms[arm] * tokens**-self.beta

    def tokens_for(self, arm: str, loss: float, *, parameters: float) -> float:
        """How many tokens bring an arm down to a loss; infinite if none do."""
        rest = loss - self.loss(arm, parameters=parameters, tokens=math.inf)
        return math.inf if rest <= 0 else (self.data_terms[arm] / rest) ** (1 / self.beta)


def fit_law(ends: Sequence[RunEnd]) -> Law:
    """The law with the least squared error.

    Args:
        ends: of every arm at least two budgets.

    Raises:
        ValueError: an arm has one budget.
    """
    arms = sorted({end.arm for end in ends})
    for arm in arms:
        if len({end.tokens for end in ends if end.arm == arm}) < 2:
            raise ValueError(f"{arm} has runs of one budget: a law needs two or more.")
    table = _Table(ends, arms)
    start = [0.3] * table.exponents
    bounds = [_EXPONENTS] * table.exponents
    found = minimize(lambda exponents: table.solve(exponents)[1], start, bounds=bounds, method="L-BFGS-B")
    terms = table.solve(found.x)[0].tolist()
    floors, data_terms, size_terms = terms[: len(arms)], terms[len(arms) : 2 * len(arms)], terms[2 * len(arms) :]
    return Law(
        alpha=float(found.x[1]) if table.sized else None,
        beta=float(found.x[0]),
        size_terms={arm: size_terms[table.size_column(arm)] for arm in arms} if table.sized else {},
        floors=dict(zip(arms, floors, strict=True)),
        data_terms=dict(zip(arms, data_terms, strict=True)),
    )


class _Table:
    """Runs as the arrays of a linear problem, whose unknowns are all but the exponents."""

    def __init__(self, ends: Sequence[RunEnd], arms: Sequence[str]) -> None:
        self.losses = np.array([end.loss for end in ends])
        self.tokens = np.array([end.tokens for end in ends])
        self.parameters = np.array([end.parameters for end in ends])
        self.of_arm = np.array([[end.arm == arm for arm in arms] for end in ends], dtype=float)
        sizes = {arm: len({end.parameters for end in ends if end.arm == arm}) for arm in arms}
        self.sized = [BASELINE, *(arm for arm in arms if sizes[arm] > 1 and arm != BASELINE)]
        if sizes.get(BASELINE, 1) < 2:
            self.sized = []
        self.of_size = np.array([[self.size_column(end.arm) == k for k in range(len(self.sized))] for end in ends])
        self.exponents = 2 if self.sized else 1

    def size_column(self, arm: str) -> int:
        """Which of the size terms an arm has."""
        return self.sized.index(arm) if arm in self.sized else 0

    def solve(self, exponents: Sequence[float]) -> tuple[np.ndarray, float]:
        """The best terms for given exponents, and the sum of squared errors."""
        columns = [self.of_arm, self.of_arm * self.tokens[:, None] ** -exponents[0]]
        if self.sized:
            columns.append(self.of_size * self.parameters[:, None] ** -exponents[1])
        table = np.concatenate(columns, axis=1)
        scale = np.abs(table).max(0)
        terms = np.linalg.lstsq(table / scale, self.losses, rcond=None)[0] / scale
        return terms, float(np.square(table @ terms - self.losses).sum())


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
        of_run=math.sqrt(math.fsum(between) / free_between) if free_between else 0.0,
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
        laws.append(fit_law(drawn))
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
