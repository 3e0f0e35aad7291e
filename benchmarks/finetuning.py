"""Makes the record of a finished fine-tuning comparison, for docs/results/fine-tuning.md.

Run `python benchmarks/finetuning.py runs/chat`: it reads the folder's results.json and writes
benchmarks/results/finetuning-NAME.json, with the command that repeats the comparison. `--measured` takes the rest of a
sentence on how it was run, such as "beside other programs".
"""

import argparse
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from mixtura.files import write_json
from mixtura.report.significance import paired_difference

RESULTS = Path(__file__).parent / "results"
KEPT = ("torch", "transformers", "peft", "processor", "cpu_count", "threads")
METHODS = {
    "lora": "LoRA",
    "mixture_of_lora": "mixture of LoRA",
    "mixture_of_tokens": "MoT adapter",
    "expert_specialized": "expert-specialised",
}


def main() -> None:
    """Writes one record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a finished comparison")
    parser.add_argument("--measured", default="", help="how it was run, after 'measured'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    given = parser.parse_args()
    results = json.loads((given.folder / "results.json").read_text(encoding="utf-8"))
    path = given.out / f"finetuning-{results['recipe']['name']}.json"
    write_json(path, record_of(results, measured=given.measured))
    print(path)


def record_of(results: dict[str, Any], *, measured: str) -> dict[str, Any]:
    """What the page needs of a results.json: a row an arm, with its difference to the baseline."""
    key, recipe, baseline = results["measure"]["key"], results["recipe"], results["baseline"]
    values = {name: _by_seed(arm, key) for name, arm in results["arms"].items()}
    base = recipe["base"].get("name") or "none"
    upcycled = (Path(base) / "upcycle.json").is_file()
    return {
        "created": results["created"],
        "environment": {name: results["environment"][name] for name in KEPT},
        "command": re.sub(r" --(out|arms-in-parallel) \S+", "", results["command"]),
        "measured": measured,
        "source": "results.json of that command",
        "task": results["task"],
        "name": recipe["name"],
        "base": _upcycled_from(Path(base)) if upcycled else base,
        "measure": results["measure"],
        "baseline": baseline,
        "steps": recipe["training"]["steps"],
        "examples_a_step": recipe["training"]["batch_size"],
        "minutes": round(results["total_seconds"] / 60, 1),
        "rows": [
            {
                "arm": name,
                "method": "from scratch" if base == "none" else _method(recipe["arms"][name], upcycled=upcycled),
                "trained": arm["parameters_trainable"],
                "seconds_ratio": arm["seconds_ratio"],
                "train_seconds": fmean(run["train_seconds"] for run in arm["runs"]),
                "value": fmean(values[name].values()),
                "seeds": len(values[name]),
                "minus_baseline": None if name == baseline else _difference(results, name, values),
                "minus_base": _gain(arm),
            }
            for name, arm in results["arms"].items()
        ],
    }


def _upcycled_from(base: Path) -> str:
    """What a folder of `mixtura upcycle` was made of."""
    receipt = json.loads((base / "upcycle.json").read_text(encoding="utf-8"))
    sources, settings = (receipt[key] for key in ("sources", "settings"))
    return (
        f"{sources[0]['name']} upcycled to {settings['num_experts']} experts in {settings['layers'].replace('_', ' ')}"
    )


def _by_seed(arm: dict[str, Any], key: str) -> dict[int, float]:
    return {run["seed"]: run["final"][arm["deployed_mode"]][key] for run in arm["runs"]}


def _method(arm: dict[str, Any], *, upcycled: bool) -> str:
    """How an arm is tuned, on a base whose layers are upcycled or not."""
    adapter = arm.get("adapter")
    if adapter is not None:
        return METHODS[adapter["method"]]
    if arm.get("upcycle") is not None or upcycled:
        return "upcycled experts"
    return {"frozen": "frozen, head alone"}.get(arm.get("tune", "full"), "full")


def _difference(results: dict[str, Any], name: str, values: dict[str, dict[int, float]]) -> dict[str, Any] | None:
    """Over seeds where there are some, else over the test examples."""
    found = paired_difference(values[name], values[results["baseline"]])
    if found is not None and found.high is not None:
        return {"mean": found.mean, "low": found.low, "high": found.high, "over": f"{found.n} seeds"}
    tests = results["across_arms"]["paired_bootstrap"].get(name, {})
    test = tests.get("all") or tests.get(results["measure"]["key"])
    if test is None:
        return None if found is None else {"mean": found.mean, "low": None, "high": None, "over": "one seed"}
    return {"mean": test["difference"], "low": test["low"], "high": test["high"], "over": "test examples"}


def _gain(arm: dict[str, Any]) -> dict[str, Any] | None:
    """The first seed's gain over the untuned base, over the test chats."""
    details = arm["runs"][0]["details"] or {}
    gain = details.get("scores", {}).get("loss", {}).get("gain") if details.get("kind") == "chat" else None
    return gain and {
        "mean": gain["value"],
        "low": gain["low"],
        "high": gain["high"],
        "over": f"{details['chats']} chats",
    }


if __name__ == "__main__":
    main()
