"""The learning-rate search: the same effort for every arm, and a record that is used only where it belongs."""

import dataclasses
import shutil

import pytest

from mixtura.comparison import runs
from mixtura.comparison.runner import compare
from mixtura.comparison.search import fingerprint, load_record, record_path, search_rates_and_scales
from mixtura.config import UserError, load_recipe, preset_path, recipe_from_dict, recipe_to_dict
from mixtura.files import write_json
from mixtura.results.document import read_json
from mixtura.training import TrainingDiverged


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Leaves out the report, which takes longer than the training here."""
    monkeypatch.setattr("mixtura.report.html.write_report", lambda results, out: None)


def with_search(recipe, rates, seeds=(7,), **search):
    search |= {"learning_rates": rates, "steps": 2, "seeds": list(seeds)}
    table = recipe_to_dict(recipe) | {"search": search}
    return recipe_from_dict(table)


def own(recipe, **rates):
    """The rate of every arm without a search: what is named, and 0.004."""
    return {name: rates.get(name, 4e-3) for name in recipe.arms}


def test_every_arm_may_try_multiples_of_its_own_rate(tiny_recipe):
    recipe = with_search(tiny_recipe(), [], rate_multiples=[3, 0.5, 1])
    rates = own(recipe, dense=1e-3)
    records = search_rates_and_scales(recipe, rates, lambda name, rate, *_: abs(rate / rates[name] - 1))
    assert [trial.learning_rate for trial in records["dense"].trials] == [5e-4, 1e-3, 3e-3]
    assert [trial.learning_rate for trial in records["mixture_of_tokens"].trials] == [2e-3, 4e-3, 1.2e-2]
    assert {name: record.best for name, record in records.items()} == rates
    assert not records["dense"].at_edge and recipe.search.trials == 3
    with pytest.raises(UserError, match=r"even 0.0005: add lower ones to 'search.rate_multiples'"):
        search_rates_and_scales(recipe, rates, lambda name, *_: float("inf") if name == "dense" else 3.0)


def test_a_comparison_trains_at_the_best_multiple(tiny_recipe, tmp_path):
    recipe = with_search(tiny_recipe(), [], rate_multiples=[0.5, 1], steps=1)
    results = compare(recipe, out=tmp_path / "run")
    for name, arm in results.arms.items():
        record = arm.learning_rate_search
        own_rate = recipe.arms[name].learning_rate or recipe.training.learning_rate
        assert record is not None and [trial.learning_rate for trial in record.trials] == [own_rate / 2, own_rate]
        assert arm.learning_rate == record.best == arm.runs[0].learning_rate


def test_every_arm_tries_every_rate_and_keeps_the_best(tiny_recipe):
    recipe, tried = with_search(tiny_recipe(), [4e-3, 1e-3, 2e-3]), []

    def run_trial(name, rate, scale, seed):
        assert scale is None
        tried.append((name, rate, seed))
        return abs(rate - (1e-3 if name == "dense" else 2e-3))

    records = search_rates_and_scales(recipe, own(recipe), run_trial)
    assert tried == [(name, rate, 7) for name in recipe.arms for rate in (1e-3, 2e-3, 4e-3)]
    assert records["dense"].best == 1e-3 and records["dense"].at_edge
    assert records["mixture_of_tokens"].best == 2e-3 and not records["mixture_of_tokens"].at_edge
    assert records["dense"].steps == 2 and records["dense"].seeds == [7]


def test_the_mean_over_the_seeds_of_the_search_decides(tiny_recipe):
    recipe = with_search(tiny_recipe(), [1e-3, 2e-3], seeds=(7, 8))
    losses = {(1e-3, 7): 1.0, (1e-3, 8): 4.0, (2e-3, 7): 2.0, (2e-3, 8): 2.5}
    record = search_rates_and_scales(recipe, own(recipe), lambda _, rate, __, seed: losses[rate, seed])["dense"]
    assert [trial.loss for trial in record.trials] == [2.5, 2.25] and record.best == 2e-3


def test_a_rate_that_diverged_counts_as_lost(tiny_recipe):
    recipe = with_search(tiny_recipe(), [1e-3, 2e-3])
    record = search_rates_and_scales(recipe, own(recipe), lambda _, rate, *__: float("inf") if rate > 1e-3 else 3.0)[
        "dense"
    ]
    assert [trial.loss for trial in record.trials] == [3.0, None] and record.best == 1e-3


def test_a_searched_comparison_trains_at_the_best_rates_and_stores_the_record(tiny_recipe, tmp_path, monkeypatch):
    original = runs.run_arm

    def run_arm(arm, *, learning_rate, **options):
        if learning_rate == 9e-1:
            raise TrainingDiverged("The loss is no number.", step=1)
        return original(arm, learning_rate=learning_rate, **options)

    monkeypatch.setattr(runs, "run_arm", run_arm)
    recipe = with_search(tiny_recipe(), [1e-3, 5e-3, 9e-1])
    results = compare(recipe, out=tmp_path / "out")
    stored = read_json(tmp_path / "out" / "search" / "record.json")
    assert stored["fingerprint"] == fingerprint(recipe)
    for name, arm in results.arms.items():
        assert arm.learning_rate == arm.learning_rate_search.best == stored["arms"][name]["best"] != 9e-1
        assert arm.learning_rate_search.trials[-1].loss is None
        assert arm.runs[0].learning_rate == arm.learning_rate


def test_a_rate_that_blows_up_a_model_at_its_last_step_counts_as_lost(tiny_recipe, tmp_path):
    """The training loss is still a number then, and the held-out loss has no perplexity that JSON could hold."""
    table = recipe_to_dict(tiny_recipe()) | {"search": {"learning_rates": [1e-3, 1e4], "steps": 1}}
    results = compare(recipe_from_dict(table), out=tmp_path / "out")
    for arm in results.arms.values():
        trials = arm.learning_rate_search.trials
        assert trials[0].loss > 0 and trials[1].loss is None
        assert arm.learning_rate == 1e-3


@pytest.mark.parametrize(("best", "at_edge"), [(1e-3, True), (2e-3, False), (4e-3, True)])
def test_the_best_rate_may_lie_at_either_edge(tiny_recipe, best, at_edge):
    recipe = with_search(tiny_recipe(), [4e-3, 1e-3, 2e-3])
    record = search_rates_and_scales(recipe, own(recipe), lambda _, rate, *__: abs(rate - best))["dense"]
    assert record.best == best and record.at_edge is at_edge


def test_a_single_rate_has_no_edge(tiny_recipe):
    recipe = with_search(tiny_recipe(), [1e-3])
    record = search_rates_and_scales(recipe, own(recipe), lambda *_: 3.0)["dense"]
    assert record.best == 1e-3 and not record.at_edge


def test_every_rate_is_tried_with_every_scale_and_the_best_pair_counts(tiny_recipe):
    recipe, tried = with_search(tiny_recipe(), [1e-3, 2e-3], scales=[0.5, 1.0, 2.0]), []

    def run_trial(name, rate, scale, seed):
        tried.append((name, rate, scale))
        return abs(rate - 1e-3) + abs(scale - (2.0 if name == "dense" else 1.0))

    records = search_rates_and_scales(recipe, own(recipe), run_trial)
    assert tried == [(name, rate, scale) for name in recipe.arms for rate in (1e-3, 2e-3) for scale in (0.5, 1.0, 2.0)]
    assert (records["dense"].best, records["dense"].best_scale, records["dense"].at_edge) == (1e-3, 2.0, True)
    assert records["mixture_of_tokens"].best_scale == 1.0 and records["mixture_of_tokens"].trials[1].scale == 1.0


def test_a_comparison_draws_its_weights_at_the_best_scale_and_says_so(tiny_recipe, tmp_path):
    plain = dataclasses.replace(tiny_recipe().model, activation="relu", gated=False)
    recipe = with_search(dataclasses.replace(tiny_recipe(), model=plain), [1e-3], scales=[0.5, 1e4])
    results = compare(recipe, out=tmp_path / "out")
    for name, arm in results.arms.items():
        assert arm.learning_rate_search.best_scale == 0.5 and len(arm.learning_rate_search.trials) == 2
        assert arm.settings["initialization"].startswith("dense 0.25/sqrt(fan-in)"), name
    assert read_json(tmp_path / "out" / "search" / "record.json")["arms"]["dense"]["best_scale"] == 0.5


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"scales": [1.0]}, "'search.learning_rates' is empty: name the rates"),
        ({"scales": [0.0], "learning_rates": [1e-3]}, "'search.scales' has 0.0"),
        ({"scales": [1.0, 1.0], "learning_rates": [1e-3]}, "give each once"),
        ({"rate_multiples": [1.0, 1.0]}, r"'search.rate_multiples' is \[1.0, 1.0\]: give each once"),
        ({"rate_multiples": [-1.0]}, "'search.rate_multiples' has -1.0"),
        ({"rate_multiples": [1.0], "learning_rates": [1e-3]}, "give one of them"),
    ],
)
def test_scales_that_cannot_be_searched_are_refused(tiny_recipe, search, words):
    with pytest.raises(UserError, match=words):
        recipe_from_dict(recipe_to_dict(tiny_recipe()) | {"search": search})


def test_a_record_of_scales_holds_for_an_arm_at_the_best_one_alone(recorded):
    recipe, path = recorded
    stored = read_json(record_path(path))
    stored["arms"]["dense"]["best_scale"] = 2.0
    write_json(record_path(path), stored)
    assert load_record(recipe, path) == {}
    arm = dataclasses.replace(recipe.arms["dense"], feed_forward_scale=2.0)
    assert load_record(dataclasses.replace(recipe, arms={"dense": arm}), path)["dense"].best_scale == 2.0


def test_a_record_for_another_initialization_is_no_claim(recorded):
    recipe, path = recorded
    assert load_record(change(recipe, "model", initializer_range=0.02), path) == {}


def test_a_finished_search_is_not_repeated(tiny_recipe, tmp_path):
    recipe = with_search(tiny_recipe(), [1e-3, 2e-3])
    first = compare(recipe, out=tmp_path / "out")
    files = sorted((tmp_path / "out").glob("search/*/*/*/result.json"))
    before = [path.stat().st_mtime_ns for path in files]
    again = compare(recipe, out=tmp_path / "out")
    assert len(files) == 4 and [path.stat().st_mtime_ns for path in files] == before
    assert again.arms == first.arms


def test_models_of_trials_are_not_kept(tiny_recipe, tmp_path):
    recipe = with_search(tiny_recipe(), [1e-3, 2e-3, 1e4])
    compare(recipe, out=tmp_path / "out")
    trials, checkpoints = sorted((tmp_path / "out/search").glob("*/*/*")), "checkpoint*/complete.json"
    assert len(trials) == 6 and all((trial / "result.json").exists() for trial in trials)
    assert not list((tmp_path / "out/search").glob(f"*/*/*/{checkpoints}"))
    assert len(list((tmp_path / "out/arms").glob(f"*/*/{checkpoints}"))) == 2
    # A process may be killed between its result and the removal.
    shutil.copytree(tmp_path / "out/arms/dense/seed0/checkpoint", trials[0] / "checkpoint")
    compare(recipe, out=tmp_path / "out")
    assert not (trials[0] / "checkpoint").exists()


@pytest.fixture
def recorded(tiny_recipe, tmp_path):
    """A recipe whose dense arm runs at the best rate of the record beside it, and its path."""
    recipe = tiny_recipe(arms={"dense": {"family": "dense", "learning_rate": 2e-3}})
    path = tmp_path / "tiny.toml"
    record = {"trials": [], "steps": 4, "seeds": [1000], "best": 2e-3, "at_edge": False, "source": "this run"}
    write_json(record_path(path), {"fingerprint": fingerprint(recipe), "arms": {"dense": record}})
    return recipe, path


def change(recipe, section, **values):
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def test_the_record_beside_a_recipe_is_used(recorded):
    assert load_record(*recorded)["dense"].source == "recorded with the recipe"


def test_no_record_is_no_claim(recorded, tmp_path):
    recipe, _ = recorded
    assert load_record(recipe, None) == load_record(recipe, tmp_path / "other.toml") == {}


@pytest.mark.parametrize(
    ("section", "values"),
    [("training", {"steps": 5}), ("model", {"hidden_size": 64}), ("data", {"sequence_length": 32})],
    ids=["training", "model", "data"],
)
def test_a_record_for_other_settings_is_no_claim(recorded, section, values):
    recipe, path = recorded
    assert load_record(change(recipe, section, **values), path) == {}


def test_a_record_holds_whatever_is_only_measured_or_saved(recorded):
    recipe, path = recorded
    assert load_record(change(recipe, "training", eval_every=1, save_every=1, threads=1), path)


def test_a_rate_that_was_not_the_best_is_no_searched_rate(recorded):
    recipe, path = recorded
    arm = dataclasses.replace(recipe.arms["dense"], learning_rate=1e-3)
    assert load_record(dataclasses.replace(recipe, arms={"dense": arm}), path) == {}


def test_the_default_recipe_runs_at_searched_rates_inside_their_grid():
    path = preset_path("default")
    recipe = load_recipe(path)
    records = load_record(recipe, path)
    assert records.keys() == recipe.arms.keys()
    assert not any(record.at_edge for record in records.values())
    efforts = {(tuple(t.learning_rate for t in r.trials), r.steps, tuple(r.seeds)) for r in records.values()}
    assert len(efforts) == 1, "every arm got the same effort"


def test_the_fingerprint_does_not_see_rates_names_and_seeds(tiny_recipe):
    recipe = tiny_recipe()
    dense = dataclasses.replace(recipe.arms["dense"], learning_rate=9e-3)
    changed = dataclasses.replace(recipe, name="other", seeds=(5,), arms=recipe.arms | {"dense": dense})
    changed = change(changed, "training", learning_rate=9e-3, eval_sequences=4, final_eval_sequences=4)
    assert fingerprint(changed) == fingerprint(recipe) != ""


@pytest.mark.parametrize("values", [{"num_experts": 8}, {"group_size": 2}, {"alone_top_k": None}])
def test_the_fingerprint_sees_the_arms(tiny_recipe, values):
    recipe = tiny_recipe()
    mixture = dataclasses.replace(recipe.arms["mixture_of_tokens"], **values)
    changed = dataclasses.replace(recipe, arms=recipe.arms | {"mixture_of_tokens": mixture})
    assert fingerprint(changed) != fingerprint(recipe)


def test_an_arm_that_diverged_at_every_rate_has_no_best_one(tiny_recipe):
    recipe = with_search(tiny_recipe(), [1.0, 0.5])
    with pytest.raises(UserError, match=r"Every learning rate diverged for 'dense', even 0\.5: add lower ones"):
        search_rates_and_scales(recipe, own(recipe), lambda name, *_: float("inf") if name == "dense" else 3.0)


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_a_damaged_record_is_named(recorded, damage):
    recipe, path = recorded
    record_path(path).write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match=r"tiny\.search\.json' is damaged"):
        load_record(recipe, path)
