"""The best single layer of a frozen model: a linear classifier on each, chosen by validation texts.

Middle layers often classify better than the last one ("Layer by Layer", arXiv 2502.02013). The classifiers
only choose: an arm's own head is trained on the layer afterwards like every other.

Shapes: N texts, M hidden states, D hidden, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixtura.tasks.classification.features import Examples, FeatureExamples
from mixtura.tasks.classification.objectives import Objective, OneClass

MOST_TEXTS = 8192
"""Training texts that the choice reads; they come in a shuffled order."""
_PENALTY = 1e-3
"""Of the squared weights, so that few texts in many dimensions have an optimum."""
_ITERATIONS = 60


@dataclass(frozen=True)
class BestLayer:
    """A layer and what it was chosen by."""

    layer: int
    """0 is the embeddings, M - 1 the last layer."""
    accuracies: tuple[float, ...]
    """On the validation texts in percent, of every layer; the verdict's measure where a text has several labels."""
    measure: str = "right"

    def __str__(self) -> str:
        """Such as "4 of 6, 71.2 % right on validation texts; the last 69.0 %"."""
        best, last = self.accuracies[self.layer], self.accuracies[-1]
        place = f"{self.layer} of {len(self.accuracies) - 1}"
        return f"{place}, {best:.1f} % {self.measure} on validation texts; the last {last:.1f} %"


def choose_layer(
    train: Examples, validation: Examples, *, num_classes: int, objective: Objective | None = None
) -> BestLayer:
    """The layer whose linear classifier is right most often on validation texts; of equals the one with less loss.

    Args:
        train: texts as the features of all hidden states.
        validation: such texts that nothing is trained on.
        num_classes: C.
        objective: what is learnt and judged; None is one class a text.
    """
    objective = objective or OneClass()
    assert isinstance(train, FeatureExamples) and isinstance(validation, FeatureExamples)
    labels = torch.from_numpy(train.labels[:MOST_TEXTS])
    truth = validation.labels[:MOST_TEXTS]
    found = []
    for layer in range(train.features_NMD.shape[1]):
        sides = (part.features_NMD[:MOST_TEXTS, layer] for part in (train, validation))
        train_ND, validation_ND = (torch.from_numpy(np.array(side, dtype=np.float64)) for side in sides)
        mean_D, scale_D = train_ND.mean(0), train_ND.std(0, correction=0).clamp_min(1e-6)
        weight_DC, bias_C = _fit((train_ND - mean_D) / scale_D, labels, num_classes=num_classes, objective=objective)
        logits_NC = (validation_ND - mean_D) / scale_D @ weight_DC + bias_C
        answer_NC = objective.answer(logits_NC).numpy()
        scores = objective.adjusted(answer_NC, truth).scores(answer_NC, truth)
        found.append((scores[objective.measure.key], -scores["loss"]))
    layer = max(range(len(found)), key=found.__getitem__)
    measure = "right" if isinstance(objective, OneClass) else objective.measure.name
    return BestLayer(layer, tuple(value for value, _ in found), measure)


def _fit(x_ND: Tensor, labels: Tensor, *, num_classes: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) of a logistic regression with a penalty, in float64."""
    weight_DC = torch.zeros(x_ND.size(1), num_classes, dtype=x_ND.dtype, requires_grad=True)
    bias_C = torch.zeros(num_classes, dtype=x_ND.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_DC, bias_C], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = objective.loss(x_ND @ weight_DC + bias_C, labels) / len(labels) + _PENALTY * weight_DC.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight_DC.detach(), bias_C.detach()
