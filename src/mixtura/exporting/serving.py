"""Model folders that are made ready to answer token by token: calibrated for `population`, or given another mode.

The folder that is read stays as it is, and the one that is written appears whole or not at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixtura.config import DataConfig, UserError
from mixtura.data.packing import pack
from mixtura.data.sources import read_documents
from mixtura.files import check_empty, new_folder
from mixtura.models import MixtureForCausalLM, calibration
from mixtura.models.loading import load_model
from mixtura.models.transition import to_alone, to_token_choice

BATCH_SIZE = 16
"""Sequences in a batch, rounded up to whole groups."""
MAX_LENGTH = 512


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` read and wrote."""

    folder: Path
    layers: int
    """Layers that keep averages."""
    sequences: int
    """Sequences of the text that were read."""
    groups: int
    """Groups that each layer saw."""


@dataclass(frozen=True)
class Transitioned:
    """What `transition` made."""

    folder: Path
    model: MixtureForCausalLM
    """The configuration of the model in the folder."""


def calibrate(
    model: Path | str, out: Path | str, text: Path | str, *, text_column: str = "text", max_sequences: int = 512
) -> Calibrated:
    """Takes the averages of a population of groups from a text, and writes the model that answers with them.

    The new folder's model runs in `population` mode with the `alone_top_k` of the old one.

    Args:
        model: the folder of a mixture-of-tokens model with its tokenizer.
        out: a new folder.
        text: a file or folder of .txt, .jsonl or .parquet, best of the kind that the model was trained on.
        text_column: key or column that holds the text.
        max_sequences: stop after so many sequences.

    Raises:
        UserError: the model or the text cannot be read or used, or `out` holds something.
    """
    out = Path(out)
    loaded, tokenizer = _load(Path(model), out)
    batches = list(_batches(loaded, tokenizer, Path(text), text_column=text_column, max_sequences=max_sequences))
    calibration.calibrate(loaded, batches)
    loaded.set_inference_mode("population", top_k=loaded.config.alone_top_k)
    _write(loaded, tokenizer, out)
    return Calibrated(
        out,
        layers=len(loaded.mixture_of_tokens_layers()),
        sequences=sum(len(ids_BL) for ids_BL in batches),
        groups=sum(ids_BL.numel() for ids_BL in batches) // loaded.config.group_size,
    )


def transition(
    model: Path | str,
    out: Path | str,
    *,
    to: Literal["token_choice", "alone"],
    text: Path | str | None = None,
    text_column: str = "text",
    top_k: int | None = None,
    max_sequences: int = 64,
) -> Transitioned:
    """Converts the model in a folder and writes the result, to be trained on or served, with its tokenizer to `out`.

    Args:
        model: the folder of a mixture-of-tokens model.
        out: a new folder.
        to: "token_choice", or "alone", which trains in that mode from now on.
        text: for token choice, what outputs are compared on: a file or folder of .txt, .jsonl or .parquet.
        text_column: key or column that holds the text.
        top_k: experts a token gets; None takes the mixtures that it gets alone, or, for token choice, 2 where it gets
            all.
        max_sequences: of the text that are used; one factor a layer needs few.

    Raises:
        UserError: the model or the text cannot be read or converted, or `out` holds something.
    """
    if (to == "token_choice") != (text is not None):
        raise UserError(
            "Token choice compares outputs on a text: give one with --text."
            if text is None
            else "Going over to 'alone' needs no text: leave --text out."
        )
    out = Path(out)
    loaded, tokenizer = _load(Path(model), out)
    if text is not None:
        batches = _batches(loaded, tokenizer, Path(text), text_column=text_column, max_sequences=max_sequences)
        loaded = to_token_choice(loaded, batches, top_k=top_k or loaded.config.alone_top_k or 2)
    else:
        _check_top_k(loaded, top_k)
        to_alone(loaded, top_k=top_k or loaded.config.alone_top_k)
    _write(loaded, tokenizer, out)
    return Transitioned(out, loaded)


def _load(folder: Path, out: Path) -> tuple[MixtureForCausalLM, PreTrainedTokenizerBase]:
    check_empty(out)
    model, tokenizer = load_model(folder)
    if not isinstance(model, MixtureForCausalLM) or not model.mixture_of_tokens_layers():
        raise UserError(f"The model in '{folder}' has no mixture-of-tokens layer: there is nothing to convert.")
    return model, tokenizer


def _check_top_k(model: MixtureForCausalLM, top_k: int | None) -> None:
    mixtures = model.config.num_experts * model.config.mixtures_per_expert
    if top_k is not None and top_k > mixtures:
        raise UserError(f"A token cannot get {top_k} mixtures of the {mixtures} there are: lower --top-k.")


def _batches(
    model: MixtureForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    *,
    text_column: str,
    max_sequences: int,
) -> Iterator[Tensor]:
    """(B, L) token ids that fill whole groups."""
    config: Any = model.config
    over_batch, group = config.group_over == "batch", config.group_size
    rows = -(-BATCH_SIZE // group) * group if over_batch else BATCH_SIZE
    longest = min(config.max_position_embeddings, MAX_LENGTH)
    length = longest if over_batch else longest // group * group
    documents = read_documents(DataConfig(source="local", path=str(text), text_column=text_column))
    packed = pack(documents, tokenizer, sequence_length=length, name=f"'{text}'")
    whole = min(packed.num_sequences, max(rows, max_sequences)) // rows * rows
    if not whole and over_batch:
        raise UserError(
            f"'{text}' fills {packed.num_sequences} sequences of {length} tokens, fewer than the {rows} that fill "
            "whole groups: give more text."
        )
    for start in range(0, whole or packed.num_sequences, rows):
        part = packed.sequences_NL[start : min(start + rows, whole or packed.num_sequences)]
        yield torch.from_numpy(part.astype("int64"))


def _write(model: MixtureForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    with new_folder(out) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
