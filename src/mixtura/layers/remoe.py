"""ReMoE: gates are ReLUs of the router's logits, so a token runs the experts whose logits are positive.

Wang et al., arXiv 2412.14711, section 3: the choice of experts is as differentiable as the layer. A penalty on the
gates (`l1_penalty`), which counts for more where an expert is busy, makes them sparse and evens out the load. Its
coefficient grows while more than top_k experts run for a token on average, and shrinks while fewer do. Training starts
with about half of the experts and gets sparse within some hundred steps. Nothing looks at other tokens.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, M layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.limits import check_top_k
from mixtura.layers.routing import ChoiceTap, Router, active_rows, sparse_experts
from mixtura.layers.statistics import RoutingStats, varying_choice_stats


class ReMoE(FeedForward):
    """Mixture of experts with ReLU gates."""

    l1_coef: Tensor
    """Weight of the penalty, the same in all layers of a model: state of the training, saved with the layer."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 1,
        activation: str = "relu",
        gated: bool = False,
        l1_coef_start: float = 1e-8,
        num_shared_experts: int = 0,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, the width of one expert.
            num_experts: E.
            top_k: experts a token runs on average, once training has made the gates sparse.
            activation: "relu", "gelu" or "silu".
            gated: gated experts.
            l1_coef_start: the penalty's weight at the start of training.
            num_shared_experts: experts that every token passes through.

        Raises:
            ValueError: top_k does not lie between 1 and num_experts, or l1_coef_start is not positive.
        """
        super().__init__()
        check_top_k(top_k, num_experts)
        if l1_coef_start <= 0:
            raise ValueError(f"l1_coef_start is {l1_coef_start}: it must be greater than zero, or it never grows.")
        self.num_experts, self.top_k, self.l1_coef_start = num_experts, top_k, l1_coef_start
        self.gate = Router(hidden_size, num_experts)
        self.choice_tap = ChoiceTap()
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, **sizes)
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)
        self.register_buffer("l1_coef", torch.tensor(l1_coef_start))

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D); a token without a positive logit gets zeros, and is counted as dropped."""
        x_TD = x_BLD.flatten(0, 1)
        real_T = None if mask_BL is None else mask_BL.flatten().bool()
        logits_TE = self.gate(x_TD)
        gate_TE = logits_TE.relu()
        if real_T is not None:
            gate_TE = torch.where(real_T.unsqueeze(-1), gate_TE, 0.0)
        active_TE = gate_TE > 0
        self.choice_tap(gate_TE)
        y_TD = sparse_experts(self.experts, x_TD, active_rows(gate_TE, active_TE))
        stats = varying_choice_stats(logits_TE, gate_TE, active_TE, real_T) if want_stats else None
        return y_TD.view(x_BLD.shape), stats


def l1_penalty(stats: RoutingStats, top_k: int) -> Tensor:
    """The mean over tokens of their gates' sum, each gate weighted by its expert's load (equations 10 and 11).

    An expert's load is its share of the tokens as a multiple of top_k / E, the share that is due. Gradient flows
    through the gates alone.
    """
    share_E = stats.tokens_per_expert_E.detach() / stats.routed_rows.clamp_min(1.0)
    return len(share_E) / top_k * (share_E * stats.importance_E).sum()


@torch.no_grad()
def update_l1_coef(layers: Sequence[ReMoE], active_M: Tensor, *, factor: float) -> None:
    """Multiplies the penalty's weight by `factor` if too many experts ran, or divides by it if too few (equation 8).

    Args:
        layers: the M layers of a model.
        active_M: the mean number of experts that a token of the whole optimizer step ran in each.
        factor: 1.2 in the paper.
    """
    for layer in layers:
        layer.l1_coef.mul_(factor ** torch.sign(active_M.mean() - layer.top_k))
