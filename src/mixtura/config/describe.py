"""Every key that a recipe may have, with its type, its default and a line on what it is, read from the dataclasses.

Quick and without torch, for `mixtura keys` and for recipes that explain themselves.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

from mixtura.config.arm import SETTINGS, ArmConfig, has_setting
from mixtura.config.families import FAMILIES, MIXTURES
from mixtura.config.schema import (
    AdapterConfig,
    BaseConfig,
    ChatArmConfig,
    ChatDataConfig,
    ChatRecipe,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    DataConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    Recipe,
    SearchConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
)
from mixtura.config.setting import Setting


def families_table() -> str:
    """The table as Markdown, for people who choose a family."""
    header = (
        "| family and class | what is routed | leaks the future | leaks the batch | token by token | "
        "same mathematics in Hugging Face |\n| --- | --- | --- | --- | --- | --- |"
    )
    rows = [
        f"| `{family}` `{facts.layer.partition(':')[2]}` | {facts.routes} | {facts.future} | {facts.batch} | "
        f"{facts.alone} | {facts.stock} |"
        for family, facts in FAMILIES.items()
    ]
    return "\n".join([header, *rows])


def settings_page() -> str:
    """docs/settings.md, whole: for writers of recipes, a list of settings for each set of families that has them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, each in SETTINGS.items():
        line = f"- `{name}` ({_bounded(each)}; {_written(each.default)}): {each.says}"
        groups.setdefault(tuple(each.families), []).append(line)
    body = "\n\n".join(f"## {_families(of)}\n\n" + "\n".join(lines) for of, lines in groups.items())
    return f"""# Which settings does an arm have?

These keys stand in an `[arms.NAME]` section besides `family`, and in a `feed_forward` section of fine-tuning recipes.
In brackets are the values and the default; `"none"` turns a setting off that may be off. A family refuses what it does
not list. `mixtura keys` lists the keys of all sections.

{body}
"""


def _written(value: Any) -> str:
    return '"none"' if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _bounded(each: Setting) -> str:
    options = [hint for hint in typing.get_args(each.hint) or (each.hint,) if hint is not type(None)]
    kinds = {int: "integer", float: "number", str: "text", bool: "true, false"}
    words = [kinds[option] if isinstance(option, type) else _choices(option) for option in options]
    return ", ".join(words) + (f", {each.bounds}" if each.bounds else "")


def _choices(option: Any) -> str:
    return ", ".join(map(str, typing.get_args(option))) or str(option)


def _families(families: tuple[str, ...]) -> str:
    if set(families) == set(FAMILIES):
        return "All families"
    return "All mixtures" if set(families) == set(MIXTURES) else ", ".join(f"`{family}`" for family in families)


class Key(NamedTuple):
    """One key."""

    name: str
    values: str
    """Such as "whole number" or "adamw, adafactor"."""
    default: str
    """As a recipe writes it; "required" where there is none."""
    says: str
    """What it is; may be empty where the name says it."""


class Section(NamedTuple):
    """The keys of one section of one kind of recipe."""

    name: str
    """As a recipe writes it: "training", "arms.NAME"; empty for the keys above all sections."""
    kind: str
    """Of which recipes: "every recipe", "pretraining", "translation", "classification", "chat"."""
    holds: type


_EVERY, _TUNING = "every recipe", "fine-tuning"
SECTIONS = (
    Section("", "pretraining", Recipe),
    Section("", "translation", TranslationRecipe),
    Section("", "classification", ClassificationRecipe),
    Section("", "chat", ChatRecipe),
    Section("data", "pretraining", DataConfig),
    Section("data", "translation", TranslationDataConfig),
    Section("data", "classification", ClassificationDataConfig),
    Section("data", "chat", ChatDataConfig),
    Section("base", _TUNING, BaseConfig),
    Section("model", "pretraining, and translation from scratch", ModelConfig),
    Section("training", _EVERY, TrainingConfig),
    Section("search", _EVERY, SearchConfig),
    Section("evaluation", "translation", EvaluationConfig),
    Section("arms.NAME", "pretraining", ArmConfig),
    Section("arms.NAME", "translation", TranslationArmConfig),
    Section("arms.NAME", "classification", ClassificationArmConfig),
    Section("arms.NAME", "chat", ChatArmConfig),
    Section("arms.NAME.feed_forward", "translation", ArmConfig),
    Section("arms.NAME.adapter", _TUNING, AdapterConfig),
    Section("arms.NAME.head", "classification", HeadConfig),
    Section("arms.NAME.head.feed_forward", "classification", ArmConfig),
)


@cache
def keys_of(holds: type) -> tuple[Key, ...]:
    """The keys of a section, in order; sections inside it are left out, as they have a place of their own."""
    says, hints = _docstrings(holds), typing.get_type_hints(holds)
    found = []
    for field in dataclasses.fields(holds):
        hint = hints[field.name]
        if _is_section(hint):
            continue
        setting = SETTINGS.get(field.name) if holds is ArmConfig else None
        said = setting.says if setting is not None else says.get(field.name, "")
        found.append(Key(field.name, _values(hint), _default(field), said))
    return tuple(found)


def lines_of(section: Section, *, width: int) -> Iterator[str]:
    """A section for people to read, a key a line as far as `width` characters hold it."""
    keys = keys_of(section.holds)
    yield f"[{section.name}] of {section.kind}" if section.name else f"Above all sections, {section.kind}"
    name, values, default = (max(len(key[column]) for key in keys) for column in range(3))
    values, default = min(values, 40), min(default, 24)
    indent = " " * (name + values + default + 8)
    for key in keys:
        first = f"  {key.name:{name}}  {key.values:{values}}  {key.default:{default}}"
        words, line = key.says.split(), ""
        for word in words:
            if line and len(indent) + len(line) + len(word) > width:
                yield (f"{first}  {line}" if first else indent + line).rstrip()
                first, line = "", ""
            line += f"{word} "
        yield (f"{first}  {line}" if first else indent + line).rstrip()


@cache
def _docstrings(holds: type) -> dict[str, str]:
    """The strings that stand below the fields of a dataclass, as one line each."""
    body = ast.parse(inspect.getsource(holds)).body[0]
    assert isinstance(body, ast.ClassDef)
    found, field = {}, None
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = statement.target.id
        elif field and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found[field], field = " ".join(str(statement.value.value).split()), None
    return found


def _is_section(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return typing.get_origin(hint) is dict or any(dataclasses.is_dataclass(option) for option in options)


def _values(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return ", ".join(_values(option) for option in options if option is not type(None)) + ', "none"'
    if origin is Literal:
        return ", ".join(map(str, options))
    if origin is tuple:
        return f"list of {_values(options[0])}"
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}[hint]


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return written(field.default)


def written(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list | tuple) else str(value)


def shown_settings(arm: ArmConfig) -> dict[str, Any]:
    """What a report says of an arm's layers: what its family always shows, and whatever else is not the default."""
    named = has_setting(arm.family, "route_by") and arm.route_by != "token"
    shown = {}
    for name, each in SETTINGS.items():
        if not each.shown or arm.family not in each.families or (named and each.of_router):
            continue
        value = getattr(arm, name)
        if value is not None and (arm.family in each.always_shown or value != each.default):
            shown[name] = value
    return shown
