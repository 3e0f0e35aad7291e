"""Token windows and the order in which training sees them.

Shapes: `N` sequences, `L` tokens a sequence. The order is a pure function of (seed, position): a run that resumes, or
that cuts its batches differently, sees the same sequences in the same order, and so do all arms of a comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mixtura.data.shards import ShardedSequences, scattered
from mixtura.data.tokenizing import encode
from mixtura.errors import TooLittleText

HELD_OUT = "the held-out text"
"""The name of the held-out side in messages."""


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of one split, cut into windows of one length."""

    sequences_NL: np.ndarray | ShardedSequences
    """(N, L) int32, at least one row; in memory, or in files that are read a row at a time."""
    bytes_per_token: float
    """UTF-8 bytes of the documents over all their tokens, the one eos after each document counted, the remainder too.

    The loss predicts those tokens, so bits per byte = loss / ln(2) / bytes_per_token.
    """
    tokens_dropped: int = 0
    """Tokens after the last full window, fewer than L."""

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.sequences_NL.shape[0]

    @property
    def sequence_length(self) -> int:
        """L."""
        return self.sequences_NL.shape[1]

    @property
    def num_tokens(self) -> int:
        """N * L, the tokens in full windows."""
        return self.sequences_NL.size

    def index_at(self, position: int, *, seed: int) -> int:
        """Which sequence stands at `position` of a run; each epoch is a fresh permutation, a function of the seed.

        For tokens in files it is another permutation than for the same tokens in memory, one that is never written out.
        """
        if isinstance(self.sequences_NL, ShardedSequences):
            epoch, offset = divmod(position, self.num_sequences)
            return scattered(offset, number=self.num_sequences, seed=seed, epoch=epoch)
        return sequence_index(position, num_sequences=self.num_sequences, seed=seed)

    def content(self) -> bytes:
        """What is equal where the tokens and their places are: the tokens, or the checksums of their files."""
        if isinstance(self.sequences_NL, ShardedSequences):
            return self.sequences_NL.content()
        return self.sequences_NL.tobytes()


def pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    name: str = "the text",
) -> PackedTokens:
    """Encodes documents, ends each with eos (no bos) and cuts the stream into (N, L) windows; the remainder is dropped.

    Special tokens that are spelled out in a document are encoded as plain text.

    Args:
        documents: texts in their order.
        tokenizer: any tokenizer with an eos token.
        sequence_length: L.
        name: what to call the documents in an error, such as "the held-out text".

    Raises:
        UserError: the documents do not fill one window.
    """
    tokens = encode(documents, tokenizer)
    num_sequences, tokens_dropped = _whole_sequences(tokens.size, sequence_length, name)
    num_bytes = sum(len(document.encode()) for document in documents)
    return PackedTokens(
        sequences_NL=tokens[: num_sequences * sequence_length].reshape(num_sequences, sequence_length),
        bytes_per_token=num_bytes / tokens.size,
        tokens_dropped=tokens_dropped,
    )


def packed_shards(sequences_NL: ShardedSequences, *, num_bytes: int, name: str) -> PackedTokens:
    """The same of documents whose tokens are in files.

    Args:
        sequences_NL: their (N, L) sequences.
        num_bytes: UTF-8 bytes of the documents.
        name: as for `pack`.

    Raises:
        UserError: the documents do not fill one window.
    """
    _, tokens_dropped = _whole_sequences(sequences_NL.tokens, sequences_NL.shape[1], name)
    return PackedTokens(sequences_NL, num_bytes / sequences_NL.tokens, tokens_dropped)


def _whole_sequences(tokens: int, sequence_length: int, name: str) -> tuple[int, int]:
    """How many sequences the tokens fill, and how many tokens are left over."""
    if tokens < sequence_length:
        raise TooLittleText(
            f"{name[0].upper()}{name[1:]} has {tokens} tokens, fewer than the {sequence_length} of "
            "'data.sequence_length': give more text, lower 'data.sequence_length' or change "
            "'data.validation_fraction'.",
            held_out=name == HELD_OUT,
        )
    return divmod(tokens, sequence_length)


def sequence_index(position: int, *, num_sequences: int, seed: int) -> int:
    """Which sequence stands at `position` = step * batch_size + row of a run; each epoch is a fresh permutation."""
    epoch, offset = divmod(position, num_sequences)
    return int(epoch_order(num_sequences, seed=seed, epoch=epoch)[offset])


@lru_cache(maxsize=4)
def epoch_order(num_sequences: int, *, seed: int, epoch: int) -> np.ndarray:
    """(N,) permutation of the sequences, a pure function of (seed, epoch).

    It sorts raw Philox words, whose values numpy fixes for good; what `Generator.permutation` returns may change
    between numpy versions.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_sequences), kind="stable")
    order.setflags(write=False)
    return order


class ScheduledDataset(torch.utils.data.Dataset):
    """Everything one run trains on, in order: item i is row i of the run, so read it without shuffling."""

    def __init__(self, packed: PackedTokens, *, length: int, seed: int) -> None:
        """Schedules `length` = steps * batch_size * accumulation * ranks sequences of `packed`, epochs as needed."""
        self.packed = packed
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        """Sequences in the run, repeats counted."""
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """`input_ids` (L,) and `labels` (L,), int64 and equal: the model shifts."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside a schedule of {self.length} sequences")
        index = self.packed.index_at(position, seed=self.seed)
        tokens_L = torch.from_numpy(self.packed.sequences_NL[index].astype(np.int64))
        return {"input_ids": tokens_L, "labels": tokens_L.clone()}
