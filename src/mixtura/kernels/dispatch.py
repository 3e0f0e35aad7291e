"""From scores to the kernel that runs the chosen experts, by the device and by how many there are.

Sorting the choices by expert lets each expert multiply all its rows at once. A decoding step has so few rows that
sorting them costs more than it saves, and runs unsorted. On the CPU, choosing and sorting run in C: with many experts,
torch's top-k alone takes a twentieth of a layer's time.

Shapes: T tokens, K choices of a token, R = T*K rows, E experts, D hidden.
"""

import ctypes

import torch
from torch import Tensor

from mixtura.kernels import native
from mixtura.kernels.accelerator import can_sort_choices, sort_choices
from mixtura.kernels.expert_weights import ExpertWeights, as_int64, refuse
from mixtura.kernels.native import call
from mixtura.kernels.small_batch import is_small_batch, small_batch_ffn
from mixtura.kernels.sparse import sparse_ffn


def routed_ffn(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: ExpertWeights, *, decoding: bool = False
) -> Tensor:
    """(T, D) -> (T, D): sum over a token's K choices of weight * expert(x); sorted unless there are few.

    `decoding` as for `small_batch_ffn`.
    """
    if is_small_batch(expert_TK.numel(), experts.activation, x_TD, experts.up, experts.down):
        return small_batch_ffn(x_TD.unsqueeze(1), expert_TK, None, weight_TK, experts, decoding=decoding)
    token_R, weight_R, rows_E, row_TK = rows_by_expert(expert_TK, weight_TK, len(experts.up))
    return sparse_ffn(x_TD, token_R, weight_R, rows_E, experts, row_TK=row_TK)


def chosen_ffn(
    x_TKD: Tensor, expert_TK: Tensor, scale_TK: Tensor | None, weight_TK: Tensor, experts: ExpertWeights
) -> Tensor:
    """(T, K, D) -> (T, D): sum over a token's K choices of weight * expert(scale * its input for that choice).

    K of the input may be 1, where all choices of a token have the same; no scale is a scale of 1.
    """
    if is_small_batch(expert_TK.numel(), experts.activation, x_TKD, experts.up, experts.down):
        return small_batch_ffn(x_TKD, expert_TK, scale_TK, weight_TK, experts)
    order_R, rows_E = order_by_expert(expert_TK, len(experts.up))
    choices = expert_TK.size(1)
    # Every choice has an input of its own, so a row is a token by itself until it is added back.
    own_R = torch.arange(len(order_R), device=x_TKD.device)
    rows_RD = x_TKD.flatten(0, 1)[order_R if x_TKD.size(1) == choices else order_R // choices]
    if scale_TK is not None:
        rows_RD = rows_RD * scale_TK.flatten()[order_R].unsqueeze(-1)
    y_RD = sparse_ffn(rows_RD, own_R, weight_TK.flatten()[order_R], rows_E, experts)
    y_TD = torch.zeros_like(x_TKD[:, 0], dtype=y_RD.dtype)
    return y_TD.index_add(0, order_R // choices, y_RD)


def rows_by_expert(
    expert_TK: Tensor, weight_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Each token's choices as rows sorted by expert, tokens in order within an expert.

    Returns:
        The token (R,) and the weight (R,) of every row, the rows of every expert (E,), and where each token's rows are
        (T, K) if finding them cost nothing.
    """
    row_TK = None
    if can_sort_choices(expert_TK):
        order_R, row_TK, rows_E = sort_choices(expert_TK, num_experts)
    else:
        order_R, rows_E = order_by_expert(expert_TK, num_experts)
    return order_R // expert_TK.size(1), weight_TK.flatten()[order_R], rows_E, row_TK


def must_not_wait(tensor: Tensor) -> bool:
    """Whether the number of rows may not depend on the data.

    An accelerator runs behind the host, which would have to wait for it to learn that number; a compiled graph has it
    for no input at all.
    """
    return tensor.is_cuda or torch.compiler.is_compiling()


def first_real_rows(
    token_R: Tensor, weight_R: Tensor, rows_E: Tensor, real_T: Tensor | None, limit: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `limit` rows of every expert whose tokens are real.

    Where nothing may wait, all rows stay, and those that should have gone get a weight of zero: the layer then costs
    what it costs without padding and capacity.

    Args:
        token_R: the token of every row; rows are sorted by expert.
        weight_R: the weight of every row.
        rows_E: rows of every expert.
        real_T: true where a token is no padding; None says that all are.
        limit: most rows that an expert keeps; None is no limit.

    Returns:
        `token_R`, `weight_R` and `rows_E` of the rows that are kept, and how many real rows every expert was given (E,)
        before the limit.
    """
    real_R = torch.ones_like(token_R) if real_T is None else real_T[token_R].long()
    # The number of real rows in any run of rows is a difference of two running sums: before_R[r] counts those before
    # row r, and the one entry more than R counts all. Two such differences answer both questions below without a loop
    # over the experts and without asking the device for a number.
    before_R = torch.nn.functional.pad(real_R.cumsum(0), (1, 0))
    ends_E = rows_E.cumsum(0)
    starts_E = ends_E - rows_E
    real_E = before_R[ends_E] - before_R[starts_E]  # within an expert: how many real rows it was given
    kept_R = real_R.bool()
    if limit is not None:
        # Within an expert, up to a row: its place in the queue of real rows, which keeps it if it is below the limit.
        first_R = before_R[starts_E].repeat_interleave(rows_E, output_size=len(token_R))
        kept_R = kept_R & (before_R[:-1] - first_R < limit)
    if must_not_wait(rows_E):
        return token_R, torch.where(kept_R, weight_R, 0.0), rows_E, real_E
    kept_E = real_E if limit is None else real_E.clamp_max(limit)
    return token_R[kept_R], weight_R[kept_R], kept_E, real_E


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
