"""A finished classifier in a folder, and its answers to new texts.

The folder has `classifier.json` (what the parts are), `model.safetensors` (everything that was trained), the tokenizer,
and `adapter/` in PEFT's format or the tuned model's configuration in `base/`. What stayed frozen is not copied: it is
loaded from where it came from, and refused when it has changed.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import softmax
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from mixtura.adapters.attach import load_adapter
from mixtura.config import AdapterConfig, ArmConfig, HeadConfig, UserError
from mixtura.tasks.classification.classifier import TextClassifier, load_encoder, without_pooler
from mixtura.tasks.classification.features import encode_texts, weights_digest
from mixtura.tasks.classification.heads import ClassifierHead, blends_tokens
from mixtura.training import saving as checkpoints

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
    """What an adapter without a rank was matched to."""
    num_states: int
    hidden_size: int
    labels: tuple[str, ...]
    max_length: int
    tokenizer: PreTrainedTokenizerBase

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
            self.head, num_states=self.num_states, hidden_size=self.hidden_size, num_classes=len(self.labels)
        )


class Answer(NamedTuple):
    """What a classifier says of one text."""

    label: str
    probability: float
    probabilities: dict[str, float]
    """Of every label."""


def classify(model_folder: Path, texts: Sequence[str], *, batch_size: int = 32) -> list[Answer]:
    """The labels of new texts, each judged by itself.

    Args:
        model_folder: a finished run's `checkpoint/`.
        texts: any texts; what is longer than the classifier's `max_length` tokens is cut.
        batch_size: texts at once; no answer depends on it.

    Raises:
        UserError: the folder holds no classifier, is damaged, or its base model has changed.
    """
    saved, model = load_classifier(model_folder)
    examples = encode_texts(texts, [0] * len(texts), saved.tokenizer, max_length=saved.max_length)
    answers = []
    for start in range(0, len(texts), batch_size):
        items = [examples.item(index) for index in range(start, min(start + batch_size, len(texts)))]
        batch = examples.collate(items)
        with torch.no_grad():
            logits_BC = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits_BC
        answers += [_answer(row_C, saved.labels) for row_C in softmax(logits_BC.double(), dim=-1).tolist()]
    return answers


def load_classifier(folder: Path) -> tuple[SavedClassifier, TextClassifier]:
    """A finished classifier, ready for inference.

    Raises:
        UserError: the folder holds no classifier, is damaged, or its base model has changed.
    """
    saved = _read(folder)
    head = saved.new_head()
    if saved.tune == "full":
        config = AutoConfig.from_pretrained(folder / "base", local_files_only=True)
        model = TextClassifier(head, base=without_pooler(AutoModel.from_config(config)))
        checkpoints.load_trained(model, folder)
        return saved, model.eval()
    base, _ = load_encoder(saved.base, num_layers=saved.num_layers)
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
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return SavedClassifier(**plain, head=HeadConfig(**head), adapter=adapter, tokenizer=tokenizer)
    except FileNotFoundError:
        raise UserError(
            f"'{folder}' holds no classifier (it has no {MANIFEST}): give the checkpoint folder of a finished run."
        ) from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"The classifier in '{folder}' is damaged ({error}): train it again.") from error


def _answer(probability_C: list[float], labels: Sequence[str]) -> Answer:
    best = max(range(len(labels)), key=probability_C.__getitem__)
    return Answer(labels[best], probability_C[best], dict(zip(labels, probability_C, strict=True)))
