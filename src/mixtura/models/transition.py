"""From mixture of tokens to what is served token by token, with the same parameters.

To token choice (the transition tuning of arXiv 2310.15961): the controller becomes the router, and the experts stay. A
token alone gets the sum of m_e^2 f_e(x) from a mixture-of-tokens layer with ReLU experts, m = sigmoid(l - ln(G - 1)),
and the sum of p_e f_e(x) with p = softmax(l) from token choice. Both weights grow with the logit, so the same experts
are chosen, but the outputs differ in size: undecided, m^2 is 1 / G^2 and p is 1 / E. So every layer's second projection
is multiplied by one number, the one that brings its outputs closest to what the layer gave, in least squares over some
tokens.

To `alone`: nothing but the mode of training changes.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, C mixtures of an expert.
"""

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.layers import MixtureOfTokens, TokenChoiceMoE
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.models.generation import load_model
from mixtura.models.modeling_mixture import MixtureDecoderLayer, MixtureForCausalLM


def transition(
    model_folder: Path,
    out: Path,
    *,
    to: Literal["token_choice", "alone"],
    batches: Iterable[Tensor] = (),
    top_k: int | None = None,
) -> MixtureForCausalLM:
    """Converts the model in a folder and writes the result, to be trained on or served, with its tokenizer to `out`.

    Args:
        model_folder: a mixture-of-tokens model.
        out: a new folder.
        to: "token_choice", or "alone", which trains in that mode from now on.
        batches: for token choice, token ids (B, L) that outputs are compared on.
        top_k: experts a token gets; None takes the mixtures that it gets alone, or 2 where it gets all.

    Raises:
        UserError: the model cannot be read or converted, or `out` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty: name a new folder.")
    model, tokenizer = load_model(model_folder)
    if not isinstance(model, MixtureForCausalLM) or not model.mixture_of_tokens_layers():
        raise UserError(f"The model in '{model_folder}' has no mixture-of-tokens layer: there is nothing to convert.")
    if to == "token_choice":
        model = to_token_choice(model, batches, top_k=top_k or model.config.alone_top_k or 2)
    else:
        model.set_inference_mode("alone", top_k=model.config.alone_top_k if top_k is None else top_k)
        model.config.zero_fill, model.config.zero_fill_unit = 1.0, "group"
        model.set_zero_fill(1.0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


@torch.no_grad()
def to_token_choice(model: MixtureForCausalLM, batches: Iterable[Tensor], *, top_k: int) -> MixtureForCausalLM:
    """A new model with token choice in place of mixture of tokens, outputs as near as one factor a layer brings them.

    The temperature goes into the router, and two routers become their mean, which orders mixtures nearly as the product
    of their weights does. An expert with C mixtures becomes C experts with the same weights and a router column each:
    at first they are one function, and the parameters of the experts grow C-fold.

    Args:
        model: left as it is, but for its inference mode, which becomes `alone` with `top_k`.
        batches: token ids (B, L), one batch at least.
        top_k: experts a token gets, and the mixtures it gets alone in the comparison.

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
    _match_outputs(model, converted, batches)
    return converted


def _configuration(config: MixtureConfig, *, top_k: int) -> MixtureConfig:
    changed: Any = copy.deepcopy(config)
    swap = {"mixture_of_tokens": "token_choice"}
    changed.mlp_layer_types = [swap.get(family, family) for family in config.mlp_layer_types or []]
    changed.num_experts, changed.num_experts_per_tok = config.num_experts * config.mixtures_per_expert, top_k
    changed.scoring_func, changed.norm_topk_prob, changed.capacity_factor = "softmax", False, None
    changed.routed_scaling_factor, changed.num_shared_experts, changed.expert_bias_update_rate = 1.0, 0, 0.0
    changed.zero_fill = changed.alone_fraction = changed.population_rate = 0.0
    changed.mixtures_per_expert, changed.temperature, changed.combine, changed.population = 1, 1.0, "same", False
    changed.inference_mode = "alone"
    return changed


def _weights(model: MixtureForCausalLM) -> dict[str, Tensor]:
    """The model's state with routers and experts as token choice has them."""
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


def _match_outputs(before: MixtureForCausalLM, after: MixtureForCausalLM, batches: Iterable[Tensor]) -> None:
    """Scales the second projections of `after`: factor = <y, y_hat> / <y_hat, y_hat> over all tokens of the batches."""
    pairs = [
        (old.mlp, new.mlp)
        for old, new in zip(_decoder_layers(before), _decoder_layers(after), strict=True)
        if isinstance(old.mlp, MixtureOfTokens) and isinstance(new.mlp, TokenChoiceMoE)
    ]
    products = torch.zeros(len(pairs), 2, dtype=torch.float64)

    def compare(index: int, _: nn.Module, inputs: tuple[Tensor, ...], y_BLD: Any) -> None:
        new_y_BLD = pairs[index][1](inputs[0]).double()
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
    for (_, new), (product, square) in zip(pairs, products.tolist(), strict=True):
        new.experts.down_proj.mul_(product / square if square > 0 else 1.0)


def _decoder_layers(model: MixtureForCausalLM) -> list[MixtureDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, MixtureDecoderLayer)]
