"""How mixture-of-tokens layers run for a while: in groups as trained, or token by token as deployed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mixtura.layers import MixtureOfTokens


def mixing_layers(model: nn.Module) -> list[MixtureOfTokens]:
    """The mixture-of-tokens layers of any model, adapters' among them."""
    return [module for module in model.modules() if isinstance(module, MixtureOfTokens)]


def grouped_layers(model: nn.Module) -> list[MixtureOfTokens]:
    """Those of them that eval() runs in groups, where a token's output depends on other requests."""
    return [layer for layer in mixing_layers(model) if layer.inference_mode == "group"]


@contextmanager
def running_in(layers: list[MixtureOfTokens], mode: Any) -> Iterator[None]:
    """Lets eval() run layers in a mode for the length of a block, with as many mixtures a token as they have.

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
