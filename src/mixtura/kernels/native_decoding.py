"""The few tokens of a decoding step in C: `mixtura_small_batch` and `mixtura_token_by_token` of native_decoding.c.

Next to the products of a single token every Python statement counts, so each thread keeps the memory that a step works
in and the structures that describe it, one for each kind of step. Inference only.

Shapes: T tokens, K choices of a token, E experts, S mixtures, D hidden, F expert width, H = 2F when gated else F.
"""

import ctypes
import threading

import torch
from torch import Tensor

from mixtura.kernels.expert_weights import ExpertWeights, check_shape, refuse
from mixtura.kernels.native import ACTIVATIONS, BLOCK_ROWS, ExpertsStruct, call, sgemm

_KEPT = 8
"""Workspaces that a thread keeps: a model has one or two kinds of steps for each batch size."""


def small_batch(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(T, K or 1, D) -> (T, D): `reference.small_batch_ffn`, without an order found beforehand."""
    tokens, choices = expert_TK.shape
    work = _workspace(tokens, choices, 0, x_TKD.size(2), experts)
    fields = work.choices
    fields.shared = x_TKD.size(1) == 1
    fields.expert, fields.weight = expert_TK.data_ptr(), weight_TK.data_ptr()
    fields.scale = None if scale_TK is None else scale_TK.data_ptr()
    fields.mean = fields.output = None
    out_TD, outside = work.run("mixtura_small_batch", x_TKD, experts)
    if outside:
        refuse("expert_TK", expert_TK, len(experts.up))
    return out_TD


def token_by_token(
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
    fields.shared, fields.per_expert, fields.temperature = True, mixtures_per_expert, temperature
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


class _ChoicesStruct(ctypes.Structure):
    """`choices_t` of native_decoding.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "mixtures", "per_expert", "shared")),
        *((name, ctypes.c_float) for name in ("temperature", "same_mass")),
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
        self._floats = torch.empty(block * (3 * hidden + 2 * width + 2 * rows_H) + mixtures + rows)
        self._whole = torch.empty(3 * rows + experts, dtype=torch.int64)
        scratch, whole = self._floats.data_ptr(), self._whole.data_ptr()
        u = scratch + 4 * block * (3 * hidden + 2 * width + rows_H)
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
