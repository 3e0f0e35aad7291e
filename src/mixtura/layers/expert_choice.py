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
from mixtura.layers.limits import check_expert_choice
from mixtura.layers.routing import (
    Router,
    SparseRouting,
    sparse_experts,
)
from mixtura.layers.statistics import RoutingStats, expert_choice_stats
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
        num_shared_experts: int = 0,
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
            num_shared_experts: experts that every token passes through besides.

        Raises:
            ValueError: top_k or group_over make no sense.
        """
        super().__init__()
        check_expert_choice(top_k, num_experts, group_over)
        self.num_experts, self.top_k = num_experts, top_k
        self.group_size, self.group_over = group_size, group_over
        self.gate = Router(hidden_size, num_experts)
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, **sizes)
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); a token that no expert takes gets zeros, and is counted as dropped."""
        logits_BLE = self.gate(x_BLD)
        probs_BLE = logits_BLE.softmax(-1)
        real_BL1 = torch.ones_like(probs_BLE[..., :1]) if mask_BL is None else mask_BL.unsqueeze(-1).to(probs_BLE)
        routing = self._choose(probs_BLE, real_BL1)
        y_TD = sparse_experts(self.experts, x_BLD.flatten(0, 1), routing)
        stats = expert_choice_stats(logits_BLE, probs_BLE, mask_BL, routing) if want_stats else None
        return y_TD.view(x_BLD.shape), stats

    def _choose(self, probs_BLE: Tensor, real_BL1: Tensor) -> SparseRouting:
        """Every expert's best tokens, by descending score within a group.

        A last group that is not full hands out only the tokens it has. Filling it up would need rows that belong to no
        token, and wherever such rows point, several would add to one place.
        """
        batch, length, num_experts = probs_BLE.shape
        index_BL = torch.arange(batch * length, device=probs_BLE.device).view(batch, length)
        # Padding scores -1, so it is taken only when nothing real is left, and then with weight 0.
        score_OIE = self._competing(torch.where(real_BL1.bool(), probs_BLE, -1.0))
        index_OI = self._competing(index_BL)
        group_size = score_OIE.size(1) if self.group_over == "all" else self.group_size or batch
        limit = min(capacity(group_size, self.top_k, num_experts, 1.0), group_size)
        full = score_OIE.size(1) // group_size * group_size
        token_RE, weight_RE = [], []
        for places, size in ((slice(0, full), group_size), (slice(full, None), score_OIE.size(1) - full)):
            if size:
                score_NGE = score_OIE[:, places].reshape(-1, size, num_experts)
                weight_NCE, chosen_NCE = score_NGE.topk(min(limit, size), dim=1)
                index_NGE = index_OI[:, places].reshape(-1, size, 1).expand_as(score_NGE)
                token_RE.append(index_NGE.gather(1, chosen_NCE).flatten(0, 1))
                weight_RE.append(weight_NCE.clamp_min(0).flatten(0, 1))
        token_RE, weight_RE = torch.cat(token_RE), torch.cat(weight_RE)
        return SparseRouting(
            token_R=token_RE.T.flatten(),
            weight_R=weight_RE.T.flatten(),
            tokens_per_expert_E=torch.full_like(index_BL[0, :1], len(token_RE)).expand(num_experts),
        )

    def _competing(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (O, I, ...): the tokens of which each run of G along I competes, for each of O places."""
        return x.transpose(0, 1) if self.group_over == "batch" else x.flatten(0, 1).unsqueeze(0)
