"""How far the layers are from what a machine allows: this CPU as measured, an H200 as its maker states it.

Reads the record of the layers under benchmarks/results/, measures this CPU's bandwidth, prints the least time that this
CPU and an H200 could take, relative to the least of a dense layer, and writes the plot. Run `python
benchmarks/roofline.py` on the machine that made the record; it needs a checkout, `PYTHONPATH=src` where Mixtura is not
installed, and half a minute.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mixtura.benchmarks.contenders import Size
from mixtura.benchmarks.measure import FAMILIES, H200, Machine, least_seconds, machine_of, measure_bandwidth, plot

ROOT = Path(__file__).parents[1]
DEVICE_SIZES = tuple(
    Size(tokens=32768, hidden=hidden, experts=experts, top_k=top_k, multiple_of=8)
    for hidden, experts, top_k in ((4096, 8, 2), (2048, 64, 8), (2048, 128, 8), (1024, 256, 8))
)


def main() -> None:
    """Prints both machines' limits and the table, and writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks/results/layers-cpu-8192.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/performance-roofline.png", help="the plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(options.record.read_text(encoding="utf-8"))
    cpu = machine_of(record, bandwidth=measure_bandwidth())
    console = Console(width=120)
    for machine in (cpu, H200):
        console.print(
            f"{machine.name}: {machine.flops / 1e9:,.0f} GFLOP/s, {machine.bandwidth / 1e9:,.0f} GB/s: "
            f"{machine.ridge:.0f} operations a byte"
        )
    console.print(_table(tuple(Size(**entry["size"]) for entry in record["sizes"]), cpu))
    console.print(_table(DEVICE_SIZES, H200))
    plot(record, cpu, H200, DEVICE_SIZES).savefig(
        options.out, dpi=110, bbox_inches="tight", metadata={"Software": None}
    )
    print(f"Wrote {options.out}")


def _table(sizes: tuple[Size, ...], machine: Machine) -> Table:
    table = Table(title=f"Training pass / step with AdamW, least time in units of a dense layer's: {machine.name}")
    table.add_column("size")
    for family in FAMILIES[1:]:
        table.add_column(family.replace("_", " "), justify="right")
    for size in sizes:
        cells = []
        for family in FAMILIES[1:]:
            training, step = (
                least_seconds(size, family, machine, what=what) / least_seconds(size, "dense", machine, what=what)
                for what in ("training", "step")
            )
            cells.append(f"{training:.2f} / {step:.2f}")
        table.add_row(size.label().removesuffix(", even"), *cells)
    return table


if __name__ == "__main__":
    main()
