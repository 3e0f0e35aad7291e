"""The decoder: attention, rotary embedding, norm and cache of Llama and its kin, and Mixtura's feed-forward layers.

Everything but the feed-forward layers is transformers' own, so generation with a cache, attention implementations,
gradient checkpointing and adapters work as they do for Llama.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mixtura.layers import ExpertThresholdMoE, MixtureOfTokens, ReMoE, SoftMoE, TokenChoiceMoE  # isort: skip
from mixtura.layers import FeedForward, LayerMix, Population, RoutingStats
from mixtura.layers.routing import Router
from mixtura.models.build import draw_at_scale
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.models.decoder_layer import (
    ATTENTION_CLASSES,
    MixtureDecoderLayer,
    attention_arguments,
    causal_masks,
    joined_stats,
    make_room_for_memory,
)
from mixtura.models.inference import prepare_mixing, real_tokens
from mixtura.models.losses import (
    MixtureCausalLMOutput,
    MixtureClassifierOutput,
    MixtureModelOutput,
    Routing,
    logits_and_loss,
    router_losses,
    share_of_step,
    warn_of_a_loss_outside,
    weighted_router_losses,
)
from mixtura.models.packed_rows import documents_of


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
        "router_logits": OutputRecorder(Router, layer_name="gate"),
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """The base class looks for the attention class in this file; ours is imported from Llama's."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every matrix is normal: feed-forward weights and routers by their scales, others by `initializer_range`."""
        if draw_at_scale(self.config, module):
            return
        super()._init_weights(module)
        if isinstance(module, SoftMoE):
            init.normal_(module.slots, mean=0.0, std=self.config.initializer_range)
            init.ones_(module.scale)
        elif isinstance(module, LayerMix):
            init.zeros_(module.logits)
            if module.scale is not None:
                init.ones_(module.scale)
        elif isinstance(module, TokenChoiceMoE) and module.expert_bias is not None:
            init.zeros_(module.expert_bias)
        elif isinstance(module, ExpertThresholdMoE):
            init.zeros_(module.threshold)
            init.zeros_(module.updates)
        elif isinstance(module, ReMoE):
            init.constant_(module.l1_coef, module.l1_coef_start)
        elif isinstance(module, Population):
            module.reset()

    def mixture_layers(self) -> list[FeedForward]:
        """The feed-forward layers that are not dense, from the first to the last."""
        families = self.config.mlp_layer_types or []
        layers = [module.mlp for module in self.modules() if isinstance(module, MixtureDecoderLayer)]
        return [layer for layer, family in zip(layers, families, strict=True) if family != "dense"]

    def mixture_of_tokens_layers(self) -> list[MixtureOfTokens]:
        """The feed-forward layers that are mixtures of tokens."""
        return [layer for layer in self.mixture_layers() if isinstance(layer, MixtureOfTokens)]

    def set_inference_mode(self, mode: Literal["group", "alone", "population"], *, top_k: int | None = None) -> None:
        """Sets how mixture-of-tokens layers run in eval(), here and in the configuration that is saved."""
        for layer in self.mixture_of_tokens_layers():
            layer.set_inference_mode(mode, top_k=top_k)
        self.config.inference_mode, self.config.alone_top_k = mode, top_k

    def set_zero_fill(self, share: float) -> None:
        """Sets the share of the groups that training fills with zeros; the value in the configuration stays."""
        for layer in self.mixture_of_tokens_layers():
            layer.set_zero_fill(share)

    def router_losses(self, routing: Routing | None) -> tuple[Tensor | None, Tensor | None]:
        """Unweighted load-balancing and z-loss, see `mixtura.models.losses`."""
        return router_losses(self.config, routing)

    def router_loss_weights(self) -> tuple[Tensor | float, Tensor | float]:
        """Their weights: those of the configuration, or ReMoE's of the moment, which is the same in all layers."""
        for layer in self.mixture_layers():
            if isinstance(layer, ReMoE):
                return layer.l1_coef, 0.0
        return self.config.router_aux_loss_coef, self.config.router_z_loss_coef

    def _wants_router_losses(self, labels: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether the loss needs them: in training with labels, or where router logits are asked for as in Mixtral."""
        if labels is None and self.training:
            warn_of_a_loss_outside(self.config, kwargs)
        asked = kwargs.get("output_router_logits")
        asked = getattr(self.config, "output_router_logits", False) if asked is None else asked
        return bool(asked) or (labels is not None and self.training)

    def prepare_step(self, step: int, *, steps: int) -> None:
        """Sets what depends on the progress of training: which share of its groups each layer fills with zeros, how
        sharp its router is, and whether layers with thresholds still choose over the batch.

        Trainers other than ours never call it. Every layer then has the share `zero_fill` at every step, and layers
        with thresholds use them from the first update on.

        Args:
            step: optimizer steps taken.
            steps: of the whole run.
        """
        prepare_mixing(self.mixture_of_tokens_layers(), self.config, step, steps=steps)
        for layer in self.mixture_layers():
            if isinstance(layer, ExpertThresholdMoE):
                layer.choosing_over_batch = step < round(self.config.threshold_warmup * steps)


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
                f"This model routes by {self.config.route_by}: give expert_ids, one for each example, unless it routes "
                "by token."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        make_room_for_memory(past_key_values, self.config)
        length = inputs_embeds.size(1)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        token_mask = _token_mask(attention_mask, length, seen=seen)
        documents = documents_of(self.config, inputs_embeds, position_ids, attention_mask, token_mask, seen=seen)
        if position_ids is None:
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
            "token_mask": token_mask,
            "output_routing": output_routing,
            "expert_ids": expert_ids,
            "documents": documents,
            **attention_arguments(self.config),
            **kwargs,
        }
        hidden_states, routing = self._run_layers(inputs_embeds, masks, shared)
        return MixtureModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, routing=routing
        )

    def _run_layers(
        self, hidden_states: Tensor, masks: dict[str, Any], shared: dict[str, Any]
    ) -> tuple[Tensor, Routing | None]:
        routing: list[RoutingStats | None] = []
        states = [hidden_states]
        for layer, kind in zip(self.layers, self.config.attention_kinds(), strict=True):
            if shared["output_routing"]:
                hidden_states, *stats = layer(hidden_states, attention_mask=masks[kind], **shared)
                routing.append(joined_stats(stats))
            else:
                hidden_states = layer(hidden_states, attention_mask=masks[kind], **shared)
            states.append(hidden_states)
        if self.layer_mix is not None:
            hidden_states = self.layer_mix(states)
        return hidden_states, tuple(routing) if shared["output_routing"] else None


def _token_mask(attention_mask: Any, length: int, *, seen: Any) -> Tensor | None:
    """(B, L) of the tokens in this call, from a mask that may also cover those in the cache; None when all are real."""
    real_BL = real_tokens(attention_mask, seen=seen)
    return None if real_BL is None else real_BL[:, -length:]


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
        skip_logits: bool = False,
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
            skip_logits: return no logits beside the loss, so that large ones are never held.
            output_routing: return the routing statistics of every layer.
            expert_ids: (B,) experts of the examples, for a model that routes by language or pair (`route_by`).
            **kwargs: passed to attention and to the loss (`num_items_in_batch`).
        """
        want_router_losses = self._wants_router_losses(labels, kwargs)
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
        hidden_states = hidden_states if isinstance(keep, int) else hidden_states[:, keep]
        logits, language_loss = logits_and_loss(self, hidden_states, labels, skip_logits=skip_logits, **kwargs)
        loss = language_loss
        losses = self.router_losses(outputs.routing)
        if labels is not None:
            shifted = kwargs.get("shift_labels")
            share = share_of_step(labels[..., 1:] if shifted is None else shifted, kwargs.get("num_items_in_batch"))
            added = weighted_router_losses(self.router_loss_weights(), losses, share=share) if self.training else None
            loss = language_loss if added is None else language_loss + added
        return MixtureCausalLMOutput(
            loss=loss,
            aux_loss=losses[0],
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            z_loss=losses[1],
            language_loss=language_loss,
            routing=outputs.routing if output_routing else None,
        )


class MixtureForSequenceClassification(GenericForSequenceClassification, MixturePreTrainedModel):
    """The decoder with a classification head on the last real token."""

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
        output_routing: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MixtureClassifierOutput:
        """Token ids (B, L) -> logits (B, C), and the losses when `labels` are given: (B,), or (B, C) for many labels.

        `num_items_in_batch` is the number of labels of the whole optimizer step, where a trainer sums losses up. The
        rest is as for `MixtureForCausalLM`.
        """
        want_router_losses = self._wants_router_losses(labels, {**kwargs, "num_items_in_batch": num_items_in_batch})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing or want_router_losses,
            **kwargs,
        )
        logits_BLC = self.score(outputs.last_hidden_state)
        last_B = self._last_real_token(input_ids, len(logits_BLC))
        logits_BC = logits_BLC[torch.arange(len(logits_BLC), device=logits_BLC.device), last_B]
        loss: Any = None
        losses = self.router_losses(outputs.routing)
        if labels is not None:
            loss = self.loss_function(logits=logits_BLC, labels=labels, pooled_logits=logits_BC, config=self.config)
            added = weighted_router_losses(self.router_loss_weights(), losses, share=None) if self.training else None
            loss = loss if added is None else loss + added
            share = share_of_step(labels, num_items_in_batch)
            loss = loss if share is None else loss * share
        return MixtureClassifierOutput(
            loss=loss,
            logits=logits_BC,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=losses[0],
            z_loss=losses[1],
            router_logits=outputs.router_logits,
            routing=outputs.routing if output_routing else None,
        )

    def _last_real_token(self, input_ids: Tensor | None, batch: int) -> Tensor | int:
        """(B,) position of the last token that is no padding, as transformers' classifiers find it."""
        pad = self.config.pad_token_id
        if pad is None and batch != 1:
            raise ValueError("A batch of several examples needs a padding token: set the configuration's pad_token_id.")
        if pad is None or input_ids is None:
            return -1
        position_L = torch.arange(input_ids.size(1), device=input_ids.device)
        return (position_L * (input_ids != pad)).argmax(-1)
