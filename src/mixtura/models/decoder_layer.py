"""One layer of the decoder, and how its routing statistics pass through gradient checkpointing."""

from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mixtura.layers import RoutingStats
from mixtura.models.attention import build_attention
from mixtura.models.build import build_feed_forward
from mixtura.models.configuration_mixture import MixtureConfig

_WITH_GRADIENT = ("importance_E", "router_z_loss")


class MixtureDecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward layer of the family that the configuration names for this depth."""

    def __init__(self, config: MixtureConfig, layer_idx: int) -> None:
        """`layer_idx` is the depth, from 0."""
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        self.mlp = build_feed_forward(config, layer_idx)
        # Kept here, since an adapter may stand around the layer later.
        self.routes_by_example = self.mlp.routes_by_example
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        output_routing: bool = False,
        expert_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """(B, L, D) -> (B, L, D), followed by the fields of the `RoutingStats` when asked for and if there are any.

        They are not nested: re-entrant checkpointing finds the gradients of a layer's direct outputs only.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        named = {"expert_B": expert_ids} if self.routes_by_example else {}
        if not output_routing:
            return hidden_states + self.mlp(normed, token_mask, **named)
        update, stats = self.mlp(normed, token_mask, return_stats=True, **named)
        return hidden_states + update, *(stats or ())


def joined_stats(fields: list[Tensor]) -> RoutingStats | None:
    """The statistics of a layer; re-entrant checkpointing would claim that all of them carry a gradient."""
    if not fields:
        return None
    stats = RoutingStats(*fields)
    bare = {name: value.detach() for name, value in stats._asdict().items() if name not in _WITH_GRADIENT}
    return stats._replace(**bare)
