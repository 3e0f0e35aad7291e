"""Mixtura's kernels for the experts of stock models: `from_pretrained(..., experts_implementation="mixtura")`.

transformers lets the experts of Mixtral, Qwen-MoE, OLMoE and most other mixtures be computed by a registered function.
This one runs `mixtura.kernels.routed_ffn`, for the many tokens of a batch and for the few of a decoding step. It is
registered when `mixtura.models` is imported, and is only used by models that name it. Where processes train a model
together and each holds some of its experts, the module has an `exchange`, as `mixtura.layers.Experts` has.

Shapes: T tokens, K experts of a token, R routed rows, E experts, D hidden, F expert width, H = 2F when gated else F.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.integrations import moe

from mixtura import kernels
from mixtura.config import UserError
from mixtura.layers.routing import SparseRouting, sort_by_expert

NAME = "mixtura"
_ACTIVATIONS: dict[type, str] = {SiLUActivation: "silu", nn.SiLU: "silu", GELUActivation: "gelu", nn.ReLU: "relu"}


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, D), indices and weights (T, K) -> (T, D): what the `forward` of a stock module of experts computes.

    Raises:
        UserError: the experts have biases, a norm, a gate or an activation that the kernels do not compute.
    """
    activation = kernel_activation(experts)
    up_EHD, down_EDF = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    if experts.is_transposed:
        up_EHD, down_EDF = up_EHD.transpose(1, 2), down_EDF.transpose(1, 2)
    weights = kernels.ExpertWeights(up_EHD, down_EDF, activation, experts.has_gate)
    exchange: kernels.ExpertExchange | None = getattr(experts, "exchange", None)
    if exchange is not None:
        y_TD = exchange.run(kernels.routed_ffn, hidden_states, top_k_index, top_k_weights, weights)
    elif _has_rows_of_other_ranks(experts, top_k_index):
        routing = _rows_of_this_rank(top_k_index, top_k_weights, experts.num_experts)
        y_TD = kernels.sparse_ffn(hidden_states, *routing[:3], weights, row_TK=routing.row_TK)
    else:
        y_TD = kernels.routed_ffn(hidden_states, top_k_index, top_k_weights, weights)
    return y_TD.to(hidden_states.dtype)


def _has_rows_of_other_ranks(experts: Any, top_k_index: Tensor) -> bool:
    """Whether indices may stand for experts on other ranks; older versions of transformers do not say, so they may."""
    if hasattr(experts, "_is_expert_parallel"):
        return experts._is_expert_parallel
    return bool((top_k_index >= experts.num_experts).any())


def _rows_of_this_rank(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> SparseRouting:
    """The routing without the rows that expert parallelism computes on other ranks, whose index is `num_experts`."""
    token_R, weight_R, rows_E, _ = sort_by_expert(top_k_index, top_k_weights, num_experts + 1)
    own = int(rows_E[:-1].sum())
    return SparseRouting(token_R[:own], weight_R[:own], rows_E[:-1])


def kernel_activation(experts: Any) -> str:
    """The kernels' name of the activation of a stock module of experts.

    Raises:
        UserError: the kernels cannot compute these experts; the message says why.
    """
    act_fn = getattr(experts, "act_fn", None)
    reasons = {
        "have biases": experts.has_bias,
        "are normalised one by one": getattr(experts, "has_post_expert_norm", False),
        "interleave gate and up": not experts.is_concatenated,
        "have a gate of their own": experts.has_gate and type(experts)._apply_gate is not moe._default_apply_gate,
        f"have the activation {type(act_fn).__name__}": type(act_fn) not in _ACTIVATIONS,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"The experts of {type(experts).__name__} {reason}, which Mixtura's kernels do not compute: use "
                'experts_implementation="grouped_mm".'
            )
    return _ACTIVATIONS[type(act_fn)]


def register() -> None:
    """Makes the name known to transformers, for the whole process; it changes no model that does not ask for it."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
