"""The prepared run for a GPU goes through without one, and no stage can hang it or lose what was measured."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtura.benchmarks.gpu.journal import Journal
from mixtura.benchmarks.gpu.side_by_side import read_pack, write_pack
from mixtura.benchmarks.gpu.stages import BROKEN_CONTEXT, Request, Stage, journal_path, run_all
from mixtura.config import DataConfig, UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_rehearsal_runs_every_stage_and_the_page_shows_it(tmp_path, monkeypatch):
    run = start("--smoke", "--out", tmp_path, "--times", 10, "--budget", 3000)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    record = json.loads(path.read_text())
    assert not record["left_out"], record["left_out"]
    assert record["settings"]["smoke"] and all(check["passed"] for check in record["checks"].values())
    rows = {(row["contender"], row["pass"]): row for row in record["layers"]}
    for name in ("token choice", "token choice, without Triton", "mixture of tokens", "soft", "expert choice"):
        for what in ("forward", "training"):
            row = rows[name, what]
            assert row["milliseconds"] > 0 and row["to_dense"] > 0 and row["utilisation"] > 0 and row["launches"] > 0
    families = {"dense", "token_choice", "mixture_of_tokens", "expert_choice"}
    assert {row["family"] for row in record["models"]} == families
    (found,) = record["evidence"]["rounds"]
    for arm in found["arms"].values():
        first, last = arm["curve"][0], arm["curve"][-1]
        assert last["tokens"] == 24 * 8 * 32 and last["training_loss"] < first["training_loss"]
    layout, speed = (importlib.import_module(f"page_tables.{name}") for name in ("layout", "speed"))
    monkeypatch.setattr(layout, "RECORDS", tmp_path)
    text = speed.gpu()
    assert path.name in text and "mixture_of_tokens" in text and "rows of sparse experts, float32" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_log_says_what_to_do(tmp_path):
    run = start("--out", tmp_path, "--only", "kernels")
    assert run.returncode == 0 and "Left out: kernels: the process ended with 1." in run.stdout
    assert "--smoke" in (tmp_path / "gpu.log").read_text()


PROCESS = """
import json, os, sys, time
from pathlib import Path
path, stage = Path(sys.argv[1]), sys.argv[sys.argv.index("--stage") + 1]
empty = {"items": {}, "seconds": {}, "left_out": {}, "running": None, "finished": False}
record = json.loads(path.read_text()) if path.exists() else empty
def store(**changes):
    record.update(changes)
    path.write_text(json.dumps(record))
for name in ("first", "second", "third"):
    if name in record["left_out"] or name in record["items"].get("checks", {}):
        continue
    store(running=name)
    if name == "second":
        ENDING
    store(running=None, items={"checks": record["items"].get("checks", {}) | {name: 1}})
store(finished=True)
"""


def run_stage(tmp_path, ending, *, seconds=60.0):
    """A stage whose second item ends in some way; its journal."""
    process, journal = tmp_path / "process.py", journal_path(tmp_path, "kernels")
    process.write_text(PROCESS.replace("ENDING", ending))
    request = Request([sys.executable, str(process), str(journal)], tmp_path, tmp_path / "pack", 600.0, times=0.02)
    path = run_all(request, [Stage("kernels", seconds / 0.02)])
    return json.loads(path.read_text())


@pytest.mark.parametrize("ending", ["os.abort()", "os._exit(1)"])
def test_an_item_that_ends_its_process_is_named_and_the_others_are_measured(tmp_path, ending):
    record = run_stage(tmp_path, ending)
    assert list(record["checks"]) == ["first", "third"]
    assert record["left_out"]["second"].startswith("the process ended with ")


def test_a_broken_device_gets_a_fresh_process(tmp_path):
    record = run_stage(tmp_path, f"store(running=None, left_out={{'second': 'broken'}}); os._exit({BROKEN_CONTEXT})")
    assert list(record["checks"]) == ["first", "third"] and record["left_out"] == {"second": "broken"}


def test_a_process_that_hangs_is_stopped_with_its_stage(tmp_path):
    record = run_stage(tmp_path, "time.sleep(600)", seconds=1.0)
    assert list(record["checks"]) == ["first"] and record["left_out"] == {"second": "the time was used up"}


def test_a_journal_keeps_what_was_measured_and_names_what_was_not(tmp_path):
    path = tmp_path / "stage.json"
    journal = Journal(path, seconds=100.0, settings={})
    assert journal.attempt("checks", "good", lambda: {"error": 0.5})
    assert not journal.attempt("checks", "bad", lambda: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        journal.attempt("checks", "worse", lambda: torch._assert(False, "CUDA error: an illegal memory access"))
    assert ended.value.code == BROKEN_CONTEXT
    again = Journal(path, seconds=0.0, settings={})
    assert again.attempt("checks", "good", lambda: pytest.fail("it is there already"))
    assert not again.attempt("checks", "late", lambda: 1)
    stored = json.loads(path.read_text())
    assert stored["items"] == {"checks": {"good": {"error": 0.5}}} and stored["running"] is None
    assert stored["left_out"] == {
        "bad": "ZeroDivisionError: division by zero",
        "worse": "AssertionError: CUDA error: an illegal memory access",
        "late": "the time was used up",
    }


def test_packed_text_comes_back_as_it_was_prepared(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {number} has its own few words." for number in range(200)))
    data = DataConfig(source="local", path=str(text), vocab_size=300, sequence_length=16, validation_fraction=0.2)
    write_pack(tmp_path / "pack", data, cache_dir=tmp_path / "cache")
    prepared = read_pack(tmp_path / "pack")
    assert prepared.train.sequences_NL.shape[1] == 16 and prepared.train.sequences_NL.dtype.name == "int32"
    first = prepared.tokenizer.decode(prepared.train.sequences_NL[0])
    assert "Document" in first and prepared.summary["documents_train"] > 100
    with pytest.raises(UserError, match="--pack-text"):
        read_pack(tmp_path)
