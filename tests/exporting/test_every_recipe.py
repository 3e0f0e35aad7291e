"""Whatever a shipped recipe trains can leave: each arm's model, tiny, is exported as its run says at the start."""

import json

import pytest
import torch

from mixtura.config import PRESETS, Recipe, TranslationRecipe, UserError, load_recipe, preset_path
from mixtura.config.families import never_served
from mixtura.exporting.containers import export_outlook, stock_containers
from mixtura.exporting.stock_folder import export
from mixtura.models import MixtureForCausalLM
from mixtura.models.build import build_model_config, shared_width_config
from mixtura.models.transition import extract_language_model, finished_config

SIZES = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2"]
STOCK = {
    ("quick", "dense"): "llama",
    ("quick", "token_choice"): "qwen2_moe",
    ("full", "token_choice_top1"): "qwen2_moe",
}


def tiny_configs():
    """Of every arm that is trained from random weights, the configuration of its finished model, each once."""
    found, seen = [], set()
    for preset in PRESETS:
        recipe = load_recipe(preset_path(preset))
        if not isinstance(recipe, Recipe | TranslationRecipe) or (preset == "continue"):
            continue
        if isinstance(recipe, TranslationRecipe) and recipe.base.name is not None:
            continue
        recipe = load_recipe(preset_path(preset), [*SIZES, "model.intermediate_size=128"])
        for name, arm in recipe.arms.items():
            own = arm if isinstance(recipe, Recipe) else arm.feed_forward
            width = own.control == "shared_width"
            given = recipe.arms[own.control_of] if width else own
            names = None if own.route_by == "token" else [f"e{i}" for i in range(own.num_experts)]
            config = build_model_config(
                recipe.model, given, vocab_size=64, max_position_embeddings=16, expert_names=names
            )
            config = finished_config(shared_width_config(config) if width else config)
            key = json.dumps(config.to_dict(), sort_keys=True, default=str)
            if key not in seen or (preset, name) in STOCK:
                found.append(pytest.param(preset, name, config, id=f"{preset} {name}"))
            seen.add(key)
    return found


@pytest.mark.parametrize(("preset", "name", "config"), tiny_configs())
def test_each_arm_of_each_recipe_is_exported_with_a_receipt(tmp_path, preset, name, config):
    torch.manual_seed(0)
    model = MixtureForCausalLM(config).eval()
    said = export_outlook(config)
    if config.route_by != "token":
        assert "take one language's model" in said
        model = extract_language_model(model, 0)
    elif never_served(config.mlp_layer_types) or (preset == "families" and said.startswith("cannot be exported as it")):
        assert said.startswith("cannot be exported as it is: ")
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(UserError):
            export(tmp_path / "model", tmp_path / "out", to="remote_code")
        return
    stock = stock_containers(model.config)
    assert (preset, name) not in STOCK or stock[0] == STOCK[preset, name]
    to = stock[0] if stock else "remote_code"
    assert to in export_outlook(model.config)
    model.save_pretrained(tmp_path / "model")
    exported = export(tmp_path / "model", tmp_path / "out", to=to)
    assert exported.container == to and exported.receipt is not None and exported.receipt.passed
    if stock:
        assert export(tmp_path / "model", tmp_path / "auto", check=False).container == to


def test_the_outlook_says_why_there_is_no_stock_form(tiny_config):
    said = {family: export_outlook(tiny_config(family)) for family in ("dense", "mixture_of_tokens", "expert_choice")}
    assert "no stock architecture has plain relu experts" in said["dense"]
    assert "no stock architecture has mixture_of_tokens layers" in said["mixture_of_tokens"]
    assert "cannot be served" in said["expert_choice"]
    gated = {"gated": True, "hidden_act": "silu"}
    assert export_outlook(tiny_config("dense", **gated)) == "can be exported to llama, which other engines serve"
    bare = tiny_config("token_choice", scoring_func="sigmoid", mlp_layer_types=["token_choice", "dense"], **gated)
    assert "with its own code only" in export_outlook(bare)
