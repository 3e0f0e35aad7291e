"""Texts with any number of labels: what is learnt, scored, reported, answered and exported."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from mixtura import compare
from mixtura.cli import app
from mixtura.config import (
    AdapterConfig,
    BaseConfig,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    HeadConfig,
    TrainingConfig,
    UserError,
)
from mixtura.tasks.classification.classifier import classify
from mixtura.tasks.classification.features import few_of_each_class
from mixtura.tasks.classification.label_scores import best_threshold, count, macro_f1, micro_f1, paired_tests
from mixtura.tasks.classification.objectives import SeveralLabels
from mixtura.tasks.classification.sequence_classifier import export_classifier

TRUTH = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=bool)
SAID = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
WORDS = ("good", "bad", "film")


def test_f1_by_hand():
    counts = count(TRUTH, SAID)
    assert [part.tolist() for part in counts] == [[2, 1, 0], [2, 2, 0], [2, 2, 0]]
    assert micro_f1(counts) == pytest.approx(2 * 3 / 8)
    # The third label is neither true of any text nor given.
    assert macro_f1(counts) == pytest.approx((1 + 0.5) / 2)


def test_scores_of_logits_by_hand():
    logits = np.where(SAID, 2.0, -2.0)
    scores = SeveralLabels().scores(logits, TRUTH.astype(np.float32))
    assert scores["subset_accuracy"] == 50 and scores["micro_f1"] == pytest.approx(75)
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    assert scores["loss"] == pytest.approx((10 * right + 2 * wrong) / 4)
    sure = 1 / (1 + np.exp(-2))
    assert scores["ece"] == pytest.approx(100 * abs(sure - 10 / 12))
    assert scores["brier"] == pytest.approx((10 * (1 - sure) ** 2 + 2 * sure**2) / 4)


def test_a_threshold_is_the_best_of_all_on_validation_texts():
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth = draw.random((30, 4)) < 0.2
        probability = np.clip(0.15 * truth + 0.3 * draw.random((30, 4)), 0, 1).round(2)
        found = best_threshold(truth, probability)
        tried = [micro_f1(count(truth, probability >= threshold)) for threshold in np.linspace(0, 1, 1001)]
        assert micro_f1(count(truth, probability >= found)) == max(tried) > micro_f1(count(truth, probability >= 0.5))
    assert best_threshold(np.eye(2, dtype=bool), np.array([[0.9, 0.2], [0.4, 0.6]])) == 0.5
    assert best_threshold(np.zeros((2, 2), dtype=bool), np.full((2, 2), 0.1)) == 0.5
    assert best_threshold(np.zeros((0, 2), dtype=bool), np.zeros((0, 2))) == 0.5


def test_a_label_is_given_from_a_probability_of_one_half_unless_said():
    lines = list(SeveralLabels().lines(np.array([[0.0, -0.001], [-9.0, -9.0]]), np.eye(2), ["a", "b"]))
    assert [line["labels"] for line in lines] == [["a"], []]
    assert [line["truth"] for line in lines] == [["a"], ["b"]]
    rare = SeveralLabels().adjusted(np.array([[-1.0, -3.0], [-3.0, -1.0]]), np.eye(2))
    assert rare.threshold == pytest.approx((1 / (1 + np.e) + 1 / (1 + np.e**3)) / 2)
    assert [line["labels"] for line in rare.lines(np.array([[-1.5, -2.5]]), np.eye(2)[:1], ["a", "b"])] == [["a"]]


def test_the_bootstrap_sees_a_clear_difference_and_none():
    draw = np.random.default_rng(0)
    truth = draw.random((200, 5)) < 0.3
    good, poor = truth ^ (draw.random((2, 200, 5)) < 0.05), truth ^ (draw.random((2, 200, 5)) < 0.3)
    tests = paired_tests(truth, good, poor, resamples=500)
    for test in tests.values():
        assert 0 < test.low < test.difference < test.high and test.p_value < 0.01
    mean = np.mean([micro_f1(count(truth, of)) for of in good]) - np.mean([micro_f1(count(truth, of)) for of in poor])
    assert tests["micro_f1"].difference == pytest.approx(100 * mean)
    same = paired_tests(truth, good, good, resamples=500)
    assert all((test.low, test.high, test.p_value) == (0, 0, 1) for test in same.values())


def test_few_texts_hold_every_label_and_fewer_are_the_first_of_more():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]] * 4, dtype=np.float32)
    few, more = few_of_each_class(labels, 1, seed=0), few_of_each_class(labels, 3, seed=0)
    assert set(few) <= set(more) and len(few) <= 4
    assert labels[few].any(0).all() and not labels[few].any(1).all()


@pytest.fixture(scope="module")
def rows(reviews):
    """The tiny reviews, labelled by the words in them: none, one or several."""
    lines = [json.loads(line)["text"] for line in reviews.read_text(encoding="utf-8").splitlines()]
    return [{"text": text, "topics": [word for word in WORDS if word in text.split()]} for text in lines]


@pytest.fixture
def recipe(rows, encoder_folder, tmp_path):
    """A comparison of three arms on them."""
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ClassificationRecipe(
        name="topics",
        seeds=(0,),
        baseline="last_layer",
        data=ClassificationDataConfig(
            source="local",
            path=str(path),
            label_column="topics",
            max_length=12,
            validation_examples=32,
            test_examples=42,
            budgets=(4,),
        ),
        base=BaseConfig(name=str(encoder_folder)),
        training=TrainingConfig(
            steps=40, batch_size=16, eval_every=40, eval_sequences=16, save_every=40, learning_rate=3e-2
        ),
        arms={
            "last_layer": ClassificationArmConfig(),
            "best_layer": ClassificationArmConfig(head=HeadConfig(kind="best_layer")),
            "lora": ClassificationArmConfig(tune="adapter", adapter=AdapterConfig(rank=2), learning_rate=1e-2),
        },
    )


def test_a_comparison_of_several_labels_from_data_to_answers_and_export(recipe, tmp_path):
    out = tmp_path / "out"
    results = compare(recipe, out=out)
    assert results.measure.key == "micro_f1" and results.data.facts["labels"] == sorted(WORDS)
    assert 0 < results.data.facts["majority_micro_f1"] < 100
    for arm in results.arms.values():
        final = arm.runs[0].final["alone"]
        assert set(final) == {"loss", "micro_f1", "macro_f1", "subset_accuracy", "ece", "brier"}
        details = arm.runs[0].details
        assert details.confusion == [] and len(details.label_counts) == 3
        hits, seen = (
            sum(of) for of in zip(*((c.hits, c.true + c.answered) for c in details.label_counts), strict=True)
        )
        assert final["micro_f1"] == pytest.approx(200 * hits / seen)
    assert results.arms["lora"].runs[0].final["alone"]["micro_f1"] > results.data.facts["majority_micro_f1"]
    tests = results.across_arms.paired_bootstrap["lora"]
    assert set(tests) == {"micro_f1", "macro_f1", "subset_accuracy"}
    assert results.across_arms.budgets["lora"][0].rows == 4
    assert "% micro F1 on validation texts" in results.arms["best_layer"].settings["layer"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "How well each label is found" in page and "What is taken for what" not in page
    assert "| F1 of label (test texts) |" in (out / "report.md").read_text(encoding="utf-8")

    texts = ["a good film", "the the", "bad bad film"]
    for name in ("best_layer", "lora"):
        checkpoint = out / "arms" / name / "seed0" / "checkpoint"
        threshold = results.arms[name].runs[0].details.threshold
        answers = classify(checkpoint, texts)
        for answer in answers:
            order = sorted(answer.probabilities, key=answer.probabilities.__getitem__, reverse=True)
            assert answer.labels == tuple(label for label in order if answer.probabilities[label] >= threshold)
        export_classifier(checkpoint, tmp_path / name)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        assert model.config.problem_type == "multi_label_classification" and model.config.threshold == threshold
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        ask = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
        for answer, said in zip(answers, ask(texts), strict=True):
            assert {of["label"]: of["score"] for of in said} == pytest.approx(answer.probabilities, abs=1e-5)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = torch.tensor([[0.0, 1.0, 1.0]] * 3)
        outputs = model(batch["input_ids"], batch["attention_mask"], labels=labels)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)
        assert_close(outputs.loss, expected)

    (tmp_path / "in.txt").write_text("a good film\n\nthe the\n", encoding="utf-8")
    told = CliRunner().invoke(
        app, ["classify", str(checkpoint), "--in", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out.tsv")]
    )
    assert told.exit_code == 0, told.output
    first, empty, none = (tmp_path / "out.tsv").read_text(encoding="utf-8").split("\n")[:3]
    assert first.split("\t")[::2] == list(answers[0].labels) and empty == ""
    assert none.split("\t")[::2] == list(answers[1].labels) or none == "-"


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no classifier"):
        export_classifier(tmp_path, tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        export_classifier(tmp_path, tmp_path)
