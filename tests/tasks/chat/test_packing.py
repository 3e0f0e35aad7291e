"""Chats as tokens and in windows: answers alone are targets, and packed chats do not see each other."""

import pytest
import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixtura.config import UserError
from mixtura.data.chats import Chat, Message
from mixtura.data.prepare import train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.tasks.chat.batches import ChatDataset, Example, collate_windows, open_prompts, pack_chats, packed_inputs

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: what the assistant thought is written for the last turn alone.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    Message("system", "Be brief."),
    Message("user", "ban den?"),
    Message("assistant", "fin gat"),
    Message("user", "pol?"),
    Message("assistant", "rud sef tik"),
)


def tokenizer(template=CHATML):
    made = train_tokenizer(["ban den fin gat pol rud sef tik"], vocab_size=300)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")]
    made.add_tokens(marks, special_tokens=True)
    made.chat_template = template
    return made


def test_tokens_are_those_of_the_template_and_every_answer_is_a_target_up_to_its_end():
    own = tokenizer()
    prompts = open_prompts(own)
    (example,) = prompts.examples(Chat(TURNS, "row 1"), number=3)
    turns = [turn._asdict() for turn in TURNS]
    assert example.ids == own.apply_chat_template(turns, tokenize=True, return_dict=False)
    learnt = "".join(own.convert_ids_to_tokens([t for t, yes in zip(*example[:2], strict=True) if yes]))
    assert learnt.replace("Ġ", " ") == "fin gat<|im_end|>rud sef tik<|im_end|>"
    end = own.convert_tokens_to_ids("<|im_end|>")
    for place, (token, target) in enumerate(zip(*example[:2], strict=True)):
        before = own.decode(example.ids[:place])
        inside = before.rfind("<|im_start|>assistant\n") > before.rfind("<|im_end|>")
        assert target == inside, (place, own.decode([token]))
    assert example.chat == 3 and end in prompts.ends([example])


def test_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer():
    own = tokenizer(THINKING)
    prompts = open_prompts(own)
    found = prompts.examples(Chat(TURNS, "row 1"), number=0)
    assert len(found) == 2
    for example, upto in zip(found, (3, 5), strict=True):
        turns = [turn._asdict() for turn in TURNS[:upto]]
        assert example.ids == own.apply_chat_template(turns, tokenize=True, return_dict=False)
        learnt = own.decode([t for t, yes in zip(*example[:2], strict=True) if yes])
        assert learnt == f"<think></think>{TURNS[upto - 1].content}<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_an_answer_of_weight_0_is_read_and_no_target(template):
    own = tokenizer(template)
    (example,) = open_prompts(own).examples(Chat(TURNS, "row 1", unlearnt=(2,)), number=0)
    turns = [turn._asdict() for turn in TURNS]
    assert example.ids == own.apply_chat_template(turns, tokenize=True, return_dict=False)
    learnt = own.decode([t for t, yes in zip(*example[:2], strict=True) if yes])
    assert learnt.removeprefix("<think></think>") == "rud sef tik<|im_end|>"


def test_tokenizer_without_a_template_gets_a_plain_one_that_is_saved_with_it(tmp_path):
    own = tokenizer(None)
    prompts = open_prompts(own)
    assert prompts.is_plain
    chat = Chat(TURNS[1:3], "row 1")
    (example,) = prompts.examples(chat, number=0)
    assert own.decode(example.ids) == f"User: ban den?\nAssistant: fin gat{own.eos_token}\n"
    assert [t for t, yes in zip(*example[:2], strict=True) if yes][-1] == own.eos_token_id
    assert example.ids[: len(prompts.question(chat))] == prompts.question(chat)
    own.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    turns = [turn._asdict() for turn in chat.messages]
    assert again.apply_chat_template(turns, tokenize=True, return_dict=False) == example.ids


def test_template_that_refuses_a_message_is_told_with_its_row():
    own = tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match=r"cannot write 'a.jsonl' line 3 .System role not supported"):
        open_prompts(own).examples(Chat(TURNS, "'a.jsonl' line 3"), number=0)


def examples(lengths):
    return [Example([10 + i] * length, [False] + [True] * (length - 1), i) for i, length in enumerate(lengths)]


def test_windows_hold_every_chat_once_and_cut_long_ones_with_a_count():
    packed = pack_chats([*examples([5, 12, 3, 7, 8]), Example([1] * 20, [False] * 15 + [True] * 5, 9)], window=10)
    assert sorted(place for window in packed.windows for place in window) == [0, 1, 2, 3, 4]
    assert (packed.cut, packed.lost) == (1, 1)
    assert all(sum(len(packed.examples[place].ids) for place in window) <= 10 for window in packed.windows)
    assert len(packed.windows) == 4
    batch = collate_windows([packed.item(i) for i in range(4)], pad=0)
    assert int(batch["labels"].ne(-100).sum()) == packed.num_targets
    assert set(batch["labels"][batch["segments"] == 0].tolist()) <= {-100}


def test_epochs_show_every_window_once():
    packed = pack_chats(examples([9, 8, 7, 6]), window=10)
    dataset = ChatDataset(packed, length=8, seed=1)
    first, second = ([int(dataset[i]["chats"][0]) for i in part] for part in (range(4), range(4, 8)))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3]


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
DECODER = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "eager": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, attn_implementation="eager")),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, sliding_window=None)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**DECODER, **FEW, moe_intermediate_size=12, head_dim=8)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**DECODER, **FEW)),
    "token_choice": lambda: MixtureForCausalLM(
        MixtureConfig(**DECODER, **FEW, moe_intermediate_size=12, mlp_layer_types=["token_choice"] * 2)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_chat_gets_the_logits_that_it_gets_alone(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
    model = model.double()
    ids = [torch.randint(3, 64, (length,)).tolist() for length in (6, 9, 4)]
    packed = pack_chats([Example(row, [True] * len(row), i) for i, row in enumerate(ids)], window=24)
    batch = collate_windows([packed.item(0), pack_chats(examples([5]), window=24).item(0)], pad=0)
    together = model(**packed_inputs(model, batch), use_cache=False).logits[0]
    for segment, place in enumerate(packed.windows[0], start=1):
        alone = model(torch.tensor([ids[place]]), use_cache=False).logits[0]
        own = together[batch["segments"][0] == segment]
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_without_the_mask_the_probe_would_find_the_leak():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    packed = pack_chats(examples([6, 5]), window=16)
    batch = collate_windows([packed.item(0)], pad=0)
    inputs = packed_inputs(model, batch)
    plain = {"input_ids": inputs["input_ids"]}
    changed = inputs["input_ids"].clone()
    changed[0, 2] = 50
    second = batch["segments"][0] == 2

    def change(given):
        return (model(**{**given, "input_ids": changed}).logits - model(**given).logits)[0, second].abs().max()

    assert change(inputs) == 0 < change(plain)
