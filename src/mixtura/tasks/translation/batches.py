"""Sentence pairs as tokens, in batches of similar length, in an order that is a function of the seed and the position.

Shapes: N pairs, B batch, L length of a batch's longest row, T all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixtura.data.packing import epoch_order
from mixtura.data.parallel import SentencePair
from mixtura.tasks.translation.encoder_decoder import AnyPrompts
from mixtura.training.interface import Batch

WINDOW_BATCHES = 50
"""Batches in a window that is sorted by length: enough to make the rows of a batch nearly equal in length."""
# Keys of Philox that differ from those of `epoch_order`, which has the epoch alone in that place.
_BATCH_ORDER = 1 << 32


@dataclass(frozen=True)
class EncodedPairs:
    """Prompts and translations of one split; what an encoder reads counts as the prompt."""

    sentences: list[SentencePair]
    tokens_T: np.ndarray
    """int32: prompt and translation of every pair, one after the other."""
    starts_N: np.ndarray
    """(N + 1,) int64: where a pair begins in `tokens_T`, and the end."""
    prompt_N: np.ndarray
    """(N,) int32: tokens of a pair's prompt."""
    too_long: int = 0
    """How many pairs were left out because they have more than `max_length` tokens."""

    @property
    def length_N(self) -> np.ndarray:
        """(N,) tokens of a pair."""
        return np.diff(self.starts_N)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int(len(self.tokens_T) - self.prompt_N.sum())

    @cached_property
    def digest(self) -> str:
        """A hash over all tokens and where they belong."""
        parts = (self.tokens_T, self.starts_N, self.prompt_N)
        return blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).hexdigest()

    def row(self, index: int) -> tuple[Tensor, int]:
        """A pair's tokens, int64, and how many of them are its prompt."""
        tokens = self.tokens_T[self.starts_N[index] : self.starts_N[index + 1]]
        return torch.from_numpy(tokens.astype(np.int64)), int(self.prompt_N[index])

    def prompt(self, index: int) -> list[int]:
        """The tokens of a pair's prompt."""
        start = int(self.starts_N[index])
        return self.tokens_T[start : start + int(self.prompt_N[index])].tolist()


def encode_pairs(pairs: Sequence[SentencePair], prompts: AnyPrompts, *, max_length: int) -> EncodedPairs:
    """Encodes pairs; those of more than `max_length` tokens, prompt and translation together, are left out, counted."""
    asked, answered = prompts.encode(pairs), prompts.encode_targets([pair.target for pair in pairs])
    rows = [
        (pair, prompt, target)
        for pair, prompt, target in zip(pairs, asked, answered, strict=True)
        if len(prompt) + len(target) <= max_length
    ]
    lengths = [len(prompt) + len(target) for _, prompt, target in rows]
    flat = [np.array(ids, dtype=np.int32) for _, prompt, target in rows for ids in (prompt, target)]
    return EncodedPairs(
        sentences=[pair for pair, _, _ in rows],
        tokens_T=np.concatenate(flat) if flat else np.empty(0, dtype=np.int32),
        starts_N=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        prompt_N=np.array([len(prompt) for _, prompt, _ in rows], dtype=np.int32),
        too_long=len(pairs) - len(rows),
    )


def bucketed_order(length_N: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The pairs of one epoch in order, a pure function of its arguments.

    A shuffled epoch is cut into windows, each is sorted by length and cut into batches, and the batches of the epoch
    are shuffled. Pairs that are too few for a last batch are left out of this epoch; the
    next epoch has another order and leaves out others.
    """
    order = epoch_order(len(length_N), seed=seed, epoch=epoch)
    if len(order) < batch_size:
        return order
    order = order[: len(order) // batch_size * batch_size]
    window = WINDOW_BATCHES * batch_size
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    batches = np.concatenate([part[np.argsort(length_N[part], kind="stable")] for part in parts]).reshape(
        -1, batch_size
    )
    return batches[epoch_order(len(batches), seed=seed, epoch=epoch + _BATCH_ORDER)].ravel()


class PairDataset(Dataset):
    """Everything one run trains on, in order: item i is row i of the run, so read it without shuffling."""

    def __init__(self, pairs: EncodedPairs, *, names: Sequence[str], length: int, batch_size: int, seed: int) -> None:
        """Schedules `length` rows of `pairs`, epochs as needed; `names` are the directions, such as "en-de"."""
        self.pairs, self.length, self.batch_size, self.seed = pairs, length, batch_size, seed
        place = {name: index for index, name in enumerate(names)}
        self.direction_N = [place[pair.pair] for pair in pairs.sentences]
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Rows in the run, repeats counted."""
        return self.length

    def __getitem__(self, position: int) -> Batch:
        """`tokens` (L,), `prompt` (how many of them are not predicted) and `direction`, an index into the names."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside a schedule of {self.length} rows")
        size, batch = len(self.pairs.sentences), self.batch_size
        epoch, offset = divmod(position, size // batch * batch or size)
        if self._epoch is None or self._epoch[0] != epoch:
            order = bucketed_order(self.pairs.length_N, batch_size=batch, seed=self.seed, epoch=epoch)
            self._epoch = (epoch, order)
        return self.item(int(self._epoch[1][offset]))

    def item(self, index: int) -> Batch:
        """Pair `index` of the data."""
        tokens_L, prompt = self.pairs.row(index)
        return {"tokens": tokens_L, "prompt": prompt, "direction": self.direction_N[index]}


def collate_rows(items: list[Batch], *, pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right: `input_ids`, `attention_mask`, `labels` (B, L) and `directions` (B,).

    Labels are -100 on prompts and padding.
    """
    longest = max(len(item["tokens"]) for item in items)
    input_ids = torch.full((len(items), longest), pad, dtype=torch.int64)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, item in enumerate(items):
        length, prompt = len(item["tokens"]), item["prompt"]
        input_ids[row, :length] = item["tokens"]
        attention_mask[row, :length] = 1
        labels[row, prompt:length] = item["tokens"][prompt:]
    directions = torch.tensor([item["direction"] for item in items])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "directions": directions}
