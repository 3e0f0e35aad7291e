"""The interactive figures, as plotly's JSON: dictionaries of traces and a layout, without colours of their own.

A trace names its arm in `meta.arm`; the page gives it that arm's colour in the theme that is on, so one set of figures
serves light and dark. `meta.scale` says what a step is in tokens, FLOPs and seconds: the page switches between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtura.report.measures import difference_unit, titled_unit, yardstick
from mixtura.report.wording import NBSP, capital, rate
from mixtura.results import ArmResult, Results, Summary
from mixtura.results.conclusions import Crossing, Difference
from mixtura.results.run import LoadHistory

Figure = dict[str, Any]
"""A figure, a trace or a part of one, as plotly takes it."""
Points = Sequence[tuple[float, float]]

AXES = {
    "steps": "Training steps",
    "tokens": "Training tokens",
    "flops": "Training FLOPs",
    "seconds": "Training seconds, at the side-by-side time a step",
}
"""Horizontal axes of the held-out curves and their titles."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon")
"""Markers of the arms in their order: a second key beside the colour."""

_EVEN = 1e-3
_SMOOTHING = 0.06
"""Share of the training-loss points averaged into one."""


def build_figures(results: Results, summary: Summary) -> dict[str, Figure]:
    """Every interactive figure of the report by name; those without data are left out."""
    figures = {
        "differences": difference_figure(results, summary),
        "curves": curve_figure(results, summary),
        "gap": gap_figure(results, summary),
        "training": training_figure(results, summary),
        "search": search_figure(results, summary),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def difference_figure(results: Results, summary: Summary) -> Figure | None:
    """Each arm's measure minus the baseline's: the mean with its interval, and every seed."""
    measure = yardstick(results).measure
    names = list(summary.arms)
    found = {name: arm.difference.deployed for name, arm in reversed(summary.arms.items())}
    shown = {name: difference for name, difference in found.items() if difference is not None}
    if not shown:
        return None
    traces, extent = [], [0.0]
    for row, (name, difference) in enumerate(shown.items()):
        traces += _difference_traces(summary.arms[name].label, difference, names.index(name), row)
        extent += [*difference.values, difference.low or 0.0, difference.high or 0.0]
    base = safe_text(next(arm.label for arm in summary.arms.values() if arm.baseline))
    reach = 1.12 * max(abs(value) for value in extent) or 0.01
    title, unit = f"{capital(measure.name)} minus {base}'s", difference_unit(measure)
    sides = ("better", "worse") if measure.better == "lower" else ("worse", "better")
    ends = f"\N{LEFTWARDS ARROW}{NBSP}{sides[0]}", f"{sides[1]}{NBSP}\N{RIGHTWARDS ARROW}"
    layout = {
        "height": 92 + 74 * len(shown),
        "xaxis": {
            "title": {"text": titled_unit(f"{title}, as deployed", unit)},
            "range": [-reach, reach],
            "zeroline": True,
        },
        "yaxis": {
            "tickvals": list(range(len(shown))),
            "ticktext": [safe_text(summary.arms[name].label) for name in shown],
            "range": [-0.6, len(shown) - 0.35],
            "showgrid": False,
        },
        "annotations": [_note(0.0, "left", ends[0]), _note(1.0, "right", ends[1])],
        "margin": {"t": 34},
        "meta": {"narrow_title": titled_unit(f"{title},<br>as deployed", unit)},
    }
    return {"data": traces, "layout": layout}


def _difference_traces(label: str, difference: Difference, index: int, row: int) -> list[Figure]:
    name = safe_text(label)
    half = 0.0 if difference.high is None else difference.high - difference.mean
    seeds = make_trace(
        [(value, row - 0.24) for value in difference.values],
        label,
        index,
        "seed",
        mode="markers",
        customdata=difference.seeds,
        marker={"size": 7, "symbol": "circle-open", "line": {"width": 1.5}},
        hovertemplate=f"{name}, seed %{{customdata}}: %{{x:+.4f}}<extra></extra>",
    )
    mean = make_trace(
        [(difference.mean, row)],
        label,
        index,
        "mean",
        mode="markers",
        marker={"size": 12, "symbol": SYMBOLS[index % len(SYMBOLS)]},
        error_x={"type": "data", "array": [half], "thickness": 2.5, "width": 7, "visible": half > 0},
        hovertemplate=f"{name}, mean: %{{x:+.4f}}<extra></extra>",
    )
    return [seeds, mean]


def _loss_title(results: Results, words: str) -> dict[str, str]:
    return {"text": titled_unit(words, yardstick(results).loss.unit)}


def _note(x: float, anchor: str, text: str) -> Figure:
    place = {"x": x, "y": 1, "xref": "paper", "yref": "paper", "xanchor": anchor, "yanchor": "bottom"}
    return {**place, "text": text, "showarrow": False}


def curve_figure(results: Results, summary: Summary) -> Figure | None:
    """Held-out loss over training: a bold mean and a thin line a seed, solid as deployed and dotted as trained."""
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        modes = {arm.deployed_mode: "as deployed", arm.training_mode: "as trained"}
        modes.pop(None, None)
        for mode in dict.fromkeys((arm.deployed_mode or arm.training_mode, arm.training_mode)):
            lines = held_out_lines(arm, mode)
            deployed = mode == (arm.deployed_mode or mode)
            label = summary.arms[name].label
            if len(modes) > 1:
                label += ", as deployed" if deployed else ", as trained"
            for trace in seeds_and_mean(lines, label, index, "%{y:.4f}", dash="solid" if deployed else "dot"):
                trace["meta"]["scale"] = _scale(arm)
                traces.append(trace)
    if not traces:
        return None
    late = _late_range(traces)
    layout = {
        "height": 460,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": AXES["steps"]}},
        "yaxis": {
            "title": _loss_title(results, "Held-out loss"),
            "range": late,
            "tickformat": ".2f",
        },
        "meta": {"axes": AXES, "late_range": late},
    }
    return {"data": traces, "layout": layout}


def held_out_lines(arm: ArmResult, mode: str) -> dict[int, list[tuple[float, float]]]:
    """The held-out curve of each seed in one inference mode, as (step, loss)."""
    lines: dict[int, list[tuple[float, float]]] = {
        run.seed: [(point.step, loss) for point in run.curve if (loss := point.loss.get(mode)) is not None]
        for run in arm.runs
    }
    return {seed: points for seed, points in lines.items() if points}


def mean_line(lines: Mapping[int, Points]) -> list[tuple[float, float]]:
    """The mean over seeds at the steps that every seed has."""
    tables = [dict(points) for points in lines.values()]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(step, math.fsum(table[step] for table in tables) / len(tables)) for step in steps]


def _scale(arm: ArmResult) -> dict[str, float]:
    """What one step is on each horizontal axis; seconds are those measured side by side."""
    last = next(run.curve[-1] for run in arm.runs if run.curve)
    pace = arm.seconds_per_step or last.seconds / last.step
    return {"steps": 1, "tokens": last.tokens / last.step, "flops": (last.flops or 0.0) / last.step, "seconds": pace}


def seeds_and_mean(
    lines: Mapping[int, Points], label: str, index: int, hover: str, *, dash: str = "solid", markers: bool = True
) -> list[Figure]:
    """A thin line for each seed (none for a single one) and a bold one for their mean."""
    mean = mean_line(lines)
    if not mean:
        return []
    thin = {"mode": "lines", "line": {"dash": dash, "width": 1}, "opacity": 0.45, "hoverinfo": "skip"}
    traces = [make_trace(points, label, index, "seed", **thin) for points in lines.values() if len(lines) > 1]
    bold = {
        "mode": "lines+markers" if markers else "lines",
        "line": {"dash": dash, "width": 2.5},
        "marker": {"size": 6, "symbol": SYMBOLS[index % len(SYMBOLS)] + ("" if dash == "solid" else "-open")},
        "hovertemplate": f"{hover}<extra>{safe_text(label)}</extra>",
    }
    return [*traces, make_trace(mean, label, index, "mean", **bold)]


def _late_range(traces: Sequence[Figure]) -> list[float]:
    """Vertical range that shows where the arms part: from the lowest loss to the highest after a quarter of the run."""
    means = [trace for trace in traces if trace["meta"]["role"] == "mean"]
    end = max(trace["x"][-1] for trace in means)
    late = [y for trace in means for x, y in zip(trace["x"], trace["y"], strict=True) if x >= end / 4]
    pad = 0.06 * (max(late) - min(late)) or 0.05
    return [min(late) - pad, max(late) + pad]


def gap_lines(arm: ArmResult, base: ArmResult) -> dict[int, list[tuple[float, float]]]:
    """Loss minus the baseline's at the same step, by seed, both as deployed."""
    if arm.deployed_mode is None or base.deployed_mode is None:
        return {}
    own = held_out_lines(arm, arm.deployed_mode)
    others = {seed: dict(points) for seed, points in held_out_lines(base, base.deployed_mode).items()}
    gaps = {
        seed: [(step, loss - others[seed][step]) for step, loss in points if step in others[seed]]
        for seed, points in own.items()
        if seed in others
    }
    return {seed: points for seed, points in gaps.items() if points}


def gap_figure(results: Results, summary: Summary) -> Figure | None:
    """The gap to the baseline over training, with the fitted line where it is closing."""
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        found, label = summary.arms[name].crossing, summary.arms[name].label
        if found:
            traces += seeds_and_mean(gap_lines(arm, results.arms[results.baseline]), label, index, "%{y:+.4f}")
            traces += _extrapolation(found, label, index)
    if not traces:
        return None
    base = safe_text(summary.arms[results.baseline].label)
    first, farthest = min(trace["x"][0] for trace in traces), max(trace["x"][-1] for trace in traces)
    doublings = [first * 2**power for power in range(1 + max(1, math.ceil(math.log2(farthest / first))))]
    layout = {
        "height": 380,
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": "Training steps, doubling"},
            "type": "log",
            "tickvals": doublings,
            "range": [math.log10(first / 1.12), math.log10(farthest * 1.2)],
        },
        "yaxis": {"title": _loss_title(results, f"Loss minus {base}'s"), "zeroline": True},
    }
    return {"data": traces, "layout": layout}


def _extrapolation(found: Crossing, label: str, index: int) -> list[Figure]:
    """The fitted line, from the first step it was fitted on to where it meets zero."""
    fit, end = found.fit, found.step
    if fit is None or end is None:
        return []
    points = [(step, fit.intercept + fit.slope * math.log(step)) for step in (fit.first_step, end)]
    hover = f"{safe_text(label)}: zero at step {end:,.0f}<extra></extra>"
    style = {"mode": "lines+markers", "line": {"width": 1.5, "dash": "dash"}, "hovertemplate": hover}
    return [
        make_trace(
            points, label, index, "fit", **style, marker={"size": [0, 10], "symbol": "x-thin", "line": {"width": 2}}
        )
    ]


def training_figure(results: Results, summary: Summary) -> Figure | None:
    """Training loss, smoothed: what the optimizer sees, with spikes where there are any."""
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        lines = {
            run.seed: smooth([(point.step, point.loss) for point in run.train_curve if point.loss is not None])
            for run in arm.runs
        }
        lines = {seed: points for seed, points in lines.items() if points}
        traces += seeds_and_mean(lines, summary.arms[name].label, index, "%{y:.3f}", markers=False)
    if not traces:
        return None
    late = [y for trace in traces for y in trace["y"][len(trace["y"]) // 8 :]]
    layout = {
        "height": 360,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": AXES["steps"]}},
        "yaxis": {
            "title": _loss_title(results, "Training loss"),
            "range": [min(late) - 0.03, max(late) + 0.03],
            "tickformat": ".2f",
        },
    }
    return {"data": traces, "layout": layout}


def smooth(points: Points) -> list[tuple[float, float]]:
    """A centred moving average over 6 % of the points; narrower at the steep start, one-sided at the flat end."""
    wide, smoothed = round(_SMOOTHING * len(points) / 2), []
    for i, (step, _) in enumerate(points):
        window = [y for _, y in points[i - min(wide, i) : i + min(wide, i) + 1]]
        smoothed.append((step, math.fsum(window) / len(window)))
    return smoothed


def search_figure(results: Results, summary: Summary) -> Figure | None:
    """The learning-rate search: held-out loss of each trial, the chosen rate filled."""
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        search, label = arm.learning_rate_search, summary.arms[name].label
        finite = [(t.learning_rate, t.loss) for t in search.trials if t.loss is not None] if search else []
        # Of the scales that a rate was tried with, the best.
        trials = sorted(dict(sorted(finite, reverse=True)).items())
        if search and trials:
            symbol = SYMBOLS[index % len(SYMBOLS)]
            marks = [symbol if tried == search.best else f"{symbol}-open" for tried, _ in trials]
            marker = {"size": 10, "symbol": marks, "line": {"width": 1.8}}
            hover = f"{safe_text(label)}, rate %{{x:.3g}}: %{{y:.4f}}<extra></extra>"
            style = {"mode": "lines+markers", "line": {"width": 2}, "marker": marker, "hovertemplate": hover}
            traces.append(make_trace(trials, label, index, "mean", **style))
    if not traces:
        return None
    rates = sorted({tried for trace in traces for tried in trace["x"]})
    layout = {
        "height": 340,
        "xaxis": {
            "title": {"text": "Peak learning rate"},
            "type": "log",
            "tickvals": rates,
            "ticktext": [rate(value) for value in rates],
        },
        "yaxis": {"title": _loss_title(results, "Held-out loss of the trial"), "tickformat": ".2f"},
    }
    return {"data": traces, "layout": layout}


@dataclass(frozen=True)
class LoadMap:
    """The load of one layer's experts over training, 1 being an even share."""

    arm: str
    label: str
    layer: int
    steps: list[int]
    experts: int
    seeds: dict[str, list[list[float]]]
    """For each seed (experts, steps). Experts have no identity across seeds, so a page shows one seed at a time."""


def load_maps(results: Results, summary: Summary) -> list[LoadMap]:
    """A heat map for each arm and mixture layer; arms whose load is even throughout have none (see `is_even`)."""
    maps = []
    for name, arm in results.arms.items():
        loads = {} if is_even(arm) else _loads(arm)
        first = next(iter(loads.values()), None)
        for position, layer in enumerate(first.layers if first else []):
            seeds = {str(seed): _load_matrix(load, position) for seed, load in loads.items()}
            experts = len(next(iter(seeds.values())))
            maps.append(LoadMap(name, summary.arms[name].label, layer, first.steps if first else [], experts, seeds))
    return maps


def is_even(arm: ArmResult) -> bool:
    """Whether every expert had an even share at every evaluation, as Mixture of Tokens forces."""
    shares = [share * len(row) for load in _loads(arm).values() for step in load.share for row in step for share in row]
    return bool(shares) and max(abs(share - 1) for share in shares) < _EVEN


def _loads(arm: ArmResult) -> dict[int, LoadHistory]:
    """By seed, of the runs that have one."""
    return {run.seed: run.load for run in arm.runs if run.load is not None and run.load.steps}


def _load_matrix(load: LoadHistory, position: int) -> list[list[float]]:
    """(experts, steps): share of the load times the number of experts."""
    rows = [[share * len(step[position]) for share in step[position]] for step in load.share]
    return [[round(value, 4) for value in column] for column in zip(*rows, strict=True)]


def make_trace(points: Points, label: str, index: int, role: str, **style: Any) -> Figure:
    """A trace of the arm at place `index`; the page colours it and shows or hides it by its `role`."""
    return {
        "type": "scatter",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "name": safe_text(label),
        "showlegend": False,
        "meta": {"arm": index, "role": role},
        **style,
    }


def safe_text(text: str) -> str:
    """Plotly reads a few HTML tags and %{...} in texts; a label is shown as it is written."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
