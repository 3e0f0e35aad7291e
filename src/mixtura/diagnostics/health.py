"""How training goes: how evenly experts are used, spikes of loss and gradient norm, and the memory of a step."""

import math
import statistics
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mixtura.config import UserError
from mixtura.layers import RoutingStats

Load = RoutingStats | Tensor | numpy.ndarray | Sequence[float]
"""Rows, or any other measure of use, of each expert (E,)."""

DEAD_SHARE = 0.01
"""An expert with less than this part of an even share is dead."""


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """How uneven one load is; the values in brackets are a perfectly even load's."""

    imbalance: float
    """Largest load over the mean (1)."""
    coefficient_of_variation: float
    """Standard deviation over the mean (0)."""
    dead_fraction: float
    """Share of experts that get less than `DEAD_SHARE` of an even share (0)."""
    effective_fraction: float
    """exp(entropy of the shares) / E: the share of experts that are in use (1)."""


def load_shares(load: Load) -> numpy.ndarray:
    """(E,) -> (E,) float64: each expert's part of the whole, summing to one.

    Raises:
        UserError: no load at all, or a negative or infinite one.
    """
    if isinstance(load, RoutingStats):
        load = load.tokens_per_expert_E
    if isinstance(load, Tensor):
        load = load.detach().to("cpu", torch.float64).numpy()
    load_E = numpy.asarray(load, dtype=numpy.float64)
    total = load_E.sum()
    if load_E.ndim != 1 or not 0 < total < numpy.inf or load_E.min() < 0:
        raise UserError(f"The load {load_E.tolist()} has no shares: give one number of zero or more for each expert.")
    return load_E / total


def summarize_load(load: Load) -> LoadSummary:
    """How uneven a load (E,) is; add up several batches' loads before, not their summaries after.

    Raises:
        UserError: see `load_shares`.
    """
    share_E = load_shares(load)
    relative_E = share_E * len(share_E)
    used_U = share_E[share_E > 0]
    return LoadSummary(
        imbalance=float(relative_E.max()),
        coefficient_of_variation=float(relative_E.std()),
        dead_fraction=float((relative_E < DEAD_SHARE).mean()),
        effective_fraction=float(numpy.exp(-(used_U * numpy.log(used_U)).sum()) / len(share_E)),
    )


def dropped_share(stats: RoutingStats) -> float:
    """Part of the routed rows that was dropped, 0 for dropless layers."""
    return float(stats.dropped_tokens) / max(float(stats.routed_rows), 1.0)


WINDOW = 50
WARMUP = 10
DEVIATIONS = 5.0
MINIMUM_RISE = 0.2

_MAD_TO_STANDARD_DEVIATION = 1.4826


@dataclass(frozen=True, kw_only=True)
class SeriesSummary:
    """One run's losses or gradient norms in three numbers."""

    mean: float
    """Over the finite values."""
    maximum: float
    """Over the finite values."""
    spikes: int


def find_spikes(values: Sequence[float]) -> list[int]:
    """Indices at which a spike begins, by the rule of this module."""
    starts = []
    inside = False
    for index, value in enumerate(values):
        before = [v for v in values[max(0, index - WINDOW) : index] if math.isfinite(v)]
        spike = _is_spike(value, before)
        if spike and not inside:
            starts.append(index)
        inside = spike
    return starts


def count_spikes(values: Sequence[float]) -> int:
    """How many spikes a series of losses or gradient norms has, by the rule of this module."""
    return len(find_spikes(values))


def summarize_series(values: Sequence[float]) -> SeriesSummary:
    """Mean and maximum of the finite values (nan when there is none), and the number of spikes."""
    finite = [value for value in values if math.isfinite(value)]
    return SeriesSummary(
        mean=statistics.fmean(finite) if finite else math.nan,
        maximum=max(finite, default=math.nan),
        spikes=count_spikes(values),
    )


def _is_spike(value: float, before: list[float]) -> bool:
    if not math.isfinite(value):
        return True
    if len(before) < WARMUP:
        return False
    median = statistics.median(before)
    deviation = _MAD_TO_STANDARD_DEVIATION * statistics.median(abs(v - median) for v in before)
    rise = value - median
    return rise > DEVIATIONS * deviation and rise > MINIMUM_RISE * abs(median)


def measure_peak_memory(step: Callable[[], None], *, device: torch.device | str = "cpu") -> int:
    """Runs `step` once and returns the most bytes of tensors that it had allocated, and not yet freed, at any moment.

    Tensors that existed before do not count: neither as allocated nor, if the step frees them, as freed. Run the step
    once before, so that the optimizer has its state, and call `zero_grad` where the training loop does.

    On a GPU the allocator counts. On the CPU every tensor that an operator returns is followed until its storage dies,
    in the backward pass and in custom autograd functions too; scratch space inside a single operator (a blocked
    softmax, oneDNN's packing) is not seen. The measurement slows the step down: do not time it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _StorageLedger() as ledger:
        step()
    return ledger.peak_bytes


def live_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of parameters, buffers, gradients and optimizer state; shared storage counts once, shards are our own."""
    tensors = _tensors([*model.parameters(), *model.buffers()])
    tensors += _tensors([p.grad for p in model.parameters() if p.grad is not None])
    if optimizer is not None:
        tensors += _tensors(list(optimizer.state.values()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class _StorageLedger(TorchDispatchMode):
    """Adds up the bytes of all storages that operators create while the mode is on, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        # Address of a storage -> a weak reference whose callback runs when it is freed, and the bytes counted for it.
        self._storages: dict[int, weakref.ref] = {}
        self._booked: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator and books what it returned."""
        kwargs = kwargs or {}
        # A storage that is first seen as an input existed before the step: it is remembered, but not counted.
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # Counted ones are counted again, since an operator with out= may have resized them.
            if self._follow(storage) or storage._cdata in self._booked:
                self._book(storage)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is new; if so, a callback is set for when it is freed."""
        key = storage._cdata
        if key in self._storages:
            return False
        self._storages[key] = weakref.ref(storage, lambda _: self._strike(key))
        return True

    def _book(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live_bytes += size - self._booked.get(key, 0)
        self._booked[key] = size

    def _strike(self, key: int) -> None:
        del self._storages[key]
        self._live_bytes -= self._booked.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers that have one storage of their own, which sparse ones lack.

    A tensor made of others, such as 8-bit codes and their scales, stands for these.
    """
    found: list[Tensor] = []
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor) and hasattr(leaf, "__tensor_flatten__"):
            parts, _ = leaf.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            found += _tensors([getattr(leaf, part) for part in parts])
        elif isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            found.append(leaf)
    return found
