"""From what a user asks for to a recipe: a path or a recipe, a task and its data, a checkpoint to start from."""

import json
from collections.abc import Sequence
from pathlib import Path

from mixtura.config.languages import language_of_column
from mixtura.config.load import TASKS, load_recipe, preset_path
from mixtura.config.schema import AnyRecipe, FinetuneRecipe, Recipe
from mixtura.errors import UserError

_COLUMNS = {
    "translation": ("source", "target", "source_language", "target_language"),
    "classification": ("text", "label"),
    "chat": ("prompt", "completion"),
}
"""What --columns names, by task."""


def as_recipe(recipe: AnyRecipe | Path | str, overrides: Sequence[str] = ()) -> tuple[Path | None, AnyRecipe]:
    """The path of a recipe, if it was given by one, and the recipe.

    Raises:
        UserError: see `load_recipe`; or `overrides` are given for a recipe that is in memory.
    """
    if not isinstance(recipe, Recipe | FinetuneRecipe):
        return Path(recipe), load_recipe(Path(recipe), overrides)
    if overrides:
        raise UserError(f"'{overrides[0]}' changes a recipe file: change a recipe in memory with dataclasses.replace.")
    return None, recipe


def one_arm(recipe: AnyRecipe, arm: str | None) -> str:
    """The name of the arm that is meant: the one that is asked for, or the only one there is.

    Raises:
        UserError: there is no such arm, or there are several and none is asked for.
    """
    if arm is None and len(recipe.arms) > 1:
        raise UserError(f"The recipe has {len(recipe.arms)} arms: choose one with --arm {'|'.join(recipe.arms)}.")
    name = arm or next(iter(recipe.arms))
    if name not in recipe.arms:
        raise UserError(f"The recipe has no arm '{name}': choose one of {', '.join(recipe.arms)}.")
    return name


def start_overrides(
    recipe: AnyRecipe | Path | str, *, arm: str | None, start: str | None, text: Path | str | None
) -> list[str]:
    """The changes of a recipe that training from a checkpoint, or on a text of one's own, asks for.

    Args:
        recipe: a recipe, or the path of one.
        arm: which of its arms; None where it has one.
        start: the checkpoint that the arm starts from.
        text: a file or folder.

    Raises:
        UserError: see `load_recipe` and `one_arm`.
    """
    # JSON's strings are TOML's.
    changes = []
    if start is not None:
        changes.append(f"arms.{one_arm(as_recipe(recipe)[1], arm)}.init_from={json.dumps(start)}")
    if text is not None:
        changes += ['data.source="local"', f"data.path={json.dumps(str(text))}"]
    return changes


def finetune_recipe(
    task: str,
    recipe: Path | str | None = None,
    *,
    preset: str = "default",
    data: str | None = None,
    columns: str | None = None,
    pairs: str | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """The path of a recipe for fine-tuning, and the changes of it that its user asks for; both are checked.

    Args:
        task: one of `TASKS`.
        recipe: the path; None takes the task's own recipe that `preset` names.
        preset: "quick" or "default".
        data: a file, or "hub:NAME".
        columns: "SOURCE,TARGET", with ",SOURCE_LANGUAGE,TARGET_LANGUAGE" where rows name their languages,
            "TEXT,LABEL", with more labels where these are columns of 0 and 1, or "PROMPT,COMPLETION".
        pairs: directions of translation, separated by commas.
        base: the pretrained model.
        overrides: "section.key=value" changes, which come last.

    Raises:
        UserError: there is no such task or preset, the recipe is for another task, or a value cannot be used.
    """
    if task not in TASKS:
        raise UserError(f"There is no task '{task}': choose one of {', '.join(TASKS)}.")
    if recipe is None and preset not in ("quick", "default"):
        raise UserError(f"There is no preset '{preset}' for {task}: choose quick or default, or give a recipe's path.")
    path = Path(recipe) if recipe is not None else preset_path(task if preset == "default" else f"{task}-{preset}")
    if recipe is None and task == "translation" and base is not None:
        # A pretrained model is adapted; what the presets compare are models from scratch.
        path = path.with_name("translation-smollm2.toml")
    changes = [*data_overrides(task, data=data, columns=columns, pairs=pairs, base=base), *overrides]
    found = getattr(load_recipe(path, changes), "task", "pretraining")
    if found != task:
        raise UserError(f"'{path}' is a recipe for {found}: give one for {task}.")
    return path, changes


def data_overrides(
    task: str, *, data: str | None, columns: str | None, pairs: str | None, base: str | None
) -> list[str]:
    """The changes of a fine-tuning recipe that its user's own data asks for, in the form of `--set`.

    Args:
        task: one of `TASKS`.
        data: a file, or "hub:NAME".
        columns: "SOURCE,TARGET", with ",SOURCE_LANGUAGE,TARGET_LANGUAGE" where rows name their languages,
            "TEXT,LABEL", with more labels where these are columns of 0 and 1, or "PROMPT,COMPLETION".
        pairs: directions of translation, separated by commas; None takes columns that are named after languages.
        base: the pretrained model.

    Raises:
        UserError: `columns` are too few or too many, or a text cannot stand in a recipe.
    """
    values: dict[str, str | list[str]] = {}
    if data is not None:
        if not data.removeprefix("hub:").strip():
            raise UserError(f"--data is '{data}': name a file, or a hub dataset as hub:NAME.")
        hub = data.startswith("hub:")
        values |= {"data.source": "hub", "data.name": data[4:]} if hub else {"data.source": "local", "data.path": data}
    if columns is not None:
        names = [name.strip() for name in columns.split(",")]
        values |= _column_keys(task, columns, names)
        codes = [language_of_column(name) for name in names]
        if task == "translation" and pairs is None and len(names) == 2 and None not in codes and codes[0] != codes[1]:
            pairs = f"{codes[0]}-{codes[1]}"
    if pairs is not None:
        if task != "translation":
            raise UserError(f"--pairs is '{pairs}', but {task} has no directions: leave it out.")
        values["data.pairs"] = [pair.strip() for pair in pairs.split(",")]
    if base is not None:
        values["base.name"] = base
    # JSON's strings and lists are TOML's.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _column_keys(task: str, columns: str, names: Sequence[str]) -> dict[str, str | list[str]]:
    """The keys that name columns, by what was typed for --columns."""
    keys = _COLUMNS[task]
    if task == "classification" and len(names) > len(keys) and all(names):
        return {"data.text_column": names[0], "data.label_columns": list(names[1:])}
    if len(names) not in (2, len(keys)) or not all(names):
        wanted = f"two names, {','.join(keys[:2]).upper()}"
        if task == "translation":
            wanted += ", or four with SOURCE_LANGUAGE,TARGET_LANGUAGE where rows name them"
        raise UserError(f"--columns is '{columns}': give {wanted}.")
    return {f"data.{key}_column": name for key, name in zip(keys, names, strict=False)}
