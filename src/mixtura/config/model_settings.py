"""The settings of arms as a model's configuration holds them: the fields of `MixtureConfig` that the table declares.

Exported models bring the code of their configuration along, but not the table: `written_out` is the code that replaces
it.
"""

import types
import typing
from dataclasses import field, make_dataclass
from typing import Any, Literal

from mixtura.config.arm import Family, model_settings

FAMILY_NAMES: tuple[str, ...] = typing.get_args(Family)


def _model_type(hint: Any) -> Any:
    """The type of a field in `config.json`: a float may be written as a whole number, and a choice is a string."""
    if typing.get_origin(hint) is Literal:
        return str
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_model_type(option) for option in typing.get_args(hint))]  # noqa: UP007 (computed)
    return float | int if hint is float else hint


def _words(hint: Any) -> tuple[str, ...]:
    options = [hint, *typing.get_args(hint)]
    return next((typing.get_args(option) for option in options if typing.get_origin(option) is Literal), ())


_FIELDS: list[tuple[str, Any, Any]] = [(name, _model_type(each.hint), each.default) for each, name in model_settings()]
CHOICES: dict[str, tuple[str, ...]] = {
    name: _words(each.hint) for each, name in model_settings() if _words(each.hint) and not each.checked_by_layer
}
"""The words that a field may be, where no layer refuses another."""
ModelSettings: Any = make_dataclass(
    "ModelSettings",
    [(name, kind, field(default=default)) for name, kind, default in _FIELDS],
    kw_only=True,
    namespace={"__doc__": "What `mixtura.config.ArmConfig` says of a model's mixtures.", "__module__": __name__},
)


def written_out() -> str:
    """This module's three names as source code that needs nothing of Mixtura."""
    lines = [f"    {name}: {_type_text(kind)} = {default!r}" for name, kind, default in _FIELDS]
    return "\n".join(
        [
            "from dataclasses import dataclass",
            f"FAMILY_NAMES = {FAMILY_NAMES!r}",
            f"CHOICES = {CHOICES!r}",
            "@dataclass(kw_only=True)",
            "class ModelSettings:",
            *lines,
        ]
    )


def _type_text(kind: Any) -> str:
    options = typing.get_args(kind)
    if not options:
        return "None" if kind is type(None) else kind.__name__
    return " | ".join(map(_type_text, options))
