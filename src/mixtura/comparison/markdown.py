"""The report in short as Markdown, for forges and messages: verdict, table, every run, limits, how to reproduce it."""

import re
from typing import Any

from mixtura.comparison import tables
from mixtura.comparison.wording import NBSP, capital, listing


def render_markdown(results: dict[str, Any], summary: dict[str, Any]) -> str:
    """The Markdown report; names and descriptions are escaped, so that they cannot become markup."""
    verdict = summary["verdict"]
    title = capital(listing([arm["label"] for arm in summary["arms"].values()], "or"))
    parts = [
        f"# {escape(title)}?",
        f"*The rule, fixed before the runs.* {escape(summary['rule'])}",
        f"**{escape(verdict['headline'])}**",
        escape(verdict["answer"] or ""),
        escape(" ".join(verdict["speed"])),
        "\n".join(f"- {caution['level'].capitalize()}: {escape(caution['text'])}" for caution in summary["cautions"]),
        f"Held equal: {escape('; '.join(results['held_equal']))}.",
        "![Held-out loss over training](figures/loss.png)",
        "## The arms side by side",
        _main_table(results, summary),
        "## Longer training",
        *(escape(sentence) for sentence in verdict["longer"]),
        "## Every run",
        _seed_table(summary),
        "## What this cannot tell you",
        "\n".join(f"- {escape(limit['title'])}: {escape(limit['text'])}" for limit in summary["limits"]),
        "## Reproduce this",
        fence(results["command"]),
        "\n".join(f"- {escape(term)}: {escape(value)}" for term, value in tables.environment_facts(results)),
        "\n".join(f"- {escape(term)}: {escape(value)}" for term, value in tables.data_facts(results, summary)),
        "The resolved recipe:",
        fence(results["recipe_toml"], "toml"),
        "Every number here is in results.json; the page with interactive figures is report.html.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text as Markdown that shows it as it is written, also inside a table."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.replace(NBSP, " ").split()))


def fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return f"| --- |{' ---: |' * columns}"


def _main_table(results: dict[str, Any], summary: dict[str, Any]) -> str:
    labels = [escape(arm["label"]) for arm in summary["arms"].values()]
    lines = [_row(["", *labels]), _rule(len(labels))]
    for group in tables.main_table(results, summary):
        lines.append(_row([f"**{group['title']}**", *[""] * len(labels)]))
        for row in group["rows"]:
            cells = [f"{cell['text']} ({cell['note']})" if cell["note"] else cell["text"] for cell in row["cells"]]
            lines.append(_row([escape(row["label"]), *map(escape, cells)]))
    return "\n".join(lines)


def _seed_table(summary: dict[str, Any]) -> str:
    table = tables.seed_table(summary)
    heads = [escape(f"{summary['arms'][column['arm']]['label']}, {column['mode']}") for column in table["columns"]]
    rows = [_row([str(row["seed"]), *map(escape, row["cells"])]) for row in table["rows"]]
    return "\n".join([_row(["seed", *heads]), _rule(len(heads)), *rows, _row(["mean", *table["mean"]])])
