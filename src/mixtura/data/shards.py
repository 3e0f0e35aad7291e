"""Tokens of a large text as files that are mapped into memory, and the order in which training sees them.

The text is cut into parts of some 16 MB. A part has two files: `00012.npy`, the tokens of its training documents and
then those of its held-out ones, and `00012.json`, what they are and a checksum. The second is written last, so a part
that has it is complete. The tokens of all parts are one stream, and a sequence may begin in one part and end in the
next: they are the sequences that the same text gives in memory.

Shapes: `N` sequences, `L` tokens a sequence.
"""

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mixtura.config import UserError
from mixtura.files import checksum, replacing, write_json

_MAPPED = 8
"""Parts that are mapped at a time. Each counts as the process's memory, up to some 10 MB."""
_ROUNDS = 6
"""Of the Feistel network: with 4 it cannot be told from chance by its inputs and outputs, and 6 leave a margin."""


@dataclass(frozen=True)
class SideOfPart:
    """What one side, training or held out, has of a part."""

    documents: int
    num_bytes: int
    """Of UTF-8 text."""
    tokens: int
    """The one eos after each document counted."""


@dataclass(frozen=True)
class Part:
    """What is known of one part: its JSON file."""

    text: str
    """A hash of its documents and their sides."""
    checksum: str
    """Of the .npy file."""
    train: SideOfPart
    validation: SideOfPart

    @classmethod
    def from_json(cls, path: Path) -> "Part":
        """Reads what `write_part` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged.
        """
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, told: Any) -> "Part":
        """The part that was written as this dictionary.

        Raises:
            ValueError: it is not one.
        """
        try:
            sides = {side: SideOfPart(**told[side]) for side in ("train", "validation")}
            return cls(str(told["text"]), str(told["checksum"]), **sides)
        except (LookupError, TypeError) as error:
            raise ValueError(str(error)) from error


def tokens_file(folder: Path, number: int) -> Path:
    """Where the tokens of a part lie."""
    return folder / f"{number:05d}.npy"


def write_part(
    folder: Path, number: int, *, train: np.ndarray, validation: np.ndarray, text: str, counts: dict[str, SideOfPart]
) -> Part:
    """Writes a part's two files, each whole or not at all.

    Args:
        folder: of all parts.
        number: of this part, from 0.
        train: token ids of the training documents, flat.
        validation: those of the held-out documents, of the same integer type.
        text: the hash of its documents.
        counts: by side, "train" and "validation".
    """
    path = tokens_file(folder, number)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate([train, validation]), allow_pickle=False)
    part = Part(text, checksum(path), **counts)
    write_json(path.with_suffix(".json"), dataclasses.asdict(part))
    return part


def finished_part(folder: Path, number: int, *, text: str) -> Part | None:
    """The part if it is complete, undamaged and of that text; None where it has to be made."""
    path = tokens_file(folder, number)
    try:
        part = Part.from_json(path.with_suffix(".json"))
        return part if part.text == text and part.checksum == checksum(path) else None
    except (OSError, ValueError):
        return None


def check_parts(folder: Path, parts: Sequence[Part]) -> None:
    """Compares every part with its checksum.

    Raises:
        UserError: names the file that was changed or is missing.
    """
    for number, part in enumerate(parts):
        path = tokens_file(folder, number)
        try:
            right = checksum(path) == part.checksum
        except OSError:
            right = False
        if not right:
            raise UserError(
                f"The token shard '{path}' is damaged, its bytes do not have the checksum in '{number:05d}.json': "
                f"delete '{path.parent / 'prepared.json'}', and the same command makes this shard again."
            )


@lru_cache(maxsize=_MAPPED)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


class ShardedSequences:
    """The (N, L) sequences of one side of all parts, read where they lie; indexed by a number or a slice, as an array.

    Memory is needed for the parts that are mapped, whatever N.
    """

    def __init__(
        self, folder: Path, parts: Sequence[Part], *, side: str, sequence_length: int, shuffled: bool = False
    ) -> None:
        """Takes parts that were checked.

        Args:
            folder: of the parts.
            parts: all of them, in order.
            side: "train" or "validation".
            sequence_length: L.
            shuffled: show them in a fixed shuffled order, so that the first few are a fair sample of all.
        """
        self.folder, self.parts, self.shuffled = folder, parts, shuffled
        self._skip = [part.train.tokens if side == "validation" else 0 for part in parts]
        self._ends = list(accumulate(getattr(part, side).tokens for part in parts))
        self.tokens = self._ends[-1] if parts else 0
        """Of the whole stream, the remainder too."""
        self.shape = (self.tokens // sequence_length, sequence_length)
        self.size = self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> np.ndarray:
        """(L,) int32, or (rows, L) for a slice.

        Raises:
            IndexError: there is no such sequence.
        """
        if isinstance(key, slice):
            rows = [self[row] for row in range(*key.indices(self.shape[0]))]
            return np.stack(rows) if rows else np.empty((0, self.shape[1]), dtype=np.int32)
        number, length = self.shape
        if not 0 <= key < number:
            raise IndexError(f"sequence {key} of {number}")
        row = scattered(key, number=number, seed=0, epoch=0) if self.shuffled else key
        return self._tokens(row * length, (row + 1) * length)

    def content(self) -> bytes:
        """What stands for the tokens where data is compared: the checksums of all parts."""
        return "".join(part.checksum for part in self.parts).encode() + repr(self.shape).encode()

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        pieces: list[np.ndarray] = []
        number = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            if end > start:  # a part may have no tokens of this side
                shift = self._skip[number] - begin
                mapped = _mapped(tokens_file(self.folder, number))
                pieces.append(mapped[start + shift : end + shift].astype(np.int32))
            start, number = max(start, end), number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def scattered(place: int, *, number: int, seed: int, epoch: int) -> int:
    """Where a permutation of `number` items, a pure function of (seed, epoch), puts a place; nothing is kept.

    A Feistel network permutes the numbers of an even number of bits; one that is too large is put through it again
    until it is not (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3). The
    smallest such power of four is below four times `number`, so that takes four rounds at most on average.
    """
    half = max(1, -(-(number - 1).bit_length() // 2))
    mask = (1 << half) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        place = left << half | right
        if place < number:
            return place


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return tuple(np.random.Philox(key=key).random_raw(_ROUNDS).tolist())


def _mixed(word: int) -> int:
    """A word of 64 bits, well mixed: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 16)."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31
