"""What one run leaves: its held-out measures, its curves and how its training went.

A run is stored in `arms/<arm>/seed<k>/result.json` and again, with what its curve cost, among the `runs` of an arm in
results.json. docs/report.md says what each field means.
"""

from dataclasses import dataclass
from typing import Literal

from mixtura.results.details import RunDetails


@dataclass(frozen=True)
class Measure:
    """A number that judges a model on held-out data."""

    key: str
    """Its key in results, such as "loss" or "chrf"."""
    name: str
    """In a sentence or at a table's row: "held-out loss", "chrF", "accuracy"."""
    unit: str
    """Behind the number: "nats a token", "points", "%"; may be empty."""
    better: Literal["lower", "higher"]
    digits: int = 3
    """Decimals in tables."""


LOSS = Measure("loss", "held-out loss", "nats a token", "lower")

ByMode = dict[str, float | None]
"""A value for each inference mode; None where a run diverged."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation on the way of a run."""

    step: int
    tokens: float
    """Training tokens so far."""
    seconds: float
    """Of optimisation so far; in results.json at the time a step takes side by side with the other arms'."""
    measures: dict[str, ByMode]
    """By key and mode; the loss among them."""
    flops: float | None = None
    """Of training so far; known once the arm's costs are."""

    @property
    def loss(self) -> ByMode:
        """The held-out loss in each mode."""
        return self.measures.get("loss", {})


@dataclass(frozen=True)
class TrainPoint:
    """The mean training loss over a stretch of steps that ends at `step`."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class GradientNorm:
    """Of all steps, before clipping."""

    mean: float
    max: float


@dataclass(frozen=True)
class Spikes:
    """How often a series jumped."""

    loss: int
    grad_norm: int


@dataclass(frozen=True)
class LoadHistory:
    """Each expert's share of the load at every evaluation."""

    layers: list[int]
    """Depths of the mixture layers."""
    steps: list[int]
    share: list[list[list[float]]]
    """`share[step][layer][expert]`; those of a layer sum to one."""


@dataclass(frozen=True, kw_only=True)
class TrainingHistory:
    """How a training went, from its metrics alone."""

    curve: list[CurvePoint]
    train_curve: list[TrainPoint]
    grad_norm: GradientNorm | None
    """None before the first step."""
    spikes: Spikes
    load: LoadHistory | None
    """None where a model has no mixtures, as are the three below."""
    load_imbalance: float | None
    """Largest over mean load, mean over layers, at the last evaluation."""
    dropped_share: float | None
    """Of routed rows, at the last evaluation."""
    router_entropy: float | None
    """Over its maximum, at the last evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunResult(TrainingHistory):
    """All that is kept of one arm and one seed."""

    seed: int
    learning_rate: float
    """Peak rate."""
    steps: int
    train_seconds: float
    final: dict[str, dict[str, float | None]]
    """For each mode the measures by key; what needs decoding is measured in the deployed mode alone."""
    details: RunDetails | None = None
    """What its task tells beyond measures; None for a trial of the search, and where a task has nothing to add."""

    @property
    def diverged(self) -> bool:
        """Whether it ended without measures."""
        return all(value is None for measures in self.final.values() for value in measures.values())
