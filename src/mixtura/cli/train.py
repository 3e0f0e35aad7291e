"""Verbs that train: compare, finetune, train."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.application import (
    DryRunOption,
    PresetOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    app,
    open_page,
    progress,
    recipe_path,
)
from mixtura.config import TASKS, AnyRecipe, UserError, data_overrides, load_recipe, preset_path


@app.command()
def compare(
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
    dry_run: DryRunOption = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Train the arms of a recipe on the same data, and report.

    Parts that are done are not repeated, and a comparison that was stopped goes on where it stopped.
    """
    path, changes = recipe_path(recipe, preset), overrides or []
    if dry_run:
        _plan(load_recipe(path, changes), out)
        return
    _compare(path, out, changes, resume=resume, open_report=open_report)


@app.command()
def finetune(
    task: Annotated[str, typer.Argument(help="translation or classification.")],
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
        typer.Option(help="Your columns: SOURCE,TARGET for translation, TEXT,LABEL for classification."),
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
    dry_run: DryRunOption = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Fine-tune for translation or classification, and report.

    The finished models lie in the folder's arms; `mixtura translate` and `mixtura classify` use them.
    """
    if task not in TASKS:
        raise UserError(f"There is no task '{task}': choose one of {', '.join(TASKS)}.")
    if recipe is None and preset not in ("quick", "default"):
        raise UserError(f"There is no preset '{preset}' for {task}: choose quick or default, or give a recipe's path.")
    path = recipe or preset_path(task if preset == "default" else f"{task}-{preset}")
    if recipe is None and task == "translation" and base is not None:
        # A pretrained model is adapted; what the presets compare are models from scratch.
        path = path.with_name("translation-smollm2.toml")
    changes = [*data_overrides(task, data=data, columns=columns, pairs=pairs, base=base), *(overrides or [])]
    found = load_recipe(path, changes)
    if (kind := getattr(found, "task", "pretraining")) != task:
        raise UserError(f"'{path}' is a recipe for {kind}: give one for {task}.")
    if dry_run:
        _plan(found, out)
        return
    _compare(path, out, changes, resume=resume, open_report=open_report)


@app.command()
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
    from mixtura.comparison.runner import train_arm

    if start is not None and recipe is None and preset is None:
        preset = "continue"
    path = recipe_path(recipe, preset)
    loaded = load_recipe(path, [*_start_overrides(path, arm, start, text), *(overrides or [])])
    if arm is None and len(loaded.arms) > 1:
        raise UserError(f"The recipe has {len(loaded.arms)} arms: choose one with --arm {'|'.join(loaded.arms)}.")
    name = arm or next(iter(loaded.arms))
    if name not in loaded.arms:
        raise UserError(f"The recipe has no arm '{name}': choose one of {', '.join(loaded.arms)}.")
    folder = out or Path("runs") / f"{loaded.name}-{name}"
    if dry_run:
        _plan(loaded, folder, arm=name, seeds=(seed,))
        return
    with progress(None) as reporter:
        result = train_arm(loaded, name, seed=seed, out=folder, resume=resume, reporter=reporter)
    for mode, losses in result["final"].items():
        typer.echo(
            f"held-out loss, {mode}: {losses['loss']:.4f} nats a token, {losses['bits_per_byte']:.4f} bits a byte"
        )
    typer.echo(f"Model: {folder / 'arms' / name / f'seed{seed}' / 'checkpoint'}")


def _start_overrides(path: Path, arm: str | None, start: str | None, text: Path | None) -> list[str]:
    """The changes of a recipe that --from and --text ask for, in the form of --set; JSON's strings are TOML's."""
    changes = []
    if start is not None:
        arms = list(load_recipe(path).arms)
        if arm is None and len(arms) > 1:
            raise UserError(
                f"The recipe has {len(arms)} arms: choose which to start from there, --arm {'|'.join(arms)}."
            )
        changes.append(f"arms.{arm or arms[0]}.init_from={json.dumps(start)}")
    if text is not None:
        changes += ['data.source="local"', f"data.path={json.dumps(str(text))}"]
    return changes


def _plan(recipe: AnyRecipe, out: Path | None, *, arm: str | None = None, seeds: tuple[int, ...] = ()) -> None:
    """Says what a recipe would take."""
    from mixtura.comparison.plan import plan

    with progress(None) as reporter:
        planned = plan(recipe, out=out or Path("runs") / recipe.name, reporter=reporter, arm=arm, seeds=seeds)
    typer.echo("\n".join(planned.lines()))


def _compare(path: Path, out: Path | None, overrides: list[str], *, resume: bool, open_report: bool) -> None:
    """Runs a comparison, says its verdict and where the report is."""
    from mixtura.comparison.runner import compare as run_comparison
    from mixtura.comparison.runner import planned_steps

    loaded = load_recipe(path, overrides)
    folder = out or Path("runs") / loaded.name
    with progress(planned_steps(loaded)) as reporter:
        results = run_comparison(
            path,
            out=folder,
            overrides=overrides,
            resume=resume,
            command=shlex.join(["mixtura", *sys.argv[1:]]),
            reporter=reporter,
        )
    report = folder / "report.html"
    typer.echo(f"\n{results['summary']['verdict']['headline']}\n\nReport: {report}")
    if open_report:
        open_page(report)
