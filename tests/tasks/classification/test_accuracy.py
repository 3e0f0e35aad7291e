"""Scores of classifiers against numbers worked out by hand."""

import numpy as np
import pytest

from mixtura.results.run import CalibrationBin
from mixtura.tasks.classification.accuracy import (
    brier_score,
    calibration_bins,
    classification_scores,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    paired_bootstrap,
)


def test_confusion_has_a_row_for_each_true_class():
    truth, answers = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 2])
    assert confusion_matrix(truth, answers, num_classes=3).tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_macro_f1_by_hand():
    # Class 0: precision 2/3, recall 2/3; class 1: precision 1/2, recall 1; class 2: precision 1, recall 1/2.
    confusion = np.array([[2, 1, 0], [0, 1, 0], [1, 0, 1]])
    assert macro_f1(confusion) == pytest.approx((2 / 3 + 2 / 3 + 2 / 3) / 3)
    assert macro_f1(np.array([[3, 0], [1, 0]])) == pytest.approx((6 / 7 + 0) / 2)


def test_a_class_that_nobody_met_does_not_count_in_macro_f1():
    assert macro_f1(np.array([[2, 0, 0], [0, 2, 0], [0, 0, 0]])) == 1.0


def test_bins_hold_their_upper_edge():
    bins = calibration_bins(np.array([0.5, 0.51, 1.0]), np.array([True, False, True]), num_bins=2)
    assert [part.count for part in bins] == [1, 2]
    assert bins[0] == CalibrationBin(low=0.0, high=0.5, confidence=0.5, accuracy=1.0, count=1)
    assert bins[1].confidence == pytest.approx(0.755) and bins[1].accuracy == 0.5


def test_an_empty_bin_has_no_confidence():
    assert calibration_bins(np.array([0.9]), np.array([True]), num_bins=2)[0].confidence is None


def test_calibration_error_by_hand():
    # Four answers at 0.75, of which two are right, and one at 0.95 that is right: (4 * 0.25 + 1 * 0.05) / 5.
    confidence, correct = np.array([0.75] * 4 + [0.95]), np.array([True, True, False, False, True])
    assert expected_calibration_error(calibration_bins(confidence, correct)) == pytest.approx(0.21)


def test_brier_by_hand():
    assert brier_score(np.array([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 0])) == pytest.approx((0.08 + 0.72) / 2)


def test_all_scores_of_two_answers():
    scores = classification_scores(np.log([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 0]))
    assert scores["loss"] == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert scores["accuracy"] == pytest.approx(50)
    # Class 0: one hit of two true and one answered; class 1: no hit.
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert scores["ece"] == pytest.approx(100 * (0.2 + 0.6) / 2)


def test_bootstrap_sees_a_clear_difference_and_no_difference():
    arm, baseline = np.ones(200), np.concatenate([np.zeros(40), np.ones(160)])
    clear = paired_bootstrap(arm, baseline)
    assert clear.difference == pytest.approx(20)
    assert 10 < clear.low < 20 < clear.high < 30 and clear.p_value < 0.001
    same = paired_bootstrap(arm, arm)
    assert (same.low, same.high, same.p_value) == (0, 0, 1)


def test_bootstrap_interval_is_that_of_the_sampled_mean():
    rng = np.random.default_rng(0)
    arm, baseline = rng.integers(0, 2, 1000) * 1.0, rng.integers(0, 2, 1000) * 1.0
    result = paired_bootstrap(arm, baseline)
    error = (arm - baseline).std() / np.sqrt(1000)
    assert result.high - result.low == pytest.approx(100 * 2 * 1.96 * error, rel=0.05)
