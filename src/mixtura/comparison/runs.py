"""One run of a comparison: an arm and a seed, from initialisation to its final held-out measures.

A finished run has a `result.json` and is never repeated; an unfinished one goes on from its newest checkpoint.
"""

import math
from pathlib import Path
from typing import Any

from mixtura.comparison.folder import read_json
from mixtura.config import Interrupted, TrainingConfig, UserError
from mixtura.files import write_json
from mixtura.training import METRICS, ProgressReporter, TrainingDiverged, read_metrics, summarize_metrics, train
from mixtura.training.experiment import Arm
from mixtura.training.task import LOSS


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
) -> dict[str, Any]:
    """Trains and evaluates one run in folder `out`, or reads its result when it is finished.

    A `trial` of a learning rate is judged by its held-out loss alone. Where the task's own measure is another, it is
    evaluated as on the way of a run: nothing is decoded, and the test examples stay unseen.

    Raises:
        UserError: the folder's files are damaged.
        Interrupted: the user pressed Ctrl-C; the run is saved.
        TrainingDiverged: the loss is no number any more.
    """
    stored = read_json(out / "result.json", keys=_RESULT_KEYS)
    if stored is not None:
        reporter.start_run(label, step=stored["steps"], steps=stored["steps"])
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
    result = {
        "seed": seed,
        "learning_rate": learning_rate,
        "steps": outcome.steps,
        "train_seconds": outcome.train_seconds,
        "final": final,
        "details": {} if trial else task.details(model, out=out),
        **summarize_metrics(read_metrics(out / METRICS)),
    }
    write_json(out / "result.json", result)
    return result


_RESULT_KEYS = {"seed", "learning_rate", "steps", "train_seconds", "final", "details", "curve"}


def trial_loss(arm: Arm, result: dict[str, Any]) -> float:
    """The held-out loss that a trial is judged by: as deployed, where that is measured on the way of a run."""
    final = result["final"]
    return final[next(mode for mode in (arm.deployed_mode, arm.training_mode, *final) if mode in final)]["loss"]
