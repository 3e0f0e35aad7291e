"""`metrics.jsonl`: one JSON object a line, written while the run goes; what reports and trackers take from it.

Every optimizer step gives `step`, `loss` (the task's loss alone), `aux_loss`, `z_loss`, `grad_norm` (before
clipping), `learning_rate`, `seconds` and `tokens`. Both are counted from the start of the run over all its resumptions,
and `seconds` is optimisation only: evaluations and checkpoints are left out. An evaluation gives `step`, `tokens`,
`seconds`, `eval` (measures per mode, the loss among them) and, for a model with mixtures, `layers`, `load` (each
expert's share per layer), `dropped_share` and `router_entropy` over the steps since the evaluation before it.

TensorBoard, Trackio and wandb get the same numbers through accelerate's trackers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from mixtura.config import UserError
from mixtura.diagnostics.health import count_spikes, summarize_load
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

PROJECT = "mixtura"
_STEP_KEYS = ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens", "seconds")


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose package is missing.

    Raises:
        UserError: names the package.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"'training.trackers' has '{name}', which is not installed: run pip install {name}, or remove it."
            )


def start_trackers(names: Sequence[str], *, out: Path, step: int) -> list[GeneralTracker]:
    """Opens the trackers of one run.

    TensorBoard's events go to `out/tensorboard`, so that one `--logdir` shows all arms and seeds of a comparison.
    Trackio's go where Trackio keeps them (`TRACKIO_DIR`), as the run `out` of the project `mixtura`, and wandb's under
    `out/wandb`, under the same names; whether they are sent too is for `WANDB_MODE` to say.

    Args:
        names: "tensorboard", "trackio" and "wandb".
        out: the run folder.
        step: steps already taken; events that an interrupted run wrote for TensorBoard after this step are hidden.
    """
    makers = {
        "tensorboard": lambda: TensorBoardTracker(
            "tensorboard", logging_dir=out, **({"purge_step": step + 1} if step else {})
        ),
        "trackio": lambda: TrackioTracker(PROJECT, name=str(out), resume="allow"),
        "wandb": lambda: WandBTracker(PROJECT, name=str(out), dir=str(out)),
    }
    trackers: list[GeneralTracker] = [makers[name]() for name in names]
    for tracker in trackers:
        tracker.start()
    return trackers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker shows of one line of `metrics.jsonl`: `train/...`, `eval/<mode>/...` and `routing/...`."""
    values = {}
    if "eval" in record:
        for mode, measures in record["eval"].items():
            values |= {f"eval/{mode}/{key}": value for key, value in measures.items()}
    else:
        values |= {f"train/{key}": record[key] for key in _STEP_KEYS if record.get(key) is not None}
    if "load" in record:
        imbalances = [summarize_load(share_E).imbalance for share_E in record["load"]]
        values["routing/load_imbalance"] = sum(imbalances) / len(imbalances)
        values |= {f"routing/{key}": record[key] for key in ("dropped_share", "router_entropy")}
    return {key: float(value) for key, value in values.items()}


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
    """The evaluations, with the loss and whatever else was measured during training."""
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
