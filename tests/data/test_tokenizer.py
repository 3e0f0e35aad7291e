"""Tokenizers: the exact round trip of the trained one, and what is asked of a loaded one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixtura.config import UserError
from mixtura.data.tokenizer import MAX_TRAINING_CHARACTERS, _sample, load_tokenizer, train_tokenizer

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
