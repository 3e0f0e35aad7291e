"""Export: every container computes what the checkpoint computes, in the hub's layout, or nothing is written."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixtura.config import UserError
from mixtura.exporting.stock_folder import export
from mixtura.models import MixtureConfig, MixtureForCausalLM

DENSE = {"mlp_layer_types": ["dense"] * 3}
LEADING = {"mlp_layer_types": ["dense", "token_choice", "token_choice"]}
BETWEEN = {"mlp_layer_types": ["token_choice", "dense", "token_choice"]}
SIGMOID = {"scoring_func": "sigmoid"}
PLAIN = {"norm_topk_prob": False}
SHARED = {"num_shared_experts": 2}
UNTIED = {"tie_word_embeddings": False}
WIDE_HEADS = {"head_dim": 16}
QWEN2 = {"attention": "qwen2"}
QWEN3 = {"attention": "qwen3"}
ONE_WINDOW = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
CELLS = [
    ("llama", DENSE),
    ("llama", DENSE | WIDE_HEADS | UNTIED | {"attention_bias": True}),
    ("mistral", DENSE | {"attention": "mistral", "sliding_window": 8}),
    ("qwen2", DENSE | QWEN2),
    ("qwen3", DENSE | QWEN3),
    ("qwen3", DENSE | QWEN3 | ONE_WINDOW),
    ("mixtral", {}),
    ("mixtral", {"num_experts_per_tok": 1} | UNTIED | WIDE_HEADS),
    ("mixtral", {"routed_scaling_factor": 2.5}),
    ("mixtral", {"attention": "mistral", "sliding_window": 8}),
    ("mixtral", {"num_experts_per_tok": 4} | PLAIN),
    ("granite_moe", {}),
    ("granite_moe", SHARED | UNTIED | {"routed_scaling_factor": 0.5}),
    ("qwen2_moe", PLAIN),
    ("qwen2_moe", BETWEEN | SHARED),
    ("qwen2_moe", QWEN2),
    ("qwen2_moe", QWEN2 | BETWEEN | PLAIN | SHARED),
    ("qwen3_moe", QWEN3 | WIDE_HEADS),
    ("qwen3_moe", QWEN3 | PLAIN | BETWEEN | {"attention_bias": True}),
    ("glm4_moe", SIGMOID),
    ("glm4_moe", SIGMOID | PLAIN | LEADING | SHARED | WIDE_HEADS),
    ("glm4_moe", SIGMOID | QWEN2 | {"expert_bias_update_rate": 0.1, "routed_scaling_factor": 2.5}),
    ("glm4_moe", SIGMOID | QWEN3),
]


def logits(folder, dtype=torch.float32):
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits


def tensor_names(folder):
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names += list(opened.keys())
    return sorted(names)


@pytest.mark.parametrize(("container", "changes"), CELLS, ids=lambda value: value if isinstance(value, str) else None)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_container_computes_what_the_checkpoint_computes(saved, tmp_path, container, changes):
    source = saved(**changes)
    exported = export(source, tmp_path / "out", to=container)
    assert exported.container == container
    assert exported.receipt is not None and exported.receipt.passed
    assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("container", "changes"),
    [(container, changes) for container, changes in CELLS if changes.items() >= DENSE.items()]
    + [("mixtral", {"num_experts_per_tok": 1} | UNTIED | WIDE_HEADS)],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_in_bfloat16_dense_models_and_one_expert_a_token_are_the_checkpoint_bit_for_bit(
    saved, tmp_path, container, changes
):
    source = saved(dtype=torch.bfloat16, **changes)
    export(source, tmp_path / "out", to=container, check=False)
    assert torch.equal(logits(tmp_path / "out", torch.bfloat16), logits(source, torch.bfloat16))


def test_a_factor_that_bfloat16_rounds_is_refused(saved, tmp_path):
    export(saved("half", dtype=torch.bfloat16, routed_scaling_factor=0.5), tmp_path / "exact", to="mixtral")
    with pytest.raises(UserError, match="The export does not compute what"):
        export(saved(dtype=torch.bfloat16, routed_scaling_factor=2.5), tmp_path / "out", to="mixtral")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def copies_of(dense):
    """Our mixture whose experts are all the dense model's layer: whatever its router says, it computes the same."""
    config = MixtureConfig(**(dense.config.to_dict() | {"gated": True, "norm_topk_prob": True, "num_experts": 4}))
    config.mlp_layer_types, config.num_experts_per_tok = ["token_choice"] * 3, 2
    config.moe_intermediate_size = dense.config.intermediate_size
    mixture = MixtureForCausalLM(config).to(dense.dtype)
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    assert not mixture.load_state_dict(shared, strict=False).unexpected_keys
    for old, new in zip(dense.model.layers, mixture.model.layers, strict=True):
        new.mlp.experts.gate_up_proj.copy_(torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]))
        new.mlp.experts.down_proj.copy_(old.mlp.down_proj.weight)
    return mixture


@pytest.mark.parametrize("container", ["mixtral", "granite_moe", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_copies_of_a_dense_layer_are_still_the_dense_model(tmp_path, container):
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, initializer_range=0.3, tie_word_embeddings=True))
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    copies_of(dense).save_pretrained(tmp_path / "mixture")
    export(tmp_path / "mixture", tmp_path / "out", to=container)
    assert_close(logits(tmp_path / "out"), logits(tmp_path / "dense"), rtol=0, atol=5e-5)
    if container == "mixtral":  # the only one whose weights of the experts stay in float32
        assert torch.equal(logits(tmp_path / "out", torch.bfloat16), logits(tmp_path / "dense", torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "container"),
    [
        ({}, "mixtral"),
        (SHARED, "granite_moe"),
        (PLAIN, "qwen2_moe"),
        (BETWEEN, "qwen2_moe"),
        (SIGMOID, "glm4_moe"),
        (DENSE, "llama"),
    ],
)
def test_auto_takes_the_first_container_that_holds_the_model(saved, tmp_path, changes, container):
    assert export(saved(**changes), tmp_path / "out", check=False).container == container


def test_experts_are_named_one_by_one_as_published(saved, tmp_path):
    export(saved(), tmp_path / "mixtral", to="mixtral", check=False)
    names = tensor_names(tmp_path / "mixtral")
    assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert not [name for name in names if ".mlp." in name or name.startswith("lm_head")]
    export(saved(), tmp_path / "qwen", to="qwen2_moe", check=False)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensor_names(tmp_path / "qwen")
    export(saved(), tmp_path / "granite", to="granite_moe", check=False)
    assert "model.layers.1.block_sparse_moe.input_linear.weight" in tensor_names(tmp_path / "granite")


def test_without_a_shared_expert_llama_cpp_gets_one_that_adds_zero_only_where_it_would_be_right(saved, tmp_path):
    export(saved(**PLAIN), tmp_path / "plain", to="qwen2_moe", check=False)
    export(saved(), tmp_path / "normalised", to="qwen2_moe", check=False)
    shared = "model.layers.0.mlp.shared_expert.down_proj.weight"
    assert shared in tensor_names(tmp_path / "plain")
    assert shared not in tensor_names(tmp_path / "normalised")


def test_queries_keys_and_values_get_biases_of_zeros_where_an_engine_takes_them_for_granted(saved, tmp_path):
    # vLLM's layer has them whatever the configuration says, and would leave them as they lie in memory.
    export(saved(**BETWEEN), tmp_path / "out", to="qwen2_moe", check=False)
    biases = [name for name in tensor_names(tmp_path / "out") if name.endswith("_proj.bias")]
    assert len(biases) == 3 * 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["qkv_bias"] is True


def test_bfloat16_weights_keep_their_bits(saved, tmp_path):
    source = saved(dtype=torch.bfloat16)
    export(source, tmp_path / "out", to="mixtral", check=False)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
        written = opened.get_tensor(name)
    original = MixtureForCausalLM.from_pretrained(source, dtype=torch.bfloat16).model.layers[1].mlp.experts
    assert written.dtype == torch.bfloat16
    assert torch.equal(written, original.gate_up_proj[2, 32:])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_go_to_numbered_files_of_bounded_size_with_an_index(saved, tmp_path):
    source = saved()
    export(source, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(index["weight_map"]) == tensor_names(tmp_path / "out")
    assert all(file.stat().st_size < 25_000 for file in files)
    assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=5e-5)


def test_a_sharded_checkpoint_is_read_too(saved, tmp_path):
    source = saved()
    MixtureForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    export(tmp_path / "sharded", tmp_path / "out")
    assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=5e-5)


def test_the_folder_has_a_card_with_front_matter_the_tokenizer_and_generation_settings(saved, with_tokenizer, tmp_path):
    source = with_tokenizer(saved(vocab_size=300))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export(source, tmp_path / "out", base_model="org/base")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "receipt.json"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["org/base"] and front["base_model_relation"] == "finetune"
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert {"moe", "mixtura", "mixtral"} <= set(front["tags"])
    assert "| experts | 4, of which a token takes 2 |" in card and "| transformers " in card
    assert str(tmp_path) not in card


def test_the_card_says_how_the_model_was_upcycled_but_no_path(saved, tmp_path):
    source = saved()
    record = {
        "sources": [{"name": "org/dense"}, {"name": "/home/me/other"}],
        "settings": {"num_experts": 4, "drop": 0.5},
    }
    (source / "upcycle.json").write_text(json.dumps(record))
    export(source, tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["org/dense"]
    assert "| drop | 0.5 |" in card and "/home/me" not in card


def test_the_card_counts_what_a_token_uses(saved, tmp_path):
    export(saved(), tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    # Embeddings 64*32; a layer has attention (32*32 + 2*16*32 + 32*32), two norms, a gate 4*32, four experts 3*32*32.
    apart, expert = 64 * 32 + 32 + 3 * (3 * 32 * 32 + 2 * 32 + 4 * 32), 3 * 4 * 3 * 32 * 32
    assert f"| parameters | {apart + expert:,} |" in card
    assert f"| parameters a token uses | {apart + expert // 2:,} |" in card


@pytest.mark.parametrize(
    ("changes", "to", "words"),
    [
        ({"gated": False, "hidden_act": "relu"}, "auto", "plain relu experts.*--to remote_code"),
        ({"mlp_layer_types": ["mixture_of_tokens"] * 3}, "auto", "remote_code, or turn them into token choice"),
        ({"mlp_layer_types": ["expert_choice"] * 3}, "remote_code", "cannot be served"),
        ({"mlp_layer_types": ["soft"] * 3}, "auto", "cannot be served"),
        ({"capacity_factor": 1.25}, "auto", "capacity_factor of 1.25.*null"),
        ({"n_group": 2}, "remote_code", "1 of 2 groups of experts .* train with expert_groups = 1"),
        ({"route_by": "target", "num_experts_per_tok": 1}, "auto", "routes by target"),
        ({"layer_mix": True}, "mixtral", "mixes the outputs of its layers.*remote_code"),
        (DENSE | {"intermediate_sizes": [48, 32, 48]}, "auto", "2 different widths"),
        (PLAIN, "mixtral", "mixtral model cannot have softmax gates.*--to qwen2_moe or remote_code"),
        (SHARED, "mixtral", "shared expert.*--to granite_moe or qwen2_moe"),
        (
            SIGMOID | BETWEEN,
            "auto",
            "the nearest, qwen2_moe, cannot have normalised sigmoid gates",
        ),
        (ONE_WINDOW, "mixtral", "mixtral model cannot have sliding-window attention in some layers.*--to remote_code"),
        (DENSE | ONE_WINDOW, "auto", "sliding-window attention in some layers"),
        ({}, "flex_olmo", "normalises after its layers"),
        ({}, "gpt9", "no container 'gpt9'.*mixtral"),
    ],
)
def test_what_has_no_exact_container_is_refused_in_a_sentence_with_the_way_out(saved, tmp_path, changes, to, words):
    with pytest.raises(UserError, match=words) as refusal:
        export(saved(**changes), tmp_path / "out", to=to)
    assert "\n" not in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def _no_config(folder):
    (folder / "config.json").unlink()


def _other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _no_json(folder):
    (folder / "config.json").write_text("{")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _missing_shard(folder):
    MixtureForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    next(iter(sorted(folder.glob("model-00003-*")))).unlink()


def _shard_elsewhere(folder):
    MixtureForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_width(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"moe_intermediate_size": 16}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_config, "no config.json"),
        (_other_model, "holds a llama model"),
        (_no_json, "config.json' is damaged"),
        (_no_weights, "no model.safetensors"),
        (_cut_weights, "is damaged"),
        (_missing_shard, "lacks its shard"),
        (_shard_elsewhere, r"names '\.\./model.safetensors', which is no file beside it"),
        (_other_width, "missing or does not fit"),
    ],
)
def test_a_broken_source_is_named_in_a_sentence_and_nothing_is_written(saved, tmp_path, damage, words):
    source = saved()
    damage(source)
    with pytest.raises(UserError, match=words) as refusal:
        export(source, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_folder_with_files_in_it_is_left_alone(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        export(saved(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_full_disk_is_noticed_before_anything_is_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match="make room"):
        export(saved(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_an_export_that_computes_something_else_is_not_kept(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("mixtura.exporting.containers._times", lambda weight, factor: 1.01 * weight)
    with pytest.raises(UserError, match=r"does not compute what .* differ by up to .* Nothing is kept"):
        export(saved(), tmp_path / "out", to="mixtral")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("name", ["two\nlines", "a b", "", "../x/y"])
def test_a_base_model_that_is_no_hub_name_is_refused(saved, tmp_path, name):
    with pytest.raises(UserError, match="hub name"):
        export(saved(), tmp_path / "out", base_model=name)
