"""The routing contract: what every family's router hands to the experts.

A family is route -> dispatch -> experts -> combine and differs only in route. Sparse routings gather rows, dense
routings take weighted sums; `sparse_experts` and `dense_experts` are the rest of the layer for each kind.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, K top_k, R routed rows, N groups, G tokens of a group,
C mixtures (slots) an expert has in a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixtura import kernels
from mixtura.layers.experts import Experts
from mixtura.planning.shapes import capacity, even_rows


class SparseRouting(NamedTuple):
    """Which tokens each expert takes: rows sorted by expert, each a token's index and the weight of its output."""

    token_R: Tensor
    weight_R: Tensor
    tokens_per_expert_E: Tensor
    row_TK: Tensor | None = None
    """Where each token's K rows are, if that is known and every token has K."""


class DenseRouting(NamedTuple):
    """The weights that mix a group's tokens into the experts' slots, and those that spread the outputs back."""

    dispatch_NGEC: Tensor
    combine_NGEC: Tensor


class ChoiceTap(nn.Module):
    """Where forward hooks see which experts each token was given; by itself it does nothing.

    A layer calls it with the weights and indices of a token's experts, (T, K) each, or, where every expert takes part,
    with the weights (T, E*C) alone, the columns of one expert side by side; a zero there is an expert not chosen.
    Tokens come in order, padding among them.
    """

    @property
    def watched(self) -> bool:
        """Whether there is a hook to show anything to."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def forward(self, weight_TK: Tensor, expert_TK: Tensor | None = None) -> None:
        """Shows hooks what was chosen."""


def router_logits(x: Tensor, weight_ED: Tensor) -> Tensor:
    """(..., D) -> (..., E) in float32 or wider, whatever autocast says: in bfloat16 near-ties change the choice."""
    if x.dtype == weight_ED.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        return torch.nn.functional.linear(x, weight_ED)  # on its own: next to one token every call counts
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not torch.is_autocast_enabled(x.device.type):  # entering a context costs as much as the product of one token
        return torch.nn.functional.linear(x.to(dtype), weight_ED.to(dtype))
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.to(dtype), weight_ED.to(dtype))


class Router(nn.Linear):
    """A linear map to router logits, (..., D) -> (..., E), by `router_logits`.

    Layers call it and never read its weight: an adapter changes what the call returns, and the weight knows nothing of
    it.
    """

    def __init__(self, hidden_size: int, num_logits: int) -> None:
        """E is `num_logits`."""
        super().__init__(hidden_size, num_logits, bias=False)
        self.fixed = False

    def fix(self) -> None:
        """Keeps the weights as they are, for controls; hidden states get no gradient through it either.

        As the fixed router of SMoE-Dropout (arXiv 2303.01610, section 3.2), but that nothing before it learns to
        be routed.
        """
        self.fixed = True
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        if self.fixed:  # transformers loads a checkpoint into parameters that want a gradient again
            return router_logits(input.detach(), self.weight.detach())
        return router_logits(input, self.weight)


class FreeExperts(nn.Module):
    """Experts that cost nothing: zero, copy and constant experts of MoE++ (arXiv 2410.07348, section 3.1).

    A zero expert gives 0, a copy expert x, a constant expert a x + b v with a vector v and (a, b) = softmax(W x).
    """

    def __init__(self, hidden_size: int, zero: int, copy: int, constant: int) -> None:
        """How many there are of each; their columns of the routing come in this order."""
        super().__init__()
        self.counts = (zero, copy, constant)
        self.shares = Router(hidden_size, 2 * constant) if constant else None
        self.constant = nn.Parameter(torch.empty(constant, hidden_size)) if constant else None
        if self.constant is not None:
            nn.init.normal_(self.constant, std=0.02)

    def forward(self, x_TD: Tensor, weight_TZ: Tensor) -> Tensor:
        """(T, D) -> (T, D): the weighted sum of their outputs; a weight of zero where one was not chosen."""
        _, copied_TC, constant_TC = weight_TZ.split(self.counts, dim=-1)
        kept_T1 = copied_TC.sum(-1, keepdim=True)
        if self.shares is None or self.constant is None:
            return (kept_T1 * x_TD).to(x_TD.dtype)
        of_x_TC, of_v_TC = self.shares(x_TD).unflatten(-1, (-1, 2)).softmax(-1).unbind(-1)
        kept_T1 = kept_T1 + (constant_TC * of_x_TC).sum(-1, keepdim=True)
        added_TD = (constant_TC * of_v_TC).to(x_TD.dtype) @ self.constant
        return (kept_T1 * x_TD).to(x_TD.dtype) + added_TD.to(x_TD.dtype)


def sparse_experts(experts: Experts, x_TD: Tensor, routing: SparseRouting) -> Tensor:
    """(T, D) -> (T, D): gather, experts, weighted scatter. A token with no row gets zeros."""
    *rows, row_TK = routing
    return experts(x_TD, partial(kernels.sparse_ffn, row_TK=row_TK), *rows)


def dense_experts(experts: Experts, x_NGD: Tensor, routing: DenseRouting) -> Tensor:
    """(N, G, D) -> (N, G, D): mix, experts on the mixtures, spread."""
    return experts(x_NGD, kernels.mixed_ffn, *routing)


def sort_by_expert(expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> SparseRouting:
    """Turns each token's chosen experts (T, K) into rows sorted by expert, tokens in order within an expert."""
    return SparseRouting(*kernels.rows_by_expert(expert_TK, weight_TK, num_experts))


def active_rows(weight_TE: Tensor, active_TE: Tensor) -> SparseRouting:
    """A row for every token and expert that belong together, where their number differs from token to token.

    An accelerator has to say how many there are. A compiled graph cannot know: there every token is a row of every
    expert, with a weight of zero where they do not belong together, and costs what that costs.

    Args:
        weight_TE: the weight of every expert's output, zero where it does not run.
        active_TE: which experts run.
    """
    tokens, num_experts = weight_TE.shape
    if torch.compiler.is_compiling():
        token_R = torch.arange(tokens, device=weight_TE.device).repeat(num_experts)
        return SparseRouting(token_R, weight_TE.T.flatten(), torch.full_like(token_R[:1], tokens).expand(num_experts))
    expert_R, token_R = active_TE.T.nonzero(as_tuple=True)
    # By its place and not by the mask, whose count the host would wait for a second time.
    weight_R = weight_TE.flatten().index_select(0, token_R * num_experts + expert_R)
    return SparseRouting(token_R, weight_R, active_TE.sum(0))


def run_chosen(
    experts: Experts,
    free: FreeExperts | None,
    x_TD: Tensor,
    choice_TK: Tensor,
    weight_TK: Tensor,
    real_T: Tensor | None,
    limit: int | Tensor | None,
    counted: bool,
    decoding: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(T, D) -> (T, D): each token through its experts; and, if `counted` on the way, how many chose each expert.

    Weights are of all experts, (T, E), where all run for the router's sake.

    Args:
        experts: those that cost something.
        free: those that do not, whose numbers follow.
        x_TD: the tokens.
        choice_TK: their experts.
        weight_TK: the weights of these.
        real_T: which tokens are real, where that matters.
        limit: the most real tokens that an expert takes.
        counted: whether to sort the rows by expert, which counts them.
        decoding: whether the tokens are one of each sequence.
    """
    backend = _backend(experts)
    run = backend or partial(kernels.routed_ffn, decoding=decoding)
    if weight_TK.size(1) > choice_TK.size(1):
        expert_TE = torch.arange(weight_TK.size(1), device=x_TD.device).expand_as(weight_TK)
        return experts(x_TD, run, expert_TE, weight_TK), None
    if free is not None:
        weight_TE = weight_TK.new_zeros(len(x_TD), experts.num_experts + sum(free.counts))
        active_TE = torch.zeros_like(weight_TE, dtype=torch.bool).scatter(1, choice_TK, True)
        paid_TE, free_TZ = weight_TE.scatter(1, choice_TK, weight_TK).tensor_split([experts.num_experts], dim=1)
        y_TD = sparse_experts(experts, x_TD, active_rows(paid_TE, active_TE[:, : experts.num_experts]))
        return y_TD + free(x_TD, free_TZ), None
    if not counted:
        return experts(x_TD, run, choice_TK, weight_TK), None
    if backend is not None:
        return _counted_on_backend(experts, backend, x_TD, choice_TK, weight_TK, real_T)
    routing = sort_by_expert(choice_TK, weight_TK, experts.num_experts)
    rows_E = routing.tokens_per_expert_E
    if real_T is not None or limit is not None:
        *kept, rows_E = kernels.first_real_rows(*routing[:3], real_T, limit)
        # Where every row is kept, some with a weight of zero, each token's rows still are where they were.
        routing = SparseRouting(*kept, row_TK=routing.row_TK if kept[0] is routing.token_R else None)
    return sparse_experts(experts, x_TD, routing), rows_E


def plain_activation(experts: Any) -> str | None:
    """The activation of experts that our kernels run here; None where a backend or other processes run them."""
    experts = _unwrapped(experts)
    return experts.activation if experts.backend is None and experts.exchange is None else None


def _backend(experts: Any) -> Callable[..., Tensor] | None:
    """What runs the experts in place of our kernels."""
    return _unwrapped(experts).backend


def _unwrapped(experts: Any) -> Experts:
    """PEFT wraps experts, once for each parameter that it changes."""
    while not isinstance(experts, Experts):
        experts = experts.base_layer
    return experts


def _counted_on_backend(
    experts: Experts,
    backend: Callable[..., Tensor],
    x_TD: Tensor,
    choice_TK: Tensor,
    weight_TK: Tensor,
    real_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `run_chosen`, by a backend, which also runs padding, with a weight of zero."""
    real_T1 = torch.ones_like(choice_TK[:, :1]) if real_T is None else real_T.unsqueeze(-1).to(choice_TK.dtype)
    y_TD = experts(x_TD, backend, choice_TK, weight_TK if real_T is None else weight_TK * real_T1)
    rows_E = torch.zeros(experts.num_experts, dtype=choice_TK.dtype, device=x_TD.device)
    return y_TD, rows_E.index_add(0, choice_TK.flatten(), real_T1.expand_as(choice_TK).flatten())


def in_best_groups(scores_TE: Tensor, top_k: int, groups: int, groups_per_token: int) -> Tensor:
    """The scores of the experts in a token's best groups; minus infinity for the others.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) limits so the devices that a token is sent to. Groups are runs of
    consecutive experts. A group counts for the sum of its top_k / groups_per_token best scores, at least for the best.
    """
    scores_TGe = scores_TE.unflatten(-1, (groups, -1))
    counted = min(max(1, top_k // groups_per_token), scores_TGe.size(-1))
    group_TG = scores_TGe.topk(counted, dim=-1).values.sum(-1)
    best_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(
        -1, group_TG.topk(groups_per_token, dim=-1).indices, True
    )
    return scores_TGe.masked_fill(~best_TG.unsqueeze(-1), -torch.inf).flatten(-2)


def straight_through(scores_TE: Tensor, choice_TK: Tensor) -> Tensor:
    """The scores (T, E) of the chosen experts, zero for the others, with the gradient of all scores.

    DenseMixer (Yao et al. 2025) takes the choice for the identity in the backward pass. Used as weights of all experts,
    those of weight zero neither change the output nor get a gradient, but say how much better or worse it would have
    been with them, and so the router learns of experts that it did not choose.
    """
    others_TE = scores_TE.detach().scatter(-1, choice_TK, 0.0)
    return scores_TE - others_TE


def row_limit(
    x_TD: Tensor, real_T: Tensor | None, top_k: int, num_experts: int, capacity_factor: float | None
) -> int | Tensor | None:
    """Most rows that an expert keeps, a tensor where only the device knows the real tokens; None keeps all."""
    if capacity_factor is None:
        return None
    sizes = (top_k, num_experts, capacity_factor)
    if real_T is None:
        return capacity(len(x_TD), *sizes)
    if kernels.must_not_wait(x_TD):
        tokens = real_T.sum()
        return even_rows(tokens.double(), *sizes).ceil().long().minimum(tokens).clamp_min(1)
    return capacity(int(real_T.sum()), *sizes)


def named_experts(expert_T: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts (T, 1), weights (T, 1) and probabilities (T, E) of tokens whose one expert the caller names.

    Its weight and its probability are 1, in float32 or wider.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    probs_TE = torch.nn.functional.one_hot(expert_T, num_experts).to(dtype)
    return expert_T.unsqueeze(-1), torch.ones_like(expert_T, dtype=dtype).unsqueeze(-1), probs_TE


def to_groups(x_BLD: Tensor, group_size: int, group_over: str) -> Tensor:
    """(B, L, D) -> (N, G, D): groups of consecutive examples at one position, or of consecutive positions.

    A last group that is not full is filled with zeros, which is exact: see `MixtureOfTokens`.
    """
    if group_over == "batch":
        x_BLD = x_BLD.transpose(0, 1)
    x_OID = x_BLD  # outer axis O, inner axis I: the one that is cut into groups
    missing = -x_OID.size(1) % group_size
    if missing:
        x_OID = torch.nn.functional.pad(x_OID, (0, 0, 0, missing))
    return x_OID.reshape(-1, group_size, x_OID.size(-1))


def from_groups(y_NGD: Tensor, batch_size: int, length: int, group_over: str) -> Tensor:
    """Undoes `to_groups`: (N, G, D) -> (B, L, D)."""
    outer, inner = (length, batch_size) if group_over == "batch" else (batch_size, length)
    y_OID = y_NGD.reshape(outer, -1, y_NGD.size(-1))[:, :inner]
    return y_OID.transpose(0, 1) if group_over == "batch" else y_OID
