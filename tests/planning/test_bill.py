"""What a recipe takes on hardware: exact sizes, the best layout, what does not fit and what would."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtura.config import Recipe, UserError, load_recipe, starts_from_checkpoints
from mixtura.models.build import build_model_config
from mixtura.planning import flops_per_token, model_parameters, state_memory
from mixtura.planning.bill import Workload, best_layout, plan_recipe
from mixtura.planning.formulas import DecoderShape, shape_of_arm
from mixtura.planning.hardware import communicated_bytes, read_hardware
from mixtura.planning.step_memory import Division, ModelSizes, step_memory

RECIPES = Path(__file__).parents[2] / "recipes"
PRETRAINING = [
    recipe
    for recipe in map(load_recipe, sorted(RECIPES.glob("*.toml")))
    if isinstance(recipe, Recipe) and not starts_from_checkpoints(recipe)
]


def mixtral(**changes):
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    experts = {"moe_intermediate_size": 14336, "num_experts": 8, "num_experts_per_tok": 2}
    shape = {"num_key_value_heads": 8, "intermediate_size": 14336, "tie_word_embeddings": False}
    return DecoderShape(**(sizes | experts | shape | {"mlp_layer_types": ("token_choice",) * 32} | changes))


def workload(shape, **changes):
    return Workload(**({"shape": shape, "sequence_length": 4096, "sequences_per_step": 1024, "steps": 1000} | changes))


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda recipe: recipe.name)
def test_sizes_of_a_recipe_are_those_of_the_model_that_it_builds(recipe):
    for arm in recipe.arms.values():
        if arm.control == "shared_width":
            continue
        built = build_model_config(
            recipe.model,
            arm,
            vocab_size=recipe.data.vocab_size,
            max_position_embeddings=recipe.data.sequence_length,
            width_multiple=recipe.training.width_multiple,
        )
        planned, length = shape_of_arm(recipe, arm), recipe.data.sequence_length
        assert model_parameters(planned) == model_parameters(built)  # pyright: ignore[reportArgumentType]
        assert flops_per_token(planned, sequence_length=length) == flops_per_token(
            built,  # pyright: ignore[reportArgumentType]
            sequence_length=length,
        )


def test_what_a_copy_on_every_device_cannot_hold_is_divided():
    found = best_layout("moe", workload(mixtral()), read_hardware("128xH100"))
    assert found.parameters == 46_702_792_704
    assert not found.plain.fits(read_hardware("128xH100")) and found.best is not None
    assert found.best.division.shards * found.best.division.expert_ranks > 1
    assert found.best.memory.total < 80e9


def test_every_layout_does_the_whole_step():
    found = best_layout("moe", workload(mixtral()), read_hardware("64xH200"))
    for layout in (found.best, found.plain, found.smallest):
        by = layout.division
        assert by.devices == 64 and by.devices * by.micro_batch * by.micro_batches == 1024


def test_groups_never_leave_a_device():
    mixture = mixtral(mlp_layer_types=("mixture_of_tokens",) * 32, group_size=16)
    found = best_layout("mot", workload(mixture, group=16), read_hardware("32xH200"))
    assert found.smallest.division.micro_batch % 16 == 0
    told = "1,024 sequences, which 128 devices cannot share in whole groups of 16 sequences: make .*a multiple of 2,048"
    with pytest.raises(UserError, match=told):
        best_layout("mot", workload(mixture, group=16), read_hardware("128xH200"))


def test_mixtures_are_exchanged_in_place_of_rows():
    """In a group of 16 tokens 8 experts get 8 mixtures, where token choice sends each of the 16 tokens twice."""
    mixed = mixtral(mlp_layer_types=("mixture_of_tokens",) * 32, group_size=16)
    divided, sent = Division(shards=8, expert_ranks=8, micro_batch=16), []
    for shape in (mixtral(), mixed):
        sizes = ModelSizes(shape, sequence_length=4096)
        weights = communicated_bytes(sizes, dataclasses.replace(divided, micro_batch=0), dtype="bfloat16")
        sent.append(communicated_bytes(sizes, divided, dtype="bfloat16") - weights)
    assert sent[0] == pytest.approx(4 * sent[1])
    assert sent[0] == pytest.approx(4 * 32 * 2 * 16 * 4096 * 4096 * 2 * 7 / 8)


def test_what_does_not_fit_is_said_with_what_would():
    recipe = next(recipe for recipe in PRETRAINING if recipe.name == "quick")
    small = dataclasses.replace(read_hardware("2xRTX4090"), memory_gb=0.03)
    bill = plan_recipe(recipe, small, arm="mixture_of_tokens")
    plan, _ = bill.arms[0]
    assert plan.best is None
    assert any(
        "'mixture_of_tokens' does not fit: the least that a device needs is" in line and "It would fit with" in line
        for line in bill.advice
    )
    assert "does not fit" in "\n".join(bill.lines())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("translation", "'translation' is a recipe for translation, and only recipes of pretraining are planned: run"),
        ("continue", "'continue' starts from checkpoints, and only recipes that train from random weights are planned"),
    ],
)
def test_recipes_that_do_not_pretrain_from_random_weights_are_refused(name, told):
    with pytest.raises(UserError, match=told):
        plan_recipe(load_recipe(RECIPES / f"{name}.toml"), read_hardware("1xH100"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_those_of_the_optimizer(name):
    shape = mixtral()
    sizes = ModelSizes(shape, sequence_length=4096)
    planned = step_memory(sizes, Division(), optimizer=name).optimizer
    assert planned == pytest.approx(state_memory(shape, optimizer=name).optimizer)


def test_an_unknown_arm_is_refused():
    with pytest.raises(UserError, match="has no arm 'moe': choose one of dense, token_choice"):
        plan_recipe(load_recipe(RECIPES / "quick.toml"), read_hardware("1xH100"), arm="moe")


def test_the_search_takes_well_under_a_second():
    started = time.process_time()
    best_layout("moe", workload(mixtral(num_experts=256), sequences_per_step=16384), read_hardware("2048xH800"))
    assert time.process_time() - started < 1


def test_the_verb_prints_json_without_torch():
    program = (
        "import sys; from mixtura.cli import main; "
        "sys.argv = ['mixtura', 'plan', '--preset', 'quick', '--hardware', '2xH200', '--json']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert [arm["arm"] for arm in told["arms"]] == ["dense", "token_choice", "mixture_of_tokens"]
    best = told["arms"][0]["best"]
    assert best["fits"] and best["memory"]["total"] > 0 and best["dollars"] > 0
