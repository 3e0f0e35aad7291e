"""The page of a diagnosis: one HTML file without network, made of diagnosis.json and nothing else.

Texts are escaped by the template. Figures are plotly's JSON without colours; the page adds those of its theme. What is
written in sentences, tables and coloured texts is there without JavaScript, for the layer that tells most.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mixtura.diagnostics.excerpts import MINIMUM_COUNT, TOKEN_TYPES
from mixtura.diagnostics.findings import Diagnosis, ShownExcerpt, TypicalToken, bits
from mixtura.pages import page_environment
from mixtura.results.run import Association

Drawing = dict[str, Any]
"""A figure or a part of one, as plotly and the page's script take it."""

_TEMPLATES = Path(__file__).parent / "templates"
_CELLS_WITH_NUMBERS = 160

_MAP_COLOUR = ("map-high", "#6aaee6", "#1f6fae")
_COLOURS = (
    ("#0a6ebd", "#5cb3f2"),
    ("#c8501a", "#f5955c"),
    ("#0b7d5e", "#3ec79c"),
    ("#9c4a94", "#e19bd8"),
    ("#a37500", "#e8bf52"),
    ("#5b4fc4", "#a9a0f5"),
    ("#00808a", "#4fc6d0"),
    ("#b0305c", "#f286a9"),
    ("#5f7d0b", "#a9cf4a"),
    ("#7a5230", "#cfa37c"),
    ("#59636e", "#aab4c0"),
    ("#2f4b9c", "#8ea8f0"),
)
"""Of the experts, in turn, light theme and dark; the number beside a token names the expert."""


def render_page(results: Diagnosis) -> str:
    """The page as text, from the content of diagnosis.json."""
    environment = page_environment(_TEMPLATES)
    environment.filters |= {"bits": bits, "percent": percent, "shown": shown_token, "occurrences": occurrences}
    layers = results.layers
    first = results.verdict.layer
    return environment.get_template("diagnosis.html.j2").render(
        results=results,
        layers=layers,
        first=first,
        minimum_count=MINIMUM_COUNT,
        many_groups=len(results.groups) > 1,
        created=_date(results.created),
        palette=[_MAP_COLOUR, *((f"expert-{index}", *colours) for index, colours in enumerate(_COLOURS))],
        num_colours=len(_COLOURS),
        samples=[] if first is None else [_sample(sample, first) for sample in results.samples],
        expert_names=results.model.expert_names or [],
        page_data=_page_data(results),
        plotly_js=Markup(get_plotlyjs()),
    )


def percent(value: float) -> str:
    """A share in whole per cent, or with a decimal below ten."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if value < 0.0995 else f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def occurrences(token: TypicalToken) -> str:
    """How often a typical token occurs in the texts, from its rows in one expert and their share."""
    return f"{token.count / token.share:,.0f}"


def shown_token(text: str) -> str:
    """A token alone: what would be invisible is written as a sign."""
    signs = {
        "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
        "\t": "\N{RIGHTWARDS ARROW TO BAR}",
        "\N{REPLACEMENT CHARACTER}": "\N{MIDDLE DOT}",
    }
    for character, sign in signs.items():
        text = text.replace(character, sign)
    body = text.strip(" ")
    lead = len(text) - len(text.lstrip(" ")) if body else len(text)
    return "\N{OPEN BOX}" * lead + body


def _date(created: str) -> str:
    moment = datetime.datetime.fromisoformat(created)
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


@dataclass(frozen=True)
class _ColouredToken:
    text: str
    experts: list[int]
    """In the layer that is shown first."""
    every: str
    """Its first expert in every layer."""


@dataclass(frozen=True)
class _ColouredExcerpt:
    group: str
    tokens: list[_ColouredToken]


def _sample(sample: ShownExcerpt, first: int) -> _ColouredExcerpt:
    """A text as tokens with their experts in the layer that is shown first, and their first expert in every layer."""
    tokens = [
        _ColouredToken(
            text,
            sample.experts[first][place],
            ",".join(str(layer[place][0]) if layer[place] else "" for layer in sample.experts),
        )
        for place, text in enumerate(sample.pieces)
    ]
    return _ColouredExcerpt(sample.group, tokens)


def _page_data(results: Diagnosis) -> Drawing:
    """What the page's script draws: one figure over the layers, and for every layer its maps."""
    layers, names = results.layers, [group.name for group in results.groups]
    return {
        "first": results.verdict.layer,
        "overview": _overview(results) if layers else None,
        "numColours": len(_COLOURS),
        "maps": [
            {
                "groups": _heat_map(layer.share, names) if len(names) > 1 else None,
                "types": _heat_map(layer.token_types.share, list(TOKEN_TYPES)),
            }
            for layer in layers
        ],
    }


def _overview(results: Diagnosis) -> Drawing:
    """Bits about the groups and about kinds of tokens in every layer, each with what chance reaches."""
    layers = results.layers
    names = [f"layer {layer.layer}" for layer in layers]
    if len(set(names)) < len(names):  # several routings in one layer, as adapters have
        names = [layer.name for layer in layers]
    series: list[tuple[str, Sequence[Association], str, str]] = [
        ("the kind of token", [layer.token_types for layer in layers], "expert-1", "square")
    ]
    if len(results.groups) > 1:
        series.insert(0, (f"the {results.group_word}", layers, "expert-0", "circle"))
    traces = []
    for about, found, paint, symbol in series:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": _safe(about),
                "x": names,
                "y": [one.mutual_information for one in found],
                "marker": {"symbol": symbol, "size": 9},
                "meta": {"paint": paint},
                "hovertemplate": "%{x}: %{y:.3f} bits<extra></extra>",
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": _safe(f"{about}, by chance"),
                "x": names,
                "y": [one.chance_high for one in found],
                "line": {"dash": "dot", "width": 1.5},
                "meta": {"paint": paint},
                "hovertemplate": "%{x}: chance stays below %{y:.3f} bits<extra></extra>",
            }
        )
    layout = {
        "height": 300,
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": "Bits"}, "rangemode": "tozero"},
    }
    return {"data": traces, "layout": layout}


def _heat_map(share: list[list[float]], names: list[str]) -> Drawing:
    """Experts down, groups across; a column sums to one."""
    kept = [i for i in range(len(names)) if any(row[i] for row in share)]
    z = [[row[i] for i in kept] for row in share]
    numbers = len(z) * len(kept) <= _CELLS_WITH_NUMBERS
    return {
        "x": [_safe(names[i]) for i in kept],
        "y": [f"expert {expert}" for expert in range(len(z))],
        "z": z,
        "text": [[percent(value) if numbers else "" for value in row] for row in z],
        "height": 70 + max(15, min(30, 900 // len(z))) * len(z),
    }


def _safe(text: str) -> str:
    """Plotly reads some markup in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
