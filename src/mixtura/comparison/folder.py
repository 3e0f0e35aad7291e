"""The folder of a comparison: what is in it, that it belongs to this recipe and this text, and who writes it.

`recipe.toml` (resolved, and fitted to the data), `given.toml` (before that, where it differs), `environment.json`,
`data.json` (which examples), `arms/<arm>/seed<k>/` with metrics, `result.json`, and the model or, until the run is
finished, checkpoints, `search/<arm>/rate<r>/seed<k>/`, `timing.json`, `results.json`, `report.html`, `report.md`,
`figures/`.

Starting over removes all this once the new comparison can start, and no sooner: a mistake in its data or arms leaves
the old one as it is.

One process at a time writes it, and a start that fails leaves none behind. Under torchrun the first rank holds the
folder for all, and the others wait until it is ready.
"""

import errno
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mixtura.comparison.environment import environment
from mixtura.comparison.lock import HOLDER, locked, unwritable, wait_for_first_rank, write_holder
from mixtura.config import AnyRecipe, Interrupted, UserError, recipe_to_dict, recipe_to_toml
from mixtura.errors import launch, rank
from mixtura.files import check_name, file_above, nearest_folder, write_json, write_text
from mixtura.results.document import Plain, read_json
from mixtura.training.interface import Experiment
from mixtura.training.saving import first_difference, without_description


@contextmanager
def holding(out: Path) -> Iterator[None]:
    """Holds folder `out` for the length of a block, which makes it a comparison's folder.

    Where the block fails before any run has begun, what it has made is removed again, and what it has set aside is put
    back.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """
    if rank():
        wait_for_first_rank(out)
        yield
        return
    made = _make(out)
    untouched = not any(path.name != HOLDER for path in out.iterdir())
    try:
        with locked(out / HOLDER):
            _restore(out)
            try:
                yield
            except Interrupted:
                raise
            except Exception:
                if untouched and not has_runs(out):
                    _empty(out)
                raise
            finally:
                _restore(out)
    finally:
        for folder in made:  # the innermost first; none that holds anything
            with suppress(OSError):
                folder.rmdir()


def ready(out: Path) -> None:
    """Lets the other ranks go on: `out` is now this recipe's folder."""
    if launch() and not rank():
        write_holder(out / HOLDER, launch=launch())


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
        raise unwritable(out, error) from None
    return missing


def _empty(out: Path) -> None:
    for path in out.iterdir():
        if path.name == HOLDER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_folder(out: Path, recipe: AnyRecipe, *, resume: bool) -> None:
    """Refuses a folder that a run of the recipe could not have, without changing anything.

    Raises:
        UserError: it is a file or lies below one, cannot be written, holds something else, or was begun with another
            recipe and is not to be started over.
    """
    check_name(out)
    try:
        file = out if out.is_file() else file_above(out)
        if file is not None:
            raise UserError(f"'{file}' is a file: give a folder with --out.")
        if not os.access(nearest_folder(out), os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if out.is_dir():
            _refuse_foreign(out)
            if resume:
                _check_same_recipe(out, recipe)
            else:
                _refuse_own_parts(out, recipe_to_dict(recipe))
    except OSError as error:
        raise unwritable(out, error) from None


def open_folder(out: Path, recipe: AnyRecipe, *, resume: bool) -> None:
    """Makes `out` the folder of this recipe.

    What an earlier comparison left there stays until `begin`, even with `resume` off: the new one may fail to start.
    Only its data are set aside, so that they are read anew.

    Raises:
        UserError: see `check_folder`.
    """
    if rank():  # the first rank prepares the folder for all
        return
    check_folder(out, recipe, resume=resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume and any((out / name).exists() for name in _OURS):
            if (out / _DATA).exists():
                (out / _DATA).rename(out / _DATA_BEFORE)
            return
        if not has_runs(out):
            # None has begun, as after a mistake in the recipe: the corrected one may have the folder.
            (out / "timing.json").unlink(missing_ok=True)
        _write_recipe(out, recipe)
    except OSError as error:
        raise unwritable(out, error) from None


def begin(out: Path, given: AnyRecipe, experiment: Experiment, *, resume: bool) -> None:
    """Makes `out` the folder of runs that can start: their data are read and their arms are checked.

    With `resume` off, what an earlier comparison left there is removed now. Stores which data the runs see, and the
    recipe that was fitted to them.

    Raises:
        UserError: the data, or a checkpoint to start from, has changed since runs of this folder began.
    """
    if not resume:
        _clear(out)
        _write_recipe(out, given)
    check_same_data(out, experiment)
    write_json(out / "data.json", _seen(experiment))
    store_fitted(out, given, experiment.recipe)


GIVEN_FILE = "given.toml"
"""The recipe as the user gave it, where `recipe.toml` is one that was fitted to the data."""
_DATA = "data"
_DATA_BEFORE, _REMOVED = ".data-before", ".removed"
"""The data of an earlier comparison while a new one tries to start, and what is being removed of it."""
_OURS = (
    GIVEN_FILE,
    "arms",
    "search",
    "references",
    _DATA,
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


def _refuse_own_parts(out: Path, values: Any) -> None:
    """Refuses a recipe that reads what starting over would remove, such as a checkpoint to start from."""
    if isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            _refuse_own_parts(out, value)
    elif isinstance(values, str) and _lies_in_parts(out, values):
        raise UserError(
            f"'{values}' lies in '{out}', which would be started over: copy it elsewhere, or choose another folder "
            "with --out."
        )


def _lies_in_parts(out: Path, value: str) -> bool:
    try:
        path = Path(value).expanduser()
        return path.exists() and any(path.resolve().is_relative_to((out / name).resolve()) for name in _OURS)
    except (OSError, ValueError, RuntimeError):  # a text that is no path
        return False


def _clear(out: Path) -> None:
    """Removes what an earlier comparison left, but for the data that were read since.

    Each part is moved away before any is deleted: where the process is killed here, no run is left that has lost a part
    of its files. The recipe and the environment stay until they are replaced, since by them the folder is known.
    """
    removed = out / _REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    removed.mkdir()
    for name in (*_OURS, _DATA_BEFORE):
        if name != _DATA and (out / name).exists():
            (out / name).rename(removed / name)
    shutil.rmtree(removed, ignore_errors=True)


def _restore(out: Path) -> None:
    """Puts the data back that a start set aside and did not replace, and ends a removal that was not ended.

    Does nothing where the last start succeeded. A process that was killed is tidied up after by the next one.
    """
    with suppress(OSError):
        shutil.rmtree(out / _REMOVED, ignore_errors=True)
        if (out / _DATA_BEFORE).exists():
            shutil.rmtree(out / _DATA, ignore_errors=True)
            (out / _DATA_BEFORE).rename(out / _DATA)


def _write_recipe(out: Path, recipe: AnyRecipe) -> None:
    write_json(out / "environment.json", environment())
    # The folder has the recipe as it runs, fitted to the data; `recipe` may be the one before it was fitted.
    if not (out / GIVEN_FILE).exists() or not has_runs(out):
        (out / GIVEN_FILE).unlink(missing_ok=True)
        write_text(out / "recipe.toml", recipe_to_toml(recipe))


def _check_same_recipe(out: Path, recipe: AnyRecipe) -> None:
    path = out / "recipe.toml"
    if not path.exists() or not has_runs(out):
        return
    if (out / GIVEN_FILE).exists() and not _same_text(path, recipe):
        path = out / GIVEN_FILE
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
    _check_same_arms(out, before.get("arms"), recipe)
    if difference := first_difference(before, now_given):
        key, old, new = difference
        raise UserError(
            f"'{out}' was begun with {key} = {_shown(old)}, now it is {_shown(new)}: choose another folder with --out, "
            "or --no-resume to start over."
        )


def _check_same_arms(out: Path, before: Any, recipe: AnyRecipe) -> None:
    """Refuses arms that were added or left out, by name: all that they are is too long for a sentence."""
    if not isinstance(before, dict) or before.keys() == recipe.arms.keys():
        return
    folder = f"the comparison in '{out}'"
    name = next(name for name in [*recipe.arms, *before] if name not in before or name not in recipe.arms)
    has, lacks = ("this recipe", folder) if name in recipe.arms else (folder, "this recipe")
    raise UserError(
        f"Arm '{name}' is in {has} but not in {lacks}, whose arms are trained together: choose another folder with "
        "--out, or --no-resume to start over."
    )


_LONGEST = 60


def _shown(value: Any) -> str:
    """A value for a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


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
    """Refuses other examples than those that runs of this folder have seen; `data.json` says which these are.

    Finished runs are not repeated. If a text had changed meanwhile, new runs would see other examples than those.

    Raises:
        UserError: the text, or a checkpoint to start from, has changed, or the note is damaged.
    """
    seen = _seen(experiment)
    before = read_json(out / "data.json", keys=seen) if has_runs(out) else None
    if before is not None and (difference := first_difference(_compared(before), _compared(seen))):
        key, old, new = difference
        what = "checkpoint to start from" if key.startswith("summary.checkpoints") else "text"
        raise UserError(
            f"The {what} has changed since '{out}' was begun ({key} was {_shown(old)}, now it is {_shown(new)}): put "
            "it back, choose another folder with --out, or --no-resume to start over."
        )


def _seen(experiment: Experiment) -> Plain:
    """Which examples the runs see, in the form in which JSON gives it back, to be compared with what is stored."""
    return json.loads(json.dumps({"summary": experiment.data, "tokens": experiment.data_digest}))


def _compared(seen: Plain) -> Plain:
    facts = seen["summary"]
    return {**seen, "summary": without_description(facts)} if isinstance(facts, dict) else seen
