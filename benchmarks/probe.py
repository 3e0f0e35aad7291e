"""Holds the probe against reality: the step that `mixtura plan --probe` times, and the steps of `mixtura train`.

Probe and run alternate, each a process of its own on one thread, and both are counted in processor seconds, to which
other programs on the machine do not add. Medians over the steps of a run or probe, then over rounds.

Run `PYTHONPATH=src python benchmarks/probe.py`; it takes ten minutes. The table is printed and stored under
benchmarks/results/ with versions and hardware.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RECIPES = ("quick", "default")
CHANGES = ["training.threads=1", "training.eval_sequences=128", "training.final_eval_sequences=128"]


class _Clock:
    """Stands for the module time where steps are timed."""

    perf_counter = staticmethod(time.process_time)


def probe(preset: str, arm: str, rounds: int) -> float:
    """Seconds of a step as the probe has them."""
    from mixtura.comparison import plan, timing
    from mixtura.config import load_recipe, preset_path
    from mixtura.training import SilentProgress

    timing.time = _Clock  # pyright: ignore[reportAttributeAccessIssue]
    recipe = load_recipe(preset_path(preset), CHANGES)
    planned = plan.plan(recipe, reporter=SilentProgress(), arm=arm, rounds=rounds)
    return planned.arms[0].seconds


def run(preset: str, arm: str, steps: int) -> float:
    """Seconds of a step of a run, the first ones left out as the probe leaves out its own."""
    import mixtura
    from mixtura.comparison import timing
    from mixtura.config import preset_path
    from mixtura.training import trainer

    trainer.time = _Clock  # pyright: ignore[reportAttributeAccessIssue]
    changes = [*CHANGES, f"training.steps={steps}", f"training.eval_every={steps}", f"training.save_every={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        mixtura.train(preset_path(preset), arm=arm, out=Path(folder, "run"), overrides=changes)
        lines = next(Path(folder).rglob("metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    seconds = [record["seconds"] for record in map(json.loads, lines) if "loss" in record]
    taken = [after - before for before, after in itertools.pairwise([0.0, *seconds])]
    return statistics.median(taken[timing.WARM_UP_ROUNDS :])


def _measured(side: str, preset: str, arm: str, steps: int) -> float:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, preset, arm, str(steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def _row(preset: str, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    probed, ran = [], []
    for _ in range(options.rounds):
        probed.append(_measured("probe", preset, arm, options.steps))
        ran.append(_measured("run", preset, arm, options.steps))
    seconds = statistics.median(probed), statistics.median(ran)
    return {
        "recipe": preset,
        "arm": arm,
        "probed_seconds": seconds[0],
        "run_seconds": seconds[1],
        "error": seconds[0] / seconds[1] - 1,
        "errors": [a / b - 1 for a, b in zip(probed, ran, strict=True)],
    }


def main() -> None:
    """Measures, prints and stores the table, or is one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of a run, and of a probe")
    parser.add_argument("--rounds", type=int, default=3, help="probes and runs of every arm")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="presets")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, preset, arm, steps = options.side
        with contextlib.redirect_stdout(sys.stderr):
            seconds = {"probe": probe, "run": run}[side](preset, arm, int(steps))
        print(seconds)
        return
    from mixtura.benchmarks.measure import store_record
    from mixtura.config import load_recipe, preset_path

    for preset in options.recipes:
        rows = []
        for arm in load_recipe(preset_path(preset)).arms:
            rows.append(_row(preset, arm, options))
            settings = {"steps": options.steps, "rounds": options.rounds, "threads": 1}
            path = store_record(options.out, "probe", settings=settings, suffix=f"-{preset}", rows=rows)
            print(
                f"{preset}, {arm}: {rows[-1]['probed_seconds']:.4f} s probed, {rows[-1]['run_seconds']:.4f} s run, "
                f"{rows[-1]['error']:+.1%} ({path.name})",
                flush=True,
            )


if __name__ == "__main__":
    main()
