"""Language models of transformers in shards and with divided experts, on two processes against one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fixtures.several_processes import TOLERANCE, assert_same_metrics, run_script
from mixtura.adapters.attach import apply_adapter
from mixtura.config import AdapterConfig, TrainingConfig, UserError, recipe_from_dict
from mixtura.data.prepare import train_tokenizer
from mixtura.models import losses
from mixtura.tasks.chat.experiment import make_chat
from mixtura.training import read_metrics, train
from mixtura.training.sharding import check_layout

SCRIPT = """
from dataclasses import replace
from mixtura.config import recipe_from_dict
from mixtura.models import losses
from mixtura.tasks.chat.experiment import make_chat

for job in settings["jobs"]:
    losses.LARGE_LOGITS = job["largest"]
    experiment = make_chat(recipe_from_dict(job["recipe"]), cache_dir=None)
    arm, out = experiment.arms["full"], folder / "two" / job["out"]
    if ranks.is_first() and job["from"]:
        shutil.copytree(folder / "two" / job["from"], out, ignore=shutil.ignore_patterns("checkpoint", "checkpoint-4"))
    ranks.wait_for_all()
    config = replace(experiment.recipe.training, **job["layout"])
    how = {"learning_rate": 1e-2, "seed": 0, "label": job["out"], "resume": bool(job["from"])}
    train(arm.build(0), task=arm.task, config=config, out=out, **how)
"""
SIZES = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
SIZES |= {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, **FEW, intermediate_size=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=8)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **FEW, moe_intermediate_size=8, intermediate_size=24, head_dim=8)
    ),
}
IN_SHARDS, EXPERTS, BOTH = {"shards": 0}, {"expert_ranks": 2}, {"shards": 0, "expert_ranks": 2}


@pytest.fixture
def recipe(tmp_path):
    """Makes the recipe of a base that is tuned whole on a few chats."""
    rows = [
        {"messages": [{"role": "user", "content": f"what is {a} {b}?"}, {"role": "assistant", "content": f"{b} {a}"}]}
        for a in ("ban", "den", "fin")
        for b in "abcdefgh"
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = train_tokenizer(["what is ban den fin"], vocab_size=300)

    def make(name):
        torch.manual_seed(0)
        BASES[name]().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        data = {"source": "local", "path": str(tmp_path / "chats.jsonl"), "max_length": 48, "answered_chats": 2}
        return {
            "task": "chat",
            "name": "toy",
            "baseline": "full",
            "seeds": [0],
            "data": data | {"validation_chats": 6, "test_chats": 6, "max_new_tokens": 2},
            "base": {"name": str(tmp_path / name)},
            "training": {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_sequences": 4, "save_every": 2},
            "arms": {"full": {}},
        }

    return make


def _assert_equal_to_one_process(folder, data, jobs, recipe):
    """`jobs` are (out, base, layout, the job to go on from, the largest logits that are held)."""
    listed = [
        {"out": out, "recipe": recipe(base), "layout": layout, "from": before, "largest": largest}
        for out, base, layout, before, largest in jobs
    ]
    for job, (_, base, *_) in zip(listed, jobs, strict=True):
        one = folder / "one" / base
        if not one.exists():
            experiment = make_chat(recipe_from_dict(job["recipe"]), cache_dir=None)
            arm, config = experiment.arms["full"], experiment.recipe.training
            how = {"learning_rate": 1e-2, "seed": 0, "label": base, "resume": False}
            train(arm.build(0), task=arm.task, config=config, out=one, **how)
    run_script(folder, data, body=SCRIPT, settings={"jobs": listed}, processes=2)
    for out, base, *_ in jobs:
        one, many = folder / "one" / base, folder / "two" / out
        assert_same_metrics(_measured(one), _measured(many), out)
        expected = load_file(one / "checkpoint" / "model.safetensors")
        for name, value in load_file(many / "checkpoint" / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=10 * TOLERANCE, msg=f"{out}, {name}")


def _measured(run):
    """Its metrics, without the exponential of a loss, whose tolerance would be another."""
    records = read_metrics(run / "metrics.jsonl")
    for record in records:
        record.get("eval", {}).get("causal", {}).pop("perplexity", None)
    return records


def test_a_stock_mixture_in_shards_with_divided_experts_is_one_model(tmp_path, tiny_data, recipe):
    largest = losses.LARGE_LOGITS
    jobs = [
        ("olmoe", "olmoe", BOTH, None, largest),
        ("olmoe again", "olmoe", BOTH, "olmoe", largest),
        ("olmoe without logits", "olmoe", BOTH, None, 0),
    ]
    _assert_equal_to_one_process(tmp_path, tiny_data, jobs, recipe)
    straight, again = (tmp_path / "two" / out / "checkpoint" / "model.safetensors" for out in ("olmoe", "olmoe again"))
    assert straight.read_bytes() == again.read_bytes()


@pytest.mark.slow
def test_every_stock_model_is_one_in_every_layout(tmp_path, tiny_data, recipe):
    layouts = {"shards": IN_SHARDS, "experts": EXPERTS, "both": BOTH}
    jobs = [
        (f"{base} {name}", base, layout, None, losses.LARGE_LOGITS)
        for base in BASES
        for name, layout in layouts.items()
        if base != "llama" or name == "shards"
    ]
    _assert_equal_to_one_process(tmp_path, tiny_data, jobs, recipe)


def test_experts_that_our_kernels_do_not_compute_are_not_divided():
    model = BASES["mixtral"]()
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(UserError, match="have the activation Tanh, which Mixtura's kernels do not compute"):
        check_layout(model, TrainingConfig(**EXPERTS), 2)
    assert check_layout(model, TrainingConfig(**IN_SHARDS), 2) is not None


def test_stock_experts_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="is 8, which does not divide the 4 experts of a layer"):
        check_layout(BASES["olmoe"](), TrainingConfig(expert_ranks=8), 8)


@pytest.mark.parametrize("kind", ["an adapter", "an encoder"])
def test_a_stock_model_with_an_adapter_or_an_encoder_is_not_sharded(kind):
    sizes = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32)
    with_adapter = apply_adapter(BASES["llama"](), AdapterConfig(rank=2), seed=0)
    model = T5ForConditionalGeneration(sizes) if kind == "an encoder" else with_adapter
    with pytest.raises(UserError, match="is not trained in shards, only language models that are tuned whole are"):
        check_layout(model, TrainingConfig(shards=0), 2)
