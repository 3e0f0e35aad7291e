"""What a kind of training has to bring: `TrainingTask` for the training loop, `Arm` and `Experiment` for comparisons.

`train` owns steps, optimizer, checkpoints, metrics and interruption. A task brings the data, the loss and the
evaluation, and says what of the model is saved. An experiment has the arms that are compared and the data that they
share. The folders of `mixtura.tasks` each implement these for one kind of training, so time, differences and verdicts
are measured the same way for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mixtura.layers import RoutingStats
from mixtura.models import MixtureConfig
from mixtura.models.modeling_mixture import MixturePreTrainedModel
from mixtura.results import LOSS, ArmDescription, Facts, Leaks, Measure
from mixtura.results.document import AcrossArms
from mixtura.results.run import RunDetails

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
    decodes: bool = False
    """Whether the final evaluation also writes texts, which trials of a learning rate leave out."""

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
        """All `length` examples of a run in order: item i is row i of the run, a function of (seed, i) alone."""

    def collate(self, items: list[Batch]) -> Batch:
        """One micro-batch from its items; it must not depend on how the run is divided over processes."""
        return torch.utils.data.default_collate(items)

    @abstractmethod
    def count_targets(self, batch: Batch) -> Tensor:
        """The number of predictions whose loss a micro-batch sums up, a scalar tensor."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, *, num_targets: Tensor | int) -> StepLosses:
        """The losses of one micro-batch of a step that has `num_targets` targets on all ranks."""

    def router_loss_weights(self, model: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """Weights of `aux_loss` and `z_loss` in what is minimised: by default the model's, or its configuration's.

        A task whose router losses come from elsewhere, such as from an adapter, overrides this.
        """
        if isinstance(model, MixturePreTrainedModel):
            return model.router_loss_weights()
        config = getattr(model, "config", None)
        return getattr(config, "router_aux_loss_coef", 0.0), getattr(config, "router_z_loss_coef", 0.0)

    @abstractmethod
    def evaluate(self, model: nn.Module, *, final: bool) -> dict[str, dict[str, float]]:
        """Held-out measures in each mode, "loss" among them; the model is unchanged afterwards.

        During training (`final` is False) only what is cheap: fewer examples, fewer modes, no decoding.
        """

    def details(self, model: nn.Module, *, out: Path) -> RunDetails | None:
        """Results of a finished run besides its measures, such as scores by language pair; None where there are none.

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


class Arm(ABC):
    """One side of a comparison, ready to be built."""

    name: str
    """Its key in the recipe."""
    label: str
    """Its name in tables."""
    family: str
    """A feed-forward family, an adapter's method or a head's kind; reports choose words and colour by it."""
    task: TrainingTask
    learning_rate: float
    """The peak rate that the recipe gives it."""
    training_mode: str
    """The mode of `task.evaluate` in which the model computes the same as in training."""
    deployed_mode: str | None
    """The mode in which it answers one request alone; None if it has none."""
    trained_config: MixtureConfig | None = None
    """The configuration of the finished model if that is ours; None for a base model with an adapter or a head."""

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """An untrained model; all arms draw what is random in it from the seed by the same rule."""

    def at_scale(self, scale: float) -> "Arm":
        """The arm with this `feed_forward_scale`, where its feed-forward weights are drawn at random."""
        raise NotImplementedError(f"{type(self).__name__} draws no feed-forward weights at {scale:g}")

    def at_budget(self, rows: int, *, seed: int) -> "Arm":
        """The arm with so few training examples of each class, which the seed draws, the same for every arm."""
        raise NotImplementedError(f"{type(self).__name__} has no classes to draw {rows} examples of")

    @abstractmethod
    def describe(self, baseline: "Arm") -> ArmDescription:
        """What it is and costs before it runs."""

    @abstractmethod
    def leaks(self) -> Leaks:
        """Whether information leaks from the future or from the rest of the batch; measured on an untrained model."""


class Experiment(ABC):
    """Everything a comparison runs."""

    recipe: Any
    """The recipe as it runs: values that it left open, or that are too large for the data, are fitted to the data."""
    arms: dict[str, Arm]
    """By name, in the recipe's order."""
    data: Facts
    """Facts on the data for reports, JSON-able: `description` and counts, skipped rows among them."""
    data_digest: str
    """A hash over all training and held-out examples: a folder cannot be continued with other examples."""

    @abstractmethod
    def held_equal(self, described: Mapping[str, ArmDescription]) -> list[str]:
        """What the arms share, as phrases for the report's first lines; `described` is each arm's `describe`."""

    def across_arms(self, out: Path) -> AcrossArms:
        """Results that need all finished runs together, such as paired bootstraps over sentences.

        Args:
            out: the comparison's folder, with `arms/<arm>/seed<k>/` in it.
        """
        return AcrossArms()
