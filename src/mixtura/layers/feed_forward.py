"""What every feed-forward family looks like from outside, and the simplest: the dense layer, every baseline.

Shapes: B batch, L length, D hidden.
"""

from abc import abstractmethod
from typing import Literal, overload

import torch
from torch import Tensor, nn

from mixtura.kernels.expert_weights import activate, check_activation
from mixtura.layers.statistics import RoutingStats, empty_stats


class FeedForward(nn.Module):
    """A layer (B, L, D) -> (B, L, D) that may report how it routed its tokens."""

    routes_by_example = False
    """Whether the caller names an expert for each example, in place of a router."""
    num_experts: int
    """Of a mixture; a dense layer has none."""
    shared_expert: "DenseFFN | None"

    def __init__(self) -> None:
        """Starts without shared experts."""
        super().__init__()
        self.shared_expert = None

    def add_shared_expert(
        self, hidden_size: int, count: int, *, intermediate_size: int, activation: str, gated: bool
    ) -> None:
        """Adds experts that every token passes through besides the routed ones, as one layer of their summed width.

        DeepSeekMoE (arXiv 2401.06066, section 3.2) has them for token choice; here every mixture may. Called by
        constructors, with the width of one expert; a count of zero adds nothing.
        """
        if count < 0:
            raise ValueError(f"num_shared_experts is {count}: it must be zero or more.")
        if count:
            self.shared_expert = DenseFFN(
                hidden_size, intermediate_size=count * intermediate_size, activation=activation, gated=gated
            )

    @overload
    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None = None,
        return_stats: Literal[False] = False,
        expert_B: Tensor | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None = None,
        *,
        return_stats: Literal[True],
        expert_B: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats | None]: ...
    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None = None,
        return_stats: bool = False,
        expert_B: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RoutingStats | None]:
        """Runs the layer.

        Args:
            x_BLD: hidden states.
            mask_BL: true where a token is real; padding takes no part in any mixture, capacity or statistic.
            return_stats: also return the routing statistics, which cost nothing when nobody asks.
            expert_B: the expert of each example, for a layer that `routes_by_example`, and for no other.

        Raises:
            ValueError: the input has another number of axes, or experts are named where a router chooses, or not named
                where none does.
        """
        if x_BLD.dim() != 3:
            raise ValueError(f"The input has shape {tuple(x_BLD.shape)}: it must be (batch, length, hidden_size).")
        if (expert_B is not None) != self.routes_by_example:
            fix = "give expert_B, one for each example" if self.routes_by_example else "leave expert_B out"
            raise ValueError(
                f"{type(self).__name__} has {'no' if self.routes_by_example else 'its own'} router: {fix}."
            )
        if expert_B is not None and expert_B.shape != x_BLD.shape[:1]:
            raise ValueError(
                f"expert_B has shape {tuple(expert_B.shape)} for {len(x_BLD)} examples: give one for each."
            )
        if x_BLD.numel() == 0:
            y_BLD, stats = self.run_nothing(x_BLD, return_stats)
            return (y_BLD, stats) if return_stats else y_BLD
        y_BLD, stats = self.route_and_run(x_BLD, mask_BL, return_stats, expert_B)
        if self.shared_expert is not None:
            y_BLD = y_BLD + self.shared_expert(x_BLD)
        return (y_BLD, stats) if return_stats else y_BLD

    def run_nothing(self, x_BLD: Tensor, want_stats: bool) -> tuple[Tensor, RoutingStats | None]:
        """A batch without tokens, B or L being zero: no output, statistics of zero, and gradients of zero."""
        parts = [parameter.flatten()[:0].sum().float() for parameter in self.parameters() if parameter.requires_grad]
        zero = torch.stack([x_BLD.sum().float(), *parts]).sum()
        stats = None if isinstance(self, DenseFFN) or not want_stats else empty_stats(zero, self.num_experts)
        return x_BLD + zero.to(x_BLD.dtype), stats

    @abstractmethod
    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """The family's algorithm, without shared experts; statistics are None unless wanted."""


class Projection(nn.Linear):
    """A projection of a dense layer, without bias; the class tells it from others, whose weights start otherwise."""

    def __init__(self, in_features: int, out_features: int, *, down: bool = False) -> None:
        """`down` is true of the projection back to the hidden size."""
        super().__init__(in_features, out_features, bias=False)
        self.down = down


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
            self.gate_proj = Projection(hidden_size, intermediate_size)
        self.up_proj = Projection(hidden_size, intermediate_size)
        self.down_proj = Projection(intermediate_size, hidden_size, down=True)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); nothing is routed, so there are no statistics."""
        h_BLF = activate(self.gate_proj(x_BLD) if self.gated else self.up_proj(x_BLD), self.activation, gated=False)
        if self.gated:
            h_BLF = h_BLF * self.up_proj(x_BLD)
        return self.down_proj(h_BLF), None
