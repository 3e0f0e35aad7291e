"""Windows of tokens, and an order that is a pure function of seed and position."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.config import UserError
from mixtura.data import tokenizing
from mixtura.data.packing import PackedTokens, ScheduledDataset, epoch_order, pack, sequence_index
from mixtura.data.prepare import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte: id = 3 + rank of the byte."""
    return train_tokenizer(["x"], vocab_size=259)


def packed_of(num_sequences: int, length: int = 4) -> PackedTokens:
    """Row n holds n everywhere."""
    rows = np.repeat(np.arange(num_sequences, dtype=np.int32)[:, None], length, axis=1)
    return PackedTokens(rows, bytes_per_token=1.0)


def test_documents_end_with_eos_and_the_remainder_is_dropped(tokenizer):
    packed = pack(["abc", "de", "fghi"], tokenizer, sequence_length=5)
    a, b, c, d, e, f, g = tokenizer("abcdefg")["input_ids"]
    eos = tokenizer.eos_token_id
    assert packed.sequences_NL.tolist() == [[a, b, c, eos, d], [e, eos, f, g, f + 2]]
    assert packed.sequences_NL.dtype == np.int32
    assert packed.tokens_dropped == 2
    assert (packed.num_sequences, packed.sequence_length, packed.num_tokens) == (2, 5, 10)


def test_bytes_per_token_counts_utf8_bytes_and_eos(tokenizer):
    packed = pack(["abc", "\N{GREEK SMALL LETTER ALPHA}e"], tokenizer, sequence_length=4)
    assert packed.bytes_per_token == 6 / 8  # 3 + 3 bytes; 3 + 3 tokens and two eos


def test_windows_decode_to_the_documents(tokenizer):
    documents = [f"document {i} \N{SNOWMAN}" for i in range(20)]
    packed = pack(documents, tokenizer, sequence_length=1)
    assert tokenizer.decode(packed.sequences_NL.ravel()) == "".join(f"{text}<eos>" for text in documents)


def test_an_end_token_spelled_in_a_document_does_not_end_it():
    tokenizer = train_tokenizer(["x"], vocab_size=259)
    tokenizer.split_special_tokens = False  # as most tokenizers on the hub are
    assert tokenizer("<eos>")["input_ids"] == [tokenizer.eos_token_id]
    packed = pack(["a<eos>b"], tokenizer, sequence_length=1)
    assert (packed.sequences_NL == tokenizer.eos_token_id).sum() == 1


def test_windows_do_not_depend_on_the_chunks_they_are_encoded_in(tokenizer, monkeypatch):
    documents = [f"document {i} says hello" for i in range(50)]
    whole = pack(documents, tokenizer, sequence_length=7)
    monkeypatch.setattr(tokenizing, "_CHUNK_CHARACTERS", 40)
    assert np.array_equal(pack(documents, tokenizer, sequence_length=7).sequences_NL, whole.sequences_NL)


@pytest.mark.parametrize("documents", [[], ["abc"]], ids=["none", "one short"])
def test_too_little_text_for_one_window_is_refused(tokenizer, documents):
    tokens = sum(len(text) + 1 for text in documents)
    message = f"The held-out text has {tokens} tokens, fewer than the 5 of 'data.sequence_length': .*lower"
    with pytest.raises(UserError, match=message):
        pack(documents, tokenizer, sequence_length=5, name="the held-out text")


@given(num_sequences=st.integers(1, 50), seed=st.integers(-(2**40), 2**70), epoch=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_a_permutation(num_sequences, seed, epoch):
    positions = range(epoch * num_sequences, (epoch + 1) * num_sequences)
    indices = [sequence_index(position, num_sequences=num_sequences, seed=seed) for position in positions]
    assert sorted(indices) == list(range(num_sequences))


def test_the_order_is_pure():
    indices = [sequence_index(position, num_sequences=11, seed=3) for position in range(40)]
    epoch_order.cache_clear()
    backwards = [sequence_index(position, num_sequences=11, seed=3) for position in reversed(range(40))]
    assert backwards == indices[::-1]


def test_the_order_is_the_same_on_every_machine_and_version():
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_seeds_and_epochs_differ():
    orders = {tuple(epoch_order(100, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match=r"read-only"):
        epoch_order(5, seed=0, epoch=0)[0] = 1


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_a_step_sees_the_same_sequences_however_its_batch_is_cut(batch, accumulation):
    dataset = ScheduledDataset(packed_of(20), length=5 * 8, seed=7)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size=batch))
    steps = [torch.cat([next(loader)["input_ids"][:, 0] for _ in range(accumulation)]).tolist() for _ in range(5)]
    expected = [[sequence_index(8 * step + row, num_sequences=20, seed=7) for row in range(8)] for step in range(5)]
    assert steps == expected


def test_a_run_that_resumes_sees_the_batches_of_one_that_never_stopped():
    packed = packed_of(6)
    through = [item["input_ids"] for item in map(ScheduledDataset(packed, length=16, seed=1).__getitem__, range(16))]
    epoch_order.cache_clear()
    again = ScheduledDataset(packed, length=16, seed=1)
    resumed = [item["input_ids"] for item in map(again.__getitem__, range(8, 16))]
    assert torch.equal(torch.stack(through[8:]), torch.stack(resumed))


def test_a_longer_schedule_starts_with_the_shorter_one():
    short, long = (ScheduledDataset(packed_of(9), length=length, seed=2) for length in (12, 40))
    assert all(torch.equal(short[i]["input_ids"], long[i]["input_ids"]) for i in range(12))


def test_items_are_equal_int64_inputs_and_labels():
    item = ScheduledDataset(packed_of(3), length=3, seed=0)[0]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].shape == (4,)
    assert torch.equal(item["input_ids"], item["labels"])


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_the_schedule_are_refused(position):
    dataset = ScheduledDataset(packed_of(3), length=5, seed=0)
    assert len(dataset) == len(list(dataset)) == 5
    with pytest.raises(IndexError, match=r"outside a schedule of 5"):
        dataset[position]
