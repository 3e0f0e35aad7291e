"""One run of a comparison: an arm and a seed, from initialisation to its final held-out measures.

A finished run has a `result.json` and is never repeated; an unfinished one goes on from its newest checkpoint.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from mixtura.config import Interrupted, TrainingConfig, UserError
from mixtura.results import LOSS, RunResult
from mixtura.results.document import RESULT, read_run, write_run
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that a comparison needs."""

    arm: str
    """Its name in the recipe."""
    seed: int
    learning_rate: float
    scale: float | None = None
    """The `feed_forward_scale`; None keeps the arm's own."""
    training: TrainingConfig
    out: Path
    """The run's folder."""
    label: str
    trial: bool = False
    budget: int | None = None
    """Training examples of each class; None takes all."""


def run_or_mark(arm: Arm, job: Job, reporter: ProgressReporter) -> RunResult:
    """Trains one run, or reads its result; if it diverges, the record of it up to there, so that the others go on.

    Raises:
        UserError, Interrupted: as `run_arm` does.
    """
    of_job = arm if job.scale is None else arm.at_scale(job.scale)
    if job.budget is not None:
        of_job = of_job.at_budget(job.budget, seed=job.seed)
    try:
        return run_arm(
            of_job,
            seed=job.seed,
            learning_rate=job.learning_rate,
            training=job.training,
            out=job.out,
            label=job.label,
            reporter=reporter,
            trial=job.trial,
        )
    except TrainingDiverged as error:
        reporter.note(f"{error} {'This trial counts as lost' if job.trial else 'The other runs go on'}.")
        result = diverged_run(of_job, job.out, seed=job.seed, learning_rate=job.learning_rate)
        if ranks.is_first():
            write_run(job.out / RESULT, result)
        return result


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
    """The held-out loss that a trial is judged by: in the deployed mode if that is evaluated during training.

    Infinite where it diverged.
    """
    if result.diverged:
        return math.inf
    final = result.final
    mode = next(mode for mode in (arm.deployed_mode, arm.training_mode, *final) if mode in final)
    loss = final[mode]["loss"]
    assert loss is not None, "a run that did not diverge has a loss"
    return loss
