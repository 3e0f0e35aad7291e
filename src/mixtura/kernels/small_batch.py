"""Sparse routing for the few tokens of a decoding step, where sorting rows costs more than running them.

No order and no counts. On the CPU `native` runs them in C; where it cannot, every chosen expert is multiplied where it
lies, without a copy, and scale and weight ride along with the products: next to products of a single row, every further
call counts. On an accelerator the chosen weights are indexed and multiplied in two batched products, with no host
synchronisation. Inference only: under autograd a view of a stacked weight costs a full zero gradient. Definition:
`reference.small_batch_ffn`.

Shapes: T tokens, K choices of a token, R = T*K rows, E experts, D hidden, F expert width, H = 2F when gated else F.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.kernels import native, native_decoding
from mixtura.kernels.expert_weights import ExpertWeights, activate, as_int64, at_autocast_dtype, check_shape, refuse

TORCH_ROWS = 16
"""Rows up to which this is quicker than sorting them: measured, at twice as many it depends on the width."""
NATIVE_ROWS = 1024
"""The same where `native` runs them, which sorts in C and loses nothing until rows fill its blocks."""
# exp of more than this is no double any more, and the weight is zero long before.
_LARGEST_EXPONENT = 700.0


def is_small_batch(rows: int, activation: str, *tensors: Tensor) -> bool:
    """Whether `small_batch_ffn` should take that many choices, with these input and weights or some of them.

    Never while gradients are recorded or a graph is compiled.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return 0 < rows <= (NATIVE_ROWS if native.can_run(activation, *tensors) else TORCH_ROWS)


def small_batch_ffn(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(T, K, D) -> (T, D): out[t] = sum over the choices k of weight[t, k] * expert[t, k](scale[t, k] * x[t, k]).

    K of the input may be 1, where all choices of a token have the same; no scale is a scale of 1.

    Raises:
        TypeError: `expert_TK` holds no whole numbers.
        ValueError: the shapes do not fit each other.
        IndexError: on the CPU, there is no expert of a number in `expert_TK`.
    """
    expert_TK = as_int64("expert_TK", expert_TK)
    check_shape("weight_TK", weight_TK, expert_TK.shape)
    if scale_TK is not None:
        check_shape("scale_TK", scale_TK, expert_TK.shape)
    tokens, choices = expert_TK.shape
    check_shape("x_TKD", x_TKD, (tokens, 1 if x_TKD.size(1) == 1 else choices, experts.sizes[1]))
    (x_TKD,), experts = at_autocast_dtype(x_TKD), experts.at_autocast_dtype(x_TKD.device.type)
    arguments = (x_TKD, expert_TK, scale_TK, weight_TK, experts)
    floats = (x_TKD, weight_TK, *([] if scale_TK is None else [scale_TK]), experts.up, experts.down)
    if native.can_run(experts.activation, *floats) and native.can_read(expert_TK, dtype=torch.int64):
        return native_decoding.small_batch(*arguments)
    return _in_place(*arguments) if x_TKD.device.type == "cpu" else _from_copies(*arguments)


def token_by_token_ffn(
    x_TD: Tensor,
    logits_TS: Tensor,
    temperature: float,
    log_mass_S: Tensor | float,
    mean_SD: Tensor | None,
    output_SD: Tensor | None,
    top_k: int,
    mixtures_per_expert: int,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): Mixture of Tokens for tokens without a group, the `top_k` mixtures of the largest weights.

    Given the router's logits and, for every mixture, what the neighbours would add to the group: the log of their mass,
    their weighted mean and the expert's output for that mean (`layers.neighbours.Neighbours`). None is zero. C
    takes all of it; torch takes zero neighbours of one mass, as far as `can_run_token_by_token` says.

    Next to the products of a single token every call counts, so torch computes weights as plain numbers for the chosen
    mixtures only. The choice is made among logits, which sort as the weights do.
    """
    given = [each for each in (log_mass_S, mean_SD, output_SD) if isinstance(each, Tensor)]
    if native.can_run(experts.activation, x_TD, logits_TS, *given, experts.up, experts.down):
        settings = (temperature, log_mass_S, mean_SD, output_SD, top_k, mixtures_per_expert)
        return native_decoding.token_by_token(x_TD, logits_TS, *settings, experts)
    if isinstance(log_mass_S, Tensor) or given:
        raise ValueError(
            "The neighbours have averages, which only the C code takes token by token, and it cannot run here: ask "
            "`can_run_token_by_token` first."
        )
    logits_TK, mixture_TK = logits_TS.topk(top_k, dim=-1)
    weights = [[_sigmoid(logit / temperature - log_mass_S) for logit in row] for row in logits_TK.tolist()]
    chosen = [[mixture // mixtures_per_expert for mixture in row] for row in mixture_TK.tolist()]
    inputs = [[x_D] * top_k for x_D in x_TD.unbind()]
    return _multiply_rows(inputs, chosen, weights, weights, experts)


def can_run_token_by_token(x: Tensor, choices: int | None, activation: str, *averages: Tensor | float | None) -> bool:
    """Whether `token_by_token_ffn` should take these tokens (..., D), each with that many mixtures to run; None is all.

    Only on the CPU, where the calls between the products are what a decoding step waits for, and never under autocast,
    by whose rules only the long way goes.
    """
    if choices is None or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    given = [each for each in averages if isinstance(each, Tensor)]
    rows = x.numel() // x.size(-1) * choices
    return is_small_batch(rows, activation, x) and (not given or native.can_run(activation, x, *given))


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(min(-value, _LARGEST_EXPONENT)))


def _in_place(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    tokens, choices = expert_TK.shape
    weights = weight_TK.tolist()
    if scale_TK is None:
        scales = [[1.0] * choices] * tokens
    else:
        scales = weights if scale_TK is weight_TK else scale_TK.tolist()
    inputs = [list(x_KD.unbind()) if len(x_KD) == choices else [x_KD[0]] * choices for x_KD in x_TKD.unbind()]
    numbers = expert_TK.tolist()
    if any(not 0 <= number < len(experts.up) for row in numbers for number in row):
        refuse("expert_TK", expert_TK, len(experts.up))
    return _multiply_rows(inputs, numbers, scales, weights, experts)


def _multiply_rows(
    inputs: Sequence[Sequence[Tensor]],
    numbers: Sequence[Sequence[int]],
    scales: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    experts: ExpertWeights,
) -> Tensor:
    """`small_batch_ffn` on the CPU with choices as plain numbers: K inputs (D,) and K numbers for each of T tokens.

    A plain ReLU expert takes a scale s > 0 out in front, f(s x) = s f(x), and it joins the weight.
    """
    up_EHD, down_EDF, activation, gated = experts
    takes_out = activation == "relu" and not gated
    out = []
    for inputs_K, numbers_K, scales_K, weights_K in zip(inputs, numbers, scales, weights, strict=True):
        y_D, beta = inputs_K[0], 0  # with a beta of 0 only its size counts
        for x_D, expert, scale, weight in zip(inputs_K, numbers_K, scales_K, weights_K, strict=True):
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
    experts: ExpertWeights,
) -> Tensor:
    up_EHD, down_EDF, activation, gated = experts
    expert_R = expert_TK.flatten()
    if scale_TK is not None:
        x_TKD = x_TKD * scale_TK.to(x_TKD.dtype).unsqueeze(-1)
    x_RD1 = x_TKD.expand(-1, expert_TK.size(1), -1).reshape(len(expert_R), -1, 1)
    u_RH = torch.bmm(up_EHD.index_select(0, expert_R), x_RD1).squeeze(-1)
    h_RF = activate(u_RH, activation, gated) * weight_TK.to(u_RH.dtype).reshape(-1, 1)
    return torch.bmm(down_EDF.index_select(0, expert_R), h_RF.unsqueeze(-1)).view(*expert_TK.shape, -1).sum(1)
