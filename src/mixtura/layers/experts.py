"""The experts of every family: two stacked weight tensors in Hugging Face's layout, without biases.

Shapes: E experts, D hidden, F expert width, R rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.kernels import ExpertExchange, ExpertWeights
from mixtura.kernels.expert_weights import check_activation


class LatentProjection(nn.Linear):
    """Into the space that experts share, or out of it; a class of its own, as its weights start otherwise."""


class Experts(nn.Module):
    """E feed-forward networks f_e(x) = down_e(act(up_e(x))), gated when `gated`.

    Parameters are `gate_up_proj` (E, 2F, D) when gated, else `up_proj` (E, F, D), and `down_proj` (E, D, F): the same
    in every family, so that converting between families touches the router alone.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        activation: str = "relu",
        gated: bool = False,
        latent_size: int | None = None,
    ) -> None:
        """Args are widths and counts; raises ValueError for an unknown activation or a size below one.

        With a `latent_size` the experts work on vectors of that size: one projection to it and one back are shared by
        all (LatentMoE, arXiv 2601.18089). What routes looks at the hidden state, as ever.
        """
        super().__init__()
        check_activation(activation)
        for name, value in (
            ("num_experts", num_experts),
            ("intermediate_size", intermediate_size),
            *([] if latent_size is None else [("latent_size", latent_size)]),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1.")
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.activation, self.gated = activation, gated
        self.to_latent = None if latent_size is None else LatentProjection(hidden_size, latent_size, bias=False)
        self.from_latent = None if latent_size is None else LatentProjection(latent_size, hidden_size, bias=False)
        self.input_size = latent_size or hidden_size
        self.backend: Callable[..., Tensor] | None = None
        """What runs in place of Mixtura's kernels where tokens choose; takes the choices and weights (T, K) of each."""
        width = 2 * intermediate_size if gated else intermediate_size
        up = nn.Parameter(torch.empty(num_experts, width, self.input_size))
        self.register_parameter("gate_up_proj" if gated else "up_proj", up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.input_size, intermediate_size))
        self.exchange: ExpertExchange | None = None
        """Where processes share the experts: reaches those of the others; the projections are then of this one."""
        self.reset_parameters()

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The first (E, F or 2F, D) and second (E, D, F) projections."""
        up: Any = self.gate_up_proj if self.gated else self.up_proj
        return up, self.down_proj

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws every weight from a normal distribution."""
        for weight in self.weights:
            nn.init.normal_(weight, std=std)

    def forward(self, x: Any, kernel: Callable[..., Tensor], *routing: Any) -> Tensor:
        """What `kernel` makes of the input, the routing and these experts: kernel(x, *routing, ExpertWeights).

        The input and the routing are tensors, or whatever else the kernel takes.

        Layers compute with the weights in no other way. PEFT adds its update to a parameter only while the module that
        it wraps is called, so a layer that read `weights` from outside would compute without the update.
        """
        experts = ExpertWeights(*self.weights, self.activation, self.gated)
        x = x if self.to_latent is None else self.to_latent(x)
        run = kernel if self.exchange is None else partial(self.exchange.run, kernel)
        y = run(x, *routing, experts)
        return y if self.from_latent is None else self.from_latent(y)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation}, gated={self.gated}"
        )
