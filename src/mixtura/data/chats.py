"""Chats: lists of messages in OpenAI's style, or rows of a question and its answer, checked, counted and held out.

What cannot be trained on as it stands (a role that no template knows, an answer without words, a call of a tool) is
refused with its row: to leave it out silently would train another chat than the user's. Rows without any answer and
repeated chats are left out and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

from mixtura.config import ChatDataConfig, UserError
from mixtura.config.requests import held_out_chats
from mixtura.data.formats.rows import Row, WrittenNumber, find_cell
from mixtura.data.formats.table_files import TABLES, file_rows, hub_rows, select
from mixtura.data.formats.text_files import local_files
from mixtura.data.held_out import normalise, text_hash
from mixtura.data.python_questions import python_questions
from mixtura.errors import is_utf8

ANSWERS = "assistant"
_ROLES = {
    **{role: role for role in ("system", "user", ANSWERS)},
    **{"human": "user", "gpt": ANSWERS, "developer": "system"},
}
"""Roles by how they are spelled: OpenAI's, and those of "conversations" with from and value."""
_TOOLS = ("tool", "function", "ipython")


class Message(NamedTuple):
    """One turn."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


class Chat(NamedTuple):
    """One chat, with one answer at least."""

    messages: tuple[Message, ...]
    where: str
    """Its row, to stand inside a sentence."""
    unlearnt: tuple[int, ...] = ()
    """Places of answers that are read and never learnt: those with weight 0."""

    def opening(self, least: int = 0) -> str:
        """What the user says first, normalised, and then until it has `least` characters."""
        first, *further = [turn.content for turn in self.messages if turn.role == "user"]
        opening = normalise(first)
        for content in further:
            if len(opening) >= least:
                break
            opening = f"{opening} {normalise(content)}"
        return opening

    @property
    def num_answers(self) -> int:
        """Answers that are learnt."""
        return sum(message.role == ANSWERS for message in self.messages) - len(self.unlearnt)


@dataclass(frozen=True)
class ChatCorpus:
    """Chats of a run; no opening question is on two sides."""

    train: list[Chat]
    """Shuffled, like the others, so that the first few are a fair sample."""
    validation: list[Chat]
    test: list[Chat]
    description: str
    """One phrase for reports: source, counts, what was skipped."""
    skipped: dict[str, int]
    """Rows left out, by reason."""
    config: ChatDataConfig
    """The configuration that was read, with the numbers of held-out chats filled in."""


def load_chats(config: ChatDataConfig) -> ChatCorpus:
    """Reads the chats of a recipe, checks them, and holds some out.

    Raises:
        UserError: the source is missing or unreadable, a row cannot be used as it is, or too few chats are left.
    """
    skipped: Counter[str] = Counter()
    rows, description = _open(config, skipped)
    chats = _distinct(rows, skipped)
    if not chats:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "it has no rows"
        raise UserError(f"No chat with an answer is left of {description} ({reasons}): check {_columns(config)}.")
    config = held_out_chats(config, len(chats))
    test, validation, train = _split(chats, config, description)
    if config.max_chats is not None and len(train) > config.max_chats:
        skipped["beyond max_chats"] = len(train) - config.max_chats
        train = train[: config.max_chats]
    answers = sum(chat.num_answers for chat in train)
    description += f", {len(train):,} chats with {answers:,} answers to train on"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()) if count)
    return ChatCorpus(
        train,
        validation,
        test,
        description + (f"; rows skipped: {reasons}" if reasons else ""),
        {reason: count for reason, count in sorted(skipped.items()) if count},
        config,
    )


def _columns(config: ChatDataConfig) -> str:
    if config.prompt_column is None:
        return f"'data.messages_column', which is '{config.messages_column}'"
    return "'data.prompt_column' and 'data.completion_column'"


def _open(config: ChatDataConfig, skipped: Counter[str]) -> tuple[Iterator[Chat], str]:
    """The chats of all rows, and what to call the source; reading them adds to `skipped`."""
    if config.source == "python-docs":
        pairs = enumerate(python_questions(), start=1)
        chats = (_question(*pair, f"question {number} of Python's library") for number, pair in pairs)
        return chats, "questions about Python's standard library, from its docstrings"
    if config.source == "hub":
        subset = f", {config.subset}" if config.subset else ""
        rows = hub_rows(str(config.name), config.subset, config.split)
        return _read(
            rows, config, skipped, name := f"the hub dataset {config.name}{subset}, split {config.split}"
        ), name
    files, others = local_files(config.path, TABLES)
    wanted = [column for column in (config.prompt_column, config.completion_column) if column is not None]
    rows = (row for file in files for row in file_rows(file, wanted or [config.messages_column]))
    single = files == [Path(str(config.path)).expanduser()]
    name = f"the file {files[0].name}" if single else f"{len(files)} files in {config.path}"
    return _read(rows, config, skipped, name), name + others


def _read(rows: Iterator[Row], config: ChatDataConfig, skipped: Counter[str], source: str) -> Iterator[Chat]:
    if config.prompt_column is None or config.completion_column is None:
        return _chats(rows, config.messages_column, skipped, source)
    columns = {"data.prompt_column": config.prompt_column, "data.completion_column": config.completion_column}

    def chat_of(found: tuple[Row, list[object]]) -> Chat:
        row, (prompt, answer) = found
        return _question(_text(prompt, row.where, "prompt"), _text(answer, row.where, "completion"), row.where)

    return _usable(select(rows, columns, skipped, source=source), chat_of)


MOST_COUNTED = 1_000
"""Refused rows are counted up to so many: a hub dataset may have millions."""
Found = TypeVar("Found")


def _usable(rows: Iterable[Found], chat_of: Callable[[Found], Chat | None]) -> Iterator[Chat]:
    """The chats of rows. A row that is refused is told at the end, with how many more there are.

    Whoever cleans a file then knows whether to mend a row or to write a filter.
    """
    first, others = "", 0
    for row in rows:
        try:
            chat = chat_of(row)
        except UserError as error:
            first, others = first or str(error), others + bool(first)
            if others == MOST_COUNTED:
                break
            continue
        if chat is not None and not first:
            yield chat
    if first:
        many = f"{'at least ' * (others == MOST_COUNTED)}{others:,} other row{'s' * (others > 1)}"
        also = f"; {many} cannot be used as {'they are' if others > 1 else 'it is'} either." if others else "."
        raise UserError(first.removesuffix(".") + also)


def _question(prompt: str, answer: str, where: str) -> Chat:
    return _checked([Message("user", prompt), Message(ANSWERS, answer)], where)


def _chats(rows: Iterator[Row], column: str, skipped: Counter[str], source: str) -> Iterator[Chat]:
    found, names = False, dict[str, object]()

    def chat_of(row: Row) -> Chat | None:
        nonlocal found
        present, value = find_cell(row, column)
        if not present or value is None:
            names.update(row.values)
            skipped[f"without '{column}'"] += 1
            return None
        found = True
        if not isinstance(value, list):
            raise UserError(
                f"'{column}' in {row.where} is no list of messages: write objects with a role and a content, or name "
                "two columns of text in 'data.prompt_column' and 'data.completion_column'."
            )
        places = [f"message {place} of {row.where}" for place, _ in enumerate(value, start=1)]
        messages = [_message(*turn) for turn in zip(value, places, strict=True)]
        answers = [place for place, message in enumerate(messages) if message.role == ANSWERS]
        unlearnt = [place for place in answers if not _is_learnt(value[place], places[place])]
        if len(unlearnt) == len(answers):
            skipped["without an answer"] += 1
            return None
        return _checked(messages, row.where, unlearnt)

    yield from _usable(rows, chat_of)
    if names and not found:
        turns = next((name for name, value in names.items() if holds_turns(value)), None)
        if turns is not None:
            raise UserError(f"No row of {source} has '{column}': set 'data.messages_column' to '{turns}'.")
        if (pair := question_columns(names)) is not None:
            raise UserError(
                f"No row of {source} has '{column}': set 'data.prompt_column' and 'data.completion_column' to "
                f"'{pair[0]}' and '{pair[1]}'."
            )
        listed = ", ".join(list(names)[:20])
        raise UserError(
            f"No row of {source} has '{column}': name a column of messages in 'data.messages_column', or two of "
            f"{listed} in 'data.prompt_column' and 'data.completion_column'."
        )


def holds_turns(value: object) -> bool:
    """Whether a cell is a chat: a list of objects that say who speaks, in either style."""
    return isinstance(value, list) and any(
        isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in value
    )


_QUESTIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
)
_CONTEXTS = ("input", "context")
"""Columns of what a question is about, beside it; mostly empty."""


def question_columns(names: Iterable[str]) -> tuple[str, str] | None:
    """The columns of questions and answers, as expressions, by the names that data sets of instructions give them.

    What a question is about is joined to it: "instruction+input".
    """
    spelled = {name.casefold(): name for name in names}
    for question, answer in _QUESTIONS:
        if question in spelled and answer in spelled:
            about = [spelled[name] for name in _CONTEXTS if name in spelled and name != question]
            return "+".join([spelled[question], *about]), spelled[answer]
    return None


def _message(turn: object, where: str) -> Message:
    """A turn of a chat, whose role and content may have the names of either style."""
    if not isinstance(turn, Mapping):
        raise UserError(f'{_start(where)} is no object: write {{"role": ..., "content": ...}}.')
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise UserError(f"{_start(where)} has no role: write system, user or assistant into its 'role'.")
    if role in _TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise UserError(
            f"{_start(where)} calls a tool or is a tool's result, which is not trained on: remove this chat, or write "
            "the call as text of the assistant."
        )
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{_start(where)} has the role {role!r}: use system, user or assistant.")
    return Message(_ROLES[role], _text(turn.get("content", turn.get("value")), where, "content"))


def _is_learnt(turn: Mapping[str, object], where: str) -> bool:
    """Whether an answer is one to learn, by its weight as OpenAI has it."""
    weight = turn.get("weight")
    if isinstance(weight, WrittenNumber):
        weight = float(str(weight))
    if weight not in (None, 0, 1):
        raise UserError(f"{_start(where)} has weight {weight!s:.40}: write the number 0, to leave it unlearnt, or 1.")
    return weight != 0


def _text(value: object, where: str, what: str) -> str:
    """A content that is text, or a list of parts that are."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"The {what} of {where} has a part that is no text: remove images and files.")
        value = "\n".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise UserError(f"The {what} of {where} is {value!r:.40}, which is no text: write it as text.")
    if not is_utf8(value):
        raise UserError(f"The {what} of {where} is no UTF-8 text (it has half a character): correct it.")
    return value.strip()


def _checked(messages: list[Message], where: str, unlearnt: Sequence[int] = ()) -> Chat:
    """The chat up to the last answer to learn; refuses turns in an order that is none, and answers without words."""
    answers = {place for place, message in enumerate(messages) if message.role == ANSWERS}
    last = max(answers.difference(unlearnt))
    before = ""
    for place, (role, content) in enumerate(messages[: last + 1], start=1):
        named = f"Message {place} of {where}"
        if role == ANSWERS and not content:
            raise UserError(f"{named} is an answer of the assistant without text: write one, or remove the chat.")
        if role == "system" and place > 1:
            raise UserError(f"{named} is a system message, which may only be the first: move or remove it.")
        if role == ANSWERS and before in ("", "system"):
            raise UserError(f"{named} is an answer with no user's message before it: add the message, or remove both.")
        if role == before:
            raise UserError(f"{named} is the {role}'s second in a row: join the two.")
        before = role
    return Chat(tuple(messages[: last + 1]), where, tuple(place for place in unlearnt if place < last))


def _start(where: str) -> str:
    return where[0].upper() + where[1:]


def _distinct(rows: Iterator[Chat], skipped: Counter[str]) -> list[Chat]:
    """Each chat once."""
    kept: dict[tuple[object, ...], Chat] = {}
    for chat in rows:
        if (known := (chat.messages, chat.unlearnt)) in kept:
            skipped["duplicate"] += 1
        kept.setdefault(known, chat)
    return list(kept.values())


_GREETING = 24
"""Characters: a shorter opening, such as "hi", says nothing of a chat, so what the user says next counts with it."""


def _split(chats: list[Chat], config: ChatDataConfig, description: str) -> list[list[Chat]]:
    """Test, validation and training chats; those with one opening stay together.

    What is too many for a held-out side is trained on; where that leaves one empty, it gets the smallest group, unless
    that is a large part of all.
    """
    wanted = config.test_chats or 0, config.validation_chats or 0
    most = [number + max(1, number // 10) for number in wanted]
    groups = _by_opening(chats, most=min(most))
    held_out: list[list[Chat]] = [[], []]
    train: list[list[Chat]] = []
    for group in groups:
        has_room = (
            side
            for side, number, limit in zip(held_out, wanted, most, strict=True)
            if len(side) < number and len(side) + len(group) <= limit
        )
        if (side := next(has_room, None)) is None:
            train.append(group)
        else:
            side += group
    for side in held_out:
        smallest = min(train, key=len, default=[])
        if not side and smallest and 3 * len(smallest) <= sum(map(len, train)):
            side += smallest
            train.remove(smallest)
    if not (train and all(held_out)):
        raise _too_few(groups, config, description)
    return [*held_out, [chat for group in train for chat in group]]


def _by_opening(chats: list[Chat], *, most: int) -> list[list[Chat]]:
    """Chats with one opening together, in an order that a hash of it chose.

    A greeting that more than `most` chats share is no opening by itself.
    """
    sharing = Counter(chat.opening() for chat in chats)
    openings = [(chat.opening(_GREETING if sharing[chat.opening()] > most else 0), chat) for chat in chats]
    ordered = sorted(openings, key=lambda found: (text_hash(found[0]), found[1].messages, found[1].unlearnt))
    return [[chat for _, chat in together] for _, together in groupby(ordered, key=lambda found: found[0])]


def _too_few(groups: list[list[Chat]], config: ChatDataConfig, description: str) -> UserError:
    """Says that there are too few chats, or too few openings."""
    number, largest = sum(map(len, groups)), max(groups, key=len)
    shared, other = "", ""
    if 1 < len(largest) >= number / 3:
        opening = next(turn.content for turn in largest[0].messages if turn.role == "user")
        shared = f", {len(largest):,} of which open with {opening[:40]!r} and so stay on one side"
        other = " with other openings"
    return UserError(
        f"{_start(description)} has {number:,} usable chats{shared}, too few for 'data.validation_chats' "
        f"{config.validation_chats}, 'data.test_chats' {config.test_chats} and some to train on: give more{other} or "
        "lower these."
    )
