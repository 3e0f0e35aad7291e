"""The main job: train every arm on the same data and write what came of it.

Every part is kept as it is done, so a finished comparison is not repeated and a killed one goes on where it stopped.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtura.comparison.arms import (
    AnyRecipe,
    check_arms,
    leak_warning,
    make_experiment,
    task_of,
    tokens_per_step,
)
from mixtura.comparison.folder import (
    check_same_data,
    environment,
    now,
    open_folder,
    read_json,
    store_fitted,
    write_json,
)
from mixtura.comparison.limits import check_memory
from mixtura.comparison.runs import run_arm, trial_loss
from mixtura.comparison.search import fingerprint, load_record, search_learning_rates
from mixtura.comparison.timing import time_arms
from mixtura.config import (
    FinetuneRecipe,
    Recipe,
    TrainingConfig,
    UserError,
    load_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mixtura.config.adapt import changes
from mixtura.report.html import write_report
from mixtura.report.summary import summarize
from mixtura.training import ProgressReporter, SilentProgress, TrainingDiverged
from mixtura.training.experiment import Arm, Experiment

SCHEMA_VERSION = 2


def planned_steps(recipe: AnyRecipe) -> int:
    """Optimizer steps of all the runs that a comparison of this recipe takes, search included."""
    search = recipe.search
    trials = len(search.learning_rates) * len(search.seeds) * (search.steps or recipe.training.steps)
    return len(recipe.arms) * (trials + len(recipe.seeds) * recipe.training.steps)


def compare(
    recipe: AnyRecipe | Path | str,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = True,
    command: str | None = None,
    reporter: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Trains and compares the arms of a recipe, and writes the report.

    Args:
        recipe: a recipe of pretraining, translation or classification, or the path of one.
        out: the folder to write; by default runs/<the recipe's name>.
        overrides: "section.key=value" changes to a recipe given by its path.
        resume: go on with what the folder holds of this recipe; False starts over.
        command: what the user typed, for "reproduce this".
        reporter: shows progress and says what happens; None shows nothing.

    Returns:
        The content of results.json; docs/report.md documents it.

    Raises:
        UserError: the recipe, the data or the folder is unusable.
        Interrupted: Ctrl-C was pressed; the same call goes on from there.
    """
    given = isinstance(recipe, Recipe | FinetuneRecipe)
    path, loaded = (None, recipe) if given else (Path(recipe), load_recipe(Path(recipe), overrides))
    folder = Path(out) if out is not None else Path("runs") / loaded.name
    check_memory(loaded)
    open_folder(folder, loaded, resume=resume)
    return _Comparison(loaded, path, folder, reporter or SilentProgress()).run(
        command or f"mixtura compare {path or folder / 'recipe.toml'} --out {folder}"
    )


class _Comparison:
    """One comparison in its folder; `run` is its table of contents."""

    def __init__(self, recipe: AnyRecipe, recipe_path: Path | None, out: Path, reporter: ProgressReporter) -> None:
        self.recipe, self.recipe_path, self.out, self.reporter = recipe, recipe_path, out, reporter

    def run(self, command: str) -> dict[str, Any]:
        started = time.monotonic()
        experiment = _prepare(self.recipe, self.out, self.reporter)
        self.recipe = experiment.recipe
        arms = experiment.arms
        check_arms(arms, self.recipe.training)
        leaks = self._probe_leaks(arms)
        searched = self._search(arms)
        rates = {
            name: searched[name]["best"] if self.recipe.search.learning_rates else arm.learning_rate
            for name, arm in arms.items()
        }
        timing = self._time(arms)
        runs = self._train(arms, rates)
        results = self._results(experiment, command, runs=runs, rates=rates, searched=searched, timing=timing)
        for name, arm_leaks in leaks.items():
            results["arms"][name]["leaks"] = arm_leaks
        results["across_arms"] = experiment.across_arms(self.out)
        # A comparison that was stopped and went on has taken at least the time of all its runs.
        before = (read_json(self.out / "results.json") or {}).get("total_seconds", 0.0)
        trained = sum(run["train_seconds"] for arm_runs in runs.values() for run in arm_runs)
        results["total_seconds"] = max(before, trained, time.monotonic() - started)
        results["summary"] = summarize(results)
        write_json(self.out / "results.json", results)
        write_report(results, self.out)
        return results

    def _probe_leaks(self, arms: dict[str, Arm]) -> dict[str, dict[str, bool]]:
        leaks = {name: arm.leaks() for name, arm in arms.items()}
        for name, arm in arms.items():
            if warning := leak_warning(arm, leaks[name], task_of(self.recipe)):
                self.reporter.note(warning)
        return leaks

    def _search(self, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
        if not self.recipe.search.learning_rates:
            return load_record(self.recipe, self.recipe_path)
        search = self.recipe.search
        steps = search.steps or self.recipe.training.steps
        training = dataclasses.replace(self.recipe.training, steps=steps, eval_every=steps)

        def run_trial(name: str, rate: float, seed: int) -> float:
            arm = arms[name]
            try:
                result = run_arm(
                    arm,
                    seed=seed,
                    learning_rate=rate,
                    training=training,
                    out=self.out / "search" / name / f"rate{rate}" / f"seed{seed}",
                    label=f"search {name} {rate:g} seed {seed}",
                    reporter=self.reporter,
                    trial=True,
                )
            except TrainingDiverged as error:
                self.reporter.note(f"{error} This rate counts as lost.")
                return float("inf")
            return trial_loss(arm, result)

        records = search_learning_rates(self.recipe, run_trial)
        write_json(self.out / "search" / "record.json", {"fingerprint": fingerprint(self.recipe), "arms": records})
        return records

    def _time(self, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
        stored = read_json(self.out / "timing.json", keys=arms)
        if stored is None:
            self.reporter.note("timing a step of every arm, side by side")
            stored = time_arms(arms, self.recipe.training, self.recipe.baseline)
            write_json(self.out / "timing.json", stored)
        return stored

    def _train(self, arms: dict[str, Arm], rates: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
        # Seed by seed, so that a comparison stopped half-way has complete pairs.
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
        for seed in self.recipe.seeds:
            for name, arm in arms.items():
                runs[name].append(
                    run_arm(
                        arm,
                        seed=seed,
                        learning_rate=rates[name],
                        training=self.recipe.training,
                        out=self.out / "arms" / name / f"seed{seed}",
                        label=f"{name} seed {seed}",
                        reporter=self.reporter,
                    )
                )
        return runs

    def _results(
        self,
        experiment: Experiment,
        command: str,
        *,
        runs: dict[str, list[dict[str, Any]]],
        rates: dict[str, float],
        searched: dict[str, dict[str, Any]],
        timing: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        recipe = self.recipe
        baseline = experiment.arms[recipe.baseline]
        described = {
            name: {
                "family": arm.family,
                "label": arm.label,
                **arm.describe(baseline),
                "training_mode": arm.training_mode,
                "deployed_mode": arm.deployed_mode,
                **timing[name],
                "learning_rate": rates[name],
                "learning_rate_search": searched.get(name),
            }
            for name, arm in experiment.arms.items()
        }
        for name, arm in described.items():
            arm["runs"] = [_with_costs(run, arm) for run in runs[name]]
        return {
            "schema_version": SCHEMA_VERSION,
            "created": now(),
            "command": command,
            "task": task_of(recipe),
            "measure": dataclasses.asdict(baseline.task.measure),
            "recipe": recipe_to_dict(recipe),
            "recipe_toml": recipe_to_toml(recipe),
            "environment": environment(),
            "data": {**experiment.data, **_budget(baseline, experiment, recipe.training)},
            "held_equal": experiment.held_equal(described),
            "baseline": recipe.baseline,
            "arms": described,
        }


def _prepare(recipe: AnyRecipe, out: Path, reporter: ProgressReporter) -> Experiment:
    """The experiment of a recipe in its folder, which notes how the recipe was fitted to the data, and which data."""
    experiment = make_experiment(recipe, out, reporter)
    check_same_data(out, experiment)
    if fitted := changes(recipe, experiment.recipe):
        reporter.note(f"fitted to the data: {'; '.join(fitted)}")
        store_fitted(out, recipe, experiment.recipe)
    return experiment


def _budget(arm: Arm, experiment: Experiment, training: TrainingConfig) -> dict[str, Any]:
    """Tokens of a step and a run, and how often a run reads its training data."""
    per_step = tokens_per_step(arm, training)
    facts, tokens = experiment.data, per_step * training.steps
    examples = training.steps * training.batch_size * training.gradient_accumulation_steps
    known = [(tokens, facts.get("tokens_train")), (examples, facts.get("examples_train"))]
    epochs = next((read / amount for read, amount in known if amount), None)
    return {"tokens_per_step": per_step, "tokens_per_run": tokens, "epochs": epochs}


def _with_costs(run: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """The run with FLOPs and seconds at every point of its curve; seconds at the rate measured side by side."""
    curve = [
        {
            **point,
            "flops": point["tokens"] * arm["flops_per_token"],
            "seconds": point["step"] * arm["seconds_per_step"],
        }
        for point in run["curve"]
    ]
    return {**run, "curve": curve}


def train_arm(
    recipe: AnyRecipe,
    name: str,
    *,
    seed: int,
    out: Path,
    resume: bool = True,
    reporter: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Trains one arm of a recipe with one seed in folder `out`; returns its result as `runs` of results.json has it.

    Raises:
        UserError: see `compare`.
        Interrupted: Ctrl-C was pressed.
    """
    if name not in recipe.arms:
        raise UserError(f"The recipe has no arm '{name}': choose one of {', '.join(recipe.arms)}.")
    reporter = reporter or SilentProgress()
    check_memory(recipe)
    open_folder(out, recipe, resume=resume)
    experiment = _prepare(recipe, out, reporter)
    recipe, arm = experiment.recipe, experiment.arms[name]
    check_arms({name: arm}, recipe.training)
    if warning := leak_warning(arm, arm.leaks(), task_of(recipe)):
        reporter.note(warning)
    return run_arm(
        arm,
        seed=seed,
        learning_rate=arm.learning_rate,
        training=recipe.training,
        out=out / "arms" / name / f"seed{seed}",
        label=f"{name} seed {seed}",
        reporter=reporter,
    )
