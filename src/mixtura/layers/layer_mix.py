"""Layer mix: one hidden state blended from those of several layers, early ones for context, deep ones for detail.

ELMo's scalar mix (Peters et al., arXiv 1802.05365, eq. 1), optionally with weights that depend on the token.

Shapes: M layers, B batch, L length, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LayerMix(nn.Module):
    """scale * sum over layers of weight_m * hidden_m, where the weights are a softmax over the layers."""

    def __init__(self, num_layers: int, *, hidden_size: int | None = None, learned_scale: bool = True) -> None:
        """Builds the blend; it starts as the plain mean of the layers.

        Args:
            num_layers: M.
            hidden_size: D, for weights that depend on the token through one router row a layer; None for fixed weights.
            learned_scale: multiply the blend by a learned number.

        Raises:
            ValueError: fewer than one layer.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: it must be at least 1.")
        self.num_layers = num_layers
        self.logits = nn.Parameter(torch.zeros(num_layers))
        self.scale = nn.Parameter(torch.ones(())) if learned_scale else None
        self.gate = None
        if hidden_size is not None:
            self.gate = nn.Parameter(torch.zeros(num_layers, hidden_size))

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """M tensors (B, L, D) -> (B, L, D).

        Raises:
            ValueError: the number of tensors is not M.
        """
        if len(hidden_states) != self.num_layers:
            raise ValueError(f"LayerMix of {self.num_layers} layers was given {len(hidden_states)} hidden states.")
        stacked_BLMD = torch.stack(tuple(hidden_states), dim=-2)
        weight = self.weights(stacked_BLMD).to(stacked_BLMD.dtype)
        mixed_BLD = (weight.unsqueeze(-1) * stacked_BLMD).sum(-2)
        return mixed_BLD if self.scale is None else self.scale * mixed_BLD

    def weights(self, stacked_BLMD: Tensor | None = None) -> Tensor:
        """The layers' weights, which sum to one: (M,), or (B, L, M) when they depend on the token."""
        logits = self.logits
        if self.gate is not None and stacked_BLMD is not None:
            logits = logits + (stacked_BLMD * self.gate).sum(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
