"""One run of a comparison, from initialisation to its final held-out measures; and runs side by side.

A finished run has a `result.json` and is never repeated; an unfinished one goes on from its newest checkpoint.

Side by side each is in a process of its own, on the cores of a machine or on its GPUs. The processes train what the
comparison will ask for and store each result in its folder; the comparison then goes its usual way and finds the runs
finished. So a comparison may be stopped and go on with any number of processes. A small model trains faster so than
with several threads, which wait for each other at every product.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from mixtura.comparison.plan import AnyRecipe, make_experiment
from mixtura.config import Interrupted, TrainingConfig, UserError
from mixtura.processes import CONTEXT, worker_pool
from mixtura.results import LOSS, RunResult
from mixtura.results.document import RESULT, read_run, write_run
from mixtura.threads import usable_cores
from mixtura.training import (
    METRICS,
    ProgressReporter,
    SilentProgress,
    TrainingDiverged,
    ranks,
    read_metrics,
    summarize_metrics,
    train,
)
from mixtura.training.interface import Arm, Experiment
from mixtura.training.saving import drop_checkpoints


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
            if job.trial:
                drop_checkpoints(job.out, model=True)
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

    Of a finished run the model is kept, and no checkpoint to go on from. A `trial` of a learning rate is judged by its
    held-out loss alone, and its model is not kept either. In tasks whose own measure is another one, it is evaluated as
    in the middle of a run: nothing is decoded, and the test examples stay unseen.

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
        if ranks.is_first():  # where a process was killed after its result
            drop_checkpoints(out, model=trial)
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
        drop_checkpoints(out, model=trial)
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


_POLL_SECONDS = 0.2
_LOST = (
    "A process that trained was ended from outside, as happens where memory runs out: the same command goes on, with "
    "fewer processes in --arms-in-parallel."
)
Event = tuple[str, int, float, float]
"""Of a run: its label, the step it has reached, the loss there and tokens a second."""


def check_processes(processes: int) -> None:
    """Refuses a number of processes that makes no sense here.

    Raises:
        UserError: it is below 1, or torchrun has started several processes already.
    """
    if processes < 1:
        raise UserError(f"--arms-in-parallel is {processes}: give how many runs train at a time, 1 or more.")
    if processes > 1 and ranks.world_size() > 1:
        raise UserError(
            f"--arms-in-parallel {processes} starts processes of its own, and torchrun has started "
            f"{ranks.world_size()}: leave one of them out."
        )


def threads_of_each(recipe: AnyRecipe, processes: int) -> int:
    """Threads of one process: what the recipe says, or an equal share of the cores."""
    return recipe.training.threads or max(1, usable_cores() // processes)


def train_ahead(
    recipe: AnyRecipe, out: Path, jobs: Sequence[Job], *, processes: int, reporter: ProgressReporter
) -> None:
    """Trains those of the jobs that have no result yet, `processes` at a time, and stores their results.

    Args:
        recipe: the comparison's, fitted to the data.
        out: its folder, where the data is prepared.
        jobs: in the order in which they begin.
        processes: how many train at a time.
        reporter: is shown all runs as one, and told of each that ends.

    Raises:
        UserError: what a run raised, or a process was ended from outside.
    """
    left = [job for job in jobs if not (job.out / RESULT).exists()]
    if not left:
        return
    processes = min(processes, len(left))
    shown = _Together(reporter, {job.label: job.training.steps for job in left}, processes)
    events, number = CONTEXT.Queue(), CONTEXT.Value("i", 0)
    settings = (recipe, out, threads_of_each(recipe, processes), number, events)
    with worker_pool(processes, _begin, settings, lost=_LOST) as pool:
        try:
            pending = {pool.submit(_train, job) for job in left}
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS)
                shown.follow(events)
                for future in done:
                    shown.note(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if isinstance(child, SpawnProcess):
                    child.terminate()  # SIGTERM, at which a run saves its step
            raise
        finally:
            shown.end()


class _Together:
    """Several runs as one on a reporter that knows one at a time."""

    def __init__(self, reporter: ProgressReporter, steps: dict[str, int], processes: int) -> None:
        self._reporter, self._at = reporter, dict.fromkeys(steps, 0)
        self._losses: dict[str, float] = {}
        self._speeds: dict[str, float] = {}
        reporter.start_run(f"{len(steps)} runs, {processes} at a time", step=0, steps=sum(steps.values()))

    def follow(self, events: "Queue[Event]") -> None:
        """Shows what the processes have said."""
        while True:
            try:
                label, step, loss, speed = events.get_nowait()
            except Empty:
                return
            self._at[label] = max(step, self._at[label])
            self._losses[label], self._speeds[label] = loss, speed
            loss = sum(self._losses.values()) / len(self._losses)
            self._reporter.advance(sum(self._at.values()), loss=loss, tokens_per_second=sum(self._speeds.values()))

    def note(self, text: str) -> None:
        """A run is over: it no longer counts in the loss and the speed shown."""
        label = text.partition(":")[0]
        self._losses.pop(label, None)
        self._speeds.pop(label, None)
        self._reporter.note(text)

    def end(self) -> None:
        """All runs are over, complete or not."""
        self._reporter.end_run()


class _Reporter(SilentProgress):
    """In a process: sends what happens to the one that shows it, a few times a second."""

    def __init__(self, events: "Queue[Event]") -> None:
        self._events, self._label, self._steps, self._sent = events, "", 0, 0.0
        self.notes: list[str] = []

    def start_run(self, label: str, *, step: int, steps: int) -> None:
        self._label, self._steps = label, steps
        self.notes = []

    def advance(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        if time.monotonic() - self._sent > _POLL_SECONDS or step == self._steps:
            self._sent = time.monotonic()
            self._events.put((self._label, step, loss, tokens_per_second))

    def note(self, text: str) -> None:
        self.notes.append(text)


_EXPERIMENT: Experiment | None = None
_REPORTER: _Reporter | None = None
_STOPPED = False
"""Whether a run was interrupted here: jobs that were handed over before that are then not begun."""


def _begin(recipe: AnyRecipe, out: Path, threads: int, number: "Synchronized[int]", events: "Queue[Event]") -> None:
    """Makes this process ready: its device and threads, and the data from the comparison's folder."""
    global _EXPERIMENT, _REPORTER
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    _take_device(mine)
    torch.set_num_threads(threads)
    events.cancel_join_thread()  # what nobody reads any more must not keep this process from ending
    _REPORTER = _Reporter(events)
    _EXPERIMENT = make_experiment(recipe, out, SilentProgress())


def _take_device(mine: int, environment: Any = os.environ) -> None:
    """Gives the process one of the GPUs that are visible; without any, or with one, all keep what they see."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[mine % len(devices)]


def _train(job: Job) -> str:
    """Trains one run; says how it ended."""
    global _STOPPED
    assert _EXPERIMENT is not None and _REPORTER is not None, "the process has begun"
    if _STOPPED:
        raise Interrupted(f"'{job.label}' was not begun.")
    try:
        result = run_or_mark(_EXPERIMENT.arms[job.arm], job, _REPORTER)
    except Interrupted:
        _STOPPED = True
        raise
    ended = "diverged" if result.diverged else f"done in {result.train_seconds:,.0f} s"
    return "\n".join([f"{job.label}: {ended}", *_REPORTER.notes])
