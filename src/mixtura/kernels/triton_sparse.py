"""Sparse experts on an accelerator: torch's grouped GEMM between Triton kernels, forward and backward.

What is kept for the backward pass is the tokens and the first projection. The weight of a row joins its activation, so
the down-projection's rows are summed up as they are and needed no more: y = h @ down.T, hence the weight's gradient
<grad_y, y> is <grad_y @ down, h>. Rows of a token are added in a fixed order by one program, without atomic operations.
No number is copied to the host.

Choices are sorted by expert in a counting sort that needs no copy to the host and no atomic operation. Blocks of
choices are counted by expert, the counts are summed up, and every choice is put at its block's place for its expert
plus its rank within the block. The order is that of a stable sort, whatever ran first.

Imported where Triton is installed only; `accelerator.py` decides what runs. Definition: `reference.sparse_ffn`.

Shapes: T tokens, K choices of a token, R = T*K routed rows sorted by expert, E experts, D hidden, F expert width, H =
2F when gated else F.
"""

# Triton may be absent, and a kernel is more than the function it is written as.
# pyright: reportMissingImports=false, reportIndexIssue=false

# Triton may be absent, and a kernel is more than the function it is written as.
# pyright: reportMissingImports=false, reportIndexIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mixtura.kernels.expert_weights import ExpertWeights, as_int64

BLOCK_ROWS = 128
"""Choices of a program; ranks within a block cost its square."""
BLOCK_EXPERTS = 32
"""Experts counted at once."""


def sort_choices(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts each token's choices by expert, stably.

    Returns (int64):
        order (R,): the flat choice t*K + k that every row comes from.
        rows (T, K): the row that every choice became; the inverse of the order.
        rows of every expert (E,).

    Raises:
        TypeError: `expert_TK` holds no whole numbers.
        RuntimeError: an expert does not lie between 0 and `num_experts` - 1. On an accelerator it comes, as torch's own
            assertions there do, with the next call that waits for it.
    """
    return torch.ops.mixtura.sort_choices(expert_TK, num_experts)


@triton.jit
def _count_kernel(expert_ptr, count_ptr, R, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """count[b, e]: how many choices of block b are expert e."""
    block = tl.program_id(0).to(tl.int64)
    r = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + r, mask=r < R, other=-1)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        chosen = (expert[:, None] == e[None, :]).to(tl.int32)
        tl.store(count_ptr + block * E + e, tl.sum(chosen, 0), mask=e < E)


@triton.jit
def _place_kernel(expert_ptr, start_ptr, order_ptr, row_ptr, R, E, BLOCK: tl.constexpr):
    """Writes both directions of the order; start[b, e] is the first row of block b's choices of expert e."""
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    r = block * BLOCK + i
    expert = tl.load(expert_ptr + r, mask=r < R, other=-1)
    # The rank of a choice among those of its block with the same expert, by comparing all pairs: no program has to wait
    # for another, as it would at a counter that all increase.
    same_before = (expert[:, None] == expert[None, :]) & (i[:, None] > i[None, :])
    known = (r < R) & (expert >= 0) & (expert < E)
    start = tl.load(start_ptr + block * E + expert, mask=known, other=0)
    row = start + tl.sum(same_before.to(tl.int32), 1)
    tl.store(row_ptr + r, row, mask=known)
    tl.store(order_ptr + row, r, mask=known)


@torch.library.custom_op("mixtura::sort_choices", mutates_args=())
def _sort_op(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_R = as_int64("expert_TK", expert_TK).view(-1)
    rows = expert_R.numel()
    grid = (max(1, triton.cdiv(rows, BLOCK_ROWS)),)
    count_BE = expert_R.new_empty(grid[0], num_experts)
    order_R, row_TK = torch.empty_like(expert_R), torch.empty_like(expert_R).view(expert_TK.shape)
    _count_kernel[grid](expert_R, count_BE, rows, num_experts, BLOCK=BLOCK_ROWS, BLOCK_E=BLOCK_EXPERTS)
    rows_E = count_BE.sum(0)
    # A choice of no expert is counted nowhere, so it is missing from the sum. Asking so takes E numbers, not R, and
    # nothing waits for the answer; `_place_kernel` leaves such a choice out, so it writes nowhere meanwhile.
    message = f"an expert's number is not between 0 and {num_experts - 1}"
    torch._assert_async(rows_E.sum() == rows, message)  # pyright: ignore[reportPrivateImportUsage]
    start_BE = count_BE.cumsum(0) - count_BE + (rows_E.cumsum(0) - rows_E)
    _place_kernel[grid](expert_R, start_BE, order_R, row_TK, rows, num_experts, BLOCK=BLOCK_ROWS)
    return order_R, row_TK, rows_E


@_sort_op.register_fake
def _(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return expert_TK.new_empty(shape, dtype=torch.int64)

    return empty(expert_TK.numel()), empty(*expert_TK.shape), empty(num_experts)


BLOCK_R = 4
"""Rows of a program that activates them."""
CLEARED = 1 << 16
"""Numbers that one program sets to zero."""


def grouped_ffn(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    row_R: Tensor,
    start_T: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D), as `reference.sparse_ffn`, given where each token's rows are.

    Args:
        x_TD: tokens, in the dtype of the weights.
        token_R: the token of every row; rows are sorted by expert.
        weight_R: weight of every row; float32 is kept as it is.
        tokens_per_expert_E: rows of every expert.
        row_R: the rows sorted by token.
        start_T: (T + 1,) int32; those of token t are row_R[start_T[t] : start_T[t + 1]].
        experts: their weights, contiguous.
    """
    return torch.ops.mixtura.grouped_ffn(x_TD, token_R, weight_R, tokens_per_expert_E, row_R, start_T, *experts)[0]


def rows_by_token(token_R: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """`row_R` and `start_T` of `grouped_ffn` for any rows: a stable sort, so the order of additions is fixed."""
    sorted_R, row_R = token_R.sort(stable=True)
    edge_T = torch.arange(tokens + 1, device=token_R.device)
    return row_R, torch.searchsorted(sorted_R, edge_T, out_int32=True)


@triton.jit
def _activated(u, KIND: tl.constexpr):
    if KIND == "relu":
        return tl.maximum(u, 0.0)
    elif KIND == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # tanh(z) = 2 sigmoid(2 z) - 1
        return u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    else:
        return u * tl.sigmoid(u)


@triton.jit
def _slope(u, KIND: tl.constexpr):
    """The derivative of `_activated`."""
    if KIND == "relu":
        return tl.where(u > 0.0, 1.0, 0.0)
    elif KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        return share * (1.0 + u * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * u * u))
    else:
        share = tl.sigmoid(u)
        return share * (1.0 + u * (1.0 - share))


@triton.jit
def _activate_kernel(
    u_ptr, weight_ptr, h_ptr, R, width, stride_u,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h = weight * act(u), or weight * act(gate) * up."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < R)[:, None] & (f < width)[None, :]
    at = u_ptr + r[:, None] * stride_u + f[None, :]
    h = _activated(tl.load(at, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        h *= tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    h *= tl.load(weight_ptr + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
    tl.store(h_ptr + r[:, None] * width + f[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward_kernel(
    grad_h_ptr, u_ptr, weight_ptr, h_ptr, grad_u_ptr, grad_weight_ptr, R, width, stride_u,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradient of h: those of u and of the weights, and h itself once more, in one pass."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weight_ptr + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
    grad_weight = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        f = first + tl.arange(0, COLUMNS)
        inside = (r < R)[:, None] & (f < width)[None, :]
        at_u, at_h = r[:, None] * stride_u + f[None, :], r[:, None] * width + f[None, :]
        grad = tl.load(grad_h_ptr + at_h, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + at_u, mask=inside, other=0.0).to(tl.float32)
        gate = _activated(u, KIND)
        h = gate
        weighted = grad * weight
        if GATED:
            up = tl.load(u_ptr + at_u + width, mask=inside, other=0.0).to(tl.float32)
            h = gate * up
            tl.store(grad_u_ptr + at_u + width, (weighted * gate).to(grad_u_ptr.dtype.element_ty), mask=inside)
            weighted = weighted * up
        tl.store(grad_u_ptr + at_u, (weighted * _slope(u, KIND)).to(grad_u_ptr.dtype.element_ty), mask=inside)
        grad_weight += tl.sum(grad * h, 1)
        tl.store(h_ptr + at_h, (h * weight).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weight_ptr + r, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=r < R)


@triton.jit
def _sum_rows_kernel(y_ptr, row_ptr, start_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """out[t] = the sum of the rows of token t, in their order."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Adding rows to their tokens by atomic operations would need no `row_ptr`, but would add in the order of arrival,
    # which changes from run to run, and in the output's 16 bits.
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for j in range(tl.load(start_ptr + t), tl.load(start_ptr + t + 1)):
        row = tl.load(row_ptr + j).to(tl.int64)
        total += tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _clear_unused_kernel(grad_ptr, rows_ptr, size, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sets the gradient of an expert without rows to zero; programs of the others end at once."""
    e = tl.program_id(0).to(tl.int64)
    # Asked on the device: the host would have to wait for the counts to know which experts these are.
    if tl.load(rows_ptr + e) == 0:
        for first in range(0, SPAN, BLOCK):
            i = tl.program_id(1).to(tl.int64) * SPAN + first + tl.arange(0, BLOCK)
            tl.store(grad_ptr + e * size + i, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=i < size)


def _columns(width: int) -> int:
    return min(256, max(16, triton.next_power_of_2(width)))


def _activate(u_RH: Tensor, weight_R: Tensor, activation: str, gated: bool) -> Tensor:
    rows, width = len(u_RH), u_RH.size(1) // (2 if gated else 1)
    h_RF = u_RH.new_empty(rows, width)
    columns = _columns(width)
    if rows:
        _activate_kernel[triton.cdiv(rows, BLOCK_R), triton.cdiv(width, columns)](
            u_RH, weight_R, h_RF, rows, width, u_RH.size(1),
            KIND=activation, GATED=gated, ROWS=BLOCK_R, COLUMNS=columns,
        )  # fmt: skip
    return h_RF


def _activate_backward(
    grad_h_RF: Tensor, u_RH: Tensor, weight_R: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted activation (R, F), gradient of u (R, H) and of the weights (R,)."""
    rows, width = grad_h_RF.shape
    h_RF, grad_u_RH, grad_weight_R = torch.empty_like(grad_h_RF), torch.empty_like(u_RH), torch.empty_like(weight_R)
    if rows:
        _activate_backward_kernel[(triton.cdiv(rows, BLOCK_R),)](
            grad_h_RF, u_RH, weight_R, h_RF, grad_u_RH, grad_weight_R, rows, width, u_RH.size(1),
            KIND=activation, GATED=gated, ROWS=BLOCK_R, COLUMNS=_columns(width),
        )  # fmt: skip
    return h_RF, grad_u_RH, grad_weight_R


def _sum_rows(y_RD: Tensor, row_R: Tensor, start_T: Tensor) -> Tensor:
    tokens, hidden = len(start_T) - 1, y_RD.size(1)
    out_TD = y_RD.new_empty(tokens, hidden)
    block = min(1024, max(16, triton.next_power_of_2(hidden)))
    if tokens:
        _sum_rows_kernel[tokens, triton.cdiv(hidden, block)](y_RD, row_R, start_T, out_TD, hidden, BLOCK_D=block)
    return out_TD


def _clear_unused(grad_E: Tensor, rows_E: Tensor) -> Tensor:
    """The gradient (E, ...), with zeros for experts without rows: a grouped GEMM may leave theirs as it found it."""
    size = grad_E[0].numel()
    rows_E = rows_E.contiguous()  # equal counts may be one number, expanded
    _clear_unused_kernel[len(grad_E), triton.cdiv(size, CLEARED)](grad_E, rows_E, size, SPAN=CLEARED, BLOCK=1024)
    return grad_E


@torch.library.custom_op("mixtura::grouped_ffn", mutates_args=())
def _grouped_ffn_op(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    row_R: Tensor,
    start_T: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    ends_E = tokens_per_expert_E.cumsum(0).to(torch.int32)
    u_RH = F.grouped_mm(x_TD.index_select(0, token_R), up_EHD.transpose(1, 2), offs=ends_E)
    h_RF = _activate(u_RH, weight_R.contiguous(), activation, gated)
    y_RD = F.grouped_mm(h_RF, down_EDF.transpose(1, 2), offs=ends_E)
    return _sum_rows(y_RD, row_R.contiguous(), start_T.contiguous()), u_RH


@_grouped_ffn_op.register_fake
def _(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    row_R: Tensor,
    start_T: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(token_R.size(0), up_EHD.size(1))


@torch.library.custom_op("mixtura::grouped_ffn_backward", mutates_args=())
def _grouped_ffn_backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    row_R: Tensor,
    start_T: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    u_RH: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ends_E = tokens_per_expert_E.cumsum(0).to(torch.int32)
    grad_y_RD = grad_TD.index_select(0, token_R)
    grad_h_RF = F.grouped_mm(grad_y_RD, down_EDF, offs=ends_E)
    h_RF, grad_u_RH, grad_weight_R = _activate_backward(grad_h_RF, u_RH, weight_R.contiguous(), activation, gated)
    grad_down_EDF = _clear_unused(F.grouped_mm(grad_y_RD.T, h_RF, offs=ends_E), tokens_per_expert_E)
    x_RD = x_TD.index_select(0, token_R)
    grad_up_EHD = _clear_unused(F.grouped_mm(grad_u_RH.T, x_RD, offs=ends_E), tokens_per_expert_E)
    grad_x_RD = F.grouped_mm(grad_u_RH, up_EHD, offs=ends_E)
    grad_x_TD = _sum_rows(grad_x_RD, row_R.contiguous(), start_T.contiguous())
    return grad_x_TD, grad_weight_R, grad_up_EHD, grad_down_EDF


@_grouped_ffn_backward_op.register_fake
def _(
    grad_TD: Tensor,
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    row_R: Tensor,
    start_T: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    u_RH: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_weight_R = weight_R.new_empty(weight_R.shape)
    return x_TD.new_empty(x_TD.shape), grad_weight_R, up_EHD.new_empty(up_EHD.shape), down_EDF.new_empty(down_EDF.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, gated = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.settings = (activation, gated)
    ctx.mark_non_differentiable(output[1])
    # Else a gradient of zeros as large as the first projection would be made for nobody.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_TD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mixtura.grouped_ffn_backward(grad_TD.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return grads[0], None, grads[1], None, None, None, grads[2], grads[3], None, None


_grouped_ffn_op.register_autograd(_backward, setup_context=_save)
