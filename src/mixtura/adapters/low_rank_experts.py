"""Routed low-rank experts: the gates that weigh them, and the update that they add (B_e A_e x).

One update for all published mixtures of LoRA (Hu et al., arXiv 2106.09685, is its case of one expert):

    y = W x + scale * sum_e w_e(x) B_e A_e x                 scale = alpha / rank

The update is linear between A and B, so an expert's weight can be applied to its ranks there. All experts together are
then two matrix products of width E * rank, whatever the gates.

Shapes: B batch, L length, T = B*L tokens, D width of the router's input, I inputs, O outputs, E experts, R rank.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.layers import ChoiceTap, RoutingStats
from mixtura.layers.routing import router_logits
from mixtura.layers.statistics import mean_of_real, normalized_entropy, router_z_loss, sum_of_real

RouterKind = Literal["top_k", "dense", "threshold", "task"]


class Gates(NamedTuple):
    """A router's output for a batch of tokens."""

    weight_TE: Tensor
    """Weight of each expert's output; zero where an expert is not chosen."""
    probs_TE: Tensor
    """The router's probabilities, for the load-balancing loss."""
    logits_TE: Tensor | None
    """None where there is no router."""


def top_k_weights(probs_TE: Tensor, top_k: int, *, normalize: bool) -> Tensor:
    """(T, E) -> (T, E): the probabilities of each token's `top_k` best experts, summing to one if `normalize`."""
    value_TK, index_TK = probs_TE.topk(top_k, dim=-1)
    if normalize:
        value_TK = value_TK / value_TK.sum(-1, keepdim=True)
    return torch.zeros_like(probs_TE).scatter(-1, index_TK, value_TK)


def threshold_weights(probs_TE: Tensor, threshold_T1: Tensor) -> Tensor:
    """(T, E) -> (T, E): what exceeds the token's threshold, divided by its sum (AdaMoLE, arXiv 2405.00361)."""
    margin_TE = (probs_TE - threshold_T1).clamp_min(0)
    return margin_TE / margin_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(margin_TE.dtype).tiny)


def low_rank_update(x_TI: Tensor, a_ERI: Tensor, b_EOR: Tensor, weight_TE: Tensor) -> Tensor:
    """(T, I) -> (T, O): sum_e w_e B_e A_e x; A may be one for all experts, (1, R, I)."""
    h_TXR = F.linear(x_TI, a_ERI.flatten(0, 1)).unflatten(-1, a_ERI.shape[:2])
    h_TER = h_TXR * weight_TE.unsqueeze(-1)
    return h_TER.flatten(1) @ b_EOR.transpose(1, 2).flatten(0, 1)


def routing_statistics(gates: Gates, real_T: Tensor | None) -> RoutingStats:
    """Statistics of the real tokens: rows an expert is given where the router chooses, else the sum of its weights."""
    weight_TE, probs_TE, logits_TE = gates
    chosen_TE = weight_TE.detach().float()
    chooses = sum_of_real((chosen_TE == 0).any(-1), real_T) > 0
    chosen_TE = torch.where(chooses, (chosen_TE > 0).float(), chosen_TE)
    chosen_E = sum_of_real(chosen_TE, real_T)
    rows = chosen_E.sum()
    return RoutingStats(
        tokens_per_expert_E=chosen_E,
        importance_E=mean_of_real(probs_TE.float(), real_T),
        router_z_loss=rows.new_zeros(()) if logits_TE is None else router_z_loss(logits_TE, real_T),
        dropped_tokens=torch.zeros_like(rows),
        routed_rows=rows,
        entropy=normalized_entropy(weight_TE, -1, real_T),
        sequence_loss=torch.zeros_like(rows),
    )


class LowRankExperts(nn.Module):
    """The router and the experts of one layer: low-rank updates of one linear layer, or of several with one routing."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        router_width: int,
        router: RouterKind,
        num_experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        top_k: int = 2,
        normalize_top_k: bool = True,
        threshold_max: float | None = None,
        share_a: bool = False,
        num_tasks: int | None = None,
    ) -> None:
        """Builds the experts. Every B starts at zero, and so does the update.

        Args:
            shapes: inputs and outputs (I, O) of each linear layer.
            router_width: D.
            router: how experts are chosen; see `mixtura.config.AdapterConfig`.
            num_experts: E.
            rank: R, of one expert.
            alpha: the update is scaled by alpha / rank.
            dropout: of the experts' inputs.
            top_k: experts a token is given.
            normalize_top_k: make a token's weights sum to one.
            threshold_max: largest threshold; None is 1 / num_experts.
            share_a: one A for all experts.
            num_tasks: task routing with a learned softmax over the experts for each of so many tasks; None makes the
                task id the expert.
        """
        super().__init__()
        self.router, self.num_experts, self.rank, self.scale = router, num_experts, rank, alpha / rank
        self.top_k, self.normalize_top_k, self.num_tasks = top_k, normalize_top_k, num_tasks
        self.threshold_max = 1 / num_experts if threshold_max is None else threshold_max
        self.dropout = nn.Dropout(dropout)
        self.choice_tap = ChoiceTap()
        rows = 1 if share_a else num_experts
        self.A = nn.ParameterDict({n: nn.Parameter(torch.empty(rows, rank, i)) for n, (i, _) in shapes.items()})
        self.B = nn.ParameterDict({n: nn.Parameter(torch.zeros(num_experts, o, rank)) for n, (_, o) in shapes.items()})
        if router != "task":
            self.gate = nn.Linear(router_width, num_experts, bias=False)
        elif num_tasks is not None:
            self.task_logits = nn.Parameter(torch.zeros(num_tasks, num_experts))
        if router == "threshold":
            self.threshold = nn.Linear(router_width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws A as LoRA does and the router from a normal distribution; B becomes zero."""
        for a_ERI in self.A.values():
            for a_RI in a_ERI:
                nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
        for b_EOR in self.B.values():
            nn.init.zeros_(b_EOR)
        if self.router != "task":
            nn.init.normal_(self.gate.weight, std=0.02)
        elif self.num_tasks is not None:
            nn.init.normal_(self.task_logits, std=0.02)  # equal weights would keep the experts' gradients equal
        if self.router == "threshold":
            nn.init.zeros_(self.threshold.weight)
            nn.init.zeros_(self.threshold.bias)

    def gates(self, x_TD: Tensor, task_T: Tensor | None) -> Gates:
        """Weights (T, E) of the experts for each token, in float32 or wider."""
        gates = self._task_gates(x_TD, task_T) if self.router == "task" else self._token_gates(x_TD)
        self.choice_tap(gates.weight_TE)
        return gates

    def _task_gates(self, x_TD: Tensor, task_T: Tensor | None) -> Gates:
        assert task_T is not None
        probs_TE = self._task_weights(task_T, torch.promote_types(x_TD.dtype, torch.float32))
        return Gates(probs_TE, probs_TE, None)

    def _token_gates(self, x_TD: Tensor) -> Gates:
        logits_TE = router_logits(x_TD, self.gate.weight)
        probs_TE = logits_TE.softmax(-1)
        weight_TE = probs_TE
        if self.router == "top_k":
            weight_TE = top_k_weights(probs_TE, self.top_k, normalize=self.normalize_top_k)
        elif self.router == "threshold":
            bias = self.threshold.bias.to(logits_TE.dtype)
            threshold_T1 = self.threshold_max * torch.sigmoid(router_logits(x_TD, self.threshold.weight) + bias)
            weight_TE = threshold_weights(probs_TE, threshold_T1)
        return Gates(weight_TE, probs_TE, logits_TE)

    def _task_weights(self, task_T: Tensor, dtype: torch.dtype) -> Tensor:
        if self.num_tasks is None:
            return F.one_hot(task_T.long(), self.num_experts).to(dtype)
        return self.task_logits.to(dtype).softmax(-1)[task_T.long()]

    def update(self, name: str, x_TI: Tensor, weight_TE: Tensor) -> Tensor:
        """(T, I) -> (T, O): the weighted update of linear layer `name`, in the type of `x_TI`."""
        a_ERI, b_EOR = self.A[name], self.B[name]
        x_cast_TI = self.dropout(x_TI.to(a_ERI.dtype))
        y_TO = low_rank_update(x_cast_TI, a_ERI, b_EOR, weight_TE.to(a_ERI.dtype))
        return (y_TO * self.scale).to(x_TI.dtype)

    def expert_update(self, name: str, expert: int, x_TI: Tensor) -> Tensor:
        """(T, I) -> (T, O): scale * B_e A_e x of one expert."""
        a_ERI, b_EOR = self.A[name], self.B[name]
        h_TR = F.linear(self.dropout(x_TI.to(a_ERI.dtype)), a_ERI[0 if len(a_ERI) == 1 else expert])
        return (F.linear(h_TR, b_EOR[expert]) * self.scale).to(x_TI.dtype)

    def extra_repr(self) -> str:
        """Settings, for print(model)."""
        return f"router={self.router}, num_experts={self.num_experts}, rank={self.rank}, scale={self.scale:g}"
