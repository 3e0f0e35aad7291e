"""The modes of mixture-of-tokens layers: in groups as trained, or token by token as deployed.

`running_in` sets a mode for the length of a block. `shares_alone` says how much of each training step runs without
groups ("alone"), so that a model learns to work as it is deployed.

A layer that runs both ways in one step computes two sets of gradients for all its experts, and that takes longer than
the additional rows do. A share of the training can therefore also be given as whole layers, or as whole steps. Which
layers or steps they are follows from the number of the step alone, so a resumed run, every micro-batch of a step and
every rank agree without exchanging anything.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.layers import MixtureOfTokens
from mixtura.models.configuration_mixture import MixtureConfig


def real_tokens(attention_mask: Any, *, seen: Any = 0) -> Tensor | None:
    """The tokens that are no padding, (B, L), by a model's `attention_mask`; None where it does not say.

    Args:
        attention_mask: (B, L), true where a token is real, which may cover those in a cache too; or (B, 1, L, keys),
            what the L tokens of this call may attend to, as packed examples and caches of fixed size need it: a token
            that may not attend to itself is padding. Numbers are added to scores. A dictionary has one for each kind
            of layer.
        seen: tokens in the cache before those of this call.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() != 4:
        return attention_mask if attention_mask.dim() == 2 else None
    length, keys = attention_mask.shape[2:]
    # A window keeps fewer keys than were seen, this call's last.
    first = torch.as_tensor(seen, device=attention_mask.device).clamp(max=keys - length)
    own_L1 = (first + torch.arange(length, device=attention_mask.device)).unsqueeze(-1)
    own_BL = attention_mask[:, 0].gather(-1, own_L1.expand(attention_mask.size(0), -1, -1)).squeeze(-1)
    return own_BL if own_BL.dtype == torch.bool else own_BL == 0


def mixing_layers(model: nn.Module) -> list[MixtureOfTokens]:
    """The mixture-of-tokens layers of any model, also those inside adapters."""
    return [module for module in model.modules() if isinstance(module, MixtureOfTokens)]


def grouped_layers(model: nn.Module) -> list[MixtureOfTokens]:
    """The mixture-of-tokens layers that eval() runs in groups, so that a token's output depends on other requests."""
    return [layer for layer in mixing_layers(model) if layer.inference_mode == "group"]


@contextmanager
def running_in(layers: list[MixtureOfTokens], mode: Any) -> Iterator[None]:
    """Sets the mode in which eval() runs the layers, for the length of a block; the mixtures of a token stay as many.

    Args:
        layers: some layers of a model, whose configuration is left alone.
        mode: one of `mixtura.config.InferenceMode`.
    """
    before: list[Any] = [layer.inference_mode for layer in layers]
    try:
        for layer in layers:
            layer.set_inference_mode(mode, top_k=layer.alone_top_k)
        yield
    finally:
        for layer, mode_before in zip(layers, before, strict=True):
            layer.set_inference_mode(mode_before, top_k=layer.alone_top_k)


def prepare_mixing(layers: Sequence[MixtureOfTokens], config: MixtureConfig, step: int, *, steps: int) -> None:
    """Gives layers what the progress of training decides: the share of groups they fill with zeros, and how sharp
    their routers are.

    Args:
        layers: all mixture-of-tokens layers of a model.
        config: the model's.
        step: optimizer steps taken.
        steps: of the whole run.
    """
    shares = shares_alone(config, step, steps=steps, layers=len(layers))
    for layer, share in zip(layers, shares, strict=True):
        layer.set_zero_fill(share)
        layer.temperature = temperature_at(config, step, steps=steps)


def temperature_at(config: MixtureConfig, step: int, *, steps: int) -> float:
    """The temperature of mixture-of-tokens layers: from `first_temperature` to `router_temperature` in equal ratios."""
    if config.first_temperature is None:
        return config.router_temperature
    last = config.router_temperature
    return last * (config.first_temperature / last) ** max(0.0, 1 - step / steps)


def shares_alone(config: MixtureConfig, step: int, *, steps: int, layers: int) -> list[float]:
    """The share of its groups that each mixture-of-tokens layer fills with zeros at a step.

    A token whose group is otherwise zeros gets the output that it gets alone when deployed. In the last
    `alone_fraction` of the steps the share is 1. Before, `zero_fill_unit` says what `zero_fill` is a share of:

    - "group": of the groups of every layer, at every step.
    - "layer": of the layers. For each layer and step it is drawn anew whether all groups of the layer are filled so.
    - "step": of the steps. Those in which all layers do so come evenly, every 1 / `zero_fill` steps. They are not
      drawn, because one draw decides for all layers and some stretches of training would have too few of them.

    Args:
        config: has `alone_fraction`, `zero_fill_unit` and `zero_fill`.
        step: optimizer steps taken before this one.
        steps: of the whole run.
        layers: how many layers there are.

    Returns:
        A number from 0 to 1 for every layer, 0 or 1 for the units "layer" and "step".
    """
    share = float(config.zero_fill)
    last = round(config.alone_fraction * steps)
    if last and step >= steps - last:  # a trainer that goes on beyond `steps` asked for no such steps if there are none
        return [1.0] * layers
    if config.zero_fill_unit == "group":
        return [share] * layers
    if config.zero_fill_unit == "layer":
        return [float(random.Random(f"{step}, {layer}").random() < share) for layer in range(layers)]
    return [float(int((step + 1) * share) > int(step * share))] * layers


def step_kinds(config: MixtureConfig, *, steps: int) -> list[tuple[float, float]]:
    """How often a layer has which share, as (part of the steps, share): what planning needs to time a run.

    Steps after a change to token choice count as steps with share 1, since those have as many expert rows. With the
    unit "layer" each layer has its own draws. The times of layers add up, so the mean follows from the parts of one.
    """
    shares = [shares_alone(config, step, steps=steps, layers=1)[0] for step in range(steps)]
    changed = round(config.transition_fraction * steps)
    counts = Counter(shares[: steps - changed] + [1.0] * changed)
    return [(count / steps, share) for share, count in sorted(counts.items())]
