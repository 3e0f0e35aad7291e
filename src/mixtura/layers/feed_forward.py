"""What every feed-forward family looks like from outside.

Shapes: B batch, L length, D hidden.
"""

from abc import abstractmethod
from typing import Literal, overload

from torch import Tensor, nn

from mixtura.layers.routing import RoutingStats


class FeedForward(nn.Module):
    """A layer (B, L, D) -> (B, L, D) that may report how it routed its tokens."""

    @overload
    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None, return_stats: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x_BLD: Tensor, mask_BL: Tensor | None = None, *, return_stats: Literal[True]
    ) -> tuple[Tensor, RoutingStats | None]: ...
    def forward(
        self, x_BLD: Tensor, mask_BL: Tensor | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, RoutingStats | None]:
        """Runs the layer.

        Args:
            x_BLD: hidden states.
            mask_BL: true where a token is real; padding takes no part in any mixture, capacity or statistic.
            return_stats: also return the routing statistics, which cost nothing when nobody asks.
        """
        if x_BLD.dim() != 3:
            raise ValueError(f"The input has shape {tuple(x_BLD.shape)}: it must be (batch, length, hidden_size).")
        y_BLD, stats = self.route_and_run(x_BLD, mask_BL, return_stats)
        return (y_BLD, stats) if return_stats else y_BLD

    @abstractmethod
    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        """The family's algorithm; statistics are None unless wanted."""
