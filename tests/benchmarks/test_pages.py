"""The pages under docs/results/ hold what their records hold."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _script():
    spec = importlib.util.spec_from_file_location("pages_script", ROOT / "benchmarks" / "pages.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_pages_of_results_are_those_of_the_records():
    made = _script().pages()
    stored = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "results").glob("*.md")}
    assert stored == made, "run `make docs`"


def test_every_record_is_on_a_page():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    text = "".join([*_script().pages().values(), *pages])
    records = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert {name for name in records if name not in text} == set()
