"""Pages on fine-tuning and on the learning rates that were tried for the shipped recipes."""

import json
from typing import Any

from page_tables.layout import ROOT, count_seeds, page_top, stored_records, table_of


def rates() -> str:
    """The learning-rate searches whose results the recipes ship."""
    text = page_top(
        "Which learning rates were tried for the shipped recipes?",
        "`recipes/*.search.json`",
        "A cell is the held-out loss of a trial, the mean over the seeds of the search; the bold one was chosen. A "
        "rate that is the lowest or highest of its row is at the edge of what was tried, and reports warn of it. "
        "[Comparing](../compare.md) says why every arm has a rate of its own.",
    )
    for path in sorted((ROOT / "recipes").glob("*.search.json")):
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        text += f"## {path.name.removesuffix('.search.json')}\n\n"
        tried = sorted({_pair(trial) for arm in arms.values() for trial in arm["trials"]})
        heads = [f"{rate:g}" + ("" if scale == 1 else f", scale {scale:g}") for rate, scale in tried]
        rows = (
            [f"`{name}`", str(arm["steps"]), ", ".join(map(str, arm["seeds"])), *_trials(arm, tried)]
            for name, arm in arms.items()
        )
        text += table_of(["arm", "steps", "seeds", *heads], rows) + "\n"
    return text.rstrip("\n") + "\n"


def _pair(trial: dict[str, Any]) -> tuple[float, float]:
    """The rate of a trial and its `feed_forward_scale`."""
    return trial["learning_rate"], trial.get("scale") or 1.0


def _trials(arm: dict[str, Any], tried: list[tuple[float, float]]) -> list[str]:
    losses = {_pair(trial): trial["loss"] for trial in arm["trials"]}
    best = arm["best"], arm.get("best_scale") or 1.0
    cells = []
    for pair in tried:
        loss = losses.get(pair)
        cell = ("diverged" if pair in losses else "") if loss is None else f"{loss:.4f}"
        cells.append(f"**{cell}**" if pair == best else cell)
    return cells


ASKED = ("full", "LoRA", "mixture of LoRA", "MoT adapter", "expert-specialised", "upcycled experts")
"""Ways of fine-tuning that the page compares, or names as not measured."""


def fine_tuning() -> str:
    """Full tuning, adapters and heads over the records of all tasks, with an advice."""
    records = stored_records("finetuning-*.json")
    against = [row for _, record in records for row in _beside_lora(record)]
    ahead = [row["arm"] for row in against if _side(*row["minus_baseline_better"]) > 0]
    behind = [row["arm"] for row in against if _side(*row["minus_baseline_better"]) < 0]
    measured = {row["method"] for _, record in records for row in record["rows"]}
    missing = [method for method in ASKED if method not in measured]
    counted = f"{_are(len(ahead))} better and {_are(len(behind))} worse by 95 % intervals"
    text = page_top(
        "Which way of fine-tuning should I use?",
        "`benchmarks/results/finetuning-*.json`",
        "**Tune with LoRA first, each way at a searched rate, and compare a mixture of LoRA, and full tuning where the "
        "model is small enough**: of "
        f"{len(against)} comparisons of another way with LoRA, {counted}; all are of bases with at most 254 million "
        "parameters, at most a few hundred steps and one kind of machine, so nothing here is known of larger models or "
        "longer runs.\n\nWhere a base stays frozen, read all its layers and not the last alone. "
        + (f"Not measured yet: {' and '.join(missing)}. " if missing else "")
        + "`python benchmarks/finetuning.py FOLDER` adds the record of a comparison of your own.",
    )
    for name, record in records:
        text += f"## {record['task'].capitalize()}: {record['name']}\n\n{_run_of(name, record)}\n\n"
        text += table_of(_HEAD, [_tuned(row, record) for row in record["rows"]]) + "\n"
    return text.rstrip("\n") + "\n"


def _are(count: int) -> str:
    return f"{count or 'none'} {'are' if count > 1 else 'is'}"


_HEAD = ["arm", "way", "trained", "step time (training)", "score", "minus baseline (95 %)", "minus untuned base (95 %)"]


def _run_of(name: str, record: dict[str, Any]) -> str:
    about, measure = record["environment"], record["measure"]
    how = f", {record['measured']}" if record["measured"] else ""
    unit = f" in {measure['unit']}" if measure["unit"] else ""
    minutes = f" {record['minutes']:g} minutes." if record["minutes"] else ""
    return (
        f"`{record['command']}`: base {record['base']}, {record['steps']} steps of {record['examples_a_step']}, "
        f"{measure['name']}{unit} ({measure['better']} is better), baseline {record['baseline'].replace('_', ' ')}. "
        f"{record['created'][:10]}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']}"
        f"{how}; from {record['source']} (`{name}`).{minutes}"
    )


def _tuned(row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    ratio, seconds = row["seconds_ratio"], row["train_seconds"]
    time = "-" if ratio is None else f"{ratio:.2f}" + ("" if seconds is None else f" ({seconds:,.0f} s)")
    return [
        row["arm"].replace("_", " "),
        row["method"],
        "-" if row["trained"] is None else f"{row['trained']:,}",
        time,
        f"{row['value']:.{record['measure']['digits']}f} ({count_seeds(row['seeds'])})",
        _interval(row["minus_baseline"], record),
        _interval(row["minus_base"], record),
    ]


def _interval(found: dict[str, Any] | None, record: dict[str, Any]) -> str:
    if found is None:
        return ""
    digits = record["measure"]["digits"]
    if found["low"] is None:
        return f"{found['mean']:+.{digits}f} ({found['over']})"
    return f"{found['mean']:+.{digits}f} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f}, {found['over']})"


def _beside_lora(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that were compared with LoRA, with the interval turned so that more is better."""
    methods = {row["arm"]: row["method"] for row in record["rows"]}
    if methods[record["baseline"]] != "LoRA":
        return []
    sign = 1 if record["measure"]["better"] == "higher" else -1
    return [
        row | {"minus_baseline_better": sorted(sign * row["minus_baseline"][end] for end in ("low", "high"))}
        for row in record["rows"]
        if row["minus_baseline"] is not None and row["minus_baseline"]["low"] is not None
    ]


def _side(low: float, high: float) -> int:
    """1 or -1 where an interval lies on one side of zero, else 0."""
    return int(low > 0) - int(high < 0)
