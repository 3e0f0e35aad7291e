"""How the weights of an arm start: drawn at a scale that the recipe names or that is derived for the family, or from a
checkpoint, which then decides some of the settings.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtura.config.arm import SETTINGS, ArmConfig, has_setting
from mixtura.config.families import facts_of
from mixtura.config.schema import DataConfig, ModelConfig, Recipe, TomlTable
from mixtura.errors import UserError

INITIALIZER_RANGE = 0.02
"""Standard deviation of every matrix that has no scale of its own."""
SCALE_KEYS = ("feed_forward_scale", "down_scale", "dense_scale", "expert_scale", "router_scale")
"""The settings of an arm that say how its weights are drawn."""
_PLAIN, _GATED = (0.5, 0.5, 0.125), (0.45, 0.45, 0.28)
"""Scales of dense layers, of experts that get mixtures of tokens, and of experts that get tokens that were chosen."""
_NARROW, _MOST_WIDENING = 64, 1.5
"""The width that the scales were found at, and the most by which those of wider experts are raised."""


@dataclass(frozen=True, kw_only=True)
class StartScales:
    """Standard deviations at the start, as multiples of 1 / sqrt(fan-in); None is `initializer_range`."""

    dense_scale: float | None = None
    """Of dense feed-forward layers, wherever they stand, and of shared experts."""
    expert_scale: float | None = None
    router_scale: float | None = None


def derived_scales(arm: ArmConfig, *, hidden_size: int, gated: bool) -> StartScales:
    """The scales of an arm that names none.

    Embeddings start at 0.02, so the residual stream is quiet, and what a layer adds to it must not drown it. A plain
    layer at scale s adds a root mean square of s^2 / sqrt(2), whatever its width and depth: 0.18 for s = 0.5.

    A mixture of tokens divides what its experts see and give back: with logits of variance 1, G tokens average as N =
    G / e would, and at s = 0.5 it adds about 0.03. It can be no louder, since most of what it adds is content of other
    examples, which is noise for this token. Its router decides nothing at 0.02: the weights are uniform then, and all
    tokens of a group get one update. At scale 1 its logits have variance 1.

    Where tokens or experts choose, an expert's whole output reaches its tokens, and the choice means nothing before it
    is learnt: experts start low, at 0.125, and the router at `initializer_range`, since small logits choose as well as
    large ones and are easier to change. Gated experts of token choice learn next to nothing while their router shuffles
    tokens, and a router at 1 settles sooner: it gained 0.02 nats at 1 million tokens and more before (width 64, one
    seed). Expert threshold and ReMoE weigh experts by the logits themselves and were not searched.

    A gated layer multiplies two projections and adds near s^3 / 2, which is less and grows faster: dense layers and
    experts that get mixtures start at 0.45, where 0.7 and 1 trained worse (width 64, one seed). Experts that are chosen
    start at (sqrt(2) s^2)^(1/3) = 0.28, where they add what plain ones do.

    Attention starts at 0.02 whatever the width, so what it adds grows with the width, and experts are heard less beside
    it. Where a dense layer or a shared expert stands somewhere, that matters little. Where every layer is a mixture,
    experts start with the standard deviation that they have at width 64, which is sqrt(D / 64) times the scale. Nothing
    was measured beyond width 128, so it is 1.5 times at most.

    Args:
        arm: of whose family the scales are.
        hidden_size: D.
        gated: whether a layer multiplies two projections.
    """
    routing = facts_of(arm.family).routing
    dense, mixing, chosen = _GATED if gated else _PLAIN
    widening = _widening(arm, hidden_size)
    return StartScales(
        dense_scale=dense,
        expert_scale=None if routing == "none" else widening * (mixing if routing == "mixing" else chosen),
        router_scale=1.0 if routing == "mixing" or (gated and arm.family == "token_choice") else None,
    )


def _widening(arm: ArmConfig, hidden_size: int) -> float:
    """By how much experts of a wide model start louder."""
    only_mixtures = arm.placement == "all" and arm.num_shared_experts == 0 and arm.route_by == "token"
    return min(_MOST_WIDENING, max(1.0, math.sqrt(hidden_size / _NARROW))) if only_mixtures else 1.0


def start_scales(arm: ArmConfig, model: ModelConfig) -> dict[str, float | None]:
    """The scales that a model of the arm is drawn with, by their field in the model's configuration.

    What the arm names counts; then `initializer_range`, where the recipe names it, is for every matrix; then the scales
    are derived.
    """
    derived = StartScales()
    if model.initializer_range is None:
        derived = derived_scales(arm, hidden_size=model.hidden_size, gated=model.gated)
    return {name: getattr(arm, name) or value for name, value in vars(derived).items()}


def names_scales(arm: ArmConfig) -> bool:
    """Whether an arm says itself how its weights are drawn."""
    return any(getattr(arm, key) != SETTINGS[key].default for key in SCALE_KEYS)


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
    if not os.path.isdir(place):  # unlike Path's, this is False for a name that no file system takes
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return settings if settings.get("model_type") == "mixtura" else {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{key}' is '{place}', whose config.json cannot be read ({error}): give a model folder."
        ) from error


def _family(settings: TomlTable, place: str, key: str) -> str:
    layers = settings.get("mlp_layer_types") or []
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise UserError(f"'{key}' is '{place}', whose mlp_layer_types in config.json are no list of families: fix it.")
    mixtures = sorted(set(layers) - {"dense"})
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
