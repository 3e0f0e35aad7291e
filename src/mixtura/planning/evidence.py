"""The runs that advice stands on, and laws of the held-out loss over parameters and tokens, fitted to them.

The runs are small decoders of every family, trained at several budgets (docs/results.md). `evidence.json` is made of
the committed results by `python benchmarks/evidence.py`, and holds nothing else.

The laws say what they do not know. For arm a, a model of N parameters outside the embeddings (those of its dense
counterpart) and D training tokens

    L_a(N, D) = c_a + n_a N^-alpha + b_a D^-beta_a

where mixtures learn from tokens at a pace of their own, as in the joint law for dense models and mixtures (arXiv
2502.05172, equation 3, whose exponent of D moves with the number of experts): one beta for all arms missed the
differences at 30 million tokens by twice as much (docs/log.md). Given the exponents the rest is linear, so only they
are searched. An arm with runs of two budgets takes beta_a from dense, one of one budget b_a too, and one of one size
n_a: its difference is taken to stay. If dense has one size or budget, that term is left out, and part of c_a.

Where runs differ from the law is noise of two kinds: of a whole run, whose budgets share their first weights and most
of their data, and of a single end. `law_replicates` draws both again and again and fits each time.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.optimize import minimize

BASELINE = "dense"
"""The arm that all others are compared with."""
FEWEST_TOKENS = 900_000
"""Runs on fewer count as searches of a scale: after so few steps losses have hardly begun to follow a law."""
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


def fit_law(ends: Sequence[RunEnd]) -> Law:
    """The law with the least squared error.

    Args:
        ends: of dense and of any other arms.
    """
    arms = sorted({end.arm for end in ends})
    table = _Table(ends, arms)
    count = sum(len(term.exponents) for term in table.terms)
    found: list[float] = []
    if count:
        start, bounds = [0.3] * count, [_EXPONENTS] * count
        found = minimize(lambda at: table.solve(at)[1], start, bounds=bounds, method="L-BFGS-B").x.tolist()
    factors = table.solve(found)[0].tolist()
    floors, factors = dict(zip(arms, factors[: len(arms)], strict=True)), factors[len(arms) :]
    terms: dict[str, dict[str, float]] = {"size": {}, "data": {}}
    exponents: dict[str, dict[str, float]] = {"size": {}, "data": {}}
    for term in table.terms:
        terms[term.name] = {arm: factors[term.column(arm)] for arm in arms}
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
    """A power of one quantity: which arms have a factor and an exponent of their own; others take dense's."""

    def __init__(self, name: str, ends: Sequence[RunEnd], values: Sequence[float], *, own_exponent: float) -> None:
        """Counts every arm's values.

        Args:
            name: of the quantity.
            ends: the runs.
            values: the quantity, of each of them.
            own_exponent: from how many values on an arm has an exponent of its own.
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
        self.of_column = np.array([[self.column(end.arm) == k for k in range(len(self.arms))] for end in ends])
        self.exponent_of_column = [self.exponent(arm) for arm in self.arms]

    def column(self, arm: str) -> int:
        """Which of the factors an arm has."""
        return self.arms.index(arm) if arm in self.arms else 0

    def exponent(self, arm: str) -> int:
        """Which of the exponents an arm has."""
        return self.exponents.index(arm) if arm in self.exponents else 0


class _Table:
    """Runs as the arrays of a linear problem, whose unknowns are all but the exponents."""

    def __init__(self, ends: Sequence[RunEnd], arms: Sequence[str]) -> None:
        self.losses = np.array([end.loss for end in ends])
        self.of_arm = np.array([[end.arm == arm for arm in arms] for end in ends], dtype=float)
        terms = [
            _Term("data", ends, [end.tokens for end in ends], own_exponent=_OWN_EXPONENT),
            _Term("size", ends, [end.parameters for end in ends], own_exponent=math.inf),
        ]
        self.terms = [term for term in terms if term.known]

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


FILE = Path(__file__).with_name("evidence.json")
HIDDEN_MULTIPLE = 12
"""Parameters of a decoder layer as a multiple of D^2: four projections of attention, and 8 D^2 of the feed-forward."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all the runs share."""

    layers: int
    vocabulary: int
    context: int
    tokens_per_step: int
    experts: int
    top_k: int
    group_size: int
    text: str
    machine: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run at one budget."""

    arm: str
    """A family, or one of its controls."""
    width: int
    tokens: int
    seed: int
    loss: float
    """Held-out nats a token, as deployed: mixtures of tokens with two mixtures a token, in the better of the modes
    `population` and `alone`."""
    in_groups: float | None
    """Of mixtures of tokens as they train; None for the other families."""
    alone: float | None
    """The same in `alone` mode with two mixtures a token."""
    parameters: int
    """All of them, embeddings and every expert too."""
    seconds_per_step: float
    """Processor seconds on one thread."""
    processor: str
    """On which it was trained."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The runs and what they share."""

    setting: Setting
    rows: tuple[Row, ...]

    def of(self, arm: str, *, width: int | None = None) -> list[Row]:
        """The rows of an arm, of one width or of all."""
        return [row for row in self.rows if row.arm == arm and width in (None, row.width)]

    def arms(self) -> list[str]:
        """The names of all arms, dense first."""
        return sorted({row.arm for row in self.rows}, key=lambda arm: (arm != BASELINE, arm))

    def ends(self, arms: Sequence[str], *, in_groups: bool = False) -> list[RunEnd]:
        """What laws are fitted to.

        Args:
            arms: which arms.
            in_groups: take mixtures of tokens as they train instead of as deployed.
        """
        return [
            RunEnd(
                arm=row.arm,
                parameters=body_parameters(row.width, layers=self.setting.layers),
                tokens=row.tokens,
                seed=row.seed,
                loss=row.in_groups if in_groups and row.in_groups is not None else row.loss,
            )
            for row in self.rows
            if row.arm in arms
        ]

    def step_ratio(self, arm: str, *, width: int) -> tuple[float, int]:
        """A step's time over that of a dense one, at the measured width nearest to `width`, and that width.

        Only times of one processor are divided; of several, each counts by its number of the arm's runs.
        """
        dense: dict[tuple[int, str], list[float]] = defaultdict(list)
        for row in self.of(BASELINE):
            dense[row.width, row.processor].append(row.seconds_per_step)
        rows = [row for row in self.of(arm) if (row.width, row.processor) in dense]
        nearest = min(sorted({row.width for row in rows}), key=lambda other: abs(other - width))
        ratios = [row.seconds_per_step / fmean(dense[row.width, row.processor]) for row in rows if row.width == nearest]
        return fmean(ratios), nearest


def body_parameters(width: int, *, layers: int) -> int:
    """Parameters of a dense decoder without embeddings, head and norms."""
    return HIDDEN_MULTIPLE * layers * width * width


@cache
def load_evidence(path: Path = FILE) -> Evidence:
    """The evidence that comes with the package, or that of another file."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    names = stored["columns"]
    return Evidence(
        setting=Setting(**stored["setting"]),
        rows=tuple(Row(**dict(zip(names, row, strict=True))) for row in stored["rows"]),
    )
