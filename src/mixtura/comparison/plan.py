"""Before a recipe runs: its experiment is made, its arms are checked, and `--dry-run` says what it would take.

For that a few steps of every arm are tried, and nothing is kept; `mixtura plan --probe` tries more of them. Whether
memory suffices is known from formulas before anything is built.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtura.comparison.folder import check_folder, check_same_data, has_runs
from mixtura.comparison.timing import time_arms
from mixtura.config import (
    AnyRecipe,
    ChatRecipe,
    ClassificationRecipe,
    Recipe,
    TrainingConfig,
    TranslationRecipe,
    UserError,
    starts_from_checkpoints,
)
from mixtura.config.requests import MOST_PAIR_TOKENS, changes
from mixtura.errors import need
from mixtura.models.build import build_model_config
from mixtura.models.experts_backends import use_experts_backend
from mixtura.planning import state_memory
from mixtura.planning.step_memory import Division, ModelSizes, step_memory
from mixtura.results import ArmTiming, Leaks
from mixtura.results.document import Task
from mixtura.tasks.language_modelling.experiment import PretrainingArm, make_pretraining
from mixtura.training import ProgressReporter, ranks
from mixtura.training.interface import Arm, Experiment
from mixtura.training.saving import KEPT
from mixtura.training.sharding import check_layout, layout_of


def task_of(recipe: AnyRecipe) -> Task:
    """What the recipe's arms are trained for: "pretraining", "translation", "classification" or "chat"."""
    return "pretraining" if isinstance(recipe, Recipe) else recipe.task


def make_experiment(recipe: AnyRecipe, out: Path, reporter: ProgressReporter) -> Experiment:
    """Reads the recipe's data and makes its arms; what is slow to prepare is kept in `out`/data.

    Raises:
        UserError: the data, a model or an arm's settings cannot be used, or fine-tuning is not installed.
    """
    cache_dir = out / "data"
    if isinstance(recipe, TranslationRecipe):
        make = need("mixtura.tasks.translation.experiment").make_translation
        return make(recipe, cache_dir=cache_dir, on_progress=reporter.note)
    if isinstance(recipe, ClassificationRecipe):
        make = need("mixtura.tasks.classification.experiment").make_classification
        return make(recipe, cache_dir=cache_dir, on_progress=reporter.note)
    if isinstance(recipe, ChatRecipe):
        return need("mixtura.tasks.chat.experiment").make_chat(recipe, cache_dir=cache_dir, on_progress=reporter.note)
    return make_pretraining(recipe, cache_dir=cache_dir, on_progress=reporter.note)


def check_arms(arms: Mapping[str, Arm], training: TrainingConfig) -> None:
    """Refuses arms that could not be trained or evaluated, before any of them is.

    Raises:
        UserError: an arm's task says why, the processes cannot share its batches or its weights, or its experts cannot
            run on the backend, or no arm has experts that could.
    """
    device, backend = torch.device("cuda" if torch.cuda.is_available() else "cpu"), training.experts_backend
    used = backend == "auto"
    for arm in arms.values():
        model = arm.build(seed=0)
        used |= use_experts_backend(model, backend, device=device, dtype=training.dtype)
        arm.task.check(model, batch_size=training.batch_size)
        ranks.share_of_step(model, training, ranks.world_size())
        check_layout(model, training, ranks.world_size())
    if not used:
        raise UserError(
            f"'training.experts_backend' is '{backend}', but no arm has experts that tokens choose: set it to \"auto\"."
        )


def tokens_per_step(arm: Arm, training: TrainingConfig) -> int:
    """Training tokens of one optimizer step, padding left out."""
    return round(training.batch_size * training.gradient_accumulation_steps * arm.task.tokens_per_example)


def export_note(arm: Arm) -> str | None:
    """A sentence, before training, on what the arm's model can be exported to; None where it is no model of ours."""
    if arm.trained_config is None:
        return None
    return f"'{arm.name}' {need('mixtura.exporting.containers').export_outlook(arm.trained_config)}"


def leak_warning(arm: Arm, leaks: Leaks, task: str) -> str | None:
    """A warning before an arm that leaks is trained; for a classifier, reading its whole text is no leak."""
    named = f"'{arm.name}'" if arm.name == arm.family else f"'{arm.name}' ({arm.family})"
    if leaks.future and task != "classification":
        return (
            f"{named} sees the future of a sequence: its loss as a causal language model means nothing, and it cannot "
            "generate."
        )
    if leaks.batch and leaks.batch_deployed is not False:
        return f"{named} lets examples of a batch see each other, also when deployed."
    if leaks.batch:
        return (
            f"{named} lets examples of a batch see each other in training; deployed in mode '{arm.deployed_mode}' it "
            "does not."
        )
    return None


_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(recipe: AnyRecipe) -> None:
    """Refuses a model from scratch whose parameters, gradients and optimizer state alone are more than all memory.

    Raises:
        UserError: names the arm, the planned bytes and those there are.
    """
    if isinstance(recipe, ClassificationRecipe | ChatRecipe) or (
        isinstance(recipe, Recipe) and starts_from_checkpoints(recipe)
    ):
        return
    if isinstance(recipe, Recipe):
        layers, length = recipe.arms, recipe.data.sequence_length
    elif recipe.base.name is None:
        layers = {name: arm.feed_forward for name, arm in recipe.arms.items()}
        length = recipe.data.max_length or MOST_PAIR_TOKENS
    else:
        return
    most, layout = machine_bytes(), layout_of(recipe.training, ranks.world_size())
    for name, layer in layers.items():
        config = build_model_config(
            recipe.model,
            layer,
            vocab_size=recipe.data.vocab_size,
            max_position_embeddings=length,
            width_multiple=recipe.training.width_multiple,
        )
        optimizer = recipe.training.optimizer
        known = "muon" if optimizer == "muon" else "adamw"
        state = state_memory(config, optimizer=known)  # pyright: ignore[reportArgumentType]
        # The other optimizers keep less; what they keep is left out.
        planned = state.total if optimizer == known else state.total - state.optimizer
        planned = planned if layout is None else planned // layout.shards
        if planned > most:
            raise UserError(
                f"Arm '{name}' needs {in_words(planned)} for parameters, gradients and optimizer state, but this "
                f"machine has {in_words(most)}: lower 'model.hidden_size', 'model.num_hidden_layers', "
                "'data.vocab_size' or the number of experts."
            )


def machine_bytes() -> int:
    """All memory of the GPU that would train, or else of the machine, as far as this process may have it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    try:
        return min(installed, int(_CGROUP_LIMIT.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such group, or "max"
        return installed


def in_words(number: float) -> str:
    """Bytes for people: "1.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"


DRY_ROUNDS, PROBE_ROUNDS = 3, 20
"""Steps of every arm that are timed, after those that warm up, in a dry run and in a probe."""


@dataclasses.dataclass(frozen=True)
class ArmPlan:
    """What one run of an arm takes."""

    name: str
    parameters: int
    trained: int
    flops: float
    """Of the whole run, forward and backward."""
    planned_bytes: float | None
    """The peak of a step by the planner's formulas; None where the model is no decoder of ours on one device."""
    peak_bytes: int
    """Measured at one step: parameters, gradients, optimizer state and all that a step allocates."""
    seconds: float
    """The median step of those that were tried."""
    steps: int
    """Of a run."""
    checkpoint_bytes: int
    """The most that a run's checkpoints take on the disk; none is left when it is finished."""

    @property
    def minutes(self) -> float:
        """Of training alone, at the rate of the steps that were tried."""
        return self.seconds * self.steps / 60


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe takes."""

    task: str
    data: str
    fitted: tuple[str, ...]
    steps: int
    tokens_per_step: int
    runs_of_arm: int
    """Full runs of each arm: its seeds."""
    trials_of_arm: int
    trial_steps: int
    tried_steps: int
    """Of every arm."""
    arms: tuple[ArmPlan, ...]
    out: Path | None
    """The folder that would be written; None for a probe."""
    begun: bool
    """Whether the folder holds runs already."""
    resume: bool
    """Whether these are kept, and not repeated; else they are removed when the run starts."""

    @property
    def minutes(self) -> float:
        """Of all runs together, trials of the search counted."""
        of_steps = self.runs_of_arm + self.trials_of_arm * self.trial_steps / self.steps
        return sum(arm.minutes for arm in self.arms) * of_steps

    def lines(self) -> list[str]:
        """The plan for people to read."""
        runs = len(self.arms) * self.runs_of_arm
        trials = f", and {self.trials_of_arm} trials of {self.trial_steps:,} steps an arm" if self.trials_of_arm else ""
        return [
            f"Plan for {self.task}, from {self.tried_steps} steps of every arm on this machine; nothing was written.",
            f"Data: {self.data}",
            *([f"Fitted to the data: {'; '.join(self.fitted)}"] if self.fitted else []),
            f"{runs} {'run' if runs == 1 else 'runs'} of {self.steps:,} steps, {self.tokens_per_step:,} tokens a step, "
            f"{self.steps * self.tokens_per_step:,} a run{trials}.",
            *self._table(),
            f"All together {_minutes(self.minutes)} minutes of training; evaluations come on top.",
            *self._written(),
        ]

    def plain_form(self) -> dict[str, object]:
        """All numbers, JSON-able."""
        out = None if self.out is None else str(self.out)
        return {**dataclasses.asdict(self), "out": out, "minutes": self.minutes}

    def _table(self) -> list[str]:
        width = max(len("arm"), *(len(arm.name) for arm in self.arms))
        heads = ("parameters", "trained", "FLOPs a run", "peak memory", "planned", "step", "minutes")
        rows: list[tuple[str, ...]] = [heads]
        for arm in self.arms:
            sizes = f"{arm.parameters:,}", f"{arm.trained:,}", f"{arm.flops:.2e}"
            planned = "-" if arm.planned_bytes is None else in_words(arm.planned_bytes)
            rows.append((*sizes, in_words(arm.peak_bytes), planned, _seconds(arm.seconds), _minutes(arm.minutes)))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join([f"{name:{width}}", *(f"{cell:>{room}}" for cell, room in zip(row, wide, strict=True))])
            for name, row in zip(["arm", *(arm.name for arm in self.arms)], rows, strict=True)
        ]

    def _written(self) -> list[str]:
        if self.out is None:
            return []
        models = sum(4 * arm.trained for arm in self.arms) * self.runs_of_arm
        most = max(arm.checkpoint_bytes for arm in self.arms)
        return [
            f"To be written: {self.out}/ with recipe.toml, results.json, report.html, report.md, figures/, and in "
            f"arms/ the finished models ({in_words(models)}) with their metrics"
            + (f"; the runs that it holds already are {'kept' if self.resume else 'removed'}." if self.begun else "."),
            *([f"A run under way takes up to {in_words(most)} more for its checkpoints."] if most else []),
        ]


def plan(
    recipe: AnyRecipe,
    *,
    reporter: ProgressReporter,
    out: Path | None = None,
    resume: bool = True,
    arm: str | None = None,
    seeds: Sequence[int] = (),
    rounds: int = DRY_ROUNDS,
) -> Plan:
    """Plans a comparison, or the training of one arm.

    Args:
        recipe: what would run.
        reporter: told of what happens.
        out: the folder it would write; None where that is not asked.
        resume: whether it would go on with what the folder holds, or start over.
        arm: the only arm, as for `mixtura train`, which searches no rates.
        seeds: those of the runs; none are the recipe's.
        rounds: steps of every arm that are timed.

    Raises:
        UserError: whatever would stop the run itself before its first step, or there is no such arm.
    """
    if arm is not None and arm not in recipe.arms:
        raise UserError(f"The recipe has no arm '{arm}': choose one of {', '.join(recipe.arms)}.")
    check_memory(recipe)
    if out is not None:
        check_folder(out, recipe, resume=resume)
    with tempfile.TemporaryDirectory(prefix="mixtura-plan-") as scratch:
        experiment = make_experiment(recipe, Path(scratch), reporter)
        fitted, training = experiment.recipe, experiment.recipe.training
        if out is not None and resume:
            check_same_data(out, experiment)
        arms = {name: each for name, each in experiment.arms.items() if arm in (None, name)}
        check_arms(arms, training)
        reporter.note(f"timing {rounds} steps of every arm")
        baseline = experiment.arms[arm or fitted.baseline]
        timed = time_arms(arms, training, baseline.name, rounds=rounds)
    search = fitted.search if arm is None else None
    return Plan(
        task=task_of(recipe),
        data=str(experiment.data["description"]),
        fitted=tuple(changes(recipe, fitted)),
        steps=training.steps,
        tokens_per_step=tokens_per_step(baseline, training),
        runs_of_arm=len(seeds or fitted.seeds),
        trials_of_arm=search.trials if search else 0,
        trial_steps=(search.steps if search else None) or training.steps,
        tried_steps=rounds,
        arms=tuple(_arm_plan(each, baseline, training, timed[name]) for name, each in arms.items()),
        out=out,
        begun=out is not None and has_runs(out),
        resume=resume,
    )


def _minutes(number: float) -> str:
    return f"{number:,.1f}" if number >= 0.05 else "<0.1"


def _seconds(number: float) -> str:
    return f"{number:,.3g} s" if number >= 1 else f"{1000 * number:,.3g} ms"


def _arm_plan(arm: Arm, baseline: Arm, training: TrainingConfig, timed: ArmTiming) -> ArmPlan:
    described = arm.describe(baseline)
    assert timed.seconds_per_step is not None and timed.peak_memory_bytes is not None, "the arm was timed"
    return ArmPlan(
        name=arm.name,
        parameters=described.parameters_total,
        trained=described.parameters_trainable,
        flops=described.flops_per_token * tokens_per_step(arm, training) * training.steps,
        planned_bytes=_planned_bytes(arm, training),
        peak_bytes=timed.peak_memory_bytes,
        seconds=timed.seconds_per_step,
        steps=training.steps,
        # A new one is written before the oldest goes.
        checkpoint_bytes=min(KEPT + 1, training.steps // training.save_every)
        * (4 * described.parameters_trainable + (timed.optimizer_state_bytes or 0)),
    )


def _planned_bytes(arm: Arm, training: TrainingConfig) -> float | None:
    """The peak of a step by the planner's formulas, in a process by itself."""
    if not isinstance(arm, PretrainingArm) or ranks.world_size() > 1:
        return None
    shape: Any = arm.model_config
    division = Division(
        micro_batch=training.batch_size,
        micro_batches=training.gradient_accumulation_steps,
        checkpointing=training.activation_checkpointing,
    )
    return step_memory(
        ModelSizes(shape, sequence_length=arm.sequence_length),
        division,
        dtype=training.dtype,
        optimizer=training.optimizer,
        on_cpu=not torch.cuda.is_available(),
    ).total
