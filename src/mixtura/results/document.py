"""What results.json holds: the whole comparison, and each of its arms. docs/report.md says what each field means."""

from dataclasses import dataclass, field
from typing import Literal

from mixtura.results.conclusions import Summary
from mixtura.results.json_form import Facts
from mixtura.results.run import Measure, RunResult

SCHEMA_VERSION = 3
"""The version of results.json and of the files it is made from.

Version 2 kept the details of a task without naming the task, a curve's measures beside its costs, and the
facts on the data beside the budget; see `upgrade`.
"""

Task = Literal["pretraining", "translation", "classification", "chat"]


@dataclass(frozen=True)
class Trial:
    """One learning rate of a search, at one initialisation scale."""

    learning_rate: float
    loss: float | None
    """Held-out loss as deployed, the mean over the search's seeds; None if a run diverged."""
    scale: float | None = None
    """The `feed_forward_scale` that was tried; None means the arm's own."""


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The search that an arm's learning rate came from."""

    trials: list[Trial]
    steps: int
    """Steps of one trial."""
    seeds: list[int]
    best: float
    at_edge: bool
    """Whether the best rate or scale is the lowest or highest tried, so that a better one may lie beyond."""
    source: str
    best_scale: float | None = None
    """The `feed_forward_scale` of the best trial; None where scales were not searched."""


@dataclass(frozen=True, kw_only=True)
class ArmDescription:
    """What an arm is and costs before it runs."""

    settings: Facts
    """The settings that distinguish the arm, as plain values."""
    parameters_total: int
    parameters_active: int
    """Parameters used for one token."""
    parameters_trainable: int
    flops_per_token: float
    """Forward and backward pass, with routing and mixing counted."""
    flops_ratio: float
    """FLOPs per token divided by the baseline's."""


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Shares of the time of a step, which sum to one."""

    forward: float
    """Forward pass and loss."""
    backward: float
    optimizer: float
    """Optimizer and gradient clipping."""


@dataclass(frozen=True, kw_only=True)
class ArmTiming:
    """Seconds and memory of a step, measured side by side with the other arms'."""

    seconds_per_step: float | None
    """The median step."""
    seconds_ratio: float | None
    """The median over paired steps of the ratio to the baseline's step."""
    peak_memory_bytes: int | None
    optimizer_state_bytes: int | None
    """The part of the peak that is the optimizer's state."""
    step_parts: StepParts | None = None
    """Where the time of a step goes; None in older files, which lack it."""


@dataclass(frozen=True)
class Leaks:
    """Whether a token's output depends on what it must not depend on."""

    future: bool
    batch: bool
    """On the rest of the batch, while training."""
    batch_deployed: bool | None = None
    """On the rest of the batch, as deployed; None without a deployed mode."""


@dataclass(frozen=True, kw_only=True)
class ArmResult(ArmDescription, ArmTiming):
    """One side of the comparison, with all its runs."""

    family: str
    label: str
    training_mode: str
    deployed_mode: str | None
    """The inference mode to deploy; None if the arm cannot be deployed."""
    learning_rate: float
    """Peak rate of the runs."""
    learning_rate_search: SearchRecord | None
    leaks: Leaks
    runs: list[RunResult]

    @property
    def searched(self) -> SearchRecord | None:
        """The search of the learning rate, where there was more than one rate to choose from."""
        search = self.learning_rate_search
        return search if search is not None and len(search.trials) > 1 else None


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The data, and how much of it a run sees."""

    description: str
    tokens_per_step: int
    tokens_per_run: int
    epochs: float | None
    """How often a run reads its training data."""
    facts: Facts
    """Counts that depend on the task, such as what was left out."""


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """An arm minus the baseline on the same test examples, by paired bootstrap."""

    difference: float
    p_value: float
    low: float | None = None
    """Lower end of the 95 % interval; None in translation."""
    high: float | None = None


@dataclass(frozen=True)
class AcrossArms:
    """Results that need all finished runs together."""

    paired_bootstrap: dict[str, dict[str, PairedTest]] = field(default_factory=dict)
    """For each arm except the baseline: by language pair in translation, under "all" in classification, under "loss" in
    chat."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole comparison."""

    created: str
    """When the file was written, ISO 8601 with time zone."""
    command: str
    """The command line that repeats the comparison."""
    task: Task
    measure: Measure
    """The measure that decides the verdict."""
    recipe: Facts
    """The recipe with all defaults, as nested tables."""
    recipe_toml: str
    environment: dict[str, str | int | None]
    data: DataFacts
    held_equal: list[str]
    baseline: str
    total_seconds: float | None
    arms: dict[str, ArmResult]
    across_arms: AcrossArms
    summary: Summary | None = None
    """What the report concludes; None until it is computed."""
    schema_version: int = SCHEMA_VERSION

    @property
    def name(self) -> str | None:
        """The name of the recipe."""
        name = self.recipe.get("name")
        return name if isinstance(name, str) else None

    @property
    def continued(self) -> bool:
        """Whether any arm starts from a checkpoint."""
        arms = self.recipe.get("arms")
        tables = arms.values() if isinstance(arms, dict) else ()
        return any(isinstance(table, dict) and table.get("init_from") is not None for table in tables)
