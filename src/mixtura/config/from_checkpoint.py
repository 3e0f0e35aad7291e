"""Arms that start from a checkpoint instead of random weights: which settings the recipe may have, and which the
checkpoint decides."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mixtura.config.arm import SETTINGS, ArmConfig, has_setting
from mixtura.config.schema import DataConfig, ModelConfig, Recipe, TomlTable
from mixtura.errors import UserError

SHAPE_KEYS = tuple(name for name, each in SETTINGS.items() if each.role in ("shape", "function"))
"""Settings of an arm that a checkpoint decides; the others say how it is trained."""
TRAINED_KEYS = tuple(name for name, each in SETTINGS.items() if each.role == "training")
"""How an arm is trained, in the words of a recipe and of a checkpoint's config.json alike."""


def fill_from_checkpoints(table: TomlTable) -> None:
    """Writes into a recipe's table what it leaves open of the arms that start from checkpoints.

    These are the family and the settings of training that the checkpoint was made with. What the recipe sets stays.

    Raises:
        UserError: a checkpoint's config.json cannot be read, or names another family than the recipe.
    """
    arms = table.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if not isinstance(arm, dict) or not isinstance(arm.get("init_from"), str):
            continue
        key = f"arms.{name}.init_from"
        settings = _own_settings(arm["init_from"], key)
        found = None if settings is None else _family(settings, arm["init_from"], key)
        if arm.setdefault("family", found or "dense") != found and found is not None:
            raise UserError(
                f"'arms.{name}.family' is {arm['family']!r}, but the checkpoint '{arm['init_from']}' is {found}: leave "
                "the family out."
            )
        for trained in TRAINED_KEYS if found not in (None, "dense") else ():
            if settings and settings.get(trained) is not None and has_setting(str(found), trained):
                arm.setdefault(trained, settings[trained])


def _own_settings(place: str, key: str) -> TomlTable | None:
    """The config.json of a folder, empty for a stock model; None for a name, whose model is looked for when loaded."""
    path = Path(place) / "config.json"
    if not Path(place).is_dir():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return settings if settings.get("model_type") == "mixtura" else {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"'{key}' is '{place}', whose config.json cannot be read ({error}): give a model folder."
        ) from error


def _family(settings: TomlTable, place: str, key: str) -> str:
    mixtures = sorted(set(settings.get("mlp_layer_types") or []) - {"dense"})
    if len(mixtures) > 1:
        raise UserError(f"'{key}' is '{place}', which mixes {' and '.join(mixtures)}: an arm has one family.")
    return mixtures[0] if mixtures else "dense"


def starts_from_checkpoints(recipe: Recipe) -> bool:
    """Whether the arms of a checked recipe start from checkpoints: all do, or none."""
    return any(arm.init_from is not None for arm in recipe.arms.values())


def check_starts(recipe: Recipe) -> None:
    """Refuses what a checkpoint decides beside a checkpoint to start from.

    Raises:
        UserError: names the key, the value and the fix.
    """
    if not starts_from_checkpoints(recipe):
        return
    for name, arm in recipe.arms.items():
        if arm.init_from is None:
            raise UserError(
                f"'arms.{name}' starts from random weights while others have 'init_from': give it a checkpoint too, so "
                "that all share a tokenizer and a past."
            )
        if changed := _changed(arm, ArmConfig, SHAPE_KEYS):
            raise UserError(
                f"'arms.{name}.{changed}' is {getattr(arm, changed)!r}, but the checkpoint decides it: leave it out, "
                "or upcycle with that setting."
            )
    if changed := _changed(recipe.model, ModelConfig, [field.name for field in dataclasses.fields(ModelConfig)]):
        raise UserError(
            f"'model.{changed}' is {getattr(recipe.model, changed)!r}, but the arms start from checkpoints, which "
            "decide it: leave the section [model] out."
        )
    if changed := _changed(recipe.data, DataConfig, ["tokenizer", "vocab_size"]):
        raise UserError(
            f"'data.{changed}' is {getattr(recipe.data, changed)!r}, but the arms start from checkpoints, which have a "
            "tokenizer: leave it out."
        )


def _changed(section: Any, kind: type, keys: Any) -> str | None:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    return next((key for key in keys if getattr(section, key) != defaults[key]), None)
