"""The recipe dataclasses: frozen, and sound with nothing but their defaults."""

import dataclasses

import pytest

from mixtura.config import ArmConfig, Interrupted, Recipe, UserError, check_recipe
from mixtura.config.families import FAMILIES


def test_the_defaults_of_every_family_pass_the_checks():
    check_recipe(Recipe(name="all", arms={family: ArmConfig(family=family) for family in FAMILIES}))


@pytest.mark.parametrize("section", ["data", "model", "training", "search", "arms"])
def test_a_recipe_cannot_be_changed_after_it_is_made(section):
    recipe = Recipe(name="fixed", arms={"dense": ArmConfig(family="dense")})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(recipe, section, None)


def test_a_users_mistake_is_a_value_error_and_an_interruption_is_none():
    assert issubclass(UserError, ValueError) and not issubclass(Interrupted, ValueError)
