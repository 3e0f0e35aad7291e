"""One run of a comparison: done once, read afterwards, refused where it could not be evaluated."""

import dataclasses
import math

import pytest

from mixtura.comparison import runs
from mixtura.comparison.plan import check_arms, tokens_per_step
from mixtura.comparison.runs import run_arm, trial_loss
from mixtura.config import UserError
from mixtura.data.prepare import prepare_data
from mixtura.results import Measure, RunResult
from mixtura.results.document import read_run
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
