"""Stored results of former schemas, made those of today before they are read. Each step is one version.

Only plain values are handled here: what a step leaves wrong, reading names.
"""

from typing import Any

from mixtura.results.document import SCHEMA_VERSION

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
