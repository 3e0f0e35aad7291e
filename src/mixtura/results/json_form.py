"""Records as JSON and back, by their fields' types: the one serialiser of everything that is stored.

Reading is strict: a missing field or a value of another type makes the file damaged. An unknown field is
ignored, since a later release may add some; JSON's null is None. (Recipes have a reader of their own, in `config`:
there an unknown key is a mistake to be named, TOML has no null, and lists become tuples.)
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Facts = dict[str, object]
"""Plain values by name that JSON can hold; only the part that writes them knows their types."""


class NotThatRecord(ValueError):
    """A value that does not fit its type; the message names the field."""


def to_plain(value: object) -> Any:
    """Dictionaries, lists and plain values of a record."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_plain(cls: type[T], value: object, where: str = "") -> T:
    """A record of dataclass `cls` from what `to_plain` made of one; `where` is its place, for messages.

    Raises:
        NotThatRecord: a field is missing, or has a value of another type.
    """
    if not isinstance(value, dict):
        raise NotThatRecord(f"{where or 'it'} is no table of fields")
    prefix = f"{where}." if where else ""
    found: dict[str, object] = {}
    hints = _hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name in value:
            found[field.name] = _convert(hints[field.name], value[field.name], f"{prefix}{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise NotThatRecord(f"{prefix}{field.name} is missing")
    return cls(**found)


_known_hints: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _known_hints:
        _known_hints[cls] = typing.get_type_hints(cls)
    return _known_hints[cls]


def _convert(hint: Any, value: object, where: str) -> object:
    if hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if convert := _CONVERTERS.get(typing.get_origin(hint)):
        return convert(typing.get_args(hint), value, where)
    # A whole number may stand for a float; True is neither.
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise NotThatRecord(f"{where} is {_shown(value)}, which is no {_TYPE_NAMES[hint]}")
    return value


def _convert_union(args: tuple[Any, ...], value: object, where: str) -> object:
    """None, a plain value of any of the types, or the record whose `kind` the value has."""
    if value is None and type(None) in args:
        return None
    records = [arg for arg in args if dataclasses.is_dataclass(arg)]
    if len(records) > 1:
        kind = value.get("kind") if isinstance(value, dict) else None
        records = [arg for arg in records if kind in typing.get_args(_hints(typing.cast(type, arg))["kind"])]
    candidates = records or [arg for arg in args if not dataclasses.is_dataclass(arg) and arg is not type(None)]
    if not candidates:
        raise NotThatRecord(f"{where} is of no known kind")
    for candidate in candidates[:-1]:
        try:
            return _convert(candidate, value, where)
        except NotThatRecord:
            continue
    return _convert(candidates[-1], value, where)


def _convert_list(args: tuple[Any, ...], value: object, where: str) -> object:
    if not isinstance(value, list):
        raise NotThatRecord(f"{where} is {_shown(value)}, which is no list")
    return [_convert(args[0], item, f"{where}[{place}]") for place, item in enumerate(value)]


def _convert_table(args: tuple[Any, ...], value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise NotThatRecord(f"{where} is {_shown(value)}, which is no table")
    return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}


def _convert_choice(args: tuple[Any, ...], value: object, where: str) -> object:
    if value not in args:
        raise NotThatRecord(f"{where} is {_shown(value)}, which is none of {', '.join(map(str, args))}")
    return value


_CONVERTERS: dict[Any, Callable[[tuple[Any, ...], object, str], object]] = {
    dict: _convert_table,
    list: _convert_list,
    types.UnionType: _convert_union,
    typing.Union: _convert_union,  # what Python before 3.14 makes of `Literal[...] | None`
    Literal: _convert_choice,
}
_TYPE_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
