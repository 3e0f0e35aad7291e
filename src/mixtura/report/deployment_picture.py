"""What mixture of tokens loses without its group, beside how peaked its weights are: one picture."""

from typing import Any

from matplotlib.figure import Figure

from mixtura.report.colours import arm_colours
from mixtura.report.deployment import MODES, deployed_arms, gaps
from mixtura.report.measures import yardstick
from mixtura.report.picture_style import INK, SOFT, plain, style


def draw_deployment(results: dict[str, Any], summary: dict[str, Any]) -> Figure | None:
    """Left, each layer's weights from a token's largest to its smallest; right, the loss in each mode minus in groups.

    Means over seeds, the weights from the held-out sequences of one batch. None where no arm has both.
    """
    shown = deployed_arms(results, summary)
    if not shown:
        return None
    colours = arm_colours(results["arms"])
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for axes in (left, right):
        style(axes)
    for place, (name, curves) in enumerate(shown.items()):
        colour, label = colours[name][0], plain(summary["arms"][name]["label"])
        for number, (_, weights) in enumerate(sorted(curves.items())):
            fade = 0.35 + 0.65 * (number + 1) / len(curves)
            ranks = range(1, len(weights) + 1)
            left.plot(
                ranks, weights, color=colour, alpha=fade, marker="o", markersize=3, label=None if number else label
            )
        found = gaps(summary["arms"][name]["modes"])
        at = [index + (place - (len(shown) - 1) / 2) * 0.8 / len(shown) for index in range(len(MODES) - 1)]
        heights = [found.get(mode, float("nan")) for mode in list(MODES)[1:]]
        right.bar(at, heights, width=0.8 / len(shown), color=colour)
    left.set_yscale("log")
    left.set_xlabel("mixtures of a token, from its largest weight", color=SOFT, fontsize=9)
    left.set_title("Mean weight alone, by layer (later layers darker)", loc="left", fontsize=10, color=INK)
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    right.axhline(0, color=SOFT, linewidth=1)
    right.set_xticks(range(len(MODES) - 1), list(MODES.values())[1:])
    unit = yardstick(results).loss.unit
    right.set_title(f"Held-out loss minus that in groups ({unit})", loc="left", fontsize=10, color=INK)
    return figure
