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
from mixtura.evaluation import check_evaluation, evaluate_loss
from mixtura.training import METRICS, ProgressReporter, TrainingDiverged, read_metrics, summarize_metrics, train


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
    model = arm.build(seed)
    outcome = train(
        model,
        data=data,
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
    final = evaluate_loss(
        model,
        data.validation,
        num_sequences=_whole_batches(training.final_eval_sequences, training.batch_size, data),
        batch_size=training.batch_size,
    )
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
    held_out = data.validation.num_sequences
    if training.batch_size > held_out:
        raise UserError(
            f"'training.batch_size' is {training.batch_size} but only {held_out} sequences are held out, fewer than "
            "one batch: lower it, give more text or raise 'data.validation_fraction'."
        )
    if training.eval_sequences > held_out:
        raise UserError(
            f"'training.eval_sequences' is {training.eval_sequences} but only {held_out} sequences are held out: "
            "lower it, give more text or raise 'data.validation_fraction'."
        )
    for arm in arms.values():
        for wanted in (
            training.eval_sequences,
            _whole_batches(training.final_eval_sequences, training.batch_size, data),
        ):
            check_evaluation(arm.model_config, data.validation, num_sequences=wanted, batch_size=training.batch_size)


def _whole_batches(wanted: int, batch_size: int, data: PreparedData) -> int:
    """Held-out sequences to evaluate: as many as wanted or there are, in whole batches so that every group is full."""
    return max(1, min(wanted, data.validation.num_sequences) // batch_size) * batch_size


def tokens_per_step(recipe: Recipe) -> int:
    """Training tokens of one optimizer step."""
    training = recipe.training
    return training.batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length
