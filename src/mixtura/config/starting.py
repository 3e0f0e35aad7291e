"""Arms that start from a checkpoint in place of random weights: what a recipe may say of them, and their family."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mixtura.config.schema import ArmConfig, DataConfig, ModelConfig, Recipe, UserError

SHAPE_KEYS = (
    *("placement", "num_experts", "moe_intermediate_size", "top_k", "route_by", "score_function", "normalize_top_k"),
    *("capacity_factor", "num_shared_experts", "group_size", "group_over", "mixtures_per_expert", "temperature"),
    *("combine", "inference_mode", "alone_top_k"),
)
"""Settings of an arm that a checkpoint decides; the others say how it is trained."""


def name_families(table: dict[str, Any]) -> None:
    """Writes into a recipe's table the family of every arm that starts from a checkpoint and names none.

    Raises:
        UserError: a checkpoint's config.json cannot be read, or names another family than the recipe.
    """
    arms = table.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if not isinstance(arm, dict) or not isinstance(arm.get("init_from"), str):
            continue
        found = _family(arm["init_from"], f"arms.{name}.init_from")
        if arm.setdefault("family", found or "dense") != found and found is not None:
            raise UserError(
                f"'arms.{name}.family' is {arm['family']!r}, but the checkpoint '{arm['init_from']}' is {found}: leave "
                "the family out."
            )


def _family(place: str, key: str) -> str | None:
    """The family that a folder has; None for a name, whose model is looked for when it is loaded."""
    path = Path(place) / "config.json"
    if not Path(place).is_dir():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        families = settings.get("mlp_layer_types") if settings.get("model_type") == "mixtura" else None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"'{key}' is '{place}', whose config.json cannot be read ({error}): give a model folder."
        ) from error
    mixtures = sorted(set(families or []) - {"dense"})
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
