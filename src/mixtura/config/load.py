"""Recipes from TOML and back: every key and value is checked against the dataclasses."""

import dataclasses
import difflib
import functools
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
from mixtura.config.initialization import fill_from_checkpoints
from mixtura.config.schema import (
    AnyRecipe,
    ChatRecipe,
    ClassificationRecipe,
    Recipe,
    TomlTable,
    TranslationRecipe,
)
from mixtura.errors import UserError, is_utf8, reason_of, refuse_together

PRESETS = (
    "quick",
    "default",
    "full",
    "families",
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
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"There is no recipe at '{path}': give the path of a TOML file, or --preset {'|'.join(PRESETS)}."
        ) from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder: give the path of a TOML recipe inside it.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the path and its permissions.") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of 5,000 digits, 1,000 lists in lists
        raise UserError(f"'{path}' is not a TOML recipe ({reason_of(error)}): {_toml_advice(error)}.") from None
    if not is_utf8(str(table.setdefault("name", path.stem))):
        raise UserError(f"'{path}' has a name that is not UTF-8 text: rename the recipe.")
    for override in overrides:
        if not is_utf8(override):
            raise UserError(f"{override} is not UTF-8 text: rename the file, or retype it in a terminal of UTF-8.")
    if any(override.partition("=")[0].strip() in _BRINGS_DATA for override in overrides) and _is_preset(path):
        _leave_open(table)
    for override in overrides:
        _apply_override(table, override)
    return recipe_from_dict(table)


def _toml_advice(error: Exception) -> str:
    if "hex value" in str(error) or "Unescaped" in str(error):  # a path of Windows in double quotes
        return "write a path with backslashes in single quotes"
    return "see recipes/quick.toml for one that is"


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
    table.pop("description", None)  # it names the preset's own data and model


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
    if not isinstance(task, str) or task not in TASKS:
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
    except (ValueError, RecursionError):
        table[last] = text.strip()


CLOSE = 0.75
"""How alike a name must be to be suggested: "stps" is near "steps" (0.89), "lr" is near nothing."""


def _build(cls: type, table: Any, where: str) -> Any:
    """Makes dataclass `cls` from a TOML table; `where` is the dotted prefix for messages."""
    if not isinstance(table, dict):
        raise UserError(f"'{where.rstrip('.')}' must be a section with keys, not {table!r}.")
    hints = _hints(cls)
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


_hints = functools.cache(typing.get_type_hints)


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
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"'{where}' is {value}: a whole number in a recipe must be less than {2**63}.")
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
        raise UserError(f"'{where}' is {value!r}: it must be a list, such as {_list_example(args[0])}.")
    return tuple(_convert(args[0], item, where) for item in value)


def _list_example(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f'["{typing.get_args(hint)[0]}"]'
    return {float: "[1e-3, 3e-3]", str: '["one", "two"]'}.get(hint, "[0, 1, 2]")


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
