"""What the arms of a pretraining comparison write: the same beginnings of held-out texts, continued by each arm."""

from dataclasses import dataclass

from mixtura.results import Results
from mixtura.results.run import PretrainingDetails


@dataclass(frozen=True)
class ShownContinuation:
    """The beginning of a held-out text, how the text goes on, and how each arm goes on: (arm, text)."""

    prompt: str
    reference: str
    outputs: list[tuple[str, str]]


def continuations_section(results: Results) -> list[ShownContinuation]:
    """The continuations of each arm's first run; empty where none were stored."""
    shown: dict[str, ShownContinuation] = {}
    for name, arm in results.arms.items():
        details = arm.runs[0].details if arm.runs else None
        for sample in details.continuations if isinstance(details, PretrainingDetails) else ():
            place = shown.setdefault(sample.prompt, ShownContinuation(sample.prompt, sample.reference, []))
            place.outputs.append((name, sample.output))
    return list(shown.values())
