"""Seconds, kept bytes and operator calls of a layer, and how they are recorded: with versions, hardware and date.

Contenders run in alternating rounds and ratios are taken within a round, so that a slow spell of the machine hits all
alike. On one thread the processor time of the process counts, which other people's programs do not add to; on several
threads or an accelerator it is the time on the wall.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixtura.comparison.folder import environment, now
from mixtura.files import write_json
from mixtura.results import Facts

Pass = Literal["forward", "training", "step"]
"""Forward without gradients; forward and backward, with the input's gradient; the same and a fused AdamW update."""
TOO_SLOW = 25.0
"""A contender that takes this many times the dense layer's time when warm is timed once and no more."""


def passes(layer: nn.Module, x_BLD: Tensor, what: Pass) -> Callable[[], None]:
    """A function that runs the layer once."""
    if what == "forward":

        def forward() -> None:
            with torch.no_grad():
                layer(x_BLD)

        return forward
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True) if what == "step" else None

    def training() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x_BLD.detach().requires_grad_()).square().mean().backward()
        if optimizer is not None:
            optimizer.step()

    return training


def interleaved(runs: Mapping[str, Callable[[], None]], *, baseline: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, one number a round; a run that is far too slow has a single number."""
    clock = _clock()
    seconds: dict[str, list[float]] = {}
    for name, run in runs.items():
        run()
        seconds[name] = [_seconds(run, clock)]
    slowest = TOO_SLOW * seconds[baseline][0]
    kept = {name: run for name, run in runs.items() if seconds[name][0] <= slowest}
    for name in kept:
        seconds[name] = []
    for _ in range(rounds):
        for name, run in kept.items():
            seconds[name].append(_seconds(run, clock))
    return seconds


def alternating(runs: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Wall-clock seconds of short runs: in each round the mean of `repeats`, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            if round_number:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratios(seconds: Mapping[str, list[float]], *, baseline: str) -> dict[str, tuple[float, float, float]]:
    """Median, lowest and highest ratio of each run's seconds to the baseline's, taken within rounds."""
    result = {}
    for name, own in seconds.items():
        against = seconds[baseline]
        if len(own) < len(against):  # timed once
            against = [statistics.median(against)]
        each = [a / b for a, b in zip(own, against, strict=True)]
        result[name] = (statistics.median(each), min(each), max(each))
    return result


def kept_bytes(layer: nn.Module, x_BLD: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the parameters; shared memory counts once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x_BLD.detach().requires_grad_())
    del y
    return sum(kept.values())


def calls(run: Callable[[], None]) -> int:
    """Operators that one run calls, views included: what a small layer's time is made of."""
    with _CallCounter() as counter:
        run()
    return counter.calls


class _CallCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _clock() -> Callable[[], float]:
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


def _seconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    run()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def store_record(folder: Path, kind: str, *, settings: Facts, suffix: str = "", **measured: Any) -> Path:
    """Writes `<kind>-<device><suffix>.json` into the folder, and returns its path.

    Args:
        folder: made if it is missing.
        kind: what was timed, such as "layers".
        settings: what it was timed with.
        suffix: distinguishes records of one kind and device.
        measured: the rest of the record, by key.
    """
    record = {"created": now(), "environment": environment(), "settings": settings, **measured}
    path = folder / f"{kind}-{record['environment']['device'].replace(' ', '-').lower()}{suffix}.json"
    write_json(path, record)
    return path
