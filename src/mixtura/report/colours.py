"""The colours of arms in figures, tables and pictures: one a family, in a light and a dark theme."""

import itertools
from collections.abc import Mapping
from typing import Any

from mixtura.config.families import FAMILIES

_FAMILY_COLOURS = {
    **{family: facts.colours for family, facts in FAMILIES.items()},
    "lora": ("#59636e", "#aab4c0"),
    "mixture_of_lora": ("#0a6ebd", "#5cb3f2"),
    "expert_specialized": ("#0b7d5e", "#3ec79c"),
    "full": ("#9c4a94", "#e19bd8"),
    "last_layer": ("#59636e", "#aab4c0"),
    "layer_mix": ("#0a6ebd", "#5cb3f2"),
}
_SPARE_COLOURS = (("#a37500", "#e8bf52"), ("#5b4fc4", "#a9a0f5"), ("#00808a", "#4fc6d0"), ("#b0305c", "#f286a9"))


def arm_colours(arms: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """A light-theme and a dark-theme colour for each arm: the family's, or a spare one for a family's further arms.

    The hues follow Okabe and Ito's palette, which colour-blind readers can tell apart; dense is grey.
    """
    spare, colours = itertools.cycle(_SPARE_COLOURS), {}
    for name, arm in arms.items():
        own = _FAMILY_COLOURS.get(arm["family"])
        colours[name] = next(spare) if own is None or own in colours.values() else own
    return colours
