"""The decoder: attention, rotary embedding, norm and cache of Llama and its kin, and Mixtura's feed-forward layers.

Everything but the feed-forward layers is transformers' own, so generation with a cache, attention implementations,
gradient checkpointing and adapters work as they do for Llama.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mixtura.layers import (
    Experts,
    FeedForward,
    LayerMix,
    MixtureOfTokens,
    Population,
    RoutingStats,
    SoftMoE,
    TokenChoiceMoE,
)
from mixtura.layers.losses import load_balancing_loss
from mixtura.models.alone_schedule import shares_alone
from mixtura.models.attention import ATTENTION_CLASSES, build_attention, causal_masks
from mixtura.models.build import build_feed_forward
from mixtura.models.configuration_mixture import MixtureConfig


@dataclass
class MixtureModelOutput(BaseModelOutputWithPast):
    """The decoder's output; `routing` has a `RoutingStats` or None for every layer when it was asked for."""

    routing: tuple[RoutingStats | None, ...] | None = None


@dataclass
class MixtureCausalLMOutput(CausalLMOutputWithPast):
    """Language model output.

    `loss` is `language_loss`, plus the weighted router losses in training mode. `aux_loss` and `z_loss` are unweighted
    means over the layers that have them. `routing` is as in `MixtureModelOutput`.
    """

    language_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    routing: tuple[RoutingStats | None, ...] | None = None


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
    ) -> Tensor | tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D), with the routing statistics when asked for."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        named = {"expert_B": expert_ids} if self.routes_by_example else {}
        if not output_routing:
            return hidden_states + self.mlp(normed, token_mask, **named)
        update, stats = self.mlp(normed, token_mask, return_stats=True, **named)
        return hidden_states + update, stats


class MixturePreTrainedModel(PreTrainedModel):
    """What the decoder and its heads share."""

    config: MixtureConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixtureDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": MixtureDecoderLayer,
        "attentions": [OutputRecorder(attention, index=1) for attention in ATTENTION_CLASSES.values()],
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """The base class looks for the attention class in this file; ours is imported from Llama's."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """One rule for every weight matrix, routers and experts alike: normal with `initializer_range`."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Experts):
            for weight in module.weights:
                init.normal_(weight, mean=0.0, std=std)
        elif isinstance(module, SoftMoE):
            init.normal_(module.slots, mean=0.0, std=std)
            init.ones_(module.scale)
        elif isinstance(module, LayerMix):
            init.zeros_(module.logits)
            if module.scale is not None:
                init.ones_(module.scale)
        elif isinstance(module, TokenChoiceMoE) and module.expert_bias is not None:
            init.zeros_(module.expert_bias)
        elif isinstance(module, Population):
            module.reset()

    def mixture_layers(self) -> list[FeedForward]:
        """The feed-forward layers that are no dense layers, from the first to the last."""
        families = self.config.mlp_layer_types or []
        layers = [module.mlp for module in self.modules() if isinstance(module, MixtureDecoderLayer)]
        return [layer for layer, family in zip(layers, families, strict=True) if family != "dense"]

    def mixture_of_tokens_layers(self) -> list[MixtureOfTokens]:
        """Those of them that are mixtures of tokens."""
        return [layer for layer in self.mixture_layers() if isinstance(layer, MixtureOfTokens)]

    def set_inference_mode(self, mode: Literal["group", "alone", "population"], *, top_k: int | None = None) -> None:
        """Sets how mixture-of-tokens layers run in eval(), here and in the configuration that is saved."""
        for layer in self.mixture_of_tokens_layers():
            layer.set_inference_mode(mode, top_k=top_k)
        self.config.inference_mode, self.config.alone_top_k = mode, top_k

    def set_zero_fill(self, share: float) -> None:
        """Sets the share of the groups that training leaves otherwise empty; the configuration keeps its own."""
        for layer in self.mixture_of_tokens_layers():
            layer.set_zero_fill(share)

    def prepare_step(self, step: int, *, steps: int) -> None:
        """Sets what depends on how far training is: which layers leave which share of their groups empty.

        Until it is first called, and where a trainer never does, every layer has the share `zero_fill` at every step.

        Args:
            step: optimizer steps taken.
            steps: of the whole run.
        """
        layers = self.mixture_of_tokens_layers()
        shares = shares_alone(self.config, step, steps=steps, layers=len(layers))
        for layer, share in zip(layers, shares, strict=True):
            layer.set_zero_fill(share)


class MixtureModel(MixturePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MixtureConfig) -> None:
        """Builds the layers and initialises them."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MixtureDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.layer_mix = LayerMix(config.num_hidden_layers + 1) if config.layer_mix else None
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        expert_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MixtureModelOutput:
        """Token ids (B, L) or embeddings (B, L, D) -> hidden states (B, L, D).

        `expert_ids` (B,) name the experts of a model whose configuration has a `route_by` other than "token".

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given, or `expert_ids` are missing or not
                wanted.
        """
        if (expert_ids is None) != (self.config.route_by == "token"):
            raise ValueError(
                f"This model routes by {self.config.route_by}: give expert_ids, one for each example, if and only if "
                "that is not by token."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = inputs_embeds.size(1)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)
        masks = causal_masks(
            self.config,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        shared = {
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "token_mask": _token_mask(attention_mask, length),
            "output_routing": output_routing,
            "expert_ids": expert_ids,
            **kwargs,
        }
        hidden_states, routing = self._run_layers(inputs_embeds, masks, shared)
        return MixtureModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, routing=routing
        )

    def _run_layers(
        self, hidden_states: Tensor, masks: dict[str, Any], shared: dict[str, Any]
    ) -> tuple[Tensor, tuple[RoutingStats | None, ...] | None]:
        routing: list[RoutingStats | None] = []
        states = [hidden_states]
        for layer, kind in zip(self.layers, self.config.attention_kinds(), strict=True):
            if shared["output_routing"]:
                hidden_states, stats = layer(hidden_states, attention_mask=masks[kind], **shared)
                routing.append(stats)
            else:
                hidden_states = layer(hidden_states, attention_mask=masks[kind], **shared)
            states.append(hidden_states)
        if self.layer_mix is not None:
            hidden_states = self.layer_mix(states)
        return hidden_states, tuple(routing) if shared["output_routing"] else None


def _token_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(B, L) of the tokens in this call, from a mask that may also cover those in the cache; None when all are real."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:]


class MixtureForCausalLM(MixturePreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MixtureConfig) -> None:
        """Builds the decoder and the head."""
        super().__init__(config)
        self.model = MixtureModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routing: bool = False,
        expert_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MixtureCausalLMOutput:
        """Token ids (B, L) -> logits (B, L, V), and the losses when `labels` (B, L) are given.

        Args:
            input_ids: token ids.
            attention_mask: (B, L), 1 where a token is real.
            position_ids: positions, if not 0, 1, 2, ...
            past_key_values: the cache.
            inputs_embeds: embeddings in place of `input_ids`.
            labels: token ids to predict, not shifted; -100 is ignored.
            use_cache: return a cache.
            logits_to_keep: how many last positions get logits; 0 is all.
            output_routing: return the routing statistics of every layer.
            expert_ids: (B,) experts of the examples, for a model that routes by language or pair (`route_by`).
            **kwargs: passed to attention and to the loss (`num_items_in_batch`).
        """
        want_router_losses = labels is not None and self.training
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing or want_router_losses,
            expert_ids=expert_ids,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states if isinstance(keep, int) else hidden_states[:, keep])
        loss: Tensor | None = None
        language_loss: Any = None
        aux_loss = z_loss = None
        if outputs.routing is not None:
            aux_loss, z_loss = self.router_losses(outputs.routing)
        if labels is not None:
            language_loss = loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if want_router_losses and aux_loss is not None and z_loss is not None:
            loss = language_loss + self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        return MixtureCausalLMOutput(
            loss=loss,
            language_loss=language_loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing=outputs.routing if output_routing else None,
        )

    def router_losses(self, routing: tuple[RoutingStats | None, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Load-balancing and z-loss, means over the token-choice layers; None where there is no such layer.

        The other families balance their load by construction, and where languages name the experts the data decides.
        """
        if self.config.route_by != "token":
            return None, None
        families = self.config.mlp_layer_types or []
        stats = [s for s, family in zip(routing, families, strict=True) if s is not None and family == "token_choice"]
        if not stats:
            return None, None
        aux_losses = [load_balancing_loss(s.tokens_per_expert_E, s.importance_E) for s in stats]
        return torch.stack(aux_losses).mean(), torch.stack([s.router_z_loss for s in stats]).mean()


class MixtureForSequenceClassification(GenericForSequenceClassification, MixturePreTrainedModel):
    """The decoder with a classification head on the last real token."""
