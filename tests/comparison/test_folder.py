"""The folder of a comparison: whose it is, what starting over removes, and files that are whole or not there."""

import dataclasses
import json
import tomllib

import pytest

from mixtura.comparison.folder import check_same_data, environment, now, open_folder, store_fitted
from mixtura.config import UserError, recipe_from_dict
from mixtura.data.prepare import prepare_data
from mixtura.files import write_json, write_text
from mixtura.results.stored import read_json
from mixtura.tasks.language_modelling.experiment import Pretraining


@pytest.fixture
def begun(tiny_recipe, tmp_path):
    """A folder in which a first run has begun, and its recipe."""
    out, recipe = tmp_path / "runs" / "tiny", tiny_recipe()
    open_folder(out, recipe, resume=True)
    write_json(out / "arms" / "dense" / "seed0" / "run.json", {})
    return out, recipe


def test_opening_writes_the_resolved_recipe_and_the_environment(begun):
    out, recipe = begun
    assert recipe_from_dict(tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))) == recipe
    assert read_json(out / "environment.json").keys() == environment().keys()


def test_the_same_recipe_opens_its_folder_again(begun):
    open_folder(*begun, resume=True)
    assert (begun[0] / "arms" / "dense" / "seed0" / "run.json").exists()


def test_a_folder_goes_on_with_the_recipe_as_given_and_as_fitted(begun):
    out, given = begun
    fitted = dataclasses.replace(given, training=dataclasses.replace(given.training, batch_size=2))
    store_fitted(out, given, fitted)
    for recipe in (given, fitted):
        open_folder(out, recipe, resume=True)
        store_fitted(out, recipe, fitted)
        assert tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))["training"]["batch_size"] == 2
    other = dataclasses.replace(given, training=dataclasses.replace(given.training, steps=9))
    with pytest.raises(UserError, match=r"training\.steps = 4, now it is 9"):
        open_folder(out, other, resume=True)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("training", {"steps": 9}, r"training\.steps = 4, now it is 9"),
        ("model", {"hidden_size": 64}, r"model\.hidden_size = 32, now it is 64"),
        ("model", {"num_key_value_heads": 1}, r"model\.num_key_value_heads = None, now it is 1"),
        ("data", {"vocab_size": 301}, r"data\.vocab_size = 300, now it is 301"),
        ("search", {"learning_rates": (1e-3,)}, r"search\.learning_rates = \[\], now it is \[0\.001\]"),
    ],
)
def test_another_recipe_is_refused_with_the_key_that_differs(begun, section, values, words):
    out, recipe = begun
    other = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})
    with pytest.raises(UserError, match=words):
        open_folder(out, other, resume=True)
    open_folder(out, recipe, resume=True)


def test_another_recipe_is_refused_once_a_trial_of_the_search_has_begun(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(), tmp_path / "out"
    open_folder(out, recipe, resume=True)
    write_json(out / "search" / "dense" / "rate0.001" / "seed1000" / "run.json", {})
    with pytest.raises(UserError, match=r"training\.steps = 4, now it is 9"):
        open_folder(out, tiny_recipe(steps=9), resume=True)
    open_folder(out, recipe, resume=True)


def test_a_text_that_changed_since_the_first_trial_is_refused(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(), tmp_path / "out"
    check_same_data(out, Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)))
    write_json(out / "search" / "dense" / "rate0.001" / "seed1000" / "run.json", {})
    other = prepare_data(dataclasses.replace(recipe.data, max_bytes=20_000), cache_dir=None)
    with pytest.raises(UserError, match=r"The text has changed since .* was begun"):
        check_same_data(out, Pretraining(recipe, other))


def test_a_setting_that_was_turned_off_is_another_recipe(begun):
    out, recipe = begun
    arms = {name: dataclasses.replace(arm, alone_top_k=None) for name, arm in recipe.arms.items()}
    with pytest.raises(UserError, match=r"arms\.dense\.alone_top_k = 2, now it is 'none'"):
        open_folder(out, dataclasses.replace(recipe, arms=arms), resume=True)


def test_starting_over_removes_what_is_ours_and_nothing_else(begun):
    out, recipe = begun
    write_json(out / "timing.json", {})
    write_text(out / "notes.txt", "mine")
    open_folder(out, dataclasses.replace(recipe, seeds=(7,)), resume=False)
    assert {path.name for path in out.iterdir()} == {"recipe.toml", "environment.json", "notes.txt"}


def test_a_folder_of_other_files_is_left_alone(tiny_recipe, tmp_path):
    write_text(tmp_path / "notes.txt", "mine")
    for resume in (True, False):
        with pytest.raises(UserError, match="has files but is no comparison's folder"):
            open_folder(tmp_path, tiny_recipe(), resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_recipe_is_refused_and_starting_over_helps(begun):
    out, recipe = begun
    write_text(out / "recipe.toml", "[training\n")
    with pytest.raises(UserError, match=r"recipe\.toml' is damaged.*--no-resume"):
        open_folder(out, recipe, resume=True)
    open_folder(out, recipe, resume=False)


def test_the_environment_can_be_stored_and_names_versions(tmp_path):
    stored = json.loads(json.dumps(environment()))
    contract = {"mixtura", "python", "torch", "transformers", "platform", "processor", "cpu_count", "threads", "device"}
    assert stored.keys() >= contract and all(stored[key] for key in contract)


def test_the_time_is_in_utc_to_the_second():
    assert now().endswith("+00:00") and len(now()) == len("2026-11-23T12:00:00+00:00")


def test_a_text_that_changed_since_the_first_run_is_refused(begun):
    out, recipe = begun
    data = prepare_data(recipe.data, cache_dir=None)
    other = prepare_data(dataclasses.replace(recipe.data, max_bytes=20_000), cache_dir=None)
    check_same_data(out, Pretraining(recipe, data))
    check_same_data(out, Pretraining(recipe, data))
    with pytest.raises(UserError, match=r"The text has changed since .* was begun"):
        check_same_data(out, Pretraining(recipe, other))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_text_of_the_same_size_is_told_by_its_tokens(begun, split):
    out, recipe = begun
    data = prepare_data(recipe.data, cache_dir=None)
    packed = getattr(data, split)
    turned = dataclasses.replace(packed, sequences_NL=packed.sequences_NL[::-1].copy())
    check_same_data(out, Pretraining(recipe, data))
    with pytest.raises(UserError, match=r"was begun \(tokens was .*--no-resume to start over"):
        check_same_data(out, Pretraining(recipe, dataclasses.replace(data, **{split: turned})))


def test_the_text_may_change_until_a_run_has_begun_and_when_starting_over(begun):
    out, recipe = begun
    texts = [
        prepare_data(dataclasses.replace(recipe.data, max_bytes=size), cache_dir=None) for size in (20_000, 30_000)
    ]
    check_same_data(out, Pretraining(recipe, texts[0]))
    open_folder(out, recipe, resume=False)
    for data in texts:
        check_same_data(out, Pretraining(recipe, data))
