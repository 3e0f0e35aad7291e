"""Chat tuning end to end on tiny models: every arm trains, answers, is compared with the base, and can be talked to."""

import json

import pytest
import torch
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mixtura.comparison.runner import compare
from mixtura.config import (
    AdapterConfig,
    BaseConfig,
    ChatArmConfig,
    ChatDataConfig,
    ChatRecipe,
    TrainingConfig,
    UserError,
)
from mixtura.data.prepare import train_tokenizer
from mixtura.models.generation import Sampling, Writer
from mixtura.results import Leaks
from mixtura.results.run import ChatDetails
from mixtura.tasks.chat.answers import exact_match, load_chat_model, token_f1
from mixtura.tasks.chat.experiment import make_chat
from mixtura.training import SilentProgress, train

SIZES = {"vocab_size": 302, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
DECODER = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADAPTERS = {
    "lora": AdapterConfig(rank=16, targets=("q_proj", "v_proj")),
    "mixture": AdapterConfig(method="mixture_of_lora", num_experts=3, rank=2),
    "mot": AdapterConfig(method="mixture_of_tokens", num_experts=2, group_size=2, rank=2),
    "full": None,
}


def save(model, folder):
    tokenizer = train_tokenizer(["what is ban den fin gat user assistant"], vocab_size=300)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = CHATML
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**DECODER)), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {a} {b}?"},
                {"role": "assistant", "content": f"{b} {a}"},
            ]
        }
        for a in ("ban", "den", "fin", "gat", "lit", "mon")
        for b in ("nab", "pol", "rud", "sef", "tik", "vun")
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def recipe_for(base, chats, adapters, **training):
    settings = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_sequences": 4, "save_every": 1, **training}
    return ChatRecipe(
        name="toy",
        baseline=next(iter(adapters)),
        data=ChatDataConfig(
            source="local",
            path=chats,
            max_length=120,
            validation_chats=10,
            test_chats=10,
            answered_chats=4,
            max_new_tokens=4,
        ),
        base=BaseConfig(name=base, num_layers=2),
        training=TrainingConfig(**settings),
        arms={name: ChatArmConfig(adapter=adapter) for name, adapter in adapters.items()},
    )


@pytest.fixture(scope="module")
def compared(base, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    recipe = recipe_for(base, chats, ADAPTERS, steps=30, learning_rate=1e-2, eval_every=30, save_every=30)
    return compare(recipe, out=out), out


def test_every_arm_learns_the_answers_and_is_set_beside_the_base(compared):
    results, out = compared
    for name, arm in results.arms.items():
        details = arm.runs[0].details
        assert isinstance(details, ChatDetails)
        gain, own = details.scores["loss"].gain, details.scores["loss"].own
        assert gain.low <= gain.value <= gain.high < 0, name
        assert own.value == pytest.approx(arm.runs[0].final[arm.deployed_mode]["loss"])
        assert own.value == pytest.approx(details.scores["loss"].base.value + gain.value)
        assert details.answered == 4 and len(details.samples) == 4
        assert details.samples[0].prompt.startswith("what is")
    assert set(results.across_arms.paired_bootstrap["full"]) == {"loss", "token_f1"}
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "## Answers" in text and "before training" in text and "what is" in text
    assert "what is" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ADAPTERS)
def test_finished_model_answers_in_chats(compared, name):
    folder = compared[1] / "arms" / name / "seed0" / "checkpoint"
    writer = Writer(folder, chat=True, opened=load_chat_model(folder))
    text = writer.write("what is ban nab?", Sampling(max_new_tokens=4))
    assert isinstance(text, str) and "im_end" not in text


def test_packed_chats_leak_nothing_and_mixtures_of_tokens_only_in_training(base, chats):
    arms = make_chat(recipe_for(base, chats, ADAPTERS), cache_dir=None).arms
    assert {name: arm.leaks() for name, arm in arms.items()} == {
        "lora": Leaks(False, False, False),
        "mixture": Leaks(False, False, False),
        "mot": Leaks(False, True, False),
        "full": Leaks(False, False, False),
    }


def test_experts_of_a_stock_mixture_are_tuned(chats, tmp_path):
    torch.manual_seed(0)
    folder = save(MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)), tmp_path / "mixtral")
    adapters = {"esft": AdapterConfig(method="expert_specialized"), "full": None}
    experiment = make_chat(recipe_for(folder, chats, adapters), cache_dir=None)
    for name, arm in experiment.arms.items():
        model = arm.build(0)
        how = {"learning_rate": 1e-2, "seed": 0, "label": name, "resume": False}
        train(model, task=arm.task, config=experiment.recipe.training, out=tmp_path / name, **how)
        assert arm.task.evaluate(model, final=True)["causal"]["loss"] > 0


def test_an_adapter_that_a_mixture_has_no_place_for_is_named_with_its_arm(chats, tmp_path):
    folder = save(MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)), tmp_path / "mixtral")
    experiment = make_chat(recipe_for(folder, chats, {"lora": AdapterConfig(method="lora", rank=2)}), cache_dir=None)
    told = "The adapter of arm 'lora' goes to .* only experts in .*: name linear layers in 'arms.lora.adapter.targets'"
    with pytest.raises(UserError, match=told):
        experiment.arms["lora"].build(0)


class PowerCut(SilentProgress):
    """Ends the run once a step is over."""

    def __init__(self, step):
        self.step = step

    def advance(self, step, *, loss, tokens_per_second):
        if step == self.step:
            raise RuntimeError("power cut")


def test_killed_run_goes_on_bit_for_bit(base, chats, tmp_path):
    experiment = make_chat(recipe_for(base, chats, {"lora": ADAPTERS["lora"]}, steps=4), cache_dir=None)
    arm = experiment.arms["lora"]

    def run(out, **how):
        model = arm.build(0)
        settings = {"config": experiment.recipe.training, "learning_rate": 1e-2, "seed": 0, "label": out}
        train(model, task=arm.task, out=tmp_path / out, **settings, **how)
        return arm.task.evaluate(model, final=False)["causal"]["loss"]

    with pytest.raises(RuntimeError, match="power cut"):
        run("killed", reporter=PowerCut(3))
    assert run("killed", resume=True) == run("whole")


def test_answers_are_compared_by_their_words():
    assert exact_match("The  Queue.", "a queue") == 1 and exact_match("queue", "stack") == 0
    assert token_f1("put the item into a queue", "put item away") == pytest.approx(4 / 7)
    assert token_f1("", "") == 1 and token_f1("", "queue") == 0
