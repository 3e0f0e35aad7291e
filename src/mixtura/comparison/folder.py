"""The folder of a comparison: what is in it, and that it belongs to this recipe and this text.

`recipe.toml` (resolved), `environment.json`, `data.json` (which examples), `arms/<arm>/seed<k>/` with metrics,
checkpoints and `result.json`, `search/<arm>/rate<r>/seed<k>/`, `timing.json`, `results.json`, `report.html`,
`report.md`, `figures/`.
"""

import json
import os
import platform
import shutil
import tomllib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixtura.config import FinetuneRecipe, Recipe, UserError, recipe_to_dict, recipe_to_toml
from mixtura.files import write_json, write_text
from mixtura.kernels import native
from mixtura.results.stored import read_json
from mixtura.training.interface import Experiment


def open_folder(out: Path, recipe: Recipe | FinetuneRecipe, *, resume: bool) -> None:
    """Makes `out` the folder of this recipe; with `resume` off, what an earlier comparison left there is removed.

    Raises:
        UserError: the folder cannot be written, holds something else, or was begun with another recipe.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(out)
        if not resume:
            _clear(out)
        _check_same_recipe(out, recipe)
        write_json(out / "environment.json", environment())
        write_text(out / "recipe.toml", recipe_to_toml(recipe))
    except (NotADirectoryError, FileExistsError):
        file = next((path for path in (out, *out.parents) if path.is_file()), out)
        raise UserError(f"'{file}' is a file: give a folder with --out.") from None
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}): choose another folder with --out.") from None


_OURS = ("arms", "search", "data", "figures", "data.json", "timing.json", "results.json", "report.html", "report.md")


def _refuse_foreign(out: Path) -> None:
    # A recipe alone may be the user's own file.
    ours = all((out / name).exists() for name in ("environment.json", "recipe.toml"))
    if not ours and any(path.name != "environment.json" for path in out.iterdir()):
        raise UserError(f"'{out}' has files but is no comparison's folder: choose an empty or new one with --out.")


def _clear(out: Path) -> None:
    for name in (*_OURS, "recipe.toml", "environment.json"):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_same_recipe(out: Path, recipe: Recipe | FinetuneRecipe) -> None:
    path = out / "recipe.toml"
    if not path.exists():
        return
    if not _has_runs(out):
        # No run has begun, as after a mistake in the recipe: the corrected one may have the folder.
        (out / "timing.json").unlink(missing_ok=True)
        return
    try:
        before = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise UserError(
            f"'{path}' is damaged: choose another folder with --out, or --no-resume to start over."
        ) from None
    difference = _first_difference(before, recipe_to_dict(recipe), "")
    if difference:
        key, old, new = difference
        raise UserError(
            f"'{out}' was begun with {key} = {old!r}, now it is {new!r}: choose another folder with --out, or "
            "--no-resume to start over."
        )


def check_same_data(out: Path, experiment: Experiment) -> None:
    """Notes in `data.json` which examples the runs of this folder see, and refuses others once a run has begun.

    Finished runs are not repeated, so a text that changed under its name would be compared with its old self.

    Raises:
        UserError: the text, or a checkpoint to start from, has changed, or the note is damaged.
    """
    path = out / "data.json"
    # As JSON gives it back.
    seen = json.loads(json.dumps({"summary": experiment.data, "tokens": experiment.data_digest}))
    before = read_json(path, keys=seen) if _has_runs(out) else None
    if before is None:
        write_json(path, seen)
    elif difference := _first_difference(before, seen, ""):
        key, old, new = difference
        what = "checkpoint to start from" if key.startswith("summary.checkpoints") else "text"
        raise UserError(
            f"The {what} has changed since '{out}' was begun ({key} was {old!r}, now it is {new!r}): put it back, "
            "choose another folder with --out, or --no-resume to start over."
        )


def _has_runs(out: Path) -> bool:
    """Whether a run has begun, a trial of the search among them: `arms/<arm>/seed<k>/`, one folder deeper there."""
    return any(out.glob("arms/*/*/run.json")) or any(out.glob("search/*/*/*/run.json"))


def _first_difference(old: Any, new: Any, where: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if found := _first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")):
                return found
        return None
    return None if old == new else (where, old, new)


def environment() -> dict[str, str | int | None]:
    """Versions and hardware, as results.json has them."""
    return {
        **{name: _version(name) for name in ("mixtura", "torch", "transformers", "accelerate", "tokenizers", "numpy")},
        **{name: _version(name) for name in ("peft", "sacrebleu")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_experts": "compiled C" if native.library() is not None else "torch (no C compiler, or no BLAS to call)",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from the source folder
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
