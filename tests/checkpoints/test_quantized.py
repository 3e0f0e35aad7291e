"""Bases in few bits: what is stored so, that adapters learn on them, and what is refused."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mixtura import compare
from mixtura.adapters.reach import check_adapter
from mixtura.adapters.targets import count_parameters
from mixtura.checkpoints import quantized
from mixtura.checkpoints.pretrained import load_base
from mixtura.checkpoints.quantized import quantized_weights
from mixtura.config import (
    AdapterConfig,
    BaseConfig,
    ChatArmConfig,
    ChatDataConfig,
    ChatRecipe,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    TrainingConfig,
    UserError,
)
from mixtura.config.finetune_checks import check_finetune_recipe
from mixtura.data.prepare import train_tokenizer
from mixtura.models.generation import Sampling, Writer
from mixtura.tasks.chat.answers import load_chat_model
from mixtura.tasks.classification.classifier import classify

# Widths of a multiple of 64, as nf4 stores blocks of 64.
SIZES: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = 2 * 4 * 64 * 64
FEED_FORWARD = 2 * 3 * 64 * 128
KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"), id=kind
    )
    for kind, package in (("nf4", "bitsandbytes"), ("int8", "torchao"))
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dense decoder and a mixture with a tokenizer."""
    tokenizer = train_tokenizer(["what is ban den fin gat user assistant"], vocab_size=300)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    found = {}
    for name, make in (
        ("dense", lambda: LlamaForCausalLM(LlamaConfig(**SIZES))),
        ("mixture", lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))),
    ):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        make().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_is_said_of_layers_and_experts(bases: dict[str, str], kind: Any) -> None:
    plain, _ = load_base(bases["mixture"])
    model, _ = load_base(bases["mixture"], quantize=kind)
    found = quantized_weights(model)
    experts = 4 * FEED_FORWARD
    assert (found.total, found.experts) == (count_parameters(plain)[0], experts)
    assert found.quantized_experts == (experts if kind == "nf4" else 0)
    assert found.quantized == LINEAR + found.quantized_experts
    assert count_parameters(model)[0] == found.total
    ids = torch.arange(3, 19).view(2, 8)
    assert 0 < (model(ids).logits - plain(ids).logits).abs().max() < (0.3 if kind == "nf4" else 0.03)

    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    reached = check_adapter(adapted)
    assert reached.quantized == found and str(found) in str(reached)
    assert reached.expert_parameters == experts and reached.targets[0].adapted == 64 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_was_evaluated_can_be_trained_on(bases: dict[str, str], kind: Any) -> None:
    model: Any = get_peft_model(load_base(bases["dense"], quantize=kind)[0], LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        before = model.eval()(ids).logits
    model.train()(ids, labels=ids).loss.backward()
    first = next(parameter for name, parameter in model.named_parameters() if "layers.0" in name and "lora_B" in name)
    assert first.grad is not None and first.grad.abs().max() > 0
    assert torch.equal(model.eval()(ids).logits, before)


def test_nothing_is_said_of_a_base_in_full_precision(bases: dict[str, str]) -> None:
    model, _ = load_base(bases["dense"])
    assert str(quantized_weights(model)) == "No weight of the base is quantised."
    assert "quantised" not in str(check_adapter(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))))


def chat_recipe(base: str, folder: Path, kind: Any, **adapters: AdapterConfig | None) -> ChatRecipe:
    path = folder / "chats.jsonl"
    rows = [{"prompt": f"what is {a} {b}?", "completion": f"{b} {a}"} for a in "bdfglm" for b in "npqrst"]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ChatRecipe(
        name="toy",
        seeds=(0,),
        baseline=next(iter(adapters)),
        data=ChatDataConfig(
            source="local",
            path=str(path),
            prompt_column="prompt",
            completion_column="completion",
            max_length=64,
            validation_chats=4,
            test_chats=8,
            answered_chats=2,
            max_new_tokens=3,
        ),
        base=BaseConfig(name=base, quantize=kind),
        training=TrainingConfig(
            steps=12, batch_size=2, eval_every=12, eval_sequences=2, save_every=12, learning_rate=1e-2
        ),
        arms={name: ChatArmConfig(adapter=adapter) for name, adapter in adapters.items()},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["dense", "mixture"])
def test_chat_adapters_learn_on_a_quantised_base_and_answer_from_it(
    bases: dict[str, str], tmp_path: Path, base: str, kind: Any
) -> None:
    lora = AdapterConfig(rank=4, targets=("q_proj", "v_proj"))
    mixed = AdapterConfig(method="mixture_of_lora", rank=2, num_experts=2, scope="linear", targets=("q_proj",))
    recipe = chat_recipe(bases[base], tmp_path, kind, lora=lora, mixed=mixed)
    results = compare(recipe, out=tmp_path / "out")
    for arm in results.arms.values():
        gain = arm.runs[0].details.scores["loss"].gain  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        assert gain.high < 0
    checkpoint = tmp_path / "out" / "arms" / "lora" / "seed0" / "checkpoint"
    opened = load_chat_model(checkpoint)
    assert quantized_weights(opened[0]).quantized
    Writer(checkpoint, chat=True, opened=opened).write("what is b n?", Sampling(max_new_tokens=3))


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_learn_on_a_quantised_base_and_are_opened_with_it(
    bases: dict[str, str], reviews: Path, tmp_path: Path, kind: Any
) -> None:
    recipe = ClassificationRecipe(
        name="toy",
        seeds=(0,),
        baseline="head",
        data=ClassificationDataConfig(
            source="local", path=str(reviews), max_length=12, validation_examples=32, test_examples=32
        ),
        base=BaseConfig(name=bases["dense"], quantize=kind),
        training=TrainingConfig(steps=4, batch_size=8, eval_every=4, eval_sequences=16, save_every=4),
        arms={
            "head": ClassificationArmConfig(),
            "lora": ClassificationArmConfig(tune="adapter", adapter=AdapterConfig(rank=2)),
        },
    )
    compare(recipe, out=tmp_path / "out")
    for name in recipe.arms:
        answer = classify(tmp_path / "out" / "arms" / name / "seed0" / "checkpoint", ["a good film"])[0]
        assert 0.5 <= answer.probability <= 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_package_that_is_not_there_is_named(bases: dict[str, str], monkeypatch: Any, kind: Any) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    package = {"nf4": "bitsandbytes", "int8": "torchao"}[kind]
    with pytest.raises(
        UserError, match=f"'base.quantize' is '{kind}', but the package {package} is not installed: run"
    ):
        load_base(bases["dense"], quantize=kind)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(method="expert_specialized")])
def test_the_quantised_weights_themselves_are_not_trained(tmp_path: Path, adapter: AdapterConfig | None) -> None:
    recipe = chat_recipe("x", tmp_path, "nf4", lora=AdapterConfig(rank=2), other=adapter)
    with pytest.raises(UserError, match="arm 'other' trains the base's own weights: give it an adapter"):
        check_finetune_recipe(recipe)
    check_finetune_recipe(dataclasses.replace(recipe, base=BaseConfig(name="x")))
