"""What is timed: our layer of every family and the limit, all of the FLOPs that a dense layer costs.

Shapes: B batch, L length, D hidden, E experts, K top-k, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import Family
from mixtura.config.families import facts_of
from mixtura.layers import DenseFFN, ExpertChoiceMoE, FeedForward, MixtureOfTokens, SoftMoE, TokenChoiceMoE
from mixtura.planning import match_intermediate_size
from mixtura.planning.formulas import BACKWARD, layer_flops
from mixtura.planning.shapes import FeedForwardShape

SEQUENCE_LENGTH = 128
"""Tokens of a sequence where the batch has enough of them to fill the groups."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One row of the table: how many tokens meet how many experts."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    skew: float = 0.0
    """Strength of a vector added to every token: 0 is even routing, at 2 a few experts get most tokens."""
    multiple_of: int = 4
    """What expert widths are rounded to: tensor cores want 16 bytes, which is 8 numbers of 16 bits."""
    gated: bool = True
    """SiLU-gated layers, which every other library has; else plain ReLU, as in the papers on mixture of tokens."""

    @property
    def dense_width(self) -> int:
        """Width of the dense layer: 4 D, or two thirds of it when gated, which has the same parameters."""
        return 4 * self.hidden if not self.gated else round(8 * self.hidden / 3 / 8) * 8

    @property
    def activation(self) -> str:
        """The activation that goes with `gated`."""
        return "silu" if self.gated else "relu"

    @property
    def group_size(self) -> int:
        """G: as many tokens as there are experts."""
        return self.experts

    @property
    def batch(self) -> int:
        """B: a multiple of the group size where that leaves whole sequences."""
        return max(self.tokens // SEQUENCE_LENGTH, min(self.group_size, self.tokens))

    @property
    def length(self) -> int:
        """L."""
        return self.tokens // self.batch

    def expert_width(self, family: Family, *, top_k: int = 1) -> int:
        """F at which a token costs what it costs in the dense layer, routing and mixing counted."""
        layer = FeedForwardShape(
            family=family,
            hidden_size=self.hidden,
            intermediate_size=0,
            gated=self.gated,
            num_experts=self.experts,
            top_k=top_k,
            group_size=self.group_size if facts_of(family).group_over else self.length,
            mixtures_per_expert=self.num_slots if family == "soft" else 1,
        )
        return match_intermediate_size(layer, dense_intermediate_size=self.dense_width, multiple_of=self.multiple_of)

    @property
    def num_slots(self) -> int:
        """Slots of a soft expert: as many slots as tokens, at least one an expert."""
        return max(1, self.length // self.experts)

    def flops(self, *, backward: bool) -> float:
        """FLOPs of the dense layer on all tokens, which every contender is matched to."""
        shape = FeedForwardShape(
            family="dense", hidden_size=self.hidden, intermediate_size=self.dense_width, gated=self.gated
        )
        return layer_flops(shape) * self.tokens * (1 + BACKWARD if backward else 1)

    def inputs(self) -> Tensor:
        """(B, L, D): normal tokens, plus the same vector `skew` times."""
        return torch.randn(self.batch, self.length, self.hidden) + self.skew * torch.randn(self.hidden)

    def label(self) -> str:
        """For tables and plots."""
        routing = "even" if self.skew == 0 else "skewed"
        return f"{self.tokens} tokens x {self.hidden}, {self.experts} experts, top {self.top_k}, {routing}"


def own_layers(size: Size) -> dict[str, FeedForward]:
    """One layer of every family; families whose routing alone costs a dense layer are left out."""
    own: dict[str, FeedForward] = {"dense": DenseFFN(size.hidden, intermediate_size=size.dense_width, **_kind(size))}
    sizes: dict[str, Any] = {"num_experts": size.experts, **_kind(size)}
    width = size.expert_width("token_choice", top_k=size.top_k)
    own["token choice"] = TokenChoiceMoE(size.hidden, intermediate_size=width, top_k=size.top_k, **sizes)
    # As many rows a token as token choice has: experts of equal width are then compared.
    width = size.expert_width("expert_choice", top_k=size.top_k)
    own["expert choice"] = ExpertChoiceMoE(
        size.hidden, intermediate_size=width, top_k=size.top_k, group_size=size.group_size, **sizes
    )
    width = size.expert_width("mixture_of_tokens")
    own["mixture of tokens"] = MixtureOfTokens(
        size.hidden, intermediate_size=width, group_size=size.group_size, **sizes
    )
    if size.length >= size.experts:
        width = size.expert_width("soft")
        own["soft"] = SoftMoE(size.hidden, intermediate_size=width, num_slots=size.num_slots, **sizes)
    return own


def limit(size: Size, *, backward: bool) -> Callable[[], None]:
    """One large product with the dense layer's FLOPs, into memory that is there already."""
    depth = round(size.flops(backward=backward) / (2 * size.tokens * size.dense_width))
    left, right = torch.randn(size.tokens, depth), torch.randn(depth, size.dense_width)
    out = torch.empty(size.tokens, size.dense_width)

    def run() -> None:
        torch.mm(left, right, out=out)

    return run


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def _kind(size: Size) -> dict[str, Any]:
    return {"activation": size.activation, "gated": size.gated}
