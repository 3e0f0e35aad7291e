"""A decoding step of token choice as one kernel, from the router's logits to the sum of the experts' outputs.

Next to the products of a single token every call counts: this is a quarter less time for the layer at width 128.

Shapes: T tokens, one of each sequence, D hidden.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from mixtura import kernels
from mixtura.layers.routing import plain_activation

if TYPE_CHECKING:
    from mixtura.layers.token_choice import TokenChoiceMoE


def token_choice_step(layer: "TokenChoiceMoE", x_TD: Tensor) -> Tensor | None:
    """(T, D) -> (T, D), the layer's output but for rounding; None where a setting takes more than the plain way."""
    if layer.training or layer.gate is None or layer.choice_tap.watched or layer.expert_bias is not None:
        return None
    if layer.expert_groups > 1 or layer.capacity_factor is not None or layer.free_experts is not None:
        return None
    activation = plain_activation(layer.experts)
    if activation is None or not kernels.can_run_token_by_token(x_TD, layer.top_k, activation):
        return None
    settings = (layer.score_function == "softmax", layer.normalize_top_k, layer.routed_scaling_factor)
    return layer.experts(x_TD, kernels.token_choice_ffn, layer.gate(x_TD), layer.top_k, *settings)
