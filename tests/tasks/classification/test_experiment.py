"""Comparisons of classifiers, from recipe to answers on new texts."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from mixtura.cli import app
from mixtura.config import (
    AdapterConfig,
    ArmConfig,
    BaseConfig,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    HeadConfig,
    TrainingConfig,
    UserError,
)
from mixtura.models import MixtureForCausalLM
from mixtura.results import Leaks
from mixtura.tasks.classification.best_layer import BestLayer
from mixtura.tasks.classification.classifier import classify, evaluating, load_classifier
from mixtura.tasks.classification.experiment import make_classification
from mixtura.tasks.classification.features import FeatureExamples, TokenExamples
from mixtura.tasks.classification.sequence_classifier import export_classifier
from mixtura.training import train

MIX = HeadConfig(kind="layer_mix")
MOT = ArmConfig(family="mixture_of_tokens", num_experts=4, group_size=4, moe_intermediate_size=8)
MOE = ArmConfig(family="token_choice", num_experts=4, top_k=2, moe_intermediate_size=8)
LORA = AdapterConfig(rank=2)
ARMS = {
    "last_layer": ClassificationArmConfig(),
    "layer_mix": ClassificationArmConfig(head=MIX),
    "by_token": ClassificationArmConfig(head=HeadConfig(kind="layer_mix", per_token=True)),
    "best_layer": ClassificationArmConfig(head=HeadConfig(kind="best_layer")),
    "best_attended": ClassificationArmConfig(head=HeadConfig(kind="best_layer", pooling="attention")),
    "attention": ClassificationArmConfig(head=HeadConfig(kind="layer_mix", pooling="attention")),
    "moe": ClassificationArmConfig(head=HeadConfig(feed_forward=MOE)),
    "mot": ClassificationArmConfig(head=HeadConfig(kind="layer_mix", feed_forward=MOT)),
    "lora": ClassificationArmConfig(tune="adapter", adapter=LORA, head=MIX),
    "mixture_of_lora": ClassificationArmConfig(
        tune="adapter", adapter=AdapterConfig(method="mixture_of_lora", rank=2, num_experts=2)
    ),
    "mot_adapter": ClassificationArmConfig(
        tune="adapter", adapter=AdapterConfig(method="mixture_of_tokens", rank=2, num_experts=2, group_size=4)
    ),
    "full": ClassificationArmConfig(tune="full", head=MIX),
}


@pytest.fixture
def make(encoder_folder, reviews, tmp_path):
    """A factory of experiments with some of the arms on the tiny reviews."""

    def make(*arms, base=None, cache=True, progress=lambda _: None, data=None, **training):
        named = {name: ARMS[name] if isinstance(name, str) else name for name in arms}
        settings = {"steps": 6, "batch_size": 8, "eval_every": 3, "eval_sequences": 16, "save_every": 2}
        recipe = ClassificationRecipe(
            name="tiny",
            baseline=arms[0],
            data=ClassificationDataConfig(
                source="local",
                **{
                    "path": str(reviews),
                    "max_length": 10,
                    "validation_examples": 32,
                    "test_examples": 42,
                    **(data or {}),
                },
            ),
            base=BaseConfig(name=str(base or encoder_folder)),
            training=TrainingConfig(**{**settings, **training}),
            arms=named,
        )
        return make_classification(recipe, cache_dir=tmp_path / "cache" if cache else None, on_progress=progress)

    return make


@pytest.fixture
def run(tmp_path):
    """Trains an arm in a run folder."""

    def run(experiment, name, *, seed=0, out=None, resume=False, rate=1e-2, **config):
        arm = experiment.arms[name]
        model = arm.build(seed)
        training = TrainingConfig(
            **{"steps": 6, "batch_size": 8, "eval_every": 3, "eval_sequences": 16, "save_every": 2, **config}
        )
        folder = tmp_path / (out or f"arms/{name}/seed{seed}")
        outcome = train(
            model, task=arm.task, config=training, learning_rate=rate, seed=seed, out=folder, label=name, resume=resume
        )
        return model, folder, outcome

    return run


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_classifies_new_texts_after_it(make, run, name):
    experiment = make(name)
    arm = experiment.arms[name]
    model, folder, outcome = run(experiment, name)
    assert outcome.steps == 6 and [point.step for point in outcome.curve] == [3, 6]
    final = arm.task.evaluate(model, final=True)
    assert set(final) == {arm.training_mode, "alone"}
    assert set(final["alone"]) == {"loss", "accuracy", "macro_f1", "ece", "brier"}
    texts = ["a good film", "the plot was awful", "very very lovely", "dull", "a a a a a the film bad"]
    answers = classify(folder / "checkpoint", texts)
    saved, loaded = load_classifier(folder / "checkpoint")
    assert saved.labels == ("negative", "positive")
    assert_close([a.probability for a in answers], [max(a.probabilities.values()) for a in answers])
    assert not any(answer.cut for answer in answers)
    assert [answer.cut for answer in classify(folder / "checkpoint", ["good", "good " * 99])] == [False, True]
    one_by_one = [classify(folder / "checkpoint", [text])[0].probabilities["positive"] for text in texts]
    assert_close([a.probabilities["positive"] for a in answers], one_by_one, rtol=0, atol=1e-6)
    # The trained model and the loaded one are the same function.
    batch = arm.task.splits.test.collate([arm.task.splits.test.item(i) for i in range(8)])
    labels = batch.pop("labels")
    with evaluating(model, "alone"), torch.no_grad():
        expected = model(**batch).logits_BC
    if "features" in batch:
        tokens = make("full").arms["full"].task.splits.test
        batch = tokens.collate([tokens.item(i) for i in range(8)])
        assert batch.pop("labels").tolist() == labels.tolist()
    with torch.no_grad():
        assert_close(loaded(**batch).logits_BC, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["moe", "attention", "best_layer", "lora", "full"])
def test_an_exported_classifier_is_one_of_transformers(make, run, name, tmp_path):
    folder = run(make(name), name)[1]
    told = CliRunner().invoke(app, ["export", str(folder / "checkpoint"), str(tmp_path / "new")])
    assert told.exit_code == 0, told.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    ask = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["a good film", "the plot was awful"]
    for answer, said in zip(classify(folder / "checkpoint", texts), ask(texts, truncation=True), strict=True):
        assert said == {"label": answer.label, "score": pytest.approx(answer.probability, abs=1e-5)}


def test_a_mixture_of_adapters_is_not_exported(make, run, tmp_path):
    folder = run(make("mixture_of_lora"), "mixture_of_lora")[1]
    with pytest.raises(UserError, match="is a mixture of lora, which cannot be merged into its base"):
        export_classifier(folder / "checkpoint", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["mot", "lora", "full"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(make, run, name, tmp_path):
    experiment = make(name)
    whole = run(experiment, name, out="whole")[0]
    run(experiment, name, out="cut")
    # As if it had been stopped after step 4: the final checkpoint is gone, and the metrics go on from the numbered one.
    for path in [*(tmp_path / "cut/checkpoint").rglob("*"), tmp_path / "cut/checkpoint"]:
        if path.is_file():
            path.unlink()
    for path in sorted((tmp_path / "cut").glob("checkpoint*/**/"), reverse=True):
        if path.name in ("checkpoint", "adapter", "base") and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    last = tmp_path / "cut/checkpoint-6"
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink()
    last.rmdir()
    resumed, _, outcome = run(experiment, name, out="cut", resume=True)
    assert outcome.steps == 6
    for (key, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), key


@pytest.mark.parametrize("name", ["layer_mix", "lora", "full"])
def test_a_finished_run_is_read_back(make, run, name):
    experiment = make(name)
    model, _, _ = run(experiment, name)
    again, _, _ = run(experiment, name, resume=True)
    for (key, expected), actual in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), key


def test_features_and_tokens_train_the_same_head(make, run, monkeypatch):
    """An arm on cached features is the arm on the live frozen model, only cheaper."""
    cached = run(make("layer_mix"), "layer_mix", out="cached")[0]
    monkeypatch.setattr("mixtura.tasks.classification.experiment.blends_tokens", lambda _: True)
    live_experiment = make("layer_mix")
    assert isinstance(live_experiment.arms["layer_mix"].task.splits.train, TokenExamples)
    live = run(live_experiment, "layer_mix", out="live")[0]
    for key, expected in cached.head.state_dict().items():
        assert_close(live.head.state_dict()[key], expected, rtol=0, atol=1e-5)


def test_the_best_layer_is_chosen_without_the_test_texts_and_said(make, monkeypatch):
    asked = []

    def choose(train, validation, *, num_classes, objective):
        asked.append((len(train.labels), len(validation.labels), num_classes))
        return BestLayer(1, (50.0, 75.0, 62.5))

    monkeypatch.setattr("mixtura.tasks.classification.experiment.choose_layer", choose)
    experiment = make("best_layer", "last_layer", "best_attended")
    arms = experiment.arms
    assert asked == [(240 - 32 - 42, 32, 2)] * len(asked)
    assert arms["best_layer"].describe(arms["best_layer"]).settings["layer"] == (
        "1 of 2, 75.0 % right on validation texts; the last 62.5 %"
    )
    read = arms["best_layer"].splits.train.features_NMD
    whole = make("layer_mix").arms["layer_mix"].splits.train.features_NMD
    assert read.shape[1] == 1 and np.array_equal(read[:, 0], whole[:, 1])
    assert arms["best_attended"].build(0).head.layer == 1 and arms["last_layer"].build(0).head.layer == -1


def test_features_are_computed_once_for_all_frozen_arms(make):
    phrases = []
    experiment = make("last_layer", "layer_mix", "mot", progress=phrases.append)
    assert phrases.count("computing features") == 1 and "loading cached features" not in phrases
    assert all(isinstance(arm.task.splits.train, FeatureExamples) for arm in experiment.arms.values())
    make("last_layer", "layer_mix", progress=phrases.append)
    assert phrases.count("computing features") == 1 and phrases.count("loading cached features") == 1


def test_all_arms_see_the_same_texts_in_the_same_order(make):
    experiment = make("last_layer", "by_token", "full")
    labels = []
    for arm in experiment.arms.values():
        data = arm.task.dataset(length=300, seed=5)
        labels.append([data[i]["labels"] for i in range(300)])
    assert labels[0] == labels[1] == labels[2]


def test_one_seed_starts_every_arm_with_the_same_classifier(make):
    experiment = make("last_layer", "mot", "lora", "full")
    weights = [arm.build(3).head.classifier.weight for arm in experiment.arms.values()]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert not torch.equal(experiment.arms["mot"].build(4).head.classifier.weight, weights[0])


def test_a_frozen_model_stays_in_evaluation_mode(make):
    experiment = make("by_token", "lora", "full")
    frozen, lora, full = (arm.build(0).train() for arm in experiment.arms.values())
    assert not any(part.training for part in frozen.base.modules())
    dropouts = [part for name, part in lora.base.named_modules() if name.endswith("dropout") and "lora" not in name]
    assert dropouts and not any(part.training for part in dropouts)
    assert any(part.training for name, part in lora.base.named_modules() if "lora_dropout" in name)
    assert all(part.training for part in full.base.modules())


def test_a_tuned_model_does_not_touch_the_pretrained_one(make, run):
    experiment = make("last_layer", "full", "lora")
    before = {key: value.clone() for key, value in experiment.arms["full"].pretrained.model.state_dict().items()}
    for name in ("full", "lora"):
        run(experiment, name, steps=2)
    after = experiment.arms["full"].pretrained.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_costs_of_arms(make):
    experiment = make("last_layer", "layer_mix", "moe", "lora", "full")
    arms = experiment.arms
    said = {name: arm.describe(arms["last_layer"]) for name, arm in arms.items()}
    base = sum(p.numel() for p in arms["full"].pretrained.model.parameters())
    classifier = 16 * 2 + 2
    assert said["last_layer"].parameters_trainable == classifier
    assert said["last_layer"].parameters_total == base + classifier
    assert said["layer_mix"].parameters_trainable == classifier + 3 + 1
    assert said["full"].parameters_trainable == said["full"].parameters_total == base + classifier + 4
    assert said["moe"].parameters_total - said["moe"].parameters_active == 2 * 2 * 16 * 8
    # A product of (1, 16) with (16, 2), forward and for the weight's gradient, over a text's tokens.
    length = int(np.median(arms["last_layer"].splits.train.length_N))
    assert said["last_layer"].flops_per_token == pytest.approx(2 * 2 * 16 * 2 / length, rel=0.3)
    assert said["last_layer"].flops_ratio == 1
    assert said["full"].flops_per_token > 1.2 * said["lora"].flops_per_token
    assert "features once" in said["layer_mix"].settings["FLOPs"] and "FLOPs" not in said["lora"].settings


def test_leaks_are_measured(make):
    experiment = make("last_layer", "moe", "mot", "lora", "mot_adapter")
    leaks = {name: arm.leaks() for name, arm in experiment.arms.items()}
    alone = Leaks(False, False, False)
    mixing = Leaks(False, True, False)
    assert leaks == {"last_layer": alone, "moe": alone, "lora": alone, "mot": mixing, "mot_adapter": mixing}


def test_details_of_a_finished_run(make, run):
    experiment = make("layer_mix")
    task = experiment.arms["layer_mix"].task
    model, folder, _ = run(experiment, "layer_mix")
    details = task.details(model, out=folder)
    answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    correct = [answer["truth"] == answer["label"] for answer in answers]
    assert len(answers) == 42 and np.sum(details.confusion) == 42
    assert np.trace(details.confusion) == sum(correct)
    assert 100 * np.mean(correct) == pytest.approx(task.evaluate(model, final=True)["alone"]["accuracy"])
    assert sum(part.count for part in details.calibration) == 42
    assert len(details.layer_weights) == 3 and sum(details.layer_weights) == pytest.approx(1)
    assert details.labels == ["negative", "positive"]


def test_weights_that_depend_on_the_token_are_told_as_their_mean(make, run):
    experiment = make("by_token")
    details = experiment.arms["by_token"].task.details(
        experiment.arms["by_token"].build(0), out=run(experiment, "by_token")[1]
    )
    assert details.layer_weights == pytest.approx([1 / 3] * 3)


def test_arms_are_compared_over_the_same_test_texts(make, run, tmp_path):
    experiment = make("last_layer", "layer_mix", "mot")
    for name in ("last_layer", "layer_mix"):
        for seed in (0, 1):
            model, folder, _ = run(experiment, name, seed=seed)
            experiment.arms[name].task.details(model, out=folder)
    compared = experiment.across_arms(tmp_path).paired_bootstrap
    # No run of the third arm is finished.
    assert set(compared) == {"layer_mix"}
    result = compared["layer_mix"]["all"]
    assert result.low <= result.difference <= result.high and 0 < result.p_value <= 1


def test_an_arm_has_few_texts_of_each_class_that_the_seed_draws(make, run):
    experiment = make("last_layer", "best_layer", "full", data={"budgets": (2, 8)})
    whole = experiment.arms["full"].splits.train.labels
    chosen = {}
    for name, arm in experiment.arms.items():
        for rows, seed in ((2, 0), (8, 0), (2, 1)):
            few = arm.at_budget(rows, seed=seed)
            assert np.bincount(few.splits.train.labels).tolist() == [rows, rows]
            assert len(few.splits.test.labels) == 42 and few.learning_rate == arm.learning_rate
            assert few.task.settings(None) != arm.task.settings(None)
            chosen[name, rows, seed] = few.splits.train
    texts = {key: [ids.tobytes() for ids in of.ids] for key, of in chosen.items() if key[0] == "full"}
    assert set(texts["full", 2, 0]) < set(texts["full", 8, 0]) != set(texts["full", 2, 1])
    # Features and tokens are those of the same texts.
    assert chosen["last_layer", 8, 0].labels.tolist() == chosen["full", 8, 0].labels.tolist()
    assert chosen["last_layer", 8, 0].length_N.tolist() == chosen["full", 8, 0].length_N.tolist()
    assert len(whole) == 240 - 32 - 42
    few = experiment.arms["best_layer"].at_budget(2, seed=0)
    assert few.splits.train.features_NMD.shape[:2] == (4, 1) and few.build(0).head.layer == few.best_layer.layer


def test_a_budget_that_all_texts_do_not_reach_is_refused(make):
    with pytest.raises(UserError, match=r"'data\.budgets' names 99 rows of each class, but the largest class has 8"):
        make("last_layer", data={"budgets": (99,)})


def test_learning_is_possible_at_all(make, run):
    """The tiny reviews are decided by one word each, which even a random model lets through to a blend."""
    experiment = make("layer_mix")
    model, _, _ = run(experiment, "layer_mix", steps=200, rate=0.1, eval_every=200, save_every=200)
    assert experiment.arms["layer_mix"].task.evaluate(model, final=True)["alone"]["accuracy"] > 70


def test_a_classifier_whose_weights_are_no_numbers_is_named(make, run):
    _, folder, _ = run(make("layer_mix"), "layer_mix")
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    broken = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    save_file(broken, folder / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="gives no finite probabilities: train it again"):
        classify(folder / "checkpoint", ["a good film"])


def test_a_mixture_decoder_can_be_classified_with(make, run, tiny_config, encoder_folder, tmp_path):
    MixtureForCausalLM(tiny_config("mixture_of_tokens", vocab_size=16)).save_pretrained(tmp_path / "decoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "decoder" / name).write_bytes((encoder_folder / name).read_bytes())
    ARMS["last_token"] = ClassificationArmConfig(head=HeadConfig(kind="layer_mix", pooling="last"))
    experiment = make("last_token", base=tmp_path / "decoder")
    _, folder, _ = run(experiment, "last_token")
    assert len(classify(folder / "checkpoint", ["good", "a bad film"])) == 2


def test_the_facts_on_the_data_count_what_was_cut(make):
    data = make("last_layer", data={"max_length": 6}).data
    assert data["examples_test"] == 42 and data["examples_validation"] == 32
    assert 0 < data["texts_truncated"] <= 240
    assert data["truncated_percent"] == pytest.approx(100 * data["texts_truncated"] / 240)


def test_what_is_held_equal_is_said(make):
    experiment = make("last_layer", "layer_mix")
    described = {name: arm.describe(experiment.arms["last_layer"]) for name, arm in experiment.arms.items()}
    assert any("order" in phrase for phrase in experiment.held_equal(described))


def test_mistakes_are_named(make, run, encoder_folder, tmp_path):
    ARMS["no_adapter"] = ClassificationArmConfig(tune="adapter")
    ARMS["tokens_without_mix"] = ClassificationArmConfig(head=HeadConfig(per_token=True))
    with pytest.raises(UserError, match="no_adapter"):
        make("no_adapter")
    with pytest.raises(UserError, match="per_token"):
        make("tokens_without_mix")
    with pytest.raises(UserError, match="does not fill groups of 4"):
        run(make("mot"), "mot", batch_size=6)
    with pytest.raises(UserError, match="holds no classifier"):
        classify(tmp_path, ["good"])


def test_lengths_and_evaluations_are_fitted_to_the_model_and_the_texts(make):
    fitted = make("last_layer", data={"max_length": 17}, eval_sequences=33).recipe
    assert (fitted.data.max_length, fitted.training.eval_sequences) == (16, 32)


def test_what_is_left_open_is_fitted_to_the_texts(make):
    nothing = {"max_length": None, "validation_examples": None, "test_examples": None}
    experiment = make("last_layer", "mot", data=nothing)
    data = experiment.recipe.data
    assert (data.validation_examples, data.test_examples, data.max_length % 8) == (24, 48, 0)
    assert experiment.data["examples_test"] == 48


def test_a_base_model_that_has_changed_is_refused(make, run, encoder_folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in encoder_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    _, folder, _ = run(make("last_layer", base=other), "last_layer")
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][5, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not the one"):
        classify(folder / "checkpoint", ["good"])


def test_tokens_that_the_base_does_not_know_are_counted(make, reviews, tmp_path):
    before = make("last_layer").data["unknown_percent"]
    rows = [json.loads(line) for line in reviews.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "other.jsonl"
    other = [row | {"text": f"{row['text']} \u8bed\u8a00"} for row in rows]
    path.write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    assert make("last_layer", data={"path": str(path)}).data["unknown_percent"] > before + 4
