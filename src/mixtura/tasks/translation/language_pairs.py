"""A translation model diagnosed on its run's test sentences, by language pair."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.config import UserError
from mixtura.data.parallel import SentencePair
from mixtura.diagnostics.diagnosed import Diagnosis
from mixtura.diagnostics.diagnosis import diagnose_excerpts
from mixtura.diagnostics.excerpts import Excerpts
from mixtura.tasks.translation.task import OUTPUTS_FILE, TRANSLATION_FILE, read_outputs
from mixtura.tasks.translation.translator import load_translator


def diagnose_language_pairs(folder: Path, *, max_tokens: int, command: str) -> Diagnosis | None:
    """The content of diagnosis.json for the `checkpoint` of a translation run; None where it is none.

    Args:
        folder: the model's.
        max_tokens: of each language pair.
        command: the command line, for the record.

    Raises:
        UserError: the model or its run's test sentences cannot be read.
    """
    if not (folder / TRANSLATION_FILE).is_file():
        return None
    model, prompts, directions, routing = load_translator(folder)
    excerpts = _sentences(folder, prompts, directions, max_tokens)
    direction_G = torch.tensor([directions.index(name) for name in excerpts.names])

    by_direction = routing.expert_of_direction is not None

    def before_batch(group_B: Tensor) -> None:
        routing.tell(model, direction_G[group_B])

    return diagnose_excerpts(
        model,
        prompts.tokenizer,
        excerpts,
        name=str(folder),
        group_word="language pair",
        command=command,
        before_batch=before_batch if routing.through == "task_ids" and by_direction else None,
    )


def _sentences(model_folder: Path, prompts: Any, directions: Sequence[str], max_tokens: int) -> Excerpts:
    """Prompt and reference of the run's test sentences, by direction: what the model reads when it is trained."""
    path = model_folder.parent / OUTPUTS_FILE
    if not path.is_file():
        raise UserError(
            f"'{model_folder}' is a translation model without its run's {OUTPUTS_FILE} beside it: give texts with "
            "--text NAME=FILE."
        )
    records = read_outputs(path)
    cut = Excerpts([], [], [])
    for direction in directions:
        own = [record for record in records if record.pair == direction]
        if not own:
            continue
        source, target = direction.split("-")
        pairs = [SentencePair(record.source, record.reference, source, target) for record in own]
        ids = prompts.encode(pairs), prompts.encode_targets([pair.target for pair in pairs])
        room = max_tokens
        for prompt, reference in zip(*ids, strict=True):
            if room <= 0:
                break
            cut.ids.append([*prompt, *reference])
            cut.group.append(len(cut.names))
            room -= len(prompt) + len(reference)
        cut.names.append(direction)
    return cut
