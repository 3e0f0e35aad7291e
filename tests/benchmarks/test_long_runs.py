"""The script of long runs: which models it trains, and that a killed run ends as an unkilled one does."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_runs.py"
SMALL = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "vocabulary": 300,
    "context": 16,
    "max_bytes": 200_000,
    "batch": 4,
    "held_out": 64,
    "calibration": 1,
    "warmup": 2,
}
SPARSE = {"num_experts": 4, "top_k": 2}
MIXED = {"num_experts": 4, "group_size": 4}


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("long_runs_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_run_trains_what_a_recipe_with_its_settings_would(script):
    names = {"family": "mixture_of_tokens", "placement": "later_half", "layers": 2}
    dense, mixture = (layer.mlp for layer in script.Run(**names, arm={"expert_scale": 0.5}).model().model.layers)
    width = mixture.experts.down_proj.size(-1)
    for weight, expected in (
        (dense.up_proj.weight, 0.45 / 64**0.5),
        (dense.down_proj.weight, 0.45 / 168**0.5),
        (mixture.experts.down_proj, 0.5 / width**0.5),
        (mixture.gate.weight, 1 / 64**0.5),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    uniform = script.Run(**names, arm={"control": "uniform_router"}).model().model.layers[1].mlp
    assert not uniform.gate.weight.any()


def test_a_control_of_the_shared_width_is_dense_and_narrower(script):
    arm = {**SPARSE, "num_shared_experts": 1, "control": "shared_width"}
    model = script.Run(family="token_choice", arm=arm).model()
    assert not model.mixture_layers() and model.model.layers[0].mlp.up_proj.weight.size(0) < 168


@pytest.mark.parametrize("family", ["expert_threshold", "remoe"])
def test_what_follows_the_load_moves_as_in_the_trainer(script, tmp_path, family):
    run = script.Run(**SMALL, family=family, branches=(6,), arm=SPARSE)
    folder = script.Folder(tmp_path)
    assert script.train_next([run], folder)
    (row,) = folder.rows()
    assert row["steps_taken"] == 6 and set(row["load"]) == {"busiest", "idle", "active"}
    training = script.Training(run, script.prepared(run, folder))
    layer = training.model.mixture_layers()[0]
    before = {name: value.clone() for name, value in layer.named_buffers()}
    training.advance(6, decaying=False)
    assert any(not torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_branches_decay_from_a_constant_rate_to_zero(script):
    run = script.Run(branches=(10, 20), warmup=2)
    assert [run.rate_factor(step, 20, decaying=False) for step in (0, 1, 15)] == [0.5, 1.0, 1.0]
    decay = [run.rate_factor(step, 20, decaying=True) for step in range(run.decay_start(20), 20)]
    assert len(decay) == 4 and decay == sorted(decay, reverse=True) and 0 < decay[-1] < decay[0] < 1


@pytest.mark.parametrize("settings", [{"steps": 12}, {"branches": [8, 12]}])
def test_a_killed_run_goes_on_to_the_same_results(script, monkeypatch, tmp_path, settings):
    runs = tmp_path / "runs.jsonl"
    runs.write_text(
        json.dumps({**SMALL, **settings, "family": "mixture_of_tokens", "arm": MIXED, "all_mixtures": True})
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (run,) = script.read_runs(runs)
    assert script.train_next([run], script.Folder(whole)) and not script.train_next([run], script.Folder(whole))

    advance = script.Training.advance

    def advance_and_die(training, *args, **kwargs):
        if training.step == 7:
            raise KeyboardInterrupt
        advance(training, *args, **kwargs)

    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    monkeypatch.setattr(script.Training, "advance", advance_and_die)
    with pytest.raises(KeyboardInterrupt):
        script.train_next([run], script.Folder(killed))
    assert script.Folder(killed).state(run).exists()
    monkeypatch.setattr(script.Training, "advance", advance)
    script.train_next([run], script.Folder(killed))

    rows = [[{**row, "cpu_seconds": 0} for row in script.Folder(folder).rows()] for folder in (whole, killed)]
    assert rows[0] == rows[1] and [row["end"] for row in rows[0]] == list(run.ends)
    assert set(rows[0][0]["losses"]) == {"group", "alone_all", "alone_top2", "population_all", "population_top2"}
    assert script.Folder(killed).state(run).exists() == bool(run.branches)


def test_a_run_with_more_branches_goes_on_from_an_earlier_one(script, tmp_path):
    runs = [script.Run(**SMALL, branches=branches) for branches in ((8,), (8, 12))]
    at_once, in_turn = script.Folder(tmp_path / "once"), script.Folder(tmp_path / "turn")
    assert script.train_next(runs[1:], at_once)
    assert script.train_next(runs, in_turn) and script.train_next(runs, in_turn)
    assert not script.train_next(runs, in_turn)
    rows = [
        [(row["end"], row["losses"], row["training_curve"]) for row in folder.rows()] for folder in (at_once, in_turn)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_a_run_that_another_process_has_is_left_to_it(script, tmp_path):
    folder, run = script.Folder(tmp_path), script.Run(**SMALL, steps=1)
    with folder.claim(run) as mine:
        assert mine and not script.train_next([run], script.Folder(tmp_path))


def test_what_a_study_changes_is_part_of_a_runs_name_and_nothing_else_is(script):
    plain = script.Run(branches=(8,))
    assert plain.key == script.Run(branches=(8, 12), name="again", neighbours=1).key
    keys = {script.Run(branches=(8,), **{name: 2}).key for name in script.STUDIED}
    assert len({plain.key} | keys) == 1 + len(script.STUDIED)


def test_experts_may_learn_at_a_rate_of_their_own(script, tmp_path):
    run = script.Run(**SMALL, family="mixture_of_tokens", arm=MIXED, branches=(6,), expert_rate=4.0)
    training = script.Training(run, script.prepared(run, script.Folder(tmp_path)))
    training.advance(6, decaying=False)
    rates = {id(weight): group["lr"] for group in training.optimizer.param_groups for weight in group["params"]}
    found = {(".mlp.experts." in name): rates[id(weight)] for name, weight in training.model.named_parameters()}
    assert len(rates) == len(list(training.model.parameters())) and found[True] == 4 * found[False] > 0


def test_a_group_may_be_of_consecutive_windows_and_its_router_may_sharpen(script, tmp_path):
    settings = {**SMALL, "family": "mixture_of_tokens", "arm": MIXED, "branches": (6,)}
    run = script.Run(**settings, neighbours=4, last_temperature=0.25)
    data = script.prepared(run, script.Folder(tmp_path))
    training = script.Training(run, data)
    windows = {tuple(row): index for index, row in enumerate(data.train.sequences_NL.tolist())}
    places = [windows[tuple(row)] for row in training._rows(0, 8).tolist()]
    assert places[1:4] == [places[0] + k for k in (1, 2, 3)] and places[4] != places[3] + 1
    for _ in range(4):
        training.advance(6, decaying=False)
    assert [layer.temperature for layer in training.model.mixture_of_tokens_layers()] == [0.25**0.5] * 2


def test_mixtures_of_tokens_stay_in_their_groups_however_long_a_run_with_branches_is(script, monkeypatch, tmp_path):
    run = script.Run(**SMALL, family="mixture_of_tokens", arm=MIXED, branches=(40,))
    training = script.Training(run, script.prepared(run, script.Folder(tmp_path)))
    seen = []
    monkeypatch.setattr(training.model, "prepare_step", lambda step, *, steps: seen.append((step, steps)))
    for _ in range(30):  # a tenth of it, 20 steps, counts as the warm-up
        training.advance(40, decaying=False)
    assert seen[0] == (0, 20) and all(step < steps for step, steps in seen)


def test_a_run_that_begins_dense_goes_on_as_copies_and_resumes_so(script, tmp_path):
    run = script.Run(**SMALL, family="mixture_of_tokens", branches=(8,), arm=MIXED, dense_steps=3)
    folder = script.Folder(tmp_path)
    training = script.Training(run, script.prepared(run, folder))
    for _ in range(3):
        training.advance(8, decaying=False)
    assert not training.model.mixture_layers()
    last = training.model.model.layers[-1].mlp
    down, kept = last.down_proj.weight.clone(), copy.deepcopy(training.state())
    training._upcycle()
    mixture = training.model.mixture_layers()[-1]
    first, second = mixture.experts.weights
    width = second.size(-1)
    assert all(torch.equal(expert, down[:, :width]) for expert in second)
    assert torch.equal(first[0, :width], last.gate_proj.weight[:width])
    assert torch.equal(first[1, width:], last.up_proj.weight[:width])
    ends = []
    for state in (kept, None):
        again = script.Training(run, training.data)
        if state is None:
            for _ in range(5):
                again.advance(8, decaying=False)
            state = copy.deepcopy(again.state())
            again = script.Training(run, training.data)
        again.restore(state)
        while again.step < 8:
            again.advance(8, decaying=False)
        ends.append(again.losses)
    assert ends[0] == ends[1] and len(ends[0]) == 8


def test_what_was_stored_can_be_gone_on_from(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "records")
    (tmp_path / "records").mkdir()
    runs = [
        script.Run(**SMALL, name="dense", branches=(4,)),
        script.Run(**SMALL, name="tc", family="token_choice", arm=SPARSE, steps=3, seed=1),
    ]
    folder = script.Folder(tmp_path / "first")
    while script.train_next(runs, folder):
        pass
    stored = json.loads(script.store(folder, runs, name="toy").read_text("utf-8"))
    other = script.Folder(tmp_path / "second")
    # A run that the list no longer has is found by its settings, one with a branch more goes on.
    longer = [script.Run(**SMALL, name="dense", branches=(4, 6)), runs[1]]
    assert script.restore(other, longer, name="toy") == 2
    assert [other.ends(run) for run in longer] == [{4}, {3}]
    assert json.loads(script.store(other, longer, name="toy").read_text("utf-8"))["rows"] == stored["rows"]
    # On a machine with another processor these rows keep the name of the one that they were trained on.
    here = stored["settings"]["processor"]
    monkeypatch.setattr(script, "environment", lambda: {"processor": "another"})
    assert script.train_next(longer, other)
    rows = json.loads(script.store(other, longer, name="toy").read_text("utf-8"))["rows"]
    assert [(row["end"], row.get("processor")) for row in rows] == [(4, here), (6, None), (3, here)]
    with pytest.raises(SystemExit, match="restore into an empty folder"):
        script.restore(other, longer, name="toy")
