"""Scripts are run from their folder; tests load them from another."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    """Python finds what lies beside a script that it runs, and not what lies beside one that a test loads."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
