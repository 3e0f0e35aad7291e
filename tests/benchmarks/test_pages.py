"""The pages under docs/results/ hold what their records hold."""

import importlib.util
from pathlib import Path

from fixtures.results import build_classification

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


def test_a_record_of_fine_tuning_has_a_row_an_arm_with_its_interval():
    spec = importlib.util.spec_from_file_location("finetuning_script", ROOT / "benchmarks" / "finetuning.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    results = build_classification()
    results["recipe"] |= {
        "base": {"name": "minilm"},
        "training": {"steps": 10, "batch_size": 4},
        "arms": {
            "last_layer": {"tune": "frozen"},
            "layer_mix": {"tune": "full"},
            "lora": {"adapter": {"method": "lora"}},
        },
    }
    results["environment"] = dict.fromkeys(script.KEPT, "x")
    results["command"] += " --out runs/here"
    record = script.record_of(results, measured="")
    assert "runs/here" not in record["command"]
    assert [row["method"] for row in record["rows"]] == ["frozen, head alone", "full", "LoRA"]
    assert record["rows"][0]["minus_baseline"] is None
    gain = record["rows"][1]["minus_baseline"]
    assert gain["low"] < gain["mean"] < gain["high"] and gain["over"] == "3 seeds"
