"""Numbers and names as the report writes them: pure functions from values to short texts.

One place decides how many digits a loss has, and what a family is called and coloured, so that the page, the tables,
the figures and the Markdown say the same thing in the same way. None is written as an en dash: no number, for a stated
reason.
"""

import itertools
from collections.abc import Mapping, Sequence

from mixtura.config.families import FAMILIES
from mixtura.planning.advice import Expected
from mixtura.results import ArmResult, Interval

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
