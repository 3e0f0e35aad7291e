"""Verbs about recipes: keys, init."""

import difflib
import shutil
from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.application import app
from mixtura.cli.lines import put_text
from mixtura.config import UserError
from mixtura.config.describe import SECTIONS, keys_of, lines_of


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(help="A section, such as training, or a key, such as top_k.", show_default=False)
    ] = None,
) -> None:
    """List the keys of recipes, with types and defaults."""
    wanted = (section or "").strip("[]").removeprefix("arms.NAME.")
    chosen = [each for each in SECTIONS if section is None or wanted in (each.name, each.name.rpartition(".")[2])]
    if section is not None and wanted == "arms":
        chosen = [each for each in SECTIONS if each.name == "arms.NAME"]
    width = max(100, shutil.get_terminal_size((140, 24)).columns)
    if chosen:
        typer.echo("\n\n".join("\n".join(lines_of(each, width=width)) for each in chosen))
        return
    name = wanted.rpartition(".")[2]
    found = [(each, key) for each in SECTIONS for key in keys_of(each.holds) if key.name == name]
    for each, key in found:
        where = f"{each.name}.{key.name}".lstrip(".")
        typer.echo(f"{where} ({each.kind}): {key.values}; default {key.default}. {key.says}".rstrip())
    if not found:
        names = sorted({each.name.replace("arms.NAME.", "") for each in SECTIONS if each.name})
        every = [*names, *(key.name for each in SECTIONS for key in keys_of(each.holds))]
        near = difflib.get_close_matches(name.lower(), every, n=1, cutoff=0.75)
        fix = f"did you mean '{near[0]}'?" if near else f"sections are {', '.join(names)}."
        raise UserError(f"There is no section or key '{section}' in a recipe: {fix}")


@app.command()
def init(
    data: Annotated[
        Path | None,
        typer.Option(help="Your text, or table of texts, sentence pairs or labelled texts.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="pretraining, translation or classification; else what the data looks like."),
    ] = None,
    columns: Annotated[str | None, typer.Option(help="As for `mixtura finetune`; else they are found.")] = None,
    pairs: Annotated[str | None, typer.Option(help="The direction of translation, such as en-de.")] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe to write; else it is printed.")] = None,
) -> None:
    """Write a commented recipe for your data."""
    from mixtura.data.sketch import sketch_recipe

    if out is not None and out.exists():
        raise UserError(f"'{out}' is there already: choose another file with --out.")
    name = out.stem if out is not None else data.stem if data is not None else "mine"
    text = sketch_recipe(data, task=task, columns=columns, pairs=pairs, name=name)
    if out is None:
        typer.echo(text, nl=False)
        return
    put_text(text, out)
    typer.echo(f"Recipe: {out}. Look at it, then: mixtura compare {out} --dry-run")
