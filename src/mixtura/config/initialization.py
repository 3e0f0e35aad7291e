"""At which scale an arm draws its weights: what a recipe says, or what is derived for the family."""

import math
from dataclasses import dataclass

from mixtura.config.arms import SETTINGS, ArmConfig
from mixtura.config.families import facts_of
from mixtura.config.schema import ModelConfig

INITIALIZER_RANGE = 0.02
"""Standard deviation of every matrix that has no scale of its own."""
SCALE_KEYS = ("feed_forward_scale", "down_scale", "dense_scale", "expert_scale", "router_scale")
"""The settings of an arm that say how its weights are drawn."""
_DENSE, _EXPERT, _ONLY_EXPERTS = 0.25, 0.125, 0.5
"""Scales with ReLU: of dense layers, of experts, and of experts that mix tokens in every layer."""


@dataclass(frozen=True, kw_only=True)
class StartScales:
    """Standard deviations at the start, as multiples of 1 / sqrt(fan-in); None is `initializer_range`."""

    dense_scale: float | None = None
    """Of dense feed-forward layers, wherever they stand, and of shared experts."""
    expert_scale: float | None = None
    router_scale: float | None = None


def derived_scales(arm: ArmConfig, *, gated: bool) -> StartScales:
    """The scales of an arm that names none.

    Embeddings start at 0.02, so the residual stream is quiet, and what a layer adds to it must not drown it. A plain
    layer at scale s adds a root mean square of s^2 / sqrt(2), whatever its width: 0.04 for s = 0.25, which trained best
    from width 32 on.

    Experts start at half of that. What one adds is content of a few tokens, or of other examples' tokens, and noise
    until the router has learnt. Where tokens are mixed in every layer nothing else carries the model, and experts must
    be heard early: there they start at twice the dense scale.

    The router of a mixture of tokens decides nothing at 0.02: its weights are uniform, and all tokens of a group get
    one update. At scale 1 its logits have a root mean square of 1. Where tokens choose, small logits decide as well as
    large ones, and large ones would fix the choice before anything is learnt: it stays at `initializer_range`.

    A gated layer multiplies two projections and adds near s^3 / 2, or s^3 / (2 N) on the mean of N tokens where a plain
    one adds s^2 / sqrt(2 N). So the same is added at the scale (sqrt(2 N) s^2)^(1/3). Logits of variance 1 leave a
    mixture of G tokens the variance of a mean of N = G / e.

    Args:
        arm: of whose family, placement and group the scales are.
        gated: whether a layer multiplies two projections.
    """
    mixes = facts_of(arm.family).routing == "mixing"
    expert = _ONLY_EXPERTS if mixes and arm.placement == "all" else _EXPERT
    tokens = arm.group_size / math.e if arm.family == "mixture_of_tokens" else 1.0
    dense = arm.family == "dense"
    return StartScales(
        dense_scale=_as_gated(_DENSE) if gated else _DENSE,
        expert_scale=None if dense else _as_gated(expert, tokens) if gated else expert,
        router_scale=1.0 if mixes else None,
    )


def _as_gated(scale: float, tokens: float = 1.0) -> float:
    """The scale at which a gated layer adds as much as a plain one at `scale`, on the mean of some tokens."""
    return round((math.sqrt(2 * tokens) * scale**2) ** (1 / 3), 2)


def start_scales(arm: ArmConfig, model: ModelConfig) -> dict[str, float | None]:
    """The scales that a model of the arm is drawn with, by their field in the model's configuration.

    What the arm names counts; then `initializer_range`, where the recipe names it, is for every matrix; then the scales
    are derived.
    """
    derived = StartScales() if model.initializer_range is not None else derived_scales(arm, gated=model.gated)
    return {name: getattr(arm, name) or value for name, value in vars(derived).items()}


def names_scales(arm: ArmConfig) -> bool:
    """Whether an arm says itself how its weights are drawn."""
    return any(getattr(arm, key) != SETTINGS[key].default for key in SCALE_KEYS)
