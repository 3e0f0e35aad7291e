"""Exact conversions of mixture adapters into what other tools load, where the mathematics allows one.

An adapter that routes by task equals one stock LoRA for each task: for one task the weights are constants, so sum_e w_e
B_e A_e is one low-rank matrix. With scope "feed_forward" and top_k it is a stock Mixtral or Qwen3-MoE, whose expert e
is the frozen layer with W + scale * B_e A_e; or, again exactly, such a mixture of copies of the frozen layer with a
stock LoRA on the stacked experts.

Everything else depends on the token in a way that no stock model has; it is refused with the alternative.

Shapes: E experts, R rank, I inputs, O outputs, D hidden, F width.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixtura.adapters.low_rank_experts import LowRankExperts
from mixtura.adapters.mixture_lora import MixtureLoraConfig, MixtureLoraFeedForward, MixtureLoraLayer
from mixtura.config import UserError

_SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("attention_dropout", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_ALTERNATIVE = "distil it into one that is, or train an adapter that routes by 'task'"


@torch.no_grad()
def export_task_loras(model: PeftModel, folder: str | Path) -> list[Path]:
    """Writes one stock PEFT LoRA folder a task, which gives that task's outputs on the same base without Mixtura.

    Args:
        model: with an adapter that routes by task.
        folder: gets `task_0`, `task_1`, ...

    Returns:
        The folders.

    Raises:
        UserError: the adapter does not route by task, or blends tasks over whole feed-forward layers.
    """
    config = _config(model)
    if config.router != "task":
        raise UserError(
            f"The adapter routes by '{config.router}', so its update depends on the token and is no plain LoRA: "
            f"{_ALTERNATIVE}."
        )
    if config.num_tasks is not None and config.scope == "feed_forward":
        raise UserError(
            "The adapter blends experts over whole feed-forward layers, which is no plain LoRA: use scope 'linear', or "
            "leave num_tasks out so that a task is one expert."
        )
    tasks = config.num_experts if config.num_tasks is None else config.num_tasks
    folders = []
    for task in range(tasks):
        matrices = {name: matrix for layer in _layers(model) for name, matrix in _task_matrices(layer, task).items()}
        target = Path(folder) / f"task_{task}"
        _save_lora(matrices, config, target, base=config.base_model_name_or_path)
        folders.append(target)
    return folders


def _task_matrices(layer: MixtureLoraLayer, task: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R', I) and B (O, R') of one task for each linear layer under a routing, by the layer's name in the base."""
    experts = _experts(layer)
    found = {}
    for name, a_ERI in experts.A.items():
        b_EOR = experts.B[name]
        if experts.num_tasks is None:
            pair = (a_ERI[0 if len(a_ERI) == 1 else task], b_EOR[task])
        else:
            weighed_EOR = experts.task_logits.softmax(-1)[task].view(-1, 1, 1) * b_EOR
            if len(a_ERI) == 1:
                pair = (a_ERI[0], weighed_EOR.sum(0))
            else:
                pair = (a_ERI.flatten(0, 1), weighed_EOR.permute(1, 0, 2).flatten(1))
        found[_linear_name(layer, name)] = pair
    return found


def _linear_name(layer: MixtureLoraLayer, part: str) -> str:
    if not isinstance(layer, MixtureLoraFeedForward):
        return layer.key
    root = layer.key.rpartition(".")[0] if layer.is_split else layer.key
    return f"{root}.{getattr(layer.kind, part)}".lstrip(".")


def _save_lora(
    matrices: dict[str, tuple[Tensor, Tensor]], config: MixtureLoraConfig, folder: Path, *, base: str | None
) -> None:
    rank = next(iter(matrices.values()))[0].size(0)
    stock = LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha / config.r * rank,  # pyright: ignore[reportArgumentType]
        target_modules=list(matrices),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    stock.save_pretrained(str(folder))
    tensors = {}
    for name, (a_RI, b_OR) in matrices.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RI.detach().clone().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR.detach().clone().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def merge_into_mixture(model: PeftModel) -> PreTrainedModel:
    """A stock mixture of experts with the same logits: Mixtral from a Llama or Mistral base, Qwen3-MoE from Qwen3.

    Args:
        model: with an adapter of scope "feed_forward" that routes by top_k, on every feed-forward layer.

    Raises:
        UserError: the adapter or its base has no such form.
    """
    experts = [_experts(layer) for layer in _exportable_layers(model)]
    mixture = _empty_mixture(model)
    _copy_shared(model, mixture)
    for layer, routed, block in zip(_layers(model), experts, _mixture_blocks(mixture), strict=True):
        assert isinstance(layer, MixtureLoraFeedForward)
        parts: Any = layer.parts
        for expert in range(routed.num_experts):
            gate_FD, up_FD, down_DF = (
                getattr(parts, name).weight + _delta(routed, name, expert) for name in ("gate", "up", "down")
            )
            block.experts.gate_up_proj[expert].copy_(torch.cat([gate_FD, up_FD]))
            block.experts.down_proj[expert].copy_(down_DF)
        block.gate.weight.copy_(routed.gate.weight)
    return mixture.eval()


@torch.no_grad()
def upcycle_with_lora(model: PeftModel) -> PeftModel:
    """The same function as a stock mixture whose experts are copies of the frozen layer, and a stock LoRA on them.

    Of the stacked gate and up projections the update has rank 2 R, its B block by block; so has, filled up with zeros,
    that of the down projections. The folder that `save_pretrained` writes needs PEFT alone, on the mixture that
    `model.get_base_model()` gives after `unload`.

    Raises:
        UserError: as for `merge_into_mixture`.
    """
    config = _config(model)
    experts = [_experts(layer) for layer in _exportable_layers(model)]
    mixture = _empty_mixture(model)
    _copy_shared(model, mixture)
    for layer, routed, block in zip(_layers(model), experts, _mixture_blocks(mixture), strict=True):
        assert isinstance(layer, MixtureLoraFeedForward)
        parts: Any = layer.parts
        block.experts.gate_up_proj.copy_(
            torch.cat([parts.gate.weight, parts.up.weight]).expand_as(block.experts.gate_up_proj)
        )
        block.experts.down_proj.copy_(parts.down.weight.expand_as(block.experts.down_proj))
        block.gate.weight.copy_(routed.gate.weight)
    stock = LoraConfig(
        r=2 * config.r,
        lora_alpha=2 * config.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted: Any = get_peft_model(mixture.eval(), stock)
    state = {}
    for index, routed in enumerate(experts):
        for key, value in _stacked_lora(routed).items():
            state[f"base_model.model.model.layers.{index}.mlp.experts.{key}.default.weight"] = value
    missing = adapted.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    return adapted


def _stacked_lora(experts: LowRankExperts) -> dict[str, Tensor]:
    """PEFT's LoRA of stacked parameters: A has rows by expert then rank, B columns by rank then expert."""
    num_experts, rank = experts.num_experts, experts.rank

    def a_of(name: str) -> Tensor:
        return experts.A[name].detach().expand(num_experts, -1, -1)

    gate_EOR, up_EOR, down_EOR = (experts.B[name].detach() for name in ("gate", "up", "down"))
    first_ERI = torch.cat([a_of("gate"), a_of("up")], dim=1)
    blocks = [torch.cat([gate_EOR, torch.zeros_like(up_EOR)], 1), torch.cat([torch.zeros_like(gate_EOR), up_EOR], 1)]
    second_EOR = torch.cat(blocks, dim=2)
    down_ERI = torch.cat([a_of("down"), torch.zeros_like(a_of("down"))], dim=1)
    spread_EOR = torch.cat([down_EOR, torch.zeros_like(down_EOR)], dim=2)
    assert first_ERI.size(1) == down_ERI.size(1) == 2 * rank
    return {
        "base_layer.lora_A": first_ERI.flatten(0, 1),
        "base_layer.lora_B": second_EOR.permute(1, 2, 0).flatten(1),
        "lora_A": down_ERI.flatten(0, 1),
        "lora_B": spread_EOR.permute(1, 2, 0).flatten(1),
    }


def _config(model: PeftModel) -> MixtureLoraConfig:
    config = getattr(model, "active_peft_config", None)
    if not isinstance(config, MixtureLoraConfig):
        raise UserError("The model has no mixture of LoRA: only those are converted.")
    return config


def _layers(model: nn.Module) -> list[MixtureLoraLayer]:
    return [module for module in model.modules() if isinstance(module, MixtureLoraLayer)]


def _experts(layer: MixtureLoraLayer) -> LowRankExperts:
    experts: Any = layer.mixture_lora_experts[layer.active_adapters[0]]
    return experts


def _delta(experts: LowRankExperts, name: str, expert: int) -> Tensor:
    a_ERI = experts.A[name]
    return experts.scale * experts.B[name][expert] @ a_ERI[0 if len(a_ERI) == 1 else expert]


def _exportable_layers(model: PeftModel) -> list[MixtureLoraLayer]:
    """The adapted layers, all of them of a kind that stock mixtures have."""
    config = _config(model)
    if config.scope != "feed_forward":
        raise UserError(
            "The adapter routes each linear layer by itself, and no stock mixture does: train with scope "
            f"'feed_forward', or {_ALTERNATIVE}."
        )
    if config.router != "top_k":
        raise UserError(
            f"The adapter routes by '{config.router}', and stock mixtures by top_k: train with router 'top_k', or "
            f"{_ALTERNATIVE}."
        )
    base: Any = model.get_base_model()
    layers = _layers(model)
    if base.config.model_type not in _CONTAINERS:
        raise UserError(
            f"A base of type '{base.config.model_type}' has no stock mixture of its kind: use one of "
            f"{', '.join(_CONTAINERS)}, or {_ALTERNATIVE}."
        )
    if getattr(base.config, "attention_bias", False) or getattr(base.config, "mlp_bias", False):
        raise UserError(
            "The base has biases in attention or feed-forward layers, which these stock mixtures lack: use a base "
            "without."
        )
    if base.config.model_type == "qwen3" and base.config.use_sliding_window:
        raise UserError(
            "The base has sliding windows in some layers, which stock Qwen3-MoE places elsewhere: use another."
        )
    if len(layers) != base.config.num_hidden_layers:
        raise UserError(
            f"{len(layers)} of {base.config.num_hidden_layers} feed-forward layers are adapted, and a stock mixture is "
            "one in every layer: adapt all."
        )
    return layers


def _empty_mixture(model: PeftModel) -> PreTrainedModel:
    config = _config(model)
    base: Any = model.get_base_model()
    container, model_class, width = _CONTAINERS[base.config.model_type]
    shared = {name: getattr(base.config, name) for name in _SHARED}
    if base.config.model_type == "mistral":
        shared["sliding_window"] = base.config.sliding_window
    mixture_config = container(
        **shared,
        **{width: base.config.intermediate_size},
        num_experts_per_tok=config.top_k,
        router_aux_loss_coef=config.router_aux_loss_coef,
        **_ROUTING[base.config.model_type](config),
    )
    like = next(base.parameters())
    return model_class(mixture_config).to(like.device, like.dtype)  # pyright: ignore[reportCallIssue]


def _mixtral_routing(config: MixtureLoraConfig) -> dict[str, Any]:
    return {"num_local_experts": config.num_experts}


def _qwen3_routing(config: MixtureLoraConfig) -> dict[str, Any]:
    return {"num_experts": config.num_experts, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}


_CONTAINERS: dict[str, tuple[Any, type[PreTrainedModel], str]] = {
    "llama": (MixtralConfig, MixtralForCausalLM, "intermediate_size"),
    "mistral": (MixtralConfig, MixtralForCausalLM, "intermediate_size"),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM, "moe_intermediate_size"),
}
_ROUTING: dict[str, Any] = {"llama": _mixtral_routing, "mistral": _mixtral_routing, "qwen3": _qwen3_routing}


def _copy_shared(model: PeftModel, mixture: PreTrainedModel) -> None:
    """Copies everything but the feed-forward layers, and makes sure that nothing else is left out."""
    base = model.get_base_model()
    state = {key: value for key, value in base.state_dict().items() if ".mlp." not in key}
    result = mixture.load_state_dict(state, strict=False)
    left = [key for key in result.missing_keys if ".mlp." not in key]
    assert not left and not result.unexpected_keys, (left, result.unexpected_keys)


def _mixture_blocks(mixture: Any) -> list[Any]:
    return [layer.mlp for layer in mixture.model.layers]
