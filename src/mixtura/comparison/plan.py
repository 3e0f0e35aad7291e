"""What a recipe would take on this machine, before it runs: a few steps of every arm are tried, and nothing is kept."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixtura.comparison.folder import has_runs
from mixtura.comparison.machine_memory import check_memory, in_words
from mixtura.comparison.preparing import check_arms, make_experiment, task_of, tokens_per_step
from mixtura.comparison.timing import time_arms
from mixtura.config import AnyRecipe, TrainingConfig
from mixtura.config.adapt import changes
from mixtura.results import ArmTiming
from mixtura.training import ProgressReporter
from mixtura.training.interface import Arm

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
