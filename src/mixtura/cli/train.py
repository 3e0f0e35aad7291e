"""Verbs that train and report: compare, finetune, train, report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import mixtura
from mixtura.cli.application import (
    DryRunOption,
    ParallelOption,
    PresetOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    app,
    open_page,
    progress,
    recipe_path,
    say,
)
from mixtura.config import AnyRecipe
from mixtura.errors import need, rank


@app.command(rich_help_panel="Train")
def compare(
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
    arms_in_parallel: ParallelOption = 1,
    dry_run: DryRunOption = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Train the arms of a recipe on the same data, and report.

    Parts that are done are not repeated, and a comparison that was stopped goes on where it stopped.
    """
    path, changes = recipe_path(recipe, preset), overrides or []
    if dry_run:
        from mixtura.config import load_recipe

        _plan(load_recipe(path, changes), out)
        return
    _compare(path, out, changes, resume=resume, arms_in_parallel=arms_in_parallel, open_report=open_report)


@app.command(rich_help_panel="Train")
def finetune(
    task: Annotated[str, typer.Argument(help="translation, classification or chat.")],
    recipe: RecipeArgument = None,
    preset: Annotated[str, typer.Option(help="Without a recipe: the task's quick or default one.")] = "default",
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own .jsonl, .json, .csv, .tsv or .parquet, or a hub dataset as hub:NAME.", show_default=False
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Your columns: SOURCE,TARGET for translation, with SOURCE_LANGUAGE,TARGET_LANGUAGE where rows name "
            "theirs; TEXT,LABEL for classification; PROMPT,COMPLETION for chat."
        ),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Translation directions, such as en-de,de-en.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The pretrained model: a folder, a hub name, smollm2 or minilm.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
    arms_in_parallel: ParallelOption = 1,
    dry_run: DryRunOption = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Fine-tune for translation, classification or chat, and report.

    The finished models lie in the folder's arms; `mixtura translate`, `mixtura classify` and
    `mixtura generate --chat` use them.
    """
    from mixtura.config import finetune_recipe, load_recipe

    path, changes = finetune_recipe(
        task, recipe, preset=preset, data=data, columns=columns, pairs=pairs, base=base, overrides=overrides or []
    )
    if dry_run:
        _plan(load_recipe(path, changes), out)
        return
    _compare(path, out, changes, resume=resume, arms_in_parallel=arms_in_parallel, open_report=open_report)


@app.command(rich_help_panel="Use")
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished comparison.")],
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Write a report again, from results.json alone."""
    page = need("mixtura.report.html").report_folder(folder)
    typer.echo(f"Report: {page}")
    if open_report:
        open_page(page)


@app.command(rich_help_panel="Train")
def train(
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    arm: Annotated[str | None, typer.Option(help="Which arm of the recipe to train.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Data order and initialisation.")] = 0,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Train a checkpoint on: a folder, or a dense model by name. Alone, as in preset continue."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Your own text: a file or folder.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME-ARM")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
    dry_run: DryRunOption = False,
) -> None:
    """Train one arm of a recipe, or a checkpoint on, with one seed.

    The finished model lies in the folder's arms, where `mixtura evaluate`, `generate` and `export` find it.
    """
    from mixtura.config import load_recipe, one_arm, start_overrides

    if start is not None and recipe is None and preset is None:
        preset = "continue"
    path = recipe_path(recipe, preset)
    changes = [*start_overrides(path, arm=arm, start=start, text=text), *(overrides or [])]
    loaded = load_recipe(path, changes)  # so that a mistake is found before torch is imported
    name = one_arm(loaded, arm)
    if dry_run:
        _plan(loaded, out or Path("runs") / f"{loaded.name}-{name}", arm=name, seeds=(seed,))
        return
    with progress(None) as reporter:
        trained = mixtura.train(path, arm=arm, seed=seed, out=out, overrides=changes, resume=resume, reporter=reporter)
    from mixtura.report.measures import final_sentence

    for mode, measures in trained.result.final.items():
        say(final_sentence(mode, measures, task=getattr(load_recipe(path, changes), "task", "pretraining")))
    say(f"Model: {trained.checkpoint}")


def _plan(recipe: AnyRecipe, out: Path | None, *, arm: str | None = None, seeds: tuple[int, ...] = ()) -> None:
    """Says what a recipe would take."""
    from mixtura.comparison.plan import plan

    with progress(None) as reporter:
        planned = plan(recipe, out=out or Path("runs") / recipe.name, reporter=reporter, arm=arm, seeds=seeds)
    typer.echo("\n".join(planned.lines()))


def _compare(
    path: Path, out: Path | None, overrides: list[str], *, resume: bool, arms_in_parallel: int, open_report: bool
) -> None:
    """Runs a comparison, says its verdict and where the report is."""
    from mixtura.config import load_recipe

    loaded = load_recipe(path, overrides)  # so that a mistake is told before torch is imported
    from mixtura.comparison.runner import planned_steps

    folder = out or Path("runs") / loaded.name
    with progress(planned_steps(loaded)) as reporter:
        results = mixtura.compare(
            path,
            out=folder,
            overrides=overrides,
            resume=resume,
            command=shlex.join(["mixtura", *sys.argv[1:]]),
            arms_in_parallel=arms_in_parallel,
            reporter=reporter,
        )
    page = folder / "report.html"
    verdict = results.summary.verdict.headline if results.summary else ""
    say(f"\n{verdict}\n\nReport: {page}")
    if open_report and not rank():
        open_page(page)
