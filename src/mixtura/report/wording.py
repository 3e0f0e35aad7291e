"""Numbers, names and measures as the report writes them: pure functions from values to short texts.

One place decides how many digits a loss has, and what a family is called and coloured, so that the page, the tables,
the figures and the Markdown say the same thing in the same way. None is written as an en dash: no number, for a stated
reason.

The measure of the verdict comes from the task: the held-out loss in pretraining, chrF in translation, accuracy or micro
F1 in classification. Curves, speed-ups and crossings are about the held-out loss in every task, since it alone is
measured on the way of a run.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixtura.config.families import FAMILIES
from mixtura.planning.formulas import FLOPS_TOLERANCE
from mixtura.planning.question import Expected
from mixtura.results import LOSS, ArmResult, Interval, Measure, Results

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NBSP = "\N{NO-BREAK SPACE}"

FAMILY_WORDS = {
    **{family: facts.words for family, facts in FAMILIES.items()},
    "lora": "LoRA",
    "mixture_of_lora": "mixture of LoRA experts",
    "expert_specialized": "expert-specialised tuning",
    "full": "full fine-tuning",
    "last_layer": "last layer",
    "best_layer": "best layer",
    "layer_mix": "layer mix",
}
"""What a family is called in running text."""

_FAMILY_COLOURS = {
    **{family: facts.colours for family, facts in FAMILIES.items()},
    "lora": ("#59636e", "#aab4c0"),
    "mixture_of_lora": ("#0a6ebd", "#5cb3f2"),
    "expert_specialized": ("#0b7d5e", "#3ec79c"),
    "full": ("#9c4a94", "#e19bd8"),
    "last_layer": ("#59636e", "#aab4c0"),
    "best_layer": ("#0b7285", "#4fc3d9"),
    "layer_mix": ("#0a6ebd", "#5cb3f2"),
}
_SPARE_COLOURS = (("#a37500", "#e8bf52"), ("#5b4fc4", "#a9a0f5"), ("#00808a", "#4fc6d0"), ("#b0305c", "#f286a9"))

_SCALES = ((1e12, "trillion", "T"), (1e9, "billion", "G"), (1e6, "million", "M"), (1e3, "thousand", "k"))


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with a fixed count of decimals and a real minus sign."""
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: always with its sign, except a zero."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and float(f"{value:.{digits}f}") != 0 else text


def is_zero(difference: Interval) -> bool:
    """Whether there is no difference at all, in no seed: what is compared is equal."""
    return difference.mean == 0 and difference.low in (None, 0.0) and difference.high in (None, 0.0)


def margin(difference: Interval, *, least: int = 3) -> str:
    """The size of a difference and half its interval: "0.040 ± 0.020"; the size alone where there is no interval."""
    digits = digits_for(difference.mean, least=least)
    return number(abs(difference.mean), digits) + _half(difference, digits)


def without_interval(difference: Interval) -> Interval:
    """The same mean, as if there were one seed."""
    return Interval(difference.mean, None, None, difference.n)


def signed_margin(difference: Interval, *, least: int = 3) -> str:
    """The same with its sign, as cards and figures have it: "-0.040 ± 0.020"; "equal" where there is none at all."""
    digits = digits_for(difference.mean, least=least)
    return "equal" if is_zero(difference) else signed(difference.mean, digits) + _half(difference, digits)


def _half(difference: Interval, digits: int) -> str:
    if difference.high is None:
        return ""
    return f"{NBSP}\N{PLUS-MINUS SIGN}{NBSP}{number(difference.high - difference.mean, digits)}"


def digits_for(*values: float | None, least: int = 3) -> int:
    """`least` decimals, or as many as keep the smallest of the values from being written as zero (at most two more)."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    return least + sum(smallest < 0.5 * 10.0**-digits for digits in (least, least + 1))


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """An interval as "a to b"; an en dash where there is none."""
    return NONE if low is None or high is None else f"{number(low, digits)} to {number(high, digits)}"


def signed_interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """The interval of a difference, each end with its sign: "-0.021 to +0.114"."""
    return NONE if low is None or high is None else f"{signed(low, digits)} to {signed(high, digits)}"


def expected_words(found: Expected | None) -> str:
    """A difference that advice expects: "-0.052 (-0.071 to -0.033)"; an en dash where there is none."""
    return NONE if found is None else f"{signed(found.mean)} ({signed_interval(found.low, found.high)})"


def quantity(value: float | None) -> str:
    """A large count in words: 1.02 million."""
    return _scaled(value, word=True)


def compact(value: float | None, unit: str = "") -> str:
    """A large count with a prefix: 1.02 M; `unit` follows the prefix."""
    return _scaled(value, word=False, unit=unit)


def _scaled(value: float | None, *, word: bool, unit: str = "") -> str:
    if value is None:
        return NONE
    for scale, name, prefix in _SCALES:
        if abs(value) >= 0.9995 * scale and not (word and scale == 1e3 and value < 1e5):
            return f"{_three_digits(value / scale)}{NBSP}{name if word else prefix + unit}"
    return f"{value:,.0f}{NBSP + unit if unit else ''}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def memory(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return NONE
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{_three_digits(value / scale)}{NBSP}{unit}"
    return f"{value:.0f}{NBSP}B"


def duration(value: float | None) -> str:
    """Seconds, minutes or hours: whichever reads well."""
    if value is None:
        return NONE
    if value < 120:
        return f"{_three_digits(value)}{NBSP}s"
    return f"{value / 60:.1f}{NBSP}min" if value < 7200 else f"{value / 3600:.1f}{NBSP}h"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{number(100 * value, digits)}{NBSP}%"


def times(value: float | None, digits: int = 2) -> str:
    """A ratio: 1.31 followed by the multiplication sign."""
    return NONE if value is None else f"{number(value, digits)}{TIMES}"


def rate(value: float | None) -> str:
    """A learning rate, in the shortest form that keeps three digits."""
    return NONE if value is None else f"{value:.3g}"


def count(amount: int, noun: str) -> str:
    """A count with its noun: 1 seed, 3 seeds."""
    return f"{amount}{NBSP}{noun}{'' if amount == 1 else 's'}"


def listing(words: Sequence[str], last: str = "and") -> str:
    """Words as a list in running text: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


def capital(text: str) -> str:
    """The text with its first letter in upper case, unless it begins with a name of its own spelling: moe_k2, chrF."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    plain = first.replace("-", "").replace("'", "").rstrip(",.:;")
    own_spelling = first[:1].islower() and plain != plain.lower() and "-" not in first
    return text[:1].upper() + text[1:] if plain.isalpha() and not own_spelling else text


def start(label: str) -> str:
    """An arm's name at the start of a sentence: a family's words get a capital, a name that a user gave does not."""
    return capital(label) if label in FAMILY_WORDS.values() else label


def arm_colours(arms: Mapping[str, ArmResult]) -> dict[str, tuple[str, str]]:
    """A light-theme and a dark-theme colour for each arm: the family's, or a spare one for a family's further arms.

    The hues follow Okabe and Ito's palette, which colour-blind readers can tell apart; dense is grey.
    """
    spare, colours = itertools.cycle(_SPARE_COLOURS), {}
    for name, arm in arms.items():
        own = _FAMILY_COLOURS.get(arm.family)
        colours[name] = next(spare) if own is None or own in colours.values() else own
    return colours


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
