"""`mixtura diagnose` for any folder: a translation model brings its own test sentences, every other is given texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.config import UserError
from mixtura.data.parallel import SentencePair
from mixtura.diagnostics.diagnosed import Diagnosis
from mixtura.diagnostics.diagnosis import diagnose, diagnose_excerpts, read_texts, write_diagnosis
from mixtura.diagnostics.excerpts import Excerpts
from mixtura.tasks.translation.task import OUTPUTS_FILE, TRANSLATION_FILE, read_outputs
from mixtura.tasks.translation.translator import load_translator


def diagnose_folder(
    model_folder: Path,
    sources: Sequence[str],
    *,
    out: Path,
    text_column: str = "text",
    max_tokens: int = 20_000,
    command: str = "",
) -> Diagnosis:
    """Diagnoses the model in a folder, and writes `diagnosis.json` and `diagnosis.html` into `out`.

    Args:
        model_folder: any causal language model; the `checkpoint` of a translation run needs no texts.
        sources: texts as "name=path"; none for a translation run, whose test sentences are then read by language pair.
        out: folder to write; made if it is missing.
        text_column: key or column that holds the text.
        max_tokens: of each text.
        command: the command line, for the record.

    Returns:
        What diagnosis.json holds, see docs/diagnose.md.

    Raises:
        UserError: the model or a text cannot be used, or `out` cannot be written.
    """
    if sources or not (model_folder / TRANSLATION_FILE).is_file():
        texts = read_texts(sources, text_column=text_column)
        return diagnose(model_folder, texts, out=out, max_tokens=max_tokens, command=command)
    model, prompts, directions, routing = load_translator(model_folder)
    excerpts = _sentences(model_folder, prompts, directions, max_tokens)
    direction_G = torch.tensor([directions.index(name) for name in excerpts.names])

    def tell(group_B: Tensor) -> None:
        routing.tell(model, direction_G[group_B])

    results = diagnose_excerpts(
        model,
        prompts.tokenizer,
        excerpts,
        name=str(model_folder),
        group_word="language pair",
        command=command,
        tell=tell if routing.through == "task_ids" and routing.expert_of_direction is not None else None,
    )
    write_diagnosis(results, out)
    return results


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
