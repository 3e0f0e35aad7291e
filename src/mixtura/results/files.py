"""The files of a comparison as records: read with a sentence for whatever is wrong, written whole or not at all."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from mixtura.errors import UserError
from mixtura.files import write_json
from mixtura.results.document import SCHEMA_VERSION, Results
from mixtura.results.json_form import NotThatRecord, from_plain, to_plain
from mixtura.results.run import RunResult
from mixtura.results.upgrade import Plain, upgrade_results, upgrade_run

RESULTS = "results.json"
RESULT = "result.json"
"""Of one run."""

T = TypeVar("T")


def read_results(path: Path) -> Results | None:
    """A stored comparison, of this schema or the one before it; None when there is no such file.

    Raises:
        UserError: the file is damaged, or of a version that this release does not read.
    """
    stored = read_json(path)
    return None if stored is None else results_from_plain(stored, path)


def results_from_plain(stored: Plain, path: Path) -> Results:
    """The comparison that was read from `path`.

    Raises:
        UserError: see `read_results`.
    """
    version = stored.get("schema_version")
    if version not in (2, SCHEMA_VERSION):
        raise UserError(
            f"'{path}' is of schema version {version}, and this release reads versions 2 and {SCHEMA_VERSION}: run the "
            "comparison again, or use the release that wrote it."
        )
    results = _read(Results, stored, path, upgrade_results)
    if results.baseline not in results.arms:
        raise _damaged(path, f"baseline is '{results.baseline}', which is none of its arms")
    return results


def write_results(path: Path, results: Results) -> None:
    """Writes results.json; raises ValueError for NaN, since no other reader takes it."""
    write_json(path, to_plain(results))


def read_run(path: Path) -> RunResult | None:
    """A stored run, of this schema or the one before it; None when there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    stored = read_json(path)
    return None if stored is None else _read(RunResult, stored, path, upgrade_run)


def write_run(path: Path, result: RunResult) -> None:
    """Writes the result.json of a run."""
    write_json(path, {"schema_version": SCHEMA_VERSION, **to_plain(result)})


def read_records(path: Path, record: type[T], stored: Plain) -> dict[str, T]:
    """Records of one type by name, from the table `stored` that was read from `path`.

    Raises:
        UserError: the file is damaged.
    """
    return {name: _read(record, value, path) for name, value in stored.items()}


def _read(record: type[T], stored: Plain, path: Path, upgrade: Callable[[Plain], Plain] = lambda plain: plain) -> T:
    try:
        return from_plain(record, upgrade(stored))
    except NotThatRecord as error:
        raise _damaged(path, str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _damaged(path, "it lacks what its version has") from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' is damaged ({reason}): delete it, and that part is computed again.")


def read_json(path: Path, *, keys: Collection[str] = ()) -> Plain | None:
    """The JSON object in `path`, or None when there is no such file.

    Raises:
        UserError: the file is damaged, or lacks one of `keys`.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _damaged(path, "it is no JSON") from None
    if not isinstance(stored, dict):
        raise _damaged(path, "it is no JSON object")
    if missing := [key for key in keys if key not in stored]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return stored
