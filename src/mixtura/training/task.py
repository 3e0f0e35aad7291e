"""What one kind of training adds to the loop: its data, its loss, its evaluation, and what of the model is saved.

`train` owns steps, optimizer, checkpoints, metrics and interruption; a task owns what those are about. Language
modelling is one task (`language_modelling.py`), translation and classification are others.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mixtura.layers import RoutingStats
from mixtura.models.modeling_mixture import MixturePreTrainedModel
from mixtura.results import LOSS, Facts, Measure
from mixtura.results.details import RunDetails

Batch = dict[str, Any]
"""One micro-batch or one of its items: tensors by name, as the model's forward takes them."""


class StepLosses(NamedTuple):
    """The losses of one micro-batch."""

    task_loss: Tensor
    """This micro-batch's share of the step's mean over all targets: a sum divided by `num_targets`."""
    aux_loss: Tensor | None
    """Unweighted load-balancing loss, a mean over layers; None where nothing is balanced."""
    z_loss: Tensor | None
    routing: tuple[RoutingStats | None, ...] | None
    """Statistics of every layer, or None where nothing is routed."""


class TrainingTask(ABC):
    """What is trained, on what, and how it is judged."""

    measure: Measure = LOSS
    """The verdict's number; `evaluate` gives it for every mode, beside "loss"."""

    @property
    @abstractmethod
    def tokens_per_example(self) -> float:
        """Mean training tokens of one example, padding left out, for the budget of a run."""

    @abstractmethod
    def settings(self, model: nn.Module) -> Facts:
        """All that decides a run's numbers besides the training settings: architecture and data, JSON-able."""

    @abstractmethod
    def check(self, model: nn.Module, *, batch_size: int) -> None:
        """Refuses what cannot be trained or evaluated, before anything is; raises UserError."""

    @abstractmethod
    def dataset(self, *, length: int, seed: int) -> Dataset:
        """All `length` examples of a run in order: item i is what row i of the run sees, a function of (seed, i)."""

    def collate(self, items: list[Batch]) -> Batch:
        """One micro-batch from its items; the same for any way the run is cut into processes."""
        return torch.utils.data.default_collate(items)

    @abstractmethod
    def count_targets(self, batch: Batch) -> Tensor:
        """How many predictions a micro-batch is scored on, a scalar."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, *, num_targets: Tensor | int) -> StepLosses:
        """The losses of one micro-batch of a step that has `num_targets` targets on all ranks."""

    def router_loss_weights(self, model: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """Weights of `aux_loss` and `z_loss` in what is minimised: by default the model's, or its configuration's.

        A task whose router losses come from elsewhere, such as an adapter, says its own.
        """
        if isinstance(model, MixturePreTrainedModel):
            return model.router_loss_weights()
        config = getattr(model, "config", None)
        return getattr(config, "router_aux_loss_coef", 0.0), getattr(config, "router_z_loss_coef", 0.0)

    @abstractmethod
    def evaluate(self, model: nn.Module, *, final: bool) -> dict[str, dict[str, float]]:
        """Held-out measures in each mode, "loss" among them; the model is left as it was found.

        On the way (`final` is False) only what is cheap: fewer examples, fewer modes, no decoding.
        """

    def details(self, model: nn.Module, *, out: Path) -> RunDetails | None:
        """What a finished run tells beyond its measures, such as scores by language pair; None where there is nothing.

        Called once, after the final evaluation; files it wants to keep go into the run folder `out`.
        """
        return None

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes what is trained into `folder`, as safetensors, so that `load` restores it bit for bit."""

    @abstractmethod
    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads what `save` or `save_for_use` wrote into a model of the same architecture.

        Raises UserError when it does not fit.
        """

    def save_for_use(self, model: nn.Module, folder: Path) -> None:
        """Writes the finished model as its users load it: by default what `save` writes."""
        self.save(model, folder)
