"""The folder of a comparison: what is in it, and that it belongs to this recipe and this text.

`recipe.toml` (resolved, and fitted to the data), `given.toml` (before that, where it differs), `environment.json`,
`data.json` (which examples), `arms/<arm>/seed<k>/` with metrics, checkpoints and `result.json`,
`search/<arm>/rate<r>/seed<k>/`, `timing.json`, `results.json`, `report.html`, `report.md`, `figures/`.
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

from mixtura.comparison.holding import HOLDER, has_runs
from mixtura.config import AnyRecipe, UserError, recipe_to_dict, recipe_to_toml
from mixtura.errors import rank
from mixtura.files import write_json, write_text
from mixtura.kernels import native
from mixtura.results.stored import read_json
from mixtura.training import ranks
from mixtura.training.interface import Experiment


def open_folder(out: Path, recipe: AnyRecipe, *, resume: bool) -> None:
    """Makes `out` the folder of this recipe; with `resume` off, what an earlier comparison left there is removed.

    Raises:
        UserError: the folder cannot be written, holds something else, or was begun with another recipe.
    """
    if rank():  # the first rank prepares the folder for all
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(out)
        if not resume:
            _clear(out)
        _check_same_recipe(out, recipe)
        write_json(out / "environment.json", environment())
        # The folder has the recipe as it runs, fitted to the data; `recipe` may be the one before it was fitted.
        if not (out / GIVEN_FILE).exists() or not has_runs(out):
            (out / GIVEN_FILE).unlink(missing_ok=True)
            write_text(out / "recipe.toml", recipe_to_toml(recipe))
    except (NotADirectoryError, FileExistsError):
        file = next((path for path in (out, *out.parents) if path.is_file()), out)
        raise UserError(f"'{file}' is a file: give a folder with --out.") from None
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}): choose another folder with --out.") from None


GIVEN_FILE = "given.toml"
"""The recipe as the user gave it, where `recipe.toml` is one that was fitted to the data."""
_OURS = (
    GIVEN_FILE,
    "arms",
    "search",
    "data",
    "figures",
    "data.json",
    "timing.json",
    "results.json",
    "report.html",
    "report.md",
)


def _refuse_foreign(out: Path) -> None:
    # A recipe alone may be the user's own file.
    ours = all((out / name).exists() for name in ("environment.json", "recipe.toml"))
    if not ours and any(path.name not in ("environment.json", HOLDER) for path in out.iterdir()):
        raise UserError(f"'{out}' has files but is no comparison's folder: choose an empty or new one with --out.")


def _clear(out: Path) -> None:
    for name in (*_OURS, "recipe.toml", "environment.json"):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_same_recipe(out: Path, recipe: AnyRecipe) -> None:
    path = out / "recipe.toml"
    if not path.exists():
        return
    given = out / GIVEN_FILE
    if given.exists() and not _same_text(path, recipe):
        path = given
    if not has_runs(out):
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


def _same_text(path: Path, recipe: AnyRecipe) -> bool:
    return path.read_text(encoding="utf-8", errors="replace") == recipe_to_toml(recipe)


def store_fitted(out: Path, given: AnyRecipe, fitted: AnyRecipe) -> None:
    """Stores the fitted recipe as the folder's `recipe.toml`, and the one that the user gave beside it.

    Both may then be given to go on with the folder.
    """
    if given != fitted and _same_text(out / "recipe.toml", given):
        write_text(out / GIVEN_FILE, recipe_to_toml(given))
        write_text(out / "recipe.toml", recipe_to_toml(fitted))


def check_same_data(out: Path, experiment: Experiment) -> None:
    """Stores in `data.json` which examples the runs of this folder see, and refuses others once a run has begun.

    Finished runs are not repeated. If a text had changed meanwhile, new runs would see other examples than those.

    Raises:
        UserError: the text, or a checkpoint to start from, has changed, or the note is damaged.
    """
    path = out / "data.json"
    # In the form in which JSON gives it back, to be compared with what is stored.
    seen = json.loads(json.dumps({"summary": experiment.data, "tokens": experiment.data_digest}))
    before = read_json(path, keys=seen) if has_runs(out) else None
    if before is None:
        write_json(path, seen)
    elif difference := _first_difference(before, seen, ""):
        key, old, new = difference
        what = "checkpoint to start from" if key.startswith("summary.checkpoints") else "text"
        raise UserError(
            f"The {what} has changed since '{out}' was begun ({key} was {old!r}, now it is {new!r}): put it back, "
            "choose another folder with --out, or --no-resume to start over."
        )


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
        **({"processes": ranks.world_size()} if ranks.world_size() > 1 else {}),
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
