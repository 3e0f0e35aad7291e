"""The main job: train every arm on the same data and write what came of it.

Every part is kept as it is done, so a finished comparison is not repeated and a killed one goes on where it stopped.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixtura.comparison.folder import check_same_data, environment, now, open_folder
from mixtura.comparison.preparing import (
    AnyRecipe,
    check_arms,
    leak_warning,
    make_experiment,
    task_of,
    tokens_per_step,
)
from mixtura.comparison.search import load_record, search_learning_rates, write_record
from mixtura.comparison.timing import time_arms
from mixtura.config import (
    Interrupted,
    TrainingConfig,
    UserError,
    as_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mixtura.errors import need
from mixtura.files import write_json
from mixtura.report.summary import summarize
from mixtura.results import LOSS, ArmResult, ArmTiming, Leaks, Results, RunResult, SearchRecord
from mixtura.results.document import DataFacts
from mixtura.results.json_form import to_plain
from mixtura.results.stored import (
    RESULT,
    RESULTS,
    read_json,
    read_records,
    read_run,
    write_results,
    write_run,
)
from mixtura.training import (
    METRICS,
    ProgressReporter,
    SilentProgress,
    TrainingDiverged,
    read_metrics,
    summarize_metrics,
    train,
)
from mixtura.training.interface import Arm, Experiment


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
) -> Results:
    """Trains and compares the arms of a recipe, and writes the report.

    Args:
        recipe: a recipe of pretraining, translation or classification, or the path of one.
        out: the folder to write; by default runs/<the recipe's name>.
        overrides: "section.key=value" changes to a recipe given by its path.
        resume: go on with what the folder holds of this recipe; False starts over.
        command: what the user typed, for "reproduce this".
        reporter: shows progress and says what happens; None shows nothing.

    Returns:
        What results.json holds, its summary included; docs/report.md documents it.

    Raises:
        UserError: the recipe, the data or the folder is unusable.
        Interrupted: Ctrl-C was pressed; the same call goes on from there.
    """
    need("mixtura.report.html")  # a missing package is named before hours of training, not after
    path, loaded = as_recipe(recipe, overrides)
    folder = Path(out) if out is not None else Path("runs") / loaded.name
    open_folder(folder, loaded, resume=resume)
    return _Comparison(loaded, path, folder, reporter or SilentProgress()).run(
        command or f"mixtura compare {path or folder / 'recipe.toml'} --out {folder}"
    )


class _Comparison:
    """One comparison in its folder; `run` is its table of contents."""

    def __init__(self, recipe: AnyRecipe, recipe_path: Path | None, out: Path, reporter: ProgressReporter) -> None:
        self.recipe, self.recipe_path, self.out, self.reporter = recipe, recipe_path, out, reporter

    def run(self, command: str) -> Results:
        started = time.monotonic()
        experiment = make_experiment(self.recipe, self.out, self.reporter)
        check_same_data(self.out, experiment)
        arms = experiment.arms
        check_arms(arms, self.recipe.training)
        leaks = self._probe_leaks(arms)
        searched = self._search(arms)
        rates = {
            name: searched[name].best if self.recipe.search.learning_rates else arm.learning_rate
            for name, arm in arms.items()
        }
        timing = self._time(arms)
        runs = self._train(arms, rates)
        baseline = arms[self.recipe.baseline]
        described = {
            name: ArmResult(
                **vars(arm.describe(baseline)),
                **vars(timing[name]),
                family=arm.family,
                label=arm.label,
                training_mode=arm.training_mode,
                deployed_mode=arm.deployed_mode,
                learning_rate=rates[name],
                learning_rate_search=searched.get(name),
                leaks=leaks[name],
                runs=runs[name],
            )
            for name, arm in arms.items()
        }
        # A comparison that was stopped and went on has taken at least the time of all its runs.
        before = (read_json(self.out / RESULTS) or {}).get("total_seconds") or 0.0
        trained = sum(run.train_seconds for arm_runs in runs.values() for run in arm_runs)
        results = self._results(experiment, described, command)
        results = replace(results, total_seconds=max(before, trained, time.monotonic() - started))
        results = replace(results, summary=summarize(results))
        write_results(self.out / RESULTS, results)
        need("mixtura.report.html").write_report(results, self.out)
        return results

    def _probe_leaks(self, arms: dict[str, Arm]) -> dict[str, Leaks]:
        leaks = {name: arm.leaks() for name, arm in arms.items()}
        for name, arm in arms.items():
            if warning := leak_warning(arm, leaks[name], task_of(self.recipe)):
                self.reporter.note(warning)
        return leaks

    def _search(self, arms: dict[str, Arm]) -> dict[str, SearchRecord]:
        if not self.recipe.search.learning_rates:
            return load_record(self.recipe, self.recipe_path)
        search = self.recipe.search
        steps = search.steps or self.recipe.training.steps
        training = replace(self.recipe.training, steps=steps, eval_every=steps)

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
        write_record(self.out / "search" / "record.json", self.recipe, records)
        return records

    def _time(self, arms: dict[str, Arm]) -> dict[str, ArmTiming]:
        path = self.out / "timing.json"
        stored = read_json(path, keys=arms)
        if stored is not None:
            return read_records(path, ArmTiming, stored)
        self.reporter.note("timing a step of every arm, side by side")
        timing = time_arms(arms, self.recipe.training, self.recipe.baseline)
        write_json(path, to_plain(timing))
        return timing

    def _train(self, arms: dict[str, Arm], rates: dict[str, float]) -> dict[str, list[RunResult]]:
        # Seed by seed, so that a comparison stopped half-way has complete pairs.
        runs: dict[str, list[RunResult]] = {name: [] for name in arms}
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

    def _results(self, experiment: Experiment, arms: dict[str, ArmResult], command: str) -> Results:
        recipe = self.recipe
        baseline = experiment.arms[recipe.baseline]
        return Results(
            created=now(),
            command=command,
            task=task_of(recipe),
            measure=baseline.task.measure,
            recipe=recipe_to_dict(recipe),
            recipe_toml=recipe_to_toml(recipe),
            environment=environment(),
            data=_data_facts(baseline, experiment, recipe.training),
            held_equal=experiment.held_equal(arms),
            baseline=recipe.baseline,
            total_seconds=None,
            arms={name: replace(arm, runs=[_with_costs(run, arm) for run in arm.runs]) for name, arm in arms.items()},
            across_arms=experiment.across_arms(self.out),
        )


def _data_facts(arm: Arm, experiment: Experiment, training: TrainingConfig) -> DataFacts:
    """The data, with the tokens of a step and a run, and how often a run reads its training data."""
    per_step = tokens_per_step(arm, training)
    facts, tokens = dict(experiment.data), per_step * training.steps
    examples = training.steps * training.batch_size * training.gradient_accumulation_steps
    known = [(tokens, facts.get("tokens_train")), (examples, facts.get("examples_train"))]
    epochs = next((read / amount for read, amount in known if isinstance(amount, int) and amount), None)
    description = str(facts.pop("description"))
    return DataFacts(
        description=description, tokens_per_step=per_step, tokens_per_run=tokens, epochs=epochs, facts=facts
    )


def _with_costs(run: RunResult, arm: ArmResult) -> RunResult:
    """The run with FLOPs and seconds at every point of its curve; seconds at the rate measured side by side."""
    assert arm.seconds_per_step is not None, "every arm was timed"
    curve = [
        replace(point, flops=point.tokens * arm.flops_per_token, seconds=point.step * arm.seconds_per_step)
        for point in run.curve
    ]
    return replace(run, curve=curve)


def train_arm(
    recipe: AnyRecipe,
    name: str,
    *,
    seed: int,
    out: Path,
    resume: bool = True,
    reporter: ProgressReporter | None = None,
) -> RunResult:
    """Trains one arm of a recipe with one seed in folder `out`; returns its result, which is stored there.

    Raises:
        UserError: see `compare`.
        Interrupted: Ctrl-C was pressed.
    """
    if name not in recipe.arms:
        raise UserError(f"The recipe has no arm '{name}': choose one of {', '.join(recipe.arms)}.")
    reporter = reporter or SilentProgress()
    open_folder(out, recipe, resume=resume)
    experiment = make_experiment(recipe, out, reporter)
    check_same_data(out, experiment)
    arm = experiment.arms[name]
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

    A `trial` of a learning rate is judged by its held-out loss alone. Where the task's own measure is another, it is
    evaluated as on the way of a run: nothing is decoded, and the test examples stay unseen.

    Raises:
        UserError: the folder's files are damaged.
        Interrupted: the user pressed Ctrl-C; the run is saved.
        TrainingDiverged: the loss is no number any more.
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
    final = task.evaluate(model, final=not trial or task.measure.key == LOSS.key)
    if not all(math.isfinite(measure) for of in final.values() for measure in of.values()):
        raise TrainingDiverged(
            f"{label} diverged: its final held-out loss is out of range; lower its learning rate, which is "
            f"{learning_rate:g}.",
            step=outcome.steps,
        )
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
    return result


def _check_same_run(stored: RunResult, out: Path, **asked: float) -> None:
    """Refuses a finished run of other settings, such as one that was trained at another rate before a search."""
    for key, value in asked.items():
        before = getattr(stored, key)
        if before != value:
            raise UserError(
                f"The finished run in '{out}' has {key} {before:g}, and now it is {value:g}: choose another "
                f"folder with --out, or delete '{out}', and that run is done again."
            )


def trial_loss(arm: Arm, result: RunResult) -> float:
    """The held-out loss that a trial is judged by: as deployed, where that is measured on the way of a run."""
    final = result.final
    mode = next(mode for mode in (arm.deployed_mode, arm.training_mode, *final) if mode in final)
    loss = final[mode]["loss"]
    assert loss is not None, "a run that diverged has no result"
    return loss
