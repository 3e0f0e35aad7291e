"""One classifier of a comparison: how it is built, what it costs, and whether the texts of a batch see each other.

Shapes: N texts, B batch, L length, M hidden states, D hidden.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.expert_specialized import SAMPLE_SIZE
from mixtura.adapters.targets import count_parameters, measured_flops_per_token
from mixtura.config import ClassificationArmConfig, ClassificationRecipe
from mixtura.config.arm import has_setting
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm, probe_layer
from mixtura.models import MixtureConfig
from mixtura.models.inference import running_in
from mixtura.planning import active_parameters, model_parameters
from mixtura.results import ArmDescription, Facts, Leaks
from mixtura.tasks.classification.best_layer import BestLayer
from mixtura.tasks.classification.classifier import SavedClassifier, TextClassifier, evaluation_modes
from mixtura.tasks.classification.features import FeatureExamples, hidden_states
from mixtura.tasks.classification.heads import head_settings, inactive_parameters
from mixtura.tasks.classification.task import Classification, RouterLossWeights, Splits
from mixtura.tasks.tuning import naming_adapter
from mixtura.training.interface import Arm, Batch


@dataclass(frozen=True)
class Pretrained:
    """The model that all arms start from, loaded once."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    digest: str
    num_states: int
    hidden_size: int


class ClassificationArm(Arm):
    """One classifier of a comparison."""

    def __init__(
        self,
        name: str,
        config: ClassificationArmConfig,
        recipe: ClassificationRecipe,
        *,
        pretrained: Pretrained,
        splits: Splits,
        saved: SavedClassifier,
        data_digest: str,
        best_layer: BestLayer | None = None,
        at_budget: Callable[[int, int], "ClassificationArm"] | None = None,
    ) -> None:
        """Puts together what was prepared for all arms; `make_classification` calls this."""
        self.name, self.label = name, name.replace("_", " ")
        self.config, self.pretrained, self.splits, self.saved = config, pretrained, splits, saved
        self.best_layer, self._at_budget = best_layer, at_budget
        self.family = _family(config)
        self.learning_rate = config.learning_rate or recipe.training.learning_rate
        self.task = Classification(
            splits,
            saved,
            settings={"model": _plain(saved), "data": data_digest},
            eval_examples=recipe.training.eval_sequences,
            batch_size=recipe.training.batch_size,
            weights=_router_loss_weights(config, pretrained.model.config),
        )
        modes = evaluation_modes(self.build(seed=0))
        self.training_mode, self.deployed_mode = modes[0], "alone"

    def at_budget(self, rows: int, *, seed: int) -> "ClassificationArm":
        """The arm on so few training texts of each class; a best layer is chosen by them too."""
        assert self._at_budget is not None, "make_classification gives it"
        return self._at_budget(rows, seed)

    @property
    def reads_features(self) -> bool:
        """Whether it can be trained on pooled vectors of the frozen model, which are computed once."""
        return isinstance(self.splits.train, FeatureExamples)

    def build(self, seed: int) -> TextClassifier:
        """An untrained classifier; with the same seed, every arm gets the same linear classifier."""
        torch.manual_seed(seed)
        head = self.saved.new_head()
        if self.reads_features:
            return TextClassifier(head)
        if self.config.tune == "frozen":
            return TextClassifier(head, base=self.pretrained.model, frozen_parts=tuple(self.pretrained.model.modules()))
        base = copy.deepcopy(self.pretrained.model)
        if self.config.adapter is None:
            return TextClassifier(head, base=base.requires_grad_(True))
        frozen_parts, fitted = tuple(base.modules()), self.saved.baseline_parameters
        with naming_adapter(self.name):
            adapted = apply_adapter(
                base, self.config.adapter, baseline_parameters=fitted, sample=self._sample(), seed=seed
            )
        return TextClassifier(head, base=adapted, frozen_parts=frozen_parts)

    def _sample(self) -> Iterator[Batch]:
        """Some training texts, from which adapters find out which experts to tune."""
        examples = self.splits.train
        for index in range(min(SAMPLE_SIZE, len(examples.labels))):
            batch = examples.collate([examples.item(index)])
            yield {key: value for key, value in batch.items() if key != "labels"}

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of a training step, measured by torch's counter, for each real token."""
        model, task = self.build(seed=0).train(), self.task
        count = max((layer.group_size for layer in model.mixing_layers()), default=1)
        examples = self.splits.train
        # Texts of the middle length, so that padding adds nothing.
        order_N = np.argsort(examples.length_N, kind="stable")
        chosen = [int(order_N[len(order_N) // 2])] * count
        batch = task.collate([examples.item(index) for index in chosen])
        tokens = count * int(examples.length_N[chosen[0]])
        return measured_flops_per_token(model, lambda: task.losses(model, batch, num_targets=count).task_loss, tokens)

    def describe(self, baseline: Arm) -> ArmDescription:
        """What it is and costs; the FLOPs of an arm on cached features are those of its head alone, and say so."""
        assert isinstance(baseline, ClassificationArm)
        model = self.build(seed=0)
        total, trainable = count_parameters(model)
        if self.reads_features:
            total += count_parameters(self.pretrained.model)[0]
        settings: Facts = {"tune": self.config.tune, **head_settings(self.config.head)}
        if self.best_layer is not None:
            settings["layer"] = str(self.best_layer)
        if self.config.adapter is not None:
            settings["adapter"] = self.config.adapter.method
        if self.reads_features:
            settings["FLOPs"] = f"head alone; features once, {self._feature_flops():.3g} a token"
        return ArmDescription(
            settings=settings,
            parameters_total=total,
            parameters_active=total - self._inactive_parameters(),
            parameters_trainable=trainable,
            flops_per_token=self.flops_per_token,
            flops_ratio=self.flops_per_token / baseline.flops_per_token,
        )

    def leaks(self) -> Leaks:
        """Whether the texts of a batch see each other; a classifier may read its whole text, so no future leaks."""
        # Groups as in training, but not train(): what a dropout changes at random would pass for a leak.
        model = _without_zeros(self.build(seed=0)).eval()
        with running_in(model.mixing_layers(), "group"):
            trained = self._probe(model)
        return Leaks(future=False, batch=trained.batch, batch_deployed=self._probe(model).batch)

    def _probe(self, model: TextClassifier) -> LeakReport:
        batch = max([4, *(layer.group_size for layer in model.mixing_layers())])
        if self.reads_features:
            head = copy.deepcopy(model.head).double()
            states = self.splits.train.item(0)["features"].shape[0]
            return probe_layer(
                lambda x_BMD: head(x_BMD)[0], hidden_size=self.saved.hidden_size, batch=batch, length=max(2, states)
            )
        # Few probes are enough: a whole model is slow, and any probe shows a leak through a mixture of tokens.
        vocab_size = len(self.pretrained.tokenizer)
        return probe_causal_lm(_Logits(model), vocab_size=vocab_size, batch=batch, length=4, num_probes=4)

    def _inactive_parameters(self) -> int:
        """Parameters that a token leaves unused in the head and in our own base models; adapters run all experts."""
        inactive = inactive_parameters(self.config.head, self.saved.hidden_size)
        config: Any = self.pretrained.model.config
        if isinstance(config, MixtureConfig):
            length = self._median_length()
            inactive += model_parameters(config) - active_parameters(config, sequence_length=length, deployed=True)
        return inactive

    def _feature_flops(self) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids_BL = torch.full((1, self._median_length()), 5)
            hidden_states(self.pretrained.model, ids_BL, torch.ones_like(ids_BL))
        return counter.get_total_flops() / self._median_length()

    def _median_length(self) -> int:
        return int(np.median(self.splits.train.length_N))


@torch.no_grad()
def _without_zeros(model: TextClassifier) -> TextClassifier:
    """The model with small random numbers where weights start at zero, so that an untrained adapter can show a leak."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


class _Logits(nn.Module):
    """A classifier as a leak probe calls it."""

    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BL: torch.Tensor) -> Any:
        output = self.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
        return _Output(output.logits_BC)


@dataclass(frozen=True)
class _Output:
    logits: torch.Tensor


def _family(config: ClassificationArmConfig) -> str:
    if config.adapter is not None:
        return config.adapter.method
    return config.head.feed_forward.family if config.head.feed_forward is not None else config.head.kind


def _plain(saved: SavedClassifier) -> Facts:
    fields = {
        field.name: getattr(saved, field.name) for field in dataclasses.fields(saved) if field.name != "tokenizer"
    }
    return json.loads(json.dumps(fields, default=dataclasses.asdict))


def _router_loss_weights(config: ClassificationArmConfig, base: Any) -> RouterLossWeights:
    """Weights of the losses that balance token choice, in the head, and in the base model where that is trained."""
    head = adapter = (0.0, 0.0)
    layer = config.head.feed_forward
    if layer is not None and has_setting(layer.family, "router_aux_loss_coef"):
        head = (layer.router_aux_loss_coef, layer.router_z_loss_coef)
    if config.adapter is not None and config.adapter.method == "mixture_of_lora" and config.adapter.router != "task":
        adapter = (config.adapter.router_aux_loss_coef, 0.0)
    tuned = config.tune == "full" and isinstance(base, MixtureConfig) and base.route_by == "token"
    if tuned and "token_choice" in (base.mlp_layer_types or []):
        adapter = (base.router_aux_loss_coef, base.router_z_loss_coef)
    return RouterLossWeights(head, adapter)
