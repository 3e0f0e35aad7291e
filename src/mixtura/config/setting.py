"""The description of one setting of an arm, and how a field of a dataclass declares it.

`config.arms` declares the settings. Everything else asks them: the checks for the range, the model's configuration for
the field, the layer for the argument, a transition for what starts anew, and the report for what it shows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from mixtura.errors import UserError

Bounds = Literal["positive", "not negative", "share"]
Role = Literal["shape", "function", "training", "run"]
"""What a setting decides: the shapes of tensors, what a layer computes with them, how it is trained, or nothing of a
model."""

_BOUNDS: dict[Bounds, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: 0 < value < math.inf, "must be a number greater than zero"),
    "not negative": (lambda value: 0 <= value < math.inf, "must be zero or more"),
    "share": (lambda value: 0 <= value <= 1, "is a share and must lie between 0 and 1"),
}


_KEY, _SAME_NAME = "setting", "the same name"


def _unchanged(value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of an arm. `setting` describes the fields."""

    name: str = ""
    default: Any
    hint: Any = None
    says: str
    families: tuple[str, ...]
    role: Role
    field: str | None
    layer: str | Mapping[str, str] | None
    to_layer: Callable[[Any], Any]
    bounds: Bounds | None
    always_shown: tuple[str, ...]
    shown: bool
    of_router: bool

    def argument(self, family: str) -> str | None:
        """The name of the argument that the layer of a family takes it by; None where it takes none."""
        if family not in self.families:
            return None
        return self.layer if isinstance(self.layer, str | None) else self.layer.get(family)

    @property
    def checked_by_layer(self) -> bool:
        """Whether a layer is given the value itself, and so refuses one that makes no sense."""
        return self.layer is not None and self.to_layer is _unchanged

    def check(self, key: str, value: Any) -> None:
        """Refuses a value outside its bounds; None, where a setting may be that, is always inside.

        Raises:
            UserError: names `key`, the value and the fix.
        """
        if value is None or self.bounds is None:
            return
        holds, rule = _BOUNDS[self.bounds]
        if not holds(value):
            raise UserError(f"'{key}' is {value}: it {rule}.")


def setting(
    default: Any,
    *,
    says: str,
    families: tuple[str, ...],
    role: Role,
    field: str | Literal[True] | None = True,
    layer: str | Mapping[str, str] | Literal[True] | None = None,
    to_layer: Callable[[Any], Any] = _unchanged,
    bounds: Bounds | None = None,
    always_shown: tuple[str, ...] = (),
    shown: bool = True,
    of_router: bool = False,
) -> Any:
    """A field of a dataclass that is a setting of an arm.

    Args:
        default: the value where a recipe names none.
        says: what it is, for readers of the documentation.
        families: those whose layers it changes.
        role: what it decides. A checkpoint fixes all roles but "run" and "training", so a recipe that starts from one
            cannot set those.
        field: its name in `MixtureConfig` and so in `config.json`; True is the same name, None is no field.
        layer: the argument of the layer that takes it, for all families or for each; True is the same name.
        to_layer: turns the value into the one that the layer is given.
        bounds: the range of its numbers.
        always_shown: families whose reports show it always; those of the others do where it is not the default.
        shown: False where no report shows it, or shows it under another name.
        of_router: whether it has no meaning where an example's language names its expert.
    """
    declared = Setting(
        default=default,
        says=says,
        families=families,
        role=role,
        field=_SAME_NAME if field is True else field,
        layer=_SAME_NAME if layer is True else layer,
        to_layer=to_layer,
        bounds=bounds,
        always_shown=always_shown,
        shown=shown,
        of_router=of_router,
    )
    return dataclasses.field(default=default, metadata={_KEY: declared})


def scale_setting(default: float | None, *, says: str, families: tuple[str, ...]) -> Any:
    """A field that says how wide weights are drawn: positive, kept with the model, and shown by reports in words."""
    return setting(default, says=says, families=families, role="shape", bounds="positive", shown=False)


token_choice_setting = partial(setting, families=("token_choice",), of_router=True)
"""A field that says how token choice routes or balances."""
mot_setting = partial(setting, families=("mixture_of_tokens",))
"""A field of mixtures of tokens."""


def read_settings(kind: type, hints: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings that a dataclass declares, in order, by name; `hints` are the types of its fields."""
    found = {}
    for each in dataclasses.fields(kind):
        if _KEY not in each.metadata:
            continue
        declared: Setting = each.metadata[_KEY]
        field, layer = (each.name if name == _SAME_NAME else name for name in (declared.field, declared.layer))
        found[each.name] = dataclasses.replace(
            declared, name=each.name, hint=hints[each.name], field=field, layer=layer
        )
    return found
