"""TensorBoard, Trackio and wandb beside `metrics.jsonl`, through accelerate's trackers: the same numbers."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from mixtura.config import UserError
from mixtura.diagnostics.load import summarize_load

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
        step: steps already taken; what an interrupted run told TensorBoard after it is hidden.
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
