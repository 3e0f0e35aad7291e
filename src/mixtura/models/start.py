"""How wide the weights of feed-forward layers and routers are drawn, from the scales of a model's configuration."""

from torch import Tensor, nn
from transformers import initialization as init

from mixtura.layers import Experts
from mixtura.layers.feed_forward import Projection
from mixtura.layers.routing import Router
from mixtura.models.configuration_mixture import MixtureConfig


def draw_at_scale(config: MixtureConfig, module: nn.Module) -> bool:
    """Draws the weights of a feed-forward projection, of experts or of a router; whether the module is one of these."""
    if not isinstance(module, Projection | Router | Experts):
        return False
    for weight, std in _deviations(config, module):
        init.normal_(weight, mean=0.0, std=std)
    return True


def _deviations(config: MixtureConfig, module: Projection | Router | Experts) -> list[tuple[Tensor, float]]:
    """The weights of a module of the feed-forward layers, each with the standard deviation it is drawn at."""
    if isinstance(module, Router):
        return [(module.weight, config.start_deviation(module.in_features, of="router_scale"))]
    if isinstance(module, Projection):
        std = config.start_deviation(module.in_features, of="dense_scale", down=module.down)
        return [(module.weight, std)]
    up, down = module.weights
    return [
        (up, config.start_deviation(module.hidden_size, of="expert_scale")),
        (down, config.start_deviation(module.intermediate_size, of="expert_scale", down=True)),
    ]
