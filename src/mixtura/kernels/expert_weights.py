"""What kernels take: the weights of a layer's experts, their activation, and checks before compiled code is entered.

`ExpertWeights` is one value in place of four arguments to every kernel.

Indices are checked because compiled code follows them wherever they point. Python refuses an index that is out of
range; C reads or writes past the end of an array, and takes the bytes of int32 for half as many int64. So the dtype is
brought to int64 here. Whether every index is in range is found out by the functions in C, which return it: that costs
less than two reductions by torch.

Shapes: E experts, D hidden, F expert width, R rows, H = 2F when gated (gate rows first, as `gate_up_proj` of Hugging
Face), else F.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F


class ExpertWeights(NamedTuple):
    """E feed-forward networks f_e(x) = down_e(act(up_e(x))), or down_e(act(gate_e(x)) * up_e(x)) when gated.

    A tuple, so that `*experts` hands its tensors to autograd functions and operators, which see no tensor inside
    another object.
    """

    up: Tensor
    """(E, H, D): the first projection, gate and up stacked when gated."""
    down: Tensor
    """(E, D, F): the second projection."""
    activation: str
    """One of "relu", "gelu", "gelu_tanh" and "silu"."""
    gated: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of experts E, hidden size D and expert width F."""
        experts, hidden, width = self.down.shape
        return experts, hidden, width

    def at_autocast_dtype(self, device: str) -> "ExpertWeights":
        """These in autocast's dtype where autocast is on for that type of device, else unchanged."""
        if not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        return self._replace(up=self.up.to(dtype), down=self.down.to(dtype))

    def check(self, hidden_size: int) -> None:
        """Raises ValueError unless the two projections fit each other and tokens of that size: C reads what it is told.

        The message names the shapes.
        """
        experts, hidden, width = self.down.shape
        if self.up.shape != (experts, 2 * width if self.gated else width, hidden) or hidden != hidden_size:
            kind = "gated" if self.gated else "not gated"
            raise ValueError(
                f"The experts' projections have shapes {tuple(self.up.shape)} and {tuple(self.down.shape)} for tokens "
                f"of {hidden_size} numbers, and the experts are {kind}: they must be (experts, "
                f"{'2 * ' if self.gated else ''}width, {hidden_size}) and (experts, {hidden_size}, width)."
            )


def at_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, else unchanged."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def as_int64(name: str, index: Tensor) -> Tensor:
    """The index as contiguous int64, which is itself if it is that already.

    Raises:
        TypeError: it holds no whole numbers.
    """
    if index.dtype is not torch.int64:
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype is torch.bool:
            raise TypeError(f"{name} has dtype {index.dtype}: indices must be whole numbers, such as torch.int64.")
        index = index.to(torch.int64)
    return index if index.is_contiguous() else index.contiguous()


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has that shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {shape}.")


def check_counts(counts: Sequence[int], num_experts: int, rows: int) -> None:
    """Raises ValueError unless there is a count of rows for every expert, none negative, and all add up to the rows."""
    if len(counts) != num_experts or sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(
            f"tokens_per_expert_E is {list(counts)} for {num_experts} experts and {rows} rows: it must have one count "
            "for each expert, and they must add up to the rows."
        )


def refuse(name: str, index: Tensor, limit: int) -> NoReturn:
    """Raises IndexError for an index of which some number is not in range(limit), and names one of those."""
    outside = index[(index < 0) | (index >= limit)]
    raise IndexError(f"{name} contains {outside[0].item()}: every index must lie between 0 and {limit - 1}.")


Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),  # of T5 1.1 and mT5, which call it gelu_new
    "silu": F.silu,
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "relu": lambda grad, u, **out: torch.ops.aten.threshold_backward(grad, u, 0, **out),
    "gelu": lambda grad, u, **out: torch.ops.aten.gelu_backward(grad, u, **out),
    "gelu_tanh": lambda grad, u, **out: torch.ops.aten.gelu_backward(grad, u, approximate="tanh", **out),
    "silu": lambda grad, u, **out: torch.ops.aten.silu_backward(grad, u, **out),
}


def check_activation(name: str) -> None:
    """Raises ValueError unless `name` is an activation of this module."""
    if name not in _FORWARD:
        raise ValueError(f"activation is {name!r}: it must be one of {', '.join(_FORWARD)}.")


def activate(u_RH: Tensor, activation: str, gated: bool) -> Tensor:
    """(R, H) projected rows -> (R, F) activated rows: act(u), or act(gate) * up when gated."""
    if not gated:
        return _FORWARD[activation](u_RH)
    gate_RF, up_RF = u_RH.chunk(2, dim=-1)
    return _FORWARD[activation](gate_RF) * up_RF


def activate_backward(grad_RF: Tensor, u_RH: Tensor, activation: str, gated: bool) -> Tensor:
    """Gradient of `activate` with respect to its input: (R, F), (R, H) -> (R, H).

    Both halves of a gated gradient are written where they belong: putting them together afterwards is one more pass
    over the widest tensor of the layer. torch.compile takes no half of a tensor to write to, and saves the pass itself.
    """
    if not gated:
        return _BACKWARD[activation](grad_RF, u_RH)
    gate_RF, up_RF = u_RH.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        grad_up_RF = grad_RF * _FORWARD[activation](gate_RF)
        return torch.cat([_BACKWARD[activation](grad_RF * up_RF, gate_RF), grad_up_RF], dim=-1)
    grad_u_RH = torch.empty_like(u_RH)
    grad_gate_RF, grad_up_RF = grad_u_RH.chunk(2, dim=-1)
    torch.mul(grad_RF, _FORWARD[activation](gate_RF), out=grad_up_RF)
    _BACKWARD[activation](grad_RF * up_RF, gate_RF, grad_input=grad_gate_RF)
    return grad_u_RH
