"""Expert choice: every expert takes the tokens that score it highest, so the load is even by construction.

Zhou et al., arXiv 2202.09368. Over all tokens of a batch it looks into the future of a sequence, so a causal model may
only use it over the batch at one position, the discrete twin of Mixture of Tokens (arXiv 2310.15961, section 4).

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, N groups, G tokens of a group, C capacity, R = E*N*C.
"""

from typing import Literal

import torch
from torch import Tensor

from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.losses import router_z_loss
from mixtura.layers.routing import (
    Router,
    SparseRouting,
    sparse_experts,
    to_groups,
)
from mixtura.layers.statistics import RoutingStats, count_real, mean_of_real, normalized_entropy, sum_of_real
from mixtura.planning.shapes import capacity


class ExpertChoiceMoE(FeedForward):
    """Mixture of experts in which experts choose among the tokens of a group."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 1,
        group_size: int | None = None,
        group_over: Literal["batch", "all"] = "batch",
        activation: str = "relu",
        gated: bool = False,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, the width of one expert.
            num_experts: E.
            top_k: experts a token gets on average; an expert takes G * top_k / E tokens of a group, rounded up.
            group_size: G, consecutive examples whose tokens at one position compete; None is the whole batch.
            group_over: "batch" chooses at one position at a time (causal), "all" among all tokens (leaks the future).
            activation: "relu", "gelu" or "silu".
            gated: gated experts.

        Raises:
            ValueError: top_k or group_over make no sense.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: it must lie between 1 and num_experts, which is {num_experts}.")
        if group_over not in ("batch", "all"):
            raise ValueError(f"group_over is {group_over!r}: it must be batch or all.")
        self.num_experts, self.top_k = num_experts, top_k
        self.group_size, self.group_over = group_size, group_over
        self.gate = Router(hidden_size, num_experts)
        self.experts = Experts(
            hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            activation=activation,
            gated=gated,
        )

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); a token that no expert takes gets zeros, and is counted as dropped."""
        logits_BLE = self.gate(x_BLD)
        probs_BLE = logits_BLE.softmax(-1)
        real_BL1 = torch.ones_like(probs_BLE[..., :1]) if mask_BL is None else mask_BL.unsqueeze(-1).to(probs_BLE)
        routing = self._choose(probs_BLE, real_BL1)
        y_TD = sparse_experts(self.experts, x_BLD.flatten(0, 1), routing)
        stats = self._stats(logits_BLE, probs_BLE, mask_BL, routing) if want_stats else None
        return y_TD.view(x_BLD.shape), stats

    def _choose(self, probs_BLE: Tensor, real_BL1: Tensor) -> SparseRouting:
        batch, length, num_experts = probs_BLE.shape
        index_BL1 = torch.arange(batch * length, device=probs_BLE.device).view(batch, length, 1)
        # Padding scores -1, so it is taken only when nothing real is left, and then with weight 0.
        score_NGE = torch.where(self._groups(real_BL1).bool(), self._groups(probs_BLE), -1.0)
        index_NG = self._groups(index_BL1).squeeze(-1)
        limit = min(capacity(score_NGE.size(1), self.top_k, num_experts, 1.0), score_NGE.size(1))
        weight_NCE, chosen_NCE = score_NGE.topk(limit, dim=1)
        token_NCE = index_NG.unsqueeze(-1).expand_as(score_NGE).gather(1, chosen_NCE)
        return SparseRouting(
            token_R=token_NCE.permute(2, 0, 1).flatten(),
            weight_R=weight_NCE.clamp_min(0).permute(2, 0, 1).flatten(),
            tokens_per_expert_E=torch.full_like(index_NG[0, :1], limit * len(score_NGE)).expand(num_experts),
        )

    def _groups(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (N, G, D), the tokens that compete; a last group that is not full is filled with zeros."""
        if self.group_over == "all":
            return x_BLD.reshape(1, -1, x_BLD.size(-1))
        return to_groups(x_BLD, self.group_size or x_BLD.size(0), "batch")

    def _stats(
        self, logits_BLE: Tensor, probs_BLE: Tensor, mask_BL: Tensor | None, routing: SparseRouting
    ) -> RoutingStats:
        logits_TE, probs_TE = logits_BLE.flatten(0, 1), probs_BLE.flatten(0, 1)
        taken_R = (routing.weight_R > 0).float()  # the others are padding, taken for want of real tokens
        taken_T = taken_R.new_zeros(len(logits_TE)).index_add(0, routing.token_R, taken_R)
        real_T = None if mask_BL is None else mask_BL.flatten().bool()
        return RoutingStats(
            tokens_per_expert_E=taken_R.unflatten(0, (self.num_experts, -1)).sum(1),
            importance_E=mean_of_real(probs_TE.float(), real_T),
            router_z_loss=router_z_loss(logits_TE, real_T),
            dropped_tokens=sum_of_real((taken_T == 0).float(), real_T),
            routed_rows=count_real(taken_T, real_T),
            entropy=normalized_entropy(probs_TE, -1, real_T),
        )
