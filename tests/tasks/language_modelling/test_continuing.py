"""Arms that start from checkpoints: models and costs are the checkpoints', and training goes on from there."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from mixtura import cli, upcycle
from mixtura.comparison.runner import compare, train_arm
from mixtura.config import UserError, recipe_from_dict
from mixtura.data.prepare import train_tokenizer
from mixtura.evaluation import evaluate
from mixtura.exporting.stock_folder import export
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.generation import generate_text
from mixtura.planning import flops_per_token
from mixtura.results import Leaks
from mixtura.tasks.language_modelling.experiment import make_pretraining

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(tiny_corpus, tmp_path_factory):
    """A dense Llama, its token-choice mixture at equal FLOPs, its mixture of tokens, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, vocab_size in (("dense", 300), ("other", 290)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SHAPE
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        train_tokenizer(tiny_corpus, vocab_size=vocab_size).save_pretrained(folder / name)
    upcycle(folder / "dense", folder / "sparse", num_experts=4, split=2, top_k=2)
    upcycle(folder / "dense", folder / "mot", family="mixture_of_tokens", num_experts=4, top_k=2)
    return folder


@pytest.fixture
def build(checkpoints, tiny_text):
    """A factory: the recipe that trains these checkpoints on, the first as the baseline."""

    def build(*names, steps=2, data=None, arm=None, **training):
        arms = {name: {"init_from": str(checkpoints / name), **(arm or {})} for name in names}
        settings = {"steps": steps, "batch_size": 4, "eval_every": 2, "eval_sequences": 8, "final_eval_sequences": 8}
        text = {"source": "local", "path": str(tiny_text), "sequence_length": 16, "validation_fraction": 0.2}
        return recipe_from_dict(
            {
                "name": "on",
                "baseline": names[0],
                "data": text | (data or {}),
                "training": settings | {"save_every": 2} | training,
                "arms": arms,
            }
        )

    return build


def test_an_arm_is_its_checkpoint_whatever_the_seed(build, checkpoints):
    arms = make_pretraining(build("dense", "sparse", "mot"), cache_dir=None).arms
    ids_BL = torch.randint(300, (4, 9))
    expected = LlamaForCausalLM.from_pretrained(checkpoints / "dense").eval()(ids_BL).logits
    for name, seed in (("dense", 0), ("dense", 1), ("sparse", 0)):
        model = arms[name].build(seed).eval()
        assert_close(model(ids_BL).logits, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(arms["mot"].build(0), MixtureForCausalLM)
    assert [arms[name].family for name in arms] == ["dense", "token_choice", "mixture_of_tokens"]


def test_what_an_arm_costs_and_is_comes_from_its_checkpoint(build):
    experiment = make_pretraining(build("dense", "sparse", "mot"), cache_dir=None)
    described = {name: arm.describe(experiment.arms["dense"]) for name, arm in experiment.arms.items()}
    for name, arm in experiment.arms.items():
        assert described[name].parameters_total == sum(p.numel() for p in arm.build(0).parameters())
        assert described[name].flops_per_token == flops_per_token(arm.model_config, sequence_length=16)
    assert described["sparse"].settings["top_k"] == 2 and described["sparse"].settings["num_experts"] == 4
    assert described["sparse"].settings["expert_width"] == 12
    assert described["mot"].settings["alone_top_k"] == 2
    held = " ".join(experiment.held_equal(described))
    assert "every arm starts from its checkpoint" in held and "initialisation rule" not in held


def test_flops_that_differ_are_not_said_to_be_equal(build, checkpoints, tmp_path):
    upcycle(checkpoints / "dense", checkpoints / "dear", num_experts=4, top_k=2)
    recipe = build("dense", "dear")
    experiment = make_pretraining(recipe, cache_dir=None)
    described = {name: arm.describe(experiment.arms["dense"]) for name, arm in experiment.arms.items()}
    assert described["dear"].flops_ratio > 1.2
    assert "FLOPs" not in " ".join(experiment.held_equal(described))


def test_training_settings_are_the_recipes(build):
    settings = {"population_rate": 0.1, "zero_fill": 0.5}
    config = make_pretraining(build("mot", arm=settings), cache_dir=None).arms["mot"].model_config
    assert (config.population_rate, config.zero_fill) == (0.1, 0.5)
    assert config.population


def test_a_comparison_trains_all_checkpoints_on_and_resumes_to_the_same(build, tmp_path):
    recipe = build("dense", "sparse", "mot", steps=4)
    results = compare(recipe, out=tmp_path / "whole")
    assert results.arms["sparse"].flops_ratio == pytest.approx(1, abs=0.02)  # the router
    kept = tmp_path / "whole" / "arms" / "sparse" / "seed0" / "checkpoint"
    # Trained on: no longer the checkpoint that it was, and loadable with its tokenizer.
    before = make_pretraining(recipe, cache_dir=None).arms["sparse"].build(0).state_dict()
    after = MixtureForCausalLM.from_pretrained(kept).state_dict()
    assert any((before[name] != after[name]).any() for name in before)
    assert (kept / "tokenizer.json").is_file()
    again = compare(recipe, out=tmp_path / "again")
    for name in results.arms:
        assert results.arms[name].runs[0].final == again.arms[name].runs[0].final


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (("dense", "other"), {}, r"'arms\.other\.init_from' has another tokenizer than 'arms\.dense\.init_from'"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(build, names, data, message):
    with pytest.raises(UserError, match=message):
        make_pretraining(build(*names, data=data), cache_dir=None)


def test_lengths_and_batches_are_fitted_to_the_checkpoint(build):
    recipe = make_pretraining(build("mot", batch_size=6, data={"sequence_length": 128}), cache_dir=None).recipe
    assert (recipe.training.batch_size, recipe.data.sequence_length) == (4, 64)


def test_a_damaged_checkpoint_is_refused(build, checkpoints, tmp_path):
    broken = checkpoints / "broken"
    broken.mkdir()
    for file in (checkpoints / "sparse").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    arm = make_pretraining(build("broken"), cache_dir=None).arms["broken"]
    with pytest.raises(UserError, match="cannot be loaded"):
        arm.build(0)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_one_command_trains_a_checkpoint_on_with_ones_own_text(
    checkpoints, tiny_text, tmp_path, monkeypatch, capsys, name
):
    changes = ["training.steps=2", "training.batch_size=4", "training.eval_sequences=4", "data.sequence_length=16"]
    changes += ["training.final_eval_sequences=4", "training.eval_every=2", "data.validation_fraction=0.2"]
    sets = [part for change in changes for part in ("--set", change)]
    start = ["train", "--from", str(checkpoints / name), "--text", str(tiny_text), "--out", str(tmp_path / "on"), *sets]
    monkeypatch.setattr("sys.argv", ["mixtura", *start])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert f"Model: {tmp_path / 'on' / 'arms' / 'model' / 'seed0' / 'checkpoint'}" in capsys.readouterr().out


def test_a_recipe_of_several_arms_is_asked_which(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mixtura", "train", "--preset", "quick", "--from", str(checkpoints / "dense")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "choose one with --arm dense|token_choice|mixture_of_tokens" in capsys.readouterr().err


def test_one_arm_is_trained_alone_as_in_the_comparison(build, tmp_path):
    recipe = build("sparse", steps=2)
    alone = train_arm(recipe, "sparse", seed=0, out=tmp_path / "alone")
    whole = compare(recipe, out=tmp_path / "whole")
    assert alone.final == whole.arms["sparse"].runs[0].final


def test_a_mixture_of_tokens_trains_as_its_checkpoint_was_made_to(build):
    arm = make_pretraining(build("mot"), cache_dir=None).arms["mot"]
    assert arm.model_config.zero_fill == 1.0
    assert arm.training_mode == arm.deployed_mode == "alone"
    assert arm.leaks() == Leaks(False, False, False)
    grouped = make_pretraining(build("mot", arm={"zero_fill": 0.0}), cache_dir=None).arms["mot"]
    assert grouped.model_config.zero_fill == 0.0 and grouped.training_mode == "group"
    assert grouped.leaks() == Leaks(False, True, False)


@pytest.fixture
def biased(checkpoints):
    """A token-choice model whose experts are chosen with a bias that decides."""
    torch.manual_seed(0)
    mixture = {"mlp_layer_types": ["dense", "token_choice"], "num_experts": 4, "expert_bias_update_rate": 0.01}
    config = MixtureConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.3, **SHAPE, **mixture)
    model = MixtureForCausalLM(config).eval()
    model.mixture_layers()[0].expert_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0]))
    model.save_pretrained(checkpoints / "biased")
    for file in (checkpoints / "dense").glob("tokenizer*"):
        (checkpoints / "biased" / file.name).write_bytes(file.read_bytes())
    return model


def test_the_bias_of_the_choice_is_kept(build, biased):
    ids_BL = torch.randint(300, (2, 9))
    model = make_pretraining(build("biased"), cache_dir=None).arms["biased"].build(0).eval()
    assert torch.equal(model(ids_BL).logits, biased(ids_BL).logits)
    with pytest.raises(UserError, match=r"expert_bias_update_rate' is 0, but .* a bias, which would be lost"):
        make_pretraining(build("biased", arm={"expert_bias_update_rate": 0.0}), cache_dir=None)


def test_a_missing_tensor_is_not_filled_with_random_numbers(build, biased, checkpoints):
    weights = checkpoints / "biased" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    arm = make_pretraining(build("biased"), cache_dir=None).arms["biased"]
    with pytest.raises(UserError, match=r"is damaged: model\.layers\.0\.mlp\.down_proj\.weight is missing"):
        arm.build(0)


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_biases_and_norms_of_attention_are_counted(build, checkpoints, kind):
    folder = checkpoints / kind.model_type
    # The tokenizer of this kind adds a token.
    config = kind(vocab_size=310, max_position_embeddings=64, num_key_value_heads=2, **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in (checkpoints / "dense").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    arm = make_pretraining(build(kind.model_type), cache_dir=None).arms[kind.model_type]
    total = sum(parameter.numel() for parameter in arm.build(0).parameters())
    assert total == arm.describe(arm).parameters_total == arm.describe(arm).parameters_active


def test_layers_that_no_recipe_could_name_are_told(build, checkpoints):
    upcycle(checkpoints / "dense", checkpoints / "first", num_experts=4, layers="0")
    arm = make_pretraining(build("first"), cache_dir=None).arms["first"]
    assert arm.describe(arm).settings["placement"] == "layers 0"


def test_a_comparison_at_unequal_flops_says_so_first(build, checkpoints, tmp_path):
    upcycle(checkpoints / "dense", checkpoints / "twice", num_experts=4, top_k=2)
    results = compare(build("dense", "twice", steps=4), out=tmp_path / "out")
    ratio = results.arms["twice"].flops_ratio
    verdict, said = results.summary.verdict, results.summary.arms["twice"]
    assert verdict.finding.startswith(
        f"Equal steps, not equal FLOPs: a token of twice costs {ratio:.2f} times one of dense. "
    )
    assert results.summary.cautions[0].kind == "flops"
    assert said.equal_flops.arm_step * ratio == pytest.approx(said.equal_flops.baseline_step)
    assert "Loss difference at equal FLOPs" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert results.summary.anchor is None
    limits = {limit.title: limit.text for limit in results.summary.limits}
    assert "The intervals cover data order, not" in limits["Other text"]


def test_another_checkpoint_under_the_same_name_is_refused(build, checkpoints, tmp_path):
    upcycle(checkpoints / "dense", checkpoints / "changing", num_experts=4, split=2, noise=0.01)
    recipe = build("changing")
    train_arm(recipe, "changing", seed=0, out=tmp_path / "out")
    shutil.rmtree(checkpoints / "changing")
    upcycle(checkpoints / "dense", checkpoints / "changing", num_experts=4, split=2, noise=0.01, seed=1)
    with pytest.raises(UserError, match="The checkpoint to start from has changed since"):
        train_arm(recipe, "changing", seed=0, out=tmp_path / "out")


def test_an_interrupted_run_ends_at_the_same_weights(build, tmp_path, keep_checkpoints):
    recipe = build("sparse", steps=4)
    whole = train_arm(recipe, "sparse", seed=0, out=tmp_path / "whole")
    run = tmp_path / "cut" / "arms" / "sparse" / "seed0"
    train_arm(recipe, "sparse", seed=0, out=tmp_path / "cut")
    shutil.rmtree(run / "checkpoint")
    shutil.rmtree(run / "checkpoint-4")
    (run / "result.json").unlink()
    assert train_arm(recipe, "sparse", seed=0, out=tmp_path / "cut").final == whole.final
    one, other = (
        load_file(tmp_path / name / "arms/sparse/seed0/checkpoint/model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "container"), [("dense", "llama"), ("sparse", "mixtral")])
def test_what_was_trained_on_is_evaluated_writes_and_is_exported(build, tiny_text, tmp_path, name, container):
    train_arm(build(name), name, seed=0, out=tmp_path / "out")
    trained = tmp_path / "out" / "arms" / name / "seed0" / "checkpoint"
    assert evaluate(trained, tiny_text, sequence_length=16)["causal"].loss > 0
    text = generate_text(trained, "the film", max_new_tokens=4, temperature=0, seed=0)
    exported = export(trained, tmp_path / "exported", to=container)
    assert exported.receipt is not None and exported.receipt.passed
    assert generate_text(tmp_path / "exported", "the film", max_new_tokens=4, temperature=0, seed=0) == text
