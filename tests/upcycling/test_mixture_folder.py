"""Upcycling whole checkpoints: what is computed is what was, the files are the hub's, and memory is one shard's."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtura
from mixtura.layers import MixtureOfTokens, TokenChoiceMoE
from mixtura.models import MixtureForCausalLM
from mixtura.upcycling.mixture_folder import upcycle

ARCHITECTURES = ["llama", "llama, tied, biases", "mistral, window", "qwen2", "qwen2, window", "qwen3", "mixtura"]
STYLES = {
    "copy": {"num_experts": 4, "top_k": 2},
    "one copy a token": {"num_experts": 4, "top_k": 1},
    "split": {"num_experts": 8, "top_k": 4, "split": 2},
    "split in three": {"num_experts": 6, "top_k": 3, "split": 3},
    "shared": {"num_experts": 8, "top_k": 4, "split": 3, "shared": 1},
    "shared, sigmoid": {"num_experts": 4, "top_k": 2, "split": 2, "shared": 1, "score_function": "sigmoid"},
}
IDS_BL = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids_BL=IDS_BL):
    return model(ids_BL).logits


def load(folder):
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is MixtureForCausalLM and not found["missing_keys"] and not found["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mixture_computes_what_the_dense_model_did(dense, tmp_path, name, style):
    source, folder = dense(name)
    result = upcycle(folder, tmp_path / "out", **STYLES[style])
    assert result.exact
    assert_close(logits(load(result.folder)), logits(source), rtol=1e-5, atol=1e-5)


def test_any_router_of_renormalised_weights_keeps_the_output(dense, tmp_path):
    source, folder = dense()
    model = load(upcycle(folder, tmp_path / "out", num_experts=4, top_k=3).folder)
    for layer in model.mixture_layers():
        torch.nn.init.normal_(layer.gate.weight, std=2.0)
    assert_close(logits(model), logits(source), rtol=1e-5, atol=1e-5)


def test_an_undecided_router_without_renormalised_weights_keeps_the_output_too(dense, tmp_path):
    source, folder = dense()
    for number, score_function in enumerate(("softmax", "sigmoid")):
        out = tmp_path / str(number)
        settings = {"num_experts": 4, "top_k": 4, "normalize_top_k": False, "score_function": score_function}
        result = upcycle(folder, out, **settings)
        model = load(out)
        assert not result.exact and not model.config.norm_topk_prob
        for layer in model.mixture_layers():
            torch.nn.init.zeros_(layer.gate.weight)
        assert_close(logits(model), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [1, 2])
def test_an_undecided_mixture_of_tokens_alone_computes_what_the_dense_model_did(dense, tmp_path, split):
    source, folder = dense()
    settings = {"num_experts": 4 * split, "top_k": 2 * split, "split": split, "group_size": 8, "router_spread": 1e-4}
    result = upcycle(folder, tmp_path / "out", family="mixture_of_tokens", **settings)
    model = load(result.folder)
    assert not result.exact and model.config.zero_fill == 1.0
    assert all(isinstance(layer, MixtureOfTokens) for layer in model.mixture_layers())
    assert_close(logits(model), logits(source), rtol=1e-2, atol=1e-2)
    # In training, too: a step starts from the dense loss.
    assert_close(logits(model.train()), logits(source), rtol=1e-2, atol=1e-2)


def test_mixtures_of_tokens_with_some_spread_stay_nearer_when_scaled_to_it(dense, tmp_path):
    source, folder = dense()
    result = upcycle(folder, tmp_path / "out", family="mixture_of_tokens", num_experts=4, router_spread=0.5)
    scaled = load(result.folder)
    undecided = load(result.folder)
    for layer in undecided.mixture_layers():
        start = json.loads((result.folder / "upcycle.json").read_text())["starts"]["0"]
        ratio = 4 / start["first_factor"]
        layer.experts.gate_up_proj.data *= ratio
        layer.experts.down_proj.data *= ratio
    distance = [(logits(model) - logits(source)).abs().mean() for model in (scaled, undecided)]
    assert distance[0] < distance[1]


def test_the_dtype_of_every_tensor_is_kept(dense, tmp_path):
    source, folder = dense("qwen3", dtype=torch.bfloat16)
    result = upcycle(folder, tmp_path / "out", num_experts=2, top_k=2, split=2, shared=1)
    assert {tensor.dtype for tensor in load_file(result.folder / "model.safetensors").values()} == {torch.bfloat16}
    model = load(result.folder)
    assert model.dtype == torch.bfloat16
    exact = logits(source.float())
    before = (logits(source.bfloat16()).float() - exact).abs().mean()
    assert (logits(model).float() - exact).abs().mean() < 2 * before


def test_only_the_chosen_layers_become_mixtures(dense, tmp_path):
    source, folder = dense("qwen2")
    result = upcycle(folder, tmp_path / "out", layers="later_half", num_experts=2, noise=0.1)
    model = load(result.folder)
    assert result.layers == (1, 2) and model.config.mlp_layer_types == ["dense", "token_choice", "token_choice"]
    before, after = source.state_dict(), model.state_dict()
    for name, tensor in after.items():
        if ".mlp." not in name or "layers.0." in name:
            assert torch.equal(tensor, before[name]), name


def test_dropped_channels_are_drawn_anew_and_the_others_stay(dense, tmp_path):
    source, folder = dense()
    model = load(upcycle(folder, tmp_path / "out", num_experts=3, drop=0.5).folder)
    weight_FD = source.model.layers[0].mlp.up_proj.weight
    for layer in (model.model.layers[0].mlp,):
        assert isinstance(layer, TokenChoiceMoE)
        kept_EF = (layer.experts.gate_up_proj[:, 24:] == weight_FD).all(-1)
        assert kept_EF.sum(1).tolist() == [12, 12, 12]
        assert not torch.equal(kept_EF[0], kept_EF[1]), "each expert draws channels of its own"
        down_EF = (layer.experts.down_proj == source.model.layers[0].mlp.down_proj.weight).all(1)
        assert torch.equal(down_EF, kept_EF), "a channel is drawn anew in all three matrices"


def gradient(model):
    model.train().zero_grad()
    model(IDS_BL, labels=IDS_BL).language_loss.backward()
    return max(float(layer.gate.weight.grad.norm()) for layer in model.mixture_layers())


def test_the_warnings_tell_the_truth_about_the_routers_gradient(dense, tmp_path):
    folder = dense()[1]

    def made(name, **settings):
        result = upcycle(folder, tmp_path / name, num_experts=4, **settings)
        return gradient(load(result.folder)), " ".join(result.warnings)

    norm, text = made("copies", top_k=2)
    assert norm < 1e-6 and "no gradient until the copies differ" in text
    norm, text = made("noise", top_k=2, noise=0.01)
    assert norm > 1e-4 and not text
    norm, text = made("one", top_k=1, noise=0.5)
    assert norm < 1e-6 and "never gives the router a gradient" in text
    norm, text = made("one, not renormalised", top_k=1, normalize_top_k=False)
    assert norm > 1e-4 and "never gives" not in text
    norm, text = made("tokens", top_k=2, family="mixture_of_tokens")
    assert norm > 1e-4 and "no gradient" not in text


def test_several_checkpoints_become_the_experts_of_one(dense, tmp_path):
    (first, one), (second, two) = dense("qwen3"), dense("qwen3", seed=1)
    result = upcycle(one, tmp_path / "out", others=[two], num_experts=2, top_k=2)
    model = load(result.folder)
    assert not result.exact
    experts, layers = model.model.layers[1].mlp.experts, (first.model.layers[1], second.model.layers[1])
    for expert, layer in enumerate(layers):
        assert torch.equal(experts.gate_up_proj[expert, :24], layer.mlp.gate_proj.weight)
        assert torch.equal(experts.down_proj[expert], layer.mlp.down_proj.weight)
    attention = [layer.self_attn.q_proj.weight for layer in layers]
    assert_close(model.model.layers[1].self_attn.q_proj.weight, (attention[0] + attention[1]) / 2)


def test_the_folder_is_the_hubs_with_tokenizer_and_receipt(dense, tmp_path):
    folder = dense()[1]
    result = upcycle(str(folder), tmp_path / "deep" / "out", num_experts=4, noise=0.01, seed=3)
    names = {file.name for file in result.folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "upcycle.json",
    }
    assert (result.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    AutoTokenizer.from_pretrained(result.folder)
    receipt = json.loads((result.folder / "upcycle.json").read_text())
    assert receipt["sources"][0]["name"] == str(folder) and receipt["settings"]["noise"] == 0.01
    assert receipt["layers"] == [0, 1, 2] and receipt["exact"] is False
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"], "nothing is left beside it"


def test_the_same_seed_gives_the_same_files_and_another_does_not(dense, tmp_path):
    folder = dense()[1]
    settings = {"num_experts": 8, "top_k": 2, "split": 2, "drop": 0.3, "noise": 0.1}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        upcycle(folder, tmp_path / name, seed=seed, **settings)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.layers.0.mlp.experts.down_proj"], c["model.layers.0.mlp.experts.down_proj"])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations leave alive."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type != "cpu" or key in self.seen:
                continue
            self.seen[key] = weakref.finalize(storage, self.forget, key, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return result

    def forget(self, key, size):
        self.live -= size
        del self.seen[key]


def test_memory_is_that_of_one_shard_and_one_layer_however_many_there_are(dense, tmp_path):
    model, folder = dense("mixtura", shard="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    layer = 4 * 3 * 24 * 16 * 4
    with LiveBytes() as memory:
        result = upcycle(folder, tmp_path / "out", num_experts=4, max_shard_bytes=20_000)
    assert memory.peak > 0
    embedding = 300 * 16 * 4
    assert memory.peak < 20_000 + max(2 * layer, 2 * embedding) < result.num_bytes
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.num_bytes
    for name, place in index["weight_map"].items():
        with safe_open(result.folder / place, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118
    sizes = [path.stat().st_size for path in result.folder.glob("*.safetensors")]
    assert len(sizes) > 3
    assert_close(logits(load(result.folder)), logits(model), rtol=1e-5, atol=1e-5)


def test_the_package_has_the_verb():
    assert mixtura.upcycle is upcycle
