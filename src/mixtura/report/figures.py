"""The interactive figures, as plotly's JSON: dictionaries of traces and a layout, without colours of their own.

A trace names its arm in `meta.arm`; the page gives it that arm's colour in the theme that is on, so one set of figures
serves light and dark. `meta.scale` says what a step is in tokens, FLOPs and seconds: the page switches between them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mixtura.report.wording import (
    NBSP,
    difference_unit,
    rate,
    seconds_per_step,
    signed,
    signed_margin,
    titled_unit,
    yardstick_of,
)
from mixtura.results import ArmResult, ArmSummary, Measure, Results, Summary
from mixtura.results.conclusions import Crossing, Difference

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

_SMOOTHING = 0.06
"""Share of the training-loss points averaged into one."""


def arms_in(figure: Figure) -> list[int]:
    """The places of the arms that a figure shows, for its legend."""
    return sorted({trace["meta"]["arm"] for trace in figure["data"]})


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
    """Each arm's measure minus the baseline's: the mean with its interval, and every seed where there are several."""
    measure = yardstick_of(results).measure
    names = list(summary.arms)
    found = {name: arm.difference.deployed for name, arm in reversed(summary.arms.items())}
    shown = {name: difference for name, difference in found.items() if difference is not None}
    if not shown:
        return None
    traces, extent = [], [0.0]
    for row, (name, difference) in enumerate(shown.items()):
        traces += _difference_traces(summary.arms[name].label, difference, names.index(name), row)
        extent += [*difference.values, difference.low or 0.0, difference.high or 0.0]
    reach = 1.12 * max(abs(value) for value in extent) or 0.01
    sides = ("better", "worse") if measure.better == "lower" else ("worse", "better")
    ends = f"\N{LEFTWARDS ARROW}{NBSP}{sides[0]}", f"{sides[1]}{NBSP}\N{RIGHTWARDS ARROW}"
    ticks = _even_ticks(reach)
    layout = {
        "height": 96 + 52 * len(shown),
        "xaxis": {
            "title": {"text": titled_unit("Difference", difference_unit(measure))},
            "range": [-reach, reach],
            "zeroline": True,
            "tickvals": ticks,
            "ticktext": [signed(value, _decimals(ticks[-1])) if value else "0" for value in ticks],
        },
        "yaxis": {
            "tickvals": list(range(len(shown))),
            "ticktext": [_difference_label(summary.arms[name].label, of, measure) for name, of in shown.items()],
            "range": [-0.6, len(shown) - 0.35],
            "showgrid": False,
        },
        "annotations": [_note(0.0, "left", ends[0]), _note(1.0, "right", ends[1])],
        "margin": {"t": 28},
    }
    return {"data": traces, "layout": layout}


def _difference_label(label: str, difference: Difference, measure: Measure) -> str:
    """An arm's name, and below it the difference that its row shows, as the card has it."""
    return f"{safe_text(label)}<br><b>{signed_margin(difference, least=measure.digits)}</b>"


def _even_ticks(reach: float) -> list[float]:
    """Zero and a round value on either side: more would not fit on a phone."""
    rough = reach / 1.15
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(power * digit for digit in (1, 2, 3, 4, 5, 6, 8) if power * digit <= rough)
    return [-round(step, 12), 0.0, round(step, 12)]


def _decimals(value: float) -> int:
    """As many as a round value needs."""
    return max(0, -math.floor(math.log10(value)))


def _difference_traces(label: str, difference: Difference, index: int, row: int) -> list[Figure]:
    name = safe_text(label)
    half = 0.0 if difference.high is None else difference.high - difference.mean
    seeds = make_trace(
        [(value, row - 0.26) for value in difference.values],
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
        hovertemplate=f"{name}{', mean' if difference.n > 1 else ''}: %{{x:+.4f}}<extra></extra>",
    )
    # The mean of one seed is that seed: it is drawn once.
    return [seeds, mean] if difference.n > 1 else [mean]


def _loss_title(results: Results, words: str) -> dict[str, str]:
    return {"text": titled_unit(words, yardstick_of(results).loss.unit)}


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
            drawn = seeds_and_mean(lines, label, index, "%{y:.4f}", dash="solid" if deployed else "dot")
            drawn += _final_ring(arm, summary.arms[name], mode, label, index) if drawn else []
            for trace in drawn:
                trace["meta"]["scale"] = _scale(arm, results.arms[results.baseline])
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


def final_loss(arm: ArmSummary, mode: str | None) -> float | None:
    """The mean final held-out loss in one mode; None where a run has none."""
    score = arm.modes.get(mode or "", {}).get("loss")
    return None if score is None or None in score.values else score.mean


def _final_ring(arm: ArmResult, summary: ArmSummary, mode: str, label: str, index: int) -> list[Figure]:
    """A ring at the end of a curve, at the value that the table has."""
    loss = final_loss(summary, mode)
    return [] if loss is None else [make_ring(arm.runs[0].steps, loss, label, index, "%{y:.4f}")]


def make_ring(step: float, value: float, label: str, index: int, hover: str) -> Figure:
    """The trace of a final value."""
    marker = {"size": 13, "symbol": "circle-open", "line": {"width": 2}}
    text = f"{hover}<extra>{safe_text(label)}, final</extra>"
    return make_trace([(step, value)], label, index, "final", mode="markers", marker=marker, hovertemplate=text)


def _scale(arm: ArmResult, baseline: ArmResult) -> dict[str, float]:
    """What one step is on each horizontal axis; seconds are those measured side by side."""
    last = next(run.curve[-1] for run in arm.runs if run.curve)
    pace = seconds_per_step(arm, baseline) or last.seconds / last.step
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
    """Vertical range that shows where the arms differ: from the lowest loss to the highest after a quarter of a run."""
    means = [trace for trace in traces if trace["meta"]["role"] in ("mean", "final")]
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


def final_gap(results: Results, summary: Summary, name: str) -> float | None:
    """The final held-out loss of an arm minus the baseline's, both as deployed."""
    own, base = (final_loss(arm, arm.deployed_mode) for arm in (summary.arms[name], summary.arms[results.baseline]))
    return None if own is None or base is None else own - base


def gap_figure(results: Results, summary: Summary) -> Figure | None:
    """The gap to the baseline over training, with the fitted line where it is closing."""
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        found, label = summary.arms[name].crossing, summary.arms[name].label
        if found:
            traces += seeds_and_mean(gap_lines(arm, results.arms[results.baseline]), label, index, "%{y:+.4f}")
            gap = final_gap(results, summary, name)
            traces += [] if gap is None else [make_ring(arm.runs[0].steps, gap, label, index, "%{y:+.4f}")]
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
        "yaxis": {"title": _loss_title(results, f"Loss minus {base}'s"), "zeroline": True, "tickformat": "+.2f"},
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
