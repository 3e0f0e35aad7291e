"""Pages on losses at one budget: all families, and the scale at which weights start."""

import tomllib
from statistics import fmean
from typing import Any

from mixtura.report.significance import paired_difference
from page_tables.layout import count_seeds, margin_of, page_top, stored_records, table_of


def families() -> str:
    """Every family at the default comparison's size."""
    text = page_top(
        "How do all families compare at one size?",
        "`benchmarks/results/families-*.json`",
        "`mixtura compare --preset families`: the default comparison's model, text and steps, with half its warm-up; "
        "every arm at equal FLOPs a token and at the best of its own learning rates, which were tried as the second "
        "table says. *Minus dense* is the loss as deployed, paired by seed, with a 95 % t-interval; below zero is "
        "better. A family without a deployed mode is judged as it trains, and another example of the batch, or a later "
        "token, may leak.",
    )
    for name, record in stored_records("families-*.json"):
        made, about, rows = record["created"][:10], record["environment"], record["rows"]
        base = _judged(next(row for row in rows if row["arm"] == record["settings"]["baseline"]))
        text += f"{made}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']}, "
        text += f"{record['settings']['tokens']:,} tokens a run (`{name}`).\n\n"
        head = ["arm", "loss as deployed", "minus dense", "mode", "other modes", "rate", "parameters", "step, dense 1"]
        cells = []
        for row in sorted(rows, key=lambda row: fmean(_judged(row).values())):
            own, mode = _judged(row), row["deployed_mode"] or row["training_mode"]
            others = {of: fmean(losses.values()) for of, losses in row["losses"].items() if of != mode}
            leaks = "" if row["deployed_mode"] else ", not deployable"
            cells.append(
                [
                    row["arm"].replace("_", " "),
                    f"{fmean(own.values()):.3f} ({count_seeds(len(own))})",
                    "" if own == base else margin_of(paired_difference(own, base)),
                    mode + leaks,
                    ", ".join(f"{of.replace('_', ' ')} {loss:.3f}" for of, loss in others.items()),
                    f"{row['rate']:g}",
                    f"{row['parameters'] / 1e6:.2f} M",
                    f"{row['seconds_ratio']:.2f}",
                ]
            )
        recipe = tomllib.loads(record["settings"]["recipe"])
        search, steps = recipe["search"], recipe["training"]["steps"]
        seeds = ", ".join(map(str, search["seeds"]))
        text += table_of(head, cells)
        text += f"\nThe searches ({search.get('steps', steps)} of {steps} steps, seed {seeds}):\n\n"
        tried = sorted({rate for row in rows for rate, _ in row["trials"]})
        of_rate = [(row["arm"], {rate: loss for rate, loss in row["trials"]}) for row in rows if row["trials"]]
        text += table_of(
            ["arm", *(f"{rate:g}" for rate in tried)],
            ([arm.replace("_", " "), *(_loss(losses.get(rate)) for rate in tried)] for arm, losses in of_rate),
        )
    return text


def _judged(row: dict[str, Any]) -> dict[int, float]:
    """Losses by seed in the mode that counts."""
    losses = row["losses"][row["deployed_mode"] or row["training_mode"]]
    return {int(seed): loss for seed, loss in losses.items()}


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def initialisation() -> str:
    """Losses of models whose weights start at different scales."""
    text = page_top(
        "How much does the scale of the first weights matter?",
        "`benchmarks/results/initialisation-*.json`",
        "Held-out nats a token after short runs of layers without a gate, by an earlier form of "
        "`benchmarks/long_runs.py`. A scale multiplies "
        "1 / sqrt(fan-in); a dash is the standard deviation 0.02. Up and down are the two projections of dense layers "
        "and of experts. "
        "One row a run. The [log](../log.md) says what follows.",
    )
    head = [
        "family",
        "layers",
        "width",
        "rate",
        "seed",
        "dense up, down",
        "expert up, down",
        "router",
        "tokens",
        "loss",
    ]
    for name, record in stored_records("initialisation-*.json"):
        made, about = record["created"][:10], record["environment"]
        text += f"{made}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']} "
        text += f"(`{name}`).\n\n"
        rows = (_start(record["settings"] | row) for row in record["rows"])
        text += table_of(head, rows) + "\n"
    return text.rstrip("\n") + "\n"


def _start(run: dict[str, Any]) -> list[str]:
    scale = {
        key: "-" if run[key] is None else f"{run[key]:g}" for key in run if key.endswith(("_up", "_down", "router"))
    }
    losses = ", ".join(f"{mode.replace('_', ' ')} {loss:.3f}" for mode, loss in run["losses"].items())
    return [
        run["family"].replace("_", " "),
        run["placement"].replace("_", " "),
        str(run["width"]),
        f"{run['rate']:g}",
        str(run["seed"]),
        f"{scale['dense_up']}, {scale['dense_down']}",
        f"{scale['expert_up']}, {scale['expert_down']}",
        scale["router"],
        f"{run['tokens']:,}",
        losses,
    ]
