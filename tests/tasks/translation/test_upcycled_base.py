"""Feed-forward layers of encoder-decoders that become mixtures of copies: what they compute, learn, save and refuse."""

import dataclasses
import json

import pytest
import torch

from fixtures.encoder_decoders import encoder_decoder, parallel_rows  # noqa: F401 - fixtures
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import (
    ArmConfig,
    BaseConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
    load_recipe,
)
from mixtura.results import Leaks
from mixtura.tasks.translation.experiment import make_translation
from mixtura.tasks.translation.trained_model import translate
from mixtura.training import train
from mixtura.upcycling.copied_layers import UpcycledFeedForward, upcycled_layers

BASES = ("marian_multi", "m2m100", "nllb", "t5", "mt5", "madlad")
LEARNED = ArmConfig(family="token_choice", num_experts=4, top_k=2, normalize_top_k=True, placement="all")
BY_PAIR = ArmConfig(family="token_choice", num_experts=2, top_k=1, route_by="pair", placement="all")
MIXING = ArmConfig(family="mixture_of_tokens", num_experts=4, group_size=4, zero_fill=1.0, placement="all")
LATER = dataclasses.replace(LEARNED, placement="later_half")
ARMS = {
    "full": TranslationArmConfig(),
    "learned": TranslationArmConfig(feed_forward=LEARNED, upcycle="both"),
    "by_pair": TranslationArmConfig(feed_forward=BY_PAIR, upcycle="both"),
    "mixing": TranslationArmConfig(feed_forward=MIXING, upcycle="both"),
    "decoder": TranslationArmConfig(feed_forward=LATER, upcycle="decoder"),
}


def experiment_of(folder, rows, arms=ARMS):
    training = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_sequences": 4, "final_eval_sequences": 8}
    held_out = {"validation_sources": 4, "test_sources": 4, "max_length": 120}
    recipe = TranslationRecipe(
        name="toy",
        baseline="full",
        data=TranslationDataConfig(source="local", path=str(rows), pairs=("en-de", "en-fr"), **held_out),
        base=BaseConfig(name=str(folder)),
        training=TrainingConfig(**training, save_every=1),
        arms=arms,
    )
    return make_translation(recipe, cache_dir=None)


@pytest.fixture(scope="module")
def experiments(encoder_decoder, parallel_rows):  # noqa: F811
    made = {}

    def make(name):
        if name not in made:
            made[name] = experiment_of(encoder_decoder(name), parallel_rows)
        return made[name]

    return make


def batch_of(arm):
    rows = arm.task.dataset(length=4, seed=0)
    return arm.task.collate([rows[index] for index in range(4)])


def logits_of(arm, model, batch):
    arm.task.routing.name_experts(model, batch["directions"])
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "directions")}
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits[batch["labels"].ne(-100)]


@pytest.mark.parametrize("base", BASES)
def test_copies_compute_what_the_dense_model_does(experiments, base):
    arms = experiments(base).arms
    batch = batch_of(arms["full"])
    dense = logits_of(arms["full"], arms["full"].build(0), batch)
    by_pair = logits_of(arms["by_pair"], arms["by_pair"].build(0), batch)
    torch.testing.assert_close(by_pair, dense, rtol=1e-4, atol=1e-5)
    for name in ("learned", "decoder", "mixing"):
        upcycled = logits_of(arms[name], arms[name].build(0), batch)
        difference = (upcycled - dense).abs().max() / dense.abs().max()
        assert 0 < difference < (0.2 if name == "mixing" else 0.1), (name, difference)


@pytest.mark.parametrize("base", BASES)
def test_routers_learn_and_are_balanced_on_both_sides(experiments, base):
    arm = experiments(base).arms["learned"]
    model = arm.build(0).train()
    batch = batch_of(arm)
    losses = arm.task.losses(model, batch, num_targets=arm.task.count_targets(batch))
    assert len(losses.routing) == 4 and losses.aux_loss >= 0.99 and losses.z_loss > 0
    assert arm.task.router_loss_weights(model) == (LEARNED.router_aux_loss_coef, LEARNED.router_z_loss_coef)
    rows = [stats.tokens_per_expert_E.sum().item() for stats in losses.routing]
    real = [batch["attention_mask"].sum().item()] * 2 + [batch["decoder_attention_mask"].sum().item()] * 2
    assert rows == [2 * count for count in real]
    losses.task_loss.backward()
    gates = [layer.mixture.gate.weight.grad.norm() for layer in upcycled_layers(model)]
    assert len(gates) == 4 and min(gates) > 1e-5


def test_only_the_named_side_and_layers_become_mixtures(experiments):
    model = experiments("m2m100").arms["decoder"].build(0)
    names = [name for name, module in model.named_modules() if isinstance(module, UpcycledFeedForward)]
    assert names == ["model.decoder.layers.1.fc1"]


def test_a_language_pair_trains_its_own_experts_alone(experiments):
    arm = experiments("nllb").arms["by_pair"]
    model = arm.build(0).train()
    rows = arm.task.dataset(length=16, seed=0)
    items = [item for item in (rows[i] for i in range(16)) if item["direction"] == 1][:3]
    losses = arm.task.losses(model, arm.task.collate(items), num_targets=1)
    losses.task_loss.backward()
    assert losses.aux_loss is None and len(losses.routing) == 4
    for layer in upcycled_layers(model):
        grads = layer.mixture.experts.down_proj.grad[:, : layer.width].flatten(1).abs().sum(1)
        assert grads[0] == 0 and grads[1] > 0


def test_costs_and_leaks_are_those_of_the_mixtures(experiments):
    arms = experiments("t5").arms
    described = {name: arm.describe(arms["full"]) for name, arm in arms.items()}
    full, learned, by_pair = (described[name] for name in ("full", "learned", "by_pair"))
    width = 16 * 24 * 2 * 4  # parameters of the four dense layers
    assert learned.parameters_total == full.parameters_total + 3 * width + 4 * 4 * 16
    assert learned.parameters_active == full.parameters_total + width + 4 * 4 * 16
    assert by_pair.parameters_active == full.parameters_total and by_pair.flops_ratio == pytest.approx(1, abs=0.02)
    assert {name: arms[name].leaks() for name in ("learned", "by_pair", "mixing")} == {
        "learned": Leaks(False, False, False),
        "by_pair": Leaks(False, False, False),
        "mixing": Leaks(False, True, False),
    }


@pytest.mark.parametrize(
    ("base", "name"), [("marian_multi", "learned"), ("nllb", "by_pair"), ("nllb", "mixing"), ("madlad", "decoder")]
)
def test_a_run_trains_resumes_scores_and_translates(experiments, base, name, tmp_path):
    experiment = experiments(base)
    arm = experiment.arms[name]

    def run(resume=False):
        model = arm.build(0)
        how = {"learning_rate": 1e-2, "seed": 0, "label": name, "resume": resume}
        train(model, task=arm.task, config=experiment.recipe.training, out=tmp_path / "run", **how)
        return model

    model = run()
    for part in ("checkpoint", "checkpoint-2"):
        (tmp_path / "run" / part).rename(tmp_path / part)
    resumed = run(resume=True)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    details = arm.task.details(resumed, out=tmp_path / "run")
    sample = details.samples[0]
    line = translate(tmp_path / "run" / "checkpoint", sample.source, source_language="en", target_language="de")
    assert (sample.pair, line) == ("en-de", sample.output)
    assert len(details.specialization.layers) == (1 if name == "decoder" else 4)
    if name == "by_pair":
        assert all(layer.mutual_information > 0.9 for layer in details.specialization.layers)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("arms.new.feed_forward.family=soft", "upcycled layers are token_choice or mixture_of_tokens"),
        ("arms.new.feed_forward.num_shared_experts=1", r"num_shared_experts' has no meaning for copies"),
        ("arms.new.feed_forward.top_k=1", "so the router would never learn"),
        ("arms.new.adapter.rank=4", "it has an adapter too"),
    ],
)
def test_settings_that_cannot_be_upcycled_are_refused(lines, sentence, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'task = "translation"\nname = "x"\nbaseline = "new"\n[data]\nsource = "local"\npath = "x"\n[base]\nname = "x"\n'
        '[arms.new]\nupcycle = "both"\n[arms.new.feed_forward]\nfamily = "token_choice"\nnum_experts = 4\ntop_k = 2\n'
        "normalize_top_k = true\n",
        encoding="utf-8",
    )
    load_recipe(path, [])
    with pytest.raises(UserError, match=sentence):
        load_recipe(path, [lines])


def test_bases_without_such_layers_are_refused(encoder_decoder, parallel_rows, tmp_path):  # noqa: F811
    arms = {"full": TranslationArmConfig(), "new": ARMS["learned"]}
    experiment = experiment_of(encoder_decoder("nllb_moe"), parallel_rows, arms)
    with pytest.raises(UserError, match="no dense feed-forward layer of a kind that can be upcycled"):
        experiment.arms["new"].build(0)
    assert json.loads((encoder_decoder("nllb_moe") / "config.json").read_text(encoding="utf-8"))["num_experts"] == 4
    assert load_base(str(encoder_decoder("nllb_moe")))[0].config.num_experts == 4
