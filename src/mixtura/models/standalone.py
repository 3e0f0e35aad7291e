"""Models made with Mixtura, for inference with torch and transformers alone: this file and its configuration go along.

Layers are dense, token choice (a router sends every token to `num_experts_per_tok` experts), or mixture of tokens as it
is deployed, token by token: https://arxiv.org/abs/2310.15961 trains on groups of tokens, and a token by itself has
neighbours of zeros ("alone") or those of an average group ("population"). Groups themselves, balancing losses and
routing statistics are left to Mixtura. Parameters have the same names there.

Shapes: B batch, L length, T tokens, D hidden, E experts, C mixtures of an expert, S = E*C, K chosen, F expert width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mixtura.models.configuration_mixture import MixtureConfig

_ATTENTION: dict[str, Any] = {
    "llama": LlamaAttention,
    "mistral": MistralAttention,
    "qwen2": Qwen2Attention,
    "qwen3": Qwen3Attention,
}
_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class MixturaDense(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated."""

    def __init__(self, config: MixtureConfig, width: int) -> None:
        """`width` is that of the layer between the projections."""
        super().__init__()
        self.act, self.gated = _ACTIVATION[config.hidden_act], config.gated
        if config.gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        inner = self.act(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.act(self.up_proj(x))
        return self.down_proj(inner)


class MixturaExperts(nn.Module):
    """E feed-forward networks in two stacked tensors."""

    def __init__(self, config: MixtureConfig) -> None:
        """Parameters are `gate_up_proj` (E, 2F, D) when gated, else `up_proj` (E, F, D), and `down_proj` (E, D, F)."""
        super().__init__()
        self.act, self.gated = _ACTIVATION[config.hidden_act], config.gated
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        first = nn.Parameter(torch.empty(experts, 2 * width if config.gated else width, hidden))
        self.register_parameter("gate_up_proj" if config.gated else "up_proj", first)
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TKD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """(T, K, D) -> (T, D): sum over a token's K choices of weight * f_expert(its input for that choice)."""
        first: Any = self.gate_up_proj if self.gated else self.up_proj
        y_TD = torch.zeros_like(x_TKD[:, 0])
        for expert in expert_TK.unique().tolist():
            token_R, choice_R = (expert_TK == expert).nonzero(as_tuple=True)
            inner_RF = nn.functional.linear(x_TKD[token_R, choice_R], first[expert])
            if self.gated:
                gate_RF, up_RF = inner_RF.chunk(2, dim=-1)
                inner_RF = self.act(gate_RF) * up_RF
            else:
                inner_RF = self.act(inner_RF)
            out_RD = nn.functional.linear(inner_RF, self.down_proj[expert])
            y_TD.index_add_(0, token_R, out_RD * weight_TK[token_R, choice_R].unsqueeze(-1).to(out_RD.dtype))
        return y_TD


def _router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """In float32 or wider: in bfloat16 near-ties change the choice."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return nn.functional.linear(x_TD.to(dtype), weight_ED.to(dtype))


class MixturaTokenChoice(nn.Module):
    """Mixture of experts in which every token chooses."""

    def __init__(self, config: MixtureConfig) -> None:
        """Sizes and gates are the configuration's."""
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts) if _has_expert_bias(config) else None)
        self.experts = MixturaExperts(config)
        self.shared_expert = _shared_expert(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x_TD = x_BLD.flatten(0, 1)
        logits_TE = _router_logits(x_TD, self.gate.weight)
        scores_TE = logits_TE.softmax(-1) if self.config.scoring_func == "softmax" else logits_TE.sigmoid()
        bias: Any = self.expert_bias
        chosen_TK = (scores_TE if bias is None else scores_TE + bias).topk(self.config.num_experts_per_tok, -1).indices
        weight_TK = scores_TE.gather(-1, chosen_TK)
        if self.config.norm_topk_prob:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        x_TKD = x_TD.unsqueeze(1).expand(-1, chosen_TK.size(1), -1)
        y_TD = self.experts(x_TKD, chosen_TK, weight_TK * self.config.routed_scaling_factor)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view(x_BLD.shape)


def _shared_expert(config: MixtureConfig) -> "MixturaDense | None":
    if not config.num_shared_experts:
        return None
    return MixturaDense(config, config.num_shared_experts * config.moe_intermediate_size)


def _has_expert_bias(config: MixtureConfig) -> bool:
    return config.expert_bias_update_rate > 0


class MixturaPopulation(nn.Module):
    """What an average group is for each of its mixtures: log masses, means, and the experts' outputs for these."""

    def __init__(self, config: MixtureConfig) -> None:
        """Starts as a group of zeros."""
        super().__init__()
        mixtures = config.num_experts * config.mixtures_per_expert
        for name in ("log_mass", "combine_log_mass"):
            self.register_buffer(name, torch.full((mixtures,), math.log(config.group_size - 1)))
        for name in ("mean", "output"):
            self.register_buffer(name, torch.zeros(mixtures, config.hidden_size))
        self.register_buffer("updates", torch.zeros(()))


class MixturaOfTokens(nn.Module):
    """Mixture of tokens without its group: sum over mixtures of m * f_e(m x + (1 - m) mean), m = sigmoid(l - log Z)."""

    def __init__(self, config: MixtureConfig) -> None:
        """Sizes and mode are the configuration's."""
        super().__init__()
        self.config = config
        mixtures = config.num_experts * config.mixtures_per_expert
        self.top_k = config.alone_top_k or mixtures
        self.gate = nn.Linear(config.hidden_size, mixtures, bias=False)
        self.combine_gate = None
        if config.combine == "separate":
            self.combine_gate = nn.Linear(config.hidden_size, mixtures, bias=False)
        self.population = MixturaPopulation(config) if config.population else None
        self.experts = MixturaExperts(config)
        self.shared_expert = _shared_expert(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x_TD = x_BLD.flatten(0, 1)
        rest: Any = self.population if self.config.inference_mode == "population" else None
        mass = combine_mass = math.log(self.config.group_size - 1)
        if rest is not None:
            mass, combine_mass = rest.log_mass, rest.combine_log_mass
        scale_TS = weight_TS = self._weights(x_TD, self.gate, mass)
        if self.combine_gate is not None:
            weight_TS = self._weights(x_TD, self.combine_gate, combine_mass)
        chosen_TK = (scale_TS * weight_TS).topk(self.top_k, dim=-1).indices
        scale_TK1 = scale_TS.gather(1, chosen_TK).unsqueeze(-1)
        z_TKD = x_TD.unsqueeze(1) * scale_TK1
        if rest is not None:
            z_TKD = z_TKD + (1 - scale_TK1) * rest.mean.to(x_TD.dtype)[chosen_TK]
        y_TD = self.experts(z_TKD, chosen_TK // self.config.mixtures_per_expert, weight_TS.gather(1, chosen_TK))
        if rest is not None:
            # The mixtures that are not run: their inputs are near the mean, whose outputs are kept.
            y_TD = y_TD + weight_TS.scatter(1, chosen_TK, 0.0).to(y_TD.dtype) @ rest.output.to(y_TD.dtype)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view(x_BLD.shape)

    def _weights(self, x_TD: Tensor, gate: nn.Linear, log_mass: Tensor | float) -> Tensor:
        logits_TS = _router_logits(x_TD, gate.weight) / self.config.router_temperature
        return torch.sigmoid(logits_TS - log_mass).to(x_TD.dtype)


MIXTURES: dict[str, Callable[[MixtureConfig], nn.Module]] = {
    "token_choice": MixturaTokenChoice,
    "mixture_of_tokens": MixturaOfTokens,
}
"""The families that this file has besides dense layers."""


def _feed_forward(config: MixtureConfig, depth: int) -> nn.Module:
    family = (config.mlp_layer_types or [])[depth]
    if family == "dense":
        widths = config.intermediate_sizes
        return MixturaDense(config, config.intermediate_size if widths is None else widths[depth])
    return MIXTURES[family](config)


class MixturaLayerMix(nn.Module):
    """scale * sum over layers of softmax(logits)_m * hidden_m."""

    def __init__(self, num_layers: int) -> None:
        """Starts as the mean of the layers."""
        super().__init__()
        self.logits, self.scale = nn.Parameter(torch.zeros(num_layers)), nn.Parameter(torch.ones(()))

    def forward(self, states: list[Tensor]) -> Tensor:
        """M hidden states (B, L, D) -> (B, L, D)."""
        weight_M = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)).softmax(-1)
        stacked_BLMD = torch.stack(states, dim=-2)
        return self.scale * (weight_M.to(stacked_BLMD.dtype).unsqueeze(-1) * stacked_BLMD).sum(-2)


class MixturaDecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward layer."""

    def __init__(self, config: MixtureConfig, layer_idx: int) -> None:
        """`layer_idx` is the depth, from 0."""
        super().__init__()
        self.self_attn = _ATTENTION[getattr(config, "attention", "llama")](config=config, layer_idx=layer_idx)
        self.mlp = _feed_forward(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MixturaPreTrainedModel(PreTrainedModel):
    """What the decoder and its head share."""

    config_class = MixtureConfig
    config: MixtureConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixturaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": MixturaDecoderLayer,
        "attentions": [OutputRecorder(attention, index=1) for attention in _ATTENTION.values()],
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """The base class looks for the attention class in this file; ours are imported."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MixturaExperts):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)


class MixturaModel(MixturaPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MixtureConfig) -> None:
        """Builds the layers."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MixturaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.layer_mix = MixturaLayerMix(config.num_hidden_layers + 1) if config.layer_mix else None
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, L) or embeddings (B, L, D) -> hidden states (B, L, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden_states: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.size(1), device=hidden_states.device) + seen).unsqueeze(0)
        masks = self._masks(attention_mask, hidden_states, past_key_values, position_ids)
        embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        states = [hidden_states]
        for layer, kind in zip(self.layers, self._attention_kinds(), strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            states.append(hidden_states)
        if self.layer_mix is not None:
            hidden_states = self.layer_mix(states)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _attention_kinds(self) -> list[str]:
        kind = "full_attention" if getattr(self.config, "sliding_window", None) is None else "sliding_attention"
        return getattr(self.config, "layer_types", None) or [kind] * len(self.layers)

    def _masks(self, mask: Any, embeds: Tensor, cache: Cache | None, position_ids: Tensor) -> dict[str, Any]:
        if isinstance(mask, dict):
            return mask
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: makers[kind](
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
            for kind in sorted(set(self._attention_kinds()))
        }


class MixturaForCausalLM(MixturaPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MixtureConfig) -> None:
        """Builds the decoder and the head."""
        super().__init__(config)
        self.model = MixturaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, L) -> logits (B, L, V), and the loss when `labels` (B, L) are given."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Where transformers' Trainer looks whose labels to shift for label smoothing.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mixtura_standalone"] = MixturaForCausalLM.__name__
