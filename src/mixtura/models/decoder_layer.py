"""One layer of the decoder: attention and feed-forward layer, and how routing statistics pass gradient checkpointing.

The attention is transformers' own class, chosen by name, with transformers' own causal masks.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mixtura.config import UserError
from mixtura.layers import MergedExperts, RoutingStats
from mixtura.layers.merged_experts import Memory
from mixtura.models.build import build_feed_forward
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.models.packed_rows import Documents

ATTENTION_CLASSES: dict[str, Any] = {
    "llama": LlamaAttention,
    "mistral": MistralAttention,
    "qwen2": Qwen2Attention,
    "qwen3": Qwen3Attention,
}
_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def build_attention(config: MixtureConfig, layer_idx: int) -> nn.Module:
    """The attention of decoder layer `layer_idx`."""
    return ATTENTION_CLASSES[config.attention](config=config, layer_idx=layer_idx)


def attention_arguments(config: MixtureConfig) -> dict[str, Any]:
    """Arguments of every layer's attention besides its inputs: the sliding window, for Llama's class.

    Implementations without a mask (Flash Attention) need the size of the window. The other classes read it from the
    configuration; Llama's class does not know windows and has to be given it.
    """
    windowed = config.attention == "llama" and config.sliding_window is not None
    return {"sliding_window": config.sliding_window} if windowed else {}


def causal_masks(config: MixtureConfig, attention_mask: Any, **inputs: Any) -> dict[str, Any]:
    """The mask of each kind of layer that the model has.

    Args:
        config: the model's.
        attention_mask: (B, L) of the real tokens or None; a dictionary, as generate() makes for caches of fixed size,
            has the masks already.
        inputs: what else transformers' mask functions take.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    kinds = sorted(set(config.attention_kinds()))
    return {kind: _MASKS[kind](config=config, attention_mask=attention_mask, **inputs) for kind in kinds}


_WITH_GRADIENT = ("importance_E", "router_z_loss", "sequence_loss")


class _Remembering:
    """What a layer of any cache is given besides: the memory of merged experts, which goes where its keys go."""

    memory: Memory | None = None

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.memory is not None:
            self.memory = Memory(*map(change, self.memory))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._change(lambda each: each.index_select(0, beam_idx.to(each.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        self._change(lambda each: each.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._change(lambda each: each[indices])

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        self.memory = None

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("Merged experts cannot take tokens back, as assisted decoding asks: generate without it.")


@functools.cache
def _remembering(kind: type) -> type:
    return type(f"Remembering{kind.__name__}", (_Remembering, kind), {})


def make_room_for_memory(cache: Any, config: MixtureConfig) -> None:
    """Lets the cache hold the memory of merged experts, at the depths that have them."""
    families = config.mlp_layer_types or []
    if cache is None or "merged_experts" not in families:
        return
    while len(cache.layers) < len(families):  # a cache made without a configuration grows as it is filled
        cache.layers.append(cache.layer_class_to_replicate())
    for depth, (layer, family) in enumerate(zip(cache.layers, families, strict=True)):
        if family == "merged_experts" and not isinstance(layer, _Remembering):
            kind: Any = _remembering(type(layer))
            cache.layers[depth] = kind.__new__(kind)
            vars(cache.layers[depth]).update(vars(layer))


class MixtureDecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward layer of the family that the configuration names for this depth."""

    def __init__(self, config: MixtureConfig, layer_idx: int) -> None:
        """`layer_idx` is the depth, from 0."""
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        self.mlp = build_feed_forward(config, layer_idx)
        # Read now: an adapter that later wraps the layer does not have this attribute.
        self.routes_by_example = self.mlp.routes_by_example
        self.remembers, self.depth = isinstance(self.mlp, MergedExperts), layer_idx
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        output_routing: bool = False,
        expert_ids: Tensor | None = None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """(B, L, D) -> (B, L, D), followed by the fields of the `RoutingStats` when asked for and if there are any.

        The fields are returned side by side and not as one tuple, because re-entrant checkpointing finds gradients only
        in the direct outputs of a layer. `documents` are those of rows in which several are packed.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        apart = documents if self.remembers else None
        if apart is not None:
            normed, token_mask = apart.as_rows(normed), apart.mask_NM
        cache = None if self.training else kwargs.get("past_key_values")
        update, stats = self._feed_forward(normed, token_mask, output_routing, expert_ids, apart, cache)
        hidden_states = hidden_states + (update if apart is None else apart.together(update))
        return (hidden_states, *(stats or ())) if output_routing else hidden_states

    def _feed_forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        want_stats: bool,
        expert_B: Tensor | None,
        documents: Documents | None,
        cache: Any,
    ) -> tuple[Tensor, RoutingStats | None]:
        """The feed-forward layer and its statistics; one that remembers leaves its memory in the cache."""
        if self.remembers and cache is not None:
            room = cache.layers[self.depth]
            y_BLD, stats, memory = self.mlp.go_on(x_BLD, mask_BL, want_stats, room.memory)  # pyright: ignore
            room.memory = memory if documents is None else Memory(*(each[documents.last_B] for each in memory))
            return y_BLD, stats
        named = {"expert_B": expert_B} if self.routes_by_example else {}
        if want_stats:
            return self.mlp(x_BLD, mask_BL, return_stats=True, **named)
        return self.mlp(x_BLD, mask_BL, **named), None


def joined_stats(fields: list[Tensor]) -> RoutingStats | None:
    """The statistics of a layer, of which only those keep a gradient that have one.

    After re-entrant checkpointing all outputs seem to require a gradient, counts of tokens among them.
    """
    if not fields:
        return None
    stats = RoutingStats(*fields)
    bare = {name: value.detach() for name, value in stats._asdict().items() if name not in _WITH_GRADIENT}
    return stats._replace(**bare)
