"""The least time that a machine allows a layer: the larger of its arithmetic and of its traffic with memory.

The roofline of Williams, Waterman and Patterson (2009, doi 10.1145/1498765.1498785): work that does few operations for
a byte waits for memory, and all other work for the arithmetic units. Traffic is the least there can be: every weight
and every token is read or written once in a pass, and what lies between the products of an expert stays in cache, but
for the first projection, which is kept for the backward pass.

Letters: T tokens, D hidden, R expert rows, H first projection of an expert, P parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

from mixtura.benchmarks.contenders import Size
from mixtura.benchmarks.measure import Pass, interleaved
from mixtura.config import Family
from mixtura.planning.formulas import layer_parameters
from mixtura.planning.shapes import FeedForwardShape

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
