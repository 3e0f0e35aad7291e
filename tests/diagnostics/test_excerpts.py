"""The rule on a token's text, real vocabularies of three kinds, and typical tokens by hand."""

import numpy
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mixtura.data import train_tokenizer
from mixtura.diagnostics.excerpts import TOKEN_TYPES, token_surfaces, token_types, typical_tokens
from mixtura.diagnostics.findings import TypicalToken


@pytest.mark.parametrize(
    ("surfaces", "types"),
    [
        ([" the", "ater", "s"], ["word start", "continuation", "continuation"]),
        (["Don", "'", "t"], ["word start", "punctuation", "continuation"]),
        (["(", "Hello", ")", "World"], ["punctuation", "word start", "punctuation", "word start"]),
        ([" 19", "84", "th", "3.5", "%"], ["digits", "digits", "continuation", "digits", "punctuation"]),
        (["\n", "  ", "</", "p", ">"], ["space or markup"] * 3 + ["word start", "space or markup"]),
        (["\N{CYRILLIC SMALL LETTER ZHE}", "\N{REPLACEMENT CHARACTER}"], ["word start", "byte"]),
        ([" ...", " ?!"], ["punctuation", "punctuation"]),
    ],
)
def test_the_rule_by_hand(surfaces: list[str], types: list[str]) -> None:
    assert [TOKEN_TYPES[i] for i in token_types(surfaces, [False] * len(surfaces))] == types


def test_special_tokens_and_new_texts_end_a_word() -> None:
    found = token_types(["ab", "<eos>", "cd", "ef"], [False, True, False, False], starts=[True, False, False, True])
    assert [TOKEN_TYPES[i] for i in found] == ["word start", "special", "word start", "word start"]


def test_byte_level_surfaces_join_to_the_text() -> None:
    tokenizer = train_tokenizer(["a house in the old town, two houses"] * 20, vocab_size=300)
    text = "two old houses, in town"
    ids = tokenizer(text)["input_ids"]
    surfaces = token_surfaces(tokenizer, ids)
    assert "".join(surfaces[i] for i in ids) == text


def test_word_pieces_have_spaces_where_words_begin() -> None:
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "well": 3, ".": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    ids = tokenizer("playing well.")["input_ids"]
    surfaces = [token_surfaces(tokenizer, ids)[i] for i in ids]
    assert surfaces == [" play", "ing", " well", " ."]
    assert [TOKEN_TYPES[i] for i in token_types(surfaces, [False] * 4)] == [
        "word start",
        "continuation",
        "word start",
        "punctuation",
    ]


def test_typical_tokens_by_hand() -> None:
    # Token 7: 12 rows, all in expert 0. Token 8: 12 rows, all in expert 1. Token 9: evenly. Token 5 is too rare.
    token_R = numpy.array([7] * 12 + [8] * 12 + [9] * 24 + [5] * 2)
    expert_R = numpy.array([0] * 12 + [1] * 12 + [0, 1] * 12 + [0, 1])
    first, second = typical_tokens(token_R, expert_R, numpy.ones(50), num_experts=2)
    assert first == [TypicalToken(id=7, count=12.0, share=1.0, pmi=pytest.approx(1.0))]
    assert second == [TypicalToken(id=8, count=12.0, share=1.0, pmi=pytest.approx(1.0))]


def test_an_unused_expert_has_no_typical_tokens() -> None:
    assert typical_tokens(numpy.zeros(20, int), numpy.zeros(20, int), numpy.ones(20), num_experts=2) == [[], []]
