"""Every recipe that ships is one that loads."""

from pathlib import Path

import pytest

from mixtura.config import PRESETS, load_recipe, recipe_to_toml

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@each_recipe
def test_recipe_loads_under_its_own_name(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@each_recipe
def test_recipe_says_what_it_is_for(path: Path) -> None:
    assert load_recipe(path).description


@each_recipe
def test_resolved_recipe_reads_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "resolved.toml"
    copy.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


@each_recipe
def test_recipe_compares_several_arms(path: Path) -> None:
    # `continue` is what `mixtura train --from` does with one checkpoint.
    assert (len(load_recipe(path).arms) > 1) == (path.stem != "continue")


def test_every_preset_has_a_recipe() -> None:
    assert set(PRESETS) <= {path.stem for path in RECIPES}
