"""What the report adds to what was measured: the types of a summary. docs/report.md says what each field means."""

from dataclasses import dataclass
from typing import Literal

from mixtura.results.run import Measure

Outcome = Literal["baseline", "beats", "loses", "draw", "one_seed", "excluded"]
Exclusion = Literal["not_deployable", "leaks_future", "diverged"]
Trend = Literal["one_seed", "few_points", "level", "steady", "widening", "too_far", "closing"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval, which one seed has not."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Interval):
    """One arm minus another, paired by seed."""

    seeds: list[int]
    values: list[float]
    """Of each seed."""


@dataclass(frozen=True)
class EqualCostDifference(Difference):
    """A difference where the cheaper of the two ends."""

    arm_step: float
    baseline_step: float


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How much sooner an arm reaches the baseline's final held-out loss."""

    n: int
    seeds: list[int]
    reached: int
    """How many seeds do."""
    steps: list[float | None]
    """At which each seed does; None is never."""
    ratio_steps: Interval | None
    """Geometric mean, above 1 is sooner; None unless all reach."""
    ratio_seconds: Interval | None
    baseline_steps: float
    baseline_steps_to_arm_final: list[float | None]
    """The other way round."""


@dataclass(frozen=True)
class Fit:
    """gap = intercept + slope ln(step), from `first_step` on."""

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
    """Fitted, at the end of the run."""
    slope_per_doubling: Interval | None = None
    fit: Fit | None = None
    step: float | None = None
    tokens: float | None = None
    step_range: list[float | None] | None = None
    """Over the seeds; None is never."""
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
    """The same per second."""
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
    """In the order of the seeds; None for one that diverged."""


@dataclass(frozen=True)
class Scores:
    """Means of the verdict's measure."""

    deployed: float | None
    trained: float | None


@dataclass(frozen=True)
class Differences:
    """To the baseline as deployed, of an arm as deployed and as trained."""

    deployed: Difference | None
    trained: Difference | None


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Over the runs of an arm; spikes are sums, the largest gradient norm is the largest."""

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
    """Never the same for two arms."""
    family: str
    baseline: bool
    outcome: Outcome
    seeds: list[int]
    training_mode: str
    deployed_mode: str | None
    diverged: int
    """How many runs."""
    excluded: Exclusion | None
    """Why the verdict leaves it out."""
    modes: dict[str, dict[str, MeanScore]]
    """By mode and measure."""
    score: Scores
    mode_gap: Difference | None
    """As deployed minus as trained."""
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
    """Two arms of the verdict, the first against the second."""

    arm: str
    against: str
    difference: Difference | None
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much every run had."""

    tokens: int
    tokens_per_step: int
    steps: int
    seeds: int
    """The fewest of any arm."""
    rates_settled: bool
    """Every arm ran at a searched rate inside its grid."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rule says, in sentences and in names."""

    headline: str
    """In a few words."""
    finding: str
    """The same in a sentence, with the budget."""
    answer: str | None
    """None where the rule gives no verdict."""
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
    """A warning; `arm` is None where it is about all."""

    level: Literal["serious", "warning", "note"]
    kind: str
    arm: str | None
    text: str


@dataclass(frozen=True)
class Limit:
    """What the comparison cannot tell."""

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
    """The gravest first."""
    limits: list[Limit]
    arms: dict[str, ArmSummary]
    pairs: list[Pair]
    anchor: Anchor | None
