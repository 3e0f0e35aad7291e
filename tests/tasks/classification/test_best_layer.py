"""Choosing one layer of a frozen model by validation texts."""

import numpy as np

from mixtura.tasks.classification.best_layer import BestLayer, choose_layer
from mixtura.tasks.classification.features import FeatureExamples

CLASSES, LAYERS, WIDTH = 3, 4, 6


def texts(count, *, telling, seed):
    """Texts whose class one layer tells clearly, the others not at all."""
    draw = np.random.default_rng(seed)
    label_N = draw.integers(CLASSES, size=count)
    features_NMD = draw.normal(size=(count, LAYERS, WIDTH)).astype(np.float32)
    features_NMD[:, telling] += 4 * np.eye(CLASSES, WIDTH, dtype=np.float32)[label_N]
    return FeatureExamples(features_NMD, label_N, np.ones(count))


def test_the_layer_that_tells_the_classes_apart_is_chosen():
    best = choose_layer(texts(200, telling=2, seed=0), texts(100, telling=2, seed=1), num_classes=CLASSES)
    assert best.layer == 2 and best.accuracies[2] > 90 > 60 > max(best.accuracies[:2])


def test_validation_texts_choose_and_not_training_texts():
    best = choose_layer(texts(200, telling=2, seed=0), texts(100, telling=1, seed=1), num_classes=CLASSES)
    assert best.accuracies[2] < 60  # clear in training, and worth nothing on the texts that choose


def test_a_feature_that_never_varies_does_no_harm():
    train, validation = (texts(50, telling=3, seed=seed) for seed in (0, 1))
    train.features_NMD[:, :, 5] = validation.features_NMD[:, :, 5] = 7
    assert choose_layer(train, validation, num_classes=CLASSES).layer == 3


def test_a_choice_is_said_in_words():
    assert str(BestLayer(1, (50.0, 75.0, 62.5))) == "1 of 2, 75.0 % right on validation texts; the last 62.5 %"
