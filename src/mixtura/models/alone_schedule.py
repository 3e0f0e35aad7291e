"""Which mixture-of-tokens layers run without groups at which training step.

A layer that runs both ways in one step makes two sets of gradients of all its experts, which costs more time than the
rows themselves. So a share of the training in the deployed mode can also be had as whole layers, or whole steps. Which
ones follows from the step alone: a resumed run, every micro-batch of a step and every rank agree without a state.
"""

import random
from typing import Any, Literal

from mixtura.config import ArmConfig

ZeroFillUnit = Literal["group", "layer", "step"]


def shares_alone(
    step: int, *, steps: int, layers: int, share: float, unit: ZeroFillUnit, last_fraction: float = 0.0
) -> list[float]:
    """The share of its groups that each layer leaves otherwise empty at a step.

    Args:
        step: optimizer steps taken before this one.
        steps: of the whole run.
        layers: how many layers there are.
        share: what is wanted over many steps.
        unit: "group" gives every layer the share at every step. "layer" draws whether a layer leaves all its groups
            empty, apart for every layer and step. "step" spreads steps in which all layers do so evenly, every
            1 / share steps, so that any stretch of training has its part: a draw would leave that to chance, and there
            is but one for the whole model.
        last_fraction: share of the steps, the last ones, in which all layers leave all groups empty.

    Returns:
        A number from 0 to 1 for every layer, 0 or 1 for the units "layer" and "step".
    """
    if step >= steps - round(last_fraction * steps):
        return [1.0] * layers
    if unit == "group":
        return [share] * layers
    if unit == "layer":
        return [float(random.Random(f"{step}, {layer}").random() < share) for layer in range(layers)]
    return [float(int((step + 1) * share) > int(step * share))] * layers


def alone_settings(arm: ArmConfig) -> dict[str, Any]:
    """What an arm says of training without groups; nothing where it says nothing."""
    if arm.family != "mixture_of_tokens":
        return {}
    keys = ["zero_fill", "zero_fill_unit"] if arm.zero_fill else []
    keys += ["alone_fraction", "transition_to", "transition_fraction", "population_rate"]
    return {key: getattr(arm, key) for key in keys if getattr(arm, key)}
