"""The examples run from their first to their last cell, and each notebook is the script beside it."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mixtura.data.parallel_sources import help_table

EXAMPLES = Path(__file__).parents[1] / "examples"


def _notebook_of(script: str) -> nbformat.NotebookNode:
    spec = importlib.util.spec_from_file_location("build", EXAMPLES / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.notebook_of(script)


def test_the_notebook_is_the_script():
    notebook = nbformat.read(EXAMPLES / "translation.ipynb", as_version=4)
    assert notebook.cells == _notebook_of((EXAMPLES / "translation.py").read_text(encoding="utf-8")).cells


def test_the_translation_walk_through_runs_on_the_quick_preset(tmp_path, monkeypatch):
    if not all(help_table(language).is_file() for language in ("en", "de", "es", "fr", "it")):
        pytest.skip("needs the software help that `make assets` brings")
    for name, value in {"OUT": str(tmp_path / "run"), "STEPS": "4"}.items():
        monkeypatch.setitem(os.environ, f"MIXTURA_EXAMPLE_{name}", value)
    notebook = nbformat.read(EXAMPLES / "translation.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    assert "language_experts: en-de" in printed
    assert "all pairs:" in printed
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "diagnosis" / "diagnosis.html").is_file()
