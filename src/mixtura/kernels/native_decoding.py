"""The few tokens of a decoding step in C: `mixtura_chosen` and `mixtura_apart` of native_decoding.c.

Next to the products of a single token every Python statement counts, so each thread keeps the memory that a step works
in and the structures that describe it, one for each kind of step. Inference only.

Shapes: T tokens, K choices of a token, E experts, S mixtures, D hidden, F expert width, H = 2F when gated else F.
"""

import ctypes
import threading

import torch
from torch import Tensor

from mixtura.kernels.compiled import call, sgemm
from mixtura.kernels.native import ACTIVATIONS, BLOCK_ROWS, ExpertsStruct

_KEPT = 8
"""Workspaces that a thread keeps: a model has one or two kinds of steps for each batch size."""


def chosen(
    x_TKD: Tensor,
    expert_TK: Tensor,
    scale_TK: Tensor | None,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """(T, K or 1, D) -> (T, D): `reference.few_ffn`, without an order found beforehand."""
    tokens, choices = expert_TK.shape
    work = _workspace(tokens, choices, 0, up_EHD, down_EDF, activation, gated)
    expert_TK = expert_TK.contiguous()
    fields = work.choices
    fields.shared = x_TKD.size(1) == 1
    fields.expert, fields.weight = expert_TK.data_ptr(), weight_TK.data_ptr()
    fields.scale = None if scale_TK is None else scale_TK.data_ptr()
    fields.mean = fields.rest = None
    return work.run("mixtura_chosen", x_TKD, up_EHD, down_EDF)


def apart(
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
    """(T, D) -> (T, D): `MixtureOfTokens` without a group, its top_k mixtures by the sigmoid of their logits.

    The arguments after the temperature are the fields of `Neighbours`, and what the layer has of that name.
    """
    work = _workspace(len(x_TD), top_k, logits_TS.size(1), up_EHD, down_EDF, activation, gated)
    fields = work.choices
    fields.shared, fields.per_expert, fields.temperature = True, mixtures_per_expert, temperature
    if isinstance(log_mass_S, Tensor):
        fields.log_mass = log_mass_S.data_ptr()
    else:
        fields.log_mass, fields.same_mass = None, log_mass_S
    fields.expert, fields.mixture = work.expert, work.mixture
    fields.scale = fields.weight = work.weight
    fields.mean = None if mean_SD is None else mean_SD.data_ptr()
    fields.rest = None if output_SD is None else output_SD.data_ptr()
    fields.logits = logits_TS.data_ptr()
    return work.run("mixtura_apart", x_TD, up_EHD, down_EDF)


class _ChoicesStruct(ctypes.Structure):
    """`choices_t` of native_decoding.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "mixtures", "per_expert", "shared")),
        *((name, ctypes.c_float) for name in ("temperature", "same_mass")),
        *((name, ctypes.c_void_p) for name in ("expert", "mixture", "scale", "weight", "logits", "log_mass")),
        *((name, ctypes.c_void_p) for name in ("mean", "rest", "u", "all", "rank", "out")),
    )


class _Workspace:
    """The structures of one kind of step and the memory that it works in, for one thread at a time."""

    def __init__(
        self, tokens: int, choices: int, mixtures: int, sizes: tuple[int, int, int, int], activation: str, gated: bool
    ) -> None:
        experts, hidden, width, rows_H = sizes
        rows = tokens * choices
        block = min(BLOCK_ROWS, rows)
        self._floats = torch.empty(block * (3 * hidden + 2 * width + 2 * rows_H) + mixtures + rows)
        self._whole = torch.empty(3 * rows + experts, dtype=torch.int64)
        scratch, whole = self._floats.data_ptr(), self._whole.data_ptr()
        u = scratch + 4 * block * (3 * hidden + 2 * width + rows_H)
        self.weight = u + 4 * block * rows_H
        self.expert, self.mixture = whole, whole + 8 * rows
        numbers = (torch.get_num_threads(), block, experts, hidden, width, gated, ACTIVATIONS[activation])
        self._experts = ExpertsStruct(sgemm(), *numbers)
        self._experts.scratch = scratch
        self.choices = _ChoicesStruct(tokens, choices, mixtures)
        self.choices.u, self.choices.all, self.choices.rank = u, self.weight + 4 * rows, whole + 16 * rows
        self._pointers = (ctypes.byref(self._experts), ctypes.byref(self.choices))
        self._out_shape = (tokens, hidden)

    def run(self, name: str, x: Tensor, up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
        """Calls the function of that name, once `choices` is filled in."""
        out_TD = x.new_zeros(self._out_shape)
        self._experts.x, self._experts.up, self._experts.down = x.data_ptr(), up_EHD.data_ptr(), down_EDF.data_ptr()
        self.choices.out = out_TD.data_ptr()
        call(name, *self._pointers)
        return out_TD


_local = threading.local()


def _workspace(
    tokens: int, choices: int, mixtures: int, up_EHD: Tensor, down_EDF: Tensor, activation: str, gated: bool
) -> _Workspace:
    kept: dict[object, _Workspace] = _local.__dict__.setdefault("kept", {})
    experts, hidden, width = down_EDF.shape
    sizes = (experts, hidden, width, up_EHD.size(1))
    key = (tokens, choices, mixtures, sizes, activation, gated, torch.get_num_threads())
    if key not in kept:
        if len(kept) == _KEPT:
            del kept[next(iter(kept))]
        kept[key] = _Workspace(tokens, choices, mixtures, sizes, activation, gated)
    return kept[key]
