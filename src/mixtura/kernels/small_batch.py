"""Sparse routing for the few tokens of a decoding step, where sorting rows costs more than running them.

No order and no counts. On the CPU C runs them, a decoding step with products of its own for few rows, which round
otherwise than BLAS's; evaluation of whole sequences keeps those. Where C cannot, every chosen expert is multiplied
where it lies, without a copy, and scale and weight ride along with the products: next to products of a single row,
every further call counts. On an accelerator the chosen weights are indexed and multiplied in two batched products, with
no host synchronisation. Inference only: under autograd a view of a stacked weight costs a full zero gradient.
Definition: `reference.small_batch_ffn`.

The C is `mixtura_small_batch` and `mixtura_token_by_token` of native_decoding.c. Next to the products of a single token
every Python statement counts, so each thread keeps the memory that a step works in and the structures that describe it,
one for each kind of step.

Shapes: S mixtures, T tokens, K choices of a token, R = T*K rows, E experts, D hidden, F expert width, H = 2F when gated
else F.
"""

import ctypes
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.kernels import native
from mixtura.kernels.expert_weights import ExpertWeights, activate, as_int64, at_autocast_dtype, check_shape, refuse
from mixtura.kernels.native import ACTIVATIONS, BLOCK_ROWS, ExpertsStruct, call, sgemm

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
    *,
    decoding: bool = False,
) -> Tensor:
    """(T, K, D) -> (T, D): out[t] = sum over the choices k of weight[t, k] * expert[t, k](scale[t, k] * x[t, k]).

    K of the input may be 1, where all choices of a token have the same; no scale is a scale of 1. `decoding` says that
    the tokens are one of each sequence, so that nobody compares their rounding with that of a whole sequence.

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
        return _small_batch_in_c(*arguments, decoding)
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
    decoding: bool,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): Mixture of Tokens for tokens without a group, the `top_k` mixtures of the largest weights.

    Given the router's logits and, for every mixture, what the neighbours would add to the group: the log of their mass,
    their weighted mean and the expert's output for that mean (`layers.token_by_token.Neighbours`). None is zero. C
    takes all of it; torch takes zero neighbours of one mass, as far as `can_run_token_by_token` says. `decoding` as for
    `small_batch_ffn`.

    Next to the products of a single token every call counts, so torch computes weights as plain numbers for the chosen
    mixtures only. The choice is made among logits, which sort as the weights do.
    """
    given = [each for each in (log_mass_S, mean_SD, output_SD) if isinstance(each, Tensor)]
    if native.can_run(experts.activation, x_TD, logits_TS, *given, experts.up, experts.down):
        settings = (temperature, log_mass_S, mean_SD, output_SD, top_k, mixtures_per_expert)
        return _token_by_token_in_c(x_TD, logits_TS, *settings, decoding, experts)
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


_KEPT = 8
"""Workspaces that a thread keeps: a model has one or two kinds of steps for each batch size."""


def _small_batch_in_c(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    experts: ExpertWeights,
    decoding: bool,
) -> Tensor:
    """(T, K or 1, D) -> (T, D): `reference.small_batch_ffn`, without an order found beforehand."""
    tokens, choices = expert_TK.shape
    work = _workspace(tokens, choices, 0, x_TKD.size(2), experts)
    fields = work.choices
    fields.shared, fields.decoding = x_TKD.size(1) == 1, decoding
    fields.expert, fields.weight = expert_TK.data_ptr(), weight_TK.data_ptr()
    fields.scale = None if scale_TK is None else scale_TK.data_ptr()
    fields.mean = fields.output = None
    out_TD, outside = work.run("mixtura_small_batch", x_TKD, experts)
    if outside:
        refuse("expert_TK", expert_TK, len(experts.up))
    return out_TD


def _token_by_token_in_c(
    x_TD: Tensor,
    logits_TS: Tensor,
    temperature: float,
    log_mass_S: Tensor | float,
    mean_SD: Tensor | None,
    output_SD: Tensor | None,
    top_k: int,
    mixtures_per_expert: int,
    decoding: bool,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): `MixtureOfTokens` without a group, its top_k mixtures by the sigmoid of their logits.

    The arguments after the temperature are the fields of `Neighbours`, and what the layer has of that name.
    """
    tokens, mixtures, hidden = len(x_TD), len(experts.up) * mixtures_per_expert, x_TD.size(1)
    check_shape("logits_TS", logits_TS, (tokens, mixtures))
    for name, average, shape in (
        ("log_mass_S", log_mass_S, (mixtures,)),
        ("mean_SD", mean_SD, (mixtures, hidden)),
        ("output_SD", output_SD, (mixtures, hidden)),
    ):
        if isinstance(average, Tensor):
            check_shape(name, average, shape)
    if not 1 <= top_k <= mixtures:
        raise ValueError(f"top_k is {top_k}: it must lie between 1 and {mixtures}, the number of mixtures.")
    work = _workspace(tokens, top_k, mixtures, hidden, experts)
    fields = work.choices
    fields.shared, fields.decoding = True, decoding
    fields.per_expert, fields.temperature = mixtures_per_expert, temperature
    if isinstance(log_mass_S, Tensor):
        fields.log_mass = log_mass_S.data_ptr()
    else:
        fields.log_mass, fields.same_mass = None, log_mass_S
    fields.expert, fields.mixture = work.expert, work.mixture
    fields.scale = fields.weight = work.weight
    fields.mean = None if mean_SD is None else mean_SD.data_ptr()
    fields.output = None if output_SD is None else output_SD.data_ptr()
    fields.logits = logits_TS.data_ptr()
    return work.run("mixtura_token_by_token", x_TD, experts)[0]


def token_choice_ffn(
    x_TD: Tensor,
    logits_TE: Tensor,
    top_k: int,
    softmax: bool,
    normalize: bool,
    factor: float,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): a decoding step of token choice, from the router's logits to the sum of the experts' outputs.

    A token runs its `top_k` experts of the largest logits. Their weights are the softmax over all logits, or their
    sigmoids; `normalize` makes them sum to one, and `factor` multiplies them. C takes all of it where it can.
    """
    tokens, (num_experts, hidden, _) = len(x_TD), experts.sizes
    check_shape("x_TD", x_TD, (tokens, hidden))
    check_shape("logits_TE", logits_TE, (tokens, num_experts))
    if not native.can_run(experts.activation, x_TD, logits_TE, experts.up, experts.down):
        weight_TK, choice_TK = (logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()).topk(top_k, dim=-1)
        if normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return small_batch_ffn(x_TD.unsqueeze(1), choice_TK, None, weight_TK * factor, experts, decoding=True)
    work = _workspace(tokens, top_k, num_experts, hidden, experts)
    fields = work.choices
    fields.shared = fields.decoding = fields.per_expert = 1
    fields.softmax, fields.normalize, fields.factor = softmax, normalize, factor
    fields.expert, fields.mixture, fields.weight = work.expert, work.mixture, work.weight
    fields.scale = fields.mean = fields.output = None
    fields.logits = logits_TE.data_ptr()
    return work.run("mixtura_token_choice", x_TD, experts)[0]


class _ChoicesStruct(ctypes.Structure):
    """`choices_t` of native_decoding.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "mixtures", "per_expert", "shared", "decoding")),
        *((name, ctypes.c_int64) for name in ("softmax", "normalize")),
        *((name, ctypes.c_float) for name in ("temperature", "same_mass", "factor")),
        *((name, ctypes.c_void_p) for name in ("expert", "mixture", "scale", "weight", "logits", "log_mass")),
        *((name, ctypes.c_void_p) for name in ("mean", "output", "u", "all", "rank", "out")),
    )


class _Workspace:
    """The structures of one kind of step and the memory that it works in, for one thread at a time."""

    def __init__(self, tokens: int, choices: int, mixtures: int, weights: ExpertWeights) -> None:
        experts, hidden, width = weights.sizes
        rows_H = weights.up.size(1)
        rows = tokens * choices
        block = min(BLOCK_ROWS, rows)
        scratch_floats = block * (3 * hidden + 2 * width + rows_H + 32)
        self._floats = torch.empty(scratch_floats + block * rows_H + mixtures + rows)
        self._whole = torch.empty(3 * rows + experts, dtype=torch.int64)
        scratch, whole = self._floats.data_ptr(), self._whole.data_ptr()
        u = scratch + 4 * scratch_floats
        self.weight = u + 4 * block * rows_H
        self.expert, self.mixture = whole, whole + 8 * rows
        numbers = (
            torch.get_num_threads(),
            block,
            experts,
            hidden,
            width,
            weights.gated,
            ACTIVATIONS[weights.activation],
        )
        self._experts = ExpertsStruct(sgemm(), *numbers)
        self._experts.scratch = scratch
        self.choices = _ChoicesStruct(tokens, choices, mixtures)
        self.choices.u, self.choices.all, self.choices.rank = u, self.weight + 4 * rows, whole + 16 * rows
        self._pointers = (ctypes.byref(self._experts), ctypes.byref(self.choices))
        self._out_shape = (tokens, hidden)

    def run(self, name: str, x: Tensor, weights: ExpertWeights) -> tuple[Tensor, bool]:
        """Calls that function, once `choices` is filled in: the output, and whether an index was out of range."""
        out_TD = x.new_zeros(self._out_shape)
        self._experts.x, self._experts.up, self._experts.down = (t.data_ptr() for t in (x, weights.up, weights.down))
        self.choices.out = out_TD.data_ptr()
        outside = call(name, *self._pointers)
        return out_TD, bool(outside)


_local = threading.local()


def _workspace(tokens: int, choices: int, mixtures: int, hidden: int, weights: ExpertWeights) -> _Workspace:
    kept: dict[object, _Workspace] = _local.__dict__.setdefault("kept", {})
    weights.check(hidden)
    kind = (weights.up.shape, weights.down.shape, weights.activation, weights.gated)
    key = (tokens, choices, mixtures, kind, torch.get_num_threads())
    if key not in kept:
        if len(kept) == _KEPT:
            del kept[next(iter(kept))]
        kept[key] = _Workspace(tokens, choices, mixtures, weights)
    return kept[key]
