"""The report's pictures as PNG files, for READMEs and messages: loss, differences and expert load, in a light theme."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from mixtura.report.colours import arm_colours
from mixtura.report.deployment_picture import draw_deployment
from mixtura.report.figures import gap_lines, held_out_lines, load_maps, mean_line
from mixtura.report.measures import difference_unit, yardstick
from mixtura.report.picture_style import INK, SOFT, plain, save, style
from mixtura.report.wording import capital, digits_for, signed

_MARKERS = ("o", "s", "D", "^", "P", "*", "p", "h")
_LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#5b3794", "#b9a6dc", "#f4f2ee", "#f4b26a", "#b35806"])
_HIGHEST_LOAD = 2.0


def write_pictures(results: dict[str, Any], summary: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `loss.png`, `differences.png`, `load.png` and `deployment.png`; those without data are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[dict[str, Any], dict[str, Any]], Figure | None]] = {
        "loss.png": draw_loss,
        "differences.png": draw_differences,
        "load.png": draw_load,
        "deployment.png": draw_deployment,
    }
    written = []
    for name, function in draw.items():
        figure = function(results, summary)
        if figure is not None:
            save(figure, folder / name)
            written.append(folder / name)
    return written


def draw_loss(results: dict[str, Any], summary: dict[str, Any]) -> Figure | None:
    """Held-out loss as deployed over training, and beside it the difference to the baseline."""
    arms = [(name, arm) for name, arm in results["arms"].items() if arm["deployed_mode"]]
    lines = {name: held_out_lines(arm, arm["deployed_mode"]) for name, arm in arms}
    base = results["arms"][results["baseline"]]
    gaps = {name: gap_lines(arm, base) for name, arm in arms if summary["arms"][name]["crossing"]}
    if not any(lines.values()):
        return None
    colours = arm_colours(results["arms"])
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for axes, shown in ((left, lines), (right, gaps)):
        style(axes)
        for name, seeds in shown.items():
            index = list(results["arms"]).index(name)
            _draw_arm(axes, seeds, colours[name][0], _MARKERS[index % len(_MARKERS)], summary["arms"][name]["label"])
    end, late = _late(lines)
    left.set_ylim(min(late) - 0.04, max(late) + 0.04)
    late_gaps = [0.0, *(_late(gaps)[1] if any(gaps.values()) else [])]
    pad = 0.08 * (max(late_gaps) - min(late_gaps)) or 0.05
    right.set_ylim(min(late_gaps) - pad, max(late_gaps) + pad)
    unit = yardstick(results).loss.unit
    left.set_title(f"Held-out loss as deployed ({unit})", loc="left", fontsize=10, color=INK)
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    base_label = summary["arms"][results["baseline"]]["label"]
    right.axhline(0, color=colours[results["baseline"]][0], linewidth=1.6)
    right.set_title(f"Loss minus {base_label}'s: below the line is better", loc="left", fontsize=10, color=INK)
    for axes in (left, right):
        axes.set_xlabel("training steps", color=SOFT, fontsize=9)
        axes.set_xlim(left=0, right=end * 1.02)
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
        axes.plot(*zip(*mean, strict=True), color=colour, linewidth=2, marker=marker, markersize=4, label=plain(label))


def draw_differences(results: dict[str, Any], summary: dict[str, Any]) -> Figure | None:
    """Each arm's final loss minus the baseline's: mean, 95 % interval over seeds, and every seed."""
    shown = [name for name, arm in summary["arms"].items() if arm["difference"]["deployed"]]
    if not shown:
        return None
    colours, base = arm_colours(results["arms"]), summary["arms"][results["baseline"]]["label"]
    measure = yardstick(results).measure
    figure = Figure(figsize=(7.6, 1.5 + 0.62 * len(shown)), layout="constrained")
    axes = figure.subplots()
    style(axes)
    axes.grid(False, axis="y")
    axes.axvline(0, color=SOFT, linewidth=1.2)
    for row, name in enumerate(reversed(shown)):
        difference, colour = summary["arms"][name]["difference"]["deployed"], colours[name][0]
        half = 0.0 if difference["high"] is None else difference["high"] - difference["mean"]
        axes.errorbar(
            difference["mean"], row, xerr=half or None, color=colour, fmt="o", capsize=4, linewidth=2, markersize=8
        )
        values = difference["values"]
        axes.plot(values, [row - 0.22] * len(values), "o", color=colour, fillstyle="none", markersize=5)
        text = signed(difference["mean"], digits_for(difference["mean"], least=measure.digits))
        axes.annotate(
            text, (difference["mean"], row), xytext=(0, 9), textcoords="offset points", ha="center", color=INK
        )
    axes.set_yticks(range(len(shown)), [plain(summary["arms"][name]["label"]) for name in reversed(shown)], color=INK)
    axes.set_ylim(-0.6, len(shown) - 0.3)
    reach = max(abs(bound) for bound in axes.get_xlim())
    axes.set_xlim(-reach, reach)
    title = f"{capital(measure.name)} minus {plain(base)}'s, as deployed"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    side = f"{'left' if measure.better == 'lower' else 'right'} of the line is better"
    axes.set_xlabel("; ".join(filter(None, (difference_unit(measure), side))), color=SOFT, fontsize=9)
    return figure


def draw_load(results: dict[str, Any], summary: dict[str, Any]) -> Figure | None:
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
            next(iter(entry["seeds"].values())),
            aspect="auto",
            origin="lower",
            cmap=_LOAD_COLOURS,
            norm=TwoSlopeNorm(1.0, 0.0, _HIGHEST_LOAD),
            extent=(0, entry["steps"][-1], -0.5, entry["experts"] - 0.5),
        )
        axes.set_title(f"{plain(entry['label'])}, layer {entry['layer']}", loc="left", fontsize=9, color=INK)
        axes.set_xlabel("steps", color=SOFT, fontsize=8)
        axes.set_ylabel("expert", color=SOFT, fontsize=8)
        axes.tick_params(colors=SOFT, labelsize=8, length=0)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=panels, extend="max", shrink=0.8)
        bar.set_label(f"load, seed {next(iter(maps[0]['seeds']))}: 1 is even", color=SOFT, fontsize=8)
        bar.ax.tick_params(colors=SOFT, labelsize=8)
    return figure
