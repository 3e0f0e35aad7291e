import json

import pytest

from mixtura.results.run import CurvePoint, GradientNorm, LoadHistory, TrainPoint
from mixtura.training.metrics import (
    MetricsFile,
    evaluation_curve,
    load_imbalance,
    read_metrics,
    summarize_metrics,
    truncate_metrics,
)


def step(number, loss=1.0, grad_norm=1.0):
    return {"step": number, "loss": loss, "grad_norm": grad_norm, "seconds": float(number), "tokens": 10 * number}


def evaluation(number, loss, load=None):
    record = {"step": number, "tokens": 10 * number, "seconds": float(number)}
    record["eval"] = {"causal": {"loss": loss, "bits_per_byte": loss / 2}}
    if load is not None:
        record |= {"layers": [1], "load": load, "dropped_share": 0.25, "router_entropy": 0.5}
    return record


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(step(1))
        assert read_metrics(tmp_path / "metrics.jsonl") == [step(1)]
        metrics.write(step(2))
        metrics.sync()
        assert read_metrics(tmp_path / "metrics.jsonl") == [step(1), step(2)]


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.write(step(1, loss=float("nan")))


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step(1)) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [step(1)]


def test_truncating_keeps_the_evaluation_of_the_last_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [step(1), step(2), evaluation(2, 3.0), step(3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "{")
    assert truncate_metrics(path, step=2) == records[:3]
    assert read_metrics(path) == records[:3]


def test_truncating_what_does_not_exist_gives_an_empty_file(tmp_path):
    assert truncate_metrics(tmp_path / "metrics.jsonl", step=0) == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_curve_holds_the_evaluations_by_measure_and_mode():
    curve = evaluation_curve([step(1), step(2), evaluation(2, 3.0)])
    measures = {"loss": {"causal": 3.0}, "bits_per_byte": {"causal": 1.5}}
    assert curve == [CurvePoint(step=2, tokens=20, seconds=2.0, measures=measures)]
    assert curve[0].loss == {"causal": 3.0}


def test_even_load_has_imbalance_one_and_collapse_has_the_number_of_experts():
    assert load_imbalance([[0.25] * 4]) == pytest.approx(1.0)
    assert load_imbalance([[1.0, 0, 0, 0], [0.25] * 4]) == pytest.approx(2.5)


def test_a_summary_has_what_a_report_shows():
    records = [step(n, loss=float(n), grad_norm=float(n)) for n in range(1, 5)]
    records.insert(2, evaluation(2, 3.0, load=[[0.5, 0.5]]))
    records.append(evaluation(4, 2.0, load=[[0.75, 0.25]]))
    summary = summarize_metrics(records, max_points=2)
    assert summary.train_curve == [TrainPoint(2, 1.5), TrainPoint(4, 3.5)]
    assert summary.grad_norm == GradientNorm(2.5, 4.0)
    assert summary.load == LoadHistory([1], [2, 4], [[[0.5, 0.5]], [[0.75, 0.25]]])
    assert summary.load_imbalance == pytest.approx(1.5)
    assert (summary.dropped_share, summary.router_entropy) == (0.25, 0.5)
    assert [point.step for point in summary.curve] == [2, 4]


def test_a_summary_without_mixtures_has_no_load():
    summary = summarize_metrics([step(1), evaluation(1, 3.0)])
    assert summary.load is summary.load_imbalance is summary.dropped_share is None
