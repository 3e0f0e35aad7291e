"""The way from `[data]` to windows: what it reports, and a cache that is right, safe and whole."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixtura.config import DataConfig, UserError
from mixtura.data import prepare
from mixtura.data.prepare import (
    MAX_TRAINING_CHARACTERS,
    PreparedData,
    _sample,
    load_tokenizer,
    prepare_data,
    train_tokenizer,
)
from mixtura.data.short_texts import fit_held_out

SLOW_PARTS = ["reading", "training tokenizer", "encoding"]


@pytest.fixture
def data(tmp_path) -> DataConfig:
    rng = random.Random(0)
    words = ["the", "a", "cat", "dog", "mat", "log", "sat", "ran", "under", "and", "but", "\N{SNOWMAN}"]
    texts = ["\n".join(" ".join(rng.choices(words, k=8)) for _ in range(3)) for _ in range(60)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return DataConfig(source="local", path=str(path), vocab_size=280, sequence_length=16, validation_fraction=0.3)


def prepared(data: DataConfig, cache_dir: Path | None) -> tuple[PreparedData, list[str]]:
    """The data and the phrases reported on the way."""
    phrases: list[str] = []
    return prepare_data(data, cache_dir=cache_dir, on_progress=phrases.append), phrases


def same(a: PreparedData, b: PreparedData) -> bool:
    arrays = [
        (a.train.sequences_NL, b.train.sequences_NL),
        (a.validation.sequences_NL, b.validation.sequences_NL),
    ]
    rest = [
        (
            d.summary,
            d.tokenizer.get_vocab(),
            d.train.bytes_per_token,
            d.train.tokens_dropped,
            d.validation.bytes_per_token,
        )
        for d in (a, b)
    ]
    return rest[0] == rest[1] and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in arrays)


def test_the_summary_adds_up(data):
    result, phrases = prepared(data, None)
    summary = result.summary
    assert phrases == SLOW_PARTS
    assert summary == json.loads(json.dumps(summary))
    assert summary["documents_train"] + summary["documents_validation"] == 60
    assert summary["documents_validation"] > 5
    text_bytes = len(Path(str(data.path)).read_bytes()) - 2 * 59
    assert summary["bytes_train"] + summary["bytes_validation"] == text_bytes
    assert summary["tokens_train"] == result.train.sequences_NL.size
    assert summary["tokens_validation"] == result.validation.sequences_NL.size
    tokens = summary["tokens_validation"] + summary["tokens_dropped_validation"]
    assert summary["bytes_per_token"] == summary["bytes_validation"] / tokens
    assert summary["vocab_size"] == len(result.tokenizer) == 280
    assert summary["sequence_length"] == result.train.sequence_length == 16
    assert summary["description"] == "the file text.txt"
    assert "BPE" in summary["tokenizer"]


def test_no_held_out_document_is_trained_on(data):
    result, _ = prepared(dataclasses.replace(data, sequence_length=1), None)
    eos = result.tokenizer.eos_token
    train = set(result.tokenizer.decode(result.train.sequences_NL.ravel()).split(eos)) - {""}
    assert len(train) == result.summary["documents_train"]
    texts = set(Path(str(data.path)).read_text(encoding="utf-8").split("\n\n"))
    assert len(texts - train) == result.summary["documents_validation"]


def test_held_out_windows_are_shuffled_the_same_way_each_time(data, monkeypatch):
    first, _ = prepared(data, None)
    second, _ = prepared(data, None)
    assert same(first, second)
    monkeypatch.setattr(prepare, "epoch_order", lambda n, **_: np.arange(n))
    unshuffled = prepared(data, None)[0].validation.sequences_NL
    assert not np.array_equal(first.validation.sequences_NL, unshuffled)
    assert sorted(map(tuple, first.validation.sequences_NL)) == sorted(map(tuple, unshuffled))


def test_the_second_call_comes_from_the_cache_and_is_the_same(data, tmp_path):
    first, first_phrases = prepared(data, tmp_path / "deep" / "cache")
    second, second_phrases = prepared(data, tmp_path / "deep" / "cache")
    assert first_phrases == SLOW_PARTS
    assert second_phrases == ["loading cached tokens"]
    assert same(first, second)
    text = "any <eos> text \N{SNOWMAN}"
    assert first.tokenizer(text)["input_ids"] == second.tokenizer(text)["input_ids"]


def test_a_finished_cache_holds_one_entry_and_nothing_temporary(data, tmp_path):
    prepared(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    names = {path.name for path in entry.rglob("*") if path.is_file()}
    assert {"train.npy", "validation.npy", "prepared.json", "tokenizer.json"} <= names


CHANGES = {
    "vocab_size": 290,
    "sequence_length": 8,
    "max_bytes": 3000,
    "validation_fraction": 0.5,
}


@pytest.mark.parametrize(("key", "value"), CHANGES.items(), ids=CHANGES)
def test_another_recipe_is_another_cache_entry(data, tmp_path, key, value):
    prepared(data, tmp_path / "cache")
    changed = dataclasses.replace(data, **{key: value})
    from_cache_folder, phrases = prepared(changed, tmp_path / "cache")
    assert phrases == SLOW_PARTS
    assert same(from_cache_folder, prepared(changed, None)[0])


def test_a_changed_file_is_read_again(data, tmp_path):
    prepared(data, tmp_path / "cache")
    path = Path(str(data.path))
    size, changed = path.stat().st_size, path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(changed, changed))
    assert path.stat().st_size == size
    assert prepared(data, tmp_path / "cache")[1] == SLOW_PARTS


def test_a_changed_library_version_is_another_entry(data, tmp_path, monkeypatch):
    prepared(data, tmp_path / "cache")
    monkeypatch.setattr(prepare, "version", lambda package: "99.0")
    assert prepared(data, tmp_path / "cache")[1] == SLOW_PARTS


DAMAGE = {
    "truncated array": lambda entry: (entry / "train.npy").write_bytes((entry / "train.npy").read_bytes()[:-100]),
    "flipped bit": lambda entry: (entry / "train.npy").write_bytes((entry / "train.npy").read_bytes()[:-1] + b"\x7f"),
    "missing array": lambda entry: (entry / "validation.npy").unlink(),
    "missing tokenizer": lambda entry: (entry / "tokenizer" / "tokenizer.json").unlink(),
    "broken manifest": lambda entry: (entry / "prepared.json").write_text('{"summary": '),
    "manifest of another kind": lambda entry: (entry / "prepared.json").write_text("[]"),
    "missing manifest": lambda entry: (entry / "prepared.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_anew(data, tmp_path, damage):
    first, _ = prepared(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry)
    second, phrases = prepared(data, tmp_path / "cache")
    assert phrases == ["replacing damaged cached tokens", *SLOW_PARTS]
    assert same(first, second)
    assert prepared(data, tmp_path / "cache")[1] == ["loading cached tokens"]


def test_a_pickled_array_in_the_cache_is_never_unpickled(data, tmp_path):
    prepared(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    np.save(entry / "train.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((entry / "prepared.json").read_text())
    manifest["checksums"] = prepare._checksums(entry)
    (entry / "prepared.json").write_text(json.dumps(manifest))
    assert prepared(data, tmp_path / "cache")[1] == ["replacing damaged cached tokens", *SLOW_PARTS]


def test_an_interrupted_call_leaves_no_entry(data, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(data, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert prepared(data, tmp_path / "cache")[1] == SLOW_PARTS


def test_two_processes_that_store_at_once_leave_one_good_entry(data, tmp_path, monkeypatch):
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        prepared(data, tmp_path / "cache")  # the other process is first
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    prepared(data, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert prepared(data, tmp_path / "cache")[1] == ["loading cached tokens"]


def test_a_cache_folder_that_cannot_be_written_is_refused_before_the_work(data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    phrases: list[str] = []
    with pytest.raises(UserError, match=r"cache folder '.*' cannot be written"):
        prepare_data(data, cache_dir=tmp_path / "file" / "cache", on_progress=phrases.append)
    assert phrases == []


def test_a_full_disk_is_refused_in_one_sentence(data, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        prepared(data, tmp_path / "cache")


def test_a_tokenizer_folder_can_be_used_and_its_change_is_noticed(data, tmp_path):
    folder = tmp_path / "tokenizer"
    train_tokenizer(["the cat sat on the mat"] * 10, vocab_size=265).save_pretrained(folder)
    data = dataclasses.replace(data, tokenizer=str(folder))
    result, phrases = prepared(data, tmp_path / "cache")
    assert phrases == ["reading", "encoding"]
    assert result.summary["tokenizer"] == str(folder)
    assert result.summary["vocab_size"] == 265
    train_tokenizer(["the dog ran under the log"] * 10, vocab_size=270).save_pretrained(folder)
    assert prepared(data, tmp_path / "cache")[0].summary["vocab_size"] == 270


def test_held_out_text_shorter_than_a_window_is_named(data):
    with pytest.raises(UserError, match=r"The held-out text has .* tokens, fewer than the 2000"):
        prepared(dataclasses.replace(data, sequence_length=2000, validation_fraction=0.1), None)


def test_the_tokenizer_never_sees_held_out_text(data, monkeypatch):
    seen: list[str] = []

    def spy(documents: list[str], *, vocab_size: int) -> object:
        seen.extend(documents)
        return train_tokenizer(documents, vocab_size=vocab_size)

    monkeypatch.setattr(prepare, "train_tokenizer", spy)
    result, _ = prepared(data, None)
    assert len(seen) == result.summary["documents_train"]


@pytest.mark.slow
def test_the_default_recipe_is_prepared():
    summary = prepare_data(DataConfig(), cache_dir=None).summary
    assert summary["bytes_train"] + summary["bytes_validation"] == 16_000_000
    assert (
        0.04 < summary["documents_validation"] / (summary["documents_train"] + summary["documents_validation"]) < 0.06
    )
    assert summary["rows_skipped"]["duplicate"] > 0


def test_more_is_held_out_where_it_would_fill_no_batch(data):
    data = dataclasses.replace(data, validation_fraction=0.02)
    fitted, found = fit_held_out(data, lambda section: prepare_data(section, cache_dir=None), wanted=8)
    assert fitted.validation_fraction > 0.02 and found.validation.num_sequences >= 8
    same, _ = fit_held_out(fitted, lambda section: prepare_data(section, cache_dir=None), wanted=8)
    assert same == fitted


def test_sequences_are_shorter_where_a_text_fills_none(data, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(f"The cat {n} sat on the mat and ran." for n in range(24)), encoding="utf-8")
    data = dataclasses.replace(data, path=str(short), sequence_length=256)
    fitted, found = fit_held_out(data, lambda section: prepare_data(section, cache_dir=None), wanted=4)
    assert fitted.sequence_length in (32, 64, 128) and found.validation.num_sequences >= 1
    data = dataclasses.replace(data, sequence_length=100_000)
    with pytest.raises(UserError, match="fewer than the 100000"):
        fit_held_out(data, lambda section: prepare_data(section, cache_dir=None), wanted=4)


def test_the_end_of_a_single_document_is_held_out(data, tmp_path):
    single = tmp_path / "single.txt"
    single.write_text("\n".join(f"line {n} of one long document" for n in range(200)), encoding="utf-8")
    found = prepare_data(dataclasses.replace(data, path=str(single)), cache_dir=None)
    assert "whose end is held out" in found.summary["description"]
    assert found.train.num_sequences > found.validation.num_sequences > 0


TEXTS = [f"the cat number {i} sat on the mat, and the dog number {i} sat on the log." for i in range(100)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def reloaded(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save_pretrained(folder)
    return load_tokenizer(str(folder))


@given(text=st.text() | st.text(alphabet="<>eospadb/ .'\r\n\t\u00e9\u0301\u200d\ufeff"))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly(trained, reloaded, text):
    ids = trained(text)["input_ids"]
    assert trained.decode(ids, clean_up_tokenization_spaces=False) == text
    assert trained.decode(ids) == text
    assert reloaded(text)["input_ids"] == ids
    assert reloaded.decode(ids) == text


def test_special_tokens_have_the_first_ids_and_are_not_added(trained):
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert set(trained("the cat")["input_ids"]).isdisjoint({0, 1, 2})


def test_a_special_token_spelled_in_text_is_plain_text(trained):
    ids = trained("a<eos><pad><bos>b")["input_ids"]
    assert set(ids).isdisjoint({0, 1, 2})
    assert trained.decode(ids, skip_special_tokens=True) == "a<eos><pad><bos>b"


def test_frequent_words_become_short(trained):
    assert len(trained) == 300
    assert len(trained("the cat sat on the mat")["input_ids"]) < 12


def test_training_is_deterministic(trained):
    assert train_tokenizer(iter(TEXTS), vocab_size=300).get_vocab() == trained.get_vocab()


def test_a_short_text_gives_a_smaller_vocabulary():
    assert 259 <= len(train_tokenizer(["ab"], vocab_size=5000)) < 270


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    assert len(train_tokenizer(TEXTS, vocab_size=259)) == 259
    with pytest.raises(UserError, match=r"'data.vocab_size' is 258: it must be 259 or more"):
        train_tokenizer(TEXTS, vocab_size=258)


def test_a_large_corpus_is_sampled_from_start_to_end():
    documents = [str(i).ljust(100_000) for i in range(200)]  # 20 million characters
    sample = _sample(documents)
    assert sum(map(len, sample)) <= MAX_TRAINING_CHARACTERS
    assert [int(text) for text in sample] == list(range(0, 200, 3))
    assert _sample(documents[:80]) == documents[:80]


def test_a_tokenizer_folder_is_loaded(reloaded, trained):
    assert reloaded.get_vocab() == trained.get_vocab()
    assert reloaded.eos_token == "<eos>"


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe"], ids=["no file", "not a tokenizer", "binary"])
def test_a_folder_without_a_good_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer '.*' cannot be loaded .*'data.tokenizer' to a folder") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_remote_code_is_never_trusted(monkeypatch):
    asked = {}

    def from_pretrained(name: str, **options: object) -> None:
        asked.update(options)
        raise ValueError(f"{name} contains custom code which must be executed.\nSet trust_remote_code=True.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"contains custom code which must be executed"):
        load_tokenizer("someone/tricky")
    assert asked == {"trust_remote_code": False}


@pytest.mark.network
def test_gpt2_loads_from_the_hub():
    assert load_tokenizer("gpt2").eos_token == "<|endoftext|>"
