"""A pretrained model with a few of its layers, in which a leak of any of them shows: the first ones, and one of every
further kind.

Mixtures often stand in some layers only: in the later half, in every fourth, in all but the first three.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtura.checkpoints.pretrained import cut, language_model_class, load_base, load_base_config, of_layers

FIRST_LAYERS = 2
"""Kept whatever they are, so that one layer's leak can reach another."""


def load_few_layers(name: str, *, num_layers: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_base`, in float32, with few layers.

    Args:
        name: see `mixtura.checkpoints.pretrained.resolve_base`.
        num_layers: choose among so many of its first layers; None among all.

    Raises:
        UserError: it cannot be loaded, or has fewer layers.
    """
    config = load_base_config(name)
    cut(config, name, num_layers)
    with torch.device("meta"):
        empty = language_model_class(config).from_config(config)
    kept = [_one_of_each_kind(stack, config) for stack in _stacks(empty)]
    if all(layers[-1] < FIRST_LAYERS for layers in kept):
        fewest = min(FIRST_LAYERS, config.num_hidden_layers)
        return load_base(name, num_layers=fewest)
    model, tokenizer = load_base(name, num_layers=num_layers)
    for stack, layers in zip(_stacks(model), kept, strict=True):
        _keep(stack, layers)
    own: Any = model.config
    for key, value in of_layers(own).items():
        setattr(own, key, [value[layer] for layer in kept[0]])
    own.num_hidden_layers = len(kept[0])
    return model, tokenizer


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers: one, or those of encoder and decoder."""
    config: Any = model.config
    lengths = {getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers", "num_decoder_layers")}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) in lengths and not inside:
            found[name] = module
    return list(found.values())


def _one_of_each_kind(stack: nn.ModuleList, config: Any) -> list[int]:
    """The first layers and the first of every other kind, in order."""
    named = [value for value in of_layers(config).values() if len(value) == len(stack)]
    kinds: dict[str, int] = {}
    for place, layer in enumerate(stack):
        parts = [(name, type(part).__name__, part.extra_repr()) for name, part in layer.named_modules()]
        shapes = [(name, tuple(weight.shape)) for name, weight in layer.named_parameters()]
        kinds.setdefault(repr((parts, shapes, [value[place] for value in named])), place)
    return sorted({*range(min(FIRST_LAYERS, len(stack))), *kinds.values()})


def _keep(stack: nn.ModuleList, layers: list[int]) -> None:
    chosen = [stack[layer] for layer in layers]
    del stack[len(chosen) :]
    for place, layer in enumerate(chosen):
        stack[place] = layer
        numbered: list[Any] = [part for part in layer.modules() if hasattr(part, "layer_idx")]
        for part in numbered:
            part.layer_idx = place  # where a cache keeps its keys
