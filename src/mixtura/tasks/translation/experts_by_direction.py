"""Which experts of a translation model serve which directions; and NLLB-MoE with only those that some need.

Shapes: B batch, L length.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.checkpoints.nllb_moe import Pruned, prune_experts
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import UserError
from mixtura.data.parallel import SentencePair
from mixtura.diagnostics.choices import routed_layers
from mixtura.diagnostics.specialization import measure_specialization
from mixtura.files import write_text
from mixtura.results.run import LayerSpecialization, Specialization
from mixtura.tasks.translation.decoding import ExampleRouting
from mixtura.tasks.translation.encoder_decoder import EncoderDecoderPrompts, collate_pairs, prompts_for
from mixtura.training.interface import Batch
from mixtura.training.saving import save_model, writing


def measure_directions(
    model: nn.Module, batches: Iterable[Batch], *, routing: ExampleRouting, groups: Sequence[str]
) -> Specialization:
    """Of a decoder, in the mode in which it is deployed; `groups` are the directions."""

    def observed() -> Iterator[tuple[Batch, Tensor, Tensor]]:
        for batch in batches:
            experts = routing.name_experts(model, batch["directions"])
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **experts}
            yield {**inputs, "use_cache": False}, batch["directions"], batch["labels"].ne(-100)

    return measure_specialization(model, observed(), groups=groups)


def measure_sides(
    model: Any, batches: Callable[[], Iterable[Batch]], *, routing: ExampleRouting, groups: Sequence[str]
) -> Specialization:
    """Of an encoder-decoder: the layers of the encoder and then those of the decoder.

    Args:
        model: in the mode in which it is deployed.
        batches: gives the batches anew each time, since each side is measured by itself.
        routing: how the model gets the experts of an example.
        groups: the directions.
    """
    layers: list[LayerSpecialization] = []
    depth = 0
    for name, side, mask in (
        ("encoder", model.get_encoder(), "attention_mask"),
        ("decoder", model.get_decoder(), "labels"),
    ):
        if routed_layers(side):
            found = measure_specialization(
                _SeenSide(model, name, side), _side_batches(model, batches(), routing, mask), groups=groups
            )
            layers += [dataclasses.replace(layer, layer=layer.layer + depth) for layer in found.layers]
        depth += model.config.num_hidden_layers
    return Specialization(list(groups), layers)


def _side_batches(
    model: nn.Module, batches: Iterable[Batch], routing: ExampleRouting, mask: str
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    for batch in batches:
        named = routing.name_experts(model, batch["directions"])
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "directions")}
        counted = batch["labels"].ne(-100) if mask == "labels" else batch[mask].bool()
        yield {**inputs, "use_cache": False, **named}, batch["directions"], counted


@final
class _SeenSide(nn.Module):
    """A whole model when it is run, of which only one side's layers are to be seen."""

    def __init__(self, model: nn.Module, name: str, side: nn.Module) -> None:
        super().__init__()
        self.add_module(name, side)
        self._whole = (model,)

    def forward(self, **inputs: Any) -> Any:
        return self._whole[0](**inputs)


RECEIPT = "pruning.json"


def prune_for_sentences(
    base: str, pairs: Sequence[SentencePair], out: Path, *, keep: int, batch_size: int = 16
) -> list[Pruned]:
    """Writes an NLLB-MoE with the experts that sentence pairs use most, its tokenizer, and a receipt `pruning.json`.

    Args:
        base: a folder or a hub name.
        pairs: some sentences of the directions that count, with their translations.
        out: the folder to write.
        keep: experts that stay in every layer.
        batch_size: pairs at once.

    Returns:
        For every layer the experts that stay, and which part of the routers' weight goes to them.

    Raises:
        UserError: the base is no NLLB-MoE or lacks a language, `keep` is no number of its experts, there are no pairs,
            or the folder is there already or cannot be written.
    """
    if out.exists():
        raise UserError(f"'{out}' is there already: name a new folder.")
    if not pairs:
        raise UserError("There is no sentence pair to see which experts are used: give some of each direction.")
    model, tokenizer = load_base(base)
    prompts = prompts_for(tokenizer, model.config)
    directions = list(dict.fromkeys(pair.pair for pair in pairs))
    prompts.languages.check(directions)
    pruned = prune_experts(model, _batches(prompts, pairs, directions, batch_size), keep=keep)
    with writing(out):
        save_model(model, out)
        tokenizer.save_pretrained(out)
        receipt = {"base": base, "directions": directions, "layers": [layer._asdict() for layer in pruned]}
        write_text(out / RECEIPT, json.dumps(receipt, indent=1))
    return pruned


def _batches(
    prompts: EncoderDecoderPrompts, pairs: Sequence[SentencePair], directions: list[str], size: int
) -> Iterator[Batch]:
    read, written = prompts.encode(pairs), prompts.encode_targets([pair.target for pair in pairs])
    items: list[dict[str, Any]] = [
        {"tokens": torch.tensor([*source, *target]), "prompt": len(source), "direction": directions.index(pair.pair)}
        for source, target, pair in zip(read, written, pairs, strict=True)
    ]
    for start in range(0, len(items), size):
        batch = collate_pairs(items[start : start + size], prompts, directions)
        yield {key: value for key, value in batch.items() if key not in ("labels", "directions")}
