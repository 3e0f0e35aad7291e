"""From a recipe's `[data]` to token windows, with a cache on disk over everything slow.

A cache entry is a folder named by what it depends on: the recipe's `[data]`, the size and time of the files it was read
from, and the library versions that decide the tokens. It holds arrays without pickle, the tokenizer, and
`prepared.json` with a checksum of each file; an entry that does not match its checksums is made anew. With
`data.shards` the tokens lie in shards instead, see `shards`; a damaged one is refused, since it is long in the making.

The tokenizer is any of Hugging Face, or a byte-level BPE fitted on the training documents (Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners", section 2.2): all 256 bytes are in the vocabulary and nothing is
normalised, so every text comes back exactly.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixtura.config import DataConfig, UserError
from mixtura.data.packing import HELD_OUT, PackedTokens, epoch_order, pack, packed_shards
from mixtura.data.shards import Part, ShardedSequences, check_parts
from mixtura.data.sources import DocumentStream, check_sides, load_corpus, source_files
from mixtura.data.tokenizing import write_shards
from mixtura.errors import reason_of
from mixtura.files import cache_entry, cache_folder, check_inside, checksum, write_json
from mixtura.threads import usable_cores

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN)
SMALLEST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# More text hardly changes the merges of a vocabulary of a few thousand, and fitting takes longer with it.
MAX_TRAINING_CHARACTERS = 8_000_000


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Fits a byte-level BPE with the special tokens `<pad>`, `<bos>` and `<eos>` (ids 0, 1, 2).

    Decoding gives back the exact text. A special token's name inside a text is plain text to it, never a control token.
    Of a large corpus it reads documents spread evenly, about 8 million characters in all.

    Args:
        documents: training documents only; held-out text must not shape the vocabulary.
        vocab_size: size of the vocabulary, special tokens included. A text too short for that many merges gives fewer.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"'data.vocab_size' is {vocab_size}: it must be {SMALLEST_VOCAB_SIZE} or more, "
            f"for 256 bytes and {len(SPECIAL_TOKENS)} special tokens."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(list(documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the Hugging Face hub; it never runs code from there.

    Raises:
        UserError: there is none, it cannot be read, it needs remote code, or it has no end-of-text token.
    """
    check_inside(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # The hub client and the Rust parser raise many unrelated classes, bare Exception too.
        raise UserError(
            f"The tokenizer '{name}' cannot be loaded ({reason_of(error)}): "
            'set \'data.tokenizer\' to a folder with a tokenizer.json, a hub name such as "gpt2", or "train".'
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer '{name}' has no end-of-text token to join documents with: "
            "set 'data.tokenizer' to the tokenizer of a causal language model, or \"train\"."
        )
    return tokenizer


def _thinned(documents: Iterable[str]) -> list[str]:
    """Documents spread evenly over a text that is read once, enough for `_sample`; all where there are few."""
    kept: list[str] = []
    step, size = 1, 0
    for place, document in enumerate(documents):
        if place % step:
            continue
        kept.append(document[:MAX_TRAINING_CHARACTERS])
        size += len(kept[-1])
        while size > 2 * MAX_TRAINING_CHARACTERS:
            kept, step = kept[::2], 2 * step
            size = sum(map(len, kept))
    return kept


def _sample(documents: list[str]) -> list[str]:
    """Every n-th document, so that of a sorted corpus all parts are seen."""
    step = max(1, -(-sum(map(len, documents)) // MAX_TRAINING_CHARACTERS))
    return [document[:MAX_TRAINING_CHARACTERS] for document in documents[::step]]


# Raise one when the same recipe and text would give other tokens than before.
CACHE_FORMAT, SHARDS_FORMAT = 2, 1
_MANIFEST = "prepared.json"
_SIDES = ("train", "validation")


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
        cache_dir: folder of cache entries, made when missing; None caches nothing, but for shards, which have to lie
            somewhere and go to the cache folder of this user.
        on_progress: called with a phrase when a slow part begins, such as "reading".

    Raises:
        UserError: the text, the tokenizer or the cache folder cannot be used.
    """
    report = on_progress or (lambda _: None)
    if data.shards:
        return _prepare_shards(data, (cache_dir or cache_folder()) / _cache_key(data), report)
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
    name, length = _training_text(corpus.skipped), data.sequence_length
    train = pack(corpus.train, tokenizer, sequence_length=length, name=name)
    validation = pack(corpus.validation, tokenizer, sequence_length=length, name=HELD_OUT)
    order = epoch_order(validation.num_sequences, seed=0, epoch=0)
    validation = dataclasses.replace(validation, sequences_NL=validation.sequences_NL[:][order])
    facts = {
        "description": corpus.description,
        "documents_train": len(corpus.train),
        "documents_validation": len(corpus.validation),
        "rows_skipped": corpus.skipped,
        "bytes_train": _num_bytes(corpus.train),
        "bytes_validation": _num_bytes(corpus.validation),
    }
    return _prepared(data, tokenizer, train, validation, facts)


def _training_text(skipped: Mapping[str, int]) -> str:
    repeated = skipped["duplicate"]
    return f"the training text without {repeated:,} repeated documents" if repeated else "the training text"


def _prepared(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: PackedTokens,
    validation: PackedTokens,
    facts: Mapping[str, Any],
) -> PreparedData:
    """The data with its summary: the facts on its documents, and those on their tokens."""
    summary = {
        **facts,
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


def _prepare_shards(data: DataConfig, entry: Path, report: Callable[[str], None]) -> PreparedData:
    """Shards and what they say; they do not depend on the length of sequences."""
    if (kept := _load_shards(data, entry)) is not None:
        report("loading cached tokens")
        return kept
    _guard(entry.parent, lambda: (entry / "tokenizer").mkdir(parents=True, exist_ok=True))
    _guard(entry.parent, lambda: _make_shards(data, entry, report))
    made = _load_shards(data, entry)
    assert made is not None, "they were made just now"
    return made


def _make_shards(data: DataConfig, entry: Path, report: Callable[[str], None]) -> None:
    """Writes those shards of the entry that it lacks, and `prepared.json` last."""
    report("reading")
    folder = entry / "tokenizer"
    if data.tokenizer != "train":
        load_tokenizer(data.tokenizer).save_pretrained(folder)
    else:
        report("training tokenizer")
        documents = (document.text for document in DocumentStream(data) if not document.held_out)
        train_tokenizer(_thinned(documents), vocab_size=data.vocab_size).save_pretrained(folder)
    report("encoding")
    documents = DocumentStream(data)
    parts = write_shards(
        documents,
        load_tokenizer(str(folder)),
        entry,
        made_with=json.dumps(_checksums(folder)).encode(),
        processes=usable_cores(),
        report=report,
    )
    sides = {side: sum(getattr(part, side).documents for part in parts) for side in _SIDES}
    check_sides(sides["train"], sides["validation"], documents.skipped, documents.source(), data)
    facts = {
        "description": documents.source() + documents.left_out(),
        **{f"documents_{side}": number for side, number in sides.items()},
        "rows_skipped": dict(documents.skipped),
        **{f"bytes_{side}": sum(getattr(part, side).num_bytes for part in parts) for side in _SIDES},
    }
    manifest = {"facts": facts, "tokenizer": _checksums(folder), "parts": list(map(dataclasses.asdict, parts))}
    write_json(entry / _MANIFEST, manifest)


def _load_shards(data: DataConfig, entry: Path) -> PreparedData | None:
    """The entry; None where it is not complete.

    Raises:
        UserError: a shard is damaged, or there is too little text for one sequence.
    """
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        parts = [Part.from_dict(part) for part in manifest["parts"]]
        facts, same = manifest["facts"], manifest["tokenizer"] == _checksums(entry / "tokenizer")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not same:
        return None
    check_parts(entry, parts)
    packed: dict[str, PackedTokens] = {}
    for side, name in zip(_SIDES, (_training_text(facts["rows_skipped"]), HELD_OUT), strict=True):
        sequences_NL = ShardedSequences(
            entry, parts, side=side, sequence_length=data.sequence_length, shuffled=side == "validation"
        )
        packed[side] = packed_shards(sequences_NL, num_bytes=facts[f"bytes_{side}"], name=name)
    return _prepared(data, load_tokenizer(str(entry / "tokenizer")), packed["train"], packed["validation"], facts)


def _num_bytes(documents: Iterable[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def _cache_key(data: DataConfig) -> str:
    """Name of the entry: 128 bits over everything that decides the tokens."""
    files = [path.absolute() for path in source_files(data)]
    tokenizer = Path(data.tokenizer)
    if tokenizer.is_dir():
        files += sorted(path.absolute() for path in tokenizer.iterdir() if path.is_file())
    settings = dataclasses.asdict(data)
    del settings["sequence_length" if data.shards else "shards"]
    parts = {
        "format": SHARDS_FORMAT if data.shards else CACHE_FORMAT,
        "data": settings,
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
    splits = dict(zip(_SIDES, (prepared.train, prepared.validation), strict=True))
    for name, packed in splits.items():
        np.save(folder / f"{name}.npy", packed.sequences_NL[:], allow_pickle=False)
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
    return {str(path.relative_to(entry)): checksum(path) for path in files}
