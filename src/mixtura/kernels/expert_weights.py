"""The weights of a layer's experts and how they are used: one value in place of four arguments to every kernel.

Shapes: E experts, D hidden, F expert width, H = 2F when gated (gate rows first, as `gate_up_proj` of Hugging Face) else
F.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
    """One of "relu", "gelu" and "silu"."""
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
