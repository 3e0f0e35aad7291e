"""The ordinary feed-forward layer: the baseline of every comparison.

Shapes: B batch, L length, D hidden, F width.
"""

from torch import Tensor, nn

from mixtura.kernels.activation import activate, check_activation
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.statistics import RoutingStats


class DenseFFN(FeedForward):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated; no biases; parameter names as in Llama."""

    def __init__(
        self, hidden_size: int, *, intermediate_size: int, activation: str = "relu", gated: bool = False
    ) -> None:
        """Raises ValueError for an unknown activation."""
        super().__init__()
        check_activation(activation)
        self.activation, self.gated = activation, gated
        if gated:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); nothing is routed, so there are no statistics."""
        h_BLF = activate(self.gate_proj(x_BLD) if self.gated else self.up_proj(x_BLD), self.activation, gated=False)
        if self.gated:
            h_BLF = h_BLF * self.up_proj(x_BLD)
        return self.down_proj(h_BLF), None
