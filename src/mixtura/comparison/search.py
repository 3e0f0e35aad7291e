"""The learning-rate search, the same effort for every arm, and the record of it that ships with a recipe.

Without one a comparison compares how well each arm likes a shared rate: at one rate for all, a prototype had Mixture of
Tokens 1.4 times faster than dense, and halving dense's rate erased it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from mixtura.comparison.preparing import AnyRecipe
from mixtura.config import UserError
from mixtura.files import write_json
from mixtura.results import Facts, SearchRecord
from mixtura.results.document import Trial
from mixtura.results.json_form import to_plain
from mixtura.results.stored import read_json, read_records


def search_learning_rates(recipe: AnyRecipe, run_trial: Callable[[str, float, int], float]) -> dict[str, SearchRecord]:
    """Tries every rate of the recipe on every arm.

    Args:
        recipe: its `search.learning_rates` are tried.
        run_trial: (arm, rate, seed) -> held-out loss of a trial, as deployed; infinite where it diverged. It is the
            loss in every task: it needs no decoding and no test examples, while the verdict uses the task's measure.

    Returns:
        For each arm the trials, the rate of the lowest mean loss over the search's seeds, and whether it lies at an
        edge of the grid, where a better one may lie beyond.

    Raises:
        UserError: an arm diverged at every rate.
    """
    rates = sorted(recipe.search.learning_rates)
    seeds = recipe.search.seeds
    losses = {name: [mean(run_trial(name, rate, seed) for seed in seeds) for rate in rates] for name in recipe.arms}
    for name, tried in losses.items():
        if min(tried) == float("inf"):
            raise UserError(
                f"Every learning rate diverged for '{name}', even {rates[0]:g}: add lower ones to "
                "'search.learning_rates'."
            )
    return {name: _record(recipe, rates, losses[name]) for name in recipe.arms}


def _record(recipe: AnyRecipe, rates: list[float], losses: list[float]) -> SearchRecord:
    best = rates[losses.index(min(losses))]
    finite = [loss if loss != float("inf") else None for loss in losses]
    return SearchRecord(
        trials=[Trial(rate, loss) for rate, loss in zip(rates, finite, strict=True)],
        steps=recipe.search.steps or recipe.training.steps,
        seeds=list(recipe.search.seeds),
        best=best,
        at_edge=len(rates) > 1 and best in (rates[0], rates[-1]),
        source="this run",
    )


def write_record(path: Path, recipe: AnyRecipe, records: dict[str, SearchRecord]) -> None:
    """Writes the record of a recipe's search; put beside the recipe, it says where the recipe's rates come from."""
    write_json(path, {"fingerprint": fingerprint(recipe), "arms": to_plain(records)})


def fingerprint(recipe: AnyRecipe) -> str:
    """A hash of everything that a learning rate is tuned for: data, model, training and arms, but not the rates.

    Only what differs from the defaults counts, so that a key which a later version adds leaves a record valid.
    """
    table = _changed(recipe)
    # What is only measured or saved has no effect on the best rate.
    training = table.get("training", {})
    assert isinstance(training, dict)
    for key in ("eval_every", "eval_sequences", "final_eval_sequences", "save_every", "threads"):
        training.pop(key, None)
    tuned_for = {key: table.get(key, {}) for key in ("task", "data", "base", "model", "training", "arms")}
    return hashlib.sha256(json.dumps(tuned_for, sort_keys=True).encode()).hexdigest()[:16]


def _changed(config: Any) -> Facts:
    """The keys of a section whose values are not the default ones, as plain values, without learning rates."""
    changed = {}
    for field in dataclasses.fields(config):
        if field.name == "learning_rate":
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
        if name in recipe.arms and recipe.arms[name].learning_rate == record.best
    }
