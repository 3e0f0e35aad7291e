"""Before a recipe runs: its experiment is made, its arms are checked, and `--dry-run` says what it would take.

For that a few steps of every arm are tried, and nothing is kept. Whether memory suffices is known from formulas before
anything is built.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mixtura.comparison.folder import has_runs
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
from mixtura.config.adapt import MOST_PAIR_TOKENS, changes
from mixtura.errors import need
from mixtura.models.build import build_model_config
from mixtura.planning import state_memory
from mixtura.results import ArmTiming, Leaks
from mixtura.results.document import Task
from mixtura.tasks.language_modelling.experiment import make_pretraining
from mixtura.training import ProgressReporter, ranks
from mixtura.training.interface import Arm, Experiment
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
        UserError: an arm's task says why, or the processes cannot share its batches or its weights.
    """
    for arm in arms.values():
        model = arm.build(seed=0)
        arm.task.check(model, batch_size=training.batch_size)
        ranks.share_of_step(model, training, ranks.world_size())
        check_layout(model, training, ranks.world_size())


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
    if leaks.future and task != "classification":
        return (
            f"'{arm.name}' ({arm.family}) sees the future of a sequence: its loss as a causal language model "
            "means nothing, and it cannot generate."
        )
    if leaks.batch and leaks.batch_deployed is not False:
        return f"'{arm.name}' ({arm.family}) lets examples of a batch see each other, also when deployed."
    if leaks.batch:
        return (
            f"'{arm.name}' ({arm.family}) lets examples of a batch see each other in training; deployed "
            f"in mode '{arm.deployed_mode}' it does not."
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


PROBE_ROUNDS = 3
"""Steps of every arm that are timed, after those that warm up."""


@dataclasses.dataclass(frozen=True)
class ArmPlan:
    """What one run of an arm takes."""

    name: str
    parameters: int
    trained: int
    flops: float
    """Of the whole run, forward and backward."""
    peak_bytes: int
    """Measured at one step: parameters, gradients, optimizer state and all that a step allocates."""
    minutes: float
    """Of training alone, at the rate of the steps that were tried."""


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
    arms: tuple[ArmPlan, ...]
    out: Path
    begun: bool
    """Whether the folder holds runs already, which are not repeated."""

    @property
    def minutes(self) -> float:
        """Of all runs together, trials of the search counted."""
        of_steps = self.runs_of_arm + self.trials_of_arm * self.trial_steps / self.steps
        return sum(arm.minutes for arm in self.arms) * of_steps

    def lines(self) -> list[str]:
        """The plan for people to read."""
        runs = len(self.arms) * self.runs_of_arm
        trials = f", and {self.trials_of_arm} trials of {self.trial_steps:,} steps an arm" if self.trials_of_arm else ""
        width = max(len("arm"), *(len(arm.name) for arm in self.arms))
        heads = (
            f"{'arm':{width}}  {'parameters':>13}  {'trained':>13}  {'FLOPs a run':>11}  {'peak memory':>11}  minutes"
        )
        rows = [
            f"{arm.name:{width}}  {arm.parameters:13,}  {arm.trained:13,}  {arm.flops:11.2e}  "
            f"{in_words(arm.peak_bytes):>11}  {_minutes(arm.minutes):>7}"
            for arm in self.arms
        ]
        models = sum(4 * arm.trained for arm in self.arms) * self.runs_of_arm
        return [
            f"Plan for {self.task}, from {PROBE_ROUNDS} steps of every arm; nothing was written.",
            f"Data: {self.data}",
            *([f"Fitted to the data: {'; '.join(self.fitted)}"] if self.fitted else []),
            f"{runs} {'run' if runs == 1 else 'runs'} of {self.steps:,} steps, {self.tokens_per_step:,} tokens a step, "
            f"{self.steps * self.tokens_per_step:,} a run{trials}.",
            heads,
            *rows,
            f"All together {_minutes(self.minutes)} minutes of training; evaluations come on top.",
            f"To be written: {self.out}/ with recipe.toml, results.json, report.html, report.md, figures/, and in "
            f"arms/ the finished models ({in_words(models)}) with their metrics"
            + ("; the runs that it holds already are kept." if self.begun else "."),
        ]


def plan(
    recipe: AnyRecipe, *, out: Path, reporter: ProgressReporter, arm: str | None = None, seeds: Sequence[int] = ()
) -> Plan:
    """Plans a comparison, or the training of one arm.

    Args:
        recipe: what would run.
        out: the folder it would write.
        reporter: told of what happens.
        arm: the only arm, for `mixtura train`, which searches no rates.
        seeds: those of the runs; none are the recipe's.

    Raises:
        UserError: whatever would stop the run itself before its first step.
    """
    check_memory(recipe)
    with tempfile.TemporaryDirectory(prefix="mixtura-plan-") as scratch:
        experiment = make_experiment(recipe, Path(scratch), reporter)
        fitted, training = experiment.recipe, experiment.recipe.training
        arms = {name: each for name, each in experiment.arms.items() if arm in (None, name)}
        check_arms(arms, training)
        reporter.note(f"timing {PROBE_ROUNDS} steps of every arm")
        baseline = experiment.arms[arm or fitted.baseline]
        timed = time_arms(arms, training, baseline.name, rounds=PROBE_ROUNDS)
    search = fitted.search if arm is None else None
    return Plan(
        task=task_of(recipe),
        data=str(experiment.data["description"]),
        fitted=tuple(changes(recipe, fitted)),
        steps=training.steps,
        tokens_per_step=tokens_per_step(baseline, training),
        runs_of_arm=len(seeds or fitted.seeds),
        trials_of_arm=len(search.learning_rates) * max(1, len(search.scales)) * len(search.seeds) if search else 0,
        trial_steps=(search.steps if search else None) or training.steps,
        arms=tuple(_arm_plan(each, baseline, training, timed[name]) for name, each in arms.items()),
        out=out,
        begun=has_runs(out),
    )


def _minutes(number: float) -> str:
    return f"{number:,.1f}" if number >= 0.05 else "<0.1"


def _arm_plan(arm: Arm, baseline: Arm, training: TrainingConfig, timed: ArmTiming) -> ArmPlan:
    described = arm.describe(baseline)
    assert timed.seconds_per_step is not None and timed.peak_memory_bytes is not None, "the arm was timed"
    return ArmPlan(
        name=arm.name,
        parameters=described.parameters_total,
        trained=described.parameters_trainable,
        flops=described.flops_per_token * tokens_per_step(arm, training) * training.steps,
        peak_bytes=timed.peak_memory_bytes,
        minutes=timed.seconds_per_step * training.steps / 60,
    )
