"""Verbs that say what to train, train and report: advise, compare, finetune, train, report."""

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    put_json,
    recipe_path,
    say,
)
from mixtura.errors import UserError, need, rank, rewording

if TYPE_CHECKING:  # help shows sooner without all of a recipe's keys
    from mixtura.config import AnyRecipe

_AMOUNT = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {
    **{unit: 1000.0**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1000.0**power for power, unit in enumerate(("k", "m", "g", "t"), start=1)},
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
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Plan the times of steps for it, such as H100, 8xH200 or a .toml file of yours.", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Your text: counts its tokens, to say how often it would be read.", show_default=False),
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
    from mixtura.comparison.advising import advise as ask
    from mixtura.comparison.advising import console_lines, plain_advice
    from mixtura.planning.evidence import load_evidence

    page = out or (Path("advice.html") if show else None)
    budget = amount(tokens, "tokens", _COUNTS)
    size = None if parameters is None else amount(parameters, "parameters", _COUNTS)
    room = None if memory is None else amount(memory, "memory", _BYTES)
    with rewording(_FLAGS):
        found = ask(
            tokens=budget,
            width=width,
            parameters=size,
            layers=layers,
            vocabulary=vocabulary,
            memory=room,
            hardware=hardware,
            text=text,
            token_by_token=not in_groups,
            out=page,
        )
    if as_json:
        put_json(plain_advice(found))
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
    return float(found[1].replace(",", "")) * units.get(unit, 1.0)


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

        _plan(load_recipe(path, changes), out, resume=resume)
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
            help="Your own .jsonl, .json, .csv, .tsv or .parquet, a folder of them or of a folder for each class, or a "
            "hub dataset as hub:NAME.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Your columns: SOURCE,TARGET for translation, with SOURCE_LANGUAGE,TARGET_LANGUAGE where rows name "
            "theirs; TEXT,LABEL for classification, with further labels where these are columns of 0 and 1; "
            "PROMPT,COMPLETION or MESSAGES for chat. TITLE+TEXT joins two."
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
        _plan(load_recipe(path, changes), out, resume=resume)
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
        _plan(loaded, out or Path("runs") / f"{loaded.name}-{name}", resume=resume, arm=name, seeds=(seed,))
        return
    with progress(None) as reporter:
        trained = mixtura.train(path, arm=arm, seed=seed, out=out, overrides=changes, resume=resume, reporter=reporter)
    from mixtura.report.wording import final_sentence

    for mode, measures in trained.result.final.items():
        say(final_sentence(mode, measures, task=getattr(load_recipe(path, changes), "task", "pretraining")))
    say(f"Model: {trained.checkpoint}")


def _plan(
    recipe: "AnyRecipe", out: Path | None, *, resume: bool, arm: str | None = None, seeds: tuple[int, ...] = ()
) -> None:
    """Says what a recipe would take."""
    from mixtura.comparison.plan import plan

    folder = out or Path("runs") / recipe.name
    with progress(None) as reporter:
        planned = plan(recipe, out=folder, resume=resume, reporter=reporter, arm=arm, seeds=seeds)
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
