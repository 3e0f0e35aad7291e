"""What a router reports about a batch: counts and means over the tokens that are real.

Nothing is picked by a mask, since how many tokens are real is known to the device alone: padding counts as zero.

Shapes: T tokens, E experts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStats(NamedTuple):
    """What a router did with one batch. Only `importance_E` and `router_z_loss` carry gradients."""

    tokens_per_expert_E: Tensor
    """(E,) float32: rows an expert was given, before any is dropped; for dense routings, the sum of its weights."""
    importance_E: Tensor
    """(E,) float32: mean router probability of each expert."""
    router_z_loss: Tensor
    """Mean squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    dropped_tokens: Tensor
    """Rows thrown away for capacity, or tokens that no expert took."""
    routed_rows: Tensor
    """Rows that were to be routed: tokens * top_k for token choice, tokens otherwise."""
    entropy: Tensor
    """Entropy of the router's weights as a share of its maximum: 1 is undecided, 0 is one-hot."""


LayerOutput = tuple[Tensor, RoutingStats | None]
"""What a layer makes of its tokens, and the statistics if they were wanted."""


def pool_stats(parts: Sequence[RoutingStats]) -> RoutingStats:
    """The statistics of several sets of tokens as those of one: counts add up, means are weighted by the rows."""
    rows_P = torch.stack([part.routed_rows for part in parts])
    share_P = rows_P / rows_P.sum()

    def mean(values: list[Tensor]) -> Tensor:
        value_P = torch.stack(values)
        weight_P = share_P.view(-1, *[1] * (value_P.dim() - 1))
        # A set without a row has means that are no numbers.
        return torch.where(weight_P > 0, weight_P * value_P, 0.0).sum(0)

    return RoutingStats(
        tokens_per_expert_E=torch.stack([part.tokens_per_expert_E for part in parts]).sum(0),
        importance_E=mean([part.importance_E for part in parts]),
        router_z_loss=mean([part.router_z_loss for part in parts]),
        dropped_tokens=torch.stack([part.dropped_tokens for part in parts]).sum(0),
        routed_rows=rows_P.sum(),
        entropy=mean([part.entropy for part in parts]),
    )


def mean_of_real(x_T: Tensor, real_T: Tensor | None) -> Tensor:
    """(T, ...) -> (...): mean over the tokens that are real; None says that all are."""
    if real_T is None:
        return x_T.mean(0)
    return sum_of_real(x_T, real_T) / real_T.sum()


def sum_of_real(x_T: Tensor, real_T: Tensor | None) -> Tensor:
    """(T, ...) -> (...): as `mean_of_real`, the sum."""
    if real_T is not None:
        x_T = torch.where(real_T.view(-1, *[1] * (x_T.dim() - 1)), x_T, 0)
    return x_T.sum(0)


def count_real(x_T: Tensor, real_T: Tensor | None) -> Tensor:
    """How many of the T tokens are real, as a float32."""
    if real_T is None:
        return torch.full((), float(len(x_T)), device=x_T.device)
    return real_T.sum().float()


def normalized_entropy(probs: Tensor, dim: int, real_T: Tensor | None = None) -> Tensor:
    """Mean entropy of the distributions along `dim`, as a share of the uniform distribution's; no gradient.

    With `real_T` those of the first axis that are real.
    """
    probs = probs.detach().float()
    size = probs.size(dim)
    if size == 1:
        return probs.new_zeros(())
    entropy = -(probs * probs.clamp_min(1e-30).log()).sum(dim)
    return mean_of_real(entropy, real_T).mean() / math.log(size)
