"""Makes the experiment that a recipe asks for, and checks and warns about its arms before any is trained."""

from collections.abc import Mapping
from pathlib import Path

from mixtura.config import ClassificationRecipe, FinetuneRecipe, Recipe, TrainingConfig, TranslationRecipe
from mixtura.errors import need
from mixtura.results import Leaks
from mixtura.results.document import Task
from mixtura.tasks.language_modelling.experiment import make_pretraining
from mixtura.training import ProgressReporter, ranks
from mixtura.training.interface import Arm, Experiment

AnyRecipe = Recipe | FinetuneRecipe


def task_of(recipe: AnyRecipe) -> Task:
    """What the recipe's arms are trained for: "pretraining", "translation" or "classification"."""
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
    return make_pretraining(recipe, cache_dir=cache_dir, on_progress=reporter.note)


def check_arms(arms: Mapping[str, Arm], training: TrainingConfig) -> None:
    """Refuses arms that could not be trained or evaluated, before any of them is.

    Raises:
        UserError: an arm's task says why, or the processes cannot share its batches.
    """
    for arm in arms.values():
        model = arm.build(seed=0)
        arm.task.check(model, batch_size=training.batch_size)
        ranks.share_of_step(model, training, ranks.world_size())


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
