"""From a recipe's `[data]` to token windows, with a cache on disk over everything slow.

A cache entry is a folder named by what it depends on: the recipe's `[data]`, the size and time of the files it was read
from, and the library versions that decide the tokens. It holds arrays without pickle, the tokenizer, and
`prepared.json` with a checksum of each file; an entry that does not match its checksums is made anew.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mixtura.config import DataConfig, UserError
from mixtura.data.packing import HELD_OUT, PackedTokens, epoch_order, pack
from mixtura.data.sources import load_corpus, source_files
from mixtura.data.tokenizer import load_tokenizer, train_tokenizer
from mixtura.errors import TooLittleText, reason_of
from mixtura.files import cache_entry

# Raise it when the same recipe and text would give other tokens than before.
CACHE_FORMAT = 1
_MANIFEST = "prepared.json"


@dataclass(frozen=True)
class PreparedData:
    """The text as training and evaluation need it."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedTokens
    validation: PackedTokens
    """Held-out windows in a fixed shuffled order, so that the first few of them are a fair sample of all."""
    summary: dict[str, Any]
    """Facts for reports, JSON-able: description, documents_*, bytes_*, tokens_*, tokens_dropped_*, rows_skipped, ..."""


def prepare_data(
    data: DataConfig,
    *,
    cache_dir: Path | None,
    on_progress: Callable[[str], None] | None = None,
) -> PreparedData:
    """Reads, tokenizes and packs the text of a recipe, or takes it from the cache.

    A hub dataset that changes under its name is not noticed: remove the cache to read it again.

    Args:
        data: the recipe's `[data]`.
        cache_dir: folder of cache entries, made when missing; None caches nothing.
        on_progress: called with a phrase when a slow part begins, such as "reading".

    Raises:
        UserError: the text, the tokenizer or the cache folder cannot be used.
    """
    report = on_progress or (lambda _: None)
    if cache_dir is None:
        return _prepare(data, report)
    entry = cache_dir / _cache_key(data)
    if entry.exists():
        cached = _load(entry)
        if cached is not None:
            report("loading cached tokens")
            return cached
        report("replacing damaged cached tokens")
    _guard(cache_dir, lambda: cache_dir.mkdir(parents=True, exist_ok=True))
    prepared = _prepare(data, report)
    _guard(cache_dir, lambda: _store(prepared, entry))
    return prepared


MOST_HELD_OUT = 0.25
"""The largest share that is held out of a text in place of a smaller one that holds out too little."""
SHORTEST, HALVINGS = 16, 3
"""Tokens of the shortest sequence, and halvings at most, that a text too short for the recipe's gets in its place."""


def fit_held_out(
    data: DataConfig, prepare: Callable[[DataConfig], PreparedData], *, wanted: int
) -> tuple[DataConfig, PreparedData]:
    """Prepared text with at least one sequence on either side, and the recipe's `[data]` that gives it.

    Where that is not the one given, more is held out, up to a quarter, and then sequences are shorter.

    Args:
        data: the recipe's `[data]`.
        prepare: `prepare_data`, with a cache folder.
        wanted: sequences to hold out, unless they are more than a fifth of all.

    Raises:
        UserError: the text is too short even so, or cannot be used.
    """
    fitted, halvings, refusal = data, 0, None
    while True:
        try:
            prepared = prepare(fitted)
            found = prepared.validation.num_sequences
            enough = found >= min(wanted, (found + prepared.train.num_sequences) // 5)
            if enough or fitted.validation_fraction >= MOST_HELD_OUT:
                return fitted, prepared
            more = True
        except TooLittleText as error:
            refusal = refusal or error
            more = error.held_out and fitted.validation_fraction < MOST_HELD_OUT
            if not more and (halvings == HALVINGS or fitted.sequence_length < 2 * SHORTEST):
                raise refusal from None
        if more:
            share = min(MOST_HELD_OUT, 2 * fitted.validation_fraction)
            fitted = dataclasses.replace(fitted, validation_fraction=share)
        else:
            fitted, halvings = dataclasses.replace(fitted, sequence_length=fitted.sequence_length // 2), halvings + 1


def _guard(cache_dir: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(
            f"The cache folder '{cache_dir}' cannot be written ({reason_of(error)}): name another or make room."
        ) from error


def _prepare(data: DataConfig, report: Callable[[str], None]) -> PreparedData:
    report("reading")
    corpus = load_corpus(data)
    if data.tokenizer == "train":
        report("training tokenizer")
        tokenizer = train_tokenizer(corpus.train, vocab_size=data.vocab_size)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    report("encoding")
    repeated = corpus.skipped["duplicate"]
    name = f"the training text without {repeated:,} repeated documents" if repeated else "the training text"
    train = pack(corpus.train, tokenizer, sequence_length=data.sequence_length, name=name)
    validation = pack(corpus.validation, tokenizer, sequence_length=data.sequence_length, name=HELD_OUT)
    order = epoch_order(validation.num_sequences, seed=0, epoch=0)
    validation = dataclasses.replace(validation, sequences_NL=validation.sequences_NL[order])
    summary = {
        "description": corpus.description,
        "documents_train": len(corpus.train),
        "documents_validation": len(corpus.validation),
        "rows_skipped": corpus.skipped,
        "bytes_train": _num_bytes(corpus.train),
        "bytes_validation": _num_bytes(corpus.validation),
        "tokens_train": train.num_tokens,
        "tokens_validation": validation.num_tokens,
        "tokens_dropped_train": train.tokens_dropped,
        "tokens_dropped_validation": validation.tokens_dropped,
        "bytes_per_token": validation.bytes_per_token,
        "sequence_length": data.sequence_length,
        # Ids may have gaps; the embedding has to have a row for the highest id.
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "tokenizer": "byte-level BPE fitted on the training text" if data.tokenizer == "train" else data.tokenizer,
    }
    return PreparedData(tokenizer, train, validation, summary)


def _num_bytes(documents: Iterable[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def _cache_key(data: DataConfig) -> str:
    """Name of the entry: 128 bits over everything that decides the tokens."""
    files = [path.absolute() for path in source_files(data)]
    tokenizer = Path(data.tokenizer)
    if tokenizer.is_dir():
        files += sorted(path.absolute() for path in tokenizer.iterdir() if path.is_file())
    parts = {
        "format": CACHE_FORMAT,
        "data": dataclasses.asdict(data),
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "versions": {package: version(package) for package in ("tokenizers", "transformers")},
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _store(prepared: PreparedData, entry: Path) -> None:
    with cache_entry(entry) as new:
        _write_files(prepared, new)
        if entry.exists() and _load(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)


def _write_files(prepared: PreparedData, folder: Path) -> None:
    prepared.tokenizer.save_pretrained(folder / "tokenizer")
    splits = {"train": prepared.train, "validation": prepared.validation}
    for name, packed in splits.items():
        np.save(folder / f"{name}.npy", packed.sequences_NL, allow_pickle=False)
    manifest = {
        "summary": prepared.summary,
        "splits": {
            name: {"bytes_per_token": packed.bytes_per_token, "tokens_dropped": packed.tokens_dropped}
            for name, packed in splits.items()
        },
        "checksums": _checksums(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _load(entry: Path) -> PreparedData | None:
    """The entry, or None when any of its files is missing or changed."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["checksums"] != _checksums(entry):
            return None
        train, validation = (
            PackedTokens(np.load(entry / f"{name}.npy", allow_pickle=False), **manifest["splits"][name])
            for name in ("train", "validation")
        )
        return PreparedData(load_tokenizer(str(entry / "tokenizer")), train, validation, manifest["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksums(entry: Path) -> dict[str, str]:
    files = sorted(path for path in entry.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {str(path.relative_to(entry)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
