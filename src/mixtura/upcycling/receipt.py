"""`upcycle.json`: from which files, with which settings and with what warnings a mixture was made."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mixtura.checkpoints.source import UPCYCLE_RECEIPT, DenseSource
from mixtura.upcycling.layer_starts import LayerStart
from mixtura.upcycling.request import UpcycleSettings, is_exact, learning_warnings

_FORMAT = 1


def write_receipt(
    folder: Path,
    settings: UpcycleSettings,
    sources: Sequence[DenseSource],
    starts: Mapping[int, LayerStart],
    texts: Sequence[Path],
) -> None:
    """Writes what a reader needs to make the same mixture again, or to tell that they have other files."""
    receipt = {
        "format": _FORMAT,
        "mixtura_version": metadata.version("mixtura"),
        "sources": [_source(source) for source in sources],
        "settings": dataclasses.asdict(settings),
        "layers": list(starts),
        "texts": [{"name": text.name, "sha256": _sha256(text) if text.is_file() else None} for text in texts],
        "exact": is_exact(settings, num_sources=len(sources)),
        "warnings": learning_warnings(settings, num_sources=len(sources)),
        "starts": {str(depth): _start(start) for depth, start in starts.items()},
    }
    (folder / UPCYCLE_RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _source(source: DenseSource) -> dict[str, Any]:
    """The hub keeps a snapshot in a folder with the commit's name."""
    commit = source.folder.name if re.fullmatch(r"[0-9a-f]{40}", source.folder.name) else None
    return {
        "name": source.name,
        "commit": commit,
        "attention": source.config.attention,
        "config_sha256": _sha256(source.folder / "config.json"),
        "files": {path.name: path.stat().st_size for path in sorted(set(source.files.values()))},
    }


def _start(start: LayerStart) -> dict[str, Any]:
    return {
        "router_spread": start.router.spread,
        "first_choices": start.router.load_C,
        "first_factor": start.first_factor,
        "second_factor": start.second_factor,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
