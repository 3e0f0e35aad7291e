"""The experts in C, for float32 on the CPU: `native*.c`, compiled on first use by the machine's own compiler.

Between the products torch makes a pass over memory for every operation; `native.c` makes one, over a block of rows that
is in cache, and calls the products as torch does, through BLAS's `sgemm` in torch's own library. For experts of few
rows, at which `sgemm` is slow, it has products of its own (`native_tiles.h`). Where there is no compiler or no such
function, or with MIXTURA_NATIVE=0, `sparse` and `dense` run their torch paths. Results differ from theirs by rounding:
sums are in another order, and the exponential of SiLU is a polynomial.

Shapes: R rows sorted by expert, T tokens, E experts, D hidden, F expert width, H = 2F when gated else F, N groups, G
tokens of a group, C mixtures an expert has in a group.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mixtura.kernels.compiled import call, library, sgemm

ACTIVATIONS = {"relu": 0, "silu": 1}
BLOCK_ROWS = 256
"""Rows of a block: fewer make slow products, and more leave the cache (measured from 128 to 2,048)."""
LARGE_WEIGHTS, MOST_ROWS, SCRATCH_BYTES = 2 << 20, 2048, 64 << 20
"""Weights of an expert, in bytes, that leave the cache themselves: every block reads them, and adds to their gradients,
in memory. Blocks then have as many rows as a thread's scratch holds, up to `MOST_ROWS`."""
SUMMING_THREADS = 8
"""Threads that each add to an output of their own, which takes that many times the memory; with more, they share the
work on one expert after the other."""


def takes(activation: str, *tensors: Tensor) -> bool:
    """Whether the C code can run these: contiguous float32 on the CPU, and an activation that it knows."""
    return activation in ACTIVATIONS and reads(*tensors) and not _counts_flops()


def reads(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether there is C code and it can read these: contiguous, of that type and on the CPU."""
    if torch.compiler.is_compiling() or library() is None:
        return False
    for t in tensors:  # written out, as a decoding step asks often
        # Tensors that stand for others, as those of a graph being traced do, have no memory to point at.
        if t.dtype is not dtype or type(t) not in (Tensor, torch.nn.Parameter):
            return False
        if not (t.is_cpu and t.is_contiguous()):
            return False
    return True


def _counts_flops() -> bool:
    """Whether somebody counts FLOPs, which is done by watching torch's operators: C code costs nothing there."""
    if torch._C._len_torch_dispatch_stack() == 0:  # quicker than the list of nothing
        return False
    return any("FlopCounter" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


def forward(
    x: Tensor,
    token_R: Tensor | None,
    weight_R: Tensor | None,
    counts: Sequence[int],
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Output, of the shape of x, and the first projection (R, H): as `sparse._forward`.

    Without `token_R` row r of x is expert row r, all weights are 1, and x may have any leading axes.
    """
    experts = _Experts(x, token_R, weight_R, counts, up_EHD, down_EDF, activation, gated)
    u_RH = x.new_empty(sum(counts), up_EHD.size(1))
    out = torch.empty_like(x) if token_R is None else torch.zeros_like(x)
    call("mixtura_experts_forward", experts.pointer, *pointers(u_RH, out))
    return out, u_RH


def backward(
    grad: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    weight_R: Tensor | None,
    counts: Sequence[int],
    up_EHD: Tensor,
    down_EDF: Tensor,
    u_RH: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of the weights (R,) if there are any, of up (E, H, D) and of down (E, D, F)."""
    experts = _Experts(x, token_R, weight_R, counts, up_EHD, down_EDF, activation, gated)
    grad_x = torch.empty_like(x) if token_R is None else torch.zeros_like(x)
    grad_weight_R = None if weight_R is None else torch.empty_like(weight_R)
    grad_up_EHD, grad_down_EDF = torch.empty_like(up_EHD), torch.empty_like(down_EDF)
    outputs = pointers(u_RH, grad, grad_x, grad_weight_R, grad_up_EHD, grad_down_EDF)
    call("mixtura_experts_backward", experts.pointer, *outputs)
    return grad_x, grad_weight_R, grad_up_EHD, grad_down_EDF


def mix(weight_NGEC: Tensor, x_NGD: Tensor, other_ERD: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Mixtures (E, N*C, D) of the groups' tokens, as `dense.mix`.

    With `other_ERD` also the gradient of `dense.spread`'s weights (N, G, E, C), if x is that of its output and `other`
    was its input: both read the same tokens.
    """
    _, _, experts, mixtures = weight_NGEC.shape
    z_ERD = x_NGD.new_empty(experts, len(x_NGD) * mixtures, x_NGD.size(-1))
    inner = None if other_ERD is None else torch.empty_like(weight_NGEC)
    _mix_or_spread("mixtura_mix", weight_NGEC, x_NGD, z_ERD, other_ERD, inner)
    return z_ERD, inner


def spread(weight_NGEC: Tensor, y_ERD: Tensor, other_NGD: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Tokens (N, G, D), the experts' outputs weighted, as `dense.spread`.

    With `other_NGD` also the gradient of `dense.mix`'s weights (N, G, E, C), if y is that of its output and `other` was
    its input.
    """
    out_NGD = y_ERD.new_empty(*weight_NGEC.shape[:2], y_ERD.size(-1))
    inner = None if other_NGD is None else torch.empty_like(weight_NGEC)
    _mix_or_spread("mixtura_spread", weight_NGEC, y_ERD, out_NGD, other_NGD, inner)
    return out_NGD, inner


def _mix_or_spread(name: str, weight_NGEC: Tensor, x: Tensor, out: Tensor, other: Tensor | None, inner: Any) -> None:
    groups, group_size, experts, mixtures = weight_NGEC.shape
    hidden, threads = x.size(-1), torch.get_num_threads()
    scratch = x.new_empty(threads * experts * mixtures * hidden)
    sizes = (threads, groups, group_size, experts, mixtures, hidden)
    struct = _Mixing(sgemm(), *sizes, scratch.data_ptr())
    call(name, ctypes.byref(struct), *pointers(weight_NGEC, x, out, other, inner))


def block_rows(weight_bytes: int, scratch_bytes: int) -> int:
    """Rows of a block, given the bytes of an expert's weights and those of scratch for a row."""
    if weight_bytes <= LARGE_WEIGHTS:
        return BLOCK_ROWS
    return max(BLOCK_ROWS, min(MOST_ROWS, SCRATCH_BYTES // scratch_bytes))


class ExpertsStruct(ctypes.Structure):
    """`experts_t` of native_experts.h, field by field."""

    _fields_ = (
        ("sgemm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("threads", "block", "experts", "hidden", "width", "gated", "activation")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("counts", "token", "weight", "x", "up", "down", "scratch", "others")),
    )


class _Mixing(ctypes.Structure):
    """`mixing_t` of native_mixing.c, field by field."""

    _fields_ = (
        ("sgemm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("threads", "groups", "group_size", "experts", "mixtures", "hidden")),
        ("scratch", ctypes.c_void_p),
    )


class _Experts:
    """The experts and rows of one call, and what must stay alive while it runs."""

    def __init__(
        self,
        x: Tensor,
        token_R: Tensor | None,
        weight_R: Tensor | None,
        counts: Sequence[int],
        up_EHD: Tensor,
        down_EDF: Tensor,
        activation: str,
        gated: bool,
    ) -> None:
        experts, hidden, width = down_EDF.shape
        floats = 3 * hidden + 2 * width + up_EHD.size(1)
        threads, tokens = torch.get_num_threads(), x.numel() // hidden
        block = block_rows(4 * width * hidden * (3 if gated else 2), 4 * floats)
        scratch = x.new_empty(threads * block * floats)
        others = None
        if token_R is not None and 1 < threads <= SUMMING_THREADS:
            others = x.new_empty(threads - 1, tokens, hidden)
        counts_E = (ctypes.c_int64 * experts)(*counts)
        self._alive: tuple[Any, ...] = (scratch, others, counts_E, token_R, weight_R, x, up_EHD, down_EDF)
        addresses = (ctypes.addressof(counts_E), *_addresses(token_R, weight_R, x, up_EHD, down_EDF, scratch, others))
        numbers = (threads, block, experts, hidden, width, gated, ACTIVATIONS[activation], tokens)
        self._struct = ExpertsStruct(sgemm(), *numbers, *addresses)
        self.pointer = ctypes.byref(self._struct)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Addresses as C functions take them; the tensors must outlive the call."""
    return [ctypes.c_void_p(address) for address in _addresses(*tensors)]
