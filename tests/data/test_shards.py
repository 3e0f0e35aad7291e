"""Tokens in files: the same sequences as in memory, a shuffle without a list, and parts that survive a stop."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.comparison.verbs import train
from mixtura.config import DataConfig, UserError
from mixtura.data import prepare, shards, sources, tokenizing
from mixtura.data.packing import PackedTokens, ScheduledDataset
from mixtura.data.prepare import PreparedData, prepare_data
from mixtura.data.shards import ShardedSequences, SideOfPart, scattered, write_part


@pytest.fixture(autouse=True)
def one_process_and_small_parts(monkeypatch):
    monkeypatch.setattr(tokenizing, "PART_BYTES", 2000)
    monkeypatch.setattr(prepare, "usable_cores", lambda: 1)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    draw = random.Random(0)
    words = ["the", "a", "cat", "dog", "mat", "ran", "under", "\N{SNOWMAN}"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(200)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(texts[:9] + texts), encoding="utf-8")
    return DataConfig(source="local", path=str(path), vocab_size=280, sequence_length=16, validation_fraction=0.2)


def in_shards(data: DataConfig, cache: Path) -> tuple[PreparedData, list[str]]:
    phrases: list[str] = []
    return prepare_data(dataclasses.replace(data, shards=True), cache_dir=cache, on_progress=phrases.append), phrases


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


@pytest.mark.parametrize("changes", [{}, {"max_bytes": 9_001}, {"sequence_length": 700}], ids=["all", "cut", "long"])
def test_shards_hold_the_sequences_that_the_text_gives_in_memory(data, tmp_path, changes):
    data = dataclasses.replace(data, **changes)
    whole, (parts, _) = prepare_data(data, cache_dir=None), in_shards(data, tmp_path / "cache")
    assert isinstance(parts.train.sequences_NL, ShardedSequences) and len(parts.train.sequences_NL.parts) > 3
    assert parts.summary == whole.summary and whole.summary["rows_skipped"]["duplicate"] > 0
    rows = parts.train.sequences_NL[:]
    assert rows.dtype == np.int32 and np.array_equal(rows, whole.train.sequences_NL)
    held_out = [sorted(map(tuple, each.validation.sequences_NL[:])) for each in (whole, parts)]
    assert held_out[0] == held_out[1]
    for side in ("train", "validation"):
        mine, theirs = getattr(parts, side), getattr(whole, side)
        assert (mine.bytes_per_token, mine.tokens_dropped) == (theirs.bytes_per_token, theirs.tokens_dropped)


def test_several_processes_write_the_bytes_that_one_writes(data, tmp_path, monkeypatch):
    in_shards(data, tmp_path / "one")
    monkeypatch.setattr(prepare, "usable_cores", lambda: 2)
    in_shards(data, tmp_path / "two")
    one, two = (
        {path.name: path.read_bytes() for path in entry_of(tmp_path / name).iterdir() if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two


@given(number=st.integers(1, 400), seed=st.integers(-(2**40), 2**70), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_scattering_is_a_permutation(number, seed, epoch):
    places = [scattered(place, number=number, seed=seed, epoch=epoch) for place in range(number)]
    assert sorted(places) == list(range(number))


@given(number=st.integers(2**33, 2**50), data=st.data())
@settings(max_examples=50, deadline=None)
def test_scattering_a_huge_number_keeps_no_list(number, data):
    places = data.draw(st.lists(st.integers(0, number - 1), unique=True, min_size=2, max_size=20))
    found = {scattered(place, number=number, seed=1, epoch=0) for place in places}
    assert len(found) == len(places) and all(0 <= place < number for place in found)


def test_scattering_is_the_same_on_every_machine_and_looks_random():
    assert [scattered(place, number=10, seed=0, epoch=0) for place in range(10)] == [9, 4, 5, 1, 3, 0, 8, 2, 6, 7]
    orders = {
        tuple(scattered(place, number=50, seed=seed, epoch=epoch) for place in range(50))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25
    # Where an item lands says nothing on where it was: the mean correlation of 300 shuffles is near zero.
    found = [[scattered(place, number=40, seed=seed, epoch=0) for place in range(40)] for seed in range(300)]
    assert abs(np.mean([np.corrcoef(range(40), order)[0, 1] for order in found])) < 0.03
    # Every place is equally likely: chi squared with 39 degrees of freedom, below its 99.9 % quantile.
    counts = np.bincount([order[0] for order in found], minlength=40)
    assert ((counts - 7.5) ** 2 / 7.5).sum() < 72.1


def packed_of(folder: Path, num_sequences: int) -> PackedTokens:
    """Three parts, whose middle one has no training tokens; sequence n of two tokens holds n."""
    tokens = np.repeat(np.arange(num_sequences, dtype=np.uint16), 2)
    cut = num_sequences // 2 * 2 + 1  # in the middle of a sequence
    parts = []
    for number, piece in enumerate((tokens[:cut], tokens[:0], tokens[cut:])):
        counts = {"train": SideOfPart(1, piece.size, piece.size), "validation": SideOfPart(1, 3, 3)}
        held_out = np.full(3, 999, dtype=np.uint16)
        parts.append(write_part(folder, number, train=piece, validation=held_out, text=str(number), counts=counts))
    return PackedTokens(ShardedSequences(folder, parts, side="train", sequence_length=2), bytes_per_token=1.0)


def seen(dataset: ScheduledDataset, places) -> list[int]:
    return [int(dataset[place]["input_ids"][0]) for place in places]


def test_every_epoch_of_a_run_sees_each_sequence_once_and_resumes_where_it_was(tmp_path):
    packed = packed_of(tmp_path, 31)
    through = seen(ScheduledDataset(packed, length=93, seed=7), range(93))
    for epoch in range(3):
        assert sorted(through[31 * epoch : 31 * epoch + 31]) == list(range(31))
    assert seen(ScheduledDataset(packed, length=93, seed=7), range(40, 93)) == through[40:]
    with pytest.raises(IndexError, match="sequence 31 of 31"):
        packed.sequences_NL[31]


RANKS = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from mixtura.data.packing import PackedTokens, ScheduledDataset
from mixtura.data.shards import Part, ShardedSequences

folder = Path(sys.argv[1])
state = PartialState(cpu=True)
parts = [Part.from_json(path) for path in sorted(folder.glob("0*.json"))]
packed = PackedTokens(ShardedSequences(folder, parts, side="train", sequence_length=2), bytes_per_token=1.0)
sampler = torch.utils.data.DistributedSampler(ScheduledDataset(packed, length=32, seed=0), shuffle=False)
loader = torch.utils.data.DataLoader(sampler.dataset, batch_size=4, sampler=sampler)
mine = torch.cat([batch["input_ids"][:, 0] for batch in loader])
both = [torch.empty_like(mine) for _ in range(2)]
torch.distributed.all_gather(both, mine)
assert sorted(torch.cat(both).tolist()) == list(range(32)), both
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_together_see_each_sequence_once(tmp_path):
    packed_of(tmp_path, 32)
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "ranks.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert result.returncode == 0, result.stderr


def test_the_second_call_tokenises_nothing_and_other_lengths_use_the_same_shards(data, tmp_path, monkeypatch):
    first, _ = in_shards(data, tmp_path / "cache")
    monkeypatch.setattr(tokenizing, "_write", None)
    second, phrases = in_shards(data, tmp_path / "cache")
    assert phrases == ["loading cached tokens"] and second.summary == first.summary
    assert second.train.content() == first.train.content()
    longer, _ = in_shards(dataclasses.replace(data, sequence_length=64), tmp_path / "cache")
    assert longer.train.sequence_length == 64 and longer.train.content() != first.train.content()


def test_tokenising_that_stops_in_the_middle_goes_on_from_the_finished_shards(data, tmp_path, monkeypatch):
    expected, _ = in_shards(data, tmp_path / "other")
    write, made = tokenizing._write, []

    def stop_at_the_third(work, *rest):
        if work.number == 2:
            raise KeyboardInterrupt
        made.append(work.number)
        return write(work, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizing, "_write", stop_at_the_third)
        in_shards(data, tmp_path / "cache")
    assert made == [0, 1] and not (entry_of(tmp_path / "cache") / "prepared.json").exists()
    monkeypatch.setattr(tokenizing, "_write", lambda work, *rest: made.append(work.number) or write(work, *rest))
    found, phrases = in_shards(data, tmp_path / "cache")
    assert sorted(made) == list(range(len(expected.train.sequences_NL.parts)))
    assert f"2 of {len(made)} shards kept from before" in phrases[-1] and "MB/s" in phrases[-1]
    assert found.train.content() == expected.train.content()


KILLED = """
import json, os, signal, sys
from pathlib import Path
from mixtura.config import DataConfig
from mixtura.data import prepare, tokenizing

def die(work, *rest, write=tokenizing._write):
    if work.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(work, *rest)

tokenizing.PART_BYTES, tokenizing._write = 2000, die
prepare.usable_cores = lambda: 1
prepare.prepare_data(DataConfig(**json.loads(sys.argv[1])), cache_dir=Path(sys.argv[2]))
"""


def test_shards_that_were_finished_before_a_sigkill_are_kept(data, tmp_path):
    settings = json.dumps(dataclasses.asdict(dataclasses.replace(data, shards=True)))
    command = [sys.executable, "-c", KILLED, settings, str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=300, check=False).returncode == -9
    found, phrases = in_shards(data, tmp_path / "cache")
    assert any("3 of " in phrase and "kept from before" in phrase for phrase in phrases)
    assert found.train.content() == in_shards(data, tmp_path / "other")[0].train.content()


def test_shards_of_another_text_or_tokenizer_are_made_again(data, tmp_path, monkeypatch):
    in_shards(data, tmp_path / "cache")
    entry = entry_of(tmp_path / "cache")
    (entry / "prepared.json").unlink()
    fit = prepare.train_tokenizer
    monkeypatch.setattr(prepare, "train_tokenizer", lambda texts, *, vocab_size: fit(texts, vocab_size=vocab_size - 9))
    _, phrases = in_shards(data, tmp_path / "cache")
    assert "kept" not in phrases[-1]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_shard_is_refused_and_made_again_when_asked(data, tmp_path, damage):
    first, _ = in_shards(data, tmp_path / "cache")
    shard = entry_of(tmp_path / "cache") / "00001.npy"
    if damage == "changed":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"The token shard '.*00001.npy' is damaged.*delete '.*prepared.json'") as told:
        in_shards(data, tmp_path / "cache")
    assert len(str(told.value).splitlines()) == 1
    (entry_of(tmp_path / "cache") / "prepared.json").unlink()
    shards._mapped.cache_clear()
    again, phrases = in_shards(data, tmp_path / "cache")
    assert again.train.content() == first.train.content() and "kept from before" in phrases[-1]


@pytest.mark.slow
def test_a_process_that_is_lost_is_told_in_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "usable_cores", lambda: 2)
    monkeypatch.setattr(tokenizing, "_begin", os._exit)
    with pytest.raises(UserError, match="A process that tokenises has ended"):
        in_shards(data, tmp_path / "cache")


def test_a_process_that_tokenises_does_not_wait_for_torch():
    code = (
        "import sys, mixtura.data.tokenizing; sys.exit(bool({'torch', 'transformers', 'pyarrow'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_side_without_text_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="No held-out text"):
        in_shards(dataclasses.replace(data, validation_fraction=1e-9), tmp_path / "cache")


def test_duplicates_are_found_among_hashes_that_were_sorted_away(monkeypatch):
    monkeypatch.setattr(sources, "_RECENT", 4)
    seen_before, draw = sources._Seen(), random.Random(0)
    numbers = [draw.randrange(2**64) for _ in range(50)] + [2**64 - 1, 0]
    assert all(seen_before.add(number) for number in numbers)
    assert not any(seen_before.add(number) for number in numbers)


def test_hashes_that_were_sorted_once_are_seldom_moved_again(monkeypatch):
    """A billion documents are 15,000 runs: sorting all hashes again for each would take days."""
    monkeypatch.setattr(sources, "_RECENT", 4)
    seen_before, draw, moved, longest = sources._Seen(), random.Random(0), 0, []
    for _ in range(4096):
        before = {id(run) for run in seen_before._runs}
        assert seen_before.add(draw.randrange(2**64))
        moved += sum(run.size for run in seen_before._runs if id(run) not in before)
        longest.append(len(seen_before._runs))
    assert sum(run.size for run in seen_before._runs) == 4096 and max(longest) <= 10
    assert moved <= 4096 * 11


def test_a_tokenizer_for_a_large_text_is_fitted_on_documents_spread_over_it(monkeypatch):
    monkeypatch.setattr(prepare, "MAX_TRAINING_CHARACTERS", 100)
    texts = [f"{number:010d}" for number in range(1000)]
    few = prepare._thinned(texts)
    assert 10 <= len(few) <= 20 and set(np.diff(list(map(int, few)))) == {64}
    assert prepare._thinned(iter(texts[:20])) == texts[:20]


def test_training_on_shards_is_training_on_their_sequences(data, tmp_path):
    found, _ = in_shards(data, tmp_path / "cache")
    dataset = ScheduledDataset(found.train, length=5, seed=3)
    for place in range(5):
        row = found.train.sequences_NL[found.train.index_at(place, seed=3)]
        assert dataset[place]["input_ids"].tolist() == row.tolist()
    assert found.summary == json.loads(json.dumps(found.summary))


def test_a_run_on_shards_that_goes_on_ends_with_the_same_bits(tiny_recipe, tmp_path, keep_checkpoints):
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}})
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=True))
    whole = (train(recipe, out=tmp_path / "run").checkpoint / "model.safetensors").read_bytes()
    run = tmp_path / "run" / "arms" / "dense" / "seed0"
    for folder in ("checkpoint-4", "checkpoint"):
        shutil.rmtree(run / folder)
    (run / "result.json").unlink()
    again = train(recipe, out=tmp_path / "run")
    assert (again.checkpoint / "model.safetensors").read_bytes() == whole


def test_a_hub_dataset_is_streamed_into_shards(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, streaming):
        asked.append((name, split, streaming))
        rows = [{"text": f"document {number} has some words of its own"} for number in range(400)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig(source="hub", name="some/set", vocab_size=280, sequence_length=16, validation_fraction=0.2)
    found, _ = in_shards(data, tmp_path / "cache")
    assert asked == [("some/set", "train", True)] * 2  # the second time for the tokenizer
    assert np.array_equal(found.train.sequences_NL[:], prepare_data(data, cache_dir=None).train.sequences_NL)
