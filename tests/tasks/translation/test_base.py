"""Translation with adapters on a pretrained model: frozen base, saved adapter, languages as tasks, equal parameters."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mixtura.config import (
    AdapterConfig,
    BaseConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.data.prepare import train_tokenizer
from mixtura.results import Leaks
from mixtura.tasks.inspection import diagnose
from mixtura.tasks.translation.experiment import make_translation
from mixtura.tasks.translation.trained_model import translate
from mixtura.training import train

ADAPTERS = {
    "lora": AdapterConfig(rank=24, targets=("q_proj", "v_proj")),
    "languages": AdapterConfig(method="mixture_of_lora", router="task", rank=2),
    "mixture": AdapterConfig(method="mixture_of_lora", num_experts=3),
    "mot": AdapterConfig(method="mixture_of_tokens", num_experts=2, group_size=4, rank=2),
    "full": None,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["Translate this from English to German: ban den"], vocab_size=300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.1, **sizes, **special
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.jsonl"
    rows = [
        {"source": f"{a} {b}", "target": f"{b}{a}", "source_language": "en", "target_language": language}
        for a in ("ban", "den", "fin", "gat", "lit", "mon")
        for b in ("nab", "pol", "rud", "sef", "tik", "vun")
        for language in ("de", "fr")
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return TranslationRecipe(
        name="toy",
        baseline="lora",
        data=TranslationDataConfig(
            source="local",
            path=str(path),
            pairs=("en-de", "en-fr"),
            validation_sources=4,
            test_sources=4,
            max_length=120,
        ),
        base=BaseConfig(name=str(base), num_layers=2),
        training=TrainingConfig(
            steps=2, batch_size=4, eval_every=2, eval_sequences=4, final_eval_sequences=8, save_every=1
        ),
        arms={name: TranslationArmConfig(adapter=adapter) for name, adapter in ADAPTERS.items()},
    )


@pytest.fixture(scope="module")
def experiment(recipe):
    return make_translation(recipe, cache_dir=None)


def run(experiment, name, out, *, resume=False):
    arm, model = experiment.arms[name], experiment.arms[name].build(0)
    how = {"learning_rate": 1e-2, "seed": 0, "label": name, "resume": resume}
    train(model, task=arm.task, config=experiment.recipe.training, out=out, **how)
    return model


def test_arms_say_what_they_train_and_what_leaks(experiment):
    described = {name: arm.describe(experiment.arms["lora"]) for name, arm in experiment.arms.items()}
    assert described["full"].parameters_trainable == described["full"].parameters_total
    lora, mixture = described["lora"].parameters_trainable, described["mixture"].parameters_trainable
    assert 0.5 * lora < mixture <= lora
    assert described["lora"].flops_ratio == 1 and described["full"].flops_ratio > 0.5
    assert [arm.family for arm in experiment.arms.values()] == [
        "lora",
        "mixture_of_lora",
        "mixture_of_lora",
        "mixture_of_tokens",
        "full",
    ]
    assert {name: arm.leaks() for name, arm in experiment.arms.items() if name in ("languages", "mot")} == {
        "languages": Leaks(False, False, False),
        "mot": Leaks(False, True, False),
    }
    assert "trained parameters: from" in experiment.held_equal(described)[-1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_on_a_base_model_trains_resumes_scores_and_translates(experiment, name, tmp_path):
    task = experiment.arms[name].task
    before = {key: value.clone() for key, value in experiment.arms[name].build(0).state_dict().items()}
    model = run(experiment, name, tmp_path / "run")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and not changed & frozen and bool(frozen) == (name != "full")
    for part in ("checkpoint", "checkpoint-2"):
        (tmp_path / "run" / part).rename(tmp_path / part)
    resumed = run(experiment, name, tmp_path / "run", resume=True)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    measured = task.evaluate(resumed, final=True)
    assert measured[experiment.arms[name].deployed_mode]["chrf"] >= 0
    details = task.details(resumed, out=tmp_path / "run")
    sample = details.samples[0]
    line = translate(tmp_path / "run" / "checkpoint", sample.source, source_language="en", target_language="de")
    assert (sample.pair, line) == ("en-de", sample.output)
    again = experiment.arms[name].build(1)
    task.load(again, tmp_path / "run" / "checkpoint")
    assert task.decode_test(again) == task.decode_test(resumed)
    diagnosis = diagnose(tmp_path / "run" / "checkpoint", [], out=tmp_path / "diagnosis").record
    assert bool(diagnosis.layers) == (name not in ("lora", "full"))
    if name == "languages":  # its experts are the directions
        assert diagnosis.layers[0].mutual_information == pytest.approx(1, abs=0.1)


def test_languages_reach_their_own_adapters_alone(experiment):
    arm = experiment.arms["languages"]
    model = arm.build(0).train()
    rows = arm.task.dataset(length=16, seed=0)
    items = [item for item in (rows[i] for i in range(16)) if item["direction"] == 1][:3]
    batch = arm.task.collate(items)
    arm.task.losses(model, batch, num_targets=1).task_loss.backward()
    grads = [p.grad.flatten(1).abs().sum(1) for n, p in model.named_parameters() if p.requires_grad and ".B." in n]
    assert grads and all(grad[0] == 0 and grad[1] > 0 for grad in grads)


def test_the_experts_that_the_data_uses_are_tuned_translate_and_are_counted(base, recipe, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocab_size = len(AutoTokenizer.from_pretrained(base))
    config = MixtralConfig(**sizes, num_key_value_heads=1, vocab_size=vocab_size, num_local_experts=4)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    adapter = AdapterConfig(method="expert_specialized", expert_share=0.4)
    arms = {"experts": TranslationArmConfig(adapter=adapter), "full": TranslationArmConfig()}
    changed = dataclasses.replace(recipe, base=BaseConfig(name=str(tmp_path / "base")), arms=arms, baseline="full")
    experiment = make_translation(changed, cache_dir=None)
    model = run(experiment, "experts", tmp_path / "run")
    described = experiment.arms["experts"].describe(experiment.arms["full"])
    assert 0 < described.parameters_trainable < described.parameters_total / 2
    sample = experiment.arms["experts"].task.details(model, out=tmp_path / "run").samples[0]
    checkpoint = tmp_path / "run" / "checkpoint"
    line = translate(checkpoint, sample.source, source_language="en", target_language="de")
    assert line == sample.output


def test_base_and_scratch_are_not_confused(recipe):
    scratch = dataclasses.replace(recipe, base=BaseConfig())
    with pytest.raises(UserError, match=r"'arms\.lora\.adapter' needs a base model"):
        make_translation(scratch, cache_dir=None)
