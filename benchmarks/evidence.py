"""Writes the evidence that the package advises with, from the stored record of the long runs.

Run `python benchmarks/evidence.py` after `python benchmarks/long_runs.py store`; a test fails where the two differ.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from mixtura.config import ArmConfig
from mixtura.config.families import FAMILIES
from mixtura.planning.evidence import FILE, Row

RECORD = Path(__file__).parent / "results" / "long-runs-cpu.json"
ARMS = (*FAMILIES, "dense_of_equal_parameters", "uniform_router")
"""Names of runs that count as evidence: a family in its best form, or a control. Others are searches."""
DEPLOYED = "population_top2"
"""The mode in which mixtures of tokens are compared."""


def evidence_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the package holds of a stored record: the runs that are named after an arm, in columns.

    Raises:
        ValueError: two runs of one arm, width and seed have results at one budget.
    """
    rows, settings = [record["settings"] | row for row in record["rows"]], record["settings"]
    found = [_evidence_row(row) for row in rows if row["name"] in ARMS]
    if len({tuple(row[:4]) for row in found}) < len(found):
        raise ValueError("two runs have one name, width, budget and seed: name one of them otherwise.")
    about = record["environment"]
    setting = {
        "layers": settings["layers"],
        "vocabulary": settings["vocabulary"],
        "context": settings["context"],
        "tokens_per_step": settings["batch"] * settings["context"],
        "experts": ArmConfig(family="token_choice").num_experts,
        "top_k": 2,
        "group_size": ArmConfig(family="mixture_of_tokens").group_size,
        "text": "English film reviews",
        "machine": f"one thread of {about['processor']}",
        "created": record["created"][:10],
    }
    return {"setting": setting, "columns": [field.name for field in fields(Row)], "rows": sorted(found)}


def evidence_text(record: dict[str, Any]) -> str:
    """The same as a file's text, a line a run."""
    found = evidence_of(record)
    lines = ",\n".join(json.dumps(row) for row in found.pop("rows"))
    return f'{json.dumps(found)[:-1]}, "rows": [\n{lines}\n]}}\n'


def _evidence_row(row: dict[str, Any]) -> list[Any]:
    losses = row["losses"]
    return [
        row["name"],
        row["width"],
        row["tokens"],
        row["seed"],
        losses["causal"] if "causal" in losses else losses[DEPLOYED],
        losses.get("group"),
        losses.get("alone_top2"),
        row["parameters"],
        round(row["cpu_seconds"] / row["steps_taken"], 4),
    ]


def main() -> None:
    """Writes the file."""
    FILE.write_text(evidence_text(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"Stored in {FILE}")


if __name__ == "__main__":
    main()
