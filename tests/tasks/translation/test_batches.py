"""Prompts, batches of similar length and their order."""

import numpy as np
import pytest
import torch

from mixtura.config import UserError
from mixtura.data.parallel import SentencePair
from mixtura.data.prepare import train_tokenizer
from mixtura.tasks.translation.batches import PairDataset, bucketed_order, collate_rows, encode_pairs
from mixtura.tasks.translation.prompts import Prompts, add_prompt_tokens, train_translation_tokenizer

PAIRS = [
    SentencePair("a cat", "eine Katze", "en", "de"),
    SentencePair("a very small dog <eos>", "un tout petit chien <sep>", "en", "fr"),
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in PAIRS for text in (pair.source, pair.target)]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    add_prompt_tokens(tokenizer, ["de", "fr"])
    return tokenizer


def test_a_model_from_scratch_is_told_the_target_language_and_where_the_source_ends(tokenizer):
    prompts = Prompts("tokens", tokenizer)
    for ids, pair in zip(prompts.encode(PAIRS), PAIRS, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert (tokens[0], tokens[-1]) == (f"<2{pair.target_language}>", "<sep>")
        assert tokenizer.decode(ids[1:-1]) == pair.source
        assert prompts.eos not in ids[1:-1] and ids.count(ids[-1]) == 1  # what a text spells out stays text
    for ids, pair in zip(prompts.encode_targets([pair.target for pair in PAIRS]), PAIRS, strict=True):
        assert ids[-1] == prompts.eos and prompts.decode([ids, [*ids, *ids]]) == [pair.target] * 2


def test_a_base_model_is_asked_in_words(tokenizer):
    prompts = Prompts("instruction", tokenizer)
    asked = tokenizer.decode(prompts.encode(PAIRS[:1])[0])
    assert asked == "Translate this from English to German:\nEnglish: a cat\nGerman:"
    assert tokenizer.decode(prompts.encode_targets(["eine Katze"])[0][:-1]) == " eine Katze"


def test_the_prompt_says_nothing_of_the_translation(tokenizer):
    other = PAIRS[0]._replace(target="ein Hund")
    for kind in ("tokens", "instruction"):
        prompts = Prompts(kind, tokenizer)
        assert prompts.encode([other]) == prompts.encode(PAIRS[:1])


def test_an_unknown_language_is_refused(tokenizer):
    with pytest.raises(UserError, match="no token <2es>: it was not trained to translate into that language"):
        Prompts("tokens", tokenizer).encode([PAIRS[0]._replace(target_language="es")])


def test_pairs_that_are_too_long_are_left_out_and_counted(tokenizer):
    prompts = Prompts("tokens", tokenizer)
    whole = encode_pairs(PAIRS, prompts, max_length=100)
    shortest = int(whole.length_N.min())
    cut = encode_pairs(PAIRS, prompts, max_length=shortest)
    assert (len(whole.sentences), whole.too_long, len(cut.sentences), cut.too_long) == (2, 0, 1, 1)
    assert cut.sentences == [PAIRS[int(whole.length_N.argmin())]]
    assert whole.digest != cut.digest


def test_a_batch_predicts_the_translation_and_eos_alone(tokenizer):
    prompts = Prompts("tokens", tokenizer)
    data = PairDataset(
        encode_pairs(PAIRS, prompts, max_length=100), names=["en-fr", "en-de"], length=0, batch_size=2, seed=0
    )
    batch = collate_rows([data.item(0), data.item(1)], pad=prompts.pad)
    assert batch["directions"].tolist() == [1, 0]
    for row, pair in enumerate(PAIRS):
        length = int(batch["attention_mask"][row].sum())
        predicted = batch["labels"][row] != -100
        assert prompts.decode([batch["labels"][row][predicted].tolist()]) == [pair.target]
        assert batch["labels"][row, length - 1] == prompts.eos and not predicted[length:].any()
        assert (batch["input_ids"][row, length:] == prompts.pad).all()
        assert torch.equal(batch["input_ids"][row][predicted], batch["labels"][row][predicted])


def test_an_epoch_has_every_pair_once_in_batches_of_similar_length():
    length_N = np.random.default_rng(0).integers(5, 100, 1000)
    first, again, other = (bucketed_order(length_N, batch_size=8, seed=seed, epoch=0) for seed in (0, 0, 1))
    assert (
        sorted(first.tolist()) == list(range(1000))
        and np.array_equal(first, again)
        and not np.array_equal(first, other)
    )
    padded = length_N[first].reshape(-1, 8).max(1).sum() * 8
    assert padded / length_N.sum() < 1.05
    lengths_of_batches = length_N[first].reshape(-1, 8).mean(1)
    assert not (np.diff(lengths_of_batches) > 0).all()
    assert not np.array_equal(first, bucketed_order(length_N, batch_size=8, seed=0, epoch=1))


def test_what_fills_no_batch_waits_for_another_epoch(tokenizer):
    pairs = encode_pairs(
        [PAIRS[0]._replace(source=f"cat {i}") for i in range(10)], Prompts("tokens", tokenizer), max_length=99
    )
    run = PairDataset(pairs, names=["en-de"], length=80, batch_size=4, seed=0)
    seen = [tuple(run[i]["tokens"].tolist()) for i in range(80)]
    assert all(len(set(seen[start : start + 8])) == 8 for start in range(0, 80, 8))
    assert len(set(seen)) == 10
    assert [tuple(run[i]["tokens"].tolist()) for i in (5, 70, 5)] == [seen[5], seen[70], seen[5]]
    with pytest.raises(IndexError):
        run[80]


def test_a_trained_tokenizer_has_the_size_asked_for_and_is_kept(tmp_path):
    texts = ["ein Haus und noch ein Haus", "a house and another house"] * 20
    first = train_translation_tokenizer(texts, ["de"], vocab_size=270, cache_dir=tmp_path)
    assert len(first) == 270
    folder = next(tmp_path.iterdir())
    changed = folder / "tokenizer.json"
    stamp = changed.stat().st_mtime_ns
    again = train_translation_tokenizer(texts, ["de"], vocab_size=270, cache_dir=tmp_path)
    assert again.get_vocab() == first.get_vocab() and changed.stat().st_mtime_ns == stamp
    assert Prompts("tokens", again).encode(PAIRS[:1]) == Prompts("tokens", first).encode(PAIRS[:1])
    train_translation_tokenizer(texts, ["de", "fr"], vocab_size=270, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    changed.write_text("{", encoding="utf-8")
    assert (
        train_translation_tokenizer(texts, ["de"], vocab_size=270, cache_dir=tmp_path).get_vocab() == first.get_vocab()
    )
