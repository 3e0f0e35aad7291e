"""One run of a comparison: an arm and a seed, from initialisation to its final held-out losses.

A finished run has a `result.json` and is never repeated; an unfinished one goes on from its newest checkpoint.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtura.comparison.arms import Arm
from mixtura.comparison.folder import read_json, write_json
from mixtura.config import Interrupted, Recipe, TrainingConfig, UserError
from mixtura.data.prepare import PreparedData
from mixtura.training import (
    METRICS,
    LanguageModelling,
    ProgressReporter,
    TrainingDiverged,
    read_metrics,
    summarize_metrics,
    train,
)


def run_arm(
    arm: Arm,
    *,
    seed: int,
    learning_rate: float,
    training: TrainingConfig,
    data: PreparedData,
    out: Path,
    label: str,
    reporter: ProgressReporter,
) -> dict[str, Any]:
    """Trains and evaluates one run in folder `out`, or reads its result when it is finished.

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
    model, task = arm.build(seed), LanguageModelling(data, training)
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
    final = task.evaluate(model, final=True)
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
        **summarize_metrics(read_metrics(out / METRICS)),
    }
    write_json(out / "result.json", result)
    return result


_RESULT_KEYS = {"seed", "learning_rate", "steps", "train_seconds", "final", "curve"}


def check_runs(arms: Mapping[str, Arm], training: TrainingConfig, data: PreparedData) -> None:
    """Refuses runs that could not be evaluated, before any of them is trained.

    Raises:
        UserError: there are too few held-out sequences, or they do not fill groups.
    """
    task = LanguageModelling(data, training)
    for arm in arms.values():
        task.check_evaluations(arm.model_config, batch_size=training.batch_size)


def tokens_per_step(recipe: Recipe) -> int:
    """Training tokens of one optimizer step."""
    training = recipe.training
    return training.batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length
