"""The verbs finetune and train: what a user asks for becomes a recipe, and the runner runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixtura.comparison.runner import compare, train_arm
from mixtura.config import AnyRecipe, as_recipe, finetune_recipe, one_arm, preset_path, start_overrides
from mixtura.results import Results, RunResult
from mixtura.training import ProgressReporter


@dataclass(frozen=True)
class Trained:
    """What `train` made."""

    checkpoint: Path
    """The model's folder, as `from_pretrained` reads it."""
    result: RunResult
    """What was measured, as `runs` of results.json has it."""


def finetune(
    task: Literal["translation", "classification", "chat"],
    recipe: Path | str | None = None,
    *,
    preset: str = "default",
    data: str | None = None,
    columns: str | None = None,
    pairs: str | None = None,
    base: str | None = None,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = True,
    command: str | None = None,
    arms_in_parallel: int = 1,
    reporter: ProgressReporter | None = None,
) -> Results:
    """Fine-tunes the arms of a recipe for a task, compares them, and writes the report.

    Args:
        task: what the models learn.
        recipe: the path of a recipe for it; None takes the task's own that `preset` names.
        preset: "quick" or "default".
        data: a .jsonl, .csv, .tsv or .parquet file, or "hub:NAME"; None reads the recipe's data.
        columns: of `data`: "SOURCE,TARGET", with ",SOURCE_LANGUAGE,TARGET_LANGUAGE" where rows name their languages,
            "TEXT,LABEL", "PROMPT,COMPLETION" or "MESSAGES"; "a+b" joins two columns.
        pairs: directions of translation, separated by commas, such as "en-de,de-en".
        base: the pretrained model: a folder, a hub name, "smollm2" or "minilm".
        out: the folder to write; by default runs/<the recipe's name>.
        overrides: "section.key=value" changes to the recipe.
        resume: go on with what the folder holds of this recipe; False starts over.
        command: what the user typed, for "reproduce this".
        arms_in_parallel: how many runs train at a time, as in `compare`.
        reporter: shows progress and says what happens; None shows nothing.

    Returns:
        What `compare` does.

    Raises:
        UserError: the recipe, the data or the folder is unusable.
        Interrupted: Ctrl-C was pressed; the same call goes on from there.
    """
    path, changes = finetune_recipe(
        task, recipe, preset=preset, data=data, columns=columns, pairs=pairs, base=base, overrides=overrides
    )
    return compare(
        path,
        out=out,
        overrides=changes,
        resume=resume,
        command=command,
        arms_in_parallel=arms_in_parallel,
        reporter=reporter,
    )


def train(
    recipe: AnyRecipe | Path | str | None = None,
    *,
    arm: str | None = None,
    seed: int = 0,
    start: str | None = None,
    text: Path | str | None = None,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = True,
    reporter: ProgressReporter | None = None,
) -> Trained:
    """Trains one arm of a recipe, or a checkpoint on, with one seed.

    Args:
        recipe: a recipe, or the path of one; None is the preset "continue", which trains a checkpoint on.
        arm: which of its arms; None where it has only one.
        seed: of the data's order and the initialisation.
        start: the checkpoint to start from: a folder, or a dense model by name.
        text: your own text to train on: a file or folder.
        out: the folder to write; by default runs/<the recipe's name>-<the arm's>.
        overrides: "section.key=value" changes to a recipe given by its path, as `start` and `text` are.
        resume: go on with what the folder holds of this recipe; False starts over.
        reporter: shows progress and says what happens; None shows nothing.

    Raises:
        UserError: the recipe, the data or the folder is unusable.
        Interrupted: Ctrl-C was pressed; the same call goes on from there.
    """
    given = preset_path("continue") if recipe is None else recipe
    changes: list[str] = []
    if start is not None or text is not None:
        changes = start_overrides(given, arm=arm, start=start, text=text)
    _, loaded = as_recipe(given, [*changes, *overrides])
    name = one_arm(loaded, arm)
    folder = Path(out) if out is not None else Path("runs") / f"{loaded.name}-{name}"
    result = train_arm(loaded, name, seed=seed, out=folder, resume=resume, reporter=reporter)
    return Trained(folder / "arms" / name / f"seed{seed}" / "checkpoint", result)
