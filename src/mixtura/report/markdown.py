"""The report in short as Markdown, for forges and messages: verdict, table, every run, limits, how to reproduce it."""

import re
from collections.abc import Iterable

from mixtura.report import facts, tables
from mixtura.report.chat_scores import chat_section
from mixtura.report.facts import continuations_section, held_out
from mixtura.report.sections import classification_section, specialization_maps, translation_section, weight_rows
from mixtura.report.wording import NBSP, listing, number, start
from mixtura.results import Results, Summary


def render_markdown(results: Results, summary: Summary) -> str:
    """The Markdown report; names and descriptions are escaped, so that they cannot become markup."""
    verdict = summary.verdict
    first, *others = [arm.label for arm in summary.arms.values()]
    title = listing([start(first), *others], "or")
    parts = [
        f"# {escape(title)}?",
        f"**{escape(verdict.headline)}**",
        escape(verdict.finding),
        escape(verdict.answer or ""),
        "\n".join(f"- {caution.level.capitalize()}: {escape(caution.text)}" for caution in summary.cautions),
        "![Held-out loss over training](figures/loss.png)",
        escape(held_out(results).note),
        "## The arms side by side",
        _main_table(results, summary),
        escape(" ".join(verdict.speed)),
        *_writings(results, summary),
        *_task_parts(results, summary),
        "## Longer training",
        *(escape(sentence) for sentence in verdict.longer),
        "## Every run",
        _seed_table(results, summary),
        "## How it was judged",
        f"*The rule, fixed before the runs.* {escape(summary.rule)}",
        f"Held equal: {escape('; '.join(results.held_equal))}.",
        "## What this cannot tell you",
        "\n".join(f"- {escape(limit.title)}: {escape(limit.text)}" for limit in summary.limits),
        "## Reproduce this",
        fence(results.command),
        "\n".join(f"- {escape(term)}: {escape(value)}" for term, value in facts.environment_facts(results)),
        "\n".join(f"- {escape(term)}: {escape(value)}" for term, value in facts.data_facts(results, summary)),
        "The resolved recipe:",
        fence(results.recipe_toml, "toml"),
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


def _table(heads: list[str], rows: Iterable[tables.Row], *, notes: bool) -> str:
    """A table under heads that are escaped already; `notes` adds the note of a cell to its text."""
    lines = [_row(heads), _rule(len(heads) - 1)]
    lines += [
        _row([escape(row.label), *(escape(cell.both if notes else cell.text) for cell in row.cells)]) for row in rows
    ]
    return "\n".join(lines)


def _main_table(results: Results, summary: Summary) -> str:
    labels = [escape(arm.label) for arm in summary.arms.values()]
    lines = [_row(["", *labels]), _rule(len(labels))]
    for group in tables.main_table(results, summary):
        lines.append(_row([f"**{group.title}**", *[""] * len(labels)]))
        for row in group.rows:
            lines.append(_row([escape(row.label), *(escape(cell.both) for cell in row.cells)]))
    return "\n".join(lines)


def _writings(results: Results, summary: Summary) -> list[str]:
    """What each arm writes, where it was stored."""
    parts = ["## What they write", "Held-out texts, continued by each arm with the likeliest token each time."]
    for sample in (samples := continuations_section(results)):
        lines = [f"- Beginning: {escape(sample.prompt)}", f"- In the text: {escape(sample.reference)}"]
        lines += [f"- {escape(summary.arms[name].label)}: {escape(text)}" for name, text in sample.outputs]
        parts.append("\n".join(lines))
    return parts if samples else []


def _task_parts(results: Results, summary: Summary) -> list[str]:
    """The sections that only one task has."""
    labels = {name: escape(arm.label) for name, arm in summary.arms.items()}
    return [
        *_translation_parts(results, labels),
        *_classification_parts(results, summary, labels),
        *_chat_parts(results, labels),
        *_specialization_parts(results, summary),
    ]


def _translation_parts(results: Results, labels: dict[str, str]) -> list[str]:
    section = translation_section(results)
    if section is None:
        return []
    parts = ["## Language pairs"]
    for table in section.tables:
        parts.append(_table([escape(table.title), *section.references, *labels.values()], table.rows, notes=True))
    if section.bootstrap:
        parts.append(
            escape("* p below 0.05 for every seed by paired bootstrap against the baseline, over the sentences.")
        )
    return [*parts, "\n".join(f"- {escape(name)}: {escape(text)}" for name, text in section.signatures)]


def _classification_parts(results: Results, summary: Summary, labels: dict[str, str]) -> list[str]:
    section = classification_section(results, summary)
    names, rows = weight_rows(results)
    parts = []
    for found in section.confusions if section else ():
        parts.append(_table([f"{labels[found.arm]}: true", *map(escape, found.labels)], found.rows, notes=False))
    if section and section.label_rows:
        parts.append(_table(["F1 of label (test texts)", *labels.values()], section.label_rows, notes=False))
    if section and section.budget_rows:
        head, *rest = section.budget_rows
        parts.append(_table([head.label, *(cell.text for cell in head.cells)], rest, notes=False))
    if section and section.tests:
        parts.append("\n".join(f"- {labels[name]} by paired bootstrap: {escape(text)}" for name, text in section.tests))
    if names:
        lines = [_row(["weight of layer", *(labels[name] for name in names)]), _rule(len(names))]
        parts.append("\n".join([*lines, *(_row([str(layer), *cells]) for layer, cells in enumerate(rows))]))
    return ["## Classes", *parts] if parts else []


def _chat_parts(results: Results, labels: dict[str, str]) -> list[str]:
    section = chat_section(results)
    if section is None:
        return []
    heads = ["held-out answers", "before training", *labels.values()]
    parts = ["## Answers", escape(section.note), _table(heads, section.rows, notes=True)]
    for sample in section.samples:
        said = [f"- Question: {escape(sample.source)}", f"- In the data: {escape(sample.reference)}"]
        said += [f"- {labels.get(name, name)}: {escape(text)}" for name, text in sample.outputs]
        parts.append("\n".join(said))
    return parts


def _specialization_parts(results: Results, summary: Summary) -> list[str]:
    maps = specialization_maps(results, summary)
    if not maps:
        return []
    lines = [_row(["experts and groups", "mutual information (bits)", "at most"]), _rule(2)]
    for found in maps:
        name = escape(f"{found.label}, layer {found.layer}")
        lines.append(_row([name, number(found.bits, 3), number(found.max_bits, 2)]))
    return ["## What experts specialise in", "\n".join(lines)]


def _seed_table(results: Results, summary: Summary) -> str:
    table = facts.seed_table(results, summary)
    heads = [escape(f"{summary.arms[name].label}, {mode}") for name, mode in table.columns]
    rows = [_row([str(seed), *map(escape, cells)]) for seed, cells in table.rows]
    return "\n".join([_row(["seed", *heads]), _rule(len(heads)), *rows, _row(["mean", *table.mean])])
