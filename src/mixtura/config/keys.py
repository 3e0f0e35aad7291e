"""The tables of families and of settings as Markdown: README and docs/settings.md have them, and tests compare."""

import typing
from typing import Any

from mixtura.config.arms import SETTINGS
from mixtura.config.families import FAMILIES, MIXTURES
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


def settings_table() -> str:
    """The table as Markdown, for writers of recipes."""
    header = "| key | values | default | families | what it is |\n| --- | --- | --- | --- | --- |"
    rows = [
        f"| `{name}` | {_values(each)} | {_written(each.default)} | {_families(each)} | {each.says} |"
        for name, each in SETTINGS.items()
    ]
    return "\n".join([header, *rows])


def settings_page() -> str:
    """docs/settings.md, whole."""
    return f"""# Settings of an arm

Every key of an `[arms.NAME]` section besides `family`, and of a `feed_forward` section in fine-tuning recipes. A key
changes the layers of the families named, and no others. `"none"` turns a setting off that may be off.

This page is written from `mixtura.config.ArmConfig`, where each setting is declared once.

{settings_table()}
"""


def _written(value: Any) -> str:
    return '"none"' if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _values(each: Setting) -> str:
    options = [hint for hint in typing.get_args(each.hint) or (each.hint,) if hint is not type(None)]
    kinds = {int: "whole number", float: "number", str: "text", bool: "true, false"}
    words = [kinds[option] if isinstance(option, type) else _choices(option) for option in options]
    return ", ".join(words) + (f", {each.bounds}" if each.bounds else "")


def _choices(option: Any) -> str:
    return ", ".join(map(str, typing.get_args(option))) or str(option)


def _families(each: Setting) -> str:
    if set(each.families) == set(FAMILIES):
        return "all"
    return "all mixtures" if set(each.families) == set(MIXTURES) else ", ".join(each.families)
