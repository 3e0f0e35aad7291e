"""The search of rates and scales, the same effort for every arm, and the record of it that ships with a recipe.

Without a search, a comparison shows how well a shared rate suits each arm: at one rate for all, Mixture of Tokens was
1.4 times faster than dense in a prototype, and with half the rate for dense that lead was gone. The scale at which
weights are drawn is another such value.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mixtura.comparison.plan import AnyRecipe
from mixtura.config import Recipe, SearchConfig, TranslationRecipe, UserError
from mixtura.config.initialization import start_scales
from mixtura.files import write_json
from mixtura.results import Facts, SearchRecord
from mixtura.results.document import Trial, read_json, read_records
from mixtura.results.json_form import to_plain


def search_grid(search: SearchConfig, own_rate: float) -> list[tuple[float, float | None, int]]:
    """The rates, scales and seeds that an arm of that rate is tried with, in the order in which they are."""
    return list(itertools.product(search.rates_of(own_rate), sorted(search.scales) or [None], search.seeds))


def search_rates_and_scales(
    recipe: AnyRecipe, own_rates: dict[str, float], run_trial: Callable[[str, float, float | None, int], float]
) -> dict[str, SearchRecord]:
    """Tries as many rates on every arm as the recipe says, with every scale where it names some.

    Args:
        recipe: its section `search` says what is tried.
        own_rates: the rate that each arm has without a search.
        run_trial: (arm, rate, scale or None, seed) -> held-out loss of a trial, as deployed; infinite where it
            diverged. It is the loss in every task: it needs no decoding and no test examples, while the verdict uses
            the task's measure.

    Returns:
        For each arm the trials, the rate and the scale of the lowest mean loss over the search's seeds, and whether
        they lie at an edge of the grid, where better ones may lie beyond.

    Raises:
        UserError: an arm diverged at every rate.
    """
    grids = {
        name: list(dict.fromkeys((rate, scale) for rate, scale, _ in search_grid(recipe.search, own_rates[name])))
        for name in recipe.arms
    }
    losses = {
        name: [mean(run_trial(name, *pair, seed) for seed in recipe.search.seeds) for pair in grid]
        for name, grid in grids.items()
    }
    for name, tried in losses.items():
        if min(tried) == float("inf"):
            key = "rate_multiples" if recipe.search.rate_multiples else "learning_rates"
            lowest = grids[name][0][0]
            raise UserError(
                f"Every learning rate diverged for '{name}', even {lowest:g}: add lower ones to 'search.{key}'."
            )
    return {name: _record(recipe, grids[name], losses[name]) for name in recipe.arms}


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
