"""Activations of the experts and their derivatives, gated or not, by name.

Shapes: R rows, F expert width, H = 2F when gated (gate columns first, as `gate_up_proj` of Hugging Face), else F.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "silu"]

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "relu": lambda grad, u, out: torch.ops.aten.threshold_backward(grad, u, 0, grad_input=out),
    "gelu": lambda grad, u, out: torch.ops.aten.gelu_backward(grad, u, grad_input=out),
    "silu": lambda grad, u, out: torch.ops.aten.silu_backward(grad, u, grad_input=out),
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
    over the widest tensor of the layer.
    """
    grad_u_RH = torch.empty_like(u_RH)
    if not gated:
        return _BACKWARD[activation](grad_RF, u_RH, grad_u_RH)
    gate_RF, up_RF = u_RH.chunk(2, dim=-1)
    grad_gate_RF, grad_up_RF = grad_u_RH.chunk(2, dim=-1)
    torch.mul(grad_RF, _FORWARD[activation](gate_RF), out=grad_up_RF)
    _BACKWARD[activation](grad_RF * up_RF, gate_RF, grad_gate_RF)
    return grad_u_RH
