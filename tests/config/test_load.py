"""Recipes from TOML: keys, types, overrides and the way back."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtura.config import (
    PRESETS,
    UserError,
    data_overrides,
    load_recipe,
    preset_path,
    recipe_from_dict,
    recipe_to_dict,
    recipe_to_toml,
)

SMALL = 'seeds = [0]\n[arms.dense]\nfamily = "dense"\n'


@pytest.fixture
def load(tmp_path):
    def load(*overrides, text=SMALL):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load


def test_a_recipe_without_a_name_takes_its_files(load):
    assert load().name == "mine" and load("name=other").name == "other"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.steps=7", "training", "steps", 7),
        ("training.learning_rate=1e-2", "training", "learning_rate", 0.01),
        ("training.weight_decay=1", "training", "weight_decay", 1.0),
        ("training.activation_checkpointing=true", "training", "activation_checkpointing", True),
        ("data.text_column=review", "data", "text_column", "review"),
        ("search.learning_rates=[1e-3, 1]", "search", "learning_rates", (1e-3, 1.0)),
        ("model.num_key_value_heads=2", "model", "num_key_value_heads", 2),
        ("model.num_key_value_heads=none", "model", "num_key_value_heads", None),
    ],
    ids=["int", "float", "int as float", "bool", "bare text", "list", "optional", "none"],
)
def test_an_override_sets_one_key(load, override, section, key, value):
    assert getattr(getattr(load(override), section), key) == value


def test_an_override_may_add_an_arm(load):
    recipe = load("arms.moe.family=token_choice", "arms.moe.top_k=2")
    assert recipe.arms["moe"].top_k == 2 and list(recipe.arms) == ["dense", "moe"]


def test_an_override_into_a_value_is_refused(load):
    with pytest.raises(UserError, match=r"'seeds' is a value, not a section"):
        load("seeds.first=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0]\n", "lacks 'arms'"),
        ("[arms.dense]\n", r"lacks 'arms\.dense\.family'"),
        ("arms = 3\n", "'arms' must be a section of named arms"),
        ("data = 3\n" + SMALL, "'data' must be a section"),
        (SMALL + "top_kk = 1\n", r"'arms\.dense\.top_kk': did you mean 'arms\.dense\.top_k'"),
        (SMALL + "qqqq = 1\n", "known keys are"),
        ("seeds = 0\n[arms.dense]\nfamily = 'dense'\n", "must be a list"),
        ("seeds = [true]\n[arms.dense]\nfamily = 'dense'\n", "must be a whole number"),
    ],
    ids=["no arms", "no family", "arms a number", "data a number", "near key", "far key", "no list", "bool for int"],
)
def test_what_is_wrong_is_named(load, text, message):
    with pytest.raises(UserError, match=message):
        load(text=text)


def test_a_recipe_survives_the_way_to_toml_and_back(load, tmp_path):
    recipe = load("model.num_key_value_heads=2", "arms.dense.learning_rate=1e-3", "search.learning_rates=[1e-3]")
    assert load(text=recipe_to_toml(recipe)) == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_presets_are_found_and_others_are_not():
    assert preset_path("quick").is_file()
    with pytest.raises(UserError, match="There is no preset 'fast'"):
        preset_path("fast")


@pytest.mark.parametrize("own", ["data.path=mine.jsonl", "base.name=mine"])
def test_a_preset_on_data_or_a_model_of_ones_own_does_not_describe_its_own(own):
    assert "Python" in load_recipe(preset_path("chat"), ["training.steps=5"]).description
    changes = ["data.source=local", own] if own.startswith("data") else [own]
    assert not load_recipe(preset_path("chat"), changes).description


def test_the_last_of_two_overrides_wins(load):
    assert load("training.steps=7", "training.steps=9").training.steps == 9


def test_text_after_the_first_equals_sign_is_the_value(load):
    assert load("description=a=b").description == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "write --set section.key=value"),
        ("=3", "write --set section.key=value"),
        ("training.steps=1.5", r"'training\.steps' is 1\.5: it must be a whole number"),
        ("training.steps=true", r"'training\.steps' is True: it must be a whole number"),
        ("training.learning_rate=fast", "it must be a number"),
        ("training.activation_checkpointing=1", "it must be true or false"),
        ("description=1", "it must be a text"),
        ("training.dtype=float16", "it must be one of float32, bfloat16"),
        ("arms.dense=3", r"'arms\.dense' must be a section"),
        ("arms.new.top_k=1", r"lacks 'arms\.new\.family'"),
        ("traning.steps=1", "did you mean 'training'"),
    ],
)
def test_a_wrong_override_is_refused_with_its_fix(load, override, message):
    with pytest.raises(UserError, match=message):
        load(override)


def test_what_was_turned_off_is_still_off_after_the_way_to_toml_and_back(load):
    recipe = load("arms.mot.family=mixture_of_tokens", "arms.mot.alone_top_k=none")
    assert recipe.arms["mot"].alone_top_k is None
    assert load(text=recipe_to_toml(recipe)) == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=30),
    rate=st.floats(1e-12, 1e3),
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=5, unique=True),
)
def test_any_text_number_and_list_survives_the_way_to_toml_and_back(text, rate, seeds):
    table = {"name": "any", "description": text, "seeds": seeds, "training": {"learning_rate": rate}}
    recipe = recipe_from_dict(table | {"arms": {"dense": {"family": "dense"}}})
    assert recipe_from_dict(tomllib.loads(recipe_to_toml(recipe))) == recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_under_its_name(preset):
    assert load_recipe(preset_path(preset)).name == preset


def test_own_data_is_named_by_two_flags():
    changes = data_overrides("translation", data="my pairs.csv", columns="english, german", pairs="en-de", base=None)
    recipe = load_recipe(preset_path("translation-quick"), changes)
    assert (recipe.data.source, recipe.data.path) == ("local", "my pairs.csv")
    assert (recipe.data.source_column, recipe.data.target_column) == ("english", "german")
    assert recipe.data.pairs == ("en-de",)


def test_a_hub_dataset_and_a_base_are_named_by_flags():
    changes = data_overrides("classification", data="hub:imdb", columns="text,label", pairs=None, base='C:\\"odd"')
    recipe = load_recipe(preset_path("classification-quick"), changes)
    assert (recipe.data.source, recipe.data.name, recipe.base.name) == ("hub", "imdb", 'C:\\"odd"')


def test_columns_of_flags_follow_that_of_texts():
    changes = data_overrides("classification", data=None, columns="text,toxic, rude", pairs=None, base=None)
    assert changes == ['data.text_column="text"', 'data.label_columns=["toxic", "rude"]']


@pytest.mark.parametrize("columns", ["text", "a,,c", "text,"])
def test_columns_must_be_two(columns):
    with pytest.raises(UserError, match="give two names, TEXT,LABEL"):
        data_overrides("classification", data=None, columns=columns, pairs=None, base=None)


def test_classification_has_no_directions():
    with pytest.raises(UserError, match="has no directions"):
        data_overrides("classification", data=None, columns=None, pairs="en-de", base=None)


@pytest.mark.parametrize(
    ("columns", "pairs", "expected"),
    [
        ("English,German", None, '["en-de"]'),
        ("en_text,deu", None, '["en-de"]'),
        ("a,b", None, None),
        ("en,de", "fr-nl", '["fr-nl"]'),
    ],
)
def test_columns_named_after_languages_say_the_direction(columns, pairs, expected):
    changes = data_overrides("translation", data="x.csv", columns=columns, pairs=pairs, base=None)
    assert [change.partition("=")[2] for change in changes if change.startswith("data.pairs")] == (
        [expected] if expected else []
    )
