"""Times whole runs: `mixtura train` against a bare torch loop with the same model, tokens, batches and steps.

Both run as commands of their own, one after the other in alternating rounds: the bare loop is benchmarks/bare_loop.py.
Counted are processor seconds on one thread, to which other programs on the machine do not add, and seconds on the wall
on several: within the steps, and from the command to the last checkpoint. The time of `mixtura train` around its steps
is given by part; the text is prepared beforehand, as a run that goes on in its folder finds it. What importing torch
and transformers' Trainer costs stands beside it.

Run `PYTHONPATH=src python benchmarks/runs.py`; it takes a quarter of an hour. The table is printed and stored under
benchmarks/results/ with versions, hardware and how busy the machine was.
"""

import argparse
import functools
import itertools
import json
import os
import pkgutil
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BARE = Path(__file__).parent / "bare_loop.py"
SIZES: dict[str, tuple[str, list[str]]] = {
    "quick": ("quick", []),
    "default": ("default", []),
}
"""Recipe, and what is changed in it."""
ARMS = ("dense", "token_choice")
PARTS = {
    "text from the cache": "mixtura.tasks.language_modelling.experiment:fit_held_out",
    "leak probes": "mixtura.tasks.language_modelling.experiment:PretrainingArm.leaks",
    "model": "mixtura.tasks.language_modelling.experiment:PretrainingArm.build",
    "Trainer": "mixtura.training.trainer:MixtureTrainer.__init__",
    "evaluation during training": "mixtura.training.trainer:MixtureTrainer.evaluate",
    "checkpoints": "mixtura.training.trainer:MixtureTrainer._save_checkpoint",
    "model for use": "mixtura.tasks.language_modelling.task:LanguageModelling.save_for_use",
    "evaluation at the end": "mixtura.tasks.language_modelling.task:LanguageModelling.evaluate",
    "texts and peakedness": "mixtura.tasks.language_modelling.task:LanguageModelling.details",
}
"""Functions around the steps; what lies inside another one counts to that."""
TRAINER = "import torch; from transformers import Trainer"


def main() -> None:
    """Measures, prints and stores the table, or is one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="only these")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both")
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the record")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        _train_with_parts(**options.train)
        return
    _measure_all(options)


def _clock_since(started: float, threads: int) -> Callable[[], float]:
    """Processor seconds of this process on one thread, else seconds on the wall since its command."""
    return time.process_time if threads == 1 else lambda: time.perf_counter() - started


def _train_with_parts(arguments: list[str], started: float, threads: int) -> None:
    """`mixtura train`, with clocks on its parts, which on one thread count processor seconds."""
    from mixtura.cli import main as command
    from mixtura.files import cache_folder
    from mixtura.tasks.language_modelling import experiment
    from mixtura.training import loop, trainer

    clock = _clock_since(started, threads)
    imported = clock()
    prepare = experiment.prepare_data

    def prepared(data: Any, *, cache_dir: Path | None, on_progress: Any = None) -> Any:
        del cache_dir
        return prepare(data, cache_dir=cache_folder(), on_progress=on_progress)

    # A run that goes on finds its text prepared in its folder; these folders are new.
    experiment.prepare_data = prepared
    seconds: dict[str, float] = {"imports": imported}
    running: list[str] = []
    for part, place in PARTS.items():
        _time_part(part, place, seconds, running, clock)
    trainer.time = _Clock(clock)  # pyright: ignore[reportAttributeAccessIssue]
    ends: list[float] = []
    outcome = loop._outcome

    def last(*args: Any, **kwargs: Any) -> Any:
        ends.append(clock())
        return outcome(*args, **kwargs)

    loop._outcome = last
    sys.argv = ["mixtura", "train", *arguments]
    try:
        command()
    except SystemExit as ended:
        if ended.code:
            raise
    print(json.dumps({"parts": seconds, "to_checkpoint": ends[-1]}))


class _Clock:
    """Stands for the module time where steps are timed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.perf_counter = clock


def _time_part(
    part: str, place: str, seconds: dict[str, float], running: list[str], clock: Callable[[], float]
) -> None:
    """Adds the seconds of a function to its part."""
    module, _, inside = place.partition(":")
    outer, _, name = inside.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{outer}" if outer else module)
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if running:
            return function(*args, **kwargs)
        running.append(part)
        before = clock()
        try:
            return function(*args, **kwargs)
        finally:
            running.pop()
            seconds[part] = seconds.get(part, 0.0) + clock() - before

    setattr(owner, name, timed)


def _measure_all(options: argparse.Namespace) -> None:
    """Every size and arm, a row each; the record is stored anew after every row."""
    import torch

    from mixtura.benchmarks.measure import store_record

    torch.set_num_threads(options.threads)
    several = f"-{options.threads}-threads" if options.threads > 1 else ""
    busy = os.getloadavg()[0]
    imports = [_seconds([sys.executable, "-c", TRAINER], options.threads)[0] for _ in range(options.rounds)]
    print(f"Importing torch and transformers' Trainer: {statistics.median(imports):.1f} s")
    rows: list[dict[str, Any]] = []
    path = options.out
    for size in options.sizes:
        for arm in ARMS:
            rows.append(_row(size, arm, options))
            settings = {name: getattr(options, name) for name in ("steps", "rounds", "threads", "beside")}
            settings["load_average"] = [busy, os.getloadavg()[0]]
            measured = {"trainer_imports": imports, "rows": rows}
            path = store_record(options.out, "runs", settings=settings, suffix=several, **measured)
            print(_line(rows[-1]), flush=True)
    print(f"Stored in {path}")


def _row(size: str, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    asked = _bare_request(size, arm, options.steps) | {"threads": options.threads}
    recipe, changes = SIZES[size]
    own, bare = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            changed = [*changes, f"training.steps={options.steps}", f"training.eval_every={options.steps // 2}"]
            changed += [f"training.save_every={options.steps}", f"training.threads={options.threads}"]
            sets = [part for change in changed for part in ("--set", change)]
            arguments = ["--preset", recipe, "--arm", arm, "--out", f"{folder}/own", *sets]
            own.append(_own_run(arguments, Path(folder), options.threads))
            bare.append(_bare_run(asked | {"out": f"{folder}/bare"}))
    ratios = [b["inside"] / a["inside"] for a, b in zip(own, bare, strict=True)]
    tokens = asked["batch"] * asked["length"]
    row: dict[str, Any] = {"size": size, "arm": arm, "tokens_a_step": tokens}
    row["speed_ratio"] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    for name, runs in (("mixtura", own), ("bare", bare)):
        row[name] = {
            "tokens_per_second": tokens / statistics.median(run["inside"] for run in runs),
            "to_checkpoint": statistics.median(run["to_checkpoint"] for run in runs),
            "whole": statistics.median(run["whole"] for run in runs),
            "around": statistics.median(run["to_checkpoint"] - run["inside"] * options.steps for run in runs),
        }
    row["parts"] = {part: statistics.median(run["parts"].get(part, 0.0) for run in own) for part in ("imports", *PARTS)}
    return row


def _bare_request(size: str, arm: str, steps: int) -> dict[str, Any]:
    """What the bare loop is to do: the configuration and the tokens of the recipe, whose cache it fills."""
    from mixtura.config import load_recipe, preset_path
    from mixtura.data.prepare import _cache_key, prepare_data
    from mixtura.files import cache_folder
    from mixtura.models.build import build_model_config

    recipe: Any = load_recipe(preset_path(SIZES[size][0]), SIZES[size][1])
    data = prepare_data(recipe.data, cache_dir=cache_folder())
    tokenizer: Any = data.tokenizer
    config = build_model_config(
        recipe.model,
        recipe.arms[arm],
        vocab_size=data.summary["vocab_size"],
        max_position_embeddings=recipe.data.sequence_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {
        "config": config.to_diff_dict() | {"mlp_layer_types": config.mlp_layer_types},
        "tokens": str(cache_folder() / _cache_key(recipe.data) / "train.npy"),
        "rate": recipe.arms[arm].learning_rate,
        "steps": steps,
        "batch": recipe.training.batch_size,
        "length": recipe.data.sequence_length,
    }


def _own_run(arguments: list[str], folder: Path, threads: int) -> dict[str, Any]:
    # As one value, or argparse would take what begins with a dash for itself.
    asked = {"arguments": arguments, "started": time.perf_counter(), "threads": threads}
    whole, output = _seconds([sys.executable, __file__, "--train", json.dumps(asked)], threads)
    found = json.loads(output.splitlines()[-1])
    lines = next(folder.rglob("metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    seconds = [record["seconds"] for record in map(json.loads, lines) if "loss" in record]
    return found | {"whole": whole, "inside": _per_step([0.0, *seconds])}


def _bare_run(asked: dict[str, Any]) -> dict[str, Any]:
    asked["started"] = time.perf_counter()
    whole, output = _seconds([sys.executable, str(BARE), json.dumps(asked)], asked["threads"])
    found = json.loads(output.splitlines()[-1])
    return {"whole": whole, "inside": statistics.median(found["steps"]), "to_checkpoint": found["to_checkpoint"]}


def _per_step(seconds: list[float]) -> float:
    """The median second of a step from the seconds so far."""
    return statistics.median(after - before for before, after in itertools.pairwise(seconds))


def _seconds(command: list[str], threads: int) -> tuple[float, str]:
    """Seconds that a command takes, and what it printed; on one thread those of processors, with its children's."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}: {run.stderr}")
    if threads > 1:
        return time.perf_counter() - started, run.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, run.stdout


def _line(row: dict[str, Any]) -> str:
    own, bare = row["mixtura"], row["bare"]
    return (
        f"{row['size']}, {row['arm']}: {own['tokens_per_second']:,.0f} against {bare['tokens_per_second']:,.0f} tokens "
        f"a second, around the steps {own['around']:.1f} against {bare['around']:.1f} s; {row['parts']}"
    )


if __name__ == "__main__":
    main()
