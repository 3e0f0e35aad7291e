"""The page on stability: what each family loses at rates above its best, how its seeds scatter, and spikes."""

from statistics import fmean, stdev
from typing import Any

from page_tables.layout import deployed_loss, page_top, stored_records, table_of


def stability() -> str:
    """Losses of every family at several rates."""
    text = page_top(
        "How stable is each family?",
        "`benchmarks/results/stability-*.json`",
        "Held-out nats a token at four learning rates, mixtures of tokens as served, by `python "
        "benchmarks/long_runs.py train benchmarks/stability.jsonl`: gated layers, 16 experts, a warm-up over a "
        "twentieth of the steps and a cosine. A cell is the mean over the seeds, their standard deviation, and the "
        "spikes of all of them together, where there are any. *Lost at twice* the best rate is what a user pays who "
        "guesses the rate too high. Routers are in float32 unless the name says otherwise. [Results](../results.md) "
        "says what follows.",
    )
    for name, record in stored_records("stability-*.json"):
        made, about = record["created"][:10], record["environment"]
        runs = [record["settings"] | row for row in record["rows"]]
        text += f"{made}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']}; width "
        text += f"{runs[0]['width']}, {runs[0]['tokens'] / 1e6:.1f} M tokens a run (`{name}`).\n\n"
        rates = sorted({run["rate"] for run in runs})
        head = ["arm", "seeds", *(f"rate {rate:g}" for rate in rates), "lost at twice", "at four times"]
        arms = sorted({run["name"] for run in runs}, key=lambda arm: (arm != "dense", arm))
        text += table_of(head, [_row(arm, [run for run in runs if run["name"] == arm], rates) for arm in arms]) + "\n"
    return text.rstrip("\n") + "\n"


def _row(arm: str, runs: list[dict[str, Any]], rates: list[float]) -> list[str]:
    of_rate = [[run for run in runs if run["rate"] == rate] for rate in rates]
    means = [fmean(map(deployed_loss, each)) for each in of_rate]
    best = means.index(min(means))
    lost = [f"{means[place] - means[best]:+.3f}" if place < len(means) else "" for place in (best + 1, best + 2)]
    return [arm, str(len(of_rate[0])), *map(_cell, of_rate), *lost]


def _cell(runs: list[dict[str, Any]]) -> str:
    losses = [deployed_loss(run) for run in runs]
    scatter = f" ({stdev(losses):.3f})" if len(losses) > 1 else ""
    spikes = sum(run["spikes"] for run in runs)
    return f"{fmean(losses):.3f}{scatter}" + (f", {spikes} spike{'s' if spikes > 1 else ''}" if spikes else "")
