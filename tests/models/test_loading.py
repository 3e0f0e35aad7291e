"""A model folder is opened whole, or one sentence says what is wrong with it."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mixtura.config import UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.loading import folder_settings, load_config, load_weights


@pytest.fixture
def folder(tiny_config, tmp_path):
    MixtureForCausalLM(tiny_config("dense")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(UserError, match=rf"is damaged: {name} is missing or does not fit"):
        load_weights(AutoModelForCausalLM, folder)
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=rf"is damaged: {name} is missing or does not fit"):
        load_weights(AutoModelForCausalLM, folder)
    assert load_weights(AutoModelForCausalLM, folder, may_lack=lambda tensor: tensor == name) is not None


@pytest.mark.parametrize(("text", "reason"), [("{", "Expecting property name"), ("[]", "it is no JSON object")])
def test_a_configuration_that_cannot_be_read_is_named(folder, text, reason):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json' is damaged \({reason}"):
        folder_settings(folder)


def test_a_configuration_that_makes_no_sense_is_named(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": "two"}))
    with pytest.raises(UserError, match=r"The config\.json of '.*model' cannot be used \(.*copy or train"):
        load_config(MixtureConfig, folder)
