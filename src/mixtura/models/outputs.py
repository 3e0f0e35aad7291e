"""What the decoder and its heads return.

Fields that transformers' classes for mixtures have stand first and in their order, so that code written for Mixtral
finds them at the same place; Mixtura's own come last.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from mixtura.layers import RoutingStats


@dataclass
class MixtureModelOutput(BaseModelOutputWithPast):
    """The decoder's output.

    `router_logits` are those of every layer of token choice, (T, E) each, where `output_router_logits` asks for them.
    `routing` has a `RoutingStats` or None for every layer when it was asked for.
    """

    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingStats | None, ...] | None = None


@dataclass
class MixtureCausalLMOutput(MoeCausalLMOutputWithPast):
    """Language model output.

    `loss` is `language_loss`, plus the weighted router losses in training mode. `aux_loss` and `z_loss` are unweighted
    means over the layers that have them. `routing` is as in `MixtureModelOutput`.
    """

    z_loss: Tensor | None = None
    language_loss: Tensor | None = None
    routing: tuple[RoutingStats | None, ...] | None = None


@dataclass
class MixtureClassifierOutput(SequenceClassifierOutputWithPast):
    """Classifier output: `loss` has the weighted router losses in training mode; the rest as for language models."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingStats | None, ...] | None = None
