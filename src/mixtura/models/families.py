"""Which layer a configuration asks for at a given depth."""

import pkgutil
from typing import Any

from mixtura.config.arms import model_settings
from mixtura.config.families import facts_of
from mixtura.layers import FeedForward
from mixtura.models.configuration_mixture import MixtureConfig


def build_feed_forward(config: MixtureConfig, layer_idx: int) -> FeedForward:
    """The feed-forward layer of decoder layer `layer_idx`, given the settings that the table has for its family."""
    family = (config.mlp_layer_types or [])[layer_idx]
    layer_class = pkgutil.resolve_name(facts_of(family).layer)
    return layer_class(config.hidden_size, **_arguments(config, family, layer_idx))


def _arguments(config: MixtureConfig, family: str, layer_idx: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"activation": config.hidden_act, "gated": config.gated}
    if family == "dense":
        widths = config.intermediate_sizes
        arguments["intermediate_size"] = config.intermediate_size if widths is None else widths[layer_idx]
    for setting, field in model_settings(family):
        argument = setting.argument(family)
        if argument is not None:
            arguments[argument] = setting.to_layer(getattr(config, field))
    return arguments | {name: getattr(config, name) for name in facts_of(family).model_settings}
