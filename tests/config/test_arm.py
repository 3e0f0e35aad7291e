"""The table of settings: what it declares is what layers, configurations, checks and reports know."""

import dataclasses
import inspect
import pkgutil
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from mixtura.config import ArmConfig, UserError
from mixtura.config.arm import SETTINGS, has_setting, model_settings
from mixtura.config.describe import settings_page, shown_settings
from mixtura.config.families import FAMILIES, MIXTURES
from mixtura.config.model_settings import CHOICES, written_out
from mixtura.models import MixtureConfig

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size", "intermediate_size", "activation", "gated"}


def test_all_fields_of_an_arm_but_its_family_are_in_the_table():
    assert ["family", *SETTINGS] == [field.name for field in dataclasses.fields(ArmConfig)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_takes_its_familys_settings_and_no_others(family):
    arguments = set(inspect.signature(pkgutil.resolve_name(FAMILIES[family].layer)).parameters)
    given = {setting.argument(family) for setting in SETTINGS.values()} - {None}
    assert arguments == given | SHAPE | set(FAMILIES[family].model_settings)


def test_a_models_configuration_has_every_setting_with_its_default():
    defaults = MixtureConfig().to_dict()
    for setting, field in model_settings():
        if field != "moe_intermediate_size":  # solved from a budget, so that a model always has one
            assert defaults[field] == setting.default


def test_a_dense_arm_has_no_setting_but_how_it_starts_and_is_trained():
    scales = {"feed_forward_scale", "down_scale", "dense_scale", "control", "control_of"}
    assert {name for name in SETTINGS if has_setting("dense", name)} == {"init_from", "learning_rate"} | scales


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.bounds])
def test_bounded_settings_refuse_what_lies_outside(name):
    for value in (-1.0, float("nan")):
        with pytest.raises(UserError, match=rf"'arms.a.{name}' is {value}: it "):
            SETTINGS[name].check(f"arms.a.{name}", value)
    SETTINGS[name].check(name, SETTINGS[name].default)


def test_words_that_no_layer_refuses_are_refused_by_the_configuration():
    assert set(CHOICES) == {"control", "route_by", "balance_over", "zero_fill_unit", "transition_to"}
    with pytest.raises(StrictDataclassError, match="balance_over is 'week': it must be one of batch, global"):
        MixtureConfig(balance_over="week")


@pytest.mark.parametrize("family", MIXTURES)
def test_an_arm_shows_what_its_family_always_shows(family):
    shown = shown_settings(ArmConfig(family=family, temperature=2.0, capacity_factor=1.5))
    assert ("temperature" in shown, "capacity_factor" in shown) == (
        family == "mixture_of_tokens",
        family == "token_choice",
    )
    assert shown["num_experts"] == 16 and not {"placement", "learning_rate", "moe_intermediate_size"} & set(shown)


def test_an_arm_shows_what_is_not_the_default():
    plain = {"num_experts": 16, "top_k": 1, "score_function": "softmax", "router_aux_loss_coef": 0.01}
    assert shown_settings(ArmConfig(family="token_choice")) == plain
    changed = {"num_shared_experts": 1, "normalize_top_k": True}
    assert shown_settings(ArmConfig(family="token_choice", **changed)) == plain | changed
    trained = {"zero_fill": 0.25, "alone_fraction": 0.03, "population_rate": 0.01}
    still = shown_settings(ArmConfig(family="mixture_of_tokens"))
    assert shown_settings(ArmConfig(family="mixture_of_tokens", **trained)) == still | trained


def test_an_arm_whose_languages_name_experts_shows_nothing_of_routers():
    arm = ArmConfig(family="token_choice", route_by="pair", num_experts=8, num_shared_experts=1)
    assert shown_settings(arm) == {"num_experts": 8, "route_by": "pair", "num_shared_experts": 1}


def test_the_table_written_out_is_the_table():
    names: dict = {}
    exec(compile(written_out(), "table", "exec"), names)
    plain = names["ModelSettings"]()
    assert {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)} == {
        field: setting.default for setting, field in model_settings()
    }
    assert names["CHOICES"] == CHOICES and names["FAMILY_NAMES"] == tuple(FAMILIES)


def test_the_documentation_has_the_table():
    """After a change: python -c 'from mixtura.config.describe import settings_page as page; print(page(), end="")'."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page()
