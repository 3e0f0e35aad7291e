"""The verb that says which family to train before anything is trained: advise."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.application import app, naming_flags, open_page
from mixtura.errors import UserError

_AMOUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {
    **{unit: 1000.0**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024.0**power for power, unit in enumerate(("b", "kib", "mib", "gib", "tib"))},
}
_FLAGS = {
    "Give either the width of the dense model or its parameters without embeddings.": (
        "Give either --width, of the dense model, or --parameters, its parameters without embeddings."
    ),
    **{f"{name} is": f"--{name} is" for name in ("tokens", "layers", "width", "parameters", "vocabulary", "memory")},
    "name another file.": "name another file with --out.",
}


@app.command(rich_help_panel="Train")
def advise(
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 30M.")],
    width: Annotated[
        int | None, typer.Option(help="Hidden size of the dense model, which sets the FLOPs.", show_default=False)
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Its parameters without embeddings, such as 2M.", show_default=False)
    ] = None,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the vocabulary, for the memory.")] = 1024,
    memory: Annotated[
        str | None, typer.Option(help="Most memory for weights, gradients and AdamW's moments, such as 8GB.")
    ] = None,
    in_groups: Annotated[
        bool, typer.Option("--in-groups", help="Served in batches that fill groups, so MoT may run as it trains.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A page to write, such as advice.html.", show_default=False)] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, with every number unrounded.")] = False,
) -> None:
    """Say which family to train at a size and a budget.

    The answer is read from runs of this project and the law fitted to them, and says what it stands on.
    """
    from mixtura.comparison.advice_words import console_lines
    from mixtura.comparison.advising import advise as ask
    from mixtura.comparison.advising import plain_advice
    from mixtura.planning.evidence import load_evidence

    page = out or (Path("advice.html") if show else None)
    budget = amount(tokens, "tokens", _COUNTS)
    size = None if parameters is None else amount(parameters, "parameters", _COUNTS)
    room = None if memory is None else amount(memory, "memory", _BYTES)
    with naming_flags(_FLAGS):
        found = ask(
            tokens=budget,
            width=width,
            parameters=size,
            layers=layers,
            vocabulary=vocabulary,
            memory=room,
            token_by_token=not in_groups,
            out=page,
        )
    if as_json:
        typer.echo(json.dumps(plain_advice(found), indent=1))
    else:
        typer.echo("\n".join(console_lines(found, load_evidence())))
    if page is not None:
        typer.echo(f"Page: {page}", err=True)
        if show:
            open_page(page)


def amount(text: str, flag: str, units: dict[str, float]) -> float:
    """The number that a text such as "30M" or "8 GB" means.

    Raises:
        UserError: it is none.
    """
    found = _AMOUNT.fullmatch(text.strip())
    unit = found[2].lower() if found else ""
    if found is None or (unit not in units and unit):
        example = "8GB" if "gb" in units else "30M"
        raise UserError(f"--{flag} is '{text}', which is no amount: give a number such as {example}.")
    return float(found[1]) * units.get(unit, 1.0)
