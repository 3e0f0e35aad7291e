"""What a run was started with, kept beside it so that it is only ever continued as the same run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mixtura.config import UserError
from mixtura.files import write_json
from mixtura.results import Facts

RUN_FILE = "run.json"


def check_settings(out: Path, settings: Facts) -> None:
    """Compares with the settings stored in `out`, or stores them when there are none.

    Raises:
        UserError: the run was started with other settings; names the first that differs.
    """
    path = out / RUN_FILE
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        record = {"hash": settings_hash(settings), "settings": settings}
        write_json(path, record)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is not readable: choose another output folder, or remove '{out}'.") from None
    difference = first_difference(stored, settings)
    if difference is not None:
        key, before, now = difference
        raise UserError(
            f"The run in '{out}' was started with {key} = {_shown(before)}, and now it is {_shown(now)}: set it back "
            "to resume, or choose another output folder."
        )


def settings_hash(settings: Facts) -> str:
    """128 bits over all settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first key, dotted, at which two nested dictionaries differ, with both values; None when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            path = f"{where}.{key}" if where else key
            difference = first_difference(before.get(key), now.get(key), path)
            if difference is not None:
                return difference
        return None
    return None if before == now else (where, before, now)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
