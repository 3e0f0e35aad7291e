"""Recipes from TOML and back, and from what a user asks for: every key and value is checked against the dataclasses.

A user may name a recipe, a task and its data, or a checkpoint to start from.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tomli_w

from mixtura.config.checks import check_recipe
from mixtura.config.controls import fill_controls
from mixtura.config.finetune_checks import check_finetune_recipe
from mixtura.config.from_checkpoint import fill_from_checkpoints
from mixtura.config.languages import language_of_column
from mixtura.config.schema import (
    AnyRecipe,
    ChatRecipe,
    ClassificationRecipe,
    FinetuneRecipe,
    Recipe,
    TomlTable,
    TranslationRecipe,
)
from mixtura.errors import UserError, refuse_together

PRESETS = (
    "quick",
    "default",
    "full",
    "continue",
    "deploy-quick",
    "deploy",
    "translation-quick",
    "translation",
    "classification-quick",
    "classification",
    "classification-tuned",
    "chat-quick",
    "chat",
    "adapters",
)
TASKS = {"translation": TranslationRecipe, "classification": ClassificationRecipe, "chat": ChatRecipe}
_COLUMNS = {
    "translation": ("source", "target"),
    "classification": ("text", "label"),
    "chat": ("prompt", "completion"),
}
"""The kinds of fine-tuning recipes by their `task`; a recipe without one is for pretraining."""


def preset_path(preset: str) -> Path:
    """Where a preset's recipe lies: inside the installed package, or at the root of the repository.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"There is no preset '{preset}': choose one of {', '.join(PRESETS)}, or give a recipe's path.")
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parents[1] / "recipes")
    return next(folder / f"{preset}.toml" for folder in folders if folder.is_dir())


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Reads a recipe file, applies `a.b=c` overrides and checks every key and value.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown, a value has the wrong type or makes no sense.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no recipe at '{path}': give the path of a TOML file, or --preset {'|'.join(PRESETS)}."
        ) from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder: give the path of a TOML recipe inside it.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the path and its permissions.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a TOML recipe ({error}): see recipes/quick.toml for one that is.") from None
    table.setdefault("name", path.stem)
    if any(override.partition("=")[0].strip() in _BRINGS_DATA for override in overrides) and _is_preset(path):
        _leave_open(table)
    for override in overrides:
        _apply_override(table, override)
    return recipe_from_dict(table)


_BRINGS_DATA = ("data.source", "data.path", "data.name", "data.subset", "base.name")
"""Keys that bring data or a base model of the user's own to a preset."""
_OPEN = {
    "translation": ("validation_sources", "test_sources", "max_characters", "max_length"),
    "classification": ("validation_examples", "test_examples", "max_length"),
    "chat": ("validation_chats", "test_chats", "max_length"),
}
"""What a fine-tuning preset sizes for its own data: fitted to the user's where there is such."""


def _is_preset(path: Path) -> bool:
    return path.parent.resolve() == preset_path(PRESETS[0]).parent.resolve()


def _leave_open(table: TomlTable) -> None:
    for key in _OPEN.get(table.get("task", ""), ()):
        table["data"][key] = "none"
    table["data"].pop("part", None)  # of the movie reviews


def recipe_from_dict(table: TomlTable) -> AnyRecipe:
    """Builds and checks a recipe from nested dictionaries, as TOML gives them; its `task` decides which kind it is.

    Raises:
        UserError: see `load_recipe`.
    """
    if "task" not in table:
        fill_controls(table)
        fill_from_checkpoints(table)
        recipe = _build(Recipe, table, "")
        check_recipe(recipe)
        return recipe
    task = table["task"]
    if task not in TASKS:
        raise UserError(f"'task' is {task!r}: it must be one of {', '.join(TASKS)}, or left out for pretraining.")
    recipe = _build(TASKS[task], table, "")
    check_finetune_recipe(recipe)
    return recipe


def recipe_to_dict(recipe: AnyRecipe) -> TomlTable:
    """The recipe as nested dictionaries, without None: TOML has no null.

    A key that is None by default is left out; one that was turned off is "none", as in a recipe.
    """
    return _to_table(recipe)


def recipe_to_toml(recipe: AnyRecipe) -> str:
    """The resolved recipe as TOML text; reading it back gives an equal recipe."""
    return tomli_w.dumps(recipe_to_dict(recipe))


def _apply_override(table: TomlTable, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set '{override}' is no change of a key: write --set section.key=value.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a section: write --set section.key=value.")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()


CLOSE = 0.75
"""How alike a name must be to be suggested: "stps" is near "steps" (0.89), "lr" is near nothing."""


def _build(cls: type, table: Any, where: str) -> Any:
    """Makes dataclass `cls` from a TOML table; `where` is the dotted prefix for messages."""
    if not isinstance(table, dict):
        raise UserError(f"'{where.rstrip('.')}' must be a section with keys, not {table!r}.")
    hints = typing.get_type_hints(cls)
    values: TomlTable = {}

    def convert(key: str) -> None:
        if key not in hints:
            raise UserError(_unknown_key(where, key, list(hints)))
        values[key] = _convert(hints[key], table[key], f"{where}{key}")

    def require(name: str) -> None:
        if name not in table:
            raise UserError(f"The recipe lacks '{where}{name}': add it.")

    refuse_together([*(partial(convert, key) for key in table), *(partial(require, name) for name in _required(cls))])
    return cls(**values)


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def _unknown_key(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=CLOSE)
    fix = f"did you mean '{where}{near[0]}'?" if near else f"known keys are {', '.join(sorted(known))}."
    return f"Unknown recipe key '{where}{key}': {fix}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks `value` against a field's type hint and converts lists to tuples and whole numbers to floats."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{where}.")
    if convert := _CONVERTERS.get(typing.get_origin(hint)):
        return convert(typing.get_args(hint), value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"'{where}' is {value!r}: it must be {_type_name(hint)}.")
    return value


def _convert_arms(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"'{where}' must be a section of named arms, such as [arms.dense], not {value!r}.")
    arms: TomlTable = {}

    def convert(name: str) -> None:
        arms[name] = _convert(args[1], value[name], f"{where}.{name}")

    refuse_together(partial(convert, name) for name in value)
    return arms


def _convert_optional(args: tuple[Any, ...], value: Any, where: str) -> Any:
    # TOML has no null: "none" turns a setting off.
    return None if value == "none" else _convert(next(arg for arg in args if arg is not type(None)), value, where)


def _convert_choice(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in args:
        raise UserError(f"'{where}' is {value!r}: it must be one of {', '.join(map(str, args))}.")
    return value


def _convert_list(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise UserError(f"'{where}' is {value!r}: it must be a list, such as [0, 1, 2].")
    return tuple(_convert(args[0], item, where) for item in value)


_CONVERTERS: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    dict: _convert_arms,
    types.UnionType: _convert_optional,
    typing.Union: _convert_optional,  # what Python before 3.14 makes of `Literal[...] | None`
    Literal: _convert_choice,
    tuple: _convert_list,
}


def _type_name(hint: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


def _to_table(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        items = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
        return {
            name: "none" if item is None else _to_table(item)
            for name, (item, default) in items.items()
            if item is not None or default is not None
        }
    if isinstance(value, dict):
        return {name: _to_table(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


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
        columns: "SOURCE,TARGET", "TEXT,LABEL" or "PROMPT,COMPLETION".
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
        columns: "SOURCE,TARGET", "TEXT,LABEL" or "PROMPT,COMPLETION".
        pairs: directions of translation, separated by commas; None takes columns that are named after languages.
        base: the pretrained model.

    Raises:
        UserError: `columns` are not two, or a text cannot stand in a recipe.
    """
    values: dict[str, str | list[str]] = {}
    if data is not None:
        hub = data.startswith("hub:")
        values |= {"data.source": "hub", "data.name": data[4:]} if hub else {"data.source": "local", "data.path": data}
    if columns is not None:
        names = [name.strip() for name in columns.split(",")]
        if len(names) != 2 or not all(names):
            raise UserError(f"--columns is '{columns}': give two names, {','.join(_COLUMNS[task]).upper()}.")
        values |= {f"data.{key}_column": name for key, name in zip(_COLUMNS[task], names, strict=True)}
    if columns is not None and pairs is None and task == "translation":
        codes = [language_of_column(name) for name in columns.split(",")]
        if None not in codes and codes[0] != codes[1]:
            pairs = f"{codes[0]}-{codes[1]}"
    if pairs is not None:
        if task != "translation":
            raise UserError(f"--pairs is '{pairs}', but {task} has no directions: leave it out.")
        values["data.pairs"] = [pair.strip() for pair in pairs.split(",")]
    if base is not None:
        values["base.name"] = base
    # JSON's strings and lists are TOML's.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
