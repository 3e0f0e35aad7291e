"""Which mixture-of-tokens layers run without groups at which training step.

A layer that runs both ways in one step makes two sets of gradients of all its experts, which costs more time than the
rows themselves. So a share of the training in the deployed mode can also be had as whole layers, or whole steps. Which
ones follows from the step alone: a resumed run, every micro-batch of a step and every rank agree without a state.
"""

import random
from collections import Counter

from mixtura.models.configuration_mixture import MixtureConfig


def shares_alone(config: MixtureConfig, step: int, *, steps: int, layers: int) -> list[float]:
    """The share of its groups that each mixture-of-tokens layer leaves otherwise empty at a step.

    In the last `alone_fraction` of the steps it is 1. Before, `zero_fill_unit` says what `zero_fill` is a share of:
    "group" gives every layer that share at every step. "layer" draws whether a layer leaves all its groups empty, apart
    for every layer and step. "step" spreads steps in which all layers do so evenly, every 1 / `zero_fill` steps, so
    that any stretch of training has its part: a draw would leave that to chance, and there is but one for all layers.

    Args:
        config: says the three.
        step: optimizer steps taken before this one.
        steps: of the whole run.
        layers: how many layers there are.

    Returns:
        A number from 0 to 1 for every layer, 0 or 1 for the units "layer" and "step".
    """
    share = float(config.zero_fill)
    if step >= steps - round(config.alone_fraction * steps):
        return [1.0] * layers
    if config.zero_fill_unit == "group":
        return [share] * layers
    if config.zero_fill_unit == "layer":
        return [float(random.Random(f"{step}, {layer}").random() < share) for layer in range(layers)]
    return [float(int((step + 1) * share) > int(step * share))] * layers


def step_kinds(config: MixtureConfig, *, steps: int) -> list[tuple[float, float]]:
    """What steps a run is made of: how often a layer leaves which share of its groups empty, as (part, share).

    Steps after a change to token choice count as steps alone, which have as many expert rows. Layers take their turns
    apart with the unit "layer", but their times add up, so the parts of one layer are enough for the mean.
    """
    shares = [shares_alone(config, step, steps=steps, layers=1)[0] for step in range(steps)]
    changed = round(config.transition_fraction * steps)
    counts = Counter(shares[: steps - changed] + [1.0] * changed)
    return [(count / steps, share) for share, count in sorted(counts.items())]
