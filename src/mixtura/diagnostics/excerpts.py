"""Short excerpts of named texts: cut, counted, shown, put into batches, and their tokens sorted into kinds.

The kind of a token follows from its text and the token before it:

1. `special`: the tokenizer calls it special (end of text, padding, a language mark).
2. `byte`: its bytes are only part of a character.
3. `space or markup`: nothing but white space and the signs of markup, < > / \\ | & # * _ ~ ^ = ` { } [ ].
4. `digits`: a digit or number sign and no letter.
5. `word start`, `continuation`: a letter. It starts a word where white space comes before it, or no letter, digit
   or apostrophe does.
6. `punctuation`: everything else.

Scripts without spaces between words (Chinese, Japanese, Thai) have continuations where others have words.

Shapes: B batch, L length, T tokens of all excerpts in order, R routed rows, E experts, G groups, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.config.languages import language_code, split_pair
from mixtura.diagnostics.findings import GroupFacts, ShownExcerpt, TypicalToken
from mixtura.diagnostics.specialization import Batch

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


TOKEN_TYPES = ("word start", "continuation", "punctuation", "digits", "space or markup", "byte", "special")
"""In the order in which the page shows them."""

MINIMUM_COUNT = 10
"""Rows that a token needs before it can be typical of anything."""

_WORD_MARKS = ("\u0120", "\u2581")
"""Signs for a space in front of a token, in byte-level vocabularies and in SentencePiece's."""
_PIECE_MARK = "##"
"""Sign for a token that goes on a word, in WordPiece vocabularies."""
_MARKUP = frozenset("<>/\\|&#*_~^=`{}[]")
_APOSTROPHES = ("'", "\N{RIGHT SINGLE QUOTATION MARK}")


def token_surfaces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> dict[int, str]:
    """The text of each of these tokens, with the space that goes before it where there is one."""
    known = sorted(set(ids))
    # A token that only exists beside others, such as padded vocabularies have, has no name.
    names = {token: str(tokenizer.convert_ids_to_tokens(token) or "") for token in known}
    in_pieces = any(name.startswith(_PIECE_MARK) for name in tokenizer.get_vocab())
    return {token: _surface(tokenizer, token, name, in_pieces=in_pieces) for token, name in names.items()}


def _surface(tokenizer: PreTrainedTokenizerBase, token: int, name: str, *, in_pieces: bool) -> str:
    decoded = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    text = decoded if isinstance(decoded, str) else "".join(decoded)
    if in_pieces and token not in tokenizer.all_special_ids:
        return name.removeprefix(_PIECE_MARK) if name.startswith(_PIECE_MARK) else f" {text}"
    return f" {text}" if name.startswith(_WORD_MARKS) and not text[:1].isspace() else text


def token_types(surfaces: Sequence[str], special: Sequence[bool], *, starts: Sequence[bool] | None = None) -> list[int]:
    """Index into `TOKEN_TYPES` of every token of a text.

    Args:
        surfaces: the tokens' texts in order.
        special: whether the tokenizer calls it special.
        starts: true where a text begins, before which there is nothing; None: at the first only.
    """
    found, before = [], ""
    for place, (surface, is_special) in enumerate(zip(surfaces, special, strict=True)):
        if starts is not None and starts[place]:
            before = ""
        kind = "special" if is_special else _type_of(surface, before)
        found.append(TOKEN_TYPES.index(kind))
        before = "" if is_special else surface
    return found


def _type_of(surface: str, before: str) -> str:
    if "\N{REPLACEMENT CHARACTER}" in surface:
        return "byte"
    signs = surface.strip()
    if not signs or _MARKUP.issuperset(signs):
        return "space or markup"
    if any(map(str.isalpha, signs)):
        goes_on = not surface[:1].isspace() and (before[-1:].isalnum() or before.endswith(_APOSTROPHES))
        return "continuation" if goes_on else "word start"
    return "digits" if any(map(str.isnumeric, signs)) else "punctuation"


def typical_tokens(
    token_R: numpy.ndarray,
    expert_R: numpy.ndarray,
    rows_R: numpy.ndarray,
    *,
    num_experts: int,
    minimum_count: int = MINIMUM_COUNT,
    most: int = 12,
) -> list[list[TypicalToken]]:
    """For each expert the tokens that most exceed what independence would send there, the strongest first.

    Pointwise mutual information, log2 p(token, expert) / (p(token) p(expert)) (Church and Hanks 1990), of tokens with
    at least `minimum_count` rows; of equal tokens the more frequent comes first. A token is only listed where its
    information is positive.
    """
    known_V, place_R = numpy.unique(token_R, return_inverse=True)
    counted = numpy.bincount(place_R * num_experts + expert_R, weights=rows_R, minlength=len(known_V) * num_experts)
    rows_VE = counted.reshape(len(known_V), num_experts)
    total_V, total_E = rows_VE.sum(1), rows_VE.sum(0)
    expected_VE = numpy.outer(total_V, total_E) / max(total_E.sum(), 1e-30)
    lists = []
    for expert in range(num_experts):
        listed_V = numpy.flatnonzero((total_V >= minimum_count) & (rows_VE[:, expert] > expected_VE[:, expert]))
        pmi_V = numpy.log2(rows_VE[listed_V, expert] / expected_VE[listed_V, expert])
        order = sorted(range(len(listed_V)), key=lambda v: (-round(pmi_V[v], 9), -total_V[listed_V[v]], v))[:most]
        lists.append(
            [
                TypicalToken(
                    id=int(known_V[listed_V[v]]),
                    count=float(rows_VE[listed_V[v], expert]),
                    share=float(rows_VE[listed_V[v], expert] / total_V[listed_V[v]]),
                    pmi=float(pmi_V[v]),
                )
                for v in order
            ]
        )
    return lists
