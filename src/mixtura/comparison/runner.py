"""The main job: train every arm on the same data and write what came of it.

Every part is kept as it is done, so a finished comparison is not repeated and a killed one goes on where it stopped.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtura.comparison.arms import Arm, describe_arm, leak_warning, make_arms, probe_arm
from mixtura.comparison.folder import check_same_data, environment, now, open_folder, read_json, write_json
from mixtura.comparison.report import write_report
from mixtura.comparison.runs import check_runs, run_arm, tokens_per_step
from mixtura.comparison.search import fingerprint, load_record, search_learning_rates
from mixtura.comparison.summary import summarize
from mixtura.comparison.timing import time_arms
from mixtura.config import Recipe, UserError, load_recipe, recipe_to_dict, recipe_to_toml
from mixtura.data.prepare import PreparedData, prepare_data
from mixtura.training import ProgressReporter, SilentProgress, TrainingDiverged

SCHEMA_VERSION = 1


def planned_steps(recipe: Recipe) -> int:
    """Optimizer steps of all the runs that a comparison of this recipe takes, search included."""
    trials = len(recipe.search.learning_rates) * (recipe.search.steps or recipe.training.steps)
    return len(recipe.arms) * (trials + len(recipe.seeds) * recipe.training.steps)


def compare(
    recipe: Recipe | Path | str,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = True,
    command: str | None = None,
    reporter: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Trains and compares the arms of a recipe, and writes the report.

    Args:
        recipe: a recipe, or the path of one.
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
    path = None if isinstance(recipe, Recipe) else Path(recipe)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    folder = Path(out) if out is not None else Path("runs") / loaded.name
    open_folder(folder, loaded, resume=resume)
    return _Comparison(loaded, path, folder, reporter or SilentProgress()).run(
        command or f"mixtura compare {path or folder / 'recipe.toml'} --out {folder}"
    )


class _Comparison:
    """One comparison in its folder; `run` is its table of contents."""

    def __init__(self, recipe: Recipe, recipe_path: Path | None, out: Path, reporter: ProgressReporter) -> None:
        self.recipe, self.recipe_path, self.out, self.reporter = recipe, recipe_path, out, reporter

    def run(self, command: str) -> dict[str, Any]:
        started = time.monotonic()
        data = prepare_data(self.recipe.data, cache_dir=self.out / "data", on_progress=self.reporter.note)
        check_same_data(self.out, data)
        arms = make_arms(self.recipe, data)
        check_runs(arms, self.recipe.training, data)
        leaks = self._probe_leaks(arms)
        searched = self._search(arms, data)
        rates = {
            name: searched[name]["best"] if self.recipe.search.learning_rates else arm.learning_rate(self.recipe)
            for name, arm in arms.items()
        }
        timing = self._time(arms, data)
        runs = self._train(arms, rates, data)
        results = self._results(arms, data, command, runs=runs, rates=rates, searched=searched, timing=timing)
        for name, arm_leaks in leaks.items():
            results["arms"][name]["leaks"] = arm_leaks
        # A comparison that was stopped and went on has taken at least the time of all its runs.
        before = (read_json(self.out / "results.json") or {}).get("total_seconds", 0.0)
        trained = sum(run["train_seconds"] for arm_runs in runs.values() for run in arm_runs)
        results["total_seconds"] = max(before, trained, time.monotonic() - started)
        results["summary"] = summarize(results)
        write_json(self.out / "results.json", results)
        write_report(results, self.out)
        return results

    def _probe_leaks(self, arms: dict[str, Arm]) -> dict[str, dict[str, bool]]:
        leaks = {name: probe_arm(arm) for name, arm in arms.items()}
        for name, arm in arms.items():
            if warning := leak_warning(arm, leaks[name]):
                self.reporter.note(warning)
        return leaks

    def _search(self, arms: dict[str, Arm], data: PreparedData) -> dict[str, dict[str, Any]]:
        if not self.recipe.search.learning_rates:
            return load_record(self.recipe, self.recipe_path)
        search = self.recipe.search
        steps = search.steps or self.recipe.training.steps
        training = dataclasses.replace(self.recipe.training, steps=steps, eval_every=steps)

        def run_trial(name: str, rate: float) -> float:
            arm = arms[name]
            try:
                result = run_arm(
                    arm,
                    seed=search.seed,
                    learning_rate=rate,
                    training=training,
                    data=data,
                    out=self.out / "search" / name / f"rate{rate}",
                    label=f"search {name} {rate:g}",
                    reporter=self.reporter,
                )
            except TrainingDiverged as error:
                self.reporter.note(f"{error} This rate counts as lost.")
                return float("inf")
            return result["final"][arm.deployed_mode or arm.training_mode]["loss"]

        records = search_learning_rates(self.recipe, run_trial)
        write_json(self.out / "search" / "record.json", {"fingerprint": fingerprint(self.recipe), "arms": records})
        return records

    def _time(self, arms: dict[str, Arm], data: PreparedData) -> dict[str, dict[str, Any]]:
        stored = read_json(self.out / "timing.json", keys=arms)
        if stored is None:
            self.reporter.note("timing a step of every arm, side by side")
            stored = time_arms(arms, self.recipe, data, self.recipe.baseline)
            write_json(self.out / "timing.json", stored)
        return stored

    def _train(
        self, arms: dict[str, Arm], rates: dict[str, float], data: PreparedData
    ) -> dict[str, list[dict[str, Any]]]:
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
                        data=data,
                        out=self.out / "arms" / name / f"seed{seed}",
                        label=f"{name} seed {seed}",
                        reporter=self.reporter,
                    )
                )
        return runs

    def _results(
        self,
        arms: dict[str, Arm],
        data: PreparedData,
        command: str,
        *,
        runs: dict[str, list[dict[str, Any]]],
        rates: dict[str, float],
        searched: dict[str, dict[str, Any]],
        timing: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        recipe = self.recipe
        per_step = tokens_per_step(recipe)
        baseline = arms[recipe.baseline]
        described = {
            name: {
                **describe_arm(arm, baseline, recipe.data.sequence_length),
                **timing[name],
                "learning_rate": rates[name],
                "learning_rate_search": searched.get(name),
            }
            for name, arm in arms.items()
        }
        for name, arm in described.items():
            arm["runs"] = [_with_costs(run, arm) for run in runs[name]]
        return {
            "schema_version": SCHEMA_VERSION,
            "created": now(),
            "command": command,
            "recipe": recipe_to_dict(recipe),
            "recipe_toml": recipe_to_toml(recipe),
            "environment": environment(),
            "data": {
                **data.summary,
                "tokens_per_step": per_step,
                "tokens_per_run": per_step * recipe.training.steps,
                "epochs": per_step * recipe.training.steps / data.train.num_tokens,
            },
            "held_equal": _held_equal(recipe, described),
            "baseline": recipe.baseline,
            "arms": described,
        }


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


def _held_equal(recipe: Recipe, arms: dict[str, Any]) -> list[str]:
    """What the arms share, as the report's first lines have it."""
    apart = max(abs(arm["flops_ratio"] - 1) for arm in arms.values())
    training = recipe.training
    return [
        "the training tokens and their order, paired by seed",
        f"FLOPs a token within {100 * apart:.2g} %, routing and mixing counted"
        if apart
        else "FLOPs a token, routing and mixing counted",
        f"steps ({training.steps:,}) and tokens a step ({tokens_per_step(recipe):,})",
        f"the initialisation rule (normal, standard deviation {recipe.model.initializer_range:g}, seeded)",
        "optimizer (AdamW), warm-up, cosine schedule, weight decay and gradient clipping",
        "the held-out sequences",
    ]


def train_arm(
    recipe: Recipe,
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
    open_folder(out, recipe, resume=resume)
    data = prepare_data(recipe.data, cache_dir=out / "data", on_progress=reporter.note)
    check_same_data(out, data)
    arm = make_arms(recipe, data)[name]
    check_runs({name: arm}, recipe.training, data)
    if warning := leak_warning(arm, probe_arm(arm)):
        reporter.note(warning)
    return run_arm(
        arm,
        seed=seed,
        learning_rate=arm.learning_rate(recipe),
        training=recipe.training,
        data=data,
        out=out / "arms" / name / f"seed{seed}",
        label=f"{name} seed {seed}",
        reporter=reporter,
    )
