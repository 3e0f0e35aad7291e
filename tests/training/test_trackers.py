"""A run's metrics in TensorBoard, Trackio and wandb, which are optional."""

import importlib
import sqlite3

import pytest

from mixtura.config import UserError, recipe_from_dict
from mixtura.training import metrics, read_metrics
from mixtura.training.metrics import scalars

STEP = {"step": 3, "loss": 2.0, "aux_loss": None, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 64, "seconds": 1.0}


def test_a_step_is_shown_without_what_was_not_measured():
    shown = {"train/loss": 2.0, "train/grad_norm": 0.5, "train/learning_rate": 1e-3, "train/tokens": 64.0}
    assert scalars(STEP) == {**shown, "train/seconds": 1.0}


def test_an_evaluation_is_shown_by_mode_with_the_routing():
    record = {
        "step": 3,
        "eval": {"alone": {"loss": 2.0}, "group": {"loss": 1.0}},
        **{"load": [[0.75, 0.25], [0.5, 0.5]], "dropped_share": 0.0, "router_entropy": 0.9},
    }
    assert scalars(record) == {
        "eval/alone/loss": 2.0,
        "eval/group/loss": 1.0,
        "routing/load_imbalance": 1.25,
        "routing/dropped_share": 0.0,
        "routing/router_entropy": 0.9,
    }


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'training.trackers' has 'trackio', which is not installed: run pip install"):
        run(tiny_model(), trackers=("trackio",))
    assert not (tmp_path / "run").exists()


def test_a_recipe_names_trackers():
    dense = {"dense": {"family": "dense"}}
    recipe = recipe_from_dict({"name": "t", "training": {"trackers": ["tensorboard"]}, "arms": dense})
    assert recipe.training.trackers == ("tensorboard",)
    with pytest.raises(UserError, match="it must be one of tensorboard, trackio, wandb"):
        recipe_from_dict({"name": "t", "training": {"trackers": ["paper"]}, "arms": dense})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_tensorboard_shows_what_the_metrics_file_says(run, tiny_model, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    run(tiny_model("token_choice"), trackers=("tensorboard",), steps=6)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (record["step"], pytest.approx(record["loss"])) for record in records
    ]
    assert {"train/aux_loss", "routing/load_imbalance"} <= set(events.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore")  # of Trackio and what it imports
def test_trackio_keeps_the_run_in_its_own_database(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    run(tiny_model(), trackers=("trackio",), steps=3)
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {row[1] for row in rows} == {1, 2, 3} and all(row[0] == str(tmp_path / "run") for row in rows)
    assert any("train/loss" in str(row[2]) for row in rows)


@pytest.mark.filterwarnings("ignore")  # of wandb and what it imports
def test_wandb_keeps_the_run_on_disk_where_it_is_offline(run, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    run(tiny_model(), trackers=("wandb",), steps=3)
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert str(tmp_path / "run").encode() in content and content.count(b"train/loss") >= 3
