"""The recipes for GPUs load, and the plan in the header of each is what `mixtura plan` says today."""

from pathlib import Path

import pytest

from mixtura.config import load_recipe
from mixtura.planning.bill import plan_recipe
from mixtura.planning.hardware import read_hardware

RECIPES = Path(__file__).parents[2] / "recipes"
HARDWARE = {
    "gpu-small": "8xH100",
    "paper/mot-mini": "1xA100",
    "paper/mot-medium": "2xA100",
    "paper/mot-base": "4xA100",
}
PUBLISHED = {
    "paper/mot-mini": {"dense": 29.0e6, "mot_32_16": 94.5e6},
    "paper/mot-medium": {"dense": 76.8e6, "mot_8": 135.5e6, "mot_32": 336.9e6, "mot_32_8": 337.4e6, "mot_128": 1142e6},
    "paper/mot-base": {"dense": 162.4e6, "mot_32": 1040e6, "mot_32_16": 1042e6, "mot_64_32": 1956e6},
}
"""Parameters of the authors' models, with learnt positions, which ours do not have."""


def header_of(name: str) -> str:
    """The comment: the command, and what it prints up to the explanation of its columns."""
    planned = plan_recipe(load_recipe(RECIPES / f"{name}.toml"), read_hardware(HARDWARE[name]))
    lines = planned.lines()
    table = "\n".join(lines).split("\nLayout: ")[0].rstrip().splitlines()
    command = f"# mixtura plan recipes/{name}.toml --hardware {HARDWARE[name]}"
    return "\n".join([command, *(f"# {line}".rstrip() for line in table)])


@pytest.mark.parametrize("name", HARDWARE)
def test_the_header_is_the_plan(name):
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    assert header_of(name) in text, f"the plan is now\n{header_of(name)}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models_have_the_papers_parameters(name):
    planned = plan_recipe(load_recipe(RECIPES / f"{name}.toml"), read_hardware("1xA100")).plain_form()
    found = {arm["arm"]: arm["parameters"] for arm in planned["arms"]}
    for arm, parameters in PUBLISHED[name].items():
        assert found[arm] == pytest.approx(parameters, rel=0.005)


def test_every_recipe_for_gpus_is_among_them():
    assert {f"paper/{path.stem}" for path in (RECIPES / "paper").glob("*.toml")} == set(PUBLISHED)
