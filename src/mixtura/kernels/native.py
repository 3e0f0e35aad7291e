"""The experts in C, for float32 on the CPU: `native*.c`, compiled on first use by the machine's own compiler.

The library is kept in the cache folder and named by a hash of its source, the compiler and the processor, so that a
home folder shared by several machines holds one for each.

Between the products torch makes a pass over memory for every operation. `native.c` makes one, over a block of rows that
is in cache, and calls the products as torch does, through BLAS's `sgemm` in torch's own library. For experts of few
rows, at which `sgemm` is slow, it has products of its own (`native_tiles.h`). Where there is no compiler or no such
function, or with MIXTURA_NATIVE=0, `sparse` and `dense` run their torch paths. Results differ from theirs by rounding:
sums are in another order, and the exponential of SiLU is a polynomial.

Shapes: R rows sorted by expert, T tokens, E experts, D hidden, F expert width, H = 2F when gated else F, N groups, G
tokens of a group, C mixtures an expert has in a group.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mixtura.files import cache_folder, replacing
from mixtura.kernels.expert_weights import ExpertWeights, check_counts, check_shape, refuse

_SOURCES = sorted(Path(__file__).parent.glob("native*.c"))
_HEADERS = sorted(Path(__file__).parent.glob("native*.h"))
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had."""
    if os.environ.get("MIXTURA_NATIVE") == "0" or sgemm() is None:
        return None
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, cache_folder() / "native")))
    except (OSError, subprocess.SubprocessError):
        return None  # an unwritable cache, or a compiler that does not know the flags: torch does it


def call(name: str, *arguments: Any) -> int:
    """Calls a function of the library and returns what it returns, which is 0 where it has nothing to complain about.

    `native.can_run` says before whether there is a library.
    """
    native = library()
    assert native is not None, "ask `can_run` first"
    return getattr(native, name)(*arguments)


@functools.cache
def sgemm() -> int | None:
    """Address of BLAS's `sgemm` in torch's own library, which builds with MKL or OpenBLAS inside export."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "sgemm_", None)
            return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None


def _compiled(compiler: str, folder: Path) -> Path:
    """The shared library for this source, compiler and processor; compiled unless it is there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    source = b"".join(path.read_bytes() for path in [*_SOURCES, *_HEADERS])
    digest = hashlib.blake2b(source + version + _processor() + " ".join(_FLAGS).encode(), digest_size=12)
    path = folder / f"{digest.hexdigest()}.so"
    if not path.exists():
        with replacing(path) as made:  # whole or not at all: other processes may be compiling it too
            command = [compiler, *_FLAGS, "-o", str(made), *map(str, _SOURCES)]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
    return path


def _processor() -> bytes:
    """What -march=native depends on: a folder may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="ascii", errors="replace").splitlines() if info.exists() else []
    named = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(named)]).encode()


ACTIVATIONS = {"relu": 0, "silu": 1}
BLOCK_ROWS = 256
"""Rows of a block: fewer make slow products, and more leave the cache (measured from 128 to 2,048)."""
LARGE_WEIGHTS, MOST_ROWS, SCRATCH_BYTES = 2 << 20, 2048, 64 << 20
"""Weights of an expert, in bytes, that leave the cache themselves: every block reads them, and adds to their gradients,
in memory. Blocks then have as many rows as a thread's scratch holds, up to `MOST_ROWS`."""
SUMMING_THREADS = 8
"""Threads that each add to an output of their own, which takes that many times the memory; with more, they share the
work on one expert after the other."""


def can_run(activation: str, *tensors: Tensor) -> bool:
    """Whether the C code can run these: contiguous float32 on the CPU, and an activation that it knows."""
    return activation in ACTIVATIONS and can_read(*tensors) and not _counts_flops()


def can_read(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
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
    experts: ExpertWeights,
) -> tuple[Tensor, Tensor]:
    """Output, of the shape of x, and the first projection (R, H): as `sparse._forward`.

    Without `token_R` row r of x is expert row r, all weights are 1, and x may have any leading axes.
    """
    struct = _Experts(x, token_R, weight_R, counts, experts)
    u_RH = x.new_empty(sum(counts), experts.up.size(1))
    out = torch.empty_like(x) if token_R is None else torch.zeros_like(x)
    struct.call("mixtura_experts_forward", u_RH, out)
    return out, u_RH


def backward(
    grad: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    weight_R: Tensor | None,
    counts: Sequence[int],
    experts: ExpertWeights,
    u_RH: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of the weights (R,) if there are any, of up (E, H, D) and of down (E, D, F)."""
    struct = _Experts(x, token_R, weight_R, counts, experts)
    grad_x = torch.empty_like(x) if token_R is None else torch.zeros_like(x)
    grad_weight_R = None if weight_R is None else torch.empty_like(weight_R)
    grad_up_EHD, grad_down_EDF = torch.empty_like(experts.up), torch.empty_like(experts.down)
    struct.call("mixtura_experts_backward", u_RH, grad, grad_x, grad_weight_R, grad_up_EHD, grad_down_EDF)
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
    tokens, rows = (groups, group_size, hidden), (experts, groups * mixtures, hidden)
    check_shape("The input", x, tokens if name == "mixtura_mix" else rows)
    if other is not None:
        check_shape("The other input", other, rows if name == "mixtura_mix" else tokens)
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
        experts: ExpertWeights,
    ) -> None:
        num_experts, hidden, width = experts.sizes
        experts.check(x.size(-1))
        rows = x.numel() // hidden if token_R is None else len(token_R)
        check_counts(counts, num_experts, rows)
        floats = 3 * hidden + 2 * width + experts.up.size(1)
        threads, tokens = torch.get_num_threads(), x.numel() // hidden
        block = block_rows(4 * width * hidden * (3 if experts.gated else 2), 4 * floats)
        scratch = x.new_empty(threads * block * floats)
        others = None
        if token_R is not None and 1 < threads <= SUMMING_THREADS:
            others = x.new_empty(threads - 1, tokens, hidden)
        counts_E = (ctypes.c_int64 * num_experts)(*counts)
        self._token_R, self._tokens = token_R, tokens
        self._alive: tuple[Any, ...] = (scratch, others, counts_E, weight_R, x, experts)
        tensors = (token_R, weight_R, x, experts.up, experts.down, scratch, others)
        addresses = (ctypes.addressof(counts_E), *_addresses(*tensors))
        numbers = (threads, block, num_experts, hidden, width, experts.gated, ACTIVATIONS[experts.activation], tokens)
        self._struct = ExpertsStruct(sgemm(), *numbers, *addresses)

    def call(self, name: str, *tensors: Tensor | None) -> None:
        """Calls that function; raises IndexError for a token that there is not, before anything is read or written."""
        if call(name, ctypes.byref(self._struct), *pointers(*tensors)):
            assert self._token_R is not None, "rows without an index are all in range"
            refuse("token_R", self._token_R, self._tokens)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Addresses as C functions take them; the tensors must outlive the call."""
    return [ctypes.c_void_p(address) for address in _addresses(*tensors)]
