"""Chats as tokens, by the base's own chat template, and which of the tokens are the assistant's answers.

What a model reads before an answer is exactly what it reads when it is asked: the template over the messages so far
with its generation prompt. The answer is what the template adds for the next message, up to the token that ends the
turn. Each of these pieces is encoded by itself, as in use, where a prompt is encoded before its answer exists.

Some templates write earlier turns otherwise than the last one (Qwen3 drops their thoughts). A chat is then one example
for each of its answers, so that every answer is learnt behind the prompt that it will really have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.data.chats import ANSWERS, Chat, Message
from mixtura.errors import reason_of

PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For a tokenizer without a chat template: a line a turn, the speaker before it, and eos behind each answer."""


class Example(NamedTuple):
    """Tokens of a chat, or of a chat up to one of its answers."""

    ids: list[int]
    targets: list[bool]
    """Whether a token is one of the assistant's."""
    chat: int
    """Which chat it is of."""


@dataclass(frozen=True)
class Prompts:
    """A tokenizer with a chat template."""

    tokenizer: PreTrainedTokenizerBase
    is_plain: bool
    """Whether the template is ours, because the tokenizer had none."""

    @property
    def eos(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int), "open_prompts checks that there is one"
        return eos

    @property
    def pad(self) -> int:
        """The padding token, or eos where there is none: padding is masked, so its token does not matter."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self.eos

    @cached_property
    def _special(self) -> set[int]:
        """Tokens that are no text, such as <|im_end|>, whether or not they have a name such as eos."""
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        return {*self.tokenizer.all_special_ids, *(token for token, of in added.items() if of.special)}

    def render(self, messages: Sequence[Message], *, where: str, ask: bool) -> str:
        """The text of messages; `ask` adds what stands before an answer.

        Raises:
            UserError: the template refuses the messages, such as a system message that it has no place for.
        """
        turns = [message._asdict() for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # a template is a program of the model's author
            raise UserError(
                f"The base's chat template cannot write {where} ({reason_of(error)}): change these messages, or name "
                "another 'base.name'."
            ) from error

    def question(self, chat: Chat) -> list[int]:
        """The tokens in front of a chat's last answer."""
        return self._ids(self.render(chat.messages[:-1], where=chat.where, ask=True))

    def examples(self, chat: Chat, *, number: int) -> list[Example]:
        """A chat's tokens, and which are targets: one example, or one for each answer (see above)."""
        answers = [place for place, message in enumerate(chat.messages) if message.role == ANSWERS]
        asked = [self.render(chat.messages[:place], where=chat.where, ask=True) for place in answers]
        told = [self.render(chat.messages[: place + 1], where=chat.where, ask=False) for place in answers]
        for prompt, text in zip(asked, told, strict=True):
            if not text.startswith(prompt):
                raise UserError(
                    f"The base's chat template writes {chat.where} otherwise than it asks for its answer, so that the "
                    "answer cannot be told from the prompt: name another 'base.name', or mend the template."
                )
        # Each prompt must go on from the text before it, for all answers to be learnt in one reading.
        if all(later.startswith(earlier) for earlier, later in zip(told, asked[1:], strict=False)):
            return [self._joined(asked, told, number)]
        return [self._joined([prompt], [text], number) for prompt, text in zip(asked, told, strict=True)]

    def _joined(self, asked: list[str], told: list[str], number: int) -> Example:
        """Prompts and answers in turn; `told[i]` is `asked[i]` and an answer, and the next prompt goes on from it."""
        ids: list[int] = []
        targets: list[bool] = []
        done = 0
        for prompt, text in zip(asked, told, strict=True):
            # The end of a turn, such as a line break, may stand behind the token that ends the answer.
            piece = self._ids(text[len(prompt) :])
            end = self._end(piece)
            between = self._ids(prompt[done:])
            ids += between + piece
            targets += [False] * len(between) + [place < end for place in range(len(piece))]
            done = len(text)
        return Example(ids, targets, number)

    def _end(self, piece: list[int]) -> int:
        """How many tokens an answer has with the special token that ends it; all, where none does."""
        special = self._special
        return next((place + 1 for place in reversed(range(len(piece))) if piece[place] in special), len(piece))

    def ends(self, examples: Sequence[Example]) -> list[int]:
        """The special tokens that end answers, at which generation has to stop; eos is always one."""
        special = self._special
        found = {
            ids[place]
            for ids, targets, _ in examples
            for place in range(len(ids))
            if targets[place] and ids[place] in special and (place + 1 == len(ids) or not targets[place + 1])
        }
        return sorted({self.eos, *found})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _ids(self, text: str) -> list[int]:
        """Tokens of a part of a rendered chat: the template has written all special tokens that there are to be."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]


def open_prompts(tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The tokenizer's own template, or the plain one, which it then keeps and so is saved with the model.

    Raises:
        UserError: the tokenizer has no token that ends a text.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError("The base's tokenizer has no end-of-text token, so no answer could end: choose another base.")
    # Mixtura's own tokenizers read the marks of a template as plain text; here they are the tokens that they name.
    tokenizer.split_special_tokens = False
    if tokenizer.chat_template:
        return Prompts(tokenizer, is_plain=False)
    bos = tokenizer.bos_token_id
    begins: Any = tokenizer("a", return_attention_mask=False)
    opens = bos is not None and bos == begins["input_ids"][0]
    tokenizer.chat_template = ("{{ bos_token }}" if opens else "") + PLAIN
    return Prompts(tokenizer, is_plain=True)
