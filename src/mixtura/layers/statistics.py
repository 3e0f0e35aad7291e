"""What a router reports about a batch, family by family, and the auxiliary losses that follow from it.

Counts and means are over the tokens that are real. Nothing is picked by a mask, since only the device knows how many
tokens are real: padding counts as zero.

Losses are of one layer at a time. Pooling the layers first would call two layers balanced that each collapse onto a
different half of the experts.

Shapes: B batch, L length, T tokens, E experts, R routed rows, N groups, G tokens of a group, S mixtures, those of one
expert side by side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixtura.layers.routing import SparseRouting


class RoutingStats(NamedTuple):
    """What a router did with one batch. `importance_E` and the two losses carry gradients, the others do not."""

    tokens_per_expert_E: Tensor
    """(E,) float32: rows an expert was given, before any is dropped; for dense routings, the sum of its weights."""
    importance_E: Tensor
    """(E,) float32: mean router probability of each expert, or its mean gate where gates are no probabilities."""
    router_z_loss: Tensor
    """Mean squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    dropped_tokens: Tensor
    """Rows thrown away for capacity, or tokens that no expert took."""
    routed_rows: Tensor
    """Rows that were to be routed: tokens * top_k for token choice, tokens otherwise."""
    entropy: Tensor
    """Entropy of the router's weights as a share of its maximum: 1 is undecided, 0 is one-hot."""
    sequence_loss: Tensor
    """Load-balancing loss within each sequence, where the layer was asked for it, else zero."""


LayerOutput = tuple[Tensor, RoutingStats | None]
"""What a layer makes of its tokens, and the statistics if they were wanted."""


def pool_stats(parts: Sequence[RoutingStats]) -> RoutingStats:
    """The statistics of several sets of tokens as those of one: counts add up, means are weighted by the rows."""
    rows_P = torch.stack([part.routed_rows for part in parts])
    share_P = rows_P / rows_P.sum().clamp_min(1)

    def mean(values: list[Tensor]) -> Tensor:
        value_P = torch.stack(values)
        weight_P = share_P.view(-1, *[1] * (value_P.dim() - 1))
        # Without a row in any set, the shares are no numbers.
        return torch.where(weight_P > 0, weight_P * value_P, 0.0).sum(0)

    return RoutingStats(
        tokens_per_expert_E=torch.stack([part.tokens_per_expert_E for part in parts]).sum(0),
        importance_E=mean([part.importance_E for part in parts]),
        router_z_loss=mean([part.router_z_loss for part in parts]),
        dropped_tokens=torch.stack([part.dropped_tokens for part in parts]).sum(0),
        routed_rows=rows_P.sum(),
        entropy=mean([part.entropy for part in parts]),
        sequence_loss=mean([part.sequence_loss for part in parts]),
    )


def empty_stats(zero: Tensor, num_experts: int) -> RoutingStats:
    """The statistics of no tokens; `zero` () float32 may carry gradients."""
    none = torch.zeros_like(zero)
    return RoutingStats(
        tokens_per_expert_E=none.expand(num_experts),
        importance_E=zero.expand(num_experts),
        router_z_loss=zero,
        dropped_tokens=none,
        routed_rows=none,
        entropy=none,
        sequence_loss=zero,
    )


def mean_of_real(x_T: Tensor, real_T: Tensor | None) -> Tensor:
    """(T, ...) -> (...): mean over the tokens that are real; None says that all are. Of none it is zero."""
    if real_T is None:
        return x_T.mean(0)
    return sum_of_real(x_T, real_T) / real_T.sum().clamp_min(1)


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


def load_balancing_loss(tokens_per_expert_E: Tensor, importance_E: Tensor, counts_E: Tensor | float = 1.0) -> Tensor:
    """Switch Transformer's loss (arXiv 2101.03961, eq. 4): E * sum_e share_e * importance_e.

    1 when either is uniform, E when everything goes to one expert, for any top_k: `share_e` is the expert's share
    of the routed rows. Gradient flows through `importance_E` alone. `counts_E` is how much each expert counts (MoE++,
    arXiv 2410.07348, eq. 7).
    """
    rows_E = tokens_per_expert_E.detach().float()
    share_E = rows_E / rows_E.sum().clamp_min(1.0)
    return len(rows_E) * (share_E * importance_E * counts_E).sum()


def balance_counts(like: Tensor, paid: int, free: float) -> Tensor:
    """(E,) from (..., E): 1 for the first `paid` experts and `free` for the others, which cost nothing."""
    return torch.where(torch.arange(like.size(-1), device=like.device) < paid, 1.0, free)


def with_sequence_loss(
    stats: RoutingStats,
    choice_TK: Tensor,
    probs_TE: Tensor,
    mask_BL: Tensor | None,
    batch: int,
    counts_E: Tensor | float = 1.0,
) -> RoutingStats:
    """The statistics with the load-balancing loss of every sequence by itself, a mean over those with a real token.

    DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20): `probs_TE` are a token's scores divided by their sum.
    """
    chosen_BLE = torch.zeros_like(probs_TE).scatter(1, choice_TK, 1.0).unflatten(0, (batch, -1))
    probs_BLE = probs_TE.unflatten(0, (batch, -1))
    real_BL1 = probs_BLE.new_ones(()) if mask_BL is None else mask_BL.bool().unsqueeze(-1).to(probs_BLE.dtype)
    tokens_B1 = (torch.ones_like(probs_BLE[..., :1]) * real_BL1).sum(1)
    share_BE = (chosen_BLE * real_BL1).sum(1) / (tokens_B1 * choice_TK.size(1)).clamp_min(1.0)
    mean_BE = (probs_BLE * real_BL1).sum(1) / tokens_B1.clamp_min(1.0)
    loss_B = probs_TE.size(-1) * (share_BE * mean_BE * counts_E).sum(-1)
    return stats._replace(sequence_loss=(loss_B.sum() / (tokens_B1 > 0).sum().clamp_min(1)).float())


def router_z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the real tokens' logits (ST-MoE, arXiv 2202.08906, eq. 5): keeps them small."""
    return mean_of_real(torch.logsumexp(logits_TE.float(), dim=-1).square(), real_T)


def token_choice_stats(
    logits_TE: Tensor | None,
    probs_TE: Tensor,
    real_T: Tensor | None,
    rows_E: Tensor,
    limit: int | Tensor | None,
) -> RoutingStats:
    """Statistics of tokens that choose; `rows_E` are those of real tokens, before any is dropped at `limit`."""
    rows = rows_E.sum()
    over = torch.zeros_like(rows) if limit is None else (rows_E - limit).clamp_min(0).sum()
    return RoutingStats(
        tokens_per_expert_E=rows_E.float(),
        importance_E=mean_of_real(probs_TE.float(), real_T),
        router_z_loss=probs_TE.new_zeros(()) if logits_TE is None else router_z_loss(logits_TE, real_T),
        dropped_tokens=over.float(),
        routed_rows=rows.float(),
        entropy=normalized_entropy(probs_TE, -1, real_T),
        sequence_loss=probs_TE.new_zeros((), dtype=torch.float32),
    )


def varying_choice_stats(logits_TE: Tensor, gate_TE: Tensor, active_TE: Tensor, real_T: Tensor | None) -> RoutingStats:
    """Statistics of tokens that run as many experts as they happen to; one that runs none counts as dropped.

    `gate_TE` are probabilities, or gates that add up to anything; their entropy is that of their shares.
    """
    total_T1 = gate_TE.sum(-1, keepdim=True)
    return RoutingStats(
        tokens_per_expert_E=sum_of_real(active_TE.float(), real_T),
        importance_E=mean_of_real(gate_TE.float(), real_T),
        router_z_loss=router_z_loss(logits_TE, real_T),
        dropped_tokens=sum_of_real(1.0 - active_TE.any(-1).float(), real_T),
        routed_rows=count_real(gate_TE, real_T),
        entropy=normalized_entropy(gate_TE / total_T1.clamp_min(1e-20), -1, real_T),
        sequence_loss=gate_TE.new_zeros((), dtype=torch.float32),
    )


def merging_stats(logits_TE: Tensor, weight_TE: Tensor, real_T: Tensor | None) -> RoutingStats:
    """Statistics of experts whose weights are merged: an expert's load is the sum of its weights."""
    tokens = count_real(weight_TE, real_T)
    return RoutingStats(
        tokens_per_expert_E=sum_of_real(weight_TE.detach().float(), real_T),
        importance_E=mean_of_real(weight_TE.float(), real_T),
        router_z_loss=router_z_loss(logits_TE, real_T),
        dropped_tokens=torch.zeros_like(tokens),
        routed_rows=tokens,
        entropy=normalized_entropy(weight_TE, -1, real_T),
        sequence_loss=torch.zeros_like(tokens),
    )


def expert_choice_stats(
    logits_BLE: Tensor, probs_BLE: Tensor, mask_BL: Tensor | None, routing: SparseRouting
) -> RoutingStats:
    """Statistics of experts that choose; a token that none of them took counts as dropped."""
    logits_TE, probs_TE = logits_BLE.flatten(0, 1), probs_BLE.flatten(0, 1)
    taken_R = (routing.weight_R > 0).float()  # the others are padding, taken for want of real tokens
    taken_T = taken_R.new_zeros(len(logits_TE)).index_add(0, routing.token_R, taken_R)
    real_T = None if mask_BL is None else mask_BL.flatten().bool()
    return RoutingStats(
        tokens_per_expert_E=taken_R.unflatten(0, (len(routing.tokens_per_expert_E), -1)).sum(1),
        importance_E=mean_of_real(probs_TE.float(), real_T),
        router_z_loss=router_z_loss(logits_TE, real_T),
        dropped_tokens=sum_of_real((taken_T == 0).float(), real_T),
        routed_rows=count_real(taken_T, real_T),
        entropy=normalized_entropy(probs_TE, -1, real_T),
        sequence_loss=probs_TE.new_zeros((), dtype=torch.float32),
    )


def group_stats(logits_NGS: Tensor, real_NG: Tensor | None, num_experts: int) -> RoutingStats:
    """Statistics of a batch in groups: every expert gets the same load, up to what went to padding."""
    weight_NGS = logits_NGS.detach().softmax(1)
    logits_TS, real_T = logits_NGS.flatten(0, 1), None if real_NG is None else real_NG.flatten()
    load_S = sum_of_real(weight_NGS.flatten(0, 1).float(), real_T)
    load_E = load_S.unflatten(-1, (num_experts, -1)).sum(-1)
    tokens = count_real(logits_TS, real_T)
    return RoutingStats(
        tokens_per_expert_E=load_E,
        importance_E=load_E / load_E.sum().clamp_min(1e-30),
        router_z_loss=router_z_loss(logits_TS, real_T),
        dropped_tokens=torch.zeros_like(tokens),
        routed_rows=tokens,
        entropy=normalized_entropy(weight_NGS, 1, None if real_NG is None else real_NG.any(1)),
        sequence_loss=load_E.new_zeros((), dtype=torch.float32),
    )


def token_stats(logits_TS: Tensor, used_TS: Tensor, real_T: Tensor | None, num_experts: int) -> RoutingStats:
    """Statistics of tokens without a group: rows an expert ran with top_k, or the sum of its weights without."""
    used_TE = used_TS.detach().float().unflatten(-1, (num_experts, -1)).sum(-1)
    load_E = sum_of_real(used_TE, real_T)
    tokens = count_real(used_TE, real_T)
    return RoutingStats(
        tokens_per_expert_E=load_E,
        importance_E=load_E / load_E.sum().clamp_min(1e-30),
        router_z_loss=router_z_loss(logits_TS, real_T),
        dropped_tokens=torch.zeros_like(tokens),
        routed_rows=tokens,
        entropy=normalized_entropy(used_TE / used_TE.sum(-1, keepdim=True).clamp_min(1e-30), -1, real_T),
        sequence_loss=load_E.new_zeros((), dtype=torch.float32),
    )
