"""A few random kills of every kind of job; benchmarks/faults.py does more of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults.py"
JOBS = {"train", "shards", "compare", "finetune", "tokenise", "export"}


def run(journal, *arguments):
    command = [sys.executable, str(SCRIPT), "--journal", str(journal), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(journal.read_text())


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="jobs are forks, which Windows has not")
def test_what_is_killed_four_times_ends_with_the_same_bits(tmp_path):
    few = [part for name in ("train", "shards", "tokenise", "export") for part in ("--job", name)]
    record = run(tmp_path / "faults.json", "--kills", "4", *few)
    assert record["total"] == 4 and all(counts["different"] == 0 for counts in record["jobs"].values())


@pytest.mark.slow
def test_what_is_killed_seventy_times_ends_with_the_same_bits(tmp_path):
    record = run(tmp_path / "faults.json", "--kills", "72")
    assert record["total"] == 72 and record["jobs"].keys() == JOBS


def test_the_stored_counts_are_those_of_the_page():
    root = SCRIPT.parents[1]
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    faults = json.loads((root / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    fuzz = json.loads((root / "benchmarks" / "results" / "fuzz.json").read_text(encoding="utf-8"))
    assert f"{faults['total']} kills" in page and f"{fuzz['total']:,} inputs" in page
    assert sum(counts["different"] for counts in faults["jobs"].values()) == 0
    assert sum(counts["crash"] for counts in fuzz["inputs"].values()) == 0 and faults["jobs"].keys() == JOBS
