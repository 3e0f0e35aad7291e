"""What results.json holds, the whole comparison and each of its arms, and how it and the files of runs are read and
written.

docs/report.md says what each field means. Reading says in a sentence whatever is wrong; a file is written whole or not
at all. A file of an older schema is brought to today's one version at a time. These steps see plain values only;
whatever they leave wrong, reading the records finds and names.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mixtura.errors import UserError
from mixtura.files import write_json
from mixtura.results.conclusions import Summary
from mixtura.results.json_form import Facts, NotThatRecord, from_plain, to_plain
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
    """Parameters used for one token as deployed."""
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
class BudgetScore:
    """What a run on few training examples reached."""

    rows: int
    """Training examples of each class."""
    seed: int
    """Of the run and of the choice of the examples."""
    accuracy: float
    """On the test examples, in percent; micro F1 where a text has several labels."""


def budget_folder(rows: int, arm: str, seed: int) -> Path:
    """Where in a comparison's folder such a run lies."""
    return Path("budgets", str(rows), arm, f"seed{seed}")


@dataclass(frozen=True)
class AcrossArms:
    """Results that need all finished runs together."""

    paired_bootstrap: dict[str, dict[str, PairedTest]] = field(default_factory=dict)
    """For each arm except the baseline: by language pair in translation, under "all" in classification, by measure in
    chat and where a text has several labels."""
    comet: dict[str, dict[str, PairedTest]] = field(default_factory=dict)
    """The same in COMET, by language pair; empty where it was not asked for."""
    budgets: dict[str, list[BudgetScore]] = field(default_factory=dict)
    """For each arm its accuracy with few training examples, in classification where `data.budgets` names some."""
    references: dict[str, list[BudgetScore]] = field(default_factory=dict)
    """The same of what is no arm: "SetFit", where it was asked for."""


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


Plain = dict[str, Any]
"""A stored table."""


def upgrade_results(stored: Plain) -> Plain:
    """The content of a results.json of version 2, in today's form; others are returned as they are."""
    return _results_from_2(stored) if stored.get("schema_version") == 2 else stored


def upgrade_run(stored: Plain) -> Plain:
    """The content of a result.json, which says its version since version 3, in today's form."""
    return _run_from_2(stored) if "schema_version" not in stored else stored


def _results_from_2(stored: Plain) -> Plain:
    budget = ("description", "tokens_per_step", "tokens_per_run", "epochs")
    data = stored["data"]
    arms = {
        name: {**arm, "runs": [_run_from_2({"learning_rate": arm["learning_rate"], **run}) for run in arm["runs"]]}
        for name, arm in stored["arms"].items()
    }
    # What the report said then is computed anew.
    kept = {key: value for key, value in stored.items() if key != "summary"}
    return {
        **kept,
        "schema_version": SCHEMA_VERSION,
        "data": {
            **{key: data.get(key) for key in budget},
            "facts": {key: value for key, value in data.items() if key not in budget},
        },
        "arms": arms,
        "across_arms": {"paired_bootstrap": _tests_from_2(stored.get("across_arms") or {})},
    }


def _tests_from_2(across: Plain) -> Plain:
    found = across.get("paired_bootstrap") or {}
    return {
        name: {"all": _test_from_2(tests)}
        if "accuracy_difference" in tests
        else {pair: _test_from_2(test) for pair, test in tests.items()}
        for name, tests in found.items()
    }


def _test_from_2(test: Plain) -> Plain:
    names = {"accuracy_difference": "difference", "chrf_difference": "difference"}
    return {names.get(key, key): value for key, value in test.items()}


def _run_from_2(run: Plain) -> Plain:
    return {**run, "details": _details_from_2(run.get("details") or {}), "curve": [*map(_point_from_2, run["curve"])]}


def _point_from_2(point: Plain) -> Plain:
    costs = ("step", "tokens", "seconds", "flops")
    return {
        **{key: point[key] for key in costs if key in point},
        "measures": {key: value for key, value in point.items() if key not in costs},
    }


def _details_from_2(details: Plain) -> Plain | None:
    kinds = {"pairs": "translation", "confusion": "classification", "peakedness": "pretraining"}
    kind = next((kind for key, kind in kinds.items() if key in details), None)
    if kind is None:
        return None
    if "labels" in details:
        details = {**details, "labels": [str(label) for label in details["labels"]]}
    return {**details, "kind": kind}


RESULTS = "results.json"
RESULT = "result.json"
"""Of one run."""

T = TypeVar("T")


def read_results(path: Path) -> Results | None:
    """A stored comparison, of this schema or the one before it; None when there is no such file.

    Raises:
        UserError: the file is damaged, or of a version that this release does not read.
    """
    stored = read_json(path)
    return None if stored is None else results_from_plain(stored, path)


def results_from_plain(stored: Plain, path: Path) -> Results:
    """The comparison that was read from `path`.

    Raises:
        UserError: see `read_results`.
    """
    version = stored.get("schema_version")
    if version not in (2, SCHEMA_VERSION):
        raise UserError(
            f"'{path}' is of schema version {version}, and this release reads versions 2 and {SCHEMA_VERSION}: run the "
            "comparison again, or use the release that wrote it."
        )
    results = _read(Results, stored, path, upgrade_results)
    if results.baseline not in results.arms:
        raise _damaged(path, f"baseline is '{results.baseline}', which is none of its arms")
    return results


def write_results(path: Path, results: Results) -> None:
    """Writes results.json; raises ValueError for NaN, since no other reader takes it."""
    write_json(path, to_plain(results))


def read_run(path: Path) -> RunResult | None:
    """A stored run, of this schema or the one before it; None when there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    stored = read_json(path)
    return None if stored is None else _read(RunResult, stored, path, upgrade_run)


def write_run(path: Path, result: RunResult) -> None:
    """Writes the result.json of a run."""
    write_json(path, {"schema_version": SCHEMA_VERSION, **to_plain(result)})


def read_records(path: Path, record: type[T], stored: Plain) -> dict[str, T]:
    """Records of one type by name, from the table `stored` that was read from `path`.

    Raises:
        UserError: the file is damaged.
    """
    return {name: _read(record, value, path) for name, value in stored.items()}


def _read(record: type[T], stored: Plain, path: Path, upgrade: Callable[[Plain], Plain] = lambda plain: plain) -> T:
    try:
        return from_plain(record, upgrade(stored))
    except NotThatRecord as error:
        raise _damaged(path, str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _damaged(path, "it lacks what its version has") from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' is damaged ({reason}): delete it, and that part is computed again.")


def read_json(path: Path, *, keys: Collection[str] = ()) -> Plain | None:
    """The JSON object in `path`, or None when there is no such file.

    Raises:
        UserError: the file is damaged, or lacks one of `keys`.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise _damaged(path, "it is no JSON") from None
    if not isinstance(stored, dict):
        raise _damaged(path, "it is no JSON object")
    if missing := [key for key in keys if key not in stored]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return stored
