"""Token choice: a router scores every expert for every token, and each token is sent to its top_k.

Switch Transformer (arXiv 2101.03961), Mixtral (arXiv 2401.04088), DeepSeek-V3 (arXiv 2412.19437) are settings of this
one layer. Dropless by default: with a capacity, tokens over it are dropped in order of arrival, and counted.
Without a router, experts are named for whole examples (Kudugunta et al. 2021, arXiv 2110.03742).

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, K top_k, R routed rows.
"""

from typing import Literal

import torch
from torch import Tensor

from mixtura.kernels import are_few, top_k
from mixtura.layers.dense import DenseFFN
from mixtura.layers.experts import Experts, unwrapped
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.losses import router_z_loss
from mixtura.layers.routing import (
    ChoiceTap,
    Router,
    SparseRouting,
    chosen_experts,
    sort_by_expert,
    sparse_experts,
)
from mixtura.layers.statistics import RoutingStats, mean_of_real, normalized_entropy
from mixtura.planning.shapes import capacity, even_rows


class TokenChoiceMoE(FeedForward):
    """Mixture of experts in which tokens choose."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        activation: str = "relu",
        gated: bool = False,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        normalize_top_k: bool = False,
        routed_scaling_factor: float = 1.0,
        capacity_factor: float | None = None,
        expert_bias: bool = False,
        num_shared_experts: int = 0,
        learned_router: bool = True,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, the width of one expert; fine-grained experts are many experts with a small F.
            num_experts: E.
            top_k: K, experts a token is sent to.
            activation: "relu", "gelu" or "silu".
            gated: gated experts (SwiGLU and its kin).
            score_function: how logits become weights.
            normalize_top_k: make a token's K weights sum to one. With K = 1 the router then gets no gradient.
            routed_scaling_factor: multiplies the weights (DeepSeek-V3).
            capacity_factor: rows an expert takes, as a multiple of an even share; None is dropless.
            expert_bias: keep a bias that only takes part in the choice (loss-free balancing, arXiv 2408.15664).
            num_shared_experts: experts that every token passes through, as one layer of that many times F.
            learned_router: False has no router: the caller names an expert for each example, such as its language, and
                all its tokens go there with weight 1 (task-level routing, arXiv 2110.03742, section 3).

        Raises:
            ValueError: top_k does not lie between 1 and num_experts, capacity_factor is not positive, or a setting of
                routers is given to a layer without one.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: it must lie between 1 and num_experts, which is {num_experts}.")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor is {capacity_factor}: it must be greater than zero, or None for dropless."
            )
        if score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function is {score_function!r}: it must be softmax or sigmoid.")
        if not learned_router and (top_k != 1 or capacity_factor is not None or expert_bias):
            raise ValueError(
                f"top_k is {top_k}, capacity_factor {capacity_factor} and expert_bias {expert_bias}: without a router "
                "an example has one expert and no token is dropped, so set them to 1, None and False."
            )
        self.routes_by_example = not learned_router
        self.num_experts, self.top_k, self.score_function = num_experts, top_k, score_function
        self.normalize_top_k, self.routed_scaling_factor = normalize_top_k, routed_scaling_factor
        self.capacity_factor = capacity_factor
        self.gate = Router(hidden_size, num_experts) if learned_router else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(num_experts) if expert_bias else None)
        self.choice_tap = ChoiceTap()
        sizes = {"activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, intermediate_size=intermediate_size, num_experts=num_experts, **sizes)
        self.shared_expert = None
        if num_shared_experts:
            self.shared_expert = DenseFFN(
                hidden_size, intermediate_size=num_shared_experts * intermediate_size, **sizes
            )

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D) and the statistics of the real tokens."""
        x_TD = x_BLD.flatten(0, 1)
        # Padding only matters where tokens compete or are counted; otherwise it may pass through the experts unseen.
        apart = want_stats or self.capacity_factor is not None
        real_T = mask_BL.flatten().bool() if mask_BL is not None and apart else None
        if expert_B is not None:
            choice_TK, weight_TK, probs_TE = self._named(expert_B.repeat_interleave(x_BLD.size(1)), x_TD)
            logits_TE = None
        else:
            assert self.gate is not None, "FeedForward.forward asks for the experts of a layer without a router"
            logits_TE = self.gate(x_TD)
            choice_TK, weight_TK, probs_TE = self._choose(logits_TE)
        self.choice_tap(weight_TK, choice_TK)
        stats = None
        if not apart and are_few(choice_TK.numel(), unwrapped(self.experts).activation, x_TD):
            y_TD = chosen_experts(self.experts, x_TD.unsqueeze(1), choice_TK, weight_TK)
        else:
            routing = sort_by_expert(choice_TK, weight_TK, self.num_experts)
            rows_E, limit = routing.tokens_per_expert_E, self._limit(x_TD, real_T)
            if real_T is not None or limit is not None:
                routing, rows_E = _kept_rows(routing, real_T, limit)
            y_TD = sparse_experts(self.experts, x_TD, routing)
            stats = self._stats(logits_TE, probs_TE, real_T, rows_E, limit) if want_stats else None
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_BLD).flatten(0, 1)
        return y_TD.view(x_BLD.shape), stats

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts (T, K), their weights (T, K) and every expert's probability (T, E)."""
        softmax = self.score_function == "softmax"
        scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
        biased_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
        choice_TK = top_k(biased_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, choice_TK)
        if self.normalize_top_k:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        probs_TE = scores_TE if softmax else scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        return choice_TK, weight_TK * self.routed_scaling_factor, probs_TE

    def _named(self, expert_T: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_choose`, for tokens whose experts the caller names: each has one, with weight 1."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        probs_TE = torch.nn.functional.one_hot(expert_T, self.num_experts).to(dtype)
        return expert_T.unsqueeze(-1), torch.ones_like(expert_T, dtype=dtype).unsqueeze(-1), probs_TE

    def _limit(self, x_TD: Tensor, real_T: Tensor | None) -> int | Tensor | None:
        """Most rows that an expert keeps, a tensor where only the device knows the real tokens; None keeps all."""
        if self.capacity_factor is None:
            return None
        sizes = (self.top_k, self.num_experts, self.capacity_factor)
        if real_T is None:
            return capacity(len(x_TD), *sizes)
        if _nothing_may_wait(x_TD):
            tokens = real_T.sum()
            return even_rows(tokens.double(), *sizes).ceil().long().minimum(tokens).clamp_min(1)
        return capacity(int(real_T.sum()), *sizes)

    def _stats(
        self,
        logits_TE: Tensor | None,
        probs_TE: Tensor,
        real_T: Tensor | None,
        rows_E: Tensor,
        limit: int | Tensor | None,
    ) -> RoutingStats:
        """`rows_E` are those of real tokens, before any is dropped."""
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


def _nothing_may_wait(tensor: Tensor) -> bool:
    """Whether a number of rows that depends on the data is known to the device alone, or to nobody in a graph."""
    return tensor.is_cuda or torch.compiler.is_compiling()


def _kept_rows(
    routing: SparseRouting, real_T: Tensor | None, limit: int | Tensor | None
) -> tuple[SparseRouting, Tensor]:
    """The first `limit` rows of every expert that are not padding, and how many there would be without a limit (E,).

    Where nothing may wait the other rows stay, with a weight of zero, at the cost of the layer without padding or
    capacity.
    """
    counts_E, rows = routing.tokens_per_expert_E, len(routing.token_R)
    real_R = torch.ones_like(routing.token_R) if real_T is None else real_T[routing.token_R].long()
    before_R = torch.nn.functional.pad(real_R.cumsum(0), (1, 0))  # one more than R: the last is their number
    ends_E = counts_E.cumsum(0)
    starts_E = ends_E - counts_E
    real_E = before_R[ends_E] - before_R[starts_E]
    kept_R = real_R.bool()
    if limit is not None:
        first_R = before_R[starts_E].repeat_interleave(counts_E, output_size=rows)
        kept_R = kept_R & (before_R[:-1] - first_R < limit)
    if _nothing_may_wait(counts_E):
        return routing._replace(weight_R=torch.where(kept_R, routing.weight_R, 0.0)), real_E
    kept_E = real_E if limit is None else real_E.clamp_max(limit)
    return SparseRouting(routing.token_R[kept_R], routing.weight_R[kept_R], kept_E), real_E
