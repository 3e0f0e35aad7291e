"""Comparisons of translation models and of classifiers, from recipe to report, on toy data."""

import dataclasses
import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mixtura.comparison.runner import compare, planned_steps, train_arm
from mixtura.comparison.search import fingerprint
from mixtura.config import (
    ArmConfig,
    BaseConfig,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    HeadConfig,
    ModelConfig,
    SearchConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.results import read_results
from mixtura.results.document import read_run
from mixtura.tasks.translation.task import TranslationTask

WORDS = ("ban", "den", "fin", "gat", "lit", "mon", "nab", "pol", "rud", "sef")
TRAINING = {"steps": 2, "batch_size": 4, "eval_every": 1, "save_every": 2, "eval_sequences": 8}


@pytest.fixture(scope="module")
def translation_recipe(tmp_path_factory):
    """Sentences with their words reversed: a dense, a token-choice and a mixture-of-tokens arm, two seeds."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("toy") / "toy.jsonl"
    sources = [" ".join(draw.choices(WORDS, k=draw.randint(2, 4))) for _ in range(120)]
    rows = [
        {"source": text, "target": text[::-1], "source_language": "en", "target_language": "xx"} for text in sources
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mixtures = {
        "token_choice": ArmConfig(family="token_choice", num_experts=4),
        "mixture_of_tokens": ArmConfig(family="mixture_of_tokens", num_experts=4, group_size=4),
    }
    return TranslationRecipe(
        name="toy",
        seeds=(0, 1),
        data=TranslationDataConfig(
            source="local", path=str(path), pairs=("en-xx",), vocab_size=300, max_length=32, validation_sources=12,
            test_sources=12,
        ),
        model=ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        training=TrainingConfig(**TRAINING, final_eval_sequences=8),
        search=SearchConfig(learning_rates=(1e-3, 3e-3), steps=1),
        arms={"dense": TranslationArmConfig()}
        | {name: TranslationArmConfig(feed_forward=arm) for name, arm in mixtures.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def translated(translation_recipe, tmp_path_factory):
    """A finished comparison of translation models: its folder and its results."""
    out = tmp_path_factory.mktemp("translated") / "out"
    return out, compare(translation_recipe, out=out)


def test_translation_is_compared_by_chrf_with_all_it_tells(translated):
    out, results = translated
    assert read_results(out / "results.json") == results
    assert (results.task, results.measure.key, results.measure.better) == (
        "translation",
        "chrf",
        "higher",
    )
    assert results.data.tokens_per_run == 2 * results.data.tokens_per_step > 0
    for arm in results.arms.values():
        assert arm.parameters_trainable == arm.parameters_total and arm.optimizer_state_bytes > 0
        for run in arm.runs:
            assert run.final[arm.deployed_mode].keys() >= {"loss", "chrf", "chrf_pp", "bleu"}
            assert run.details.pairs.keys() == {"en-xx"}
    assert results.across_arms.paired_bootstrap.keys() == {"token_choice", "mixture_of_tokens"}
    assert "by their chrF as deployed" in results.summary.rule
    assert "Language pairs" in (out / "report.html").read_text(encoding="utf-8")


def test_the_search_looks_at_the_loss_of_validation_and_decodes_nothing(translated):
    out, results = translated
    for name, arm in results.arms.items():
        trials = arm.learning_rate_search.trials
        stored = [
            read_run(out / "search" / name / f"rate{t.learning_rate}" / "seed1000" / "result.json") for t in trials
        ]
        assert [t.loss for t in trials] == [run.final[arm.deployed_mode]["loss"] for run in stored]
        assert all("chrf" not in run.final[arm.deployed_mode] and run.details is None for run in stored)
        assert arm.learning_rate == min(trials, key=lambda trial: trial.loss).learning_rate


def test_nothing_is_trained_or_decoded_again(translated, translation_recipe, monkeypatch):
    out, results = translated
    monkeypatch.setattr(TranslationTask, "decode_test", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr("mixtura.report.html.write_report", lambda results, out: None)
    again = compare(translation_recipe, out=out)
    assert again.arms == results.arms and again.across_arms == results.across_arms


def test_one_arm_of_a_translation_recipe_can_be_trained_alone(translation_recipe, translated, tmp_path):
    rate = translated[1].arms["dense"].learning_rate
    result = train_arm(translation_recipe, "dense", seed=1, out=tmp_path / "one")
    if rate == translation_recipe.training.learning_rate:
        assert result.final == translated[1].arms["dense"].runs[1].final
    assert result.details.pairs["en-xx"].sentences == 12
    with pytest.raises(UserError, match="no arm 'soft'"):
        train_arm(translation_recipe, "soft", seed=0, out=tmp_path / "two")


def test_steps_and_fingerprint_of_a_fine_tuning_recipe(translation_recipe):
    assert planned_steps(translation_recipe) == 3 * (2 * 1 + 2 * 2)
    faster = TranslationArmConfig(learning_rate=9e-3, feed_forward=ArmConfig(family="dense", learning_rate=1.0))
    same = {"arms": translation_recipe.arms | {"dense": faster}, "seeds": (7,), "name": "other"}
    changed = {**vars(translation_recipe), **same}
    assert fingerprint(TranslationRecipe(**changed)) == fingerprint(translation_recipe)
    other = {**vars(translation_recipe), "base": BaseConfig(name="smollm2")}
    assert fingerprint(TranslationRecipe(**other)) != fingerprint(translation_recipe)


@pytest.fixture(scope="module")
def classification_recipe(tmp_path_factory):
    """Texts that name their own class, and a random encoder: the last layer against a mix of layers."""
    folder, draw = tmp_path_factory.mktemp("classes"), random.Random(0)
    words = ["[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder / "base")
    rows = [
        {"text": " ".join([WORDS[index % 2], *draw.choices(WORDS[2:], k=4), str(index)]), "label": str(index % 2)}
        for index in range(120)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ClassificationRecipe(
        name="toy",
        seeds=(0, 1),
        data=ClassificationDataConfig(
            source="local", path=str(folder / "texts.jsonl"), max_length=10, validation_examples=16, test_examples=24
        ),
        base=BaseConfig(name=str(folder / "base")),
        training=TrainingConfig(**TRAINING),
        arms={
            "last_layer": ClassificationArmConfig(),
            "layer_mix": ClassificationArmConfig(head=HeadConfig(kind="layer_mix")),
        },
    )


def test_classifiers_are_compared_by_accuracy_with_all_they_tell(classification_recipe, tmp_path):
    results = compare(classification_recipe, out=tmp_path / "out")
    assert (results.task, results.measure.key) == ("classification", "accuracy")
    assert results.data.epochs > 0
    for name, arm in results.arms.items():
        assert 0 < arm.parameters_trainable < arm.parameters_total
        for run in arm.runs:
            assert sum(map(sum, run.details.confusion)) == 24
            assert (run.details.layer_weights is None) == (name == "last_layer")
            assert 0 <= run.final[arm.deployed_mode]["accuracy"] <= 100
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for heading in ("Which layers are read", "How honest the confidence is", "What is taken for what"):
        assert heading in page


def test_runs_on_few_texts_stand_beside_the_comparison_and_are_not_repeated(
    classification_recipe, tmp_path, monkeypatch
):
    data = dataclasses.replace(classification_recipe.data, budgets=(2, 8))
    recipe = dataclasses.replace(classification_recipe, data=data)
    assert planned_steps(recipe) == 3 * planned_steps(classification_recipe)
    results = compare(recipe, out=tmp_path / "few")
    whole = compare(classification_recipe, out=tmp_path / "whole")
    for name, arm in results.arms.items():
        scores = results.across_arms.budgets[name]
        assert [(score.rows, score.seed) for score in scores] == [(2, 0), (2, 1), (8, 0), (8, 1)]
        assert all(0 <= score.accuracy <= 100 for score in scores)
        # The comparison itself is that of all texts.
        assert [run.final for run in arm.runs] == [run.final for run in whole.arms[name].runs]
    assert not whole.across_arms.budgets
    page = (tmp_path / "few" / "report.html").read_text(encoding="utf-8")
    assert "How many texts are enough" in page
    assert "How many texts are enough" not in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr("mixtura.comparison.runs.train", lambda *_, **__: pytest.fail("trained again"))
    assert compare(recipe, out=tmp_path / "few").across_arms == results.across_arms
