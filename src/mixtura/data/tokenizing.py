"""A large text to token shards: read once as a stream, tokenised by several processes, part by part.

One process reads, leaves out duplicates and decides what is held out, which takes a small part of the time; parts go to
the others, which write them. So what is in memory is a few parts, however long the text. A part is cut by the text
alone, whatever the number of processes. Where the work is stopped, even by SIGKILL, the text is read again but the
parts that are complete are kept: each says from which text and with which tokenizer it was made.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mixtura.data.shards import Part, SideOfPart, finished_part, write_part
from mixtura.processes import worker_pool

if TYPE_CHECKING:  # each process imports this module: torch and what reads text would take it longer than 5 MB of text
    from transformers import PreTrainedTokenizerBase

    from mixtura.data.sources import Document

PART_BYTES = 16_000_000
"""UTF-8 text of a part; the document that passes it is the part's last. Raise `SHARDS_FORMAT` with it."""
_REPORT_SECONDS = 10.0
# Text encoded at once: enough to use the tokenizer's threads, but its memory stays below about 100 MB.
_CHUNK_CHARACTERS = 1_000_000
_LOST = (
    "A process that tokenises has ended, as happens where memory runs out, or where the script that called has no 'if "
    '__name__ == "__main__":\': the same command goes on and keeps the finished shards.'
)


class _Work(NamedTuple):
    """The text of one part."""

    number: int
    train: list[str]
    validation: list[str]
    num_bytes: int
    text: str
    """A hash of the tokenizer, the documents and their sides."""


def write_shards(
    documents: "Iterable[Document]",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    made_with: bytes,
    processes: int,
    report: Callable[[str], None],
) -> list[Part]:
    """Writes the parts of a text that are not in the folder yet; returns all of them in order.

    Args:
        documents: in reading order.
        tokenizer: with an eos token.
        folder: of the parts; it exists.
        made_with: what stands for the tokenizer, since parts of another must not be taken for those of this one.
        processes: how many tokenise; 1 does it in this one.
        report: called now and then with a line on how far it is and how fast.

    Raises:
        UserError: a document cannot be read, or a process has ended.
        OSError: the folder cannot be written.
    """
    parts: dict[int, Part] = {}
    progress = _Progress(report, processes)
    pool = worker_pool(processes, _begin, (tokenizer,), lost=_LOST) if processes > 1 else nullcontext()
    with pool as workers:
        pending: dict[Future[Part], _Work] = {}
        for work in _cut(documents, made_with):
            if (finished := finished_part(folder, work.number, text=work.text)) is not None:
                parts[work.number] = finished
                progress.kept += 1
            elif workers is None:
                parts[work.number] = _write(work, tokenizer, folder)
                progress.advance(work, parts[work.number])
            else:
                # One more than there are processes, so that none waits while this one reads.
                _collect(pending, parts, progress, most=processes)
                pending[workers.submit(_write_in_worker, work, folder)] = work
        _collect(pending, parts, progress, most=0)
    progress.end(len(parts))
    return [parts[number] for number in range(len(parts))]


def _collect(pending: dict[Future[Part], _Work], parts: dict[int, Part], progress: "_Progress", *, most: int) -> None:
    """Waits until at most that many parts are being made."""
    while len(pending) > most:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            work = pending.pop(future)
            parts[work.number] = future.result()
            progress.advance(work, parts[work.number])


class _Progress:
    """Says how much text is tokenised and how fast, every ten seconds and at the end."""

    def __init__(self, report: Callable[[str], None], processes: int) -> None:
        self._report, self._processes = report, processes
        self._began = self._told = time.monotonic()
        self._bytes = self._tokens = self.kept = 0

    def advance(self, work: _Work, part: Part) -> None:
        """A part is written."""
        self._bytes += work.num_bytes
        self._tokens += part.train.tokens + part.validation.tokens
        if time.monotonic() - self._told > _REPORT_SECONDS:
            self._told = time.monotonic()
            self._report(f"encoding: {self._so_far()}")

    def end(self, parts: int) -> None:
        """All parts are there."""
        if self._bytes:
            kept = (
                f", {self.kept} of {parts} shards kept from before"
                if self.kept
                else f" in {parts} shard{'s' * (parts > 1)}"
            )
            self._report(f"encoded {self._so_far()}{kept}")

    def _so_far(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return (
            f"{self._bytes / 1e6:,.0f} MB of text to {self._tokens:,} tokens, {self._bytes / 1e6 / seconds:.1f} MB/s "
            f"with {self._processes} {'processes' if self._processes > 1 else 'process'}"
        )


def _cut(documents: "Iterable[Document]", made_with: bytes) -> Iterator[_Work]:
    """The documents in parts."""
    number, sides, size, digest = 0, ([], []), 0, hashlib.blake2b(made_with, digest_size=16)
    for text, held_out, hashed in documents:
        sides[held_out].append(text)
        digest.update(hashed + bytes([held_out]))
        size += len(text.encode())
        if size >= PART_BYTES:
            yield _Work(number, *sides, size, digest.hexdigest())
            number, sides, size, digest = number + 1, ([], []), 0, hashlib.blake2b(made_with, digest_size=16)
    if size:
        yield _Work(number, *sides, size, digest.hexdigest())


def _write(work: _Work, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> Part:
    kind = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.int32
    tokens, counts = {}, {}
    for side, texts in (("train", work.train), ("validation", work.validation)):
        tokens[side] = encode(texts, tokenizer).astype(kind)
        counts[side] = SideOfPart(len(texts), sum(len(text.encode()) for text in texts), tokens[side].size)
    return write_part(folder, work.number, **tokens, text=work.text, counts=counts)


_TOKENIZER: "PreTrainedTokenizerBase | None" = None


def _begin(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Makes this process ready."""
    global _TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core of its own to use, not all of them
    _TOKENIZER = tokenizer


def _write_in_worker(work: _Work, folder: Path) -> Part:
    assert _TOKENIZER is not None, "the process has begun"
    return _write(work, _TOKENIZER, folder)


def encode(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """(tokens,) int32 of all documents in their order, eos after each."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), "load_tokenizer checks that there is an eos token"
    encoded = [_encode(chunk, tokenizer, eos) for chunk in _chunks(documents)]
    return np.concatenate(encoded) if encoded else np.empty(0, dtype=np.int32)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(documents: list[str], tokenizer: "PreTrainedTokenizerBase", eos: int) -> np.ndarray:
    """(tokens,) int32 of all documents, eos after each."""
    ids = tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return np.fromiter(chain.from_iterable([*document, eos] for document in ids), dtype=np.int32)
