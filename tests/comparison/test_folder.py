"""The folder of a comparison: whose it is, what starting over removes, and files that are whole or not there."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import tomllib

import pytest

from mixtura.comparison import lock
from mixtura.comparison.environment import environment, now
from mixtura.comparison.folder import (
    begin,
    check_same_data,
    holding,
    open_folder,
    ready,
    store_fitted,
)
from mixtura.comparison.lock import HOLDER
from mixtura.config import Interrupted, UserError, recipe_from_dict, recipe_to_toml
from mixtura.data.prepare import prepare_data
from mixtura.files import write_json, write_text
from mixtura.results.document import read_json
from mixtura.tasks.language_modelling.experiment import Pretraining


def read(recipe, **data):
    """The recipe's experiment, on other data where that is said."""
    return Pretraining(recipe, prepare_data(dataclasses.replace(recipe.data, **data), cache_dir=None))


@pytest.fixture
def begun(tiny_recipe, tmp_path):
    """A folder in which a first run has begun, and its recipe."""
    out, recipe = tmp_path / "runs" / "tiny", tiny_recipe()
    open_folder(out, recipe, resume=True)
    write_json(out / "arms" / "dense" / "seed0" / "run.json", {})
    return out, recipe


def test_opening_writes_the_resolved_recipe_and_the_environment(begun):
    out, recipe = begun
    assert recipe_from_dict(tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))) == recipe
    assert read_json(out / "environment.json").keys() == environment().keys()


def test_the_same_recipe_opens_its_folder_again(begun):
    open_folder(*begun, resume=True)
    assert (begun[0] / "arms" / "dense" / "seed0" / "run.json").exists()


def test_a_folder_goes_on_with_the_recipe_as_given_and_as_fitted(begun):
    out, given = begun
    fitted = dataclasses.replace(given, training=dataclasses.replace(given.training, batch_size=2))
    store_fitted(out, given, fitted)
    for recipe in (given, fitted):
        open_folder(out, recipe, resume=True)
        store_fitted(out, recipe, fitted)
        assert tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))["training"]["batch_size"] == 2
    other = dataclasses.replace(given, training=dataclasses.replace(given.training, steps=9))
    with pytest.raises(UserError, match=r"training\.steps = 4, now it is 9"):
        open_folder(out, other, resume=True)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("training", {"steps": 9}, r"training\.steps = 4, now it is 9"),
        ("model", {"hidden_size": 64}, r"model\.hidden_size = 32, now it is 64"),
        ("model", {"num_key_value_heads": 1}, r"model\.num_key_value_heads = None, now it is 1"),
        ("data", {"vocab_size": 301}, r"data\.vocab_size = 300, now it is 301"),
        ("search", {"learning_rates": (1e-3,)}, r"search\.learning_rates = \[\], now it is \[0\.001\]"),
    ],
)
def test_another_recipe_is_refused_with_the_key_that_differs(begun, section, values, words):
    out, recipe = begun
    other = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})
    with pytest.raises(UserError, match=words):
        open_folder(out, other, resume=True)
    open_folder(out, recipe, resume=True)


def test_another_recipe_is_refused_once_a_trial_of_the_search_has_begun(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(), tmp_path / "out"
    open_folder(out, recipe, resume=True)
    write_json(out / "search" / "dense" / "rate0.001" / "seed1000" / "run.json", {})
    with pytest.raises(UserError, match=r"training\.steps = 4, now it is 9"):
        open_folder(out, tiny_recipe(steps=9), resume=True)
    open_folder(out, recipe, resume=True)


def test_a_text_that_changed_since_the_first_trial_is_refused(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(), tmp_path / "out"
    open_folder(out, recipe, resume=True)
    begin(out, recipe, read(recipe), resume=True)
    write_json(out / "search" / "dense" / "rate0.001" / "seed1000" / "run.json", {})
    with pytest.raises(UserError, match=r"The text has changed since .* was begun"):
        check_same_data(out, read(recipe, max_bytes=20_000))


def test_a_setting_that_was_turned_off_is_another_recipe(begun):
    out, recipe = begun
    arms = {name: dataclasses.replace(arm, alone_top_k=None) for name, arm in recipe.arms.items()}
    with pytest.raises(UserError, match=r"arms\.dense\.alone_top_k = 2, now it is 'none'"):
        open_folder(out, dataclasses.replace(recipe, arms=arms), resume=True)


@pytest.mark.parametrize("added", [True, False], ids=["added", "left out"])
def test_arms_that_were_added_or_left_out_are_named_and_not_printed(begun, added):
    out, recipe = begun
    arms = {**recipe.arms, "wide": recipe.arms["dense"]} if added else {"dense": recipe.arms["dense"]}
    told = (
        rf"^Arm 'wide' is in this recipe but not in the comparison in '{out}', whose .*--out, or --no-resume to start"
        if added
        else rf"^Arm 'mixture_of_tokens' is in the comparison in '{out}' but not in this recipe, whose .*--no-resume"
    )
    with pytest.raises(UserError, match=told) as refused:
        open_folder(out, dataclasses.replace(recipe, arms=arms), resume=True)
    assert len(str(refused.value)) < 300


def test_a_long_value_is_cut_in_the_sentence(begun):
    out, recipe = begun
    many = dataclasses.replace(recipe, seeds=tuple(range(1000)))
    with pytest.raises(UserError, match=r"begun with seeds = \[0\], now it is \[0, 1, 2, .*\.\.\.: choose"):
        open_folder(out, many, resume=True)


def tree(folder):
    """Every file of a folder and what it holds."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_starting_over_removes_what_is_ours_and_nothing_else(begun):
    out, recipe = begun
    other = dataclasses.replace(recipe, seeds=(7,))
    write_json(out / "timing.json", {})
    write_text(out / "data" / "old" / "tokens", "of the old comparison")
    write_text(out / "notes.txt", "mine")
    before = tree(out)
    with holding(out):
        open_folder(out, other, resume=False)
        assert not (out / "data").exists()
        write_text(out / "data" / "new" / "tokens", "of the new one")
        kept = {path: text for path, text in before.items() if path.parts[0] != "data"}
        assert kept.items() <= tree(out).items()
        begin(out, other, read(other), resume=False)
    assert {path.name for path in out.iterdir()} == {
        "recipe.toml",
        "environment.json",
        "notes.txt",
        "data",
        "data.json",
    }
    assert [path.name for path in (out / "data").iterdir()] == ["new"]
    assert recipe_from_dict(tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))) == other


def test_starting_over_keeps_what_the_new_recipe_reads(begun):
    out, recipe = begun
    checkpoint = out / "arms" / "dense" / "seed0" / "checkpoint"
    checkpoint.mkdir(parents=True)
    before = tree(out)
    arms = {**recipe.arms, "dense": dataclasses.replace(recipe.arms["dense"], init_from=str(checkpoint))}
    with pytest.raises(UserError, match=r"lies in .*, which would be started over: copy it elsewhere"), holding(out):
        open_folder(out, dataclasses.replace(recipe, arms=arms), resume=False)
    assert tree(out) == before and checkpoint.is_dir()


@pytest.mark.parametrize("error", [UserError("no file"), Interrupted("stopped"), KeyboardInterrupt()], ids=repr)
def test_a_start_over_that_fails_leaves_all_as_it_was(begun, error):
    out, recipe = begun
    write_text(out / "data" / "old" / "tokens", "of the old comparison")
    before = tree(out)
    with pytest.raises(type(error)), holding(out):
        open_folder(out, dataclasses.replace(recipe, seeds=(7,)), resume=False)
        write_text(out / "data" / "new" / "tokens", "of the new one")
        raise error
    assert tree(out) == before


STARTS_OVER = """
import os, signal, sys
from pathlib import Path
from mixtura.comparison import folder
from mixtura.config import load_recipe
out, recipe = Path(sys.argv[1]), load_recipe(Path(sys.argv[2]))
killed = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with folder.holding(out):
    folder.open_folder(out, recipe, resume=False)
    (out / "data").mkdir()
    if sys.argv[3] == "clearing":
        folder._write_recipe = killed
        folder.begin(out, recipe, None, resume=False)
    killed()
"""


@pytest.mark.parametrize("when", ["preparing", "clearing"])
def test_a_start_over_that_is_killed_is_tidied_up_after(begun, tmp_path, when):
    out, recipe = begun
    write_text(out / "data" / "old" / "tokens", "of the old comparison")
    write_text(tmp_path / "recipe.toml", recipe_to_toml(recipe))
    before = tree(out)
    command = [sys.executable, "-c", STARTS_OVER, str(out), str(tmp_path / "recipe.toml"), when]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with holding(out):
        open_folder(out, recipe, resume=True)
    if when == "preparing":
        assert tree(out) == before
    else:
        assert {path.name for path in out.iterdir()} == {"recipe.toml", "environment.json", "data"}


def test_a_folder_of_other_files_is_left_alone(tiny_recipe, tmp_path):
    write_text(tmp_path / "notes.txt", "mine")
    for resume in (True, False):
        with pytest.raises(UserError, match="has files but is no comparison's folder"):
            open_folder(tmp_path, tiny_recipe(), resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_recipe_is_refused_and_starting_over_helps(begun):
    out, recipe = begun
    write_text(out / "recipe.toml", "[training\n")
    with pytest.raises(UserError, match=r"recipe\.toml' is damaged.*--no-resume"):
        open_folder(out, recipe, resume=True)
    open_folder(out, recipe, resume=False)


def test_the_environment_can_be_stored_and_names_versions(tmp_path):
    stored = json.loads(json.dumps(environment()))
    contract = {"mixtura", "python", "torch", "transformers", "platform", "processor", "cpu_count", "threads", "device"}
    assert stored.keys() >= contract and all(stored[key] for key in contract)


def test_the_time_is_in_utc_to_the_second():
    assert now().endswith("+00:00") and len(now()) == len("2026-11-23T12:00:00+00:00")


def test_a_text_that_changed_since_the_first_run_is_refused(begun):
    out, recipe = begun
    for _ in range(2):
        begin(out, recipe, read(recipe), resume=True)
    with pytest.raises(UserError, match=r"The text has changed since .* was begun"):
        check_same_data(out, read(recipe, max_bytes=20_000))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_text_of_the_same_size_is_told_by_its_tokens(begun, split):
    out, recipe = begun
    data = prepare_data(recipe.data, cache_dir=None)
    packed = getattr(data, split)
    turned = dataclasses.replace(packed, sequences_NL=packed.sequences_NL[::-1].copy())
    begin(out, recipe, Pretraining(recipe, data), resume=True)
    with pytest.raises(UserError, match=r"was begun \(tokens was .*--no-resume to start over"):
        check_same_data(out, Pretraining(recipe, dataclasses.replace(data, **{split: turned})))


def test_files_beside_the_text_that_are_not_read_change_nothing(begun, tmp_path):
    out, recipe = begun
    texts = tmp_path / "texts"
    for number in range(3):
        write_text(texts / f"{number}.txt", f"the film number {number} is long and cold " * 40)
    settings = {"source": "local", "path": str(texts), "validation_fraction": 0.4}
    begin(out, recipe, read(recipe, **settings), resume=True)
    for name in ("notes.md", "cover.png", ".DS_Store"):
        write_text(texts / name, "unread")
        begin(out, recipe, read(recipe, **settings), resume=True)
    assert "2 of other kinds not read" in (out / "data.json").read_text(encoding="utf-8")
    write_text(texts / "1.txt", "another film that is long and cold " * 40)
    with pytest.raises(UserError, match=r"The text has changed since .* was begun \(summary\."):
        begin(out, recipe, read(recipe, **settings), resume=True)


def test_the_text_may_change_until_a_run_has_begun_and_when_starting_over(begun):
    out, recipe = begun
    begin(out, recipe, read(recipe, max_bytes=20_000), resume=True)
    open_folder(out, recipe, resume=False)
    begin(out, recipe, read(recipe, max_bytes=30_000), resume=False)
    begin(out, recipe, read(recipe, max_bytes=20_000), resume=True)


HOLD = """
import sys
from pathlib import Path
from mixtura.comparison.folder import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path/out; kill it, or end its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_the_folder_until_that_one_dies(other, tmp_path):
    out = tmp_path / "out"
    told = rf"'{out}' is in use by process {other.pid} on \S+ since 20\S+ \S+ UTC: wait"
    with pytest.raises(UserError, match=told), holding(out):
        raise AssertionError("the folder was given twice")
    assert (out / HOLDER).exists()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with holding(out):
        assert json.loads((out / HOLDER).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not out.exists() or not (out / HOLDER).exists()


def test_a_second_thread_of_one_process_is_refused_too(tmp_path):
    with holding(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"), holding(tmp_path):
        raise AssertionError("the folder was given twice")


def test_the_lock_leaves_nothing_in_a_folder_that_was_used(tmp_path):
    with holding(tmp_path / "out"):
        (tmp_path / "out" / "report.md").write_text("kept", encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


def fail(out, error, *, run=False):
    with holding(out):
        (out / "data").mkdir(exist_ok=True)
        (out / "recipe.toml").write_text("", encoding="utf-8")
        if run:
            (out / "arms" / "dense" / "seed0").mkdir(parents=True)
            (out / "arms" / "dense" / "seed0" / "run.json").write_text("{}", encoding="utf-8")
        raise error


def test_a_start_that_fails_before_any_run_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="too long"):
        fail(tmp_path / "runs" / "mine", UserError("too long"))
    assert not (tmp_path / "runs").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError):
        fail(empty, UserError("too long"))
    assert empty.is_dir() and not any(empty.iterdir())


def test_what_is_worth_keeping_is_kept(tmp_path):
    with pytest.raises(UserError):
        fail(tmp_path / "begun", UserError("diverged"), run=True)
    with pytest.raises(Interrupted):
        fail(tmp_path / "stopped", Interrupted("stopped"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError):
        fail(tmp_path / "mine", UserError("not empty"))
    for name in ("begun", "stopped", "mine"):
        assert (tmp_path / name / "recipe.toml").exists() and not (tmp_path / name / HOLDER).exists()


def no_locks(monkeypatch, tmp_path, holder):
    class Disk:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "fcntl", Disk)
    (tmp_path / HOLDER).write_text(json.dumps(holder), encoding="utf-8")


@pytest.mark.parametrize("holder", [{"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00"}, {"pid": 1}])
def test_a_disk_without_locks_goes_by_the_file_and_says_what_to_delete(monkeypatch, tmp_path, holder):
    no_locks(monkeypatch, tmp_path, {"host": lock.socket.gethostname(), **holder})
    told = rf"in use by process 1 .* if that process is gone, delete '{tmp_path / HOLDER}'"
    with pytest.raises(UserError, match=told), holding(tmp_path):
        pass


def test_a_disk_without_locks_forgets_a_process_of_this_machine_that_is_gone(monkeypatch, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    no_locks(monkeypatch, tmp_path, {"pid": gone.pid, "host": lock.socket.gethostname()})
    with holding(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_other_ranks_wait_for_the_first(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1234")
    out, entered = tmp_path / "out", threading.Event()

    def second():
        with holding(out):
            entered.set()

    with holding(out):
        monkeypatch.setenv("RANK", "1")
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
        monkeypatch.setenv("RANK", "0")
        ready(out)
        assert entered.wait(5)
        thread.join()


def test_a_rank_that_never_sees_the_folder_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(lock, "_SECONDS_TO_WAIT", 0.1)
    with pytest.raises(UserError, match="Rank 1 does not see"), holding(tmp_path / "out"):
        pass
