"""How a page of results looks: its head, the machine of a record, tables, and differences with their margins."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixtura.results.conclusions import Difference

ROOT = Path(__file__).parents[2]

RECORDS = ROOT / "benchmarks" / "results"

NOTE = "`python benchmarks/pages.py` makes this page from {source}. Do not edit it by hand."


def stored_records(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """File name and content of every record whose name fits, the shortest names first."""
    paths = sorted(RECORDS.glob(pattern), key=lambda path: (len(path.name), path.name))
    return [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def page_top(title: str, source: str, first: str) -> str:
    """How a page begins: its title, what it is made from, and a paragraph on what it shows."""
    return f"# {title}\n\n{NOTE.format(source=source)}\n\n{first}\n\n"


def machine_of(name: str, record: dict[str, Any]) -> str:
    """When, where and with what a record of times was measured."""
    made, about = record["created"][:10], record["environment"]
    return (
        f"{made}, {about['processor']}, {about['threads']} of {about['cpu_count']} cores, torch {about['torch']}, "
        f"transformers {about['transformers']}, {record['settings']['rounds']} rounds (`{name}`)."
    )


def table_of(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def count_seeds(count: int) -> str:
    """Such as "3 seeds"."""
    return f"{count} seed" + ("s" if count > 1 else "")


def margin_of(found: Difference | None) -> str:
    """A difference with its interval, such as "-0.142 ± 0.007 (3 seeds)"; empty where there is none."""
    if found is None:
        return ""
    half = "" if found.high is None else f" ± {found.high - found.mean:.3f}"
    return f"{found.mean:+.3f}{half} ({count_seeds(found.n)})"


def deployed_loss(run: dict[str, Any]) -> float:
    """A long run's loss as served: mixtures of tokens in the better of two modes for one request."""
    losses = run["losses"]
    return losses["causal"] if "causal" in losses else min(losses["population_top2"], losses["alone_top2"])
