"""What the report shows of chat models: scores on held-out answers beside the base's own, and some answers."""

import math
from dataclasses import dataclass

from mixtura.report.sections import ShownSample, details_of
from mixtura.report.tables import Cell, Row
from mixtura.report.wording import further_measure, number, signed, yardstick_of
from mixtura.results import Results
from mixtura.results.run import ChatDetails, Interval

BEFORE = "before training"
"""What the untrained base is called among the arms."""


@dataclass(frozen=True)
class ChatSection:
    """Scores with intervals, and some answers."""

    note: str
    rows: list[Row]
    """For each measure a cell for the base and one for each arm, whose note has the gain."""
    samples: list[ShownSample]


def chat_section(results: Results) -> ChatSection | None:
    """What the report shows of answers; None without any."""
    details = details_of(results, ChatDetails)
    if not details:
        return None
    first = next(iter(details.values()))[0]
    return ChatSection(
        note=f"Loss on the answers of {first.chats:,} held-out chats, and greedy answers to the last question of "
        f"{first.answered:,} of them, compared by their words. In brackets: 95 % intervals by bootstrap over the "
        "chats; below a score its gain over the base on the same chats, with more seeds the means of all these.",
        rows=[_row(results, details, key) for key in first.scores],
        samples=_samples(details),
    )


def _row(results: Results, details: dict[str, list[ChatDetails]], key: str) -> Row:
    measure = further_measure(key, yardstick_of(results))
    everyone = [run.scores[key].base for runs in details.values() for run in runs]
    cells = [Cell(_words(_mean(everyone), measure.digits))]
    for name in results.arms:
        runs = [run.scores[key] for run in details.get(name, [])]
        if not runs:
            cells.append(Cell("-"))
            continue
        gain = _mean([run.gain for run in runs])
        note = f"{signed(gain.value, measure.digits)}, from {signed(gain.low, measure.digits)} to "
        note += signed(gain.high, measure.digits)
        cells.append(Cell(_words(_mean([run.own for run in runs]), measure.digits), note))
    unit = f" ({measure.unit})" if measure.unit else ""
    return Row(f"{measure.name}{unit}", cells)


def _mean(found: list[Interval]) -> Interval:
    values = ([of.value for of in found], [of.low for of in found], [of.high for of in found])
    value, low, high = (math.fsum(of) / len(of) for of in values)
    return Interval(value=value, low=low, high=high)


def _words(of: Interval, digits: int) -> str:
    return f"{number(of.value, digits)} ({number(of.low, digits)} to {number(of.high, digits)})"


def _samples(details: dict[str, list[ChatDetails]]) -> list[ShownSample]:
    """The same questions through the base and each arm's first run."""
    shown: dict[str, ShownSample] = {}
    for name, runs in details.items():
        for sample in runs[0].samples:
            fresh = ShownSample("", sample.prompt, sample.reference, [(BEFORE, sample.base)])
            shown.setdefault(sample.prompt, fresh).outputs.append((name, sample.output))
    return list(shown.values())
