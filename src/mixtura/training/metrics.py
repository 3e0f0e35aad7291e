"""`metrics.jsonl`: one JSON object a line, written as the run goes, and what a report takes from it.

Every optimizer step gives `step`, `loss` (the task's loss alone), `aux_loss`, `z_loss`, `grad_norm` (before
clipping), `learning_rate`, `seconds` and `tokens`, both counted from the start of the run over all its resumptions;
`seconds` is optimisation only, evaluations and checkpoints are left out. An evaluation gives `step`, `tokens`,
`seconds`, `eval` (measures per mode, the loss among them) and, for a model with mixtures, `layers`, `load` (each
expert's share per layer), `dropped_share` and `router_entropy` over the steps since the evaluation before it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from accelerate.tracking import GeneralTracker

from mixtura.config import UserError
from mixtura.diagnostics.load import summarize_load
from mixtura.diagnostics.stability import count_spikes
from mixtura.files import write_text
from mixtura.results.run import (
    ByMode,
    CurvePoint,
    GradientNorm,
    LoadHistory,
    Spikes,
    TrainingHistory,
    TrainPoint,
)
from mixtura.training.trackers import scalars

Record = dict[str, Any]
"""One line of the file."""


class MetricsFile:
    """Appends records to a file that is whole after every line, so that a killed run leaves all it measured."""

    def __init__(self, path: Path, trackers: Sequence[GeneralTracker] = ()) -> None:
        """Opens the file for appending; `trackers` are shown every record too, and closed with the file."""
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record and hands it to the operating system."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(scalars(record), step=record["step"])

    def sync(self) -> None:
        """Waits until everything is on disk: a checkpoint must never be ahead of its metrics."""
        os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[Record]:
    """All records; a last line that a crash cut short is left out. No file is no records.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
        if not isinstance(records[-1], dict) or "step" not in records[-1]:
            raise UserError(f"'{path}' is damaged: delete '{path.parent}', and that run is done again.")
    return records


def truncate_metrics(path: Path, *, step: int) -> list[Record]:
    """Drops what was measured after `step`, which a resumed run measures again; returns what is kept."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def evaluation_curve(records: Sequence[Record]) -> list[CurvePoint]:
    """The evaluations, with the loss and whatever else was measured on the way."""
    return [
        CurvePoint(
            step=record["step"],
            tokens=record["tokens"],
            seconds=record["seconds"],
            measures=_by_measure(record["eval"]),
        )
        for record in records
        if "eval" in record
    ]


def _by_measure(by_mode: dict[str, dict[str, float]]) -> dict[str, ByMode]:
    """{measure: {mode: value}} from {mode: {measure: value}}; a mode without a measure is left out of it."""
    keys = dict.fromkeys(key for measures in by_mode.values() for key in measures)
    return {key: {mode: of[key] for mode, of in by_mode.items() if key in of} for key in keys}


def summarize_metrics(records: Sequence[Record], *, max_points: int = 200) -> TrainingHistory:
    """What a report says about one run's training.

    Args:
        records: as `read_metrics` gives them.
        max_points: the training curve is thinned to so many points, each the mean of a stretch of steps.
    """
    steps = [record for record in records if "loss" in record]
    loads = [record for record in records if "load" in record]
    norms = [record["grad_norm"] for record in steps]
    last = loads[-1] if loads else None
    return TrainingHistory(
        curve=evaluation_curve(records),
        train_curve=_thinned(steps, max_points),
        grad_norm=GradientNorm(sum(norms) / len(norms), max(norms)) if norms else None,
        spikes=Spikes(*(count_spikes([record[key] for record in steps]) for key in ("loss", "grad_norm"))),
        load=_load_history(loads) if last else None,
        load_imbalance=load_imbalance(last["load"]) if last else None,
        dropped_share=last["dropped_share"] if last else None,
        router_entropy=last["router_entropy"] if last else None,
    )


def load_imbalance(share_ME: Sequence[Sequence[float]]) -> float:
    """Largest load of an expert over the mean load, mean over layers: 1 is even, E is everything on one expert."""
    return float(np.mean([summarize_load(share_E).imbalance for share_E in share_ME]))


def _thinned(steps: Sequence[Record], max_points: int) -> list[TrainPoint]:
    if not steps:
        return []
    stretches = np.array_split(np.arange(len(steps)), min(max_points, len(steps)))
    return [
        TrainPoint(steps[stretch[-1]]["step"], float(np.mean([steps[i]["loss"] for i in stretch])))
        for stretch in stretches
    ]


def _load_history(loads: Sequence[Record]) -> LoadHistory:
    return LoadHistory(
        layers=loads[-1]["layers"],
        steps=[record["step"] for record in loads],
        share=[record["load"] for record in loads],
    )
