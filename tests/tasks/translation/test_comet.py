"""COMET by a stand-in of its package, which scores by how much of the reference is there."""

import json
import sys
import types

import numpy as np
import pytest

from fixtures.encoder_decoders import encoder_decoder, parallel_rows  # noqa: F401 - fixtures
from mixtura.config import (
    BaseConfig,
    EvaluationConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.data.parallel import SentencePair
from mixtura.tasks.translation import comet
from mixtura.tasks.translation.experiment import make_translation
from mixtura.training import train


class StandIn:
    """What `load_from_checkpoint` of unbabel-comet gives, as far as Mixtura uses it."""

    asked = 0

    def predict(self, samples, batch_size, gpus, progress_bar):
        assert batch_size > 0 and gpus in (0, 1) and progress_bar is False
        assert all(set(sample) == {"src", "mt", "ref"} for sample in samples)
        StandIn.asked += 1
        scores = [len({*sample["mt"]} & {*sample["ref"]}) / len({*sample["ref"]}) for sample in samples]
        return types.SimpleNamespace(scores=scores, system_score=sum(scores) / len(scores))


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Puts the stand-in in place of the package; the path of a checkpoint."""
    module = types.ModuleType("comet")
    module.__spec__ = types.SimpleNamespace(name="comet")
    module.load_from_checkpoint = lambda path: StandIn()
    monkeypatch.setitem(sys.modules, "comet", module)
    for cached in (comet._scores, comet._model):
        cached.cache_clear()
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"weights")
    yield str(checkpoint)
    for cached in (comet._scores, comet._model):
        cached.cache_clear()


PAIRS = [SentencePair("a", "abcd", "en", "de"), SentencePair("b", "bc", "en", "fr"), SentencePair("c", "x", "en", "de")]


def test_sentences_are_scored_with_source_and_reference(package):
    scores = comet.comet_scores(package, PAIRS, ["ab", "bc", "y"])
    assert scores == [50, 100, 0]
    assert comet.means_by_direction(scores, PAIRS) == {"en-de": 25, "en-fr": 100}
    assert comet.means_by_direction(None, PAIRS) == {}
    before = StandIn.asked
    assert comet.comet_scores(package, PAIRS, ["ab", "bc", "y"]) == scores and StandIn.asked == before


def test_a_missing_package_or_file_is_said_before_anything_runs(package, monkeypatch, tmp_path):
    comet.check_comet(package)
    with pytest.raises(UserError, match="which is no file: give the path of a COMET checkpoint"):
        comet.check_comet(str(tmp_path))
    monkeypatch.delitem(sys.modules, "comet")
    monkeypatch.setattr(comet, "find_spec", lambda _: None)
    recipe = TranslationRecipe(
        name="toy", evaluation=EvaluationConfig(comet=package), arms={"dense": TranslationArmConfig()}
    )
    with pytest.raises(UserError, match="unbabel-comet is not installed: run pip install"):
        make_translation(recipe, cache_dir=None)


def test_a_checkpoint_that_fails_is_named(package, monkeypatch):
    monkeypatch.setattr(StandIn, "predict", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"with which COMET fails \(division by zero\)"):
        comet.comet_scores(package, PAIRS, ["a", "b", "c"])


def test_a_difference_is_sure_only_where_most_sentences_show_it():
    draw = np.random.default_rng(0)
    before = draw.normal(70, 10, size=200)
    surely, hardly = (before + shift + draw.normal(0, 5, size=200) for shift in (3, 0))
    assert comet.paired_bootstrap(before, surely).p_value < 0.01
    assert comet.paired_bootstrap(before, hardly).p_value > 0.05
    assert comet.paired_bootstrap(before, surely).difference == pytest.approx(np.mean(surely - before))
    assert comet.paired_bootstrap(before, before).p_value == 1


def test_a_run_has_comet_by_direction_beside_its_other_scores(
    package,
    encoder_decoder,  # noqa: F811
    parallel_rows,  # noqa: F811
    tmp_path,
):
    recipe = TranslationRecipe(
        name="toy",
        baseline="first",
        data=TranslationDataConfig(
            source="local",
            path=str(parallel_rows),
            pairs=("en-de", "en-fr"),
            validation_sources=4,
            test_sources=4,
            max_length=120,
        ),
        base=BaseConfig(name=str(encoder_decoder("m2m100"))),
        training=TrainingConfig(steps=1, batch_size=4, eval_every=1, eval_sequences=4, final_eval_sequences=8),
        evaluation=EvaluationConfig(comet=package),
        arms={"first": TranslationArmConfig(), "second": TranslationArmConfig(learning_rate=0.1)},
    )
    experiment = make_translation(recipe, cache_dir=None)
    found = {}
    for name, arm in experiment.arms.items():
        model, out = arm.build(0), tmp_path / "arms" / name / "seed0"
        train(model, task=arm.task, config=recipe.training, learning_rate=arm.learning_rate, seed=0, out=out, label="x")
        (final,) = arm.task.evaluate(model, final=True).values()
        details = arm.task.details(model, out=out)
        found[name] = {direction: scores.comet for direction, scores in details.pairs.items()}
        assert set(found[name]) == {"en-de", "en-fr"} and all(
            scores.copy_comet > 0 for scores in details.pairs.values()
        )
        assert final["comet"] == pytest.approx(sum(found[name].values()) / 2)
        lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
        own = [line["comet"] for line in lines if line["pair"] == "en-de"]
        assert found[name]["en-de"] == pytest.approx(sum(own) / len(own))
    tests = experiment.across_arms(tmp_path).comet["second"]
    for direction, test in tests.items():
        assert test.difference == pytest.approx(found["second"][direction] - found["first"][direction])
