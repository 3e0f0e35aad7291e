"""Choosing experts and sorting choices by expert: torch's operators, and on the CPU C, where torch's top-k takes a
twentieth of a layer with many experts.

Shapes: T tokens, K choices of a token, R = T*K rows, E experts.
"""

import ctypes

import torch
from torch import Tensor

from mixtura.kernels import native
from mixtura.kernels.compiled import call
from mixtura.kernels.indices import as_int64, refuse

FEWEST_SCORES = 16384
"""Scores from which C is quicker than torch, which is called with less ado: a decoding step has fewer."""


def top_k(scores_TE: Tensor, choices: int) -> Tensor:
    """The experts (T, K) of each token's largest scores, the largest first; no gradient.

    Of equal scores C takes the expert that is named first, torch any.

    Raises:
        ValueError: there are not that many experts to choose.
    """
    if not 0 <= choices <= scores_TE.size(-1):
        raise ValueError(f"{choices} experts are to be chosen: there are {scores_TE.size(-1)}.")
    if scores_TE.dim() != 2 or scores_TE.numel() < FEWEST_SCORES or not native.can_read(scores_TE):
        return scores_TE.topk(choices, dim=-1).indices
    tokens, experts = scores_TE.shape
    expert_TK = torch.empty(tokens, choices, dtype=torch.int64)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * 17 * -(-experts // 16))
    numbers = map(ctypes.c_int64, (threads, tokens, experts, choices))
    call("mixtura_top_k", *numbers, *native.pointers(scores_TE, expert_TK, scratch))
    return expert_TK


def order_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order (R,) that sorts each token's K choices, flattened, by expert, and the rows of every expert (E,).

    Raises:
        TypeError: `expert_TK` holds no whole numbers.
        IndexError: on the CPU, an expert does not lie between 0 and `num_experts` - 1.
    """
    expert_R = as_int64("expert_TK", expert_TK.flatten())
    if native.can_read(expert_R, dtype=torch.int64):
        order_R, rows_E, next_E = torch.empty_like(expert_R), *expert_R.new_empty(2, num_experts).unbind()
        numbers = (ctypes.c_int64(len(expert_R)), ctypes.c_int64(num_experts))
        if call("mixtura_sort_by_expert", *numbers, *native.pointers(expert_R, order_R, rows_E, next_E)):
            refuse("expert_TK", expert_TK, num_experts)
        return order_R, rows_E
    # Not bincount: its output size depends on the data, which torch.compile cannot follow.
    rows_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_R.device)
    return expert_R.argsort(stable=True), rows_E.scatter_add(0, expert_R, torch.ones_like(expert_R))
