"""What a comparison is judged by, and how its measures are written: values, differences, and which way is better.

The verdict's measure comes from the task: the held-out loss in pretraining, chrF in translation, accuracy or micro F1
in classification. Curves, speed-ups and crossings are about the held-out loss in every task, since it alone is measured
on the way of a run.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from mixtura.planning.formulas import FLOPS_TOLERANCE
from mixtura.report.wording import NBSP, digits_for, number
from mixtura.results import LOSS, ArmResult, Measure, Results

FURTHER = {
    measure.key: measure
    for measure in (
        Measure("chrf", "chrF", "points", "higher", 2),
        Measure("chrf_pp", "chrF++", "points", "higher", 2),
        Measure("bleu", "BLEU", "points", "higher", 2),
        Measure("comet", "COMET", "points", "higher", 2),
        Measure("accuracy", "accuracy", "%", "higher", 2),
        Measure("exact_match", "exact match", "%", "higher", 2),
        Measure("token_f1", "token F1", "%", "higher", 2),
        Measure("micro_f1", "micro F1", "%", "higher", 2),
        Measure("subset_accuracy", "subset accuracy", "%", "higher", 2),
        Measure("macro_f1", "macro F1", "%", "higher", 2),
        Measure("ece", "expected calibration error", "%", "lower", 2),
        Measure("brier", "Brier score", "", "lower"),
        Measure("bits_per_byte", "bits per byte", "", "lower"),
        Measure("perplexity", "perplexity", "", "lower", 2),
    )
}
"""Names of what a task may measure besides the verdict's number."""

_LOSS_UNITS = {"classification": "nats an example"}


@dataclass(frozen=True)
class Yardstick:
    """What one comparison is judged by."""

    task: str
    """"pretraining", "translation", "classification" or "chat"."""
    measure: Measure
    """The verdict's number."""
    loss: Measure
    """What curves, speed-ups and crossings are about."""
    continued: bool = False
    """Whether the arms start from checkpoints: what is known of training from scratch says nothing of them."""

    @property
    def on_loss(self) -> bool:
        """Whether the verdict's number is the loss that the curves show."""
        return self.measure.key == LOSS.key

    @property
    def causal(self) -> bool:
        """Whether later tokens must not be seen; a classifier reads the whole text before it answers."""
        return self.task != "classification"

    @property
    def short(self) -> str:
        """The measure in running text: "loss", "chrF"."""
        return "loss" if self.on_loss else self.measure.name

    @property
    def from_scratch(self) -> bool:
        """Whether models are pretrained from random weights, of which something is published."""
        return self.task == "pretraining" and not self.continued

    def unmatched(self, flops_ratio: float) -> bool:
        """Whether an arm with this ratio of FLOPs breaks what is to be held equal; only pretraining matches them."""
        return self.task == "pretraining" and abs(flops_ratio - 1) > FLOPS_TOLERANCE

    def behind(self, difference: float) -> bool:
        """Whether an arm with this difference to another is the worse of the two."""
        return difference > 0 if self.measure.better == "lower" else difference < 0


def yardstick_of(results: Results) -> Yardstick:
    """What the results are judged by."""
    task, measure = results.task, results.measure
    loss = dataclasses.replace(LOSS, unit=_LOSS_UNITS.get(task, LOSS.unit))
    return Yardstick(task, measure, measure if measure.key == LOSS.key else loss, results.continued)


def seconds_per_step(arm: ArmResult, baseline: ArmResult) -> float | None:
    """Seconds of a training step of an arm: the baseline's median times the arm's paired ratio; None if unknown.

    The ratio of steps that were measured side by side is steadier than a quotient of medians. Made this way, seconds
    and ratios agree wherever they stand side by side.
    """
    if arm.seconds_ratio is None or baseline.seconds_per_step is None:
        return arm.seconds_per_step
    return baseline.seconds_per_step * arm.seconds_ratio


def further_measure(key: str, yardstick: Yardstick) -> Measure:
    """What is known of a final measure by its key in results.json; an unknown one is called by its key."""
    if key in (yardstick.measure.key, yardstick.loss.key):
        return yardstick.measure if key == yardstick.measure.key else yardstick.loss
    return FURTHER.get(key) or Measure(key, key.replace("_", " "), "", "higher")


def difference_unit(measure: Measure) -> str:
    """The unit of a difference: that of percentages is the percentage point."""
    return "percentage points" if measure.unit == "%" else measure.unit


def written_value(measure: Measure, value: float | None) -> str:
    """A value with its name or unit, in running text: "3.512 nats a token", "chrF 52.31", "accuracy 85.3 %"."""
    if measure.key == LOSS.key:
        return f"{number(value, measure.digits)} {measure.unit}"
    return f"{measure.name} {number(value, measure.digits)}{f'{NBSP}%' if measure.unit == '%' else ''}"


def written_amount(measure: Measure, difference: float, *, unit: bool = True) -> str:
    """The size of a difference in running text: "0.055 nats a token", "1.23 points of chrF"."""
    text = number(abs(difference), digits_for(difference, least=measure.digits))
    if not unit:
        return text
    if measure.key == LOSS.key:
        return f"{text} {measure.unit}"
    words = difference_unit(measure)
    return f"{text} {words} of {measure.name}" if words else f"{text} in {measure.name}"


def final_sentence(mode: str, measures: Mapping[str, float | None], *, task: str) -> str:
    """What one run measured in one mode in the end: the loss first, then the task's own measures."""
    unit = _LOSS_UNITS.get(task, LOSS.unit)
    parts = [f"held-out loss, {mode}: {number(measures['loss'], 4)} {unit}"]
    if "bits_per_byte" in measures:
        parts.append(f"{number(measures['bits_per_byte'], 4)} bits a byte")
    own = [measure for key, measure in FURTHER.items() if key in measures and measure.better == "higher"]
    return ", ".join([*parts, *(written_value(measure, measures[measure.key]) for measure in own)])


def titled_unit(title: str, unit: str) -> str:
    """A title with its unit in brackets, if there is one."""
    return f"{title} ({unit})" if unit else title
