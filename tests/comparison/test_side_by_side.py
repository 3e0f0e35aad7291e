"""Several runs at a time: the results of one after another, and nothing lost when they are stopped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from comparison.test_processes import differences
from mixtura.comparison.runner import compare
from mixtura.comparison.runs import _take_device
from mixtura.config import SearchConfig, UserError, recipe_to_toml
from mixtura.training import SilentProgress, ranks

ARMS = {
    "dense": {"family": "dense"},
    "mixture_of_tokens": {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4},
}


class Heard(SilentProgress):
    """Remembers what a comparison shows."""

    def __init__(self):
        self.runs, self.steps, self.notes = [], [], []

    def start_run(self, label, *, step, steps):
        self.runs.append((label, step, steps))

    def advance(self, step, *, loss, tokens_per_second):
        self.steps.append(step)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def start(tiny_recipe, tmp_path):
    """Starts a comparison of two runs at a time in a process, which does not outlive the test."""
    started = []

    def start(**training):
        recipe = tiny_recipe(arms=ARMS, seeds=(0, 1), eval_every=training["steps"], threads=1, **training)
        path = tmp_path / "tiny.toml"
        path.write_text(recipe_to_toml(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "mixtura", "compare", str(path), "--out", str(tmp_path / "run")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([*command, "--arms-in-parallel", "2"], **pipes))
        return recipe, started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_runs_side_by_side_give_the_results_of_one_after_another(tiny_recipe, tmp_path, one_thread):
    """Bit for bit, search and a run that diverges included."""
    arms = ARMS | {"wild": {"family": "dense", "learning_rate": 1e9}}
    recipe = tiny_recipe(arms=arms, seeds=(0, 1), threads=1)
    heard = Heard()
    compare(recipe, out=tmp_path / "two", arms_in_parallel=2, reporter=heard)
    compare(recipe, out=tmp_path / "one")
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    # Which arm takes the least time a step is said in the answer.
    assert [found for found in differences(one, two) if found[0] != ".summary.verdict.answer"] == []
    for name in ARMS:
        for run, other in zip(one["arms"][name]["runs"], two["arms"][name]["runs"], strict=True):
            assert run["final"] == other["final"]
    assert two["environment"]["arms_in_parallel"] == 2 and two["environment"]["threads"] == 1
    assert heard.runs == [("6 runs, 2 at a time", 0, 6 * recipe.training.steps)]
    assert heard.steps == sorted(heard.steps) and heard.steps[-1] <= 6 * recipe.training.steps
    assert sum(note.startswith("dense seed 0: done") for note in heard.notes) == 1
    assert any("wild seed 1: diverged" in note for note in heard.notes)


def test_a_search_runs_side_by_side_too_and_finished_trials_are_not_repeated(tiny_recipe, tmp_path):
    search = SearchConfig(learning_rates=(1e-3, 1e9), seeds=(7,))
    recipe = dataclasses.replace(tiny_recipe(arms=ARMS, threads=1), search=search)
    results = compare(recipe, out=tmp_path / "run", arms_in_parallel=2)
    record = results.arms["dense"].learning_rate_search
    assert record is not None and record.best == 1e-3 and record.trials[1].loss is None
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("result.json")}
    assert len(before) == 2 * (2 + 1)
    compare(recipe, out=tmp_path / "run", arms_in_parallel=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("result.json")} == before


def test_a_stopped_comparison_leaves_no_process_and_goes_on_alone(start, tmp_path):
    recipe, process = start(steps=300, save_every=20)
    wait_until(lambda: len({path.parent for path in tmp_path.glob("run/arms/*/*/checkpoint*")}) == 2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "is saved" in said
    assert len(list(tmp_path.glob("run/arms/*/*/run.json"))) == 2, "runs that wait are not begun"
    heard = Heard()
    compare(recipe, out=tmp_path / "run", reporter=heard)
    assert sorted(step > 0 for _, step, _ in heard.runs) == [False, False, True, True]


def test_processes_end_with_the_one_that_started_them(start, tmp_path):
    _, process = start(steps=100_000, save_every=100_000)
    wait_until(lambda: len(list(tmp_path.glob("run/arms/*/*/metrics.jsonl"))) == 2)
    children = [int(pid) for pid in children_of(process.pid)]
    assert len(children) >= 2
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in children))


def children_of(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "world", "word"), [(0, 1, "1 or more"), (2, 2, "torchrun has started 2")])
def test_numbers_that_make_no_sense_are_refused(tiny_recipe, tmp_path, monkeypatch, number, world, word):
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    with pytest.raises(UserError, match=word):
        compare(tiny_recipe(), out=tmp_path / "run", arms_in_parallel=number)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("visible", "count", "expected"), [("4,7", 8, "7"), (None, 3, "1"), (None, 1, None), (None, 0, None), ("5", 8, "5")]
)
def test_every_process_takes_a_gpu_of_those_visible(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    _take_device(1, environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
