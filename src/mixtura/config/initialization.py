"""At which scale an arm draws its weights: what a recipe says, or what is derived for the family."""

from dataclasses import dataclass

from mixtura.config.arms import ArmConfig
from mixtura.config.families import facts_of
from mixtura.config.schema import ModelConfig

INITIALIZER_RANGE = 0.02
"""Standard deviation of every matrix that has no scale of its own."""
SCALE_KEYS = ("feed_forward_scale", "down_scale", "dense_scale", "expert_scale", "router_scale")
"""The settings of an arm that say how its weights are drawn."""


@dataclass(frozen=True, kw_only=True)
class StartScales:
    """Standard deviations at the start, as multiples of 1 / sqrt(fan-in); None is `initializer_range`."""

    dense_scale: float | None = None
    """Of dense feed-forward layers, wherever they stand, and of shared experts."""
    expert_scale: float | None = None
    router_scale: float | None = None


def derived_scales(family: str, *, gated: bool = False) -> StartScales:
    """The scales of a family where nobody names others.

    Embeddings start at 0.02, so the residual stream is quiet, and what a layer adds to it must not drown it. A plain
    ReLU layer at scale s adds root mean squares of s^2 / sqrt(2), whatever its width: 0.04 at 0.25. What a gated SiLU
    layer adds is near s^3 / 2, and the same amount takes 0.45.

    An expert adds less. Token choice weighs it by its share of a token's weights. A mixture of G tokens has a root mean
    square of 1 / sqrt(G) of a token's, and spreading E outputs at weights near 1 / G gives back sqrt(E) / G of theirs;
    but most of what it adds is other tokens' content, which is noise until the router has learnt, so that a larger
    scale makes nothing better: half of the dense layers' did as well as any in both families.

    The router of a mixture of tokens decides nothing at 0.02: its weights are uniform then, and all tokens of a group
    get one update. At scale 1 its logits have a root mean square of 1. Where tokens choose, even small logits decide,
    and large ones would fix the choice before it is learnt: it stays at `initializer_range`.

    Args:
        family: of the arm.
        gated: whether a layer multiplies two projections.
    """
    dense, expert = (0.45, 0.35) if gated else (0.25, 0.125)
    routing = facts_of(family).routing
    return StartScales(
        dense_scale=dense,
        expert_scale=None if routing == "none" else expert,
        router_scale=1.0 if routing == "mixing" else None,
    )


def start_scales(arm: ArmConfig, model: ModelConfig) -> dict[str, float | None]:
    """The scales that a model of the arm is drawn with, by their field in the model's configuration.

    What the arm names counts; then `initializer_range`, where the recipe names it, is for every matrix; then the scales
    are derived.
    """
    derived = StartScales() if model.initializer_range is not None else derived_scales(arm.family, gated=model.gated)
    return {name: getattr(arm, name) or value for name, value in vars(derived).items()}
