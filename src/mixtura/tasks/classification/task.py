"""Classification as a training task: the loss of an objective, and scores that look at more than its verdict.

On the way a run is judged on validation examples, and only they may choose a learning rate; the test examples are
looked at once, at the end.

Shapes: N examples, B batch, C classes, M hidden states.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixtura.config import UserError
from mixtura.layers.statistics import load_balancing_loss
from mixtura.results import Facts
from mixtura.results.run import ClassificationDetails
from mixtura.tasks.classification.classifier import (
    Mode,
    SavedClassifier,
    TextClassifier,
    adapter_routing,
    evaluating,
    evaluation_modes,
)
from mixtura.tasks.classification.features import Examples, FeatureExamples, ScheduledExamples
from mixtura.tasks.classification.heads import blends_tokens
from mixtura.tasks.classification.objectives import Objective
from mixtura.training import saving as checkpoints
from mixtura.training.interface import Batch, StepLosses, TrainingTask

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Splits:
    """The examples of one arm, each part in a fixed order."""

    train: Examples
    validation: Examples
    test: Examples

    def with_layer(self, layer: int | None) -> "Splits":
        """The splits with one hidden state alone, where they are features and a layer is named."""
        if layer is None or not isinstance(self.train, FeatureExamples):
            return self
        sides = (self.train, self.validation, self.test)
        return Splits(*(side.one_state(layer) for side in sides if isinstance(side, FeatureExamples)))


@dataclass(frozen=True)
class RouterLossWeights:
    """Weights of the load-balancing loss and the z-loss; zero where nothing is to be balanced."""

    head: tuple[float, float] = (0.0, 0.0)
    adapter: tuple[float, float] = (0.0, 0.0)
    """Of an adapter, or of the layers of a base model that is tuned whole: an arm has one of them at most."""

    def total(self) -> tuple[float, float]:
        """Weights of a weighted mean of both parts' losses."""
        return self.head[0] + self.adapter[0], self.head[1] + self.adapter[1]

    def adapter_share(self) -> tuple[float, float]:
        """How much of that mean is the adapter's."""
        aux, z = self.total()
        return self.adapter[0] / (aux or 1.0), self.adapter[1] / (z or 1.0)


class Classification(TrainingTask):
    """Trains a `TextClassifier`; see the module's docstring."""

    def __init__(
        self,
        splits: Splits,
        saved: SavedClassifier,
        *,
        settings: Facts,
        eval_examples: int,
        batch_size: int,
        weights: RouterLossWeights,
    ) -> None:
        """Puts together what an arm is trained and judged on.

        Args:
            splits: its examples.
            saved: how the finished classifier is written for use.
            settings: facts on model and data that decide a run's numbers, JSON-able.
            eval_examples: validation examples at each evaluation during training.
            batch_size: examples at once when evaluating; groups are formed within a batch.
            weights: of the router losses.
        """
        self.splits, self.saved, self.eval_examples, self.batch_size = splits, saved, eval_examples, batch_size
        self._settings, self.weights = settings, weights
        self._objective = saved.objective
        self.measure = self._objective.measure

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens of a training text, special tokens counted, padding not."""
        return float(self.splits.train.length_N.mean())

    def settings(self, model: Any) -> Facts:
        """Facts on model and data."""
        return self._settings

    def check(self, model: Any, *, batch_size: int) -> None:
        """Refuses groups that a batch does not fill, and evaluations with too few examples.

        Raises:
            UserError: see above.
        """
        held_out = len(self.splits.validation.labels)
        if self.eval_examples > held_out:
            raise UserError(
                f"'training.eval_sequences' is {self.eval_examples} but only {held_out} examples are held out for "
                "validation: lower it or raise 'data.validation_examples'."
            )
        for layer in model.mixing_layers():
            if batch_size % layer.group_size:
                raise UserError(
                    f"A batch of {batch_size} examples does not fill groups of {layer.group_size}: make "
                    "'training.batch_size' a multiple of the group size."
                )
            if min(self.eval_examples, len(self.splits.test.labels)) < batch_size:
                raise UserError(
                    f"An evaluation in groups needs at least one batch of {batch_size} examples: raise "
                    "'training.eval_sequences' and 'data.test_examples', or lower 'training.batch_size'."
                )

    def dataset(self, *, length: int, seed: int) -> Dataset:
        """The run's examples in order, epochs as needed, the same for every arm."""
        return ScheduledExamples(self.splits.train, length=length, seed=seed)

    def collate(self, items: list[Batch]) -> Batch:
        """One micro-batch: padded tokens with their mask, or features; and labels."""
        return self.splits.train.collate(items)

    def count_targets(self, batch: Batch) -> Tensor:
        """Examples."""
        return torch.tensor(len(batch["labels"]))

    def losses(self, model: Any, batch: Batch, *, num_targets: Tensor | int) -> StepLosses:
        """The objective's loss, and the router losses of a head, an adapter and a model tuned whole."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits_BC, stats, base_routing = model(**inputs, return_stats=True)
        loss = self._objective.loss(logits_BC.float(), batch["labels"]) / num_targets
        routing, of_adapter = adapter_routing(model)
        if base_routing is not None and any(self.weights.adapter):
            routing, of_adapter = base_routing, model.base.router_losses(base_routing)
        # An adapter's layers and a head's may differ in their number of experts: only one kind is reported.
        shown = routing or (() if stats is None else (stats,))
        aux_loss = z_loss = None
        if stats is not None and any(self.weights.head):
            aux_loss, z_loss = load_balancing_loss(stats.tokens_per_expert_E, stats.importance_E), stats.router_z_loss
        if of_adapter is not None and aux_loss is not None and z_loss is not None:
            share, z_share = self.weights.adapter_share()
            aux_loss, z_loss = torch.lerp(aux_loss, of_adapter[0], share), torch.lerp(z_loss, of_adapter[1], z_share)
        elif of_adapter is not None:
            aux_loss, z_loss = of_adapter
        return StepLosses(loss, aux_loss, z_loss, shown or None)

    def router_loss_weights(self, model: Any) -> tuple[float, float]:
        """Of the load-balancing loss and the z-loss: the head's and the adapter's together."""
        return self.weights.total()

    def evaluate(self, model: Any, *, final: bool) -> dict[str, dict[str, float]]:
        """Scores in each mode: of the first validation examples during training, of all test examples at the end."""
        examples = self.splits.test if final else self.splits.validation
        count = len(examples.labels) if final else self.eval_examples
        judge, measured = self._judge(model) if final else None, {}
        for mode in evaluation_modes(model):
            answer_NC = self._answers(model, examples, mode, count=count)
            labels = examples.labels[: len(answer_NC)]
            measured[mode] = (judge or self._objective.adjusted(answer_NC, labels)).scores(answer_NC, labels)
        return measured

    def details(self, model: Any, *, out: Path) -> ClassificationDetails:
        """What the objective tells of the answers as deployed; every answer goes into `predictions.jsonl`."""
        names, labels, judge = self.saved.labels, self.splits.test.labels, self._judge(model)
        answer_NC = self._answers(model, self.splits.test, "alone", count=len(labels))
        with checkpoints.writing(out), (out / PREDICTIONS).open("w", encoding="utf-8") as file:
            for line in judge.lines(answer_NC, labels, names):
                file.write(json.dumps(line) + "\n")
        details = judge.details(answer_NC, labels, names)
        return dataclasses.replace(details, layer_weights=self._layer_weights(model))

    def save(self, model: Any, folder: Path) -> None:
        """Writes the head and what is trained of the base model."""
        checkpoints.save_trained(model, folder)

    def load(self, model: Any, folder: Path) -> None:
        """Reads what `save` wrote."""
        checkpoints.load_trained(model, folder)

    def save_for_use(self, model: Any, folder: Path) -> None:
        """Adds all that `classify` needs: what the head is, the labels, the tokenizer, the adapter in PEFT's format."""
        self.save(model, folder)
        dataclasses.replace(self.saved, threshold=self._judge(model).threshold).write(model, folder)

    def _judge(self, model: TextClassifier) -> Objective:
        """The objective with what it finds in the answers to all validation texts, as deployed."""
        if not self.saved.several:
            return self._objective
        labels = self.splits.validation.labels
        return self._objective.adjusted(
            self._answers(model, self.splits.validation, "alone", count=len(labels)), labels
        )

    def _answers(self, model: TextClassifier, examples: Examples, mode: Mode, *, count: int) -> np.ndarray:
        """The objective's answers (N, C) to the first `count` examples; in groups, of as many as fill whole batches."""
        order_N = np.arange(count // self.batch_size * self.batch_size if mode == "group" else count)
        if mode == "alone":
            # Texts of one length together, so that little is padding: an answer does not depend on its batch here.
            order_N = np.argsort(examples.length_N[:count], kind="stable")
        answer_NC = np.empty((len(order_N), len(self.saved.labels)))
        with evaluating(model, mode), torch.no_grad():
            for start in range(0, len(order_N), self.batch_size):
                chosen = order_N[start : start + self.batch_size]
                logits_BC = model(**self._inputs(model, examples, chosen)).logits_BC
                answer_NC[chosen] = self._objective.answer(logits_BC.double()).cpu().numpy()
        return answer_NC

    def _inputs(self, model: TextClassifier, examples: Examples, chosen: np.ndarray) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        batch = examples.collate([examples.item(int(index)) for index in chosen])
        return {key: value.to(device) for key, value in batch.items() if key != "labels"}

    def _layer_weights(self, model: TextClassifier) -> list[float] | None:
        """(M,) weights of the blend; where they depend on the token, their mean over one batch of test texts."""
        with evaluating(model, "alone"):
            if not blends_tokens(model.head.config):
                weights_M = model.layer_weights()
            else:
                first = np.arange(min(self.batch_size, len(self.splits.test.labels)))
                weights_M = model.layer_weights(**self._inputs(model, self.splits.test, first))
        return None if weights_M is None else weights_M.tolist()
