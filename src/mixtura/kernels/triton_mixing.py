"""Mixture of tokens in Triton: the softmax over a group is taken where the tokens are summed up, and never stored.

Dispatch and combine weights are exp(logit - the group's log-sum-exp), so what mixing and spreading read is the logits
and one number a mixture. Groups are found by strides: tokens of different examples form a group without being copied
together. Both directions and both gradients are made of three kernels: sums over a group, sums over the mixtures, and
the gradient of the logits. Products accumulate in float32, and those of float32 are not rounded to TF32.

Imported where Triton is installed only; `accelerator.py` decides what runs. Definitions: `reference.mix` and
`reference.spread` of a softmax over the group.

Shapes: O outer and P inner places of a group, N = O*P groups, G tokens of a group, E experts, C mixtures an expert has
in a group, S = E*C, D hidden.
"""

# Triton may be absent, and a kernel is more than the function it is written as.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_GROUP_BYTES = 512
"""Bytes of one column of a group, 256 tokens of 16 bits: a program holds a group whole, in 99 KiB of shared memory."""


def can_run_group(x_OPGD: Tensor) -> bool:
    """Whether the kernels run these groups: their size, their dtype, and a hidden axis without gaps."""
    known = x_OPGD.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and x_OPGD.size(2) * x_OPGD.element_size() <= MOST_GROUP_BYTES and x_OPGD.stride(3) == 1


def mix_groups(x_OPGD: Tensor, logits_OPGS: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Mixtures (E, N*C, D), and the log-sum-exp (N, S) of the float32 logits over each group, which has no gradient.

    Both inputs may have any strides over places and tokens, C is `num_slots`.
    """
    return torch.ops.mixtura.mix_groups(x_OPGD, logits_OPGS, num_slots)


def spread_groups(y_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> Tensor:
    """(E, N*C, D) expert outputs -> (O, P, G, D), each token's sum weighted by the softmax over its group.

    The output lies in memory as the logits do, so that groups of different examples are put back without a copy.
    """
    return torch.ops.mixtura.spread_groups(y_ERD, logits_OPGS, lse_NS, num_slots)


@triton.jit
def _load_logits(logits_ptr, n, P, G, S, g, s, stride_o, stride_p, stride_g):
    """The logits (G, S) of group n in float32: minus infinity beyond the group, zero beyond the mixtures."""
    at = logits_ptr + (n // P) * stride_o + (n % P) * stride_p + g[:, None] * stride_g + s[None, :]
    inside = (g < G)[:, None] & (s < S)[None, :]
    logits = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where((s < S)[None, :], logits, 0.0)


@triton.jit
def _mix_kernel(
    x_ptr, logits_ptr, lse_ptr, z_ptr, P, G, S, D, C, rows,
    x_o, x_p, x_g, logits_o, logits_p, logits_g,
    LSE_KNOWN: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z[s, n] = sum over g of exp(logits[n, g, s] - lse[n, s]) * x[n, g]; finds the log-sum-exp where it is unknown."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    logits = _load_logits(logits_ptr, n, P, G, S, g, s, logits_o, logits_p, logits_g)
    if LSE_KNOWN:
        lse = tl.load(lse_ptr + n * S + s, mask=s < S, other=0.0)
    else:
        # The largest logit is taken out before the exponential, which would overflow. Lanes beyond the mixtures hold
        # zeros, since a column of minus infinity alone would give NaN here.
        top = tl.max(logits, 0)
        lse = top + tl.log(tl.sum(tl.exp(logits - top[None, :]), 0))
        tl.store(lse_ptr + n * S + s, lse, mask=s < S)
    weight = tl.exp(logits - lse[None, :]).to(x_ptr.dtype.element_ty)
    # The group is summed over by a product, weights (S, G) with tokens (G, D): tensor cores do it, a sum does not use
    # them.
    turned = tl.trans(weight)
    x_rows = x_ptr + (n // P) * x_o + (n % P) * x_p + g[:, None] * x_g
    z_rows = z_ptr + ((s // C).to(tl.int64) * rows + n * C + s % C)[:, None] * D
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
        z = tl.dot(turned, x, input_precision="ieee")
        tl.store(z_rows + d[None, :], z.to(z_ptr.dtype.element_ty), mask=(s < S)[:, None] & (d < D)[None, :])


@triton.jit
def _spread_kernel(
    y_ptr, logits_ptr, lse_ptr, out_ptr, P, G, S, D, C, rows,
    out_o, out_p, out_g, logits_o, logits_p, logits_g,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, g] = sum over s of exp(logits[n, g, s] - lse[n, s]) * y[s, n]."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    total = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        logits = _load_logits(logits_ptr, n, P, G, S, g, s, logits_o, logits_p, logits_g)
        lse = tl.load(lse_ptr + n * S + s, mask=s < S, other=0.0)
        weight = tl.exp(logits - lse[None, :]).to(y_ptr.dtype.element_ty)
        y_rows = y_ptr + ((s // C).to(tl.int64) * rows + n * C + s % C)[:, None] * D
        y = tl.load(y_rows + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.dot(weight, y, input_precision="ieee")
    out_rows = out_ptr + (n // P) * out_o + (n % P) * out_p + g[:, None] * out_g
    tl.store(out_rows + d[None, :], total.to(out_ptr.dtype.element_ty), mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit
def _grad_logits_kernel(
    a_ptr, b_ptr, logits_ptr, lse_ptr, grad_ptr, P, G, S, D, C, rows,
    a_o, a_p, a_g, logits_o, logits_p, logits_g, grad_o, grad_p, grad_g,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w * (q - sum over g of w * q) with w the softmax over the group and q[n, g, s] = <a[n, g], b[s, n]>."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    a_rows = a_ptr + (n // P) * a_o + (n % P) * a_p + g[:, None] * a_g
    b_rows = b_ptr + ((s // C).to(tl.int64) * rows + n * C + s % C)[:, None] * D
    grad_weight = tl.zeros([BLOCK_G, BLOCK_S], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        a = tl.load(a_rows + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(b_rows + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0.0)
        grad_weight += tl.dot(a, tl.trans(b), input_precision="ieee")
    logits = _load_logits(logits_ptr, n, P, G, S, g, s, logits_o, logits_p, logits_g)
    lse = tl.load(lse_ptr + n * S + s, mask=s < S, other=0.0)
    weight = tl.exp(logits - lse[None, :])
    # The derivative of a softmax needs no stored weight: it is computed again from the logits and one number a mixture.
    grad = weight * (grad_weight - tl.sum(weight * grad_weight, 0)[None, :])
    at = grad_ptr + (n // P) * grad_o + (n % P) * grad_p + g[:, None] * grad_g + s[None, :]
    tl.store(at, grad, mask=(g < G)[:, None] & (s < S)[None, :])


def _blocks(x: Tensor, group_size: int, num_mixtures: int) -> dict[str, int]:
    """Sizes of the blocks and warps of a program: untuned, chosen so that a group fits beside its mixtures."""
    group = max(16, triton.next_power_of_2(group_size))
    return {
        "BLOCK_G": group,
        "BLOCK_S": min(32 if group > 64 else 64, max(16, triton.next_power_of_2(num_mixtures))),
        "BLOCK_D": 64 if x.element_size() == 2 else 32,
        "num_warps": 8 if group > 64 else 4,
    }


def _unit_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_places(logits_OPGS: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An (O, P, G, width) tensor whose memory is in the order of the logits': places first, or outer places last."""
    outer, inner, group, _ = logits_OPGS.shape
    if logits_OPGS.stride(0) < logits_OPGS.stride(2):
        return logits_OPGS.new_empty(inner, group, outer, width, dtype=dtype).permute(2, 0, 1, 3)
    return logits_OPGS.new_empty(outer, inner, group, width, dtype=dtype)


def _sum_groups(x_OPGD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor | None, num_slots: int) -> tuple[Tensor, Tensor]:
    outer, inner, group, num_mixtures = logits_OPGS.shape
    groups, hidden = outer * inner, x_OPGD.size(3)
    rows = groups * num_slots
    z_ERD = x_OPGD.new_empty(num_mixtures // num_slots, rows, hidden)
    known = lse_NS is not None
    lse_NS = lse_NS if known else logits_OPGS.new_empty(groups, num_mixtures, dtype=torch.float32)
    blocks = _blocks(x_OPGD, group, num_mixtures)
    _mix_kernel[groups, triton.cdiv(num_mixtures, blocks["BLOCK_S"])](
        x_OPGD, logits_OPGS, lse_NS, z_ERD, inner, group, num_mixtures, hidden, num_slots, rows,
        *x_OPGD.stride()[:3], *logits_OPGS.stride()[:3], LSE_KNOWN=known, **blocks,
    )  # fmt: skip
    return z_ERD, lse_NS


def _sum_mixtures(y_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> Tensor:
    outer, inner, group, num_mixtures = logits_OPGS.shape
    hidden = y_ERD.size(2)
    out_OPGD = _empty_places(logits_OPGS, hidden, y_ERD.dtype)
    blocks = _blocks(y_ERD, group, num_mixtures)
    _spread_kernel[outer * inner, triton.cdiv(hidden, blocks["BLOCK_D"])](
        y_ERD, logits_OPGS, lse_NS, out_OPGD, inner, group, num_mixtures, hidden, num_slots, y_ERD.size(1),
        *out_OPGD.stride()[:3], *logits_OPGS.stride()[:3], **blocks,
    )  # fmt: skip
    return out_OPGD


def _grad_logits(a_OPGD: Tensor, b_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> Tensor:
    outer, inner, group, num_mixtures = logits_OPGS.shape
    grad_OPGS = _empty_places(logits_OPGS, num_mixtures, torch.float32)
    blocks = _blocks(a_OPGD, group, num_mixtures)
    _grad_logits_kernel[outer * inner, triton.cdiv(num_mixtures, blocks["BLOCK_S"])](
        a_OPGD, b_ERD, logits_OPGS, lse_NS, grad_OPGS,
        inner, group, num_mixtures, a_OPGD.size(3), num_slots, b_ERD.size(1),
        *a_OPGD.stride()[:3], *logits_OPGS.stride()[:3], *grad_OPGS.stride()[:3], **blocks,
    )  # fmt: skip
    return grad_OPGS


# Opaque operators: torch.compile and CUDA graphs take them as they are.
@torch.library.custom_op("mixtura::mix_groups", mutates_args=())
def _mix_op(x_OPGD: Tensor, logits_OPGS: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    return _sum_groups(_unit_last(x_OPGD), _unit_last(logits_OPGS), None, num_slots)


@_mix_op.register_fake
def _(x_OPGD: Tensor, logits_OPGS: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    outer, inner, _, num_mixtures = logits_OPGS.shape
    z_ERD = x_OPGD.new_empty(num_mixtures // num_slots, outer * inner * num_slots, x_OPGD.size(3))
    return z_ERD, logits_OPGS.new_empty(outer * inner, num_mixtures, dtype=torch.float32)


@torch.library.custom_op("mixtura::mix_groups_backward", mutates_args=())
def _mix_backward_op(
    grad_ERD: Tensor, x_OPGD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    grad_ERD, logits_OPGS = grad_ERD.contiguous(), _unit_last(logits_OPGS)
    grad_logits_OPGS = _grad_logits(_unit_last(x_OPGD), grad_ERD, logits_OPGS, lse_NS, num_slots)
    return _sum_mixtures(grad_ERD, logits_OPGS, lse_NS, num_slots), grad_logits_OPGS


@_mix_backward_op.register_fake
def _(grad_ERD: Tensor, x_OPGD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    logits_OPGS = _unit_last(logits_OPGS)
    grad_x_OPGD = _empty_places(logits_OPGS, x_OPGD.size(3), x_OPGD.dtype)
    return grad_x_OPGD, _empty_places(logits_OPGS, logits_OPGS.size(3), torch.float32)


@torch.library.custom_op("mixtura::spread_groups", mutates_args=())
def _spread_op(y_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> Tensor:
    return _sum_mixtures(y_ERD.contiguous(), _unit_last(logits_OPGS), lse_NS.contiguous(), num_slots)


@_spread_op.register_fake
def _(y_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> Tensor:
    return _empty_places(_unit_last(logits_OPGS), y_ERD.size(2), y_ERD.dtype)


@torch.library.custom_op("mixtura::spread_groups_backward", mutates_args=())
def _spread_backward_op(
    grad_OPGD: Tensor, y_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    grad_OPGD, logits_OPGS, lse_NS = _unit_last(grad_OPGD), _unit_last(logits_OPGS), lse_NS.contiguous()
    grad_logits_OPGS = _grad_logits(grad_OPGD, y_ERD.contiguous(), logits_OPGS, lse_NS, num_slots)
    return _sum_groups(grad_OPGD, logits_OPGS, lse_NS, num_slots)[0], grad_logits_OPGS


@_spread_backward_op.register_fake
def _(grad_OPGD: Tensor, y_ERD: Tensor, logits_OPGS: Tensor, lse_NS: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    logits_OPGS = _unit_last(logits_OPGS)
    return y_ERD.new_empty(y_ERD.shape), _empty_places(logits_OPGS, logits_OPGS.size(3), torch.float32)


def _save_for_mix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_OPGD, logits_OPGS, ctx.num_slots = inputs
    ctx.save_for_backward(x_OPGD, logits_OPGS, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _mix_backward(ctx: Any, grad_ERD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *torch.ops.mixtura.mix_groups_backward(grad_ERD, *ctx.saved_tensors, ctx.num_slots), None


def _save_for_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_slots = inputs
    ctx.save_for_backward(*tensors)


def _spread_backward(ctx: Any, grad_OPGD: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.mixtura.spread_groups_backward(grad_OPGD, *ctx.saved_tensors, ctx.num_slots), None, None


_mix_op.register_autograd(_mix_backward, setup_context=_save_for_mix)
_spread_op.register_autograd(_spread_backward, setup_context=_save_for_spread)
