"""Scores of translations by sacrebleu, with its signatures, and how sure a difference is.

Papineni et al. 2002 (BLEU), Popovic 2015 and 2017 (chrF, chrF++), Post 2018, "A Call for Clarity in Reporting BLEU
Scores" (signatures), Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation" (bootstrap).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest as BootstrapOfScores

from mixtura.results.document import PairedTest

NUM_RESAMPLES = 1000
_TOKENIZERS = {"zh": "zh", **dict.fromkeys(("ja", "ko", "th", "km", "lo", "my", "bo"), "char")}


class Scores(NamedTuple):
    """Corpus scores from 0 to 100."""

    chrf: float
    chrf_pp: float
    bleu: float


def bleu_tokenizer(language: str) -> str:
    """How BLEU splits a language into words: "13a" at spaces, "zh" for Chinese, "char" where words have no borders."""
    return _TOKENIZERS.get(language.split("_")[0], "13a")


def score(outputs: Sequence[str], references: Sequence[str], *, target_language: str) -> tuple[Scores, dict[str, str]]:
    """Scores of one direction's outputs, one reference each, and the signatures of the three."""
    metrics = _metrics(target_language)
    with _quiet():
        found = {name: metric.corpus_score(list(outputs), [list(references)]) for name, metric in metrics.items()}
    signatures = {name: f"{found[name].name}|{metric.get_signature()}" for name, metric in metrics.items()}
    return Scores(**{name: float(result.score) for name, result in found.items()}), signatures


def mean_scores(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Means over directions, each counting the same however many sentences it has."""
    return {key: sum(getattr(s, key) for s in scores.values()) / len(scores) for key in Scores._fields}


def paired_bootstrap(baseline: Sequence[str], outputs: Sequence[str], references: Sequence[str]) -> PairedTest:
    """chrF of `outputs` less that of `baseline` on the same sentences, and its p-value by a paired bootstrap."""
    systems: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), ("arm", list(outputs))]
    with _quiet():
        test = BootstrapOfScores(systems, {"chrf": CHRF()}, [list(references)], test_type="bs", n_samples=NUM_RESAMPLES)
        _, results = test()
    found: Any = results["chrF2"]
    before, after = found
    difference = float(after.score) - float(before.score)
    # The test compares with <, so it gives equal scores, as of outputs that share nothing with the references, its
    # smallest p-value.
    return PairedTest(difference=difference, p_value=float(after.p_value) if difference else 1.0)


def _metrics(target_language: str) -> dict[str, CHRF | BLEU]:
    return {
        "chrf": CHRF(),
        "chrf_pp": CHRF(word_order=2),
        # force: references with spaced punctuation, such as lists of keys, are right here, but sacrebleu warns of them.
        "bleu": BLEU(tokenize=bleu_tokenizer(target_language), force=True),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides sacrebleu's messages about its progress, but not its warnings."""
    logger = logging.getLogger("sacrebleu")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
