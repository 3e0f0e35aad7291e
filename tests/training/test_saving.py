import json
import random
import resource

import numpy as np
import pytest
import torch

from mixtura.config import UserError
from mixtura.training import saving as checkpoints


def settings_of(model):
    return {"model": checkpoints.architecture(model.config)}


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    """A whole checkpoint of a tiny dense model after three steps, and the model."""
    model = tiny_model()
    folder = checkpoints.numbered(tmp_path, 3)
    with checkpoints.new_folder(folder, step=3, settings=settings_of(model)) as partial:
        model.save_pretrained(partial)
    return folder, model


@pytest.fixture
def small_files():
    """No file may grow beyond 1 kB, which is what a full disk looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_is_there_only_when_it_is_whole(tmp_path):
    target = tmp_path / "checkpoint-1"
    with checkpoints.new_folder(target, step=1, settings={}) as partial:
        (partial / "weights").write_text("abc")
        assert not target.exists()
    marker = json.loads((target / "complete.json").read_text())
    assert (marker["step"], marker["settings"], marker["files"]) == (1, {}, {"weights": 3})
    assert marker["checksums"].keys() == {"weights"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_that_was_not_finished_vanishes(tmp_path, error):
    with pytest.raises(error), checkpoints.new_folder(tmp_path / "checkpoint-1", step=1, settings={}) as partial:
        (partial / "weights").write_text("abc")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_the_one_before_it(tmp_path):
    for text in ("old", "new"):
        with checkpoints.new_folder(tmp_path / "checkpoint", step=1, settings={}) as partial:
            (partial / text).write_text(text)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"new", "complete.json"}


def test_a_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(tmp_path, tiny_model, small_files):
    with (
        pytest.raises(UserError, match=r"cannot be written \(.*\): make room .* --resume"),
        checkpoints.new_folder(tmp_path / "checkpoint-1", step=1, settings={}) as partial,
    ):
        tiny_model().save_pretrained(partial)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_while_tensors_are_saved(tmp_path, small_files):
    with pytest.raises(OSError, match=r"optimizer.pt could not be written in full"):
        checkpoints.save_tensors(torch.zeros(10_000), tmp_path / "optimizer.pt")


def test_the_newest_checkpoint_has_the_highest_step_not_the_last_name(tmp_path):
    assert checkpoints.newest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert checkpoints.newest_checkpoint(tmp_path).name == "checkpoint-10"


def test_only_whole_checkpoints_of_ours_are_dropped(tmp_path):
    for step in (1, 2, 3):
        with checkpoints.new_folder(checkpoints.numbered(tmp_path, step), step=step, settings={}):
            pass
    (tmp_path / "checkpoint-0").mkdir()
    checkpoints.drop_old_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-0", "checkpoint-2", "checkpoint-3"}


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / ".checkpoint-5.partial").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    checkpoints.drop_partial_folders(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_whole_checkpoint_gives_its_step_and_weights(checkpoint, tiny_model):
    folder, model = checkpoint
    other = tiny_model(seed=1)
    assert checkpoints.check_checkpoint(folder, settings_of(other)) == 3
    checkpoints.load_weights(other, folder)
    for (name, expected), loaded in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, loaded), name


def test_a_damaged_checkpoint_names_the_file_and_both_sizes(checkpoint):
    folder, model = checkpoint
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    expected = rf"checkpoint-3' is damaged: model.safetensors has 100 bytes where {size:,} bytes .* remove the folder"
    with pytest.raises(UserError, match=expected):
        checkpoints.check_checkpoint(folder, settings_of(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "complete.json"])
def test_a_byte_that_was_flipped_anywhere_is_noticed(checkpoint, name):
    folder, model = checkpoint
    content = (folder / name).read_bytes()
    draw = random.Random(0)
    places = range(len(content)) if name == "complete.json" else draw.sample(range(len(content)), 40)
    for place in places[:: max(1, len(places) // 100)]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(7)
        (folder / name).write_bytes(changed)
        if name == "complete.json" and json.loads(content) == _parsed(changed):
            continue  # a space that became another
        with pytest.raises(UserError, match=r"is damaged|no checkpoint of this library"):
            checkpoints.check_checkpoint(folder, settings_of(model))
    (folder / name).write_bytes(content)
    assert checkpoints.check_checkpoint(folder, settings_of(model)) == 3


def _parsed(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_checkpoint_without_checksums_is_one_of_before(checkpoint):
    folder, model = checkpoint
    marker = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({key: marker[key] for key in ("step", "settings", "files")}))
    assert checkpoints.check_checkpoint(folder, settings_of(model)) == 3


def test_a_checkpoint_with_a_file_missing_is_damaged(checkpoint):
    folder, model = checkpoint
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        checkpoints.check_checkpoint(folder, settings_of(model))


@pytest.mark.parametrize("text", [None, "", "[]", '{"step": 3}'], ids=["none", "empty", "list", "no files"])
def test_a_folder_of_another_program_is_not_taken_for_a_checkpoint(checkpoint, text):
    folder, model = checkpoint
    (folder / "complete.json").unlink()
    if text is not None:
        (folder / "complete.json").write_text(text)
    with pytest.raises(UserError, match="no checkpoint of this library"):
        checkpoints.check_checkpoint(folder, settings_of(model))


def test_a_checkpoint_of_another_model_names_what_differs(checkpoint, tiny_model):
    with pytest.raises(UserError, match=r"of another run: its model\.hidden_size is 32, not 16"):
        checkpoints.check_checkpoint(checkpoint[0], settings_of(tiny_model(hidden_size=16, head_dim=16)))


def test_random_numbers_go_on_where_they_were(tmp_path):
    checkpoints.save_tensors(checkpoints.random_state(), tmp_path / "rng.pt")
    draws = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(2)]
    checkpoints.set_random_state(checkpoints.load_tensors(tmp_path / "rng.pt"))
    assert [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(2)] == draws


def test_tensors_that_were_cut_are_one_sentence(tmp_path):
    checkpoints.save_tensors({"weight": torch.zeros(100)}, tmp_path / "optimizer.pt")
    (tmp_path / "optimizer.pt").write_bytes((tmp_path / "optimizer.pt").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"is damaged: optimizer\.pt cannot be read \(.*\); remove the folder"):
        checkpoints.load_tensors(tmp_path / "optimizer.pt")
