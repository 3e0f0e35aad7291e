"""How good and how honest a classifier's answers are: pure functions of probabilities and labels.

Shapes: N examples, C classes.
"""

import numpy as np

from mixtura.results.document import PairedTest
from mixtura.results.run import CalibrationBin
from mixtura.tasks.tuning import two_sided_p

NUM_BINS = 15
"""Calibration bins of equal width, as in Guo et al. (arXiv 1706.04599, section 4)."""

NUM_RESAMPLES = 10_000


def classification_scores(log_probability_NC: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """All measures of one set of answers.

    Returns:
        `loss` (nats an example), `accuracy`, `macro_f1` and `ece` in percent, and `brier` from 0 to 2.
    """
    probability_NC = np.exp(log_probability_NC)
    predicted_N = log_probability_NC.argmax(1)
    confusion_CC = confusion_matrix(label_N, predicted_N, num_classes=log_probability_NC.shape[1])
    bins = calibration_bins(probability_NC.max(1), predicted_N == label_N)
    return {
        "loss": float(-log_probability_NC[np.arange(len(label_N)), label_N].mean()),
        "accuracy": 100 * float((predicted_N == label_N).mean()),
        "macro_f1": 100 * macro_f1(confusion_CC),
        "ece": 100 * expected_calibration_error(bins),
        "brier": brier_score(probability_NC, label_N),
    }


def confusion_matrix(label_N: np.ndarray, predicted_N: np.ndarray, *, num_classes: int) -> np.ndarray:
    """(C, C) counts: a row for each true class, a column for each answer."""
    cell_N = label_N * num_classes + predicted_N
    return np.bincount(cell_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_f1(confusion_CC: np.ndarray) -> float:
    """Mean over the classes of 2 hits / (true + answered), from 0 to 1.

    A class that neither occurs nor is answered has no score and is left out of the mean.
    """
    hits_C = np.diag(confusion_CC).astype(float)
    seen_C = (confusion_CC.sum(0) + confusion_CC.sum(1)).astype(float)
    return float((2 * hits_C[seen_C > 0] / seen_C[seen_C > 0]).mean())


def calibration_bins(
    confidence_N: np.ndarray, correct_N: np.ndarray, *, num_bins: int = NUM_BINS
) -> list[CalibrationBin]:
    """Answers sorted by their probability into bins (low, high] of equal width."""
    bin_N = np.clip(np.ceil(confidence_N * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins = []
    for index in range(num_bins):
        inside_N = bin_N == index
        count = int(inside_N.sum())
        bins.append(
            CalibrationBin(
                low=index / num_bins,
                high=(index + 1) / num_bins,
                confidence=float(confidence_N[inside_N].mean()) if count else None,
                accuracy=float(correct_N[inside_N].mean()) if count else None,
                count=count,
            )
        )
    return bins


def expected_calibration_error(bins: list[CalibrationBin]) -> float:
    """Mean gap between confidence and accuracy, weighted by count, from 0 to 1 (arXiv 1706.04599, eq. 3)."""
    gaps = [
        part.count * abs(part.confidence - part.accuracy)
        for part in bins
        if part.confidence is not None and part.accuracy is not None
    ]
    return sum(gaps) / sum(part.count for part in bins)


def brier_score(probability_NC: np.ndarray, label_N: np.ndarray) -> float:
    """Mean squared distance between the probabilities and the truth, summed over classes: 0 is perfect, 2 the worst."""
    truth_NC = np.eye(probability_NC.shape[1])[label_N]
    return float(np.square(probability_NC - truth_NC).sum(1).mean())


def paired_bootstrap(
    arm_N: np.ndarray, baseline_N: np.ndarray, *, resamples: int = NUM_RESAMPLES, seed: int = 0
) -> PairedTest:
    """Whether two classifiers differ on the same examples, by drawing the examples again with replacement.

    Only counts of equal differences matter to a resampled mean, so they are drawn at once from a multinomial.

    Args:
        arm_N: how often each example was answered correctly, from 0 to 1 (a share where several seeds answered).
        baseline_N: the same of the baseline.
        resamples: how many times.
        seed: of the resampling.

    Returns:
        Arm minus baseline in points, with a 95 % interval and the two-sided p-value.
    """
    values, counts = np.unique(arm_N - baseline_N, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    means = drawn @ values / counts.sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return PairedTest(
        difference=100 * float((arm_N - baseline_N).mean()),
        low=100 * float(low),
        high=100 * float(high),
        p_value=two_sided_p(means),
    )
