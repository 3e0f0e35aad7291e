"""A text classifier: a pretrained model, as much of it as is trained, and a head.

Of a frozen model only the head is a module here whenever its answer follows from pooled vectors (`features.py`); the
pretrained model is then joined again for use. What is frozen always runs in evaluation mode, so that its dropout is off
and its mixture-of-tokens layers run as deployed; a model that is tuned whole keeps the dropout of its configuration.

Shapes: B batch, L length, M hidden states, D hidden, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixtura.adapters.attach import router_losses, routing_stats
from mixtura.adapters.tuner import RoutedTuner
from mixtura.checkpoints.pretrained import load_base
from mixtura.layers import MixtureOfTokens, RoutingStats
from mixtura.models.inference import mixing_layers, running_in
from mixtura.tasks.classification.features import hidden_states
from mixtura.tasks.classification.heads import ClassifierHead, blends_tokens

Mode = Literal["group", "alone"]


def load_encoder(name: str, *, num_layers: int | None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A pretrained model without any head, frozen and in evaluation mode, and its tokenizer.

    Raises:
        UserError: there is no such model.
    """
    model, tokenizer = load_base(name, num_layers=num_layers, head="encoder")
    return without_pooler(model).eval().requires_grad_(False), tokenizer


def without_pooler(model: Any) -> Any:
    """The same model without BERT's pooler: it reads the hidden states, so no head here would ever train it."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


class ClassifierOutput(NamedTuple):
    """What a classifier says of a batch."""

    logits_BC: Tensor
    stats: RoutingStats | None
    """Routing of the head's feed-forward layer, where it has one and it was asked for."""


class TextClassifier(nn.Module):
    """Token ids, or pooled vectors, -> logits."""

    def __init__(
        self,
        head: ClassifierHead,
        *,
        base: nn.Module | None = None,
        frozen_parts: tuple[nn.Module, ...] = (),
    ) -> None:
        """Joins a head and a model.

        Args:
            head: what is put on the hidden states.
            base: the pretrained model, adapter included; None where its pooled vectors are the input.
            frozen_parts: modules of `base` that never leave evaluation mode.
        """
        super().__init__()
        self.head, self.base = head, base
        self._frozen_parts = list(frozen_parts)
        for part in self._frozen_parts:
            part.training = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        return_stats: bool = False,
    ) -> ClassifierOutput:
        """Token ids and mask (B, L), or features (B, M, D) -> logits (B, C), and statistics when asked for."""
        if features is not None:
            return ClassifierOutput(*self.head(features, return_stats))
        assert input_ids is not None and attention_mask is not None and self.base is not None
        states = hidden_states(self.base, input_ids, attention_mask)
        return ClassifierOutput(*self.head.forward_tokens(states, attention_mask, return_stats))

    def train(self, mode: bool = True) -> "TextClassifier":
        """Training or evaluation mode, which frozen parts never leave."""
        super().train(mode)
        for part in self._frozen_parts:
            part.training = False
        return self

    def mixing_layers(self) -> list[MixtureOfTokens]:
        """Layers in which the examples of a batch see each other while training."""
        frozen = {id(part) for part in self._frozen_parts}
        return [layer for layer in mixing_layers(self) if id(layer) not in frozen]

    @torch.no_grad()
    def layer_weights(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor | None:
        """The blend's weights (M,); where they depend on the token, their mean over the real tokens of a batch."""
        if self.head.layer_mix is None or not blends_tokens(self.head.config):
            return self.head.layer_weights()
        assert input_ids is not None and attention_mask is not None and self.base is not None
        weights_BLM = self.head.layer_weights(hidden_states(self.base, input_ids, attention_mask))
        assert weights_BLM is not None
        return weights_BLM[attention_mask.bool()].mean(0)


def evaluation_modes(classifier: TextClassifier) -> tuple[Mode, ...]:
    """`alone`, each text by itself, as deployed; before it `group`, as trained, where layers mix examples."""
    return ("group", "alone") if classifier.mixing_layers() else ("alone",)


@contextmanager
def evaluating(classifier: TextClassifier, mode: Mode) -> Iterator[None]:
    """Evaluation in one of the modes; afterwards the classifier is as it was."""
    was_training = classifier.training
    classifier.eval()
    try:
        with running_in(classifier.mixing_layers(), mode):
            yield
    finally:
        classifier.train(was_training)


def adapter_routing(model: nn.Module) -> tuple[tuple[RoutingStats, ...], tuple[Tensor, Tensor] | None]:
    """Statistics of a mixture adapter's layers in the last forward, and its unweighted router losses; () and None."""
    if not any(isinstance(part, RoutedTuner) for part in model.modules()):
        return (), None
    return routing_stats(model), router_losses(model)
