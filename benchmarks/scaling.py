"""How dense, token choice and mixture of tokens scale from 1 to 16,384 GPUs: a simulation, no measurement on a GPU.

The planner's model of a step and of links (`mixtura.planning.hardware`) searches the best layout at every number of
GPUs. What it assumes of mixtures is replaced by what was measured: the time of a layer relative to a dense one, from
the record of layers on a CPU, and the busiest expert's load, from the record of long runs. A load is spread over
experts as a normal distribution is, with the standard deviation at which the busiest of that run's experts is expected
where it was measured; a rank that holds several experts then has the mean of theirs, and the others wait for the
busiest rank, at every layer.

Run `PYTHONPATH=src python benchmarks/scaling.py`; it takes a minute, prints a table and writes the
plot of docs/scaling.md.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import NormalDist, fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mixtura.errors import UserError
from mixtura.planning.bill import Layout, Workload, best_layout
from mixtura.planning.evidence import FEWEST_TOKENS, load_evidence
from mixtura.planning.formulas import DecoderShape, match_intermediate_size
from mixtura.planning.hardware import Hardware, MixtureSpeed, read_hardware
from mixtura.planning.shapes import feed_forward_shapes

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results"
LENGTH, SEQUENCES = 4096, 16_384
"""Tokens of a sequence, and sequences of a step: one for each GPU of the largest cluster, 67 million tokens."""
WIDTH, EXPERTS, TOP_K, GROUP = 14_336, 64, 8, 8
COUNTS = tuple(2**power for power in range(15))
NETWORKS = (100.0, 50.0, 25.0, 12.5, 6.0, 3.0, 1.5, 0.75, 0.375, 0.125, 0.05, 0.0125)
"""GB/s that a GPU sends to other nodes: from two InfiniBand cards to 100 Mbit/s at home."""
NETWORK_GPUS = 256
ARMS = {
    "dense": ("dense", "all"),
    "token choice, even load": ("token_choice", "even"),
    "token choice": ("token_choice", "measured"),
    "mixture of tokens": ("mixture_of_tokens", "even"),
}
STYLES = {
    "dense": ("#1f2328", "o", "-"),
    "token choice, even load": ("#4c72b0", "s", ":"),
    "token choice": ("#4c72b0", "s", "-"),
    "mixture of tokens": ("#c44e52", "D", "-"),
}
TABLE_COUNTS = (8, 128, 2048, 4096, 8192, 16_384)
GRID = "#e3e6ea"


@cache
def decoder(family: str) -> DecoderShape:
    """32 layers of 4,096, 7 billion active parameters, every layer of the family and at a dense layer's FLOPs."""
    shape = DecoderShape(
        vocab_size=32_000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=WIDTH,
        moe_intermediate_size=WIDTH,
        mlp_layer_types=(family,) * 32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        group_size=GROUP,
        tie_word_embeddings=False,
    )
    last = feed_forward_shapes(shape, sequence_length=LENGTH)[-1]
    return dataclasses.replace(
        shape, moe_intermediate_size=match_intermediate_size(last, dense_intermediate_size=WIDTH, multiple_of=8)
    )


@cache
def times_dense(family: str) -> float:
    """The measured time of a layer of 64 experts, forward and backward, over a dense one of equal FLOPs."""
    record = json.loads((RECORDS / "layers-cpu-8192-1024.json").read_text(encoding="utf-8"))
    size = next(each for each in record["sizes"] if each["size"]["experts"] == EXPERTS)
    name = family.replace("_", " ")
    return next(row["ratio"] for row in size["rows"] if (row["contender"], row["what"]) == (name, "training"))


@cache
def busiest_expert() -> float:
    """The measured load of token choice's busiest expert over the mean, a mean over runs and layers.

    The runs are those of 1 to 3 million tokens at the width of the record.
    """
    record = json.loads((RECORDS / "long-runs-cpu.json").read_text(encoding="utf-8"))
    rows = (
        row
        for row in record["rows"]
        if row.get("name") == "token_choice" and "width" not in row and FEWEST_TOKENS <= row["tokens"] <= 3e6
    )
    return fmean(row["load"]["busiest"] for row in rows)


def expected_busiest(ranks: int) -> float:
    """Standard deviations above the mean at which the largest of so many normal numbers lies (Blom, 1958)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def imbalance(ranks: int) -> float:
    """Rows of the busiest of so many expert ranks over the mean."""
    spread = (busiest_expert() - 1) / expected_busiest(load_evidence().setting.experts)
    return 1 + spread * (ranks / EXPERTS) ** 0.5 * expected_busiest(ranks)


def even(_: int) -> float:
    """All ranks have equal rows."""
    return 1.0


def layout_of(arm: str, hardware: Hardware) -> Layout | None:
    """The best layout of an arm, None where nothing fits or the step cannot be divided."""
    family, load = ARMS[arm]
    loads: Callable[[int], float] = imbalance if load == "measured" else even
    speed = MixtureSpeed(times_dense=None if family == "dense" else times_dense(family), imbalance=loads)
    group = GROUP if family == "mixture_of_tokens" else 1
    work = Workload(shape=decoder(family), sequence_length=LENGTH, sequences_per_step=SEQUENCES, steps=1, group=group)
    try:
        return best_layout(arm, work, hardware, mixtures=speed).best
    except UserError:
        return None


def rate(layout: Layout, gpus: int) -> float:
    """Tokens a second of one GPU."""
    return SEQUENCES * LENGTH / layout.time.total / gpus


def by_count(counts: Sequence[int] = COUNTS) -> dict[str, dict[int, Layout]]:
    """The best layout of every arm at every number of H200, where there is one."""
    found = {arm: {count: layout_of(arm, read_hardware(f"{count}xH200")) for count in counts} for arm in ARMS}
    return {arm: {count: each for count, each in of.items() if each is not None} for arm, of in found.items()}


def by_network(networks: Sequence[float] = NETWORKS) -> dict[str, dict[float, Layout]]:
    """The same at `NETWORK_GPUS`, in nodes of 8, by what a GPU sends to other nodes in GB/s."""
    hardware = read_hardware(f"{NETWORK_GPUS}xH200")
    at = {speed: dataclasses.replace(hardware, network_gb_per_s=speed) for speed in networks}
    found = {arm: {speed: layout_of(arm, each) for speed, each in at.items()} for arm in ARMS}
    return {arm: {speed: each for speed, each in of.items() if each is not None} for arm, of in found.items()}


def table() -> str:
    """Tokens a second of a GPU, waiting and expert ranks by arm and number of GPUs, in Markdown."""
    counts = by_count(TABLE_COUNTS)
    rows = [[f"{count:,}", *(_cell(of.get(count), count) for of in counts.values())] for count in TABLE_COUNTS]
    lines = [["GPUs", *ARMS], ["---"] * (1 + len(ARMS)), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(layout: Layout | None, gpus: int) -> str:
    if layout is None:
        return "-"
    waits = (layout.time.exchanging + layout.time.routing) / layout.time.total
    ranks = layout.division.expert_ranks
    return f"{rate(layout, gpus):,.0f} ({waits:.0%}" + (f", EP {ranks})" if ranks > 1 else ")")


def plot() -> Figure:
    """Speed of a GPU by their number and by their network, and how long ranks wait for the busiest."""
    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1.1, 0.8])
    for axes, found, gpus_of in (
        (left, by_count(), lambda count: count),
        (middle, by_network(), lambda _: NETWORK_GPUS),
    ):
        for arm, layouts in found.items():
            colour, marker, line = STYLES[arm]
            points = [(place, rate(layout, gpus_of(place)) / 1000) for place, layout in layouts.items()]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, ms=4.5, label=arm)
        axes.set_xscale("log", base=2 if axes is left else 10)
        axes.set_ylim(bottom=0)
    last, layout = max(by_count()["mixture of tokens"].items())
    left.annotate(
        f"{SEQUENCES // GROUP:,} groups of {GROUP}\nsequences: no further",
        (last, rate(layout, last) / 1000),
        xytext=(-34, -46),
        textcoords="offset points",
        color=STYLES["mixture of tokens"][0],
        fontsize=8.5,
        ha="center",
        arrowprops={"arrowstyle": "-", "color": STYLES["mixture of tokens"][0], "lw": 0.8},
    )
    middle.invert_xaxis()
    left.set(xlabel="GPUs", ylabel="thousand tokens a second of a GPU", title="67 million tokens a step")
    middle.set(xlabel=f"GB/s of a GPU to other nodes, {NETWORK_GPUS} GPUs", title="From a cluster to the internet")
    ranks = [2**power for power in range(7)]
    right.plot(ranks, [imbalance(each) for each in ranks], color=STYLES["token choice"][0], marker="s", ms=4.5)
    right.axhline(1, color=STYLES["mixture of tokens"][0])
    right.set_xscale("log", base=2)
    right.set(xlabel="expert ranks, 64 experts", title="Rows of the busiest rank, mean 1")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    middle.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in (left, middle, right):
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower left", fontsize=9)
    return figure


def main() -> None:
    """Prints the table and writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/scaling.png", help="the plot")
    options = parser.parse_args()
    print(table())
    plot().savefig(options.out, dpi=110, metadata={"Software": None})
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
