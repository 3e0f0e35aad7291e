"""Sparse routing for the few tokens of a decoding step, where sorting rows costs more than running them.

No order and no counts. On the CPU `native` runs them in C; where it cannot, every chosen expert is multiplied where it
lies, without a copy, and scale and weight ride along with the products: next to products of a single row, every further
call counts. On an accelerator the chosen weights are indexed and multiplied in two batched products, with no host
synchronisation. Inference only: under autograd a view of a stacked weight costs a full zero gradient. Definition:
`reference.few_ffn`.

Shapes: T tokens, K choices of a token, R = T*K rows, E experts, D hidden, F expert width, H = 2F when gated else F.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.kernels import native, native_decoding
from mixtura.kernels.activation import activate
from mixtura.kernels.precision import at_autocast_dtype

FEW_ROWS = 16
"""Rows up to which this is quicker than sorting them: measured, at twice as many it depends on the width."""
NATIVE_ROWS = 1024
"""The same where `native` runs them, which sorts in C and loses nothing until rows fill its blocks."""
# exp of more than this is no double any more, and the weight is zero long before.
_LARGEST_EXPONENT = 700.0


def are_few(rows: int, activation: str, *tensors: Tensor) -> bool:
    """Whether `few_ffn` should take that many choices, with these input and weights or some of them.

    Never while gradients are recorded or a graph is compiled.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return 0 < rows <= (NATIVE_ROWS if native.takes(activation, *tensors) else FEW_ROWS)


def few_ffn(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """(T, K, D) -> (T, D): out[t] = sum over the choices k of weight[t, k] * expert[t, k](scale[t, k] * x[t, k]).

    K of the input may be 1, where all choices of a token have the same; no scale is a scale of 1.
    """
    x_TKD, up_EHD, down_EDF = at_autocast_dtype(x_TKD, up_EHD, down_EDF)
    arguments = (x_TKD, expert_TK, scale_TK, weight_TK, up_EHD, down_EDF, activation, gated)
    if native.takes(activation, x_TKD, weight_TK, *([] if scale_TK is None else [scale_TK]), up_EHD, down_EDF):
        return native_decoding.chosen(*arguments)
    return _in_place(*arguments) if x_TKD.device.type == "cpu" else _from_copies(*arguments)


def apart_ffn(
    x_TD: Tensor,
    logits_TS: Tensor,
    temperature: float,
    log_mass_S: Tensor | float,
    mean_SD: Tensor | None,
    output_SD: Tensor | None,
    top_k: int,
    mixtures_per_expert: int,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """`native_decoding.apart` where that takes these; without means, what it computes with as few calls as torch needs.

    Next to the products of a single token every call counts, so weights are computed as plain numbers for the chosen
    mixtures only. The choice is made among logits, which sort as the weights do.
    """
    if native.takes(activation, x_TD, logits_TS, up_EHD, down_EDF):
        settings = (temperature, log_mass_S, mean_SD, output_SD, top_k, mixtures_per_expert)
        return native_decoding.apart(x_TD, logits_TS, *settings, up_EHD, down_EDF, activation, gated)
    assert not isinstance(log_mass_S, Tensor) and mean_SD is None and output_SD is None, "means are for `native` alone"
    logits_TK, mixture_TK = logits_TS.topk(top_k, dim=-1)
    weights = [[_sigmoid(logit / temperature - log_mass_S) for logit in row] for row in logits_TK.tolist()]
    chosen = [[mixture // mixtures_per_expert for mixture in row] for row in mixture_TK.tolist()]
    inputs = [[x_D] * top_k for x_D in x_TD.unbind()]
    return _few_rows(inputs, chosen, weights, weights, up_EHD, down_EDF, activation, gated)


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(min(-value, _LARGEST_EXPONENT)))


def _in_place(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    tokens, choices = expert_TK.shape
    weights = weight_TK.tolist()
    if scale_TK is None:
        scales = [[1.0] * choices] * tokens
    else:
        scales = weights if scale_TK is weight_TK else scale_TK.tolist()
    inputs = [list(x_KD.unbind()) if len(x_KD) == choices else [x_KD[0]] * choices for x_KD in x_TKD.unbind()]
    return _few_rows(inputs, expert_TK.tolist(), scales, weights, up_EHD, down_EDF, activation, gated)


def _few_rows(
    inputs: Sequence[Sequence[Tensor]],
    experts: Sequence[Sequence[int]],
    scales: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """`few_ffn` on the CPU with choices that are plain numbers: K inputs (D,) and K numbers for each of T tokens.

    A plain ReLU expert takes a scale s > 0 out in front, f(s x) = s f(x), and it joins the weight.
    """
    takes_out = activation == "relu" and not gated
    out = []
    for inputs_K, experts_K, scales_K, weights_K in zip(inputs, experts, scales, weights, strict=True):
        y_D, beta = inputs_K[0], 0  # with a beta of 0 only its size counts
        for x_D, expert, scale, weight in zip(inputs_K, experts_K, scales_K, weights_K, strict=True):
            if scale == 1 or (takes_out and scale > 0):
                u_H, weight = torch.mv(up_EHD[expert], x_D), weight * scale
            else:
                u_H = torch.addmv(x_D[:1], up_EHD[expert], x_D, beta=0, alpha=scale)
            y_D = torch.addmv(y_D, down_EDF[expert], activate(u_H, activation, gated), beta=beta, alpha=weight)
            beta = 1
        out.append(y_D)
    return out[0].unsqueeze(0) if len(out) == 1 else torch.stack(out)


def _from_copies(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    expert_R = expert_TK.flatten()
    if scale_TK is not None:
        x_TKD = x_TKD * scale_TK.to(x_TKD.dtype).unsqueeze(-1)
    x_RD1 = x_TKD.expand(-1, expert_TK.size(1), -1).reshape(len(expert_R), -1, 1)
    u_RH = torch.bmm(up_EHD[expert_R], x_RD1).squeeze(-1)
    h_RF = activate(u_RH, activation, gated) * weight_TK.to(u_RH.dtype).reshape(-1, 1)
    return torch.bmm(down_EDF[expert_R], h_RF.unsqueeze(-1)).view(*expert_TK.shape, -1).sum(1)
