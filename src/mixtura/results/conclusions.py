"""What the report adds to what was measured: the types of a summary. docs/report.md says what each field means."""

from dataclasses import dataclass
from typing import Literal

from mixtura.results.run import Measure

Outcome = Literal["baseline", "beats", "loses", "draw", "one_seed", "excluded"]
Exclusion = Literal["not_deployable", "leaks_future", "diverged"]
Trend = Literal["one_seed", "few_points", "level", "steady", "widening", "too_far", "closing"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval; `low` and `high` are None with one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Interval):
    """One arm minus another, paired by seed."""

    seeds: list[int]
    values: list[float]
    """The difference of each seed, in the order of `seeds`."""


@dataclass(frozen=True)
class EqualCostDifference(Difference):
    """A difference at the point where the cheaper of the two runs ends."""

    arm_step: float
    baseline_step: float


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How much sooner an arm reaches the baseline's final held-out loss."""

    n: int
    seeds: list[int]
    reached: int
    """How many seeds reach that loss."""
    steps: list[float | None]
    """The step at which each seed reaches it; None means never."""
    ratio_steps: Interval | None
    """Geometric mean over seeds, above 1 if the arm is sooner; None unless every seed reaches the loss."""
    ratio_seconds: Interval | None
    baseline_steps: float
    baseline_steps_to_arm_final: list[float | None]
    """The steps at which the baseline passes the arm's final loss, for each seed."""


@dataclass(frozen=True)
class Fit:
    """The fitted trend: gap = intercept + slope ln(step), from `first_step` on."""

    intercept: float
    slope: float
    first_step: float


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Whether the gap between an arm and the baseline is closing, and at which budget it would be zero."""

    status: Trend
    n: int
    seeds: list[int]
    end_step: float
    end_tokens: float
    gap: Interval
    """The fitted gap at the end of the run."""
    slope_per_doubling: Interval | None = None
    fit: Fit | None = None
    step: float | None = None
    tokens: float | None = None
    step_range: list[float | None] | None = None
    """The earliest and latest crossing over the seeds; None means never."""
    token_range: list[float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """The published curve of Mixture of Tokens."""

    source: str
    setting: str
    measure: str
    tokens_per_step: int
    behind_until_steps: list[int]
    """The range in which it overtakes dense per step."""
    behind_until_tokens: list[int]
    slower_until_steps: list[int]
    """The range in which it overtakes dense per second."""
    slower_until_tokens: list[int]
    end_steps: int
    end_tokens: int
    end_ratio_steps: float
    end_ratio_seconds: float
    replicated: bool


@dataclass(frozen=True)
class MeanScore:
    """One measure in one mode over the seeds of an arm."""

    mean: float | None
    """Over the seeds that did not diverge."""
    values: list[float | None]
    """One value for each seed, in order; None for a seed that diverged."""


@dataclass(frozen=True)
class Scores:
    """Means of the verdict's measure over the seeds."""

    deployed: float | None
    trained: float | None


@dataclass(frozen=True)
class Differences:
    """An arm, as deployed and as trained, minus the baseline as deployed."""

    deployed: Difference | None
    trained: Difference | None


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Means over the runs of an arm, but spikes are summed and `grad_norm_max` is the largest."""

    load_imbalance: float | None
    dropped_share: float | None
    router_entropy: float | None
    train_seconds: float | None
    grad_norm_mean: float | None
    grad_norm_max: float | None
    spikes_loss: int
    spikes_grad_norm: int


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """The summary of one arm."""

    label: str
    """The arm's name on the page; no two arms share one."""
    family: str
    baseline: bool
    outcome: Outcome
    seeds: list[int]
    training_mode: str
    deployed_mode: str | None
    diverged: int
    """How many runs diverged."""
    excluded: Exclusion | None
    """Why the verdict leaves the arm out; None if it takes part."""
    modes: dict[str, dict[str, MeanScore]]
    """Final scores by inference mode, then by measure."""
    score: Scores
    mode_gap: Difference | None
    """The arm's score as deployed minus its score as trained."""
    parameters_total: int
    parameters_trainable: int
    flops_ratio: float
    seconds_ratio: float | None
    peak_memory_bytes: int | None
    averages: Averages
    difference: Differences
    speed_up: SpeedUp | None
    equal_time: EqualCostDifference | None
    equal_flops: EqualCostDifference | None
    crossing: Crossing | None


@dataclass(frozen=True)
class Pair:
    """Two arms that the verdict compares, the first against the second."""

    arm: str
    against: str
    difference: Difference | None
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much training every run had."""

    tokens: int
    tokens_per_step: int
    steps: int
    seeds: int
    """The smallest number of seeds of any arm."""
    rates_settled: bool
    """Whether every arm ran at a searched rate that is not at the edge of its grid."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rule says, in sentences and in names."""

    headline: str
    """The result in a few words."""
    finding: str
    """The result in a sentence, with the budget."""
    answer: str | None
    """Which arm to take; None where the rule gives no verdict."""
    speed: list[str]
    longer: list[str]
    best: str | None
    """The arm that beats all others."""
    leader: str | None
    """The arm with the best mean."""
    tied: list[str]
    """Arms that the leader does not beat."""


@dataclass(frozen=True)
class Caution:
    """A warning; `arm` is None where it concerns all arms."""

    level: Literal["serious", "warning", "note"]
    kind: str
    arm: str | None
    text: str


@dataclass(frozen=True)
class Limit:
    """Something that the comparison cannot tell."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Every number and sentence that the report adds."""

    measure: Measure
    rule: str
    budget: Budget
    verdict: Verdict
    cautions: list[Caution]
    """Warnings, the gravest first."""
    limits: list[Limit]
    arms: dict[str, ArmSummary]
    pairs: list[Pair]
    anchor: Anchor | None
