"""Comparisons of translation models from scratch, from the data to the bootstrap."""

import dataclasses
import json
import random

import pytest
import torch

from mixtura.config import (
    ArmConfig,
    BaseConfig,
    ModelConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.config.finetune_checks import check_finetune_recipe
from mixtura.results import Leaks
from mixtura.results.document import PairedTest
from mixtura.results.json_form import from_plain, to_plain
from mixtura.results.run import TranslationDetails
from mixtura.tasks.translation.experiment import make_translation
from mixtura.tasks.translation.trained_model import translate, translate_lines
from mixtura.training import train

WORDS = ["ban", "den", "fin", "gat", "lit", "mon", "nab", "pol", "rud", "sef"]


def translated(sentence, language):
    """Every word backwards ("xx"), or with "u" before it ("yy")."""
    return " ".join(word[::-1] if language == "xx" else f"u{word}" for word in sentence.split())


def write_toy(path, *, sentences=300):
    """A file of pairs, each sentence in both languages; the same on every machine."""
    draw = random.Random(0)
    lines = []
    for _ in range(sentences):
        source = " ".join(draw.choices(WORDS, k=draw.randint(2, 4)))
        for language in ("xx", "yy"):
            row = {"source": source, "target": translated(source, language)}
            lines.append(json.dumps({**row, "source_language": "en", "target_language": language}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def toy_recipe(path, *, arms=None, **changes):
    """A comparison on the toy languages that takes seconds."""
    training = {"steps": 4, "batch_size": 8, "eval_every": 2, "save_every": 2, "eval_sequences": 16}
    model = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    data = {"pairs": ("en-xx", "en-yy"), "vocab_size": 320, "max_length": 40, "test_sources": 20}
    return TranslationRecipe(
        name="toy",
        data=TranslationDataConfig(
            source="local", path=str(path), validation_sources=16, **(data | changes.pop("data", {}))
        ),
        model=ModelConfig(**(model | changes.pop("model", {}))),
        training=TrainingConfig(**(training | {"final_eval_sequences": 16} | changes.pop("training", {}))),
        arms=arms or {"dense": TranslationArmConfig()},
        **changes,
    )


PAIRS = ArmConfig(family="token_choice", route_by="pair")
NAMED = ArmConfig(family="token_choice", route_by="target", num_experts=2, num_shared_experts=1)
ARMS = {
    "dense": TranslationArmConfig(),
    "token_choice": TranslationArmConfig(feed_forward=ArmConfig(family="token_choice", num_experts=4)),
    "languages": TranslationArmConfig(feed_forward=NAMED),
    "mixture_of_tokens": TranslationArmConfig(
        feed_forward=ArmConfig(family="mixture_of_tokens", num_experts=4, group_size=4)
    ),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.jsonl")


@pytest.fixture(scope="module")
def experiment(toy):
    return make_translation(toy_recipe(toy, arms=ARMS), cache_dir=None)


def run(experiment, name, out, *, seed=0, resume=False, learning_rate=3e-3):
    arm, training = experiment.arms[name], experiment.recipe.training
    model = arm.build(seed)
    how = {"learning_rate": learning_rate, "seed": seed, "label": name, "resume": resume}
    return model, train(model, task=arm.task, config=training, out=out, **how)


def test_every_arm_costs_what_dense_costs_and_only_groups_leak(experiment):
    baseline = experiment.arms["dense"]
    described = {name: arm.describe(baseline) for name, arm in experiment.arms.items()}
    for name, found in described.items():
        assert abs(found.flops_ratio - 1) < 0.02, name
        model = experiment.arms[name].build(0)
        assert found.parameters_total == found.parameters_trainable == sum(p.numel() for p in model.parameters())
        leaks = experiment.arms[name].leaks()
        assert leaks == Leaks(False, name == "mixture_of_tokens", False)
    assert described["languages"].settings["route_by"] == "target"
    assert [experiment.arms["mixture_of_tokens"].training_mode, baseline.training_mode] == ["group", "causal"]
    assert "32 sentence pairs" in experiment.held_equal(described)[0]


def test_all_arms_see_the_same_pairs_in_the_same_order(experiment):
    batches = [
        [arm.task.collate([arm.task.dataset(length=16, seed=3)[i] for i in range(16)])["input_ids"]]
        for arm in experiment.arms.values()
    ]
    assert all(torch.equal(batch[0], batches[0][0]) for batch in batches)
    assert len({arm.task.tokens_per_example for arm in experiment.arms.values()}) == 1


@pytest.mark.parametrize("name", ARMS)
def test_the_loss_is_the_mean_over_the_tokens_of_the_translations(experiment, name):
    arm = experiment.arms[name]
    model, task = arm.build(0).eval(), arm.task
    dataset = task.dataset(length=8, seed=0)
    batch = task.collate([dataset[i] for i in range(8)])
    targets = task.count_targets(batch)
    found = task.losses(model, batch, num_targets=targets).task_loss
    told = task.routing.name_experts(model, batch["directions"])
    whole = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], **told)
    torch.testing.assert_close(found, whole.loss)
    assert targets == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("name", ["dense", "languages"])
def test_padding_changes_no_loss(experiment, name):
    arm = experiment.arms[name]
    model, task = arm.build(0).eval(), arm.task
    dataset = task.dataset(length=8, seed=0)
    items = [dataset[i] for i in range(8)]
    together = task.losses(model, task.collate(items), num_targets=1).task_loss
    alone = sum(task.losses(model, task.collate([item]), num_targets=1).task_loss for item in items)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ARMS)
def test_a_run_is_trained_scored_saved_and_told_of(experiment, name, tmp_path):
    task = experiment.arms[name].task
    model, outcome = run(experiment, name, tmp_path / "run")
    assert outcome.steps == 4 and len(outcome.curve) == 2
    measured = task.evaluate(model, final=True)
    deployed = experiment.arms[name].deployed_mode
    assert set(measured) == ({"group", "alone"} if name == "mixture_of_tokens" else {"causal"})
    assert 0 <= measured[deployed]["chrf"] <= 100 and measured[deployed]["loss"] > 0
    details = task.details(model, out=tmp_path / "run")
    assert from_plain(TranslationDetails, json.loads(json.dumps(to_plain(details)))) == details
    assert list(details.pairs) == ["en-xx", "en-yy"]
    assert sum(found.chrf for found in details.pairs.values()) / 2 == measured[deployed]["chrf"]
    assert details.pairs["en-xx"].sentences == 20 and len(details.samples) == 4
    assert 0 < details.pairs["en-yy"].copy_chrf < 100
    assert (details.specialization is not None) == (name != "dense")
    if name == "languages":
        assert details.specialization.layers[0].share == [[1.0, 0.0], [0.0, 1.0]]
    outputs = [json.loads(line) for line in (tmp_path / "run" / "outputs.jsonl").read_text("utf-8").splitlines()]
    assert len(outputs) == 40
    line = translate(tmp_path / "run" / "checkpoint", outputs[0]["source"], source_language="en", target_language="xx")
    assert outputs[0]["pair"] == "en-xx" and line == outputs[0]["output"]
    languages = {"source_language": "eng-Latn-US", "target_language": "XX_yy"}
    assert translate(tmp_path / "run" / "checkpoint", outputs[0]["source"], **languages) == line


@pytest.mark.parametrize("name", ["mixture_of_tokens", "languages"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(experiment, name, tmp_path):
    whole, _ = run(experiment, name, tmp_path / "whole")
    run(experiment, name, tmp_path / "run")
    for part in ("checkpoint", "checkpoint-4"):
        (tmp_path / "run" / part).rename(tmp_path / part)
    resumed, outcome = run(experiment, name, tmp_path / "run", resume=True)
    assert outcome.steps == 4
    for (key, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found), key


def write_outputs(folder, sentences, translates):
    """Outputs of a run that translates the pairs named, and copies the source of the others."""
    folder.mkdir(parents=True)
    records = [
        {
            "pair": pair.pair,
            "source": pair.source,
            "reference": pair.target,
            "output": pair.target if pair.pair in translates else pair.source,
        }
        for pair in sentences
    ]
    (folder / "outputs.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def test_the_bootstrap_compares_outputs_of_the_same_seed(experiment, tmp_path):
    sentences = experiment.translation.test.sentences
    for name in experiment.arms:
        write_outputs(tmp_path / "arms" / name / "seed0", sentences, {"en-xx"} if name == "languages" else set())
    found = experiment.across_arms(tmp_path).paired_bootstrap
    assert set(found) == {"token_choice", "languages", "mixture_of_tokens"}
    assert found["languages"]["en-xx"].difference > 50 and found["languages"]["en-xx"].p_value < 0.01
    assert found["languages"]["en-yy"] == PairedTest(difference=0.0, p_value=1.0)


def test_seeds_that_are_sure_of_different_winners_show_no_difference(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "recipe", dataclasses.replace(experiment.recipe, seeds=(0, 1)))
    sentences = experiment.translation.test.sentences
    for seed, ahead in ((0, "languages"), (1, "dense")):
        for name in ("dense", "languages"):
            better = {"en-xx"} if name == ahead else set()
            better |= {"en-yy"} if name == "languages" else set()
            write_outputs(tmp_path / "arms" / name / f"seed{seed}", sentences, better)
    found = experiment.across_arms(tmp_path).paired_bootstrap["languages"]
    assert found["en-xx"].p_value == 1.0 and abs(found["en-xx"].difference) < 1e-9
    assert found["en-yy"].p_value < 0.01 and found["en-yy"].difference > 50


def test_two_toy_languages_are_learnt(tmp_path):
    path = write_toy(tmp_path / "toy.jsonl", sentences=800)
    training = {"steps": 200, "batch_size": 32, "eval_every": 100, "save_every": 200, "weight_decay": 0.01}
    model = {"hidden_size": 64, "intermediate_size": 128}
    experiment = make_translation(toy_recipe(path, training=training, model=model), cache_dir=None)
    model, outcome = run(experiment, "dense", tmp_path / "run", learning_rate=5e-3)
    curve = [point.loss["causal"] for point in outcome.curve]
    assert curve[1] < curve[0]
    assert experiment.arms["dense"].task.evaluate(model, final=True)["causal"]["chrf"] > 80
    source = experiment.translation.test.sentences[0].source
    text = translate(
        tmp_path / "run" / "checkpoint", f"{source}\n\n{source}", source_language="en", target_language="yy"
    )
    first, empty, second = text.split("\n")
    assert first == second == translated(source, "yy") and empty == ""


@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        pytest.param(ArmConfig(family="soft"), "cannot translate: choose one of dense", id="sees the future"),
        pytest.param(ArmConfig(family="dense", route_by="pair"), "use token_choice", id="no experts"),
        pytest.param(
            ArmConfig(family="token_choice", route_by="pair", num_experts=2, top_k=2),
            "set num_experts to 2",
            id="top_k",
        ),
        pytest.param(
            ArmConfig(family="mixture_of_tokens", inference_mode="group", group_size=4),
            "has no group",
            id="never alone",
        ),
    ],
)
def test_arms_that_cannot_work_are_refused(toy, arm, complaint):
    with pytest.raises(UserError, match=complaint):
        make_translation(toy_recipe(toy, arms={"dense": TranslationArmConfig(feed_forward=arm)}), cache_dir=None)


def test_settings_that_leave_too_little_are_refused(toy):
    with pytest.raises(UserError, match="No sentence pair is left for train"):
        make_translation(toy_recipe(toy, data={"max_length": 3}), cache_dir=None)
    arm = make_translation(toy_recipe(toy, arms=ARMS), cache_dir=None).arms["mixture_of_tokens"]
    with pytest.raises(UserError, match="32 sentence pairs to hold out, fewer than one batch of 64"):
        arm.task.check(arm.build(0), batch_size=64)


def test_what_is_left_open_is_fitted_to_the_sentences(tmp_path):
    open_keys = {"validation_sources": None, "test_sources": None, "max_characters": None, "max_length": None}
    arms = {"dense": TranslationArmConfig(), "pairs": TranslationArmConfig(feed_forward=PAIRS)}
    arms["mot"] = TranslationArmConfig(feed_forward=ArmConfig(family="mixture_of_tokens", group_size=32))
    recipe = toy_recipe(write_toy(tmp_path / "few.jsonl", sentences=20), arms=arms, training={"batch_size": 32})
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **open_keys))
    experiment = make_translation(recipe, cache_dir=None)
    fitted = experiment.recipe
    assert (fitted.data.validation_sources, fitted.data.test_sources) == (2, 4)
    assert fitted.data.max_characters % 8 == fitted.data.max_length % 8 == 0
    assert fitted.arms["pairs"].feed_forward.num_experts == 2
    assert fitted.training.batch_size == fitted.arms["mot"].feed_forward.group_size == 4
    for arm in experiment.arms.values():
        arm.task.check(arm.build(0), batch_size=fitted.training.batch_size)
    again = make_translation(fitted, cache_dir=None)
    assert again.recipe == fitted and again.data_digest == experiment.data_digest


def test_what_a_model_cannot_translate_is_refused(experiment, tmp_path):
    run(experiment, "dense", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    languages = {"source_language": "en", "target_language": "xx"}
    for text, target, complaint in (
        ("", "xx", "empty"),
        ("ban", "zz", "does not translate en-zz"),
        ("ban", "German", r"'German' is no language code: write a language code .de for German."),
        ("ban " * 60, "xx", "split"),
    ):
        with pytest.raises(UserError, match=complaint):
            translate(folder, text, source_language="en", target_language=target)
    with pytest.raises(UserError, match=r"Line 2 has .*\(and so is line 4\): split it"):
        translate(folder, "ban\n" + "ban " * 60 + "\nban\n" + "ban " * 60, **languages)
    done = translate_lines(folder, ["ban", "", "ban ban"], **languages)
    assert len(done.lines) == 3 and done.lines[1] == "" and not any("\n" in line for line in done.lines)
    alone = [translate_lines(folder, [line], **languages) for line in ("ban", "ban ban")]
    assert [done.lines[0], done.lines[2]] == [one.lines[0] for one in alone]
    assert done.cut == [number for number, one in zip((1, 3), alone, strict=True) if one.cut]
    with pytest.raises(UserError, match="no translation model"):
        translate(tmp_path, "ban", **languages)
    with pytest.raises(UserError, match="num_beams is 0"):
        translate(folder, "ban", num_beams=0, **languages)


OWN = {"dense": TranslationArmConfig(), "pair": TranslationArmConfig(architecture="encoder_decoder")}


def test_an_encoder_decoder_from_scratch_reads_the_same_tokens_at_the_same_cost(toy):
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 256}
    made = make_translation(toy_recipe(toy, arms=OWN, model=sizes), cache_dir=None)
    dense, pair = made.arms["dense"], made.arms["pair"]
    described = pair.describe(dense)
    assert described.settings == {"architecture": "encoder_decoder", "feed_forward_width": 288}
    assert abs(described.flops_ratio - 1) < 0.03
    assert described.parameters_total == sum(parameter.numel() for parameter in pair.build(0).parameters())
    assert pair.leaks() == Leaks(False, False, False)
    rows = [pair.task.dataset(length=8, seed=3)[i] for i in range(8)]
    read, own = (arm.task.collate(rows) for arm in (dense, pair))
    for i, row in enumerate(rows):
        source, target = row["tokens"][: row["prompt"]], row["tokens"][row["prompt"] :]
        assert read["input_ids"][i][: len(row["tokens"])].tolist() == row["tokens"].tolist()
        assert own["input_ids"][i][: len(source)].tolist() == source.tolist()
        assert own["labels"][i][: len(target)].tolist() == target.tolist()
    assert dense.task.count_targets(read) == pair.task.count_targets(own)


def test_an_encoder_decoder_from_scratch_learns_and_translates_from_its_folder(toy, tmp_path):
    made = make_translation(toy_recipe(toy, arms=OWN, training={"steps": 40}), cache_dir=None)
    model, result = run(made, "pair", tmp_path / "pair")
    losses = [point.measures["loss"]["causal"] for point in result.curve]
    assert losses[-1] < losses[0] - 0.5
    task, sentences = made.arms["pair"].task, made.translation.test.sentences
    texts = [pair.source for pair in sentences if pair.pair == "en-xx"]
    expected = [
        output for output, pair in zip(task.decode_test(model).greedy, sentences, strict=True) if pair.pair == "en-xx"
    ]
    done = translate_lines(tmp_path / "pair" / "checkpoint", texts, source_language="en", target_language="xx")
    assert done.lines == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"dense": TranslationArmConfig(architecture="encoder_decoder", feed_forward=PAIRS)}}, "dense layers"),
        ({"arms": OWN, "model": {"num_key_value_heads": 1}}, "num_key_value_heads"),
        ({"arms": OWN, "base": BaseConfig(name="smollm2")}, "models from scratch"),
    ],
)
def test_what_an_encoder_decoder_from_scratch_cannot_be_is_refused(toy, changes, said):
    with pytest.raises(UserError, match=said):
        check_finetune_recipe(toy_recipe(toy, **changes))
