"""Soft MoE: every expert slot is a mixture of all tokens of one sequence, for encoders only.

Puigcerver et al., arXiv 2308.00951, algorithm 1 and section 2.3 (normalised router). It sees the whole sequence, so in
a causal model it leaks the future.

Shapes: B batch, L length, D hidden, E experts, C slots of an expert, S = E*C.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.routing import DenseRouting, dense_experts, router_logits
from mixtura.layers.statistics import RoutingStats, count_real, mean_of_real, normalized_entropy, sum_of_real


class SoftMoE(FeedForward):
    """Mixture of experts by weighted averages over one sequence."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        num_slots: int = 1,
        activation: str = "relu",
        gated: bool = False,
        num_shared_experts: int = 0,
    ) -> None:
        """Builds the layer with `num_slots` slots for each of `num_experts` experts of width `intermediate_size`.

        Every token passes through `num_shared_experts` more of that width.
        """
        super().__init__()
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}: it must be at least 1.")
        self.num_experts, self.num_slots = num_experts, num_slots
        self.slots = nn.Parameter(torch.empty(num_experts * num_slots, hidden_size))
        self.scale = nn.Parameter(torch.ones(()))
        nn.init.normal_(self.slots, std=0.02)
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, **sizes)
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); each sequence is one group."""
        unit_BLD = F.normalize(x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32)), dim=-1)
        logits_BLS = router_logits(unit_BLD, self.scale * F.normalize(self.slots, dim=-1))
        over_tokens_BLS = logits_BLS
        if mask_BL is not None:
            over_tokens_BLS = logits_BLS.masked_fill(~mask_BL.unsqueeze(-1).bool(), torch.finfo(logits_BLS.dtype).min)
        shape = (self.num_experts, self.num_slots)
        routing = DenseRouting(
            dispatch_NGEC=over_tokens_BLS.softmax(1).to(x_BLD.dtype).unflatten(-1, shape),
            combine_NGEC=logits_BLS.softmax(-1).to(x_BLD.dtype).unflatten(-1, shape),
        )
        y_BLD = dense_experts(self.experts, x_BLD, routing)
        stats = None
        if want_stats:
            combine_TE = routing.combine_NGEC.sum(-1).flatten(0, 1).float()
            real_T = None if mask_BL is None else mask_BL.flatten().bool()
            tokens = count_real(combine_TE, real_T)
            stats = RoutingStats(
                tokens_per_expert_E=sum_of_real(combine_TE.detach(), real_T),
                importance_E=mean_of_real(combine_TE, real_T),
                router_z_loss=torch.zeros_like(tokens),
                dropped_tokens=torch.zeros_like(tokens),
                routed_rows=tokens,
                entropy=normalized_entropy(combine_TE, -1, real_T),
                sequence_loss=torch.zeros_like(tokens),
            )
        return y_BLD, stats
