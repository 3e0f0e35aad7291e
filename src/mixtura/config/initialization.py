"""At which scale an arm draws its weights: what a recipe says, or what is derived for the family."""

from dataclasses import dataclass

from mixtura.config.arm import SETTINGS, ArmConfig
from mixtura.config.families import facts_of
from mixtura.config.schema import ModelConfig

INITIALIZER_RANGE = 0.02
"""Standard deviation of every matrix that has no scale of its own."""
SCALE_KEYS = ("feed_forward_scale", "down_scale", "dense_scale", "expert_scale", "router_scale")
"""The settings of an arm that say how its weights are drawn."""
_PLAIN, _GATED = (0.5, 0.5, 0.125), (0.45, 0.45, 0.28)
"""Scales of dense layers, of experts that get mixtures of tokens, and of experts that get tokens that were chosen."""


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

    Args:
        arm: of whose family the scales are.
        gated: whether a layer multiplies two projections.
    """
    routing = facts_of(arm.family).routing
    dense, mixing, chosen = _GATED if gated else _PLAIN
    return StartScales(
        dense_scale=dense,
        expert_scale=None if routing == "none" else mixing if routing == "mixing" else chosen,
        router_scale=1.0 if routing == "mixing" or (gated and arm.family == "token_choice") else None,
    )


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
