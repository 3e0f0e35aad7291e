"""Mixture of Tokens in groups, as it is trained: which places of a group are real, and what its experts make of it.

Shapes: B batch, L length, D hidden, E experts, C mixtures an expert has in a group, S = E*C, N groups, G tokens of a
group.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mixtura import kernels
from mixtura.layers.experts import Experts
from mixtura.layers.routing import DenseRouting, dense_experts, to_groups
from mixtura.layers.statistics import LayerOutput, pool_stats


def run_groups(
    experts: Experts, x_NGD: Tensor, logits_NGS: Tensor, combine_logits_NGS: Tensor | None, num_experts: int
) -> Tensor:
    """(N, G, D) -> (N, G, D): mix by the softmax over the group, run the experts, spread by it or by a second one."""
    if kernels.can_run_groups(x_NGD.unsqueeze(1)):
        # An accelerator takes the softmax where it sums the tokens up, and never stores the weights.
        y_N1GD = kernels.logits_mixed_ffn(
            x_NGD.unsqueeze(1),
            logits_NGS.unsqueeze(1),
            None if combine_logits_NGS is None else combine_logits_NGS.unsqueeze(1),
            logits_NGS.size(-1) // num_experts,
            lambda z_ERD: experts(z_ERD, kernels.batched_ffn),
        )
        return y_N1GD.squeeze(1)
    dispatch_NGEC = combine_NGEC = logits_NGS.softmax(1).to(x_NGD.dtype).unflatten(-1, (num_experts, -1))
    if combine_logits_NGS is not None:
        combine_NGEC = combine_logits_NGS.softmax(1).to(x_NGD.dtype).unflatten(-1, (num_experts, -1))
    return dense_experts(experts, x_NGD, DenseRouting(dispatch_NGEC, combine_NGEC))


def real_places(x_BLD: Tensor, mask_BL: Tensor | None, group_size: int, group_over: str) -> Tensor | None:
    """(N, G), true where a group has a token that is neither padding nor filling; None when all are."""
    batch, length, _ = x_BLD.shape
    if mask_BL is None and (batch if group_over == "batch" else length) % group_size == 0:
        return None
    real_BL = x_BLD.new_ones(batch, length) if mask_BL is None else mask_BL.to(x_BLD.dtype)
    return to_groups(real_BL.unsqueeze(-1), group_size, group_over).squeeze(-1).bool()


def warn_partial_group(x_BLD: Tensor, group_size: int, group_over: str) -> None:
    """Warns the caller of the layer when the last group is not full."""
    tokens, axis = (x_BLD.size(0), "examples") if group_over == "batch" else (x_BLD.size(1), "positions")
    if tokens % group_size:
        warnings.warn(
            f"{tokens} {axis} are no multiple of the group size {group_size}: the last group has "
            f"{tokens % group_size} tokens, and the rest of it counts as zero tokens.",
            stacklevel=5,
        )


RunGroups = Callable[[Tensor, Tensor | None, bool], LayerOutput]
"""(N, G, D) tokens, (N, G) whether they are real and whether statistics are wanted -> output and statistics."""


def run_a_share(
    share: float, x_NGD: Tensor, real_NG: Tensor | None, want_stats: bool, alone: RunGroups, together: RunGroups
) -> LayerOutput:
    """A random share of the groups is run by `alone`, as if each token's group were otherwise empty, the others not.

    Whole groups leave: a member that left by itself would change what its neighbours see, and a group that is empty but
    for one member costs as many expert rows as a full one. The number of groups is fixed up to rounding; the draws come
    from torch's generators alone, whose states checkpoints keep.
    """
    if share == 0:
        return together(x_NGD, real_NG, want_stats)
    groups = len(x_NGD)
    count = share * groups
    # A compiled graph has shapes that no draw decides, so there the share has to make whole groups.
    if not (torch.compiler.is_compiling() and float(count).is_integer()):
        count = min(groups, count + torch.rand((), device="cpu").item())
    count = int(count)
    order_N = torch.randperm(groups, device=x_NGD.device)
    parts, stats = [], []
    for index_N, run in ((order_N[:count], alone), (order_N[count:], together)):
        if len(index_N):
            real_nG = None if real_NG is None else real_NG[index_N]
            y_nGD, part = run(x_NGD[index_N], real_nG, want_stats)
            parts.append(y_nGD)
            stats += [] if part is None else [part]
    y_NGD = torch.cat(parts)[order_N.argsort()]
    return y_NGD, pool_stats(stats) if want_stats else None
