"""Stores the comparison of every family at the default's size, for docs/results/families.md.

`mixtura compare --preset families` trains it (two hours on two cores; `--arms-in-parallel` helps), then
`python benchmarks/families.py runs/families` keeps of its results.json what the page shows.
"""

import argparse
from pathlib import Path
from typing import Any

from mixtura.benchmarks.measure import store_record
from mixtura.results import ArmResult, Results
from mixtura.results.document import RESULTS, read_results

RECORDS = Path(__file__).parent / "results"


def record_of(results: Results) -> list[dict[str, Any]]:
    """A row an arm: its losses by seed and mode, its search, and what it costs."""
    return [_row(name, arm) for name, arm in results.arms.items()]


def _row(name: str, arm: ArmResult) -> dict[str, Any]:
    search = arm.learning_rate_search
    return {
        "arm": name,
        "family": arm.family,
        "deployed_mode": arm.deployed_mode,
        "training_mode": arm.training_mode,
        "losses": {
            mode: {str(run.seed): run.final[mode]["loss"] for run in arm.runs if mode in run.final}
            for mode in dict.fromkeys(mode for run in arm.runs for mode in run.final)
        },
        "rate": arm.learning_rate,
        "trials": [] if search is None else [[trial.learning_rate, trial.loss] for trial in search.trials],
        "parameters": arm.parameters_total,
        "flops_ratio": round(arm.flops_ratio, 4),
        "seconds_ratio": None if arm.seconds_ratio is None else round(arm.seconds_ratio, 3),
        "leaks": {"future": arm.leaks.future, "batch": arm.leaks.batch},
    }


def main() -> None:
    """Stores the rows of a finished comparison."""
    parser = argparse.ArgumentParser(description="Stores the comparison of every family.")
    parser.add_argument("folder", type=Path, help="the folder of `mixtura compare --preset families`")
    path = parser.parse_args().folder / RESULTS
    results = read_results(path)
    if results is None:
        parser.error(f"'{path}' is missing: run `mixtura compare --preset families` first.")
    settings = {"recipe": results.recipe_toml, "tokens": results.data.tokens_per_run, "baseline": results.baseline}
    print(f"Stored in {store_record(RECORDS, 'families', settings=settings, rows=record_of(results))}")


if __name__ == "__main__":
    main()
