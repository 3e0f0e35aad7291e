"""Translation as a training task: loss on the translation alone, scores by decoding at the end.

Shapes: B batch, L length, V vocabulary.
"""

import dataclasses
import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.config import AdapterConfig, TrainingConfig, UserError
from mixtura.diagnostics.choices import routed_layers
from mixtura.files import write_text
from mixtura.models import MixtureConfig
from mixtura.models.inference import mixing_layers
from mixtura.models.losses import run_and_sum
from mixtura.results import Facts
from mixtura.results.json_form import from_plain, to_plain
from mixtura.results.run import PairScores, Sample, Specialization, TranslationDetails
from mixtura.tasks.translation.batches import EncodedPairs, PairDataset, collate_rows
from mixtura.tasks.translation.chrf import Scores, mean_scores, score
from mixtura.tasks.translation.comet import KEY as COMET_KEY
from mixtura.tasks.translation.comet import comet_scores, means_by_direction
from mixtura.tasks.translation.decoding import ExampleRouting
from mixtura.tasks.translation.encoder_decoder import (
    AnyPrompts,
    EncoderDecoderPrompts,
    collate_pairs,
    decode_prompts,
    forward_pairs,
)
from mixtura.tasks.translation.engine import DIRECTIONS as ENGINE_DIRECTIONS
from mixtura.tasks.translation.engine import engine_outputs
from mixtura.tasks.translation.experts_by_direction import measure_directions, measure_sides
from mixtura.tasks.tuning import inference_modes, load_tuned, loss_measures, losses_with_routers, running, save_tuned
from mixtura.training import saving as checkpoints
from mixtura.training.interface import Batch, Measure, StepLosses, TrainingTask
from mixtura.upcycling.copied_layers import mixture_losses

TRANSLATION_FILE = "translation.json"
OUTPUTS_FILE = "outputs.jsonl"
SAMPLES = 2
"""Outputs of each direction that a report shows."""


@dataclass(frozen=True)
class TranslationData:
    """The sentence pairs that all arms are trained on and evaluated with."""

    prompts: AnyPrompts
    directions: tuple[str, ...]
    """Such as "en-de"."""
    train: EncodedPairs
    validation: EncodedPairs
    test: EncodedPairs
    max_length: int
    facts: Facts
    """Description and counts."""

    @property
    def vocab_size(self) -> int:
        """Of a model for these tokens."""
        return max(self.prompts.tokenizer.get_vocab().values()) + 1

    @property
    def digest(self) -> str:
        """A hash over all examples."""
        return "-".join(split.digest[:16] for split in (self.train, self.validation, self.test))


@dataclass(frozen=True)
class DecodedTest:
    """Outputs for the test sentences, in their order."""

    greedy: list[str]
    beam: list[str] | None
    comet: list[float] | None = None
    """COMET of the greedy ones, where asked for."""


@final
class TranslationTask(TrainingTask):
    """Trains a causal language model, with or without an adapter, to translate."""

    measure = Measure("chrf", "chrF", "points", "higher", 2)

    def __init__(
        self,
        data: TranslationData,
        config: TrainingConfig,
        *,
        routing: ExampleRouting,
        adapter: AdapterConfig | None = None,
        upcycled: tuple[float, float] | None = None,
        base: Facts | None = None,
        num_beams: int = 1,
        comet: str | None = None,
    ) -> None:
        """Trains and evaluates as `config` says.

        Args:
            data: sentence pairs.
            config: how all arms are trained.
            routing: how the model gets the experts of an example.
            adapter: what is on the base model.
            upcycled: the weights of load-balancing and z-loss, where the base model's layers became mixtures.
            base: name and number of layers of the base model, None from scratch.
            num_beams: also decode with so many beams, if more than one.
            comet: a checkpoint to score the greedy outputs with too.
        """
        self.data, self.config, self.routing = data, config, routing
        self.adapter, self.upcycled, self.base, self.num_beams = adapter, upcycled, base, num_beams
        self.comet = comet
        self._decoded: tuple[weakref.ref[nn.Module], DecodedTest] | None = None

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens of prompt and translation."""
        return float(self.data.train.length_N.mean())

    def settings(self, model: Any) -> Facts:
        """The model's architecture, the adapter, and the facts on the data."""
        adapter = None if self.adapter is None else dataclasses.asdict(self.adapter)
        routing = self.routing.expert_of_direction
        return {
            "model": checkpoints.architecture(model.config),
            "adapter": adapter,
            "base": self.base,
            "routing": None if routing is None else list(routing),
            "data": {**self.data.facts, "digest": self.data.digest},
        }

    def check(self, model: Any, *, batch_size: int) -> None:
        """Refuses a model for a smaller vocabulary, and too few sentences to train on or to evaluate.

        Raises:
            UserError: the model's vocabulary is too small, or a split has fewer sentences than a batch.
        """
        for name, split in (
            ("train on", self.data.train),
            ("hold out", self.data.validation),
            ("test", self.data.test),
        ):
            if not split.sentences or (mixing_layers(model) and len(split.sentences) < batch_size):
                raise UserError(
                    f"There are {len(split.sentences)} sentence pairs to {name}, fewer than one batch of {batch_size}: "
                    "lower 'training.batch_size', or raise 'data.validation_sources' or 'data.test_sources'."
                )
        vocabulary = max(self.data.prompts.tokenizer.get_vocab().values()) + 1
        if vocabulary > model.get_input_embeddings().num_embeddings:
            raise UserError(f"The tokenizer has {vocabulary} tokens, more than the model: build the model for it.")

    def dataset(self, *, length: int, seed: int) -> PairDataset:
        """The run's pairs in order, epochs as needed."""
        return PairDataset(
            self.data.train, names=self.data.directions, length=length, batch_size=self.config.batch_size, seed=seed
        )

    def collate(self, items: list[Batch]) -> Batch:
        """One micro-batch, padded on the right."""
        if isinstance(self.data.prompts, EncoderDecoderPrompts):
            return collate_pairs(items, self.data.prompts, self.data.directions)
        return collate_rows(items, pad=self.data.prompts.pad)

    def count_targets(self, batch: Batch) -> Tensor:
        """Tokens of the translations, eos included."""
        return batch["labels"].ne(-100).sum()

    def losses(self, model: Any, batch: Batch, *, num_targets: Tensor | int) -> StepLosses:
        """The cross-entropy of the translations, and what a router adds."""
        outputs, summed = self._forward(model, batch, want_routing=True)
        if self.upcycled is not None:
            return StepLosses(summed / num_targets, *mixture_losses(model))
        return losses_with_routers(model, outputs, summed / num_targets, self.adapter)

    def router_loss_weights(self, model: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """The weights of the adapter's losses, where there is an adapter; a frozen base model is not balanced."""
        if self.adapter is not None:
            return self.adapter.router_aux_loss_coef, 0.0
        return super().router_loss_weights(model) if self.upcycled is None else self.upcycled

    def evaluate(self, model: Any, *, final: bool) -> dict[str, dict[str, float]]:
        """Loss of the translations in each mode: over validation pairs during training, over test pairs at the end.

        At the end the last mode, in which the model is deployed, also decodes the test sentences: `chrf`, `chrf_pp`
        and `bleu` are means over directions.
        """
        split, most = (
            (self.data.test, self.config.final_eval_sequences)
            if final
            else (self.data.validation, self.config.eval_sequences)
        )
        measured: dict[str, dict[str, float]] = {}
        for mode in inference_modes(model):
            with running(model, mode):
                loss = self._mean_loss(model, split, most)
            measured[mode] = loss_measures(loss)
        self._decoded = None
        if final:
            decoded = self.decode_test(model)
            self._decoded = (weakref.ref(model), decoded)
            measured[inference_modes(model)[-1]] |= mean_scores(self._scores(decoded.greedy)[0])
            if comet := means_by_direction(decoded.comet, self.data.test.sentences):
                measured[inference_modes(model)[-1]]["comet"] = sum(comet.values()) / len(comet)
        return measured

    def decode_test(self, model: nn.Module) -> DecodedTest:
        """Translations of the test sentences by the deployed model."""
        with running(model, inference_modes(model)[-1]):
            greedy = self._decode(model, num_beams=1)
            beam = self._decode(model, num_beams=self.num_beams) if self.num_beams > 1 else None
        comet = None if self.comet is None else comet_scores(self.comet, self.data.test.sentences, greedy)
        return DecodedTest(greedy, beam, comet)

    def details(self, model: nn.Module, *, out: Path) -> TranslationDetails:
        """Scores by direction, signatures and samples; writes all outputs to `outputs.jsonl`."""
        last, self._decoded = self._decoded, None
        decoded = last[1] if last is not None and last[0]() is model else self.decode_test(model)
        sentences = self.data.test.sentences
        scores, signatures = self._scores(decoded.greedy)
        sources = [pair.source for pair in sentences]
        copied, _ = self._scores(sources)
        beams = self._scores(decoded.beam)[0] if decoded.beam is not None else {}
        comet = means_by_direction(decoded.comet, sentences)
        of_sources = comet_scores(self.comet, sentences, sources) if self.comet else None
        copied_comet = means_by_direction(of_sources, sentences)
        engine = self._engine_scores()
        pairs = {
            name: PairScores(
                **found._asdict(),
                copy_chrf=copied[name].chrf,
                copy_bleu=copied[name].bleu,
                sentences=len(self._rows_of(name)),
                beam_chrf=beams[name].chrf if beams else None,
                beam_bleu=beams[name].bleu if beams else None,
                comet=comet.get(name),
                copy_comet=copied_comet.get(name),
                **{f"engine_{key}": value for key, value in engine.get(name, {}).items()},
            )
            for name, found in scores.items()
        }
        records = [
            Sample(pair=pair.pair, source=pair.source, reference=pair.target, output=output)
            for pair, output in zip(sentences, decoded.greedy, strict=True)
        ]
        further = {"beam": decoded.beam, COMET_KEY: decoded.comet}
        beamed = [{key: of[i] for key, of in further.items() if of is not None} for i in range(len(records))]
        with checkpoints.writing(out):
            lines = [
                json.dumps({**to_plain(record), **beam}, ensure_ascii=False) + "\n"
                for record, beam in zip(records, beamed, strict=True)
            ]
            write_text(out / OUTPUTS_FILE, "".join(lines))
        return TranslationDetails(
            pairs=pairs,
            signatures=signatures,
            samples=[records[i] for name in scores for i in self._rows_of(name)[:SAMPLES]],
            specialization=self._specialization(model),
        )

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
        """Adds the tokenizer, and the settings that `translate` reads."""
        self.save(model, folder)
        self.data.prompts.tokenizer.save_pretrained(folder)
        experts = self.routing.expert_of_direction
        settings = {
            "prompt": self.data.prompts.kind,
            "directions": list(self.data.directions),
            "max_length": self.data.max_length,
            "experts": None if experts is None else list(experts),
            "experts_through": self.routing.through,
            "base": self.base,
        }
        if isinstance(self.data.prompts, EncoderDecoderPrompts):
            settings |= self.data.prompts.settings()
        (folder / TRANSLATION_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def batches(self, model: nn.Module, split: EncodedPairs, most: int) -> Iterator[Batch]:
        """The first `most` pairs of a split in whole batches of similar lengths, on the model's device."""
        size = self.config.batch_size
        rows = PairDataset(split, names=self.data.directions, length=0, batch_size=size, seed=0)
        number = max(1, min(most, len(split.sentences)) // size) * size
        order = sorted(range(min(number, len(split.sentences))), key=lambda i: (int(split.length_N[i]), i))
        device = next(model.parameters()).device
        for start in range(0, len(order), size):
            batch = self.collate([rows.item(i) for i in order[start : start + size]])
            yield {name: value.to(device) for name, value in batch.items()}

    def _specialization(self, model: nn.Module) -> Specialization | None:
        """How far experts divide the directions among them, over the tokens of test translations; None without any."""
        if not routed_layers(model):
            return None
        batches = partial(self.batches, model, self.data.test, self.config.final_eval_sequences)
        named: Batch = {"routing": self.routing, "groups": self.data.directions}
        with running(model, inference_modes(model)[-1]):
            if isinstance(self.data.prompts, EncoderDecoderPrompts):
                return measure_sides(model, batches, **named)
            return measure_directions(model, batches(), **named)

    def _forward(self, model: Any, batch: Batch, *, want_routing: bool) -> tuple[Any, Tensor]:
        """The model's output, and the summed cross-entropy of the translations."""
        if isinstance(self.data.prompts, EncoderDecoderPrompts):
            return forward_pairs(model, batch, self.routing.name_experts(model, batch["directions"]))
        labels_BL = batch["labels"]
        # Logits are only computed from the first token that predicts a target: the head is a third of a small model.
        first = max(0, int(labels_BL.ne(-100).any(0).int().argmax()) - 1)
        positions = torch.arange(first, labels_BL.size(1) - 1, device=labels_BL.device)
        experts: Batch = self.routing.name_experts(model, batch["directions"])
        if want_routing and self.adapter is None and isinstance(_config(model), MixtureConfig):
            experts["output_routing"] = True
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False, **experts}
        targets_BK = labels_BL[:, first + 1 :]
        return run_and_sum(model, lambda: model(**inputs, logits_to_keep=positions), targets_BK)

    def _mean_loss(self, model: nn.Module, split: EncodedPairs, most: int) -> float:
        """Nats a target token."""
        total, targets = 0.0, 0
        for batch in self.batches(model, split, most):
            total += self._forward(model, batch, want_routing=False)[1].double().item()
            targets += int(self.count_targets(batch))
        return total / targets

    def _decode(self, model: Any, *, num_beams: int) -> list[str]:
        test, prompts = self.data.test, self.data.prompts
        place = {name: index for index, name in enumerate(self.data.directions)}
        ids = decode_prompts(
            model,
            [test.prompt(i) for i in range(len(test.sentences))],
            prompts=prompts,
            directions=[place[pair.pair] for pair in test.sentences],
            names=self.data.directions,
            routing=self.routing,
            max_length=self.data.max_length,
            num_beams=num_beams,
        )
        return prompts.decode(ids)

    def _rows_of(self, name: str) -> list[int]:
        return [i for i, pair in enumerate(self.data.test.sentences) if pair.pair == name]

    def _engine_scores(self) -> dict[str, dict[str, float]]:
        outputs = engine_outputs(self.data.test.sentences)
        scores = {} if outputs is None else self._scores(outputs)[0]
        return {name: found._asdict() for name, found in scores.items() if name in ENGINE_DIRECTIONS}

    def _scores(self, outputs: Sequence[str]) -> tuple[dict[str, Scores], dict[str, str]]:
        """Scores of every direction that has test sentences, and the signatures; BLEU's may differ by language."""
        sentences = self.data.test.sentences
        scores: dict[str, Scores] = {}
        signatures: dict[str, str] = {}
        for name in self.data.directions:
            rows = self._rows_of(name)
            if not rows:
                continue
            references = [sentences[i].target for i in rows]
            language = sentences[rows[0]].target_language
            scores[name], used = score([outputs[i] for i in rows], references, target_language=language)
            for metric, signature in used.items():
                known = signatures.setdefault(metric, signature)
                if known != signature:
                    signatures[f"{metric} ({language})"] = signature
        return scores, signatures


def _config(model: Any) -> Any:
    """The configuration of a model that data parallelism may have wrapped."""
    return getattr(model, "module", model).config


def read_outputs(path: Path) -> list[Sample]:
    """The test sentences of a finished run with its outputs.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        return [from_plain(Sample, json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): run this arm and seed again.") from error
