"""The arms of a comparison of chat models: what each trains of the base, costs and leaks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.expert_specialized import SAMPLE_SIZE
from mixtura.adapters.targets import count_parameters, measured_flops_per_token
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import ChatRecipe
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm
from mixtura.results import ArmDescription, Leaks
from mixtura.tasks.chat.answers import BaseReference
from mixtura.tasks.chat.batches import collate_windows, packed_inputs
from mixtura.tasks.chat.task import ChatData, ChatTask
from mixtura.tasks.tuning import PROBED_LAYERS, adapter_settings, find_leaks, mixed_examples, stirred
from mixtura.training.interface import Arm


@final
class ChatArm(Arm):
    """One side of a comparison of chat models."""

    def __init__(self, recipe: ChatRecipe, name: str, data: ChatData, reference: BaseReference) -> None:
        """Arm `name` of a recipe; raises UserError where groups do not fill the batch."""
        config, base = recipe.arms[name], recipe.base
        assert base.name is not None, "the recipe's checks want a base"
        self.name, self._recipe, self._config, self._data = name, recipe, config, data
        self.family = "full" if config.adapter is None else config.adapter.method
        self.label = name.replace("_", " ")
        self._group_size = mixed_examples(base.name, config.adapter, arm=name, batch_size=recipe.training.batch_size)
        self.training_mode, self.deployed_mode = ("group", "alone") if self._group_size else ("causal", "causal")
        self.learning_rate = config.learning_rate or recipe.training.learning_rate
        self.task = ChatTask(
            data,
            recipe.training,
            adapter=config.adapter,
            base={"name": base.name, "num_layers": base.num_layers},
            reference=reference,
        )

    def build(self, seed: int) -> nn.Module:
        """The base model, with a fresh adapter where the arm has one."""
        return self._built(seed, self._recipe.base.num_layers)

    def _built(self, seed: int, num_layers: int | None) -> nn.Module:
        torch.manual_seed(seed)
        model, _ = load_base(str(self._recipe.base.name), num_layers=num_layers)
        adapter = self._config.adapter
        if adapter is None:
            return model
        return apply_adapter(
            model,
            adapter,
            baseline_parameters=_baseline_parameters(self._recipe, num_layers) if adapter.solves_rank else None,
            sample=_sample(self._data, self._recipe.training.batch_size),
            seed=seed,
        )

    def describe(self, baseline: Arm) -> ArmDescription:
        """What it is and costs; FLOPs are measured."""
        assert isinstance(baseline, ChatArm)
        own, other = self._costs, baseline._costs
        return dataclasses.replace(own, flops_ratio=own.flops_per_token / other.flops_per_token)

    @functools.cached_property
    def _costs(self) -> ArmDescription:
        """What it is and costs, as if it were the baseline; a mixture of adapters runs all its experts."""
        model = self.build(0).train()
        total, trained = count_parameters(model)
        # Rows of one length, so that all arms are measured without padding, and with half of the tokens as targets.
        length = min(32, max(2, round(self.task.tokens_per_example)))
        tokens = torch.full((length,), self._data.prompts.eos)
        row = {
            "tokens": tokens,
            "targets": torch.arange(length) >= length // 2,
            "segments": torch.ones_like(tokens),
            "chats": torch.zeros_like(tokens),
        }
        batch = self.task.collate([row] * (self._group_size or 2))
        flops = measured_flops_per_token(
            model, lambda: self.task.losses(model, batch, num_targets=1).task_loss, tokens=batch["input_ids"].numel()
        )
        return ArmDescription(
            settings=adapter_settings(self._config.adapter),
            parameters_total=total,
            parameters_active=total,
            parameters_trainable=trained,
            flops_per_token=flops,
            flops_ratio=1.0,
        )

    def leaks(self) -> Leaks:
        """Whether information leaks from the future, or between chats of a window or a batch; probes a small model."""
        layers = min(self._recipe.base.num_layers or PROBED_LAYERS, PROBED_LAYERS)
        model = stirred(self._built(0, layers)).eval()
        return find_leaks(model, self._leak)

    def _leak(self, model: Any) -> LeakReport:
        size = model.get_input_embeddings().num_embeddings
        rows = 2 * (self._group_size or 2)
        return probe_causal_lm(TwoInAWindow(model), vocab_size=size, batch=rows, length=8, num_probes=12)


@final
class TwoInAWindow(nn.Module):
    """A model as a leak probe calls it: ids (B, L) -> logits (B, L, V), where each window has two rows packed in it.

    A leak between the chats of a window then is one between examples of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model` is a causal language model."""
        super().__init__()
        self.model = model

    def forward(self, ids_BL: Tensor) -> Any:
        """The model's output, with logits by example."""
        rows, length = ids_BL.shape
        segments_W = torch.arange(1, 3).repeat_interleave(length)
        chats_W = torch.zeros_like(segments_W)
        items = [
            {"tokens": tokens_W, "targets": chats_W.bool(), "segments": segments_W, "chats": chats_W}
            for tokens_W in ids_BL.cpu().reshape(rows // 2, 2 * length)
        ]
        batch = {name: value.to(ids_BL.device) for name, value in collate_windows(items, pad=0).items()}
        outputs = self.model(**packed_inputs(self.model, batch), use_cache=False)
        outputs.logits = outputs.logits.reshape(rows, length, -1)
        return outputs


def base_reference(recipe: ChatRecipe, data: ChatData, cache_dir: Any) -> BaseReference:
    """What the base makes of the test chats, kept beside the run's other prepared data."""
    base = {"name": recipe.base.name, "num_layers": recipe.base.num_layers}
    task = ChatTask(data, recipe.training, adapter=None, base=base)
    build: Callable[[], nn.Module] = lambda: load_base(str(base["name"]), num_layers=recipe.base.num_layers)[0]  # noqa: E731
    file = None if cache_dir is None else cache_dir / f"base-{data.digest}.json"
    return BaseReference(task.judge, build, file)


def _sample(data: ChatData, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Some training chats, the same for every seed, from which adapters find out which experts to tune."""
    chosen = data.train.examples[:SAMPLE_SIZE]
    single = dataclasses.replace(data.train, examples=chosen, windows=[[place] for place in range(len(chosen))])
    for start in range(0, len(chosen), batch_size):
        items = [single.item(index) for index in range(start, min(start + batch_size, len(chosen)))]
        batch = collate_windows(items, pad=data.prompts.pad)
        yield {"input_ids": batch["input_ids"], "attention_mask": (batch["segments"] > 0).long()}


def _baseline_parameters(recipe: ChatRecipe, num_layers: int | None) -> int | None:
    """Trained parameters of the baseline, to which arms without a rank are matched; None if it has no rank itself."""
    baseline = recipe.arms[recipe.baseline].adapter
    if baseline is None or baseline.rank is None:
        return None
    model, _ = load_base(str(recipe.base.name), num_layers=num_layers)
    return count_parameters(apply_adapter(model, baseline, seed=0))[1]
