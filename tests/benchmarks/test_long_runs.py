"""The script that searches initialisation scales: what it draws, and that a killed run ends as an unkilled one does."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "initialisation.py"
SMALL = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "vocabulary": 300,
    "context": 16,
    "max_bytes": 200_000,
    "experts": 4,
    "group": 4,
    "batch": 4,
    "held_out": 64,
    "calibration": 1,
    "warmup": 2,
}


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("initialisation_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_scales_are_multiples_of_fan_in_and_share_their_draws(script):
    names = {"family": "mixture_of_tokens", "placement": "later_half", "width": 64, "layers": 2}
    plain = script.Run(**names).model()
    scaled = script.Run(**names, dense_up=0.5, dense_down=1, expert_up=2, expert_down=0.25, router=1).model()
    dense, mixture = (layer.mlp for layer in scaled.model.layers)
    fan_in, width = 64, mixture.experts.down_proj.size(-1)
    for weight, expected in (
        (dense.up_proj.weight, 0.5 / fan_in**0.5),
        (dense.down_proj.weight, 1 / (4 * fan_in) ** 0.5),
        (mixture.experts.up_proj, 2 / fan_in**0.5),
        (mixture.experts.down_proj, 0.25 / width**0.5),
        (mixture.gate.weight, 1 / fan_in**0.5),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    before, after = plain.model.layers[1].mlp.gate.weight, mixture.gate.weight
    torch.testing.assert_close(after / after.norm(), before / before.norm())
    assert torch.equal(plain.model.embed_tokens.weight, scaled.model.embed_tokens.weight)


def test_branches_decay_from_a_constant_rate_to_zero(script):
    run = script.Run(branches=(10, 20), warmup=2)
    assert [run.rate_factor(step, 20, decaying=False) for step in (0, 1, 15)] == [0.5, 1.0, 1.0]
    decay = [run.rate_factor(step, 20, decaying=True) for step in range(run.decay_start(20), 20)]
    assert len(decay) == 4 and decay == sorted(decay, reverse=True) and 0 < decay[-1] < decay[0] < 1


@pytest.mark.parametrize("settings", [{"steps": 12}, {"branches": [8, 12]}])
def test_a_killed_run_goes_on_to_the_same_results(script, monkeypatch, tmp_path, settings):
    runs = tmp_path / "runs.jsonl"
    runs.write_text(json.dumps({**SMALL, **settings, "family": "mixture_of_tokens"}))
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
    assert not script.Folder(killed).state(run).exists()


def test_a_run_that_another_process_has_is_left_to_it(script, tmp_path):
    folder, run = script.Folder(tmp_path), script.Run(**SMALL, steps=1)
    with folder.claim(run) as mine:
        assert mine and not script.train_next([run], script.Folder(tmp_path))
