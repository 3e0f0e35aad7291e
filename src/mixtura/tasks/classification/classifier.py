"""A text classifier: a pretrained model, as much of it as is trained, and a head; and its folder, once it is trained.

If the model is frozen and the head needs only its pooled vectors (`features.py`), the head is trained alone; the
pretrained model is joined again when the classifier is used. What is frozen always runs in evaluation mode: its dropout
is off, and its mixture-of-tokens layers run as deployed. A model that is tuned whole keeps its configured dropout.

A finished classifier's folder has `classifier.json` (what the parts are), `model.safetensors` (everything that was
trained), the tokenizer, and `adapter/` in PEFT's format or the tuned model's configuration in `base/`. Frozen weights
are not copied: they are loaded from their source again, and it is an error if they have changed there.

Shapes: B batch, L length, M hidden states, D hidden, C classes.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from mixtura.adapters.attach import load_adapter, router_losses, routing_stats
from mixtura.adapters.tuner import RoutedTuner
from mixtura.checkpoints.pretrained import load_base
from mixtura.checkpoints.quantized import Quantize
from mixtura.config import AdapterConfig, ArmConfig, HeadConfig, UserError
from mixtura.files import check_inside
from mixtura.layers import MixtureOfTokens, RoutingStats
from mixtura.models import MixtureModel
from mixtura.models.inference import mixing_layers, running_in
from mixtura.models.loading import load_config, open_tokenizer
from mixtura.tasks.classification.features import encode_texts, hidden_states, weights_digest
from mixtura.tasks.classification.heads import ClassifierHead, blends_tokens, weighs_tokens
from mixtura.tasks.classification.objectives import THRESHOLD, Objective, OneClass, SeveralLabels
from mixtura.training import saving as checkpoints

Mode = Literal["group", "alone"]


def load_encoder(
    name: str, *, num_layers: int | None, quantize: Quantize = "none"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A pretrained model without any head, frozen and in evaluation mode, and its tokenizer.

    Raises:
        UserError: there is no such model.
    """
    model, tokenizer = load_base(name, num_layers=num_layers, head="encoder", quantize=quantize)
    return without_pooler(model).eval().requires_grad_(False), tokenizer


def without_pooler(model: Any) -> Any:
    """The same model without BERT's pooler, which no head uses: they all read the hidden states."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


class ClassifierOutput(NamedTuple):
    """A classifier's output for a batch."""

    logits_BC: Tensor
    stats: RoutingStats | None
    """Routing of the head's feed-forward layer, where it has one and it was asked for."""
    base_routing: tuple[RoutingStats | None, ...] | None = None
    """Routing of every layer of the model, where it is a mixture of this library that is tuned whole."""


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
        routing = None
        if return_stats and isinstance(self.base, MixtureModel) and not self._frozen_parts:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            outputs = self.base(**inputs, output_hidden_states=True, output_routing=True)
            states, routing = outputs.hidden_states, outputs.routing
        else:
            states = hidden_states(self.base, input_ids, attention_mask)
        return ClassifierOutput(*self.head.forward_tokens(states, attention_mask, return_stats), routing)

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
        """The weights of the layer mix (M,); the mean over a batch's real tokens where they depend on the token."""
        if not (weighs_tokens(self.head.config) and blends_tokens(self.head.config)):
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


MANIFEST = "classifier.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedClassifier:
    """What `classifier.json` says: all that is needed to build the classifier again."""

    base: str
    """Name of the pretrained model, as the recipe has it."""
    num_layers: int | None
    base_digest: str
    """Hash of the pretrained weights."""
    tune: Literal["frozen", "adapter", "full"]
    head: HeadConfig
    adapter: AdapterConfig | None
    baseline_parameters: int | None
    """The number of trained parameters to which an adapter without a rank was matched."""
    num_states: int
    hidden_size: int
    labels: tuple[str, ...]
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    layer: int = -1
    """Which hidden state a head without a blend reads: the last, or the best that was found."""
    several: bool = False
    """Whether a text has any number of the labels, and not one of them."""
    threshold: float = THRESHOLD
    """Probability from which a text is given one of several labels."""
    quantize: Quantize = "none"
    """How the base's linear layers are stored."""

    @property
    def objective(self) -> Objective:
        """What it learns and is judged by."""
        return SeveralLabels(self.threshold) if self.several else OneClass()

    def write(self, model: TextClassifier, folder: Path) -> None:
        """Writes everything but the trained weights."""
        plain = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tokenizer"
        }
        plain["head"] = dataclasses.asdict(self.head)
        plain["adapter"] = None if self.adapter is None else dataclasses.asdict(self.adapter)
        (folder / MANIFEST).write_text(json.dumps({"format": _FORMAT, **plain}, indent=1), encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        base: Any = model.base
        if self.tune == "adapter":
            base.save_pretrained(folder / "adapter")
        if self.tune == "full":
            base.config.save_pretrained(folder / "base")

    def new_head(self) -> ClassifierHead:
        """A freshly initialised head."""
        return ClassifierHead(
            self.head,
            num_states=self.num_states,
            hidden_size=self.hidden_size,
            num_classes=len(self.labels),
            layer=self.layer,
        )


class Answer(NamedTuple):
    """What a classifier says of one text."""

    label: str
    """The likeliest."""
    probability: float
    labels: tuple[str, ...]
    """All that the text is given, the likeliest first: the one class, or any number of labels."""
    probabilities: dict[str, float]
    """Of every label."""
    cut: bool = False
    """Only the beginning of the text was judged, since it is longer than the classifier reads."""


def classify(model_folder: Path, texts: Sequence[str], *, batch_size: int = 32) -> list[Answer]:
    """The labels of new texts, each judged by itself.

    Args:
        model_folder: a finished run's `checkpoint/`.
        texts: any texts; what is longer than the classifier's `max_length` tokens is cut.
        batch_size: texts at once; no answer depends on it.

    Raises:
        UserError: the folder holds no classifier, is damaged, gives no numbers, or its base model has changed.
    """
    saved, model = load_classifier(model_folder)
    examples = encode_texts(texts, np.zeros(len(texts), dtype=np.int64), saved.tokenizer, max_length=saved.max_length)
    answers = []
    for start in range(0, len(texts), batch_size):
        items = [examples.item(index) for index in range(start, min(start + batch_size, len(texts)))]
        batch = examples.collate(items)
        with torch.no_grad():
            logits_BC = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits_BC
        logits_BC = logits_BC.double()
        if not bool(logits_BC.isfinite().all()):
            raise UserError(f"The classifier in '{model_folder}' gives no finite probabilities: train it again.")
        probability_BC = logits_BC.sigmoid() if saved.several else softmax(logits_BC, dim=-1)
        answers += [_answer(row_C, saved) for row_C in probability_BC.tolist()]
    full = [index for index, ids in enumerate(examples.ids) if len(ids) == saved.max_length]
    tokenizer: Any = saved.tokenizer
    for index in full:
        answers[index] = answers[index]._replace(cut=len(tokenizer(texts[index])["input_ids"]) > saved.max_length)
    return answers


def load_classifier(folder: Path) -> tuple[SavedClassifier, TextClassifier]:
    """A finished classifier, ready for inference.

    Raises:
        UserError: the folder holds no classifier, is damaged, or its base model has changed.
    """
    saved = _read(folder)
    head = saved.new_head()
    if saved.tune == "full":
        config = load_config(AutoConfig, folder / "base")
        model = TextClassifier(head, base=without_pooler(AutoModel.from_config(config)))
        checkpoints.load_trained(model, folder)
        return saved, model.eval()
    try:
        base, _ = load_encoder(saved.base, num_layers=saved.num_layers, quantize=saved.quantize)
    except UserError as error:
        raise UserError(
            f"The model '{saved.base}' that the classifier in '{folder}' was trained on cannot be loaded: put it back, "
            "or train again."
        ) from error
    if weights_digest(base) != saved.base_digest:
        raise UserError(
            f"The base model '{saved.base}' is not the one that the classifier in '{folder}' was trained on: put that "
            "model back, or train again."
        )
    frozen_parts = tuple(base.modules())
    whole: nn.Module = base
    if saved.tune == "adapter":
        whole = load_adapter(base, folder / "adapter", trainable=True)  # what trains is read below, with the head
    model = TextClassifier(head, base=whole, frozen_parts=frozen_parts)
    # A head on pooled vectors was trained, and saved, without the model.
    alone = saved.tune == "frozen" and not blends_tokens(saved.head)
    checkpoints.load_trained(TextClassifier(head) if alone else model, folder)
    return saved, model.eval()


def _read(folder: Path) -> SavedClassifier:
    check_inside(folder)
    try:
        plain = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if plain.pop("format") != _FORMAT:
            raise UserError(f"The classifier in '{folder}' is of another version of this library: train it again.")
        head, adapter = plain.pop("head"), plain.pop("adapter")
        if head["feed_forward"] is not None:
            head["feed_forward"] = ArmConfig(**head["feed_forward"])
        if adapter is not None:
            adapter = AdapterConfig(**{**adapter, "targets": tuple(adapter["targets"])})
        plain["labels"] = tuple(plain["labels"])
        tokenizer = open_tokenizer(folder)
        return SavedClassifier(**plain, head=HeadConfig(**head), adapter=adapter, tokenizer=tokenizer)
    except FileNotFoundError:
        raise UserError(
            f"'{folder}' holds no classifier (it has no {MANIFEST}): give the checkpoint folder of a finished run."
        ) from None
    except UserError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"The classifier in '{folder}' is damaged ({error}): train it again.") from error


def _answer(probability_C: list[float], saved: SavedClassifier) -> Answer:
    order = sorted(range(len(saved.labels)), key=probability_C.__getitem__, reverse=True)
    given = [label for label in order if probability_C[label] >= saved.threshold] if saved.several else order[:1]
    return Answer(
        saved.labels[order[0]],
        probability_C[order[0]],
        tuple(saved.labels[label] for label in given),
        dict(zip(saved.labels, probability_C, strict=True)),
    )
