"""The files of a comparison as records: read with a sentence for whatever is wrong, written whole or not at all.

A file of an older schema is brought to today's one version at a time. These steps see plain values only; whatever they
leave wrong, reading the records finds and names.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from mixtura.errors import UserError
from mixtura.files import write_json
from mixtura.results.document import SCHEMA_VERSION, Results
from mixtura.results.json_form import NotThatRecord, from_plain, to_plain
from mixtura.results.run import RunResult

Plain = dict[str, Any]
"""A stored table."""


def upgrade_results(stored: Plain) -> Plain:
    """The content of a results.json of version 2, in today's form; others are returned as they are."""
    return _results_from_2(stored) if stored.get("schema_version") == 2 else stored


def upgrade_run(stored: Plain) -> Plain:
    """The content of a result.json, which says its version since version 3, in today's form."""
    return _run_from_2(stored) if "schema_version" not in stored else stored


def _results_from_2(stored: Plain) -> Plain:
    budget = ("description", "tokens_per_step", "tokens_per_run", "epochs")
    data = stored["data"]
    arms = {
        name: {**arm, "runs": [_run_from_2({"learning_rate": arm["learning_rate"], **run}) for run in arm["runs"]]}
        for name, arm in stored["arms"].items()
    }
    # What the report said then is computed anew.
    kept = {key: value for key, value in stored.items() if key != "summary"}
    return {
        **kept,
        "schema_version": SCHEMA_VERSION,
        "data": {
            **{key: data.get(key) for key in budget},
            "facts": {key: value for key, value in data.items() if key not in budget},
        },
        "arms": arms,
        "across_arms": {"paired_bootstrap": _tests_from_2(stored.get("across_arms") or {})},
    }


def _tests_from_2(across: Plain) -> Plain:
    found = across.get("paired_bootstrap") or {}
    return {
        name: {"all": _test_from_2(tests)}
        if "accuracy_difference" in tests
        else {pair: _test_from_2(test) for pair, test in tests.items()}
        for name, tests in found.items()
    }


def _test_from_2(test: Plain) -> Plain:
    names = {"accuracy_difference": "difference", "chrf_difference": "difference"}
    return {names.get(key, key): value for key, value in test.items()}


def _run_from_2(run: Plain) -> Plain:
    return {**run, "details": _details_from_2(run.get("details") or {}), "curve": [*map(_point_from_2, run["curve"])]}


def _point_from_2(point: Plain) -> Plain:
    costs = ("step", "tokens", "seconds", "flops")
    return {
        **{key: point[key] for key in costs if key in point},
        "measures": {key: value for key, value in point.items() if key not in costs},
    }


def _details_from_2(details: Plain) -> Plain | None:
    kinds = {"pairs": "translation", "confusion": "classification", "peakedness": "pretraining"}
    kind = next((kind for key, kind in kinds.items() if key in details), None)
    if kind is None:
        return None
    if "labels" in details:
        details = {**details, "labels": [str(label) for label in details["labels"]]}
    return {**details, "kind": kind}


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
    except (ValueError, RecursionError):
        raise _damaged(path, "it is no JSON") from None
    if not isinstance(stored, dict):
        raise _damaged(path, "it is no JSON object")
    if missing := [key for key in keys if key not in stored]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return stored
