"""NLLB-MoE for some languages: the experts that their sentences use are kept, and the model is written anew."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtura.checkpoints.nllb_moe import Pruned, prune_experts
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import UserError
from mixtura.data.parallel import SentencePair
from mixtura.files import write_text
from mixtura.tasks.translation.encoder_decoder import EncoderDecoderPrompts, collate_pairs, prompts_for
from mixtura.training.interface import Batch
from mixtura.training.saving import save_model, writing

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
