"""Scores of a model in the tasks of lm-eval, the harness whose numbers model cards and papers give.

The harness gets the model as it is deployed, opened in the one way in which all verbs open models: mixture-of-tokens
layers run alone, so that no score depends on what shares a batch.
"""

import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixtura.config import UserError
from mixtura.config.families import never_served
from mixtura.errors import need, reason_of
from mixtura.models.loading import load_model


class TaskScore(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    """As lm-eval calls it, such as "acc_norm"."""
    value: float
    standard_error: float | None
    """Over the examples; None where the harness knows none."""
    higher_is_better: bool | None
    examples: int
    shots: int
    """Worked examples in a prompt."""
    version: str
    """Of the task: scores of two versions are not to be compared."""


def score_tasks(
    model: Path | str,
    tasks: Sequence[str],
    *,
    folder: Path | str | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[TaskScore]:
    """Runs tasks of lm-eval, each metric of each task a score.

    Args:
        model: a folder as `save_pretrained` writes it, tokenizer included.
        tasks: names of tasks or of groups of them.
        folder: with tasks of the user's own, in the harness's .yaml.
        num_shots: worked examples in a prompt; None leaves that to the task.
        limit: examples of a task, from the first; None takes all.
        batch_size: requests at once.

    Raises:
        UserError: lm-eval is not installed, a task is unknown or cannot be run, or the model cannot be loaded or looks
            ahead.
    """
    need("lm_eval")
    manager, evaluator = need("lm_eval.tasks"), need("lm_eval.evaluator")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"'{folder}' is no folder: give one with tasks in .yaml with --task-folder.")
    known = manager.TaskManager(include_path=None if folder is None else str(folder))
    _check_names(tasks, known)
    loaded, tokenizer = load_model(Path(model))
    for family in never_served(getattr(loaded.config, "mlp_layer_types", None) or []):
        raise UserError(
            f"A model with {family} layers has no scores: a token's output depends on other tokens to come."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _quiet():
        client = need("lm_eval.models.huggingface").HFLM(
            pretrained=loaded.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device
        )
        try:
            found = evaluator.simple_evaluate(
                model=client,
                tasks=list(tasks),
                num_fewshot=num_shots,
                limit=limit,
                task_manager=known,
                log_samples=False,
                bootstrap_iters=0 if limit == 1 else 1000,
            )
        except Exception as error:  # datasets, the hub and the tasks' own code raise many unrelated classes
            raise UserError(f"The tasks {', '.join(tasks)} cannot be run ({reason_of(error)}).") from error
    return list(_scores(found))


def _check_names(tasks: Sequence[str], known: Any) -> None:
    if not tasks:
        raise UserError("--tasks names no task: give one such as hellaswag.")
    names = set(known.all_tasks)
    for name in tasks:
        if name not in names and not known.match_tasks([name]):
            near = difflib.get_close_matches(name, names)
            advice = f"there are {', '.join(near)}" if near else "`lm-eval ls tasks` lists all"
            raise UserError(f"lm-eval has no task '{name}': {advice}.")


def _scores(found: dict[str, Any]) -> Iterator[TaskScore]:
    """Each number of the harness's answer, whose keys are "metric,filter" and "metric_stderr,filter"."""
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            yield TaskScore(
                task,
                metric if rule == "none" else f"{metric} ({rule})",
                float(value),
                float(error) if isinstance(error, int | float) else None,
                found.get("higher_is_better", {}).get(task, {}).get(metric),
                int(found.get("n-samples", {}).get(task, {}).get("effective", 0)),
                int(found.get("n-shot", {}).get(task, 0)),
                str(found.get("versions", {}).get(task, "")),
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the harness's log and the warnings of its imports."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
