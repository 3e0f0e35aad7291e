"""Sources that cannot be upcycled: one sentence each, and no folder left behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtura.checkpoints.source import open_source
from mixtura.config import UserError
from mixtura.upcycling.mixture_folder import upcycle


def reweigh(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, tmp_path, message, **settings):
    out = tmp_path / "made" / "out"
    with pytest.raises(UserError, match=message) as error:
        upcycle(folder, out, **settings)
    assert "\n" not in str(error.value)
    assert not out.exists() and not [path for path in (tmp_path / "made").glob("*")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "is a 'gpt2' model: only dense llama, mistral"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ({"mlp_bias": True}, "has biases in its feed-forward layers"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"intermediate_size": 32}, r"mlp.down_proj.weight' of .* has shape \(16, 24\)|has shape"),
        ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3"),
        ({"num_hidden_layers": 2}, "that cannot be upcycled, such as 'model.layers.2"),
        ({"tie_word_embeddings": True}, "says that its embeddings are tied, but"),
    ],
    ids=["architecture", "quantised", "bias", "activation", "shape", "missing layer", "extra layer", "tied"],
)
def test_a_configuration_that_does_not_fit_is_refused(edited, tmp_path, changes, message):
    refused(edited(**changes), tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("lm_head.weight"), "has no tensor 'lm_head.weight' although"),
        (
            lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.ones(24)}),
            "has biases in feed-forw",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
            "'model.norm.weight' of .* is stored as I8",
        ),
    ],
    ids=["head", "bias", "eight bits"],
)
def test_weights_that_do_not_fit_are_refused(edited, tmp_path, change, message):
    folder = edited()
    reweigh(folder, change)
    refused(folder, tmp_path, message)


def test_damaged_and_missing_files_are_named(edited, dense, tmp_path):
    folder = edited()
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00rubbish!")
    refused(folder, tmp_path, "'model.safetensors' of .* is damaged")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, tmp_path, "has only 'model.gguf'")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path, "'config.json' of .* cannot be read")
    (folder / "config.json").unlink()
    refused(folder, tmp_path, "is a GGUF file's")
    sharded = tmp_path / "sharded"
    shutil.copytree(dense(shard="6KB")[1], sharded)
    gone = sorted(sharded.glob("*.safetensors"))[2]
    gone.unlink()
    refused(sharded, tmp_path, f"lacks its shard '{gone.name}'")


def test_an_index_does_not_lead_out_of_the_folder(dense, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(dense(shard="6KB")[1], sharded)
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    path.write_text(json.dumps(index))
    refused(sharded, tmp_path, r"names '\.\./model.safetensors', which is no file beside it")


def test_a_stored_head_that_is_the_embedding_is_left_out(dense, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(dense("qwen2")[1], folder)
    reweigh(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    result = upcycle(folder, tmp_path / "out", num_experts=2)
    assert "lm_head.weight" not in load_file(result.folder / "model.safetensors")


def test_names_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(UserError, match="There is no folder 'no/such-model', and the hub does not give it"):
        open_source("no/such-model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 8, "top_k": 3, "split": 2}, "top_k is 3, but every copy of a layer is 2 routed experts"),
        ({"num_experts": 2, "top_k": 3}, "cannot run 3 of 2 experts"),
        ({"split": 5, "num_experts": 10, "top_k": 5}, "width 24 cannot be split into 5"),
        ({"split": 2, "shared": 2}, "of which 2 are shared"),
        ({"family": "mixture_of_tokens", "split": 2, "shared": 1}, "has no shared expert"),
        ({"family": "soft"}, "family 'soft' cannot be upcycled to"),
        ({"layers": "1-9"}, "no layers '1-9': the model's are 0 to 2"),
        ({"layers": "first"}, "layers 'first' cannot be read"),
        ({"drop": 1.5}, "drop is 1.5"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"router": "clusters"}, "needs a text"),
        ({"router_spread": 9.0}, "at most 4, where the router is saturated"),
        ({"router_spread": 0.0}, "greater than 0, where all experts tie"),
    ],
)
def test_values_that_make_no_sense_are_refused(dense, tmp_path, settings, message):
    refused(dense()[1], tmp_path, message, **settings)


def test_models_of_other_shapes_do_not_mix(dense, tmp_path):
    refused(dense()[1], tmp_path, "has attention 'qwen3'|has attention qwen3", others=[dense("qwen3")[1]])
    refused(dense()[1], tmp_path, "3 copies cannot be dealt to 2", others=[dense()[1]], num_experts=3)


def test_a_folder_with_something_in_it_is_left_alone(dense, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        upcycle(dense()[1], out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_too_little_room_is_said_before_anything_is_written(dense, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(dense()[1], tmp_path, r"needs 0\.0 GB and .* has 0\.0 GB left")


def test_a_disk_that_runs_full_leaves_nothing(dense, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixtura.upcycling.mixture_folder.write_receipt", full)
    refused(dense()[1], tmp_path, "cannot be written: the disk is full")
