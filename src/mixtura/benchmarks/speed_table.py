"""The table of the layers' speed, its record and its plot: `mixtura bench`."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from mixtura.benchmarks.contenders import Size, limit, own_layers, parameters, peers
from mixtura.benchmarks.measure import Pass, calls, interleaved, kept_bytes, passes, ratios, store_record
from mixtura.results.stored import Plain

LIMIT = "one large product"
PASSES: tuple[Pass, ...] = ("forward", "training", "step")

QUICK = (
    Size(tokens=1024, hidden=64, experts=8, top_k=2),
    Size(tokens=1024, hidden=64, experts=32, top_k=2),
)
DEFAULT = (
    Size(tokens=2048, hidden=256, experts=8, top_k=1),
    Size(tokens=2048, hidden=256, experts=8, top_k=2),
    Size(tokens=2048, hidden=256, experts=8, top_k=2, skew=2.0),
    Size(tokens=2048, hidden=256, experts=32, top_k=2),
    Size(tokens=2048, hidden=256, experts=64, top_k=8),
    Size(tokens=2048, hidden=256, experts=64, top_k=8, skew=2.0),
)
FULL = (
    *QUICK,
    *DEFAULT,
    Size(tokens=8192, hidden=256, experts=8, top_k=2),
    Size(tokens=8192, hidden=256, experts=64, top_k=8),
    Size(tokens=8192, hidden=256, experts=256, top_k=8),
    Size(tokens=8192, hidden=1024, experts=8, top_k=2),
    Size(tokens=8192, hidden=1024, experts=64, top_k=8),
)
SETS: dict[str, tuple[Size, ...]] = {"quick": QUICK, "default": DEFAULT, "full": FULL}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one size in one pass."""

    contender: str
    what: Pass
    milliseconds: float
    ratio: float
    """Time relative to the dense layer: the median of the rounds, and the lowest and highest of them."""
    lowest: float
    highest: float
    utilisation: float
    """Share of the speed of one large product of the same FLOPs."""
    gigaflops: float
    parameters: int
    kept_bytes_per_token: float | None
    calls: int | None
    timed_once: bool


def bench(
    sizes: Sequence[Size], *, what: Sequence[Pass] = PASSES, rounds: int = 7, only: str = "", seed: int = 0
) -> list[Plain]:
    """Times every contender at every size, and prints a table for each as it is done.

    Args:
        sizes: the rows.
        what: the passes.
        rounds: rounds that count, after two runs of warm-up.
        only: contenders whose name contains this text, besides dense and the limit.
        seed: of weights and inputs.
    """
    measured = []
    for size in sizes:
        torch.manual_seed(seed)
        layers: dict[str, nn.Module] = {**own_layers(size)}
        others, left_out = peers(size)
        layers |= others
        layers = {name: layer for name, layer in layers.items() if name == "dense" or only in name}
        rows = [row for each in what for row in _measure(size, layers, each, rounds)]
        measured.append({"size": asdict(size), "left_out": left_out, "rows": [asdict(row) for row in rows]})
        _print(size, rows, left_out)
    return measured


def store(measured: list[Plain], folder: Path, *, settings: Plain) -> Path:
    """Writes the record, with versions, hardware and date, and the plot beside it; returns the record's path."""
    path = store_record(folder, "layers", settings=settings, sizes=measured)
    plot(measured).savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path


def plot(measured: list[Plain], *, what: Pass = "training") -> Figure:
    """Utilisation of every contender, one panel a size: 1 is the speed of one large product."""
    figure = Figure(figsize=(9, 2.6 * len(measured)))
    for number, entry in enumerate(measured, start=1):
        rows = [row for row in entry["rows"] if row["what"] == what and row["contender"] != LIMIT]
        rows.sort(key=lambda row: row["utilisation"])
        axes = figure.add_subplot(len(measured), 1, number)
        names = [row["contender"] for row in rows]
        theirs = [name not in ("dense", *_OWN) for name in names]
        colours = ["#b8b8b8" if other else "#4c72b0" for other in theirs]
        axes.barh(names, [row["utilisation"] for row in rows], color=colours)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.1)
        axes.set_title(Size(**entry["size"]).label(), fontsize=9)
        axes.tick_params(labelsize=8)
    figure.supxlabel(f"{what}: share of the speed of one large product of the same FLOPs", fontsize=9)
    figure.tight_layout()
    return figure


_OWN = ("token choice", "expert choice", "mixture of tokens", "soft")


def _measure(size: Size, layers: dict[str, nn.Module], what: Pass, rounds: int) -> list[Row]:
    x_BLD = size.inputs()
    runs = {name: passes(layer, x_BLD, what) for name, layer in layers.items()}
    runs[LIMIT] = limit(size, backward=what != "forward")
    seconds = interleaved(runs, baseline="dense", rounds=rounds)
    to_dense, to_limit = ratios(seconds, baseline="dense"), ratios(seconds, baseline=LIMIT)
    rows = []
    for name in runs:
        layer, median = layers.get(name), statistics.median(seconds[name])
        detailed = layer is not None and what == "training"
        rows.append(
            Row(
                contender=name,
                what=what,
                milliseconds=median * 1e3,
                ratio=to_dense[name][0],
                lowest=to_dense[name][1],
                highest=to_dense[name][2],
                utilisation=1 / to_limit[name][0],
                gigaflops=size.flops(backward=what != "forward") / median / 1e9,
                parameters=parameters(layer) if layer is not None else 0,
                kept_bytes_per_token=kept_bytes(layer, x_BLD) / size.tokens if layer is not None and detailed else None,
                calls=calls(runs[name]) if detailed else None,
                timed_once=len(seconds[name]) < rounds,
            )
        )
    return rows


def _print(size: Size, rows: list[Row], left_out: dict[str, str]) -> None:
    table = Table(title=size.label())
    for column in ("contender", "pass", "ms", "to dense", "lowest", "highest", "utilisation", "kept B/token", "calls"):
        table.add_column(column, justify="left" if column in ("contender", "pass") else "right")
    for row in rows:
        table.add_row(
            row.contender + (" (once)" if row.timed_once else ""),
            row.what,
            f"{row.milliseconds:.1f}",
            f"{row.ratio:.2f}",
            f"{row.lowest:.2f}",
            f"{row.highest:.2f}",
            f"{row.utilisation:.2f}",
            "" if row.kept_bytes_per_token is None else f"{row.kept_bytes_per_token:,.0f}",
            "" if row.calls is None else str(row.calls),
        )
    console = Console(width=130)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"Left out: {name}: {reason}.")
