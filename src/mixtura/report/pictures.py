"""The report's pictures as PNG files, for READMEs and messages: loss, differences and expert load, in a light theme."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mixtura.files import replacing
from mixtura.report.deployment import MODES, deployed_arms, gaps
from mixtura.report.facts import held_out, load_maps
from mixtura.report.figures import final_gap, final_loss, gap_lines, held_out_lines, mean_line
from mixtura.report.wording import MINUS, arm_colours, capital, difference_unit, signed_margin, yardstick_of
from mixtura.results import Results, Summary

INK, SOFT, GRID = "#1f2328", "#59636e", "#e3e6ea"
_MARKERS = ("o", "s", "D", "^", "P", "*", "p", "h")
_LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#5b3794", "#b9a6dc", "#f4f2ee", "#f4b26a", "#b35806"])
_HIGHEST_LOAD = 2.0


def write_pictures(results: Results, summary: Summary, folder: Path) -> list[Path]:
    """Writes `loss.png`, `differences.png`, `load.png` and `deployment.png`; those without data are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[Results, Summary], Figure | None]] = {
        "loss.png": draw_loss,
        "differences.png": draw_differences,
        "load.png": draw_load,
        "deployment.png": draw_deployment,
    }
    written = []
    for name, function in draw.items():
        figure = function(results, summary)
        if figure is not None:
            _save(figure, folder / name)
            written.append(folder / name)
    return written


def draw_loss(results: Results, summary: Summary) -> Figure | None:
    """Held-out loss as deployed over training, and beside it the difference to the baseline; rings are final values."""
    lines = {
        name: held_out_lines(arm, arm.deployed_mode)
        for name, arm in results.arms.items()
        if arm.deployed_mode is not None
    }
    base = results.arms[results.baseline]
    gap = {name: gap_lines(results.arms[name], base) for name in lines if summary.arms[name].crossing}
    if not any(lines.values()):
        return None
    colours = arm_colours(results.arms)
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for axes, shown in ((left, lines), (right, gap)):
        _style(axes)
        for name, seeds in shown.items():
            index = list(results.arms).index(name)
            _draw_arm(axes, seeds, colours[name][0], _MARKERS[index % len(_MARKERS)], summary.arms[name].label)
    steps = {name: arm.runs[0].steps for name, arm in results.arms.items()}
    losses = {name: final_loss(summary.arms[name], summary.arms[name].deployed_mode) for name in lines}
    gaps_at_end = {name: final_gap(results, summary, name) for name in gap}
    for axes, values in ((left, losses), (right, gaps_at_end)):
        for name, value in values.items():
            if value is not None:
                style = {"fillstyle": "none", "markersize": 10, "markeredgewidth": 1.6, "clip_on": False}
                axes.plot(steps[name], value, "o", color=colours[name][0], **style)
    end, late = _late(lines)
    late += [value for value in losses.values() if value is not None]
    left.set_ylim(min(late) - 0.04, max(late) + 0.04)
    late_gaps = [0.0, *(_late(gap)[1] if any(gap.values()) else [])]
    late_gaps += [value for value in gaps_at_end.values() if value is not None]
    pad = 0.08 * (max(late_gaps) - min(late_gaps)) or 0.05
    right.set_ylim(min(late_gaps) - pad, max(late_gaps) + pad)
    unit = yardstick_of(results).loss.unit
    left.set_title(f"Held-out loss as deployed ({unit})", loc="left", fontsize=10, color=INK)
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    base_label = summary.arms[results.baseline].label
    right.axhline(0, color=colours[results.baseline][0], linewidth=1.6)
    right.yaxis.set_major_formatter(FuncFormatter(_signed_tick))
    right.set_title(f"Loss minus {base_label}'s: below the line is better", loc="left", fontsize=10, color=INK)
    for axes in (left, right):
        axes.set_xlabel("training steps", color=SOFT, fontsize=9)
        axes.set_xlim(left=0, right=end * 1.02)
    if any(gap.values()):
        right.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.supxlabel(held_out(results).note, x=0.01, ha="left", color=SOFT, fontsize=8)
    return figure


def _late(lines: dict[str, dict[int, list[tuple[float, float]]]]) -> tuple[float, list[float]]:
    """The last step, and the losses after a quarter of the run."""
    points = [point for seeds in lines.values() for line in seeds.values() for point in line]
    end = max(step for step, _ in points)
    return end, [loss for step, loss in points if step >= end / 4]


def _draw_arm(axes: Any, seeds: dict[int, list[tuple[float, float]]], colour: str, marker: str, label: str) -> None:
    for points in seeds.values() if len(seeds) > 1 else ():
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.4)
    mean = mean_line(seeds)
    if mean:
        axes.plot(*zip(*mean, strict=True), color=colour, linewidth=2, marker=marker, markersize=4, label=_plain(label))


def draw_differences(results: Results, summary: Summary) -> Figure | None:
    """Each arm's final loss minus the baseline's: mean, 95 % interval over seeds, and every seed."""
    found = {name: arm.difference.deployed for name, arm in reversed(summary.arms.items())}
    shown = {name: difference for name, difference in found.items() if difference is not None}
    if not shown:
        return None
    colours, base = arm_colours(results.arms), summary.arms[results.baseline].label
    measure = yardstick_of(results).measure
    figure = Figure(figsize=(7.6, 1.5 + 0.62 * len(shown)), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(_signed_tick))
    axes.grid(False, axis="y")
    axes.axvline(0, color=SOFT, linewidth=1.2)
    for row, (name, difference) in enumerate(shown.items()):
        colour = colours[name][0]
        half = 0.0 if difference.high is None else difference.high - difference.mean
        axes.errorbar(
            difference.mean, row, xerr=half or None, color=colour, fmt="o", capsize=4, linewidth=2, markersize=8
        )
        # The mean of one seed is that seed: it is drawn once.
        values = difference.values if difference.n > 1 else []
        axes.plot(values, [row - 0.22] * len(values), "o", color=colour, fillstyle="none", markersize=5)
        text = signed_margin(difference, least=measure.digits)
        axes.annotate(text, (difference.mean, row), xytext=(0, 9), textcoords="offset points", ha="center", color=INK)
    axes.set_yticks(range(len(shown)), [_plain(summary.arms[name].label) for name in shown], color=INK)
    axes.set_ylim(-0.6, len(shown) - 0.3)
    reach = max(abs(bound) for bound in axes.get_xlim())
    axes.set_xlim(-reach, reach)
    title = f"{capital(measure.name)} minus {_plain(base)}'s, as deployed"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    marks = "open circles: single seeds" if any(difference.n > 1 for difference in shown.values()) else "one seed"
    side = f"{'left' if measure.better == 'lower' else 'right'} of the line is better"
    axes.set_xlabel("; ".join(filter(None, (difference_unit(measure), side, marks))), color=SOFT, fontsize=9)
    return figure


def draw_load(results: Results, summary: Summary) -> Figure | None:
    """Load of every expert over training, first seed; a panel for each arm and mixture layer."""
    maps = load_maps(results, summary)
    if not maps:
        return None
    columns = min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = Figure(figsize=(2.5 * columns + 0.9, 2.5 * rows), layout="constrained")
    panels, image = figure.subplots(rows, columns, squeeze=False).ravel().tolist(), None
    for axes, entry in zip(panels, maps, strict=False):
        image = axes.imshow(
            next(iter(entry.seeds.values())),
            aspect="auto",
            origin="lower",
            cmap=_LOAD_COLOURS,
            norm=TwoSlopeNorm(1.0, 0.0, _HIGHEST_LOAD),
            extent=(0, entry.steps[-1], -0.5, entry.experts - 0.5),
        )
        axes.set_title(f"{_plain(entry.label)}, layer {entry.layer}", loc="left", fontsize=9, color=INK)
        axes.set_xlabel("steps", color=SOFT, fontsize=8)
        axes.set_ylabel("expert", color=SOFT, fontsize=8)
        axes.tick_params(colors=SOFT, labelsize=8, length=0)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=panels, extend="max", shrink=0.8)
        bar.set_label(f"load, seed {next(iter(maps[0].seeds))}: 1 is even", color=SOFT, fontsize=8)
        bar.ax.tick_params(colors=SOFT, labelsize=8)
    return figure


def draw_deployment(results: Results, summary: Summary) -> Figure | None:
    """Left, each layer's weights from a token's largest to its smallest; right, the loss in each mode minus in groups.

    Means over seeds, the weights from the held-out sequences of one batch. None where no arm has both.
    """
    shown = deployed_arms(results, summary)
    if not shown:
        return None
    colours = arm_colours(results.arms)
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for axes in (left, right):
        _style(axes)
    for place, (name, curves) in enumerate(shown.items()):
        colour, label = colours[name][0], _plain(summary.arms[name].label)
        for number, (_, weights) in enumerate(sorted(curves.items())):
            fade = 0.35 + 0.65 * (number + 1) / len(curves)
            ranks = range(1, len(weights) + 1)
            left.plot(
                ranks, weights, color=colour, alpha=fade, marker="o", markersize=3, label=None if number else label
            )
        found = gaps(summary.arms[name].modes)
        at = [index + (place - (len(shown) - 1) / 2) * 0.8 / len(shown) for index in range(len(MODES) - 1)]
        heights = [found.get(mode, float("nan")) for mode in list(MODES)[1:]]
        right.bar(at, heights, width=0.8 / len(shown), color=colour)
    left.set_yscale("log")
    left.set_xlabel("mixtures of a token, from its largest weight", color=SOFT, fontsize=9)
    left.set_title("Mean weight alone, by layer (later layers darker)", loc="left", fontsize=10, color=INK)
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    right.axhline(0, color=SOFT, linewidth=1)
    right.set_xticks(range(len(MODES) - 1), list(MODES.values())[1:])
    unit = yardstick_of(results).loss.unit
    right.set_title(f"Held-out loss minus that in groups ({unit})", loc="left", fontsize=10, color=INK)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, whole or not at all."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        # Without the writer's version the same numbers give the same bytes.
        figure.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def _style(axes: Any) -> None:
    """Two soft sides and a grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)


def _signed_tick(value: float, place: int | None = None) -> str:
    """A difference at an axis, with its sign as everywhere."""
    return f"{value:+g}".replace("-", MINUS) if abs(value) > 1e-9 else "0"


def _plain(text: str) -> str:
    """Matplotlib reads `$...$` as mathematics, and leaves a label out that begins with an underscore."""
    return text.replace("$", r"\$").lstrip("_")
