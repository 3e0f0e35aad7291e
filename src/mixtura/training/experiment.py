"""What a comparison needs to know of one kind of training: its arms and its data, ready to run.

Pretraining, translation and classification are each an `Experiment`; the comparison runs any of them, and measures
time, differences and verdicts the same way for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mixtura.models import MixtureConfig
from mixtura.results import ArmDescription, Facts, Leaks
from mixtura.results.document import AcrossArms
from mixtura.training.task import TrainingTask


class Arm(ABC):
    """One side of a comparison, ready to be built."""

    name: str
    """Its key in the recipe."""
    label: str
    """What tables call it."""
    family: str
    """Decides its words and colour: a feed-forward family, an adapter's method or a head's kind."""
    task: TrainingTask
    learning_rate: float
    """The peak rate that the recipe gives it."""
    training_mode: str
    """The mode of `task.evaluate` that computes what training computes."""
    deployed_mode: str | None
    """The mode in which it answers one request alone; None if it has none."""
    trained_config: MixtureConfig | None = None
    """Of the finished model, where that is one of ours; None for a base model with an adapter or a head."""

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """A model as training starts with it; what is random in it follows from the seed by one rule for all arms."""

    def at_scale(self, scale: float) -> "Arm":
        """The arm with this `feed_forward_scale`, where its feed-forward weights are drawn at random."""
        raise NotImplementedError(f"{type(self).__name__} draws no feed-forward weights at {scale:g}")

    @abstractmethod
    def describe(self, baseline: "Arm") -> ArmDescription:
        """What it is and costs before it runs."""

    @abstractmethod
    def leaks(self) -> Leaks:
        """Whether information leaks from the future or from the rest of the batch; measured on an untrained model."""


class Experiment(ABC):
    """Everything a comparison runs."""

    recipe: Any
    """The recipe as it runs: what it left open, or its data could not fill, is fitted to the data."""
    arms: dict[str, Arm]
    """By name, in the recipe's order."""
    data: Facts
    """Facts on the data for reports, JSON-able: `description` and counts, skipped rows among them."""
    data_digest: str
    """A hash over all training and held-out examples: a folder refuses to go on with others."""

    @abstractmethod
    def held_equal(self, described: Mapping[str, ArmDescription]) -> list[str]:
        """What the arms share, as phrases for the report's first lines; `described` is each arm's `describe`."""

    def across_arms(self, out: Path) -> AcrossArms:
        """What only all finished runs together tell, such as paired bootstraps over sentences.

        Args:
            out: the comparison's folder, with `arms/<arm>/seed<k>/` in it.
        """
        return AcrossArms()
