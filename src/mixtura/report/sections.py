"""What a page says of one task alone, from the runs' `details`: language pairs, classes, what experts specialise in.

Plain values for the template and the Markdown; texts of the data are left as they are and escaped where they are shown.
A run without the details has no part in it, and without any there is no section.
"""

import math
from collections.abc import Iterable
from typing import Any

from mixtura.report.figures import SYMBOLS, Figure, make_trace, safe_text, seeds_and_mean
from mixtura.report.measures import FURTHER
from mixtura.report.tables import Cell
from mixtura.report.wording import NONE, number, percent, signed

SIGNIFICANT = 0.05
"""A p-value below this is marked."""
_PAIR_MEASURES = ("chrf", "chrf_pp", "bleu")
_SAMPLES, _SAMPLES_A_PAIR = 8, 2
_MOST_CLASSES = 20
"""A confusion matrix of more classes cannot be read."""

Details = dict[str, list[dict[str, Any]]]
"""For each arm the details of its runs that have any."""


def runs_details(results: dict[str, Any], key: str) -> Details:
    """The details of all runs that have `key` in them, by arm; arms without any are left out."""
    found = {
        name: [run["details"] for run in arm["runs"] if (run.get("details") or {}).get(key)]
        for name, arm in results["arms"].items()
    }
    return {name: details for name, details in found.items() if details}


def translation_section(results: dict[str, Any]) -> dict[str, Any] | None:
    """Scores by language pair beside copying the source, how they were computed, and a few translations.

    Returns:
        `tables`, each {"title", "rows": [{"label", "cells"}]} with a cell for the copied source and one for each arm;
        `signatures`, (measure, signature) pairs; `bootstrap`, whether a mark tells of one; `samples`, each {"pair",
        "source", "reference", "outputs": [(arm, text)]}. None without language pairs.
    """
    details = runs_details(results, "pairs")
    if not details:
        return None
    pairs = list(dict.fromkeys(pair for of in details.values() for run in of for pair in run["pairs"]))
    bootstrap = (results.get("across_arms") or {}).get("paired_bootstrap") or {}
    first = next(iter(details.values()))[0]
    return {
        "tables": [
            {"title": FURTHER[key].name, "rows": [_pair_row(results, details, bootstrap, pair, key) for pair in pairs]}
            for key in _PAIR_MEASURES
            if any(key in run["pairs"].get(pair, {}) for of in details.values() for run in of for pair in pairs)
        ],
        "signatures": [(_name(key), text) for key, text in (first.get("signatures") or {}).items()],
        "bootstrap": bool(bootstrap),
        "samples": _samples(details),
    }


def _name(key: str) -> str:
    known, _, language = key.partition(" ")
    return f"{FURTHER[known].name} {language}".strip() if known in FURTHER else key


def _pair_row(
    results: dict[str, Any], details: Details, bootstrap: dict[str, Any], pair: str, key: str
) -> dict[str, Any]:
    everyone = [run for of in details.values() for run in of]
    copied = _mean(run["pairs"].get(pair, {}).get(f"copy_{key}") for run in everyone)
    cells = [_number_cell(copied, key)]
    for name in results["arms"]:
        runs = [run["pairs"].get(pair, {}) for run in details.get(name, [])]
        cell = _number_cell(_mean(run.get(key) for run in runs), key)
        notes = []
        beam = _mean(run.get(f"beam_{key}") for run in runs)
        if beam is not None:
            notes.append(f"beam {number(beam, FURTHER[key].digits)}")
        test = (bootstrap.get(name) or {}).get(pair) if key == "chrf" else None
        if test:
            notes.append(f"{signed(test['chrf_difference'], FURTHER[key].digits)}, {_p_value(test['p_value'])}")
            cell["text"] += "*" if test["p_value"] < SIGNIFICANT else ""
        cells.append({**cell, "note": "; ".join(notes)})
    return {"label": pair, "cells": cells}


def _number_cell(value: float | None, key: str) -> Cell:
    return {"text": number(value, FURTHER[key].digits), "note": ""}


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _samples(details: Details) -> list[dict[str, Any]]:
    """The same sentences through each arm's first run, a few of each language pair."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for name, runs in details.items():
        for sample in runs[0].get("samples") or []:
            place = (sample["pair"], sample["source"])
            of_pair = sum(pair == sample["pair"] for pair, _ in chosen)
            if place not in chosen and (len(chosen) >= _SAMPLES or of_pair >= _SAMPLES_A_PAIR):
                continue
            entry = chosen.setdefault(place, {**{k: sample[k] for k in ("pair", "source", "reference")}, "outputs": []})
            entry["outputs"].append((name, sample["output"]))
    return list(chosen.values())


def classification_section(results: dict[str, Any]) -> dict[str, Any] | None:
    """Which classes are taken for which, and the paired bootstrap over examples where there is one.

    Returns:
        `confusions`, each {"arm", "labels", "rows": [{"label", "cells": [{"text", "note", "share"}]}]}, counts summed
        over seeds; `tests`, (arm, words) pairs. None without confusions.
    """
    details = runs_details(results, "confusion")
    if not details:
        return None
    confusions = [_confusion(name, runs) for name, runs in details.items()]
    bootstrap = (results.get("across_arms") or {}).get("paired_bootstrap") or {}
    return {
        "confusions": [found for found in confusions if len(found["labels"]) <= _MOST_CLASSES],
        "classes": max(len(found["labels"]) for found in confusions),
        "tests": [(name, _test_words(test)) for name, test in bootstrap.items() if "accuracy_difference" in test],
    }


def _confusion(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [str(label) for label in runs[0].get("labels") or range(len(runs[0]["confusion"]))]
    rows = []
    for index, label in enumerate(labels):
        counts = [sum(run["confusion"][index][answer] for run in runs) for answer in range(len(labels))]
        total = sum(counts)
        shares = [amount / total if total else None for amount in counts]
        cells = [
            {"text": percent(share), "note": f"{amount:,}", "share": round(share or 0.0, 3)}
            for share, amount in zip(shares, counts, strict=True)
        ]
        rows.append({"label": label, "cells": cells})
    return {"arm": name, "labels": labels, "rows": rows}


def _test_words(test: dict[str, Any]) -> str:
    spread = ""
    if test.get("low") is not None:
        spread = f" (95 % interval {number(test['low'], 2)} to {number(test['high'], 2)})"
    return f"{signed(test['accuracy_difference'], 2)} points{spread}, {_p_value(test['p_value'])}"


def specialization_maps(results: dict[str, Any], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """A heat map for each arm and routed layer: a group's share that an expert takes, 1 being an even share.

    Experts have no identity across seeds, so a map shows one seed and carries all of them.

    Returns:
        Each {"arm", "label", "layer", "groups", "experts", "seeds": {seed: (experts, groups)}, "bits", "max_bits"}.
    """
    maps = []
    for name, arm in results["arms"].items():
        found = {
            str(run["seed"]): run["details"]["specialization"]
            for run in arm["runs"]
            if (run.get("details") or {}).get("specialization")
        }
        first = next(iter(found.values()), {"groups": [], "layers": []})
        for place, layer in enumerate(first["layers"]):
            layers = {seed: of["layers"][place] for seed, of in found.items()}
            maps.append(
                {
                    "arm": name,
                    "label": summary["arms"][name]["label"],
                    "layer": layer["layer"],
                    "groups": [safe_text(str(group)) for group in first["groups"]],
                    "experts": len(layer["share"]),
                    "seeds": {seed: _relative(of["share"]) for seed, of in layers.items()},
                    "bits": _mean(of["mutual_information"] for of in layers.values()),
                    "max_bits": layer["max_bits"],
                }
            )
    return maps


def _relative(share: list[list[float]]) -> list[list[float]]:
    return [[round(value * len(share), 4) for value in row] for row in share]


def task_figures(results: dict[str, Any], summary: dict[str, Any]) -> dict[str, Figure]:
    """The interactive figures of one task alone, by name; those without data are left out."""
    figures = {
        "layer_weights": layer_weights_figure(results, summary),
        "calibration": calibration_figure(results, summary),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def layer_weights_figure(results: dict[str, Any], summary: dict[str, Any]) -> Figure | None:
    """How much of each layer a learned mix of layers takes: a bold mean and a thin line a seed."""
    traces = []
    for index, (name, arm) in enumerate(results["arms"].items()):
        lines = {
            run["seed"]: [(float(layer), weight) for layer, weight in enumerate(run["details"]["layer_weights"])]
            for run in arm["runs"]
            if (run.get("details") or {}).get("layer_weights")
        }
        traces += seeds_and_mean(lines, summary["arms"][name]["label"], index, "%{y:.3f}")
    if not traces:
        return None
    layout = {
        "height": 340,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "Layer; 0 is the embeddings"}, "dtick": 1},
        "yaxis": {"title": {"text": "Weight"}, "rangemode": "tozero"},
    }
    return {"data": traces, "layout": layout}


def calibration_figure(results: dict[str, Any], summary: dict[str, Any]) -> Figure | None:
    """How often answers of a given confidence are right, all seeds' answers together; on the diagonal is honest."""
    traces, lowest = [], 1.0
    for index, name in enumerate(results["arms"]):
        bins = _pooled_bins(runs_details(results, "calibration").get(name, []))
        if bins:
            lowest = min(lowest, *(part[key] for part in bins for key in ("confidence", "accuracy")))
            label = summary["arms"][name]["label"]
            points = [(part["confidence"], part["accuracy"]) for part in bins]
            hover = f"{safe_text(label)}: %{{x:.0%}} sure, %{{y:.0%}} right, %{{customdata:,}} answers<extra></extra>"
            marker = {"size": 7, "symbol": SYMBOLS[index % len(SYMBOLS)]}
            style = {"mode": "lines+markers", "line": {"width": 2}, "marker": marker, "hovertemplate": hover}
            traces.append(make_trace(points, label, index, "mean", customdata=[p["count"] for p in bins], **style))
    if not traces:
        return None
    start = math.floor(10 * lowest) / 10
    layout = {
        "height": 380,
        "xaxis": {"title": {"text": "Confidence of the answer"}, "range": [start, 1.01], "tickformat": ".0%"},
        "yaxis": {"title": {"text": "Right answers"}, "range": [start, 1.03], "tickformat": ".0%"},
        "shapes": [
            {"type": "line", "x0": start, "y0": start, "x1": 1, "y1": 1, "layer": "below", "line": {"dash": "dot"}}
        ],
    }
    return {"data": traces, "layout": layout}


def _pooled_bins(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bins of several runs as if they were one; empty ones are left out."""
    pooled = []
    for parts in zip(*(run["calibration"] for run in runs), strict=True):
        filled = [part for part in parts if part["count"]]
        count = sum(part["count"] for part in filled)
        if count:
            means = {
                key: math.fsum(part["count"] * part[key] for part in filled) / count
                for key in ("confidence", "accuracy")
            }
            pooled.append({**means, "count": count})
    return pooled


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def weight_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean weight of each layer over seeds, for arms that mix layers: their names, and a row of cells a layer."""
    details = runs_details(results, "layer_weights")
    depth = max((len(run["layer_weights"]) for runs in details.values() for run in runs), default=0)
    rows = []
    for layer in range(depth):
        means = [
            _mean(run["layer_weights"][layer] if layer < len(run["layer_weights"]) else None for run in runs)
            for runs in details.values()
        ]
        rows.append([NONE if mean is None else number(mean, 3) for mean in means])
    return list(details), rows
