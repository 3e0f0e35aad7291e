"""Writes the evidence that the package advises with, from the stored record of the long runs, and its picture.

Run `python benchmarks/evidence.py` after `python benchmarks/long_runs.py store`; a test fails where the two differ.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mixtura.config import ArmConfig
from mixtura.config.families import FAMILIES
from mixtura.planning.evidence import FEWEST_TOKENS, FILE, Evidence, Row, body_parameters, load_evidence
from mixtura.planning.laws import BASELINE, published_loss
from mixtura.report.significance import paired_difference
from mixtura.results.conclusions import Difference

RECORD = Path(__file__).parent / "results" / "long-runs-cpu.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "long-runs.png"
SOFT = "#59636e"
LABELS = {
    **{family: facts.words for family, facts in FAMILIES.items()},
    "dense_of_equal_parameters": "dense of equal total parameters",
    "uniform_router": "MoT with a uniform router",
}
ARMS = (*FAMILIES, "dense_of_equal_parameters", "uniform_router")
"""Names of runs that count as evidence: a family in its best form, or a control. Others are searches."""
DEPLOYED = ("population_top2", "alone_top2")
"""The modes for one request in which mixtures of tokens are compared: the better of the two, as a user who measures
both would deploy it. They differ by up to 0.06 nats, and held-out losses of one model in two modes hardly by chance."""


def evidence_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the package holds of a stored record: the runs that are named after an arm, in columns.

    Raises:
        ValueError: two runs of one arm, width and seed have results at one budget.
    """
    rows, settings = [record["settings"] | row for row in record["rows"]], record["settings"]
    found = [_evidence_row(row) for row in rows if row["name"] in ARMS and row["tokens"] >= FEWEST_TOKENS]
    if len({tuple(row[:4]) for row in found}) < len(found):
        raise ValueError("two runs have one name, width, budget and seed: name one of them otherwise.")
    setting = {
        "layers": settings["layers"],
        "vocabulary": settings["vocabulary"],
        "context": settings["context"],
        "tokens_per_step": settings["batch"] * settings["context"],
        "experts": ArmConfig(family="token_choice").num_experts,
        "top_k": 2,
        "group_size": ArmConfig(family="mixture_of_tokens").group_size,
        "text": "English film reviews",
        "machine": f"one thread of {' or '.join(sorted({row[-1] for row in found}))}",
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
        losses["causal"] if "causal" in losses else min(losses[mode] for mode in DEPLOYED),
        losses.get("group"),
        losses.get("alone_top2"),
        row["parameters"],
        round(row["cpu_seconds"] / row["steps_taken"], 4),
        row["processor"],
    ]


def draw(evidence: Evidence, *, width: int) -> Figure:
    """Difference to dense against training tokens at one width: means with 95 % intervals over seeds, the law, and the
    published joint law for as many experts."""
    figure = Figure(figsize=(8.0, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=SOFT, linewidth=1)
    arms = [arm for arm in dict.fromkeys(row.arm for row in evidence.rows) if arm != BASELINE]
    spare = iter((("#5b4fc4", "P"), ("#a37500", "X")))
    for arm, marker in zip(arms, "osD^vP*", strict=False):
        facts = FAMILIES.get(arm)  # pyright: ignore[reportArgumentType]
        colour, symbol = (facts.colours[0], marker) if facts else next(spare)
        _draw_arm(
            axes, evidence, arm, width, colour=colour, symbol=symbol, label=LABELS.get(arm, arm.replace("_", " "))
        )
    budgets = sorted({row.tokens for row in evidence.of(BASELINE, width=width)})
    size = body_parameters(width, layers=evidence.setting.layers)
    line = np.geomspace(budgets[0], budgets[-1], 60)
    published = [
        published_loss(active_parameters=size, tokens=d, experts=evidence.setting.experts)
        - published_loss(active_parameters=size, tokens=d, experts=1)
        for d in line
    ]
    measured = [end for arm in arms for end in _differences(evidence, arm, width).values()]
    bottom = min(0.0, *(each.mean if each.low is None else each.low for each in measured)) - 0.02
    top = max(0.0, *(each.mean if each.high is None else each.high for each in measured)) + 0.02
    axes.set_ylim(bottom, top)
    if min(published) < top:  # for budgets this small it lies far above
        axes.plot(line, published, ":", color=SOFT, linewidth=1.4, label="published joint law, top 1 of 16")
    axes.set(xscale="log", xlabel="Training tokens", ylabel="Held-out nats minus dense, as deployed")
    axes.set_title(f"Below zero is better than dense (width {width}, equal FLOPs a token)", loc="left", fontsize=11)
    axes.grid(True, color="#e3e6ea", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _differences(evidence: Evidence, arm: str, width: int) -> dict[int, Difference]:
    """Of an arm to dense, paired by seed, by budget."""
    found = {}
    for tokens in sorted({row.tokens for row in evidence.of(arm, width=width)}):
        own, dense = (
            {row.seed: row.loss for row in evidence.of(name, width=width) if row.tokens == tokens}
            for name in (arm, BASELINE)
        )
        if (difference := paired_difference(own, dense)) is not None:
            found[tokens] = difference
    return found


def _draw_arm(axes: Any, evidence: Evidence, arm: str, width: int, *, colour: str, symbol: str, label: str) -> None:
    found = _differences(evidence, arm, width)
    if found:
        half = [0.0 if each.high is None else each.high - each.mean for each in found.values()]
        style = {"color": colour, "marker": symbol, "markersize": 6, "linewidth": 1.6, "capsize": 3, "label": label}
        axes.errorbar(list(found), [each.mean for each in found.values()], yerr=half, **style)


def main() -> None:
    """Writes the file and the picture."""
    FILE.write_text(evidence_text(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
    load_evidence.cache_clear()
    draw(load_evidence(), width=64).savefig(PICTURE, dpi=160, facecolor="white", metadata={"Software": None})
    print(f"Stored in {FILE} and {PICTURE}")


if __name__ == "__main__":
    main()
