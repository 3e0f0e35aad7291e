"""What runs on an accelerator: Triton's kernels where Triton is installed, for tensors on CUDA devices, else nothing.

Callers ask first, and take a torch path where the answer is no. Under Triton's interpreter the same functions run on
the CPU when they are called directly, which is how they are tested without an accelerator.

Shapes: T tokens, K choices of a token, R routed rows, E experts, D hidden, F expert width, H = 2F when gated else F, O
outer and P inner places of a group, N = O*P groups, G tokens of a group, C mixtures an expert has in a group, S = E*C.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixtura.kernels.expert_weights import ExpertWeights, as_int64, at_autocast_dtype, check_shape

_FOUND = find_spec("triton")
TRITON = _FOUND is not None and _FOUND.origin is not None
"""Whether Triton is installed: torch brings it along with its builds for CUDA. A mere folder of that name is not it."""
if TRITON or TYPE_CHECKING:
    from mixtura.kernels import triton_mixing, triton_sparse


def can_sort_choices(expert_TK: Tensor) -> bool:
    """Whether `sort_choices` should sort these choices."""
    return TRITON and expert_TK.is_cuda and expert_TK.numel() > 0


def sort_choices(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order by expert (R,), each choice's row (T, K) and the rows of every expert (E,), all int64."""
    return triton_sparse.sort_choices(expert_TK, num_experts)


def can_run_rows(x_TD: Tensor, experts: ExpertWeights) -> bool:
    """Whether `grouped_ffn` should run these: 16-bit numbers on a CUDA device, rows aligned to 16 bytes."""
    if not (TRITON and x_TD.is_cuda):
        return False
    x_TD, up_EHD, down_EDF = at_autocast_dtype(x_TD, experts.up, experts.down)
    aligned = all(tensor.size(-1) * tensor.element_size() % 16 == 0 for tensor in (x_TD, up_EHD, down_EDF))
    return aligned and x_TD.dtype in (torch.bfloat16, torch.float16) and x_TD.dtype == up_EHD.dtype == down_EDF.dtype


def grouped_ffn(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    row_TK: Tensor | None,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D), as `reference.sparse_ffn`; `row_TK` are each token's rows where all tokens have K of them.

    Without it, the rows are sorted by token once more.
    """
    x_TD, up_EHD, down_EDF = (t.contiguous() for t in at_autocast_dtype(x_TD, experts.up, experts.down))
    experts = experts._replace(up=up_EHD, down=down_EDF)
    experts.check(x_TD.size(1))
    check_shape("weight_R", weight_R, token_R.shape)
    check_shape("tokens_per_expert_E", tokens_per_expert_E, (len(up_EHD),))
    if row_TK is None:
        row_R, start_T = triton_sparse.rows_by_token(token_R, len(x_TD))
    else:
        step = row_TK.size(1)
        check_shape("row_TK", row_TK, (len(x_TD), step))
        row_R = as_int64("row_TK", row_TK).view(-1)
        check_shape("row_TK, flattened,", row_R, token_R.shape)
        start_T = torch.arange(0, row_TK.numel() + 1, step, dtype=torch.int32, device=row_TK.device)
    return triton_sparse.grouped_ffn(x_TD, token_R, weight_R, tokens_per_expert_E, row_R, start_T, experts)


def can_run_groups(x_OPGD: Tensor) -> bool:
    """Whether `logits_mixed_ffn` should run these groups."""
    return TRITON and x_OPGD.is_cuda and triton_mixing.can_run_group(x_OPGD)


def logits_mixed_ffn(
    x_OPGD: Tensor,
    dispatch_OPGS: Tensor,
    combine_OPGS: Tensor | None,
    num_slots: int,
    run: Callable[[Tensor], Tensor],
) -> Tensor:
    """(O, P, G, D) -> (O, P, G, D): mix by the softmax over the group, run the experts on the mixtures, spread.

    Args:
        x_OPGD: tokens, with any strides over places and tokens.
        dispatch_OPGS: float32 logits.
        combine_OPGS: logits of the second softmax, by which outputs are spread; None is the first.
        num_slots: C.
        run: the experts, (E, N*C, D) -> (E, N*C, D).
    """
    (x_OPGD,) = at_autocast_dtype(x_OPGD)
    z_ERD, lse_NS = triton_mixing.mix_groups(x_OPGD, dispatch_OPGS, num_slots)
    y_ERD = run(z_ERD)
    if combine_OPGS is None:
        return triton_mixing.spread_groups(y_ERD, dispatch_OPGS, lse_NS, num_slots)
    lse_NS = combine_OPGS.detach().logsumexp(2).flatten(0, 1)
    return triton_mixing.spread_groups(y_ERD, combine_OPGS, lse_NS, num_slots)
