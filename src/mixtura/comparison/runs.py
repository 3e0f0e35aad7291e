"""The runs of a comparison: an arm and a seed, from initialisation to its final held-out measures; and the search of
rates and scales, the same effort for every arm, with the record of it that ships with a recipe.

A finished run has a `result.json` and is never repeated; an unfinished one goes on from its newest checkpoint.

Without a search, a comparison shows how well a shared rate suits each arm: at one rate for all, Mixture of Tokens was
1.4 times faster than dense in a prototype, and with half the rate for dense that lead was gone. The scale at which
weights are drawn is another such value.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mixtura.comparison.plan import AnyRecipe
from mixtura.config import Interrupted, Recipe, TrainingConfig, TranslationRecipe, UserError
from mixtura.config.initialization import start_scales
from mixtura.files import write_json
from mixtura.results import LOSS, Facts, RunResult, SearchRecord
from mixtura.results.document import RESULT, Trial, read_json, read_records, read_run, write_run
from mixtura.results.json_form import to_plain
from mixtura.training import (
    METRICS,
    ProgressReporter,
    TrainingDiverged,
    ranks,
    read_metrics,
    summarize_metrics,
    train,
)
from mixtura.training.interface import Arm


def run_arm(
    arm: Arm,
    *,
    seed: int,
    learning_rate: float,
    training: TrainingConfig,
    out: Path,
    label: str,
    reporter: ProgressReporter,
    trial: bool = False,
) -> RunResult:
    """Trains and evaluates one run in folder `out`, or reads its result when it is finished.

    A `trial` of a learning rate is judged by its held-out loss alone. In tasks whose own measure is another one, it is
    evaluated as in the middle of a run: nothing is decoded, and the test examples stay unseen.

    Raises:
        UserError: the folder's files are damaged.
        Interrupted: the user pressed Ctrl-C; the run is saved.
        TrainingDiverged: the loss is no longer finite.
    """
    stored = read_run(out / RESULT)
    if stored is not None:
        _check_same_run(stored, out, seed=seed, learning_rate=learning_rate, steps=training.steps)
        reporter.start_run(label, step=stored.steps, steps=stored.steps)
        reporter.end_run()
        return stored
    model, task = arm.build(seed), arm.task
    outcome = train(
        model,
        task=task,
        config=training,
        learning_rate=learning_rate,
        seed=seed,
        out=out,
        label=label,
        resume=True,
        reporter=reporter,
    )
    if outcome.interrupted:
        raise Interrupted(f"Stopped in '{label}' at step {outcome.steps}: everything is saved.")
    if outcome.steps != training.steps:
        raise UserError(f"'{out / METRICS}' is damaged: delete '{out}', and that run is done again.")
    final = {}
    if ranks.is_first():
        final = task.evaluate(model, final=not trial or (task.measure.key == LOSS.key and not task.decodes))
    if not ranks.of_first(all(math.isfinite(measure) for of in final.values() for measure in of.values())):
        raise TrainingDiverged(
            f"{label} diverged: its final held-out loss is out of range; lower its learning rate, which is "
            f"{learning_rate:g}.",
            step=outcome.steps,
        )
    if ranks.is_first():
        history = summarize_metrics(read_metrics(out / METRICS))
        result = RunResult(
            **vars(history),
            seed=seed,
            learning_rate=learning_rate,
            steps=outcome.steps,
            train_seconds=outcome.train_seconds,
            final={mode: dict(measures) for mode, measures in final.items()},
            details=None if trial else task.details(model, out=out),
        )
        write_run(out / RESULT, result)
    ranks.wait_for_all()
    written = read_run(out / RESULT)
    assert written is not None, "the first process has written it"
    return written


def diverged_run(arm: Arm, out: Path, *, seed: int, learning_rate: float) -> RunResult:
    """The record of a run that diverged: its history up to there, and no measures."""
    records = read_metrics(out / METRICS)
    last = next((record for record in reversed(records) if "loss" in record), {"step": 0, "seconds": 0.0})
    modes = [mode for mode in (arm.training_mode, arm.deployed_mode) if mode is not None]
    return RunResult(
        **vars(summarize_metrics(records)),
        seed=seed,
        learning_rate=learning_rate,
        steps=last["step"],
        train_seconds=last["seconds"],
        final={mode: dict.fromkeys((LOSS.key, arm.task.measure.key)) for mode in modes},
    )


def _check_same_run(stored: RunResult, out: Path, **asked: float) -> None:
    """Refuses a finished run of other settings, such as one that was trained at another rate before a search."""
    for key, value in asked.items():
        if key == "steps" and stored.diverged:
            continue
        before = getattr(stored, key)
        if before != value:
            raise UserError(
                f"The finished run in '{out}' has {key} {before:g}, and now it is {value:g}: choose another "
                f"folder with --out, or delete '{out}', and that run is done again."
            )


def trial_loss(arm: Arm, result: RunResult) -> float:
    """The held-out loss that a trial is judged by: in the deployed mode if that is evaluated during training."""
    final = result.final
    mode = next(mode for mode in (arm.deployed_mode, arm.training_mode, *final) if mode in final)
    loss = final[mode]["loss"]
    assert loss is not None, "a run that diverged has no result"
    return loss


def search_rates_and_scales(
    recipe: AnyRecipe, run_trial: Callable[[str, float, float | None, int], float]
) -> dict[str, SearchRecord]:
    """Tries every rate of the recipe on every arm, with every scale where the recipe names some.

    Args:
        recipe: its `search.learning_rates` and `search.scales` are tried.
        run_trial: (arm, rate, scale or None, seed) -> held-out loss of a trial, as deployed; infinite where it
            diverged. It is the loss in every task: it needs no decoding and no test examples, while the verdict uses
            the task's measure.

    Returns:
        For each arm the trials, the rate and the scale of the lowest mean loss over the search's seeds, and whether
        they lie at an edge of the grid, where better ones may lie beyond.

    Raises:
        UserError: an arm diverged at every rate.
    """
    rates = sorted(recipe.search.learning_rates)
    seeds = recipe.search.seeds
    grid = [(rate, scale) for rate in rates for scale in sorted(recipe.search.scales) or [None]]
    losses = {name: [mean(run_trial(name, *pair, seed) for seed in seeds) for pair in grid] for name in recipe.arms}
    for name, tried in losses.items():
        if min(tried) == float("inf"):
            raise UserError(
                f"Every learning rate diverged for '{name}', even {rates[0]:g}: add lower ones to "
                "'search.learning_rates'."
            )
    return {name: _record(recipe, grid, losses[name]) for name in recipe.arms}


def _record(recipe: AnyRecipe, grid: list[tuple[float, float | None]], losses: list[float]) -> SearchRecord:
    best, best_scale = grid[losses.index(min(losses))]
    finite = [loss if loss != float("inf") else None for loss in losses]
    rates = [rate for rate, _ in grid]
    scales = recipe.search.scales
    return SearchRecord(
        trials=[Trial(rate, loss, scale) for (rate, scale), loss in zip(grid, finite, strict=True)],
        steps=recipe.search.steps or recipe.training.steps,
        seeds=list(recipe.search.seeds),
        best=best,
        best_scale=best_scale,
        at_edge=_at_edge(best, rates) or (best_scale is not None and _at_edge(best_scale, scales)),
        source="this run",
    )


def _at_edge(best: float, tried: Sequence[float]) -> bool:
    return len(set(tried)) > 1 and best in (min(tried), max(tried))


def write_record(path: Path, recipe: AnyRecipe, records: dict[str, SearchRecord]) -> None:
    """Writes the record of a recipe's search; put beside the recipe, it says where the recipe's rates come from."""
    write_json(path, {"fingerprint": fingerprint(recipe), "arms": to_plain(records)})


def fingerprint(recipe: AnyRecipe) -> str:
    """A hash of everything that rates and scales are tuned for: data, model, training and arms, but not those.

    Only what differs from the defaults counts, so that a key which a later version adds leaves a record valid.
    """
    table = _changed(recipe)
    # Settings of what is measured or saved do not affect the best rate.
    training = table.get("training", {})
    assert isinstance(training, dict)
    for key in ("eval_every", "eval_sequences", "final_eval_sequences", "save_every", "threads"):
        training.pop(key, None)
    tuned_for = {key: table.get(key, {}) for key in ("task", "data", "base", "model", "training", "arms")}
    if derived := _derived_scales(recipe):
        tuned_for["start"] = derived
    return hashlib.sha256(json.dumps(tuned_for, sort_keys=True).encode()).hexdigest()[:16]


def _derived_scales(recipe: AnyRecipe) -> Facts:
    """How the arms' weights are drawn where that is derived and not named: another derivation outdates a record."""
    if isinstance(recipe, Recipe):
        arms = {name: arm for name, arm in recipe.arms.items() if arm.init_from is None}
    elif isinstance(recipe, TranslationRecipe) and recipe.base.name is None:
        arms = {name: arm.feed_forward for name, arm in recipe.arms.items()}
    else:
        return {}
    scales = {name: start_scales(arm, recipe.model) for name, arm in arms.items()}
    return {name: of for name, of in scales.items() if any(of.values())}


def _changed(config: Any) -> Facts:
    """The keys of a section whose values are not the default ones, as plain values, without what is searched."""
    changed = {}
    for field in dataclasses.fields(config):
        if field.name in ("learning_rate", "feed_forward_scale"):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = _plain(getattr(config, field.name))
        if value != _plain(default):
            changed[field.name] = value
    return changed


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _changed(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def record_path(recipe_path: Path) -> Path:
    """Where the record of a recipe's search lies: beside the recipe."""
    return recipe_path.with_suffix(".search.json")


def load_record(recipe: AnyRecipe, recipe_path: Path | None) -> dict[str, SearchRecord]:
    """The recorded search that the recipe's rates came from; empty if there is none or it was for other settings."""
    path = None if recipe_path is None else record_path(recipe_path)
    stored = None if path is None else read_json(path, keys=("fingerprint", "arms"))
    if path is None or stored is None or stored["fingerprint"] != fingerprint(recipe):
        return {}
    return {
        name: dataclasses.replace(record, source="recorded with the recipe")
        for name, record in read_records(path, SearchRecord, stored["arms"]).items()
        if name in recipe.arms
        and recipe.arms[name].learning_rate == record.best
        and (record.best_scale is None or getattr(recipe.arms[name], "feed_forward_scale", None) == record.best_scale)
    }
