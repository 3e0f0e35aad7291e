"""Token choice: a router scores every expert for every token, and each token is sent to its top_k.

Switch Transformer (arXiv 2101.03961), Mixtral (2401.04088), DeepSeek-V3 (2412.19437) are settings of this one layer, as
are MoE++'s free experts (2410.07348) without its gating residuals and its capacities. Dropless by default: with a
capacity, tokens over it are dropped as they arrive, and counted. Without a router, examples name experts (2110.03742).

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, K top_k, R routed rows.
"""

from typing import Literal

import torch
from torch import Tensor

from mixtura import kernels
from mixtura.layers.decoding_step import token_choice_step
from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.limits import check_expert_groups, check_token_choice, check_token_choice_options
from mixtura.layers.routing import (
    ChoiceTap,
    FreeExperts,
    Router,
    in_best_groups,
    named_experts,
    row_limit,
    run_chosen,
    straight_through,
)
from mixtura.layers.statistics import RoutingStats, balance_counts, sum_of_real, token_choice_stats, with_sequence_loss


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
        expert_groups: int = 1,
        groups_per_token: int = 1,
        dense_router_gradient: bool = False,
        zero_experts: int = 0,
        copy_experts: int = 0,
        constant_experts: int = 0,
        latent_size: int | None = None,
        balance_by_sequence: bool = False,
        free_expert_balance: float = 0.75,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, the width of one expert; fine-grained experts are many experts with a small F.
            num_experts, top_k: E, and K, the experts a token is sent to.
            activation, gated: "relu", "gelu" or "silu", in gated experts (SwiGLU and its kin) or plain ones.
            score_function: how logits become weights.
            normalize_top_k: make a token's K weights sum to one. With K = 1 the router then gets no gradient.
            routed_scaling_factor: multiplies the weights (DeepSeek-V3).
            capacity_factor: rows an expert takes, as a multiple of an even share; None is dropless.
            expert_bias: keep a bias that only takes part in the choice (loss-free balancing, arXiv 2408.15664).
            num_shared_experts: experts that every token passes through, as one layer of that many times F.
            learned_router: False has none: the caller names an expert for each example, which all its tokens go to.
            expert_groups, groups_per_token: a token chooses from so many groups of experts; see `in_best_groups`.
            dense_router_gradient: train the router as if all experts ran; see `straight_through`.
            zero_experts, copy_experts, constant_experts: further experts of no cost; see `FreeExperts`.
            latent_size: the experts work in a space of that size; see `Experts`.
            balance_by_sequence: statistics have the sequences' balancing loss; free experts count less there.

        Raises:
            ValueError: a setting makes no sense, or one of routers is given to a layer without one.
        """
        super().__init__()
        check_token_choice(top_k, num_experts, capacity_factor, score_function, expert_bias, learned_router)
        check_expert_groups(top_k, num_experts, expert_groups, groups_per_token, learned_router)
        free = (zero_experts, copy_experts, constant_experts)
        check_token_choice_options(free, dense_router_gradient, capacity_factor, expert_groups, learned_router)
        self.routes_by_example = not learned_router
        self.num_experts, self.top_k, self.score_function = num_experts + sum(free), top_k, score_function
        self.normalize_top_k, self.routed_scaling_factor = normalize_top_k, routed_scaling_factor
        self.capacity_factor, self.dense_router_gradient = capacity_factor, dense_router_gradient
        self.expert_groups, self.groups_per_token = expert_groups, groups_per_token
        self.balance_by_sequence, self.free_expert_balance = balance_by_sequence, free_expert_balance
        self.gate = Router(hidden_size, self.num_experts) if learned_router else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(self.num_experts) if expert_bias else None)
        self.choice_tap = ChoiceTap()
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, latent_size=latent_size, **sizes)
        self.free_experts = FreeExperts(hidden_size, *free) if sum(free) else None
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D) and the statistics of the real tokens."""
        x_TD, decoding = x_BLD.flatten(0, 1), x_BLD.size(1) == 1
        if decoding and not want_stats and (y_TD := token_choice_step(self, x_TD)) is not None:
            return y_TD.view(x_BLD.shape), None
        # Padding only matters where tokens compete or are counted; otherwise it may pass through the experts unseen.
        counted = want_stats or self.capacity_factor is not None
        real_T = mask_BL.flatten().bool() if mask_BL is not None and counted else None
        logits_TE = None if self.gate is None else self.gate(x_TD)
        if logits_TE is None:
            assert expert_B is not None, "FeedForward.forward asks for the experts of a layer without a router"
            expert_T = expert_B.repeat_interleave(x_BLD.size(1))
            choice_TK, weight_TK, probs_TE = named_experts(expert_T, self.num_experts, x_TD.dtype)
        else:
            choice_TK, weight_TK, probs_TE = self._choose(logits_TE)
        self.choice_tap(weight_TK, None if weight_TK.size(1) > choice_TK.size(1) else choice_TK)
        limit = row_limit(x_TD, real_T, self.top_k, self.num_experts, self.capacity_factor)
        choice = (choice_TK, weight_TK, real_T, limit, counted, decoding)
        y_TD, rows_E = run_chosen(self.experts, self.free_experts, x_TD, *choice)
        if not want_stats:
            return y_TD.view(x_BLD.shape), None
        if rows_E is None:
            rows_E = sum_of_real(torch.zeros_like(probs_TE).scatter(1, choice_TK, 1.0), real_T)
        stats = token_choice_stats(logits_TE, probs_TE, real_T, rows_E, limit)
        if self.balance_by_sequence:
            counts_E = balance_counts(probs_TE, self.experts.num_experts, self.free_expert_balance)
            stats = with_sequence_loss(stats, choice_TK, probs_TE, mask_BL, len(x_BLD), counts_E)
        return y_TD.view(x_BLD.shape), stats

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts (T, K), their weights (T, K), or those of all (T, E), and all probabilities (T, E)."""
        softmax = self.score_function == "softmax"
        scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
        probs_TE = scores_TE if softmax else scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        biased_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
        if self.expert_groups > 1:
            biased_TE = in_best_groups(biased_TE, self.top_k, self.expert_groups, self.groups_per_token)
        choice_TK = kernels.top_k(biased_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, choice_TK)
        if self.dense_router_gradient and self.training and self.top_k < self.num_experts:
            weight_TK = straight_through(scores_TE, choice_TK)
        if self.normalize_top_k:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return choice_TK, weight_TK * self.routed_scaling_factor, probs_TE
