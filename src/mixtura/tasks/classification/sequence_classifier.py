"""A finished classifier as a model of transformers: for its pipelines, its Trainer and whatever reads such folders.

No stock class has these heads, which normalise, choose or mix layers and pool; so the class is ours, and folders of it
are read after `import mixtura.tasks.classification.sequence_classifier`. A folder holds everything, the base model too.

Shapes: B batch, L length, C classes or labels.
"""

import dataclasses
from pathlib import Path
from typing import Any, final

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from mixtura.config import ArmConfig, HeadConfig, UserError
from mixtura.files import check_empty, new_folder
from mixtura.tasks.classification.classifier import TextClassifier, load_classifier, without_pooler
from mixtura.tasks.classification.heads import ClassifierHead


@final
class TextClassifierConfig(PreTrainedConfig):
    """The base model's configuration, the head's keys, the labels, and whether a text has one of them or several."""

    model_type = "mixtura_text_classifier"

    base: dict | None = None
    head: dict | None = None
    num_states: int = 1
    layer: int = -1
    """Which hidden state a head without a blend reads."""
    threshold: float | None = None
    """Probability from which a text is given one of several labels; None where it has one class."""


@final
class TextClassifierForSequenceClassification(PreTrainedModel):
    """A base model and a head; texts of a batch never see each other."""

    config_class = TextClassifierConfig
    config: TextClassifierConfig
    base_model_prefix = "base"

    def __init__(self, config: TextClassifierConfig) -> None:
        """Builds it with fresh weights."""
        super().__init__(config)
        assert config.base is not None and config.head is not None
        base_config = AutoConfig.for_model(**config.base)
        base = without_pooler(AutoModel.from_config(base_config))
        self.classifier = TextClassifier(
            ClassifierHead(
                _head(config.head),
                num_states=config.num_states,
                hidden_size=base_config.get_text_config().hidden_size,
                num_classes=config.num_labels or 0,
                layer=config.layer,
            ),
            base=base,
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Ids and mask (B, L) -> logits (B, C), and the loss of `config.problem_type` where there are labels."""
        mask_BL = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        logits_BC = self.classifier(input_ids=input_ids, attention_mask=mask_BL).logits_BC
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits_BC, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)

    def _init_weights(self, module: Any) -> None:
        """Nothing: parts are drawn by themselves."""


def export_classifier(checkpoint: Path, out: Path) -> None:
    """Writes a finished classifier as a folder that `AutoModelForSequenceClassification` reads, tokenizer included.

    Args:
        checkpoint: a finished run's `checkpoint/`.
        out: made.

    Raises:
        UserError: there is no classifier, its adapter cannot be merged, or `out` is not empty.
    """
    check_empty(out)
    saved, model = load_classifier(checkpoint)
    base: Any = model.base
    if saved.adapter is not None:
        if saved.adapter.method not in ("lora", "expert_specialized"):
            raise UserError(
                f"The adapter of '{checkpoint}' is a {saved.adapter.method.replace('_', ' ')}, which cannot be merged "
                "into its base: use `mixtura classify`, or export a classifier that is frozen, full or has a lora."
            )
        base = base.merge_and_unload()
    config = TextClassifierConfig(
        base=base.config.to_dict(),
        head=dataclasses.asdict(saved.head),
        num_states=saved.num_states,
        layer=saved.layer,
        id2label=dict(enumerate(saved.labels)),
        label2id={label: index for index, label in enumerate(saved.labels)},
        problem_type="multi_label_classification" if saved.several else "single_label_classification",
        threshold=saved.threshold if saved.several else None,
    )
    exported = TextClassifierForSequenceClassification(config)
    exported.classifier.head.load_state_dict(model.head.state_dict())
    assert exported.classifier.base is not None
    exported.classifier.base.load_state_dict(base.state_dict())
    tokenizer: Any = saved.tokenizer
    tokenizer.model_max_length = saved.max_length
    with new_folder(out) as new:
        exported.save_pretrained(new)
        tokenizer.save_pretrained(new)


def _head(table: dict) -> HeadConfig:
    layer = table.get("feed_forward")
    return HeadConfig(**{**table, "feed_forward": None if layer is None else ArmConfig(**layer)})


AutoConfig.register(TextClassifierConfig.model_type, TextClassifierConfig)
AutoModelForSequenceClassification.register(TextClassifierConfig, TextClassifierForSequenceClassification)
