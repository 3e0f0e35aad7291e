"""What a classifier learns and is judged by: one class of a text, or any number of labels.

One class is a softmax with cross-entropy, judged by accuracy. Several labels are a sigmoid and binary cross-entropy for
each, summed over the labels, so that the loss is the negative log-likelihood of a text's labels; a text is given those
with at least the probability that gives the best micro F1 on validation texts, and micro F1 decides. Both are judged on
the logits of one forward.

Shapes: N texts, B batch, C classes or labels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax

from mixtura.data.labelled import LabelledText
from mixtura.results import Facts, Measure
from mixtura.results.document import PairedTest
from mixtura.results.run import ClassificationDetails, LabelCounts
from mixtura.tasks.classification import label_scores
from mixtura.tasks.classification.accuracy import (
    calibration_bins,
    classification_scores,
    confusion_matrix,
    expected_calibration_error,
    paired_bootstrap,
)

THRESHOLD = 0.5
"""Probability from which a text is given a label where nothing better is known."""

Lines = Sequence[Mapping[str, Any]]
"""Every answer of a run, as `predictions.jsonl` has it."""


class Objective(ABC):
    """How logits become a loss, answers and scores."""

    measure: Measure
    """The verdict's."""
    threshold: float = THRESHOLD
    """Probability from which a text is given a label; without a part in what has one class."""

    def adjusted(self, answer_NC: np.ndarray, labels: np.ndarray) -> Self:
        """The objective with what is to be found on texts that are neither trained on nor tested."""
        return self

    @abstractmethod
    def labels(self, examples: Sequence[LabelledText], num_classes: int) -> np.ndarray:
        """The truth of some texts: (N,) int64, or (N, C) float32 of 0 and 1."""

    @abstractmethod
    def loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """The loss in nats, summed over a batch."""

    @abstractmethod
    def answer(self, logits_BC: Tensor) -> Tensor:
        """What `scores` and the rest take, from logits in float64."""

    @abstractmethod
    def scores(self, answer_NC: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """All measures of one set of answers, the verdict's among them; the loss in nats a text."""

    @abstractmethod
    def quality(self, given: np.ndarray, labels: np.ndarray) -> float:
        """The verdict's measure of answers that are given as labels are."""

    @abstractmethod
    def details(self, answer_NC: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ClassificationDetails:
        """What a report shows of one set of answers."""

    @abstractmethod
    def lines(self, answer_NC: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Iterator[Facts]:
        """Every answer beside the truth, JSON-able."""

    @abstractmethod
    def compare(self, arm: Sequence[Lines], baseline: Sequence[Lines]) -> dict[str, PairedTest]:
        """Two arms over the same texts, each with the answers of the same seeds."""


@final
class OneClass(Objective):
    """Every text has exactly one class."""

    measure = Measure("accuracy", "accuracy", "%", "higher", 2)

    def labels(self, examples: Sequence[LabelledText], num_classes: int) -> np.ndarray:
        """(N,) indices of classes."""
        return np.asarray([example.label for example in examples], dtype=np.int64)

    def loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(logits_BC, labels, reduction="sum")

    def answer(self, logits_BC: Tensor) -> Tensor:
        """Log-probabilities."""
        return log_softmax(logits_BC, dim=-1)

    def scores(self, answer_NC: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, macro F1, calibration and loss."""
        return classification_scores(answer_NC, labels)

    def quality(self, given: np.ndarray, labels: np.ndarray) -> float:
        """Accuracy in percent."""
        return 100 * float((given == labels).mean())

    def details(self, answer_NC: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ClassificationDetails:
        """Confusion and calibration."""
        predicted_N = np.exp(answer_NC).argmax(1)
        return ClassificationDetails(
            labels=list(names),
            confusion=confusion_matrix(labels, predicted_N, num_classes=len(names)).tolist(),
            calibration=calibration_bins(np.exp(answer_NC).max(1), predicted_N == labels),
        )

    def lines(self, answer_NC: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Iterator[Facts]:
        """`truth`, `label` and its `probability`."""
        probability_NC = np.exp(answer_NC)
        for truth, row_C in zip(labels, probability_NC, strict=True):
            yield {"truth": names[truth], "label": names[row_C.argmax()], "probability": float(row_C.max())}

    def compare(self, arm: Sequence[Lines], baseline: Sequence[Lines]) -> dict[str, PairedTest]:
        """Of accuracy, under "all"."""
        correct = [
            np.mean([[line["truth"] == line["label"] for line in lines] for lines in side], axis=0)
            for side in (arm, baseline)
        ]
        return {"all": paired_bootstrap(*correct)}


@final
@dataclass(frozen=True)
class SeveralLabels(Objective):
    """A text has any number of labels."""

    threshold: float = THRESHOLD
    measure = Measure("micro_f1", "micro F1", "%", "higher", 2)

    def adjusted(self, answer_NC: np.ndarray, labels: np.ndarray) -> Self:
        """With the threshold of the best micro F1: rare labels seldom reach a probability of a half."""
        return type(self)(label_scores.best_threshold(labels > 0, _probabilities(answer_NC)))

    def labels(self, examples: Sequence[LabelledText], num_classes: int) -> np.ndarray:
        """(N, C) of 0 and 1."""
        has_NC = np.zeros((len(examples), num_classes), dtype=np.float32)
        for row_C, example in zip(has_NC, examples, strict=True):
            row_C[list(example.labels)] = 1
        return has_NC

    def loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the labels too."""
        return binary_cross_entropy_with_logits(logits_BC, labels.to(logits_BC.dtype), reduction="sum")

    def answer(self, logits_BC: Tensor) -> Tensor:
        """The logits, which tell likely labels from certain ones better than probabilities."""
        return logits_BC

    def scores(self, answer_NC: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Micro and macro F1, subset accuracy, calibration of single labels, and loss; Brier summed over the labels."""
        truth_NC, said_NC = labels > 0, self._given(answer_NC)
        counts = label_scores.count(truth_NC, said_NC)
        loss = self.loss(torch.from_numpy(answer_NC), torch.from_numpy(labels))
        distance_NC = _probabilities(answer_NC) - truth_NC
        return {
            "loss": loss.item() / len(labels),
            "micro_f1": 100 * float(label_scores.micro_f1(counts)),
            "macro_f1": 100 * float(label_scores.macro_f1(counts)),
            "subset_accuracy": 100 * float((truth_NC == said_NC).all(1).mean()),
            "ece": 100 * expected_calibration_error(_bins(answer_NC, truth_NC)),
            "brier": float(np.square(distance_NC).sum(1).mean()),
        }

    def quality(self, given: np.ndarray, labels: np.ndarray) -> float:
        """Micro F1 in percent."""
        return 100 * float(label_scores.micro_f1(label_scores.count(labels > 0, given > 0)))

    def details(self, answer_NC: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ClassificationDetails:
        """Hits, true and answered texts of each label, and calibration of all yes and no."""
        counts = label_scores.count(labels > 0, self._given(answer_NC))
        return ClassificationDetails(
            labels=list(names),
            confusion=[],
            calibration=_bins(answer_NC, labels > 0),
            label_counts=[LabelCounts(*map(int, of_label)) for of_label in zip(*counts, strict=True)],
            threshold=self.threshold,
        )

    def lines(self, answer_NC: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Iterator[Facts]:
        """`truth` and `labels`, lists of names, and the `probabilities` of all labels."""
        for truth_C, said_C, row_C in zip(labels > 0, self._given(answer_NC), _probabilities(answer_NC), strict=True):
            truth, said = ([names[int(index)] for index in np.flatnonzero(has_C)] for has_C in (truth_C, said_C))
            yield {
                "truth": truth,
                "labels": said,
                "probabilities": dict(zip(names, row_C.round(6).tolist(), strict=True)),
            }

    def compare(self, arm: Sequence[Lines], baseline: Sequence[Lines]) -> dict[str, PairedTest]:
        """Of micro F1, macro F1 and subset accuracy."""
        names = list(arm[0][0]["probabilities"])
        truth_NC = _flags(arm[0], "truth", names)
        sides = (np.stack([_flags(lines, "labels", names) for lines in side]) for side in (arm, baseline))
        return label_scores.paired_tests(truth_NC, *sides)

    def _given(self, logit_NC: np.ndarray) -> np.ndarray:
        return _probabilities(logit_NC) >= self.threshold


def _probabilities(logit_NC: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logit_NC).sigmoid().numpy()


def _bins(logit_NC: np.ndarray, truth_NC: np.ndarray) -> list[Any]:
    """Bins of all likelier answers, yes or no, by their probability, whatever the threshold."""
    probability_NC = _probabilities(logit_NC)
    confidence_NC = np.maximum(probability_NC, 1 - probability_NC)
    return calibration_bins(confidence_NC.ravel(), ((probability_NC >= 0.5) == truth_NC).ravel())


def _flags(lines: Lines, key: str, names: Sequence[str]) -> np.ndarray:
    """(N, C) truth values."""
    return np.array([[name in line[key] for name in names] for line in lines], dtype=bool).reshape(-1, len(names))
