"""The main job: train every arm on the same data and write what came of it.

Every part is kept as it is done, so a finished comparison is not repeated and a killed one goes on where it stopped.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixtura.comparison.environment import environment, now
from mixtura.comparison.folder import begin, holding, open_folder, ready
from mixtura.comparison.plan import (
    DRY_ROUNDS,
    AnyRecipe,
    check_arms,
    check_memory,
    export_note,
    leak_warning,
    make_experiment,
    task_of,
    tokens_per_step,
)
from mixtura.comparison.runs import Job, check_processes, run_arm, run_or_mark, threads_of_each, train_ahead, trial_loss
from mixtura.comparison.search import load_record, search_grid, search_rates_and_scales, write_record
from mixtura.comparison.timing import ROUNDS, time_arms
from mixtura.config import (
    ClassificationRecipe,
    TrainingConfig,
    UserError,
    as_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mixtura.config.requests import changes
from mixtura.errors import need
from mixtura.files import write_json
from mixtura.report.summary import summarize
from mixtura.results import ArmResult, ArmTiming, Leaks, Results, RunResult, SearchRecord
from mixtura.results.document import (
    RESULTS,
    DataFacts,
    budget_folder,
    read_json,
    read_records,
    write_results,
)
from mixtura.results.json_form import to_plain
from mixtura.training import (
    ProgressReporter,
    SilentProgress,
    ranks,
)
from mixtura.training.interface import Arm, Experiment
from mixtura.training.process import slow_settings


def planned_steps(recipe: AnyRecipe) -> int:
    """Optimizer steps of all the runs that a comparison of this recipe takes, search included."""
    trials = recipe.search.trials * (recipe.search.steps or recipe.training.steps)
    runs = len(recipe.seeds) * (1 + len(_budgets(recipe)))
    return len(recipe.arms) * (trials + runs * recipe.training.steps)


def _budgets(recipe: AnyRecipe) -> tuple[int, ...]:
    return recipe.data.budgets if isinstance(recipe, ClassificationRecipe) else ()


def compare(
    recipe: AnyRecipe | Path | str,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = True,
    command: str | None = None,
    arms_in_parallel: int = 1,
    reporter: ProgressReporter | None = None,
) -> Results:
    """Trains and compares the arms of a recipe, and writes the report.

    Args:
        recipe: a recipe of pretraining, translation or classification, or the path of one.
        out: the folder to write; by default runs/<the recipe's name>.
        overrides: "section.key=value" changes to a recipe given by its path.
        resume: go on with what the folder holds of this recipe; False starts over.
        command: what the user typed, for "reproduce this".
        arms_in_parallel: how many runs train at a time, each in a process of its own with its share of the cores, or
            with a GPU of its own.
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
    check_processes(arms_in_parallel)
    check_memory(loaded)
    with holding(folder):
        open_folder(folder, loaded, resume=resume)
        ready(folder)
        comparison = _Comparison(loaded, path, folder, reporter or SilentProgress(), arms_in_parallel)
        comparison.prepare(resume=resume)
        return comparison.run(command or f"mixtura compare {path or folder / 'recipe.toml'} --out {folder}")


class _Comparison:
    """One comparison in its folder; `run` is its table of contents, after `prepare`."""

    def __init__(
        self, recipe: AnyRecipe, recipe_path: Path | None, out: Path, reporter: ProgressReporter, processes: int
    ) -> None:
        self.recipe, self.recipe_path, self.out, self.reporter = recipe, recipe_path, out, reporter
        self.processes = processes
        # Runs that other processes have trained and shown are only read here.
        self.shown = reporter if processes == 1 else SilentProgress()
        self.started = time.monotonic()

    def prepare(self, *, resume: bool) -> None:
        if not self.recipe.search.trials:
            load_record(self.recipe, self.recipe_path)  # where it is damaged, that is said before anything is removed
        self.experiment = _prepare(self.recipe, self.out, self.reporter, resume=resume)
        self.recipe = self.experiment.recipe

    def run(self, command: str) -> Results:
        arms = self.experiment.arms
        for arm in arms.values():
            if said := export_note(arm):
                self.reporter.note(said)
        leaks = self._probe_leaks(arms)
        searched = self._search(arms)
        rates = {
            name: searched[name].best if self.recipe.search.trials else arm.learning_rate for name, arm in arms.items()
        }
        scales = {name: record.best_scale for name, record in searched.items() if self.recipe.search.scales}
        arms = arms | {name: arms[name].at_scale(scale) for name, scale in scales.items() if scale is not None}
        timing = self._time(arms)
        runs = self._train(arms, rates, scales)
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
        # A comparison that was stopped and resumed has taken at least the time of its runs, as many at a time as now.
        before = (read_json(self.out / RESULTS) or {}).get("total_seconds") or 0.0
        trained = sum(run.train_seconds for arm_runs in runs.values() for run in arm_runs) / self.processes
        results = self._results(described, command)
        results = replace(results, total_seconds=max(before, trained, time.monotonic() - self.started))
        results = replace(results, summary=summarize(results))
        if ranks.is_first():
            write_results(self.out / RESULTS, results)
            need("mixtura.report.html").write_report(results, self.out)
        ranks.wait_for_all()
        return results

    def _probe_leaks(self, arms: dict[str, Arm]) -> dict[str, Leaks]:
        leaks = {name: arm.leaks() for name, arm in arms.items()}
        for name, arm in arms.items():
            if warning := leak_warning(arm, leaks[name], task_of(self.recipe)):
                self.reporter.note(warning)
        return leaks

    def _search(self, arms: dict[str, Arm]) -> dict[str, SearchRecord]:
        if not self.recipe.search.trials:
            return load_record(self.recipe, self.recipe_path)
        search = self.recipe.search
        steps = search.steps or self.recipe.training.steps
        training = replace(self.recipe.training, steps=steps, eval_every=steps)

        def job(name: str, rate: float, scale: float | None, seed: int) -> Job:
            tried, label = f"rate{rate}", f"search {name} {rate:g}"
            if scale is not None:
                tried, label = f"{tried}-scale{scale}", f"{label} scale {scale:g}"
            return Job(
                arm=name,
                seed=seed,
                learning_rate=rate,
                scale=scale,
                training=training,
                out=self.out / "search" / name / tried / f"seed{seed}",
                label=f"{label} seed {seed}",
                trial=True,
            )

        def run_trial(name: str, rate: float, scale: float | None, seed: int) -> float:
            return trial_loss(arms[name], run_or_mark(arms[name], job(name, rate, scale, seed), self.shown))

        rates = {name: arm.learning_rate for name, arm in arms.items()}
        self._ahead([job(name, *each) for name, rate in rates.items() for each in search_grid(search, rate)])
        records = search_rates_and_scales(self.recipe, rates, run_trial)
        if ranks.is_first():
            write_record(self.out / "search" / "record.json", self.recipe, records)
        return records

    def _time(self, arms: dict[str, Arm]) -> dict[str, ArmTiming]:
        path = self.out / "timing.json"
        if not ranks.of_first(read_json(path, keys=arms) is not None):
            self.reporter.note("timing a step of every arm, side by side")
            # Of a short run with long steps, timing must not take longer than training.
            rounds = min(ROUNDS, max(DRY_ROUNDS, self.recipe.training.steps // 4))
            timing = time_arms(arms, self.recipe.training, self.recipe.baseline, rounds=rounds)
            if ranks.is_first():
                write_json(path, to_plain(timing))
            ranks.wait_for_all()
        return read_records(path, ArmTiming, read_json(path, keys=arms) or {})

    def _train(
        self, arms: dict[str, Arm], rates: dict[str, float], scales: dict[str, float | None]
    ) -> dict[str, list[RunResult]]:
        # Seed by seed, so that a comparison stopped half-way has complete pairs.
        jobs = [
            Job(
                arm=name,
                seed=seed,
                learning_rate=rates[name],
                scale=scales.get(name),
                training=self.recipe.training,
                out=self.out / "arms" / name / f"seed{seed}",
                label=f"{name} seed {seed}",
            )
            for seed in self.recipe.seeds
            for name in arms
        ]
        few = [
            replace(
                job, budget=rows, out=self.out / budget_folder(rows, job.arm, job.seed), label=f"{job.label}, {rows}"
            )
            for rows in _budgets(self.recipe)
            for job in jobs
        ]
        self._ahead(jobs + few)
        runs: dict[str, list[RunResult]] = {name: [] for name in arms}
        for job in jobs:
            runs[job.arm].append(run_or_mark(arms[job.arm], job, self.shown))
        if all(run.diverged for of_arm in runs.values() for run in of_arm):
            raise UserError("Every run of every arm diverged: lower the learning rates, with --set or in the recipe.")
        for job in few:
            run_or_mark(arms[job.arm], job, self.shown)
        return runs

    def _ahead(self, jobs: list[Job]) -> None:
        """Trains the jobs side by side, where that was asked for; they are then found finished."""
        if self.processes > 1:
            train_ahead(self.recipe, self.out, jobs, processes=self.processes, reporter=self.reporter)

    def _side_by_side(self) -> dict[str, int]:
        if self.processes == 1:
            return {}
        return {"arms_in_parallel": self.processes, "threads": threads_of_each(self.recipe, self.processes)}

    def _results(self, arms: dict[str, ArmResult], command: str) -> Results:
        recipe, experiment = self.recipe, self.experiment
        baseline = experiment.arms[recipe.baseline]
        return Results(
            created=now(),
            command=command,
            task=task_of(recipe),
            measure=baseline.task.measure,
            recipe=recipe_to_dict(recipe),
            recipe_toml=recipe_to_toml(recipe),
            environment=environment() | self._side_by_side(),
            data=_data_facts(baseline, experiment, recipe.training),
            held_equal=experiment.held_equal(arms),
            baseline=recipe.baseline,
            total_seconds=None,
            arms={name: replace(arm, runs=[_with_costs(run, arm) for run in arm.runs]) for name, arm in arms.items()},
            across_arms=experiment.across_arms(self.out),
        )


def _prepare(
    recipe: AnyRecipe, out: Path, reporter: ProgressReporter, *, resume: bool, arm: str | None = None
) -> Experiment:
    """The experiment of a recipe, or of one arm of it, in its folder, which begins when both data and arms are fine."""
    for warning in slow_settings(recipe.training):
        reporter.note(warning)
    with ranks.first_goes_first():
        experiment = make_experiment(recipe, out, reporter)
        # What was left unread or out, while one can still stop.
        reporter.note(f"data: {experiment.data['description']}")
        fitted = changes(recipe, experiment.recipe)
        if fitted:
            reporter.note(f"fitted to the data: {'; '.join(fitted)}")
    with ranks.together():
        arms = {name: each for name, each in experiment.arms.items() if arm in (None, name)}
        check_arms(arms, experiment.recipe.training)
    with ranks.first_goes_first():
        if ranks.is_first():
            begin(out, recipe, experiment, resume=resume)
    return experiment


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
    check_memory(recipe)
    with holding(out):
        open_folder(out, recipe, resume=resume)
        ready(out)
        shown = reporter or SilentProgress()
        experiment = _prepare(recipe, out, shown, resume=resume, arm=name)
        return _train_arm(experiment, name, seed=seed, out=out, reporter=shown)


def _train_arm(experiment: Experiment, name: str, *, seed: int, out: Path, reporter: ProgressReporter) -> RunResult:
    recipe, arm = experiment.recipe, experiment.arms[name]
    if said := export_note(arm):
        reporter.note(said)
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
