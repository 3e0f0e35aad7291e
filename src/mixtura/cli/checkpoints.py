"""Verbs that turn one checkpoint into another: export, verify."""

from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.application import ModelArgument, app, hush


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write, which does not exist yet.")],
    to: Annotated[
        str,
        typer.Option(
            help="mixtral, granite_moe, qwen2_moe, qwen3_moe, glm4_moe, llama, mistral, qwen2, qwen3; remote_code "
            "brings its own code; auto takes the first that holds the model exactly."
        ),
    ] = "auto",
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub name of the model that this one was made from, for the card.", show_default=False),
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Gigabytes in a weight file, at most.")] = 5.0,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare with the source before the folder is put in place.")
    ] = True,
) -> None:
    """Write a checkpoint as transformers, vLLM and llama.cpp know it, or with its own code.

    Nothing is written unless the export computes what the source computes.
    """
    from mixtura.conversion.export import export as run_export

    hush()
    exported = run_export(
        model, out, to=to, base_model=base_model, max_shard_bytes=round(shard_size * 1e9), check=check
    )
    typer.echo(f"Exported to {out} as {exported.container}.")
    if exported.receipt is not None:
        typer.echo(f"\n{exported.receipt.table()}")


@app.command()
def verify(
    source: Annotated[Path, typer.Argument(help="The model that was exported, or the dense one it was made from.")],
    exported: Annotated[Path, typer.Argument(help="The folder to judge.")],
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="transformers, vllm or llama.cpp, or NAME=PYTHON for an interpreter that has it. Repeatable.",
            show_default="transformers",
        ),
    ] = None,
    converter: Annotated[
        Path | None, typer.Option(help="For llama.cpp: the folder of its convert_hf_to_gguf.py.", show_default=False)
    ] = None,
) -> None:
    """Compare an export's log-probabilities with its source's, in every engine asked for.

    Leaves receipt.json and a table in the export's card. Exits with 1 where an engine computes something else.
    """
    from mixtura.conversion.engines import parse_engine
    from mixtura.conversion.verification import verify as run_verify

    hush()
    receipt = run_verify(source, exported, [parse_engine(name, converter) for name in engines or ["transformers"]])
    typer.echo(receipt.table())
    if not receipt.passed:
        typer.echo(f"\nmixtura: {receipt.complaint()}", err=True)
        raise typer.Exit(1)
