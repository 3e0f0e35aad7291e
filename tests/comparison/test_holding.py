"""One process holds an output folder; a failed start leaves none behind; under torchrun the first rank holds it."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from mixtura.comparison import holding as module
from mixtura.comparison.holding import HOLDER, holding, ready
from mixtura.config import Interrupted, UserError

HOLD = """
import sys
from pathlib import Path
from mixtura.comparison.holding import holding
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

    monkeypatch.setattr(module, "fcntl", Disk)
    (tmp_path / HOLDER).write_text(json.dumps(holder), encoding="utf-8")


@pytest.mark.parametrize("holder", [{"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00"}, {"pid": 1}])
def test_a_disk_without_locks_goes_by_the_file_and_says_what_to_delete(monkeypatch, tmp_path, holder):
    no_locks(monkeypatch, tmp_path, {"host": module.socket.gethostname(), **holder})
    told = rf"in use by process 1 .* if that process is gone, delete '{tmp_path / HOLDER}'"
    with pytest.raises(UserError, match=told), holding(tmp_path):
        pass


def test_a_disk_without_locks_forgets_a_process_of_this_machine_that_is_gone(monkeypatch, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    no_locks(monkeypatch, tmp_path, {"pid": gone.pid, "host": module.socket.gethostname()})
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
    monkeypatch.setattr(module, "_SECONDS_TO_WAIT", 0.1)
    with pytest.raises(UserError, match="Rank 1 does not see"), holding(tmp_path / "out"):
        pass
