"""Chats as tokens, and packed into windows, several in one, none of which sees another.

A chat is written by the base's own chat template, which tells the assistant's answers. What a model reads before an
answer is exactly what it reads when it is asked: the template over the messages so far with its generation prompt. The
answer is what the template adds for the next message, up to the token that ends the turn. Each of these pieces is
encoded by itself, as in use, where a prompt is encoded before its answer exists.

Some templates write earlier turns otherwise than the last one (Qwen3 drops their thoughts). A chat is then one example
for each of its answers, so that every answer is learnt behind the prompt that it will really have.

Positions begin anew with each chat, and attention is causal inside a chat and nothing outside it, so a packed chat gets
the numbers that it gets alone. Windows are filled by best fit, longest chats first (Ding et al. 2024, arXiv 2404.10830,
section 3), so that little is padding and no chat is cut to make it fit.

Shapes: N windows, B batch, L length of a batch's longest window.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.data.chats import ANSWERS, Chat, Message
from mixtura.data.packing import sequence_index
from mixtura.errors import reason_of
from mixtura.training.interface import Batch

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
    """Whether a token is one of an answer to learn."""
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
        learnt = [place not in chat.unlearnt for place in answers]
        if all(later.startswith(earlier) for earlier, later in zip(told, asked[1:], strict=False)):
            return [self._joined(asked, told, learnt, number)]
        turns = zip(asked, told, learnt, strict=True)
        return [self._joined([prompt], [text], [True], number) for prompt, text, is_learnt in turns if is_learnt]

    def _joined(self, asked: list[str], told: list[str], learnt: list[bool], number: int) -> Example:
        """Prompts and answers in turn; `told[i]` is `asked[i]` and an answer, and the next prompt goes on from it."""
        ids: list[int] = []
        targets: list[bool] = []
        done = 0
        for prompt, text, is_learnt in zip(asked, told, learnt, strict=True):
            # The end of a turn, such as a line break, may stand behind the token that ends the answer.
            piece = self._ids(text[len(prompt) :])
            end = self._end(piece)
            between = self._ids(prompt[done:])
            ids += between + piece
            targets += [False] * len(between) + [is_learnt and place < end for place in range(len(piece))]
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


@dataclass(frozen=True)
class PackedChats:
    """The examples of one split, and the windows that they are packed into."""

    examples: list[Example]
    windows: list[list[int]]
    """For each window the places of its examples."""
    cut: int = 0
    """Chats that lost their end, because they have more tokens than a window."""
    lost: int = 0
    """Chats without an answer inside the tokens of a window, which are left out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_targets(self) -> int:
        """Tokens of answers."""
        return sum(sum(example.targets) for example in self.examples)

    @cached_property
    def digest(self) -> str:
        """A hash over all tokens and where they belong."""
        digest = blake2b(digest_size=16)
        for ids, targets, chat in self.examples:
            digest.update(np.array([chat, len(ids), *ids, *targets], dtype=np.int64).tobytes())
        digest.update(repr(self.windows).encode())
        return digest.hexdigest()

    def item(self, index: int) -> Batch:
        """A window: `tokens`, `targets`, `segments` (1, 2, ... by example) and `chats` (of each token), all (L,)."""
        parts = [self.examples[place] for place in self.windows[index]]
        lengths = torch.tensor([len(part.ids) for part in parts])
        return {
            "tokens": torch.tensor([token for part in parts for token in part.ids]),
            "targets": torch.tensor([target for part in parts for target in part.targets]),
            "segments": torch.arange(1, len(parts) + 1).repeat_interleave(lengths),
            "chats": torch.tensor([part.chat for part in parts]).repeat_interleave(lengths),
        }


def pack_chats(examples: Iterable[Example], *, window: int) -> PackedChats:
    """Packs examples into windows of at most `window` tokens; longer ones lose their end, and are counted."""
    kept: list[Example] = []
    cut, lost = set[int](), set[int]()
    for ids, targets, chat in examples:
        # The first token of an example is predicted by none.
        if not any(targets[1:window]):
            lost.add(chat)
            continue
        if len(ids) > window:
            cut.add(chat)
        kept.append(Example(ids[:window], targets[:window], chat))
    return PackedChats(kept, _best_fit([len(example.ids) for example in kept], window), len(cut), len(lost))


def _best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    windows: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[place]
        room = next((room for room in range(length, window) if by_room[room]), window)
        if room < window:
            chosen = by_room[room].pop()
        else:
            chosen = len(windows)
            windows.append([])
        windows[chosen].append(place)
        by_room[room - length].append(chosen)
    return windows


class ChatDataset(Dataset):
    """Everything one run trains on, in order: item i is row i of the run, so read it without shuffling."""

    def __init__(self, packed: PackedChats, *, length: int, seed: int) -> None:
        """Schedules `length` windows, epochs as needed, each in an order of its own."""
        self.packed, self.length, self.seed = packed, length, seed

    def __len__(self) -> int:
        """Windows in the run, repeats counted."""
        return self.length

    def __getitem__(self, position: int) -> Batch:
        """A window; see `PackedChats.item`."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside a schedule of {self.length} windows")
        return self.packed.item(sequence_index(position, num_sequences=len(self.packed.windows), seed=self.seed))


def collate_windows(items: list[Batch], *, pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right: `input_ids`, `labels`, `position_ids`, `segments` and `chats`, all (B, L).

    Labels are -100 outside the assistant's answers, segments 0 on padding; positions begin anew with each segment.
    """
    longest = max(len(item["tokens"]) for item in items)
    batch = {
        "input_ids": torch.full((len(items), longest), pad, dtype=torch.int64),
        "labels": torch.full((len(items), longest), -100, dtype=torch.int64),
        "segments": torch.zeros(len(items), longest, dtype=torch.int64),
        "chats": torch.zeros(len(items), longest, dtype=torch.int64),
    }
    for row, item in enumerate(items):
        length = len(item["tokens"])
        batch["input_ids"][row, :length] = item["tokens"]
        batch["labels"][row, :length] = torch.where(item["targets"], item["tokens"], -100)
        batch["segments"][row, :length] = item["segments"]
        batch["chats"][row, :length] = item["chats"]
    segments_BL = batch["segments"]
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    # No example is predicted by the one before it: the first token of each is no target.
    batch["labels"][starts_BL] = -100
    places_L = torch.arange(longest)
    batch["position_ids"] = places_L - torch.where(starts_BL, places_L, 0).cummax(1).values
    return batch


def packed_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What a model's forward takes of a batch: ids, positions, and a mask (B, 1, L, L) of what a token may attend to.

    That is its own example up to itself. A padded token attends to the window's first one and not to itself, by which
    mixtures and adapters know it for padding. Attention in PyTorch's own loops adds the mask, so that it gets numbers.
    """
    segments_BL = batch["segments"]
    length = segments_BL.size(1)
    real_BL = segments_BL > 0
    same_BLL = (segments_BL[:, :, None] == segments_BL[:, None, :]) & real_BL[:, :, None]
    may_BLL = same_BLL & torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    may_BLL[:, :, 0] |= ~real_BL
    mask = may_BLL[:, None]
    config = getattr(model, "module", model).config
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        dtype = next(model.parameters()).dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
