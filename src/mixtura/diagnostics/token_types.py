"""Kinds of tokens, by a rule on their text, and the tokens that are typical of an expert.

The rule looks at a token's text and at the token before it, and at nothing else:

1. `special`: the tokenizer calls it special (end of text, padding, a language mark).
2. `byte`: its bytes are only part of a character.
3. `space or markup`: nothing but white space and the signs of markup, < > / \\ | & # * _ ~ ^ = ` { } [ ].
4. `digits`: a digit or number sign and no letter.
5. `word start`, `continuation`: a letter. It starts a word where white space comes before it, or no letter, digit
   or apostrophe does.
6. `punctuation`: the rest.

Scripts without spaces between words (Chinese, Japanese, Thai) have continuations where others have words.

Shapes: T tokens, R routed rows, E experts, V vocabulary.
"""

from collections.abc import Sequence

import numpy
from transformers import PreTrainedTokenizerBase

from mixtura.diagnostics.diagnosed import TypicalToken

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
