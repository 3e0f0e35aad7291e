"""Comparisons of chat models: how much of a pretrained model is tuned, and by which adapter.

All arms see the same windows of packed chats in the same order, and answer the same held-out questions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from mixtura.checkpoints.pretrained import load_base
from mixtura.config import ChatRecipe, UserError
from mixtura.config.adapt import MOST_CHAT_TOKENS, Amounts, common_length, with_batches_for
from mixtura.data.chats import Chat, ChatCorpus, load_chats
from mixtura.results import ArmDescription
from mixtura.results.document import AcrossArms
from mixtura.tasks.chat.answers import Judged, Question, paired_test, read_judged, scores
from mixtura.tasks.chat.arms import ChatArm, base_reference
from mixtura.tasks.chat.batches import pack_chats
from mixtura.tasks.chat.prompts import Example, Prompts, open_prompts
from mixtura.tasks.chat.task import JUDGED_FILE, ChatData
from mixtura.training.interface import Arm, Experiment

SIDES = ("train", "validation", "test")


def make_chat(
    recipe: ChatRecipe, *, cache_dir: Path | None, on_progress: Callable[[str], None] | None = None
) -> "ChatExperiment":
    """Reads the chats of a recipe, and makes its arms.

    Args:
        recipe: the comparison.
        cache_dir: where the base's own scores are kept; None keeps none.
        on_progress: called with a phrase when a slow part begins, and with what is worth knowing of the chats.

    Raises:
        UserError: the data, the base model or an arm's settings cannot be used.
    """
    report = on_progress or (lambda _: None)
    report("reading")
    corpus = load_chats(recipe.data)
    recipe = dataclasses.replace(recipe, data=corpus.config)
    base, tokenizer = load_base(str(recipe.base.name), num_layers=1)
    prompts = open_prompts(tokenizer)
    report("encoding")
    data = _encode(recipe, corpus, prompts, positions=getattr(base.config, "max_position_embeddings", None))
    for note in _notes(data):
        report(note)
    amounts = Amounts(*(len(split.windows) for split in (data.train, data.validation, data.test)))
    recipe = with_batches_for(dataclasses.replace(recipe, data=data.config), amounts)
    return ChatExperiment(recipe, data, cache_dir)


@final
class ChatExperiment(Experiment):
    """Everything a comparison of chat models runs."""

    recipe: ChatRecipe

    def __init__(self, recipe: ChatRecipe, chats: ChatData, cache_dir: Path | None) -> None:
        """Makes the recipe's arms for encoded chats."""
        self.recipe, self.chats = recipe, chats
        self.data, self.data_digest = chats.facts, chats.digest
        reference = base_reference(recipe, chats, cache_dir)
        self.arms: dict[str, Arm] = {name: ChatArm(recipe, name, chats, reference) for name in recipe.arms}

    def held_equal(self, described: Mapping[str, ArmDescription]) -> list[str]:
        """Base, data and its order, steps and answering, and what every arm trains."""
        training = self.recipe.training
        windows = training.steps * training.batch_size * training.gradient_accumulation_steps
        trained = sorted({arm.parameters_trainable for arm in described.values()})
        sizes = f"{trained[0]:,}" if len(trained) == 1 else f"from {trained[0]:,} to {trained[-1]:,}"
        return [
            f"{windows:,} windows of packed chats in the same order",
            "the same chat template, held-out chats and greedy answers",
            f"the base model {self.recipe.base.name}; trained parameters: {sizes}",
        ]

    def across_arms(self, out: Path) -> AcrossArms:
        """Paired bootstrap of every arm against the baseline over the test chats, over the seeds that both have."""
        baseline = _judged(out / "arms" / self.recipe.baseline)
        found = {}
        for name in self.arms:
            arm = {} if name == self.recipe.baseline else _judged(out / "arms" / name)
            seeds = sorted(arm.keys() & baseline.keys())
            if not seeds:
                continue
            sides = [[scores(side[seed], self.chats.questions) for seed in seeds] for side in (arm, baseline)]
            found[name] = {
                key: paired_test(_mean(sides[0], key), _mean(sides[1], key), sides[0][0][key][1])
                for key in ("loss", "token_f1")
            }
        return AcrossArms(found)


def _mean(runs: list[dict[str, tuple[np.ndarray, np.ndarray]]], key: str) -> np.ndarray:
    """What each example adds to a measure, mean over seeds."""
    return np.mean([run[key][0] for run in runs], axis=0)


def _judged(arm: Path) -> dict[str, Judged]:
    """What each finished run of an arm made of the test chats, by seed."""
    return {file.parent.name: read_judged(file) for file in sorted(arm.glob(f"seed*/{JUDGED_FILE}"))}


def _encode(recipe: ChatRecipe, corpus: ChatCorpus, prompts: Prompts, *, positions: int | None) -> ChatData:
    encoded = {side: _examples(getattr(corpus, side), prompts) for side in SIDES}
    window = recipe.data.max_length
    if window is None:
        window = common_length([len(of.ids) for side in encoded.values() for of in side], most=MOST_CHAT_TOKENS)
    window = min(window, positions or window)
    config = dataclasses.replace(recipe.data, max_length=window)
    packed = {side: pack_chats(encoded[side], window=window) for side in SIDES}
    for side, split in packed.items():
        if not split.windows:
            raise UserError(
                f"No chat is left for {side}, since none has an answer in its first {window} tokens: raise "
                "'data.max_length', or give more chats."
            )
    questions = _questions(corpus.test, prompts, config.answered_chats, most=window)
    if not questions:
        raise UserError(
            f"No prompt of the {len(corpus.test)} test chats has {window} tokens or fewer, so none can be answered: "
            "raise 'data.max_length' or 'data.test_chats'."
        )
    train = packed["train"]
    facts = {
        "description": corpus.description,
        "rows_skipped": corpus.skipped,
        "tokens_train": train.num_tokens,
        "targets_train": train.num_targets,
        "windows_train": len(train.windows),
        "window": window,
        "filled_percent": 100 * train.num_tokens / (window * len(train.windows)),
        "chat_template": "plain, as the base has none" if prompts.is_plain else "the base's own",
        "answered": len(questions),
        **{f"chats_{side}": len({of.chat for of in split.examples}) for side, split in packed.items()},
        **{f"cut_{side}": split.cut for side, split in packed.items()},
        **{f"without_answer_{side}": split.lost for side, split in packed.items()},
    }
    return ChatData(prompts, config, **packed, questions=questions, ends=prompts.ends(train.examples), facts=facts)


def _examples(chats: Sequence[Chat], prompts: Prompts) -> list[Example]:
    return [example for number, chat in enumerate(chats) for example in prompts.examples(chat, number=number)]


def _questions(chats: Sequence[Chat], prompts: Prompts, number: int, *, most: int) -> list[Question]:
    """The last question of the first chats that are short enough to be read whole."""
    found: list[Question] = []
    for place, chat in enumerate(chats):
        prompt = prompts.question(chat)
        if len(found) < number and len(prompt) <= most:
            *_, asked, answered = chat.messages
            found.append(Question(prompt, asked.content, answered.content, place))
    return found


def _notes(data: ChatData) -> list[str]:
    """What a user should know of the chats before training."""
    notes = []
    if data.prompts.is_plain:
        notes.append(
            "the base's tokenizer has no chat template: a plain one is used, a line a turn with User: or Assistant: "
            "before it, and kept with the model"
        )
    splits: Mapping[str, Any] = {side: getattr(data, side) for side in SIDES}
    cut, lost = (sum(getattr(split, key) for split in splits.values()) for key in ("cut", "lost"))
    if cut or lost:
        notes.append(
            f"{cut:,} chats with more than {data.config.max_length} tokens lose their end, and {lost:,} without an "
            "answer in those are left out; 'data.max_length' says how many a window has"
        )
    return notes
