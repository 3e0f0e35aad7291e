"""One language's model out of a mixture whose experts are languages: dense, exact, and as small as what it runs.

Kudugunta et al. 2021, "Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference" (arXiv 2110.03742),
section 3: a task's examples use one expert a layer, so the rest need not be deployed. The shared and the named expert
add up, and so become one dense layer of their summed width: f_s(x) + f_e(x) = down [act(up_s x); act(up_e x)].
"""

import copy

import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.layers import TokenChoiceMoE
from mixtura.models.modeling_mixture import MixtureForCausalLM


@torch.no_grad()
def extract_language_model(model: MixtureForCausalLM, expert_id: int) -> MixtureForCausalLM:
    """The dense model that `model` is for examples of expert `expert_id`: equal logits, no `expert_ids` to give.

    Args:
        model: routed by pair, source or target language; it stays as it is.
        expert_id: the language or pair, a position in `model.config.expert_names`.

    Raises:
        UserError: tokens choose their experts, or there is no such expert.
    """
    config = model.config
    if config.route_by == "token":
        raise UserError("A model whose tokens choose their experts has no language's part: train it with route_by.")
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
