"""A trained mixture with the same parameters in a form that is served: token choice, `alone`, or one language's model.

To token choice (the transition tuning of arXiv 2310.15961): the controller becomes the router, and the experts stay. A
token alone gets the sum of m_e^2 f_e(x) from a mixture-of-tokens layer with ReLU experts, m = sigmoid(l - ln(G - 1)),
and the sum of p_e f_e(x) with p = softmax(l) from token choice. Both weights grow with the logit, so the same experts
are chosen, but the outputs differ in size: where the router is undecided, m^2 is 1 / G^2 and p is 1 / E. So the second
projection of every layer is multiplied by one number: the one that brings its outputs closest, in least squares over
some tokens, to the outputs of the mixture-of-tokens layer.

To `alone`: nothing changes but the mode of training.

`transition_due` and `change_to_token_choice` convert a model in the middle of its training; its optimizer goes on.

To one language's model, where the experts of a mixture are languages (Kudugunta et al. 2021, "Beyond Distillation:
Task-level Mixture-of-Experts for Efficient Inference", arXiv 2110.03742, section 3): the examples of a language use one
expert a layer, so the other experts need not be deployed. The outputs of the shared and of the named expert are added,
and so the two become one dense layer of their summed width: f_s(x) + f_e(x) = down [act(up_s x); act(up_e x)].

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, C mixtures of an expert, H and F rows of projections.
"""

import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.config.arm import model_settings
from mixtura.layers import MixtureOfTokens, TokenChoiceMoE
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.models.modeling_mixture import MixtureDecoderLayer, MixtureForCausalLM


@torch.no_grad()
def to_token_choice(
    model: MixtureForCausalLM,
    batches: Iterable[Tensor],
    *,
    top_k: int,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> MixtureForCausalLM:
    """A new model with token choice in place of mixture of tokens; one factor a layer brings the outputs close.

    The temperature goes into the router, and two routers become their mean, which orders mixtures nearly as the product
    of their weights does. An expert with C mixtures becomes C experts with the same weights and a router column each:
    at first these compute the same function, and there are C times as many parameters in experts.

    Args:
        model: stays as it is, except that its inference mode becomes `alone` with `top_k`.
        batches: token ids (B, L), one batch at least.
        top_k: experts of a token, and mixtures of a token in the model that outputs are compared with.
        add_up: returns the sum of a tensor over all ranks, which have different batches; None for one process.

    Raises:
        UserError: there is no batch, there are fewer experts than asked for, or some layers are token choice already.
    """
    families = model.config.mlp_layer_types or []
    mixtures = model.config.num_experts * model.config.mixtures_per_expert
    if not 1 <= top_k <= mixtures:
        raise UserError(f"A token cannot get {top_k} experts of the {mixtures} there are: lower top_k.")
    if "token_choice" in families:
        raise UserError(
            "The model has token-choice layers already, whose settings would change: it cannot be converted."
        )
    converted = MixtureForCausalLM(_configuration(model.config, top_k=top_k))
    converted.load_state_dict(_weights(model), strict=True)
    converted.eval().to(model.device).to(model.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.eval().set_inference_mode("alone", top_k=top_k)
    _match_outputs(model, converted, batches, add_up or (lambda products: products))
    return converted


def to_alone(model: MixtureForCausalLM, *, top_k: int | None) -> None:
    """Makes a model continue training, and answer, without groups; `top_k` limits the mixtures of a token."""
    model.set_inference_mode("alone", top_k=top_k)
    model.config.zero_fill, model.config.zero_fill_unit = 1.0, "group"
    model.set_zero_fill(1.0)


def transition_due(model: MixtureForCausalLM, step: int, *, steps: int) -> bool:
    """Whether a model whose configuration plans a transition should change before a step.

    Args:
        model: one in training.
        step: optimizer steps taken.
        steps: of the whole run, of which the last `transition_fraction` are token choice.
    """
    config = model.config
    return config.transition_to is not None and step >= steps - round(config.transition_fraction * steps)


@torch.no_grad()
def change_to_token_choice(
    model: MixtureForCausalLM, batches: Iterable[Tensor], *, add_up: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Does what `to_token_choice` does, but in place: the model keeps its own parameter tensors.

    So an optimizer that holds these tensors goes on with its state. Its moments of the second projections stay as they
    were although the projections are scaled.

    Args:
        model: one whose layers have a mixture an expert and one router, with `alone_top_k` experts a token from now on.
        batches: token ids (B, L), one batch at least.
        add_up: as in `to_token_choice`.

    Raises:
        UserError: see `to_token_choice`.
    """
    top_k = _planned_top_k(model.config)
    # Building the new model draws start values, which are then overwritten; training must go on with the same draws.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        converted = to_token_choice(model, batches, top_k=top_k, add_up=add_up)
    for kept, value in zip(model.parameters(), converted.parameters(), strict=True):
        kept.copy_(value)
    _take_over(model, converted)


def follow_transition(model: MixtureForCausalLM, folder: Path) -> None:
    """Prepares a model that plans a transition for loading a checkpoint that was saved after it: changes its layers.

    If the configuration in the folder cannot be read, nothing changes, and loading the folder says what is wrong.
    """
    if model.config.transition_to is None:
        return
    try:
        families = json.loads((folder / "config.json").read_text(encoding="utf-8"))["mlp_layer_types"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if "mixture_of_tokens" in families:
        return
    top_k = _planned_top_k(model.config)
    converted: Any = MixtureForCausalLM(_configuration(model.config, top_k=top_k))
    _take_over(model, converted.to(model.device))


def finished_config(config: MixtureConfig) -> MixtureConfig:
    """The configuration of the finished model, which differs where a transition changes layers during training."""
    return config if config.transition_to is None else _configuration(config, top_k=_planned_top_k(config))


def _planned_top_k(config: MixtureConfig) -> int:
    assert config.alone_top_k is not None and config.mixtures_per_expert == 1 and config.combine == "same"
    return config.alone_top_k


def _take_over(model: MixtureForCausalLM, converted: MixtureForCausalLM) -> None:
    """Gives `model` the token-choice layers and settings of `converted`; the parameters stay those of `model`."""
    for old, new in zip(_decoder_layers(model), _decoder_layers(converted), strict=True):
        if isinstance(old.mlp, MixtureOfTokens) and isinstance(new.mlp, TokenChoiceMoE):
            new.mlp.gate, new.mlp.experts, new.mlp.shared_expert = old.mlp.gate, old.mlp.experts, old.mlp.shared_expert
            old.mlp = new.mlp.train(model.training)
    for key, value in _changes(model.config, top_k=converted.config.num_experts_per_tok).items():
        setattr(model.config, key, value)


def _configuration(config: MixtureConfig, *, top_k: int) -> MixtureConfig:
    changed = copy.deepcopy(config)
    for key, value in _changes(config, top_k=top_k).items():
        setattr(changed, key, value)
    return changed


def _changes(config: MixtureConfig, *, top_k: int) -> dict[str, Any]:
    """The fields of the configuration that the conversion changes, with their new values.

    Settings that no layer has any more, and those of token choice's layers, go back to their defaults: a layer then
    chooses by softmax and drops nothing. Settings of the training of token choice stay, and shared experts do.
    """
    swap = {"mixture_of_tokens": "token_choice"}
    families = [swap.get(family, family) for family in config.mlp_layer_types or []]
    reset = {
        field: setting.default
        for setting, field in model_settings()
        if not set(families) & set(setting.families) or setting.argument("token_choice") is not None
    }
    kept = {key: getattr(config, key) for key in ("moe_intermediate_size", "num_shared_experts")}
    experts = {"num_experts": config.num_experts * config.mixtures_per_expert, "num_experts_per_tok": top_k}
    outside = {"mlp_layer_types": families, "routed_scaling_factor": 1.0, "population": False}
    return reset | kept | experts | outside


def _weights(model: MixtureForCausalLM) -> dict[str, Tensor]:
    """The state of the model, with routers and experts in the form that token choice has."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if not isinstance(layer, MixtureOfTokens):
            continue
        gates = [layer.gate.weight] + ([layer.combine_gate.weight] if layer.combine_gate is not None else [])
        for key in [key for key in state if key.startswith(f"{name}.")]:
            part = key[len(name) + 1 :]
            if part.startswith(("combine_gate.", "population.")):
                del state[key]
            elif part.startswith("experts."):
                state[key] = state[key].repeat_interleave(layer.mixtures_per_expert, 0)
        state[f"{name}.gate.weight"] = torch.stack(gates).mean(0) / layer.temperature
    return state


def _match_outputs(
    before: MixtureForCausalLM,
    after: MixtureForCausalLM,
    batches: Iterable[Tensor],
    add_up: Callable[[Tensor], Tensor],
) -> None:
    """Scales the second projections of `after`: factor = <y, y_hat> / <y_hat, y_hat> over all tokens of the batches."""
    pairs = [
        (old.mlp, new.mlp)
        for old, new in zip(_decoder_layers(before), _decoder_layers(after), strict=True)
        if isinstance(old.mlp, MixtureOfTokens) and isinstance(new.mlp, TokenChoiceMoE)
    ]
    products = torch.zeros(len(pairs), 2, dtype=torch.float64)

    def compare(index: int, _: nn.Module, inputs: tuple[Tensor, ...], y_BLD: Any) -> None:
        layer, new_y_BLD = pairs[index][1], pairs[index][1](inputs[0]).double()
        if layer.shared_expert is not None:  # both have the same, which nothing scales
            shared_BLD = layer.shared_expert(inputs[0]).double()
            y_BLD, new_y_BLD = y_BLD - shared_BLD, new_y_BLD - shared_BLD
        products[index] += torch.stack([(y_BLD.double() * new_y_BLD).sum(), new_y_BLD.square().sum()]).cpu()

    hooks = [old.register_forward_hook(partial(compare, index)) for index, (old, _) in enumerate(pairs)]
    try:
        count = 0
        for ids_BL in batches:
            before.base_model(input_ids=ids_BL.to(before.device), use_cache=False)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise UserError("There is no batch to compare outputs on: give text that fills at least one.")
    totals = add_up(products.to(before.device, torch.float32)).tolist()
    for (_, new), (product, square) in zip(pairs, totals, strict=True):
        new.experts.down_proj.mul_(product / square if square > 0 else 1.0)


def _decoder_layers(model: MixtureForCausalLM) -> list[MixtureDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, MixtureDecoderLayer)]


@torch.no_grad()
def extract_language_model(model: MixtureForCausalLM, expert_id: int) -> MixtureForCausalLM:
    """The dense model with the same logits as `model` for examples of expert `expert_id`; it takes no `expert_ids`.

    Args:
        model: routed by pair, source or target language; it stays as it is.
        expert_id: the language or pair, a position in `model.config.expert_names`.

    Raises:
        UserError: tokens choose their experts, or there is no such expert.
    """
    config = model.config
    if config.route_by == "token":
        raise UserError(
            "The tokens of this model choose their experts, so no language has a part of its own: train with route_by."
        )
    if not 0 <= expert_id < config.num_experts:
        raise UserError(f"There is no expert {expert_id}: choose one from 0 to {config.num_experts - 1}.")
    layers = [layer.mlp for layer in model.model.layers]
    dense = {
        f"model.layers.{depth}.mlp.{name}.weight": weight
        for depth, layer in enumerate(layers)
        if isinstance(layer, TokenChoiceMoE)
        for name, weight in _dense_weights(layer, expert_id).items()
    }
    replaced = tuple(f"model.layers.{d}.mlp." for d, layer in enumerate(layers) if isinstance(layer, TokenChoiceMoE))
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(replaced)}
    widths = config.intermediate_sizes or [config.intermediate_size] * config.num_hidden_layers
    extracted = copy.deepcopy(config)
    extracted.mlp_layer_types = ["dense" if f == "token_choice" else f for f in config.mlp_layer_types or []]
    extracted.intermediate_sizes = [
        dense.get(f"model.layers.{depth}.mlp.up_proj.weight", torch.empty(width, 0)).size(0)
        for depth, width in enumerate(widths)
    ]
    extracted.route_by, extracted.expert_names, extracted.num_shared_experts = "token", None, 0
    result = MixtureForCausalLM(extracted)
    nn.Module.to(result, device=model.device, dtype=model.dtype)
    result.load_state_dict(kept | dense, strict=True)
    return result.train(model.training)


def _dense_weights(layer: TokenChoiceMoE, expert_id: int) -> dict[str, Tensor]:
    """The weights of the dense layer: the shared expert's rows, then the named expert's."""
    up_EHD, down_EDF = layer.experts.weights
    parts = {"down_proj": [down_EDF[expert_id]]}
    if layer.experts.gated:
        gate_FD, up_FD = up_EHD[expert_id].chunk(2)
        parts |= {"gate_proj": [gate_FD], "up_proj": [up_FD]}
    else:
        parts["up_proj"] = [up_EHD[expert_id]]
    if layer.shared_expert is not None:
        parts = {name: [getattr(layer.shared_expert, name).weight, *weights] for name, weights in parts.items()}
    return {name: torch.cat(weights, dim=1 if name == "down_proj" else 0) for name, weights in parts.items()}
