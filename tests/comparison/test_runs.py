"""One run of a comparison: done once, read afterwards, refused where it could not be evaluated."""

import dataclasses
import math

import pytest

from mixtura.comparison import runner, runs
from mixtura.comparison.plan import check_arms, tokens_per_step
from mixtura.comparison.runner import compare
from mixtura.comparison.runs import fingerprint, load_record, record_path, run_arm, search_rates_and_scales, trial_loss
from mixtura.config import UserError, load_recipe, preset_path, recipe_from_dict, recipe_to_dict
from mixtura.data.prepare import prepare_data
from mixtura.files import write_json
from mixtura.results import Measure, RunResult
from mixtura.results.document import read_json, read_run
from mixtura.results.run import PretrainingDetails, Spikes
from mixtura.tasks.language_modelling import task as language_modelling
from mixtura.tasks.language_modelling.experiment import Pretraining
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training import SilentProgress, TrainingDiverged


@pytest.fixture
def run(tiny_recipe, tmp_path):
    """Runs the mixture-of-tokens arm in a folder below `tmp_path`; keywords are keys of [training]."""

    def run(*, out="run", seed=0, learning_rate=1e-3, trial=False, **training):
        recipe = tiny_recipe(**training)
        return run_arm(
            Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms["mixture_of_tokens"],
            seed=seed,
            learning_rate=learning_rate,
            training=recipe.training,
            out=tmp_path / out,
            label="mixture seed 0",
            reporter=SilentProgress(),
            trial=trial,
        )

    return run


def without_times(result):
    curve = [dataclasses.replace(point, seconds=0.0) for point in result.curve]
    return dataclasses.replace(result, train_seconds=0.0, curve=curve)


def test_a_run_stores_what_it_returns(run, tmp_path):
    result = run(seed=5, learning_rate=2e-3)
    assert read_run(tmp_path / "run" / "result.json") == result
    assert (result.seed, result.learning_rate, result.steps) == (5, 2e-3, 4)
    assert result.final.keys() == {"group", "alone", "alone_all"}
    assert all(math.isfinite(measure) for of in result.final.values() for measure in of.values())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run):
    first = run(out="first")
    assert without_times(run(out="second")) == without_times(first)
    assert run(out="other", seed=1).final != first.final


def test_a_finished_run_is_read_and_not_repeated(run, monkeypatch):
    first = run()
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run() == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 2e-3}, r"learning_rate 0\.001, and now it is 0\.002"),
        ({"steps": 6}, "steps 4, and now it is 6"),
        ({"seed": 1}, "seed 0, and now it is 1"),
    ],
)
def test_a_finished_run_of_other_settings_is_refused(run, changes, words):
    run()
    with pytest.raises(UserError, match=f"The finished run in .* has {words}: choose another folder"):
        run(**changes)


def test_a_run_that_lost_its_result_is_evaluated_again_without_training(run, tmp_path):
    first = run()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    (tmp_path / "run" / "result.json").unlink()
    assert run() == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8") == metrics


def test_a_final_loss_that_no_file_can_hold_is_a_divergence(run, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"mixture seed 0 diverged.*lower its learning rate, which is 10000"):
        run(steps=1, learning_rate=1e4)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"seed": 0}'])
def test_a_file_that_is_no_result_is_refused(run, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"result\.json' is damaged \(.*\): delete it"):
        run()


def test_too_little_held_out_text_is_refused_before_training(tiny_recipe):
    recipe = tiny_recipe()
    data = prepare_data(recipe.data, cache_dir=None)
    wanted = dataclasses.replace(recipe.training, eval_sequences=100_000)
    check_arms(Pretraining(recipe, data).arms, recipe.training)
    with pytest.raises(
        UserError, match=f"'training.eval_sequences' is 100000 but only {data.validation.num_sequences} sequences"
    ):
        check_arms(Pretraining(dataclasses.replace(recipe, training=wanted), data).arms, wanted)


def test_the_final_evaluation_takes_what_there_is_in_whole_batches(run, monkeypatch):
    asked, original = [], language_modelling.evaluate_loss

    def evaluate(model, packed, *, num_sequences, batch_size, modes):
        if modes is None:
            asked.append((num_sequences, batch_size, packed.num_sequences))
        return original(model, packed, num_sequences=num_sequences, batch_size=batch_size, modes=modes)

    monkeypatch.setattr(language_modelling, "evaluate_loss", evaluate)
    run(out="more than there is", steps=1, final_eval_sequences=100_000)
    run(out="no whole batch", steps=1, final_eval_sequences=1)
    (most, size, held_out), (least, _, _) = asked
    assert most == held_out // size * size and least == size


def test_a_run_keeps_what_its_task_tells_beyond_the_measures(run, monkeypatch, tmp_path):
    asked = []

    def details(self, model, *, out):
        asked.append(out)
        return PretrainingDetails(peakedness=[])

    monkeypatch.setattr(LanguageModelling, "details", details)
    assert run().details == run().details == PretrainingDetails(peakedness=[])
    assert asked == [tmp_path / "run"], "a finished run is not asked again"


def test_a_trial_decodes_nothing_where_the_measure_is_another_than_the_loss(run, monkeypatch):
    chrf = Measure("chrf", "chrF", "points", "higher", 2)
    monkeypatch.setattr(LanguageModelling, "details", lambda *_, **__: pytest.fail("details of a trial"))
    on_loss = run(out="on loss", trial=True)
    monkeypatch.setattr(LanguageModelling, "measure", chrf)
    on_chrf = run(out="on chrF", trial=True)
    assert on_loss.final.keys() == {"group", "alone", "alone_all"} and on_chrf.final.keys() == {"group", "alone"}
    assert on_chrf.final["alone"]["loss"] == on_chrf.curve[-1].loss["alone"]


@pytest.mark.parametrize(
    ("final", "loss"),
    [({"group": 1.0, "alone": 2.0}, 2.0), ({"group": 1.0}, 1.0), ({"other": 3.0}, 3.0)],
    ids=["deployed", "as trained", "what there is"],
)
def test_a_trial_is_judged_as_deployed_where_that_was_measured(tiny_recipe, final, loss):
    recipe = tiny_recipe()
    arm = Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms["mixture_of_tokens"]
    result = dataclasses.replace(_EMPTY, final={mode: {"loss": value} for mode, value in final.items()})
    assert trial_loss(arm, result) == loss


_EMPTY = RunResult(
    seed=0, learning_rate=1e-3, steps=4, train_seconds=1.0, final={}, curve=[], train_curve=[], grad_norm=None,
    spikes=Spikes(0, 0), load=None, load_imbalance=None, dropped_share=None, router_entropy=None,
)  # fmt: skip


def test_micro_batches_count_into_the_tokens_of_a_step(tiny_recipe):
    recipe = tiny_recipe(gradient_accumulation_steps=3)
    arm = Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms["dense"]
    assert tokens_per_step(arm, recipe.training) == 3 * 4 * 16


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Leaves out the report, which takes longer than the training here."""
    monkeypatch.setattr("mixtura.report.html.write_report", lambda results, out: None)


def with_search(recipe, rates, seeds=(7,), **search):
    search |= {"learning_rates": rates, "steps": 2, "seeds": list(seeds)}
    table = recipe_to_dict(recipe) | {"search": search}
    return recipe_from_dict(table)


def test_every_arm_tries_every_rate_and_keeps_the_best(tiny_recipe):
    recipe, tried = with_search(tiny_recipe(), [4e-3, 1e-3, 2e-3]), []

    def run_trial(name, rate, scale, seed):
        assert scale is None
        tried.append((name, rate, seed))
        return abs(rate - (1e-3 if name == "dense" else 2e-3))

    records = search_rates_and_scales(recipe, run_trial)
    assert tried == [(name, rate, 7) for name in recipe.arms for rate in (1e-3, 2e-3, 4e-3)]
    assert records["dense"].best == 1e-3 and records["dense"].at_edge
    assert records["mixture_of_tokens"].best == 2e-3 and not records["mixture_of_tokens"].at_edge
    assert records["dense"].steps == 2 and records["dense"].seeds == [7]


def test_the_mean_over_the_seeds_of_the_search_decides(tiny_recipe):
    recipe = with_search(tiny_recipe(), [1e-3, 2e-3], seeds=(7, 8))
    losses = {(1e-3, 7): 1.0, (1e-3, 8): 4.0, (2e-3, 7): 2.0, (2e-3, 8): 2.5}
    record = search_rates_and_scales(recipe, lambda _, rate, __, seed: losses[rate, seed])["dense"]
    assert [trial.loss for trial in record.trials] == [2.5, 2.25] and record.best == 2e-3


def test_a_rate_that_diverged_counts_as_lost(tiny_recipe):
    recipe = with_search(tiny_recipe(), [1e-3, 2e-3])
    record = search_rates_and_scales(recipe, lambda _, rate, *__: float("inf") if rate > 1e-3 else 3.0)["dense"]
    assert [trial.loss for trial in record.trials] == [3.0, None] and record.best == 1e-3


def test_a_searched_comparison_trains_at_the_best_rates_and_stores_the_record(tiny_recipe, tmp_path, monkeypatch):
    original = runner.run_arm

    def run_arm(arm, *, learning_rate, **options):
        if learning_rate == 9e-1:
            raise TrainingDiverged("The loss is no number.", step=1)
        return original(arm, learning_rate=learning_rate, **options)

    monkeypatch.setattr(runner, "run_arm", run_arm)
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
    record = search_rates_and_scales(recipe, lambda _, rate, *__: abs(rate - best))["dense"]
    assert record.best == best and record.at_edge is at_edge


def test_a_single_rate_has_no_edge(tiny_recipe):
    record = search_rates_and_scales(with_search(tiny_recipe(), [1e-3]), lambda *_: 3.0)["dense"]
    assert record.best == 1e-3 and not record.at_edge


def test_every_rate_is_tried_with_every_scale_and_the_best_pair_counts(tiny_recipe):
    recipe, tried = with_search(tiny_recipe(), [1e-3, 2e-3], scales=[0.5, 1.0, 2.0]), []

    def run_trial(name, rate, scale, seed):
        tried.append((name, rate, scale))
        return abs(rate - 1e-3) + abs(scale - (2.0 if name == "dense" else 1.0))

    records = search_rates_and_scales(recipe, run_trial)
    assert tried == [(name, rate, scale) for name in recipe.arms for rate in (1e-3, 2e-3) for scale in (0.5, 1.0, 2.0)]
    assert (records["dense"].best, records["dense"].best_scale, records["dense"].at_edge) == (1e-3, 2.0, True)
    assert records["mixture_of_tokens"].best_scale == 1.0 and records["mixture_of_tokens"].trials[1].scale == 1.0


def test_a_comparison_draws_its_weights_at_the_best_scale_and_says_so(tiny_recipe, tmp_path):
    recipe = with_search(tiny_recipe(), [1e-3], scales=[0.5, 1e4])
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
        search_rates_and_scales(recipe, lambda name, *_: float("inf") if name == "dense" else 3.0)


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_a_damaged_record_is_named(recorded, damage):
    recipe, path = recorded
    record_path(path).write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match=r"tiny\.search\.json' is damaged"):
        load_record(recipe, path)
