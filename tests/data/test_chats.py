"""Chats from a user's own rows: both styles are read, and what cannot be trained on is refused with its row."""

import json
import re

import pytest

from mixtura.config import ChatDataConfig, UserError
from mixtura.data.chats import load_chats
from mixtura.data.python_questions import python_questions


def write(tmp_path, rows, name="chats.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def load(path, **changes):
    settings = {"source": "local", "path": str(path), "validation_chats": 1, "test_chats": 1, **changes}
    corpus = load_chats(ChatDataConfig(**settings))
    return corpus, [each for side in (corpus.train, corpus.validation, corpus.test) for each in side]


GOOD = [chat(("user", f"question {number}"), ("assistant", f"answer {number}")) for number in range(5)]


def test_messages_are_read_up_to_the_last_answer(tmp_path):
    rows = [*GOOD, chat(("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"))]
    corpus, found = load(write(tmp_path, rows))
    assert len(found) == 6 and len(corpus.test) == len(corpus.validation) == 1
    assert [("system", "be kind"), ("user", "hi"), ("assistant", "hello")] in [list(of.messages) for of in found]
    assert "4 chats with 4 answers to train on" in corpus.description


def test_prompts_and_completions_are_two_columns(tmp_path):
    rows = [{"ask": f"question {number}", "say": f"answer {number}"} for number in range(4)]
    _, found = load(write(tmp_path, rows), prompt_column="ask", completion_column="say")
    assert sorted(of.messages[1].content for of in found) == [f"answer {number}" for number in range(4)]


def test_from_and_value_and_parts_of_text_are_read(tmp_path):
    other = {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    parts = chat(("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]), ("assistant", "three"))
    _, found = load(write(tmp_path, [*GOOD, other, parts]))
    told = {tuple(turn.content for turn in of.messages) for of in found}
    assert {("hi", "hello"), ("one\ntwo", "three")} <= told


def test_chats_with_one_opening_are_on_one_side_and_repeated_ones_come_once(tmp_path):
    same = [chat(("user", "Question!"), ("assistant", f"answer {number}")) for number in range(3)]
    corpus, found = load(write(tmp_path, [*GOOD, *same, same[0], chat(("user", "no answer"))]))
    sides = [{of.opening() for of in side} for side in (corpus.train, corpus.validation, corpus.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 6 and len(found) == 8
    assert corpus.skipped == {"duplicate": 1, "without an answer": 1}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (1, "remove this chat, or write the call as text of the assistant\\.$"),
        (2, "assistant; 1 other row cannot be used as it is either\\.$"),
        (4, "line 6 calls a tool .*; 3 other rows cannot be used as they are either\\.$"),
    ],
)
def test_rows_that_cannot_be_used_are_counted(tmp_path, bad, told):
    tool = chat(("user", "hi"), ("tool", "4"), ("assistant", "four"))
    with pytest.raises(UserError, match=told):
        load(write(tmp_path, [*GOOD, *[tool] * bad]))


REFUSED = {
    "no role": ({"messages": [{"content": "hi"}]}, "Message 1 of '.*' line 2 has no role: write system, user"),
    "unknown role": (chat(("narrator", "hi")), "Message 1 of .* line 2 has the role 'narrator': use system"),
    "empty answer": (chat(("user", "hi"), ("assistant", " ")), "Message 2 of .* line 2 is an answer .* without text"),
    "tool result": (chat(("user", "hi"), ("tool", "4")), "Message 2 of .* line 2 calls a tool"),
    "tool call": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "Message 2 of .* line 2 calls a tool .* remove this chat",
    ),
    "no text": (chat(("user", 7), ("assistant", "x")), "The content of message 1 of .* line 2 is 7, which is no text"),
    "image": (
        chat(("user", [{"type": "image_url"}]), ("assistant", "x")),
        "The content of message 1 of .* line 2 has a part that is no text",
    ),
    "late system": (chat(("user", "hi"), ("system", "x"), ("assistant", "y")), "Message 2 of .* may only be the first"),
    "answer first": (chat(("assistant", "hi")), "Message 1 of .* with no user's message before it"),
    "two in a row": (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "Message 2 of .* the user's second"),
    "no list": ({"messages": "hi"}, "'messages' in .* line 2 is no list of messages"),
    "no object": ({"messages": ["hi"]}, "Message 1 of .* line 2 is no object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_row_that_cannot_be_trained_on_is_refused_with_its_place_and_a_fix(tmp_path, name):
    row, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence) as told:
        load(write(tmp_path, [GOOD[0], row, *GOOD[1:]]))
    assert "\n" not in str(told.value)


def test_table_without_messages_says_which_columns_there_are(tmp_path):
    with pytest.raises(UserError, match=r"No row of the file chats.jsonl has 'messages'.* of question, reply"):
        load(write(tmp_path, [{"question": "a", "reply": "b"}] * 3))


def test_chats_in_a_column_of_another_name_are_pointed_at(tmp_path):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    with pytest.raises(UserError, match=r"set 'data\.messages_column' to 'conversations'\.$"):
        load(write(tmp_path, [row] * 3))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (("instruction", "input", "output"), "'instruction+input' and 'output'"),
        (("Prompt", "Response"), "'Prompt' and 'Response'"),
    ],
)
def test_columns_of_instructions_are_pointed_at(tmp_path, columns, named):
    with pytest.raises(
        UserError, match=re.escape(f"set 'data.prompt_column' and 'data.completion_column' to {named}.")
    ):
        load(write(tmp_path, [dict.fromkeys(columns, "words")] * 3))


def test_what_a_question_is_about_is_joined_to_it(tmp_path):
    rows = [{"instruction": f"sum up {i}", "input": "a text" * (i % 2), "output": f"{i}"} for i in range(6)]
    _, found = load(write(tmp_path, rows), prompt_column="instruction+input", completion_column="output")
    asked = {of.messages[1].content: of.messages[0].content for of in found}
    assert asked["1"] == "sum up 1\n\na text" and asked["2"] == "sum up 2"


def test_too_few_chats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 2 usable chats, too few for 'data.validation_chats' 1"):
        load(write(tmp_path, GOOD[:2]))
    for few in (GOOD[:1], [chat(("user", "hi"), ("assistant", answer)) for answer in ("one", "two")]):
        with pytest.raises(UserError, match=r"usable chats.*too few for 'data.validation_chats'"):
            load(write(tmp_path, few))
        with pytest.raises(UserError, match=r"too few for 'data.validation_chats' 5, 'data.test_chats' 5"):
            load(write(tmp_path, few), validation_chats=5, test_chats=5)


@pytest.mark.parametrize("opening", ["", "Hi", "What do you think of this long question?"])
def test_many_chats_with_one_opening_are_trained_on(tmp_path, opening):
    shared = [chat(("user", opening), ("assistant", f"answer {number}")) for number in range(200)]
    others = [chat(("user", f"question {number}"), ("assistant", "yes")) for number in range(200)]
    corpus, _ = load(write(tmp_path, shared + others), validation_chats=40, test_chats=80)
    assert [len(side) for side in (corpus.train, corpus.validation, corpus.test)] == [280, 40, 80]
    assert sum(of.messages[0].content == opening for of in corpus.train) == 200


def test_a_greeting_counts_with_what_the_user_says_next(tmp_path):
    rows = [
        chat(("user", "Hi!"), ("assistant", "Hello."), ("user", f"{what} {number // 2}?"), ("assistant", f"{number}"))
        for number in range(100)
        for what in ("Tell me about number", "What follows number")
    ]
    corpus, _ = load(write(tmp_path, rows), validation_chats=20, test_chats=40)
    assert [len(side) for side in (corpus.train, corpus.validation, corpus.test)] == [140, 20, 40]
    sides = [{of.messages[2].content for of in side} for side in (corpus.train, corpus.validation, corpus.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 100


def test_chats_that_all_have_one_opening_are_refused_with_it(tmp_path):
    rows = [chat(("user", "Hi"), ("assistant", f"answer {number}")) for number in range(398)]
    told = (
        "has 400 usable chats, 398 of which open with 'Hi' and so stay on one side, too few for "
        "'data.validation_chats' 40, 'data.test_chats' 80 and some to train on: give more with other openings or lower"
    )
    with pytest.raises(UserError, match=told):
        load(write(tmp_path, [*rows, *GOOD[:2]]), validation_chats=40, test_chats=80)


def test_openings_that_are_all_shared_leave_no_side_empty(tmp_path):
    rows = [chat(("user", f"q{number % 6}"), ("assistant", f"answer {number}")) for number in range(30)]
    corpus, _ = load(write(tmp_path, rows), validation_chats=None, test_chats=None)
    assert [len(side) for side in (corpus.train, corpus.validation, corpus.test)] == [20, 5, 5]


def weighed(*turns):
    messages = [{"role": role, "content": content, **more} for role, content, more in turns]
    return {"messages": messages}


def test_answers_of_weight_0_are_not_learnt(tmp_path):
    row = weighed(
        ("user", "hi", {}),
        ("assistant", "no", {"weight": 0}),
        ("user", "again", {}),
        ("assistant", "yes", {"weight": 1.0}),
        ("user", "and now", {"weight": 0}),
        ("assistant", "never", {"weight": 0}),
    )
    silent = weighed(("user", "hi", {}), ("assistant", "no", {"weight": 0}))
    corpus, found = load(write(tmp_path, [*GOOD, row, silent]))
    (kept,) = [of for of in found if of.unlearnt]
    assert [turn.content for turn in kept.messages] == ["hi", "no", "again", "yes"] and kept.unlearnt == (1,)
    assert corpus.skipped == {"without an answer": 1}
    with pytest.raises(UserError, match=r"Message 2 of .* has weight 0\.5: write the number 0"):
        load(write(tmp_path, [*GOOD, weighed(("user", "hi", {}), ("assistant", "no", {"weight": 0.5}))]))


def test_pythons_own_library_has_questions():
    pairs = python_questions()
    question, answer = next(pairs)
    assert question.startswith("In Python's module ") and question.endswith("?") and len(answer) >= 20
