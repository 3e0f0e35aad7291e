"""Mixtura trains dense, mixture-of-experts and mixture-of-tokens language models side by side and compares them fairly.

Importing it teaches transformers' Auto classes the model type `mixtura`, where transformers is installed; the layers
need torch alone.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

if find_spec("transformers") is not None:
    import_module("mixtura.models")

_VERBS = {
    "compare": "mixtura.comparison.runner",
    "load_recipe": "mixtura.config",
    "upcycle": "mixtura.upcycling.writer",
}


def __getattr__(name: str) -> Any:
    """The top-level verbs, imported when first used: they bring plotting and data libraries along."""
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'mixtura' has no attribute {name!r}")
