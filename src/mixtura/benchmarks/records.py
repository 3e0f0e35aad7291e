"""The record of a benchmark: what was measured, with versions, hardware and date."""

from pathlib import Path
from typing import Any

from mixtura.comparison.folder import environment, now
from mixtura.files import write_json


def store_record(folder: Path, kind: str, *, settings: dict[str, Any], suffix: str = "", **measured: Any) -> Path:
    """Writes `<kind>-<device><suffix>.json` into the folder, and returns its path.

    Args:
        folder: made if it is missing.
        kind: what was timed, such as "layers".
        settings: what it was timed with.
        suffix: tells records of one kind and device apart.
        measured: the rest of the record, by key.
    """
    record = {"created": now(), "environment": environment(), "settings": settings, **measured}
    path = folder / f"{kind}-{record['environment']['device'].replace(' ', '-').lower()}{suffix}.json"
    write_json(path, record)
    return path
