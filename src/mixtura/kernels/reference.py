"""The definition of every kernel in the plainest torch, one expert and one group at a time.

Slow on purpose. Tests hold the fast paths against it, output and gradients, in float64.

Shapes: T tokens, R routed rows, E experts, D hidden, F expert width, H = 2F when gated else F, N groups, G tokens of a
group, C mixtures (slots) an expert has in a group.
"""

import torch
from torch import Tensor

from mixtura.kernels.expert_weights import ExpertWeights, activate


def expert_ffn(x_RD: Tensor, up_HD: Tensor, down_DF: Tensor, activation: str, gated: bool) -> Tensor:
    """One expert on its rows: (R, D) -> (R, D), down(act(up(x)))."""
    return activate(x_RD @ up_HD.T, activation, gated) @ down_DF.T


def sparse_ffn(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    tokens_per_expert_E: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): out[t] = sum over the rows r with token_R[r] = t of weight_R[r] * expert(r)(x[t]).

    Rows are sorted by expert: the first tokens_per_expert_E[0] rows belong to expert 0, and so on.
    """
    up_EHD, down_EDF, activation, gated = experts
    rows_TD = [torch.zeros_like(x_D) for x_D in x_TD]
    expert_R = torch.repeat_interleave(torch.arange(len(up_EHD), device=x_TD.device), tokens_per_expert_E)
    for row, (token, expert) in enumerate(zip(token_R.tolist(), expert_R.tolist(), strict=True)):
        y_1D = expert_ffn(x_TD[token : token + 1], up_EHD[expert], down_EDF[expert], activation, gated)
        rows_TD[token] = rows_TD[token] + weight_R[row] * y_1D[0]
    return torch.stack(rows_TD)


def batched_ffn(x_ERD: Tensor, experts: ExpertWeights) -> Tensor:
    """(E, R, D) -> (E, R, D): expert e on its own R rows."""
    up_EHD, down_EDF, activation, gated = experts
    return torch.stack(
        [
            expert_ffn(x_RD, up_HD, down_DF, activation, gated)
            for x_RD, up_HD, down_DF in zip(x_ERD, up_EHD, down_EDF, strict=True)
        ]
    )


def merged_experts(weight_NE: Tensor, experts: ExpertWeights) -> ExpertWeights:
    """(N, E) weights -> N experts, each the weighted sum of all E, matrix by matrix."""
    up, down = (
        torch.stack([sum(w * matrix for w, matrix in zip(w_E, each, strict=True)) for w_E in weight_NE])  # pyright: ignore
        for each in (experts.up, experts.down)
    )
    return experts._replace(up=up, down=down)


def scaled_ffn(
    x_TD: Tensor,
    scale_TE: Tensor,
    weight_TE: Tensor,
    mean_ED: Tensor | None,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): every expert on every token, sum_e weight_e * f_e(scale_e * x + (1 - scale_e) * mean_e)."""
    up_EHD, down_EDF, activation, gated = experts
    out_TD = torch.zeros_like(x_TD)
    for expert, (up_HD, down_DF) in enumerate(zip(up_EHD, down_EDF, strict=True)):
        scale_T1 = scale_TE[:, expert, None]
        z_TD = scale_T1 * x_TD
        if mean_ED is not None:
            z_TD = z_TD + (1 - scale_T1) * mean_ED[expert]
        y_TD = expert_ffn(z_TD, up_HD, down_DF, activation, gated)
        out_TD = out_TD + weight_TE[:, expert, None] * y_TD
    return out_TD


def mix(x_NGD: Tensor, dispatch_NGEC: Tensor) -> Tensor:
    """(N, G, D) tokens, (N, G, E, C) weights -> (E, N*C, D) mixtures: sum over the group of weight * token."""
    z_ENCD = torch.einsum("ngec,ngd->encd", dispatch_NGEC, x_NGD)
    return z_ENCD.flatten(1, 2)


def spread(y_ERD: Tensor, combine_NGEC: Tensor) -> Tensor:
    """(E, N*C, D) expert outputs, (N, G, E, C) weights -> (N, G, D): every token's weighted sum of the outputs."""
    num_groups, num_slots = combine_NGEC.size(0), combine_NGEC.size(3)
    y_ENCD = y_ERD.unflatten(1, (num_groups, num_slots))
    return torch.einsum("ngec,encd->ngd", combine_NGEC, y_ENCD)


def mixed_ffn(
    x_NGD: Tensor,
    dispatch_NGEC: Tensor,
    combine_NGEC: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(N, G, D) -> (N, G, D): mix, experts on the mixtures, spread."""
    return spread(batched_ffn(mix(x_NGD, dispatch_NGEC), experts), combine_NGEC)


def small_batch_ffn(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(T, K, D) -> (T, D): out[t] = sum over the choices k of weight[t, k] * expert[t, k](scale[t, k] * x[t, k])."""
    up_EHD, down_EDF, activation, gated = experts
    tokens, choices = expert_TK.shape
    out_TD = []
    for t in range(tokens):
        y_D = torch.zeros_like(x_TKD[t, 0])
        for k in range(choices):
            x_D = x_TKD[t, k] if x_TKD.size(1) > 1 else x_TKD[t, 0]
            x_D = x_D if scale_TK is None else scale_TK[t, k] * x_D
            expert = int(expert_TK[t, k])
            f_D = expert_ffn(x_D[None], up_EHD[expert], down_EDF[expert], activation, gated)[0]
            y_D = y_D + weight_TK[t, k] * f_D
        out_TD.append(y_D)
    return torch.stack(out_TD)
