"""How good answers are where a text may have several labels: pure functions of yes and no for every text and label.

F1 is 2 hits / (true + answered): micro over all labels together, macro as the mean over the labels. A text counts as
right as a whole only if all its labels are (subset accuracy).

Shapes: N texts, C labels, S seeds, R resamples.
"""

from typing import NamedTuple

import numpy as np

from mixtura.results.document import PairedTest
from mixtura.tasks.tuning import two_sided_p

_RESAMPLES, _CHUNK = 10_000, 250


class Counts(NamedTuple):
    """Of each label."""

    hits_C: np.ndarray
    """Texts that have it and were given it."""
    true_C: np.ndarray
    answered_C: np.ndarray


def count(truth_NC: np.ndarray, answer_NC: np.ndarray) -> Counts:
    """Hits, true and answered texts of each label; both arrays are of truth values."""
    return Counts(*((part_NC).sum(0) for part_NC in (truth_NC & answer_NC, truth_NC, answer_NC)))


def micro_f1(counts: Counts) -> np.ndarray:
    """(..., C) counts -> (...), from 0 to 1, over all labels together; 0 where nothing is true or answered."""
    seen = counts.true_C.sum(-1) + counts.answered_C.sum(-1)
    return 2 * counts.hits_C.sum(-1) / np.maximum(seen, 1)


def macro_f1(counts: Counts) -> np.ndarray:
    """(..., C) counts -> (...), from 0 to 1: mean over the labels that are true of a text or answered."""
    seen_C = counts.true_C + counts.answered_C
    return (2 * counts.hits_C / np.maximum(seen_C, 1)).sum(-1) / np.maximum((seen_C > 0).sum(-1), 1)


def best_threshold(truth_NC: np.ndarray, probability_NC: np.ndarray) -> float:
    """The probability from which labels are to be given for the best micro F1, between two that occur.

    Of equally good ones it is the nearest to 0.5, which it is too where no text has a label.
    """
    if not truth_NC.any():
        return 0.5
    order = np.argsort(-probability_NC, axis=None, kind="stable")
    descending, hits = probability_NC.ravel()[order], truth_NC.ravel()[order].cumsum()
    # The number of labels given can only be one after which the probability falls.
    last = np.flatnonzero(np.append(descending[:-1] > descending[1:], True))
    f1 = 2 * hits[last] / (hits[-1] + last + 1)
    below = np.append(descending[1:], 0.0)[last]
    between = np.where((below < 0.5) & (descending[last] >= 0.5), 0.5, (descending[last] + below) / 2)
    best = np.flatnonzero(f1 == f1.max())
    return float(between[best][np.abs(between[best] - 0.5).argmin()])


def paired_tests(
    truth_NC: np.ndarray, arm_SNC: np.ndarray, baseline_SNC: np.ndarray, *, resamples: int = _RESAMPLES, seed: int = 0
) -> dict[str, PairedTest]:
    """Whether two classifiers differ on the same texts, by drawing the texts again with replacement.

    Args:
        truth_NC: which labels each text has.
        arm_SNC: which labels each seed of the arm gave it.
        baseline_SNC: the same of the baseline.
        resamples: how many times.
        seed: of the resampling.

    Returns:
        Arm minus baseline in points, mean over seeds, of `micro_f1`, `macro_f1` and `subset_accuracy`.
    """
    draw, texts = np.random.default_rng(seed), len(truth_NC)
    sides = [_Side(truth_NC, answers_SNC) for answers_SNC in (arm_SNC, baseline_SNC)]
    once, found = np.ones((1, texts)), []
    for start in range(0, resamples, _CHUNK):
        times_RN = draw.multinomial(texts, np.full(texts, 1 / texts), size=min(_CHUNK, resamples - start))
        found.append(_difference(sides, times_RN.astype(float)))
    tests = {}
    for key, whole in _difference(sides, once).items():
        means_R = np.concatenate([chunk[key] for chunk in found])
        low, high = np.quantile(means_R, (0.025, 0.975))
        tests[key] = PairedTest(
            difference=100 * float(whole[0]),
            low=100 * float(low),
            high=100 * float(high),
            p_value=two_sided_p(means_R),
        )
    return tests


class _Side:
    """One classifier's answers, laid out for resampling."""

    def __init__(self, truth_NC: np.ndarray, answers_SNC: np.ndarray) -> None:
        self.right_SN = (answers_SNC == truth_NC).all(-1).astype(float)
        self.parts_S = [
            [part_NC.astype(float) for part_NC in (truth_NC & answer_NC, truth_NC, answer_NC)]
            for answer_NC in answers_SNC
        ]

    def scores(self, times_RN: np.ndarray) -> dict[str, np.ndarray]:
        """(R,) of each measure, mean over seeds, where each text counts so many times."""
        counts_S = [Counts(*(times_RN @ part_NC for part_NC in parts)) for parts in self.parts_S]
        return {
            "micro_f1": np.mean([micro_f1(counts) for counts in counts_S], axis=0),
            "macro_f1": np.mean([macro_f1(counts) for counts in counts_S], axis=0),
            "subset_accuracy": times_RN @ self.right_SN.mean(0) / times_RN.shape[1],
        }


def _difference(sides: list[_Side], times_RN: np.ndarray) -> dict[str, np.ndarray]:
    arm, baseline = (side.scores(times_RN) for side in sides)
    return {key: arm[key] - baseline[key] for key in arm}
