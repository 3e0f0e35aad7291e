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
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, u: torch.ops.aten.threshold_backward(grad, u, 0),
    "gelu": lambda grad, u: torch.ops.aten.gelu_backward(grad, u),
    "silu": lambda grad, u: torch.ops.aten.silu_backward(grad, u),
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
    """Gradient of `activate` with respect to its input: (R, F), (R, H) -> (R, H)."""
    if not gated:
        return _BACKWARD[activation](grad_RF, u_RH)
    gate_RF, up_RF = u_RH.chunk(2, dim=-1)
    grad_gate_RF = _BACKWARD[activation](grad_RF * up_RF, gate_RF)
    return torch.cat([grad_gate_RF, grad_RF * _FORWARD[activation](gate_RF)], dim=-1)
