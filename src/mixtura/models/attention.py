"""Whose attention the decoder runs: transformers' own classes by name, and the causal masks that they look through."""

from typing import Any

from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mixtura.models.configuration_mixture import MixtureConfig

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
    """What the attention of every layer is told besides its inputs.

    Implementations without a mask (Flash Attention) need the window itself. Other classes pass theirs on; Llama's has
    none of its own.
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
