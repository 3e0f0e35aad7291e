"""Short excerpts of named texts: cut, counted, shown and put into batches.

Shapes: B batch, L length, T tokens of all excerpts in order, G groups.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.config.languages import language_code, split_pair
from mixtura.diagnostics.diagnosed import GroupFacts, ShownExcerpt
from mixtura.diagnostics.specialization import Batch
from mixtura.diagnostics.token_types import TOKEN_TYPES

SHOWN_TOKENS = 48
"""Tokens of an excerpt that the page shows."""

SHOWN_EXCERPTS = 3
"""Excerpts of a group that the page shows."""


class Excerpts(NamedTuple):
    """Token ids of short stretches of the texts, group after group."""

    names: list[str]
    """Of the groups."""
    ids: list[list[int]]
    group: list[int]
    """Index of each excerpt's group."""

    @property
    def token_T(self) -> numpy.ndarray:
        """Ids of all tokens."""
        return numpy.concatenate([numpy.array(ids, dtype=numpy.int64) for ids in self.ids])

    @property
    def starts_T(self) -> numpy.ndarray:
        """Where an excerpt begins."""
        return numpy.concatenate([numpy.arange(len(ids)) == 0 for ids in self.ids])

    def describe(self, types_T: numpy.ndarray) -> list[GroupFacts]:
        """Amounts of each group."""
        lengths = numpy.array([len(ids) for ids in self.ids])
        group_T = numpy.repeat(self.group, lengths)
        return [
            GroupFacts(
                name=name,
                excerpts=self.group.count(index),
                tokens=int((group_T == index).sum()),
                token_types=numpy.bincount(types_T[group_T == index], minlength=len(TOKEN_TYPES)).tolist(),
            )
            for index, name in enumerate(self.names)
        ]

    def samples(self, tokenizer: PreTrainedTokenizerBase, surfaces: Mapping[int, str]) -> list[ShownExcerpt]:
        """Some excerpts of every group, spread over its text, as pieces; those that are mere scraps are passed over."""
        chosen: list[ShownExcerpt] = []
        for index, name in enumerate(self.names):
            own = [place for place, group in enumerate(self.group) if group == index]
            long = [place for place in own if len(self.ids[place]) >= SHOWN_TOKENS // 3] or own
            for place in long[:: max(1, len(long) // SHOWN_EXCERPTS)][:SHOWN_EXCERPTS]:
                pieces = text_pieces(tokenizer, self.ids[place][:SHOWN_TOKENS], surfaces)
                chosen.append(ShownExcerpt(name, place, pieces))
        return chosen


def cut_excerpts(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[str]], *, length: int, max_tokens: int
) -> Excerpts:
    """Cuts documents into excerpts of at most `length` tokens, from the first until `max_tokens` of a group are read.

    Raises:
        UserError: there is no text, or a group's is empty.
    """
    if not texts:
        raise UserError("There is no text to diagnose the model on: give at least one, such as --text de=german.txt.")
    if max_tokens < 1:
        raise UserError(f"{max_tokens} tokens of each text cannot be read: give 1 or more.")
    cut = Excerpts(list(texts), [], [])
    for index, (name, documents) in enumerate(texts.items()):
        room = max_tokens
        for document in documents:
            # A token is rarely longer than 16 characters, and the rest of a huge document would be encoded for nothing.
            ids = tokenizer(document[: 16 * room], verbose=False)["input_ids"][:room]
            cut.ids.extend(ids[start : start + length] for start in range(0, len(ids), length))
            room -= len(ids)
            if not room:
                break
        if room == max_tokens:
            raise UserError(f"The text '{name}' is empty: give one with words in it.")
        cut.group.extend([index] * (len(cut.ids) - len(cut.group)))
    return cut


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], surfaces: Mapping[int, str]) -> list[str]:
    """The text of each token; where characters are split over tokens the last of these has it, the others nothing."""
    pieces, pending = [], []
    for token in ids:
        pending.append(token)
        text = surfaces[token] if len(pending) == 1 else str(tokenizer.decode(pending))
        # No character has more than 4 bytes, so what is broken after 4 tokens stays broken.
        whole = "\N{REPLACEMENT CHARACTER}" not in text or len(pending) == 4
        pieces.append(text if whole else "")
        pending = [] if whole else pending
    return pieces


def batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    excerpts: Excerpts,
    batch_size: int,
    before_batch: Callable[[Tensor], object] | None = None,
) -> Iterator[Batch]:
    """Excerpts in order, filled up on the right; a model with experts that are named for languages gets their indices.

    `before_batch` is called with the groups (B,) of every batch before the model runs on it.

    Raises:
        UserError: the experts are named and a group has another name.
    """
    expert_G = _named_experts(model.config, excerpts.names)
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    for start in range(0, len(excerpts.ids), batch_size):
        ids = excerpts.ids[start : start + batch_size]
        longest = max(map(len, ids))
        group_B = torch.tensor(excerpts.group[start : start + batch_size])
        inputs = {
            "input_ids": torch.tensor([row + [padding] * (longest - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        }
        if expert_G is not None:
            inputs["expert_ids"] = expert_G[group_B]
        if before_batch is not None:
            before_batch(group_B)
        yield {key: value.to(model.device) for key, value in inputs.items()}, group_B, inputs["attention_mask"]


def _named_experts(config: Any, groups: Sequence[str]) -> Tensor | None:
    """The expert of each group (G,) in a model whose experts are named for languages; None where tokens choose."""
    if getattr(config, "route_by", "token") == "token":
        return None
    names = config.expert_names or []
    spelled = [group if group in names else str(split_pair(group) or language_code(group)) for group in groups]
    for group, name in zip(groups, spelled, strict=True):
        if name not in names:
            raise UserError(
                f"The model's experts are named for their {config.route_by}, and none is called '{group}': call the "
                f"texts by some of {', '.join(names)}."
            )
    return torch.tensor([names.index(name) for name in spelled])
