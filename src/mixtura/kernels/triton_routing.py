"""Sorting choices by expert in Triton: a counting sort that needs no copy to the host and no atomic operation.

Blocks of choices are counted by expert, the counts are summed up, and every choice is put at its block's place for its
expert plus its rank within the block. The order is that of a stable sort, whatever ran first.

Imported where Triton is installed only; `accelerator.py` decides what runs.

Shapes: T tokens, K choices of a token, R = T*K rows, E experts.
"""

# Triton may be absent, and a kernel is more than the function it is written as.
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtura.kernels.expert_weights import as_int64

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
