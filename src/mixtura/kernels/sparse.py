"""Fast paths for sparse routing: each expert on its own rows, without padding and without a copy of the weights.

On the CPU a few experts are finished before the next begin, so their rows stay in cache; only the products run expert
by expert, so that many small experts cost no more calls than they must. In float32 `native` does the same in C where
that can be compiled. The gradients of all experts are written into one tensor (indexing a stacked weight under autograd
would allocate a full zero gradient for every expert). Only the first projection is kept for the backward pass. On a
GPU torch's grouped GEMM runs, with no host synchronisation, between Triton's kernels where Triton is installed: see
`accelerator`.

Shapes: T tokens, R routed rows sorted by expert, E experts, D hidden, F expert width, H = 2F when gated else F.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mixtura.kernels import accelerator, native
from mixtura.kernels.expert_weights import (
    ExpertWeights,
    activate,
    activate_backward,
    as_int64,
    at_autocast_dtype,
    check_counts,
    check_shape,
)

CHUNK_ROWS = 4096
"""Rows that are gathered, activated and added back at once on the CPU: few enough for the cache."""


def sparse_ffn(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    experts: ExpertWeights,
    row_TK: Tensor | None = None,
) -> Tensor:
    """(T, D) -> (T, D): out[t] = sum over the rows r with token_R[r] = t of weight_R[r] * expert(r)(x[t]).

    Rows are sorted by expert. Definition: `reference.sparse_ffn`. `row_TK`, the rows of every token, saves an
    accelerator from finding them.

    Raises:
        TypeError: `token_R` holds no whole numbers.
        ValueError: the shapes do not fit each other, or `tokens_per_expert_E` does not add up to the rows.
        IndexError: `token_R` names a token that there is not, on the CPU; an accelerator stops at its own assertion.
    """
    token_R = as_int64("token_R", token_R)
    check_shape("weight_R", weight_R, token_R.shape)
    if accelerator.can_run_rows(x_TD, experts):
        return accelerator.grouped_ffn(x_TD, token_R, weight_R, tokens_per_expert_E, row_TK, experts)
    (x_TD,), experts = at_autocast_dtype(x_TD), experts.at_autocast_dtype(x_TD.device.type)
    rows = (token_R, weight_R.to(x_TD.dtype), tokens_per_expert_E)
    if torch.compiler.is_compiling():
        return torch.ops.mixtura.sparse_ffn(x_TD, *rows, *experts)[0]
    if x_TD.is_cuda and _grouped_mm_runs(x_TD, experts):
        return _grouped(x_TD, *rows, experts)
    return _ExpertLoop.apply(x_TD, *rows, *experts)


def _grouped_mm_runs(x_TD: Tensor, experts: ExpertWeights) -> bool:
    """Whether torch's grouped GEMM accepts these operands: no float64, rows aligned to 16 bytes."""
    aligned = all(t.stride(-2) * t.element_size() % 16 == 0 for t in (x_TD, experts.up, experts.down))
    return aligned and x_TD.dtype in (torch.bfloat16, torch.float16) and experts.up.dtype == x_TD.dtype


def _grouped(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    up_EHD, down_EDF, activation, gated = experts
    ends_E = tokens_per_expert_E.cumsum(0).to(torch.int32)
    u_RH = F.grouped_mm(x_TD[token_R], up_EHD.transpose(1, 2), offs=ends_E)
    y_RD = F.grouped_mm(activate(u_RH, activation, gated), down_EDF.transpose(1, 2), offs=ends_E)
    return torch.zeros_like(x_TD).index_add(0, token_R, y_RD * weight_R.unsqueeze(-1))


def _chunks(counts: list[int]) -> Iterator[tuple[slice, range]]:
    """Rows and experts of consecutive chunks of about `CHUNK_ROWS` rows; an expert is never cut in two."""
    start = end = first = 0
    for expert, count in enumerate(counts):
        if end > start and end + count - start > CHUNK_ROWS:
            yield slice(start, end), range(first, expert)
            start, first = end, expert
        end += count
    yield slice(start, end), range(first, len(counts))


def _forward(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts: list[int],
    experts: ExpertWeights,
    in_c: bool,
) -> tuple[Tensor, Tensor]:
    """Output (T, D) and the first projection (R, H), which the backward pass needs, laid out as it likes in C."""
    if in_c:
        return native.forward(x_TD, token_R, weight_R, counts, experts)
    check_counts(counts, len(experts.up), len(token_R))
    up_EHD, down_EDF, activation, gated = experts
    out_TD = torch.zeros_like(x_TD)
    u_RH = x_TD.new_empty(len(token_R), up_EHD.size(1))
    up_DH, down_FD = up_EHD.transpose(1, 2).unbind(), down_EDF.transpose(1, 2).unbind()
    for rows, numbers in _chunks(counts):
        sizes = counts[numbers.start : numbers.stop]
        x_rD = x_TD.index_select(0, token_R[rows])
        for expert, x, u in zip(numbers, x_rD.split(sizes), u_RH[rows].split(sizes), strict=True):
            torch.mm(x, up_DH[expert], out=u)
        h_rF = activate(u_RH[rows], activation, gated).mul_(weight_R[rows].unsqueeze(-1))
        y_rD = x_rD  # the inputs are not needed again, and memory in use is in cache
        for expert, h, y in zip(numbers, h_rF.split(sizes), y_rD.split(sizes), strict=True):
            torch.mm(h, down_FD[expert], out=y)
        out_TD.index_add_(0, token_R[rows], y_rD)
    return out_TD, u_RH


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts: list[int],
    experts: ExpertWeights,
    u_RH: Tensor,
    in_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (T, D), weight (R,), up (E, H, D) and down (E, D, F); in C if the forward pass was."""
    if in_c:
        grads = native.backward(grad_TD, x_TD, token_R, weight_R, counts, experts, u_RH)
        assert grads[1] is not None, "there are weights"
        return grads[0], grads[1], *grads[2:]
    up_EHD, down_EDF, activation, gated = experts
    grad_x_TD = torch.zeros_like(x_TD)
    grad_weight_R = torch.empty_like(weight_R)
    grad_up_EHD, grad_down_EDF = torch.empty_like(up_EHD), torch.empty_like(down_EDF)
    up, down, grad_up, grad_down = (t.unbind() for t in (up_EHD, down_EDF, grad_up_EHD, grad_down_EDF))
    for rows, numbers in _chunks(counts):
        sizes = counts[numbers.start : numbers.stop]
        weight_r1, u_rH = weight_R[rows].unsqueeze(-1), u_RH[rows]
        grad_y_rD, x_rD = grad_TD.index_select(0, token_R[rows]), x_TD.index_select(0, token_R[rows])
        grad_h_rF = x_TD.new_empty(len(x_rD), down_EDF.size(2))
        for expert, grad_y, grad_h in zip(numbers, grad_y_rD.split(sizes), grad_h_rF.split(sizes), strict=True):
            torch.mm(grad_y, down[expert], out=grad_h)
        h_rF = activate(u_rH, activation, gated)
        # y = h @ down.T, so <grad_y, y> = <grad_y @ down, h>: the weight's gradient needs no second copy of y.
        torch.sum(grad_h_rF * h_rF, -1, out=grad_weight_R[rows])
        h_rF.mul_(weight_r1)
        grad_u_rH = activate_backward(grad_h_rF.mul_(weight_r1), u_rH, activation, gated)
        parts = (t.split(sizes) for t in (grad_y_rD, h_rF, grad_u_rH, x_rD))
        for expert, grad_y, h, grad_u, x in zip(numbers, *parts, strict=True):
            torch.mm(grad_y.T, h, out=grad_down[expert])
            torch.mm(grad_u.T, x, out=grad_up[expert])  # zeros for an expert without rows, as above
            torch.mm(grad_u, up[expert], out=grad_y)
        grad_x_TD.index_add_(0, token_R[rows], grad_y_rD)
    return grad_x_TD, grad_weight_R, grad_up_EHD, grad_down_EDF


class _ExpertLoop(torch.autograd.Function):
    """`_forward` and `_backward` tied together for autograd."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x_TD, token_R, weight_R, tokens_per_expert_E, *weights = arguments
        experts, counts = ExpertWeights(*weights), tokens_per_expert_E.tolist()
        in_c = _runs_in_c(x_TD, token_R, weight_R, experts)
        out_TD, u_RH = _forward(x_TD, token_R, weight_R, counts, experts, in_c)
        ctx.save_for_backward(x_TD, token_R, weight_R, experts.up, experts.down, u_RH)
        ctx.settings = (counts, (experts.activation, experts.gated), in_c)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, token_R, weight_R, up_EHD, down_EDF, u_RH = ctx.saved_tensors
        counts, kind, in_c = ctx.settings
        experts, grad_TD = ExpertWeights(up_EHD, down_EDF, *kind), grad_outputs[0].contiguous()
        grads = _backward(grad_TD, x_TD, token_R, weight_R, counts, experts, u_RH, in_c)
        return grads[0], None, grads[1], None, grads[2], grads[3], None, None


def _runs_in_c(x_TD: Tensor, token_R: Tensor, weight_R: Tensor, experts: ExpertWeights) -> bool:
    return native.can_run(experts.activation, x_TD, weight_R, experts.up, experts.down) and native.can_read(
        token_R, dtype=torch.int64
    )


# torch.compile cannot trace a loop whose bounds are data, so it sees the two passes as opaque operators.
@torch.library.custom_op("mixtura::sparse_ffn", mutates_args=())
def _sparse_ffn_op(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    experts, counts = ExpertWeights(up_EHD, down_EDF, activation, gated), tokens_per_expert_E.tolist()
    return _forward(x_TD, token_R, weight_R, counts, experts, _op_is_in_c(x_TD, token_R, weight_R, experts))


def _op_is_in_c(x_TD: Tensor, token_R: Tensor, weight_R: Tensor, experts: ExpertWeights) -> bool:
    """As `_runs_in_c`, without asking who counts FLOPs: that may change between the passes, which must agree."""
    known = experts.activation in native.ACTIVATIONS and native.can_read(token_R, dtype=torch.int64)
    return known and native.can_read(x_TD, weight_R, experts.up, experts.down)


@_sparse_ffn_op.register_fake
def _(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(token_R.size(0), up_EHD.size(1))


@torch.library.custom_op("mixtura::sparse_ffn_backward", mutates_args=())
def _sparse_ffn_backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    u_RH: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, counts = ExpertWeights(up_EHD, down_EDF, activation, gated), tokens_per_expert_E.tolist()
    in_c = _op_is_in_c(x_TD, token_R, weight_R, experts)
    return _backward(grad_TD, x_TD, token_R, weight_R, counts, experts, u_RH, in_c)


@_sparse_ffn_backward_op.register_fake
def _(
    grad_TD: Tensor,
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    u_RH: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(weight_R), torch.empty_like(up_EHD), torch.empty_like(down_EDF)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, gated = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.settings = (activation, gated)


def _op_backward(ctx: Any, grad_TD: Tensor, _grad_u: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mixtura.sparse_ffn_backward(grad_TD.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return grads[0], None, grads[1], None, grads[2], grads[3], None, None


_sparse_ffn_op.register_autograd(_op_backward, setup_context=_save_for_op)
