"""Auxiliary losses of routers, one layer at a time.

Pooling the layers first would call two layers that each collapse onto a different half of the experts balanced.

Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor

from mixtura.layers.statistics import mean_of_real


def load_balancing_loss(tokens_per_expert_E: Tensor, importance_E: Tensor) -> Tensor:
    """Switch Transformer's loss (arXiv 2101.03961, eq. 4): E * sum_e share_e * importance_e.

    1 when either is uniform, E when everything goes to one expert, for any top_k: `share_e` is the expert's share
    of the routed rows. Gradient flows through `importance_E` alone.
    """
    rows_E = tokens_per_expert_E.detach().float()
    share_E = rows_E / rows_E.sum().clamp_min(1.0)
    return len(rows_E) * (share_E * importance_E).sum()


def router_z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the real tokens' logits (ST-MoE, arXiv 2202.08906, eq. 5): keeps them small."""
    return mean_of_real(torch.logsumexp(logits_TE.float(), dim=-1).square(), real_T)
