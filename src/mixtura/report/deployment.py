"""What mixture of tokens loses without its group, beside how peaked its weights are, as plotly's JSON."""

from mixtura.report.figures import SYMBOLS, Figure, make_trace, safe_text
from mixtura.report.wording import titled_unit, yardstick_of
from mixtura.results import ArmResult, Results, Summary
from mixtura.results.conclusions import MeanScore
from mixtura.results.run import PretrainingDetails

MODES = {"group": "group", "alone": "alone, top k", "alone_all": "alone, all", "population": "population"}
"""The modes of a mixture-of-tokens model and their words."""


def deployment_figures(results: Results, summary: Summary) -> dict[str, Figure]:
    """`peaked` and `gaps`; nothing where no arm was measured in groups and without."""
    arms = deployed_arms(results, summary)
    if not arms:
        return {}
    return {"peaked": _peaked_figure(arms, summary), "gaps": _gap_figure(arms, results, summary)}


def deployed_arms(results: Results, summary: Summary) -> dict[str, dict[int, list[float]]]:
    """Sorted mean weights of every layer, for each arm that has them and a loss in groups; means over seeds."""
    found = {name: peakedness(arm) for name, arm in results.arms.items()}
    return {name: layers for name, layers in found.items() if layers and "group" in summary.arms[name].modes}


def peakedness(arm: ArmResult) -> dict[int, list[float]]:
    """Sorted mean weights of every layer, averaged over seeds; nothing where no run measured them."""
    found: dict[int, list[list[float]]] = {}
    for run in arm.runs:
        for layer in run.details.peakedness if isinstance(run.details, PretrainingDetails) else ():
            found.setdefault(layer.layer, []).append(layer.sorted_weights)
    return {layer: [sum(values) / len(values) for values in zip(*seeds, strict=True)] for layer, seeds in found.items()}


def gaps(modes: dict[str, dict[str, MeanScore]]) -> dict[str, float]:
    """The mean loss of each mode minus that of `group`."""
    means = {mode: of["loss"].mean for mode, of in modes.items()}
    group = means.get("group")
    return {} if group is None else {mode: mean - group for mode, mean in means.items() if mean is not None}


def _peaked_figure(arms: dict[str, dict[int, list[float]]], summary: Summary) -> Figure:
    traces, names = [], list(summary.arms)
    for name, layers in arms.items():
        label, index = summary.arms[name].label, names.index(name)
        for number, (layer, weights) in enumerate(sorted(layers.items())):
            traces.append(
                make_trace(
                    list(enumerate(weights, start=1)),
                    label,
                    index,
                    "mean",
                    mode="lines+markers",
                    opacity=0.35 + 0.65 * (number + 1) / len(layers),
                    marker={"size": 5, "symbol": SYMBOLS[index % len(SYMBOLS)]},
                    hovertemplate=f"{safe_text(label)}, layer {layer}: weight %{{x}} is %{{y:.3f}}<extra></extra>",
                )
            )
    layout = {
        "height": 340,
        "xaxis": {"title": {"text": "a token's mixtures, from its largest weight"}},
        "yaxis": {
            "title": {"text": "mean weight"},
            "type": "log",
            "tickvals": [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
        },
    }
    return {"data": traces, "layout": layout}


def _gap_figure(arms: dict[str, dict[int, list[float]]], results: Results, summary: Summary) -> Figure:
    traces, names = [], list(summary.arms)
    found = {name: gaps(summary.arms[name].modes) for name in arms}
    modes = [mode for mode in MODES if mode != "group" and any(mode in own for own in found.values())]
    for name, own in found.items():
        label, index = summary.arms[name].label, names.index(name)
        points = [(place, own[mode]) for place, mode in enumerate(modes) if mode in own]
        traces.append(
            make_trace(
                points,
                label,
                index,
                "mean",
                mode="markers",
                marker={"size": 11, "symbol": SYMBOLS[index % len(SYMBOLS)]},
                hovertemplate=f"{safe_text(label)}: %{{y:+.4f}}<extra></extra>",
            )
        )
    unit, words = yardstick_of(results).loss.unit, [MODES[mode] for mode in modes]
    layout = {
        "height": 340,
        "xaxis": {"tickvals": list(range(len(words))), "ticktext": words, "range": [-0.5, len(words) - 0.5]},
        "yaxis": {
            "title": {"text": titled_unit("loss minus that in groups", unit)},
            "zeroline": True,
            "rangemode": "tozero",
        },
    }
    return {"data": traces, "layout": layout}
