"""Seconds, kept bytes and operator calls of a layer, and how they are recorded: with versions, hardware and date.

Contenders run in alternating rounds and ratios are taken within a round, so that a slow spell of the machine hits all
alike. On one thread the processor time of the process counts, which other people's programs do not add to; on several
threads or an accelerator it is the time on the wall.

Beside it stands the least time that a machine allows a layer: the larger of its arithmetic and of its traffic with
memory (the roofline of Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785). Traffic is the least there
can be: every weight and every token is read or written once in a pass, and what lies between the products of an expert
stays in cache, but for the first projection, which is kept for the backward pass.

Letters: T tokens, D hidden, R expert rows, H first projection of an expert, P parameters.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixtura.benchmarks.contenders import Size
from mixtura.comparison.environment import environment, now
from mixtura.config import Family
from mixtura.files import write_json
from mixtura.planning.formulas import layer_parameters
from mixtura.planning.shapes import FeedForwardShape
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
    """Seconds of short runs: in each round the mean of `repeats`, after one round of warm-up."""
    clock = _clock()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            for _ in range(repeats):
                run()
            if round_number:
                seconds[name].append((clock() - start) / repeats)
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


FAMILIES: tuple[Family, ...] = ("dense", "token_choice", "expert_choice", "mixture_of_tokens")
ADAMW_BYTES = 28
"""Of a parameter in an update: weight, gradient and two float32 moments read, all but the gradient written."""
_COLOURS = {8: "#4c72b0", 32: "#55a868", 64: "#dd8452", 128: "#8172b3", 256: "#c44e52"}
_MARKERS = {"dense": "s", "token_choice": "o", "expert_choice": "v", "mixture_of_tokens": "D"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine can do at most."""

    name: str
    flops: float
    """A second, in matrix products."""
    bandwidth: float
    """Bytes a second, between memory and the arithmetic units."""
    element: int
    """Bytes of a weight or activation."""

    @property
    def ridge(self) -> float:
        """Operations a byte from which on memory is not what work waits for."""
        return self.flops / self.bandwidth


H200 = Machine(name="H200, bfloat16", flops=989e12, bandwidth=4.8e12, element=2)
"""As its maker states it, for dense products."""


def traffic(size: Size, family: Family, *, what: Pass, element: int) -> float:
    """The fewest bytes that a pass moves; in a step, the optimizer's not counted."""
    shape = _shape(size, family)
    tokens = size.tokens * size.hidden * element
    rows = size.tokens * shape.rows_per_token
    projected = rows * (shape.num_projections - 1) * shape.intermediate_size * element
    weights = layer_parameters(shape) * element
    if what == "forward":
        return weights + 2 * tokens
    # Backward: weights, tokens, the output's gradient and the first projection read, two gradients written.
    return 3 * weights + 5 * tokens + 2 * projected


def least_seconds(size: Size, family: Family, machine: Machine, *, what: Pass) -> float:
    """The least time that the roofline allows; the optimizer's pass over memory comes after the others."""
    moved = traffic(size, family, what=what, element=machine.element) / machine.bandwidth
    seconds = max(size.flops(backward=what != "forward") / machine.flops, moved)
    if what == "step":
        seconds += ADAMW_BYTES * layer_parameters(_shape(size, family)) / machine.bandwidth
    return seconds


def measure_bandwidth(*, parameters: int = 1 << 26, rounds: int = 5) -> float:
    """Bytes a second that AdamW's update of so many parameters moves on this CPU: the most that a pass was seen to."""
    weight = torch.nn.Parameter(torch.zeros(parameters))
    weight.grad = torch.ones(parameters)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    seconds = interleaved({"adamw": optimizer.step}, baseline="adamw", rounds=rounds)["adamw"]
    return ADAMW_BYTES * parameters / min(seconds)


def machine_of(record: Mapping[str, Any], *, bandwidth: float) -> Machine:
    """The CPU that a record of the layers was measured on: its best large product is the most it can do."""
    rows = [row for entry in record["sizes"] for row in entry["rows"]]
    flops = max(row["gigaflops"] for row in rows if row["contender"] == "one large product") * 1e9
    return Machine(name="this CPU, one thread, float32", flops=flops, bandwidth=bandwidth, element=4)


def plot(record: Mapping[str, Any], cpu: Machine, device: Machine, device_sizes: Sequence[Size]) -> Figure:
    """Training passes under two roofs: as measured on the CPU, and as the roof allows on the device."""
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2)
    for entry in record["sizes"]:
        size = Size(**entry["size"])
        rates = {row["contender"]: row["gigaflops"] for row in entry["rows"] if row["what"] == "training"}
        for family in FAMILIES:
            if (name := family.replace("_", " ")) in rates:
                _point(left, size, family, cpu, rates[name] * 1e9, filled=True)
    for size in device_sizes:
        for family in FAMILIES:
            most = size.flops(backward=True) / least_seconds(size, family, device, what="training")
            _point(right, size, family, device, most, filled=False)
    for axes, machine, title in ((left, cpu, "as measured"), (right, device, "the most there can be, not measured")):
        _roof(axes, machine)
        axes.set_title(f"{machine.name}: {title}", fontsize=9)
    keys = [Line2D([], [], linestyle="", marker=marker, color="#333333") for marker in _MARKERS.values()]
    keys += [Line2D([], [], linewidth=4, color=colour) for colour in _COLOURS.values()]
    names = [*(family.replace("_", " ") for family in FAMILIES), *(f"{experts} experts" for experts in _COLOURS)]
    figure.legend(keys, names, fontsize=8, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def _point(axes: Axes, size: Size, family: Family, machine: Machine, rate: float, *, filled: bool) -> None:
    intensity = size.flops(backward=True) / traffic(size, family, what="training", element=machine.element)
    colour = "#333333" if family == "dense" else _COLOURS.get(size.experts, "#937860")
    axes.plot(
        intensity, rate, _MARKERS[family], color=colour, markersize=6, markerfacecolor=colour if filled else "none"
    )


def _roof(axes: Axes, machine: Machine) -> None:
    """From a quarter of the ridge on, and a decade and a half of speeds."""
    low, high = machine.ridge / 4, max(1.5 * axes.get_xlim()[1], 4 * machine.ridge)
    corners = (low, machine.ridge, high)
    axes.plot(
        corners, [min(machine.flops, machine.bandwidth * corner) for corner in corners], color="black", linewidth=1
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(machine.flops / 8, machine.flops * 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(EngFormatter(unit="FLOP/s"))
    axes.set_xlabel("operations a byte", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)


def _shape(size: Size, family: Family) -> FeedForwardShape:
    return FeedForwardShape(
        family=family,
        hidden_size=size.hidden,
        intermediate_size=size.expert_width(family, top_k=size.top_k),
        gated=size.gated,
        num_experts=1 if family == "dense" else size.experts,
        top_k=size.top_k,
        group_size=size.group_size,
    )
