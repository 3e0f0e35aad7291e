"""Writes docs/results/: the tables of the records under benchmarks/results/ and of the searches beside the recipes.

A page holds what its records hold and nothing else, so a number is corrected by measuring again and never by hand.
`make docs` runs `python benchmarks/pages.py`; a test fails where a page and its records differ. `page_tables` beside
this file has what stands on each page.
"""

from page_tables.families import families, initialisation
from page_tables.layout import ROOT, stored_records
from page_tables.long_training import long_runs, studies
from page_tables.speed import decoding, experts, gpu, layers, runs, steps
from page_tables.stability import stability
from page_tables.tuning import fine_tuning, rates

PAGES = ROOT / "docs" / "results"


def pages() -> dict[str, str]:
    """Content of every page by file name."""
    makers = {
        "layers": layers,
        "steps": steps,
        "runs": runs,
        "decoding": decoding,
        "experts": experts,
        "rates": rates,
        "initialisation": initialisation,
        "long-runs": long_runs,
        "fine-tuning": fine_tuning,
    }
    if stored_records("families-*.json"):
        makers["families"] = families
    if stored_records("studies-*.json"):
        makers["studies"] = studies
    if stored_records("stability-*.json"):
        makers["stability"] = stability
    if stored_records("gpu-*.json"):
        makers["gpu"] = gpu
    return {f"{name}.md": make() for name, make in makers.items()}


def main() -> None:
    """Writes every page."""
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
