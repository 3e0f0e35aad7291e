"""Expert threshold: a token enters an expert if it scores above that expert's threshold, a moving average over batches.

Sun et al., arXiv 2603.11535, equation 6 and algorithm 1: expert choice without the batch. An expert's threshold is what
its k-th best token of a batch scores, k = T * top_k / E, averaged over batches of the past. Each token is then compared
with a number, so nothing leaks, decoding equals the full forward pass, and the load is right on average without an
auxiliary loss. How many experts a token runs varies: none, some or all.

While thresholds are still moving fast, training may choose over the batch itself (expert choice), as the paper does for
its first 4,000 steps; those steps see the future of a sequence. The paper's bounds on an expert's rows in training,
which save memory on several devices, are left out: no token is dropped and none is added.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts.
"""

import torch
from torch import Tensor

from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.limits import check_top_k
from mixtura.layers.routing import ChoiceTap, Router, active_rows, sparse_experts
from mixtura.layers.statistics import RoutingStats, varying_choice_stats


class ExpertThresholdMoE(FeedForward):
    """Mixture of experts in which a token passes the thresholds of as many experts as it does."""

    threshold: Tensor
    updates: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 1,
        activation: str = "relu",
        gated: bool = False,
        num_shared_experts: int = 0,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, the width of one expert.
            num_experts: E.
            top_k: experts a token passes on average.
            activation: "relu", "gelu" or "silu".
            gated: gated experts.
            num_shared_experts: experts that every token passes through; the paper has one.

        Raises:
            ValueError: top_k does not lie between 1 and num_experts.
        """
        super().__init__()
        check_top_k(top_k, num_experts)
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = Router(hidden_size, num_experts)
        self.choice_tap = ChoiceTap()
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, **sizes)
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)
        self.register_buffer("threshold", torch.zeros(num_experts))
        self.register_buffer("updates", torch.zeros(()))
        self.choosing_over_batch = False
        """Whether training chooses over the batch, as it does before the first update whatever this says."""
        self.observed: Tensor | None = None
        """(E + 1,): k-th best scores since the last update, weighted by tokens, and those tokens' number."""

    @torch.no_grad()
    def update(self, observed: Tensor, *, rate: float) -> None:
        """Moves the thresholds towards what was observed since the last update; call it after an optimizer step.

        Args:
            observed: `self.observed`, summed over the ranks if there are several.
            rate: the least weight of an observation. The n-th has weight 1/n until that falls below the rate, so no
                start value lingers.
        """
        self.updates += 1
        weight = torch.clamp_min(1 / self.updates, rate)
        self.threshold.lerp_((observed[:-1] / observed[-1].clamp_min(1)).to(self.threshold), weight)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); a token that passes no threshold gets zeros, and is counted as dropped."""
        x_TD = x_BLD.flatten(0, 1)
        real_T = None if mask_BL is None else mask_BL.flatten().bool()
        logits_TE = self.gate(x_TD)
        active_TE = self._choose(logits_TE.detach(), real_T)
        if real_T is not None:
            active_TE = active_TE & real_T.unsqueeze(-1)
        scores_TE = logits_TE.sigmoid()
        weight_TE = torch.where(active_TE, scores_TE, 0.0)
        self.choice_tap(weight_TE)
        y_TD = sparse_experts(self.experts, x_TD, active_rows(weight_TE, active_TE))
        stats = None
        if want_stats:
            probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
            stats = varying_choice_stats(logits_TE, probs_TE, active_TE, real_T)
        return y_TD.view(x_BLD.shape), stats

    def _choose(self, logits_TE: Tensor, real_T: Tensor | None) -> Tensor:
        """Which tokens enter which experts (T, E). A sigmoid keeps the order, so logits are compared."""
        above_TE = logits_TE > self.threshold
        if not self.training:
            return above_TE
        best_E, tokens = kth_best(logits_TE, real_T, self.top_k)
        seen = torch.cat([torch.where(tokens > 0, best_E, 0.0) * tokens, tokens.view(1)])
        # Under activation checkpointing a batch is seen twice; all batches are, so the average stays what it is.
        self.observed = seen if self.observed is None else self.observed + seen
        if self.choosing_over_batch:
            return logits_TE >= best_E
        return torch.where(self.updates > 0, above_TE, logits_TE >= best_E)


def kth_best(logits_TE: Tensor, real_T: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """The score (E,) of every expert's k-th best real token, k = T * top_k / E rounded up, and their number T.

    With equal scores, as of equal tokens, an expert has more than k tokens that score as much. Without a real token the
    score is minus infinity.
    """
    tokens = torch.full((), len(logits_TE), device=logits_TE.device) if real_T is None else real_T.sum()
    if real_T is not None:
        logits_TE = logits_TE.masked_fill(~real_T.unsqueeze(-1), -torch.inf)
    if not len(logits_TE):
        return logits_TE.new_full(logits_TE.shape[1:], -torch.inf), tokens.to(logits_TE.dtype)
    k = ((tokens * top_k + logits_TE.size(1) - 1) // logits_TE.size(1)).clamp_min(1)
    best_E = logits_TE.sort(0, descending=True).values.index_select(0, k.view(1) - 1)[0]
    return best_E, tokens.to(best_E.dtype)
