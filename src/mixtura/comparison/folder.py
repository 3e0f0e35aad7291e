"""The folder of a comparison: what is in it, that it belongs to this recipe and this text, and who writes it.

`recipe.toml` (resolved, and fitted to the data), `given.toml` (before that, where it differs), `environment.json`,
`data.json` (which examples), `arms/<arm>/seed<k>/` with metrics, `result.json`, and the model or, until the run is
finished, checkpoints, `search/<arm>/rate<r>/seed<k>/`, `timing.json`, `results.json`, `report.html`, `report.md`,
`figures/`.

One process at a time writes it, and a start that fails leaves none behind. The process locks a file in the folder. The
system ends the lock with the process, however that ends, so that no lock is ever left over. The file says who holds it,
for the sentence that a second process gets. Some network disks know no locks: there the file itself has to do. Under
torchrun the first rank holds the folder for all, and the others wait until it is ready.
"""

import errno
import json
import os
import platform
import shutil
import socket
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixtura import __version__
from mixtura.config import AnyRecipe, Interrupted, UserError, recipe_to_dict, recipe_to_toml
from mixtura.errors import launch, rank, reason_of
from mixtura.files import check_name, file_above, write_json, write_text
from mixtura.kernels import native
from mixtura.results.document import Plain, read_json
from mixtura.training import ranks
from mixtura.training.interface import Experiment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOLDER = ".in-use.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_SECONDS_TO_WAIT = 300.0


@contextmanager
def holding(out: Path) -> Iterator[None]:
    """Holds folder `out` for the length of a block, which makes it a comparison's folder.

    Where the block fails before any run has begun, what it has made is removed again.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """
    if rank():
        _wait_for_first_rank(out)
        yield
        return
    made = _make(out)
    untouched = not any(path.name != HOLDER for path in out.iterdir())
    try:
        with _locked(out / HOLDER):
            try:
                yield
            except Interrupted:
                raise
            except Exception:
                if untouched and not has_runs(out):
                    _empty(out)
                raise
    finally:
        for folder in made:  # the innermost first; none that holds anything
            with suppress(OSError):
                folder.rmdir()


def ready(out: Path) -> None:
    """Lets the other ranks go on: `out` is now this recipe's folder."""
    if launch() and not rank():
        _write_holder(out / HOLDER, launch=launch())


def has_runs(out: Path) -> bool:
    """Whether a run has begun, a trial of the search among them."""
    return any(out.glob("arms/*/*/run.json")) or any(out.glob("search/*/*/*/run.json"))


def _make(out: Path) -> list[Path]:
    """Makes the folder and those above it; returns those that were not there, the innermost first."""
    check_name(out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        file = out if out.is_file() else file_above(out) or out
        raise UserError(f"'{file}' is a file: give a folder with --out.") from None
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({reason_of(error)}): choose another folder with --out.") from None
    return missing


def _empty(out: Path) -> None:
    for path in out.iterdir():
        if path.name == HOLDER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """A lock on a file of this process's own; the file goes with the lock."""
    try:
        handle = _lock(file)
    except OSError as error:
        raise UserError(
            f"'{file.parent}' cannot be written ({reason_of(error)}): choose another folder with --out."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # still locked, so that no other process can lock the file while it is being removed
            file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path) -> int:
    """Locks the file and writes into it who this is."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle, file)
            # The process before may have removed the file between open and lock: then this lock protects nothing.
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                _introduce(file)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _introduce(file: Path) -> None:
    try:
        _write_holder(file)
    except OSError:  # a full disk
        file.unlink(missing_ok=True)
        raise


def _take(handle: int, file: Path) -> None:
    holder = _read_holder(file)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{_in_use(file, holder)}: wait for it, or choose another folder with --out.") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if _may_live(holder):
            raise UserError(
                f"{_in_use(file, holder)}: wait for it, or choose another folder with --out. This disk has no locks: "
                f"if that process is gone, delete '{file}'."
            ) from None


def _in_use(file: Path, holder: Plain) -> str:
    if "pid" not in holder:
        return f"'{file.parent}' is in use by another process"
    return (
        f"'{file.parent}' is in use by process {holder['pid']} on {holder.get('host')} since {holder.get('since')} UTC"
    )


def _may_live(holder: Plain) -> bool:
    """Whether the process may still run; one on another machine cannot be asked, so it may."""
    if "pid" not in holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return int(holder["pid"]) != os.getpid()


def _write_holder(file: Path, **more: Any) -> None:
    """Writes into the file who holds it. It is not replaced by a new file, since that would not be locked."""
    told = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"}
    file.write_text(json.dumps(told | more) + "\n", encoding="utf-8")


def _read_holder(file: Path) -> Plain:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _wait_for_first_rank(out: Path) -> None:
    end = time.monotonic() + _SECONDS_TO_WAIT
    while _read_holder(out / HOLDER).get("launch") != launch():
        if time.monotonic() > end:
            raise UserError(
                f"Rank {rank()} does not see '{out}', which the first rank makes: choose a folder on a disk that all "
                "machines share, with --out."
            )
        time.sleep(0.05)


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
        file = out if out.is_file() else file_above(out) or out
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
    now_given = recipe_to_dict(recipe)
    kinds = [table.get("task", "pretraining") for table in (before, now_given)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"'{out}' holds a comparison for {kinds[0]} and this recipe is for {kinds[1]}: choose another folder with "
            "--out, or --no-resume to start over."
        )
    difference = _first_difference(before, now_given, "")
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
        "mixtura": __version__,
        **{name: _version(name) for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy")},
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
    except metadata.PackageNotFoundError:
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
