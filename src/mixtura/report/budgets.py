"""Classifiers on few training texts: a table and a figure, with references that are no arms beside them."""

from statistics import fmean

from mixtura.report.figures import Figure, seeds_and_mean
from mixtura.report.tables import Cell, Row
from mixtura.report.wording import number
from mixtura.results import Results, Summary
from mixtura.results.document import BudgetScore
from mixtura.results.run import ClassificationDetails


def budget_rows(results: Results, summary: Summary) -> list[Row]:
    """The verdict's measure, mean over seeds: a row for every arm and reference, a cell for every number of texts.

    The last cell is for all texts, which references do not have. A class with fewer texts than a column names gives
    what it has.
    """
    across = results.across_arms
    sides = {summary.arms[name].label: across.budgets.get(name, []) for name in results.arms}
    whole = {arm.label: arm.score.deployed for arm in summary.arms.values()}
    sides |= {f"{name} (reference)": scores for name, scores in across.references.items()}
    budgets = sorted({score.rows for scores in sides.values() for score in scores})
    if not budgets:
        return []
    unit = f", {results.measure.unit}" if results.measure.unit else ""
    name = f"{results.measure.name}{unit}, by texts of each class"
    head = Row(name, [*(Cell(f"{rows:,}") for rows in budgets), Cell("all")])
    return [
        head,
        *(
            Row(label, [*(_mean(scores, rows) for rows in budgets), Cell(number(whole.get(label), 2))])
            for label, scores in sides.items()
        ),
    ]


def _mean(scores: list[BudgetScore], rows: int) -> Cell:
    known = [score.accuracy for score in scores if score.rows == rows]
    return Cell(number(fmean(known) if known else None, 2))


def budgets_figure(results: Results, summary: Summary) -> Figure | None:
    """The verdict's measure over the training texts of each class, where some runs had few; the last points had all."""
    budgets = results.across_arms.budgets
    of_train = results.data.facts.get("examples_train")
    if not budgets or not isinstance(of_train, int):
        return None
    traces = []
    for index, (name, arm) in enumerate(results.arms.items()):
        lines = _lines(budgets.get(name, []))
        for run in arm.runs:
            score = run.final.get(arm.deployed_mode or "", {}).get(results.measure.key)
            if score is not None and run.seed in lines and isinstance(run.details, ClassificationDetails):
                lines[run.seed].append((of_train / len(run.details.labels), score))
        traces += seeds_and_mean(lines, summary.arms[name].label, index, "%{y:.2f} %")
    layout = {
        "height": 340,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "Training texts of each class; the last point has all"}, "type": "log"},
        "yaxis": {"title": {"text": f"{results.measure.name[0].upper()}{results.measure.name[1:]}, %"}},
    }
    return {"data": traces, "layout": layout}


def _lines(scores: list[BudgetScore]) -> dict[int, list[tuple[float, float]]]:
    """Points (texts of each class, score) of every seed."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for score in scores:
        lines.setdefault(score.seed, []).append((float(score.rows), score.accuracy))
    return lines
