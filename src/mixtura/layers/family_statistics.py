"""The statistics of each family, as `RoutingStats`.

Shapes: B batch, L length, T tokens, E experts, R routed rows, N groups, G tokens of a group, S mixtures, those of one
expert side by side.
"""

import torch
from torch import Tensor

from mixtura.layers.losses import router_z_loss
from mixtura.layers.routing import SparseRouting
from mixtura.layers.statistics import RoutingStats, count_real, mean_of_real, normalized_entropy, sum_of_real


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
        importance_E=load_E / load_E.sum(),
        router_z_loss=router_z_loss(logits_TS, real_T),
        dropped_tokens=torch.zeros_like(tokens),
        routed_rows=tokens,
        entropy=normalized_entropy(weight_NGS, 1, None if real_NG is None else real_NG.any(1)),
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
    )
