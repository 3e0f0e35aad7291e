"""Chats packed into windows, several in one, none of which sees another.

Positions begin anew with each chat, and attention is causal inside a chat and nothing outside it, so a packed chat gets
the numbers that it gets alone. Windows are filled by best fit, longest chats first (Ding et al. 2024, arXiv 2404.10830,
section 3), so that little is padding and no chat is cut to make it fit.

Shapes: N windows, B batch, L length of a batch's longest window.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixtura.data.packing import sequence_index
from mixtura.tasks.chat.prompts import Example
from mixtura.training.interface import Batch


@dataclass(frozen=True)
class PackedChats:
    """The examples of one split, and the windows that they are packed into."""

    examples: list[Example]
    windows: list[list[int]]
    """For each window the places of its examples."""
    cut: int = 0
    """Chats that lost their end, because they have more tokens than a window."""
    lost: int = 0
    """Chats without an answer inside the tokens of a window, which are left out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_targets(self) -> int:
        """Tokens of answers."""
        return sum(sum(example.targets) for example in self.examples)

    @cached_property
    def digest(self) -> str:
        """A hash over all tokens and where they belong."""
        digest = blake2b(digest_size=16)
        for ids, targets, chat in self.examples:
            digest.update(np.array([chat, len(ids), *ids, *targets], dtype=np.int64).tobytes())
        digest.update(repr(self.windows).encode())
        return digest.hexdigest()

    def item(self, index: int) -> Batch:
        """A window: `tokens`, `targets`, `segments` (1, 2, ... by example) and `chats` (of each token), all (L,)."""
        parts = [self.examples[place] for place in self.windows[index]]
        lengths = torch.tensor([len(part.ids) for part in parts])
        return {
            "tokens": torch.tensor([token for part in parts for token in part.ids]),
            "targets": torch.tensor([target for part in parts for target in part.targets]),
            "segments": torch.arange(1, len(parts) + 1).repeat_interleave(lengths),
            "chats": torch.tensor([part.chat for part in parts]).repeat_interleave(lengths),
        }


def pack_chats(examples: Iterable[Example], *, window: int) -> PackedChats:
    """Packs examples into windows of at most `window` tokens; longer ones lose their end, and are counted."""
    kept: list[Example] = []
    cut, lost = set[int](), set[int]()
    for ids, targets, chat in examples:
        # The first token of an example is predicted by none.
        if not any(targets[1:window]):
            lost.add(chat)
            continue
        if len(ids) > window:
            cut.add(chat)
        kept.append(Example(ids[:window], targets[:window], chat))
    return PackedChats(kept, _best_fit([len(example.ids) for example in kept], window), len(cut), len(lost))


def _best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    windows: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[place]
        room = next((room for room in range(length, window) if by_room[room]), window)
        if room < window:
            chosen = by_room[room].pop()
        else:
            chosen = len(windows)
            windows.append([])
        windows[chosen].append(place)
        by_room[room - length].append(chosen)
    return windows


class ChatDataset(Dataset):
    """Everything one run trains on, in order: item i is row i of the run, so read it without shuffling."""

    def __init__(self, packed: PackedChats, *, length: int, seed: int) -> None:
        """Schedules `length` windows, epochs as needed, each in an order of its own."""
        self.packed, self.length, self.seed = packed, length, seed

    def __len__(self) -> int:
        """Windows in the run, repeats counted."""
        return self.length

    def __getitem__(self, position: int) -> Batch:
        """A window; see `PackedChats.item`."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside a schedule of {self.length} windows")
        return self.packed.item(sequence_index(position, num_sequences=len(self.packed.windows), seed=self.seed))


def collate_windows(items: list[Batch], *, pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right: `input_ids`, `labels`, `position_ids`, `segments` and `chats`, all (B, L).

    Labels are -100 outside the assistant's answers, segments 0 on padding; positions begin anew with each segment.
    """
    longest = max(len(item["tokens"]) for item in items)
    batch = {
        "input_ids": torch.full((len(items), longest), pad, dtype=torch.int64),
        "labels": torch.full((len(items), longest), -100, dtype=torch.int64),
        "segments": torch.zeros(len(items), longest, dtype=torch.int64),
        "chats": torch.zeros(len(items), longest, dtype=torch.int64),
    }
    for row, item in enumerate(items):
        length = len(item["tokens"])
        batch["input_ids"][row, :length] = item["tokens"]
        batch["labels"][row, :length] = torch.where(item["targets"], item["tokens"], -100)
        batch["segments"][row, :length] = item["segments"]
        batch["chats"][row, :length] = item["chats"]
    segments_BL = batch["segments"]
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    # No example is predicted by the one before it: the first token of each is no target.
    batch["labels"][starts_BL] = -100
    places_L = torch.arange(longest)
    batch["position_ids"] = places_L - torch.where(starts_BL, places_L, 0).cummax(1).values
    return batch


def packed_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What a model's forward takes of a batch: ids, positions, and a mask (B, 1, L, L) of what a token may attend to.

    That is its own example up to itself. A padded token attends to the window's first one and not to itself, by which
    mixtures and adapters know it for padding. Attention in PyTorch's own loops adds the mask, so that it gets numbers.
    """
    segments_BL = batch["segments"]
    length = segments_BL.size(1)
    real_BL = segments_BL > 0
    same_BLL = (segments_BL[:, :, None] == segments_BL[:, None, :]) & real_BL[:, :, None]
    may_BLL = same_BLL & torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    may_BLL[:, :, 0] |= ~real_BL
    mask = may_BLL[:, None]
    config = getattr(model, "module", model).config
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        dtype = next(model.parameters()).dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
