"""Chat tuning as a training task: loss on the assistant's answers alone, answers written and compared at the end.

Shapes: B batch, L length, K positions with a target in any row.
"""

import dataclasses
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixtura.config import AdapterConfig, ChatDataConfig, TrainingConfig, UserError
from mixtura.models import MixtureConfig
from mixtura.models.generation import CHAT_FILE
from mixtura.models.inference import mixing_layers
from mixtura.models.losses import Hidden, run_without_logits
from mixtura.results import Facts
from mixtura.results.run import ChatDetails, ChatSample, ChatScores
from mixtura.tasks.chat.answers import (
    MEASURES,
    BaseReference,
    Judged,
    Question,
    answer,
    interval,
    scores,
    write_judged,
)
from mixtura.tasks.chat.batches import ChatDataset, PackedChats, Prompts, collate_windows, packed_inputs
from mixtura.tasks.tuning import inference_modes, load_tuned, loss_measures, losses_with_routers, running, save_tuned
from mixtura.training import saving as checkpoints
from mixtura.training.interface import Batch, StepLosses, TrainingTask

JUDGED_FILE = "judged.json"
SAMPLES = 4
"""Answers that a report shows."""


@dataclass(frozen=True)
class ChatData:
    """The chats that all arms are trained on and evaluated with."""

    prompts: Prompts
    config: ChatDataConfig
    train: PackedChats
    validation: PackedChats
    test: PackedChats
    questions: list[Question]
    """Of the test chats that are answered."""
    ends: list[int]
    """Tokens that end an answer."""
    facts: Facts
    """Description and counts."""

    @property
    def digest(self) -> str:
        """A hash over all examples."""
        return "-".join(split.digest[:16] for split in (self.train, self.validation, self.test))


@final
class ChatTask(TrainingTask):
    """Learning to answer."""

    decodes = True

    def __init__(
        self,
        data: ChatData,
        config: TrainingConfig,
        *,
        adapter: AdapterConfig | None,
        base: Facts,
        reference: BaseReference | None = None,
    ) -> None:
        """Trains and evaluates as `config` says.

        Args:
            data: the chats.
            config: how all arms are trained.
            adapter: what is on the base model; None tunes it whole.
            base: name and number of layers of the base model.
            reference: what the base makes of the test chats; None for the task that measures it.
        """
        self.data, self.config, self.adapter, self.base, self.reference = data, config, adapter, base, reference
        self._judged: tuple[weakref.ref[nn.Module], Judged] | None = None

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens of a window."""
        return self.data.train.num_tokens / len(self.data.train.windows)

    def settings(self, model: Any) -> Facts:
        """The model's architecture, the adapter, and the facts on the data."""
        return {
            "model": checkpoints.architecture(model.config),
            "adapter": None if self.adapter is None else dataclasses.asdict(self.adapter),
            "base": self.base,
            "data": {**self.data.facts, "digest": self.data.digest},
        }

    def check(self, model: Any, *, batch_size: int) -> None:
        """Refuses too few chats to train on or to evaluate.

        Raises:
            UserError: a split has no window, or fewer than the groups of a mixture need.
        """
        for name, split in (
            ("train on", self.data.train),
            ("validate on", self.data.validation),
            ("test", self.data.test),
        ):
            if not split.windows or (mixing_layers(model) and len(split.windows) < batch_size):
                raise UserError(
                    f"There are {len(split.windows)} windows of chats to {name}, fewer than one batch of {batch_size}: "
                    "lower 'training.batch_size' or 'data.max_length', or give more chats."
                )
        if max(self.data.prompts.tokenizer.get_vocab().values()) >= model.get_input_embeddings().num_embeddings:
            raise UserError("The tokenizer has more tokens than the model: name a base whose tokenizer is its own.")

    def dataset(self, *, length: int, seed: int) -> ChatDataset:
        """The run's windows in order, epochs as needed."""
        return ChatDataset(self.data.train, length=length, seed=seed)

    def collate(self, items: list[Batch]) -> Batch:
        """One micro-batch, padded on the right."""
        return collate_windows(items, pad=self.data.prompts.pad)

    def count_targets(self, batch: Batch) -> Tensor:
        """Tokens of the answers, those that end them included."""
        return batch["labels"].ne(-100).sum()

    def losses(self, model: Any, batch: Batch, *, num_targets: Tensor | int) -> StepLosses:
        """The cross-entropy of the answers, and what a router adds."""
        places_K = _target_places(batch)
        targets_BK = batch["labels"][:, places_K]
        outputs, hidden = self._forward(model, batch, places_K, want_routing=True)
        summed = _nats(outputs.logits, targets_BK).sum() if hidden is None else hidden.summed_loss(targets_BK)
        return losses_with_routers(model, outputs, summed / num_targets, self.adapter)

    def router_loss_weights(self, model: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """The weights of the adapter's losses, where there is an adapter; a frozen base model is not balanced."""
        if self.adapter is not None:
            return self.adapter.router_aux_loss_coef, 0.0
        return super().router_loss_weights(model)

    def evaluate(self, model: Any, *, final: bool) -> dict[str, dict[str, float]]:
        """Loss of the answers in each mode: over validation chats during training, over all test chats at the end.

        At the end the last mode, in which the model is deployed, also answers: `exact_match` and `token_f1`.
        """
        modes = inference_modes(model)
        measured: dict[str, dict[str, float]] = {}
        for mode in modes if not final else modes[:-1]:
            split, most = (self.data.test, None) if final else (self.data.validation, self.config.eval_sequences)
            with running(model, mode):
                nats, tokens = self._nats_of_chats(model, split, most)
            measured[mode] = loss_measures(sum(nats.values()) / sum(tokens.values()))
        self._judged = None
        if final:
            judged = self.judge(model)
            self._judged = (weakref.ref(model), judged)
            found = scores(judged, self.data.questions)
            own = {key: float(found[key][0].mean()) for key in MEASURES[1:]}
            measured[modes[-1]] = loss_measures(judged.loss) | own
        return measured

    def judge(self, model: nn.Module) -> Judged:
        """What the model makes of the test chats, as deployed."""
        with running(model, inference_modes(model)[-1]):
            nats, tokens = self._nats_of_chats(model, self.data.test, None)
            written = answer(
                model,
                self.data.questions,
                ends=self.data.ends,
                pad=self.data.prompts.pad,
                max_new_tokens=self.data.config.max_new_tokens,
            )
        return Judged(nats=nats, tokens=tokens, outputs=[self.data.prompts.decode(ids) for ids in written])

    def details(self, model: nn.Module, *, out: Path) -> ChatDetails:
        """Scores with intervals beside the base's, and samples; writes all answers to `judged.json`."""
        last, self._judged = self._judged, None
        judged = last[1] if last is not None and last[0]() is model else self.judge(model)
        assert self.reference is not None, "only the task that measures the base has none, and it is never trained"
        before = self.reference.judged()
        with checkpoints.writing(out):
            write_judged(out / JUDGED_FILE, judged)
        own, base = scores(judged, self.data.questions), scores(before, self.data.questions)
        found = {
            key: ChatScores(
                own=interval(*own[key]),
                base=interval(*base[key]),
                gain=interval(own[key][0] - base[key][0], own[key][1]),
            )
            for key in MEASURES
        }
        rows = zip(self.data.questions, before.outputs, judged.outputs, strict=True)
        samples = [
            ChatSample(prompt=of.text, reference=of.reference, base=old, output=new)
            for of, old, new in list(rows)[:SAMPLES]
        ]
        return ChatDetails(scores=found, chats=len(judged.nats), answered=len(self.data.questions), samples=samples)

    def save(self, model: Any, folder: Path) -> None:
        """Writes the adapter, or all weights where all are trained."""
        save_tuned(model, folder, self.adapter)

    def load(self, model: Any, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            UserError: the files are damaged or of another model.
        """
        load_tuned(model, folder, self.adapter)

    def save_for_use(self, model: Any, folder: Path) -> None:
        """Adds the tokenizer with its chat template, and what `generate` reads: the base, and what ends an answer."""
        if self.adapter is None and getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = list(self.data.ends)
        self.save(model, folder)
        self.data.prompts.tokenizer.save_pretrained(folder)
        settings = {"base": self.base, "ends": list(self.data.ends)}
        (folder / CHAT_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def batches(self, model: nn.Module, split: PackedChats, most: int | None) -> Iterator[Batch]:
        """The first `most` windows of a split, on the model's device.

        Mixtures of tokens want whole batches, so the last one is filled with windows from the start, without targets.
        """
        size, number = self.config.batch_size, min(most or len(split.windows), len(split.windows))
        device = next(model.parameters()).device
        for start in range(0, number, size):
            items = [split.item(i) for i in range(start, min(start + size, number))]
            if mixing_layers(model):
                spare = [split.item(i % number) for i in range(size - len(items))]
                items += [{**item, "targets": torch.zeros_like(item["targets"])} for item in spare]
            yield {name: value.to(device) for name, value in self.collate(items).items()}

    def _forward(self, model: Any, batch: Batch, places_K: Tensor, *, want_routing: bool) -> tuple[Any, Hidden | None]:
        """The model's output with logits for the targets at those places, or what its head was given in their place."""
        config = getattr(model, "module", model).config
        wanted: Batch = {}
        if want_routing and self.adapter is None and isinstance(config, MixtureConfig):
            wanted["output_routing"] = True
        elif getattr(config, "output_router_logits", False):
            # transformers' balance loss reads a mask (B, L), which packed chats do not have.
            wanted["output_router_logits"] = False
        wanted |= packed_inputs(model, batch) | {"use_cache": False, "logits_to_keep": (places_K - 1).clamp(min=0)}
        return run_without_logits(model, lambda: model(**wanted), rows=len(batch["labels"]) * len(places_K))

    def _nats_of_chats(
        self, model: nn.Module, split: PackedChats, most: int | None
    ) -> tuple[dict[int, float], dict[int, int]]:
        """Summed nats and the number of targets of every chat."""
        nats: dict[int, float] = {}
        tokens: dict[int, int] = {}
        for batch in self.batches(model, split, most):
            places_K = _target_places(batch)
            targets_BK = batch["labels"][:, places_K]
            outputs, hidden = self._forward(model, batch, places_K, want_routing=False)
            nats_BK = _nats(outputs.logits, targets_BK) if hidden is None else hidden.nats(targets_BK)
            real_BK = targets_BK.ne(-100)
            chats = batch["chats"][:, places_K][real_BK].tolist()
            for chat, value in zip(chats, nats_BK[real_BK].double().tolist(), strict=True):
                nats[chat] = nats.get(chat, 0.0) + value
                tokens[chat] = tokens.get(chat, 0) + 1
        return nats, tokens


def _target_places(batch: Batch) -> Tensor:
    """The places (K,) where some row has a target: the head, a large part of a small model, runs for these alone."""
    return batch["labels"].ne(-100).any(0).nonzero().squeeze(1)


def _nats(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """The cross-entropy of every target (B, K), zero where there is none."""
    return cross_entropy(logits_BKV.float().flatten(0, 1), targets_BK.flatten(), reduction="none").view_as(targets_BK)
