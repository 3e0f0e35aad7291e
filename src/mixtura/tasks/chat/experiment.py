"""Comparisons of chat models: how much of a pretrained model is tuned, and by which adapter.

All arms see the same windows of packed chats in the same order, and answer the same held-out questions. An arm says
what it trains of the base, costs and leaks.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.expert_specialized import SAMPLE_SIZE
from mixtura.adapters.targets import count_parameters, measured_flops_per_token
from mixtura.checkpoints.few_layers import load_few_layers
from mixtura.checkpoints.pretrained import load_base
from mixtura.checkpoints.quantized import quantized_weights
from mixtura.config import BaseConfig, ChatRecipe, UserError
from mixtura.config.requests import MOST_CHAT_TOKENS, Amounts, common_length, with_batches_for
from mixtura.data.chats import Chat, ChatCorpus, load_chats
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm
from mixtura.results import ArmDescription, Facts, Leaks
from mixtura.results.document import AcrossArms
from mixtura.tasks.chat.answers import BaseReference, Judged, Question, paired_test, read_judged, scores
from mixtura.tasks.chat.batches import Example, Prompts, collate_windows, open_prompts, pack_chats, packed_inputs
from mixtura.tasks.chat.task import JUDGED_FILE, ChatData, ChatTask
from mixtura.tasks.tuning import adapter_settings, find_leaks, mixed_examples, naming_adapter, stirred
from mixtura.training.interface import Arm, Experiment


@final
class _ChatArm(Arm):
    """One side of a comparison of chat models."""

    def __init__(self, recipe: ChatRecipe, name: str, data: ChatData, reference: BaseReference) -> None:
        """Arm `name` of a recipe; raises UserError where groups do not fill the batch."""
        config, base = recipe.arms[name], recipe.base
        assert base.name is not None, "the recipe's checks want a base"
        self.name, self._recipe, self._config, self._data = name, recipe, config, data
        self.family = "full" if config.adapter is None else config.adapter.method
        self.label = name.replace("_", " ")
        self._group_size = mixed_examples(base.name, config.adapter, arm=name, batch_size=recipe.training.batch_size)
        self.training_mode, self.deployed_mode = ("group", "alone") if self._group_size else ("causal", "causal")
        self.learning_rate = config.learning_rate or recipe.training.learning_rate
        self.task = ChatTask(
            data,
            recipe.training,
            adapter=config.adapter,
            base=_base_facts(base),
            reference=reference,
        )

    def build(self, seed: int) -> nn.Module:
        """The base model, with a fresh adapter where the arm has one."""
        return self._built(seed, functools.partial(load_base, quantize=self._recipe.base.quantize))

    def _built(self, seed: int, load: Callable[..., Any]) -> nn.Module:
        torch.manual_seed(seed)
        base, adapter = self._recipe.base, self._config.adapter
        model, _ = load(str(base.name), num_layers=base.num_layers)
        if adapter is None:
            return model
        baseline = _baseline_parameters(self._recipe, load) if adapter.solves_rank else None
        sample = _sample(self._data, self._recipe.training.batch_size)
        with naming_adapter(self.name):
            return apply_adapter(model, adapter, baseline_parameters=baseline, sample=sample, seed=seed)

    def describe(self, baseline: Arm) -> ArmDescription:
        """What it is and costs; FLOPs are measured."""
        assert isinstance(baseline, _ChatArm)
        own, other = self._costs, baseline._costs
        return dataclasses.replace(own, flops_ratio=own.flops_per_token / other.flops_per_token)

    @functools.cached_property
    def _costs(self) -> ArmDescription:
        """What it is and costs, as if it were the baseline; a mixture of adapters runs all its experts."""
        model = self.build(0).train()
        total, trained = count_parameters(model)
        # Rows of one length, so that all arms are measured without padding, and with half of the tokens as targets.
        length = min(32, max(2, round(self.task.tokens_per_example)))
        tokens = torch.full((length,), self._data.prompts.eos)
        row = {
            "tokens": tokens,
            "targets": torch.arange(length) >= length // 2,
            "segments": torch.ones_like(tokens),
            "chats": torch.zeros_like(tokens),
        }
        batch = self.task.collate([row] * (self._group_size or 2))
        flops = measured_flops_per_token(
            model, lambda: self.task.losses(model, batch, num_targets=1).task_loss, tokens=batch["input_ids"].numel()
        )
        return ArmDescription(
            settings=adapter_settings(self._config.adapter),
            parameters_total=total,
            parameters_active=total,
            parameters_trainable=trained,
            flops_per_token=flops,
            flops_ratio=1.0,
        )

    def leaks(self) -> Leaks:
        """Whether information leaks from the future, or between chats of a window or a batch; probes a small model."""
        # Probed in float64, which packed weights do not have; what is stored in few bits leaks neither more nor less.
        model = stirred(self._built(0, load_few_layers)).eval()
        return find_leaks(model, self._leak)

    def _leak(self, model: Any) -> LeakReport:
        size = model.get_input_embeddings().num_embeddings
        rows = 2 * (self._group_size or 2)
        return probe_causal_lm(TwoInAWindow(model), vocab_size=size, batch=rows, length=8, num_probes=12)


@final
class TwoInAWindow(nn.Module):
    """A model as a leak probe calls it: ids (B, L) -> logits (B, L, V), where each window has two rows packed in it.

    A leak between the chats of a window then is one between examples of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model` is a causal language model."""
        super().__init__()
        self.model = model

    def forward(self, ids_BL: Tensor) -> Any:
        """The model's output, with logits by example."""
        rows, length = ids_BL.shape
        segments_W = torch.arange(1, 3).repeat_interleave(length)
        chats_W = torch.zeros_like(segments_W)
        items = [
            {"tokens": tokens_W, "targets": chats_W.bool(), "segments": segments_W, "chats": chats_W}
            for tokens_W in ids_BL.cpu().reshape(rows // 2, 2 * length)
        ]
        batch = {name: value.to(ids_BL.device) for name, value in collate_windows(items, pad=0).items()}
        outputs = self.model(**packed_inputs(self.model, batch), use_cache=False)
        outputs.logits = outputs.logits.reshape(rows, length, -1)
        return outputs


def _base_reference(recipe: ChatRecipe, data: ChatData, cache_dir: Any) -> BaseReference:
    """What the base makes of the test chats, kept beside the run's other prepared data."""
    base = recipe.base
    task = ChatTask(data, recipe.training, adapter=None, base=_base_facts(base))
    build: Callable[[], nn.Module] = lambda: load_base(  # noqa: E731
        str(base.name), num_layers=base.num_layers, quantize=base.quantize
    )[0]
    file = None if cache_dir is None else cache_dir / f"base-{data.digest}.json"
    return BaseReference(task.judge, build, file)


def _base_facts(base: BaseConfig) -> Facts:
    """What decides a base's weights; how they are stored only where that changes them."""
    facts: Facts = {"name": base.name, "num_layers": base.num_layers}
    return facts if base.quantize == "none" else facts | {"quantize": base.quantize}


def _sample(data: ChatData, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Some training chats, the same for every seed, from which adapters find out which experts to tune."""
    chosen = data.train.examples[:SAMPLE_SIZE]
    single = dataclasses.replace(data.train, examples=chosen, windows=[[place] for place in range(len(chosen))])
    for start in range(0, len(chosen), batch_size):
        items = [single.item(index) for index in range(start, min(start + batch_size, len(chosen)))]
        batch = collate_windows(items, pad=data.prompts.pad)
        yield {"input_ids": batch["input_ids"], "attention_mask": (batch["segments"] > 0).long()}


def _baseline_parameters(recipe: ChatRecipe, load: Callable[..., Any]) -> int | None:
    """Trained parameters of the baseline, to which arms without a rank are matched; None if it has no rank itself."""
    baseline = recipe.arms[recipe.baseline].adapter
    if baseline is None or baseline.rank is None:
        return None
    model, _ = load(str(recipe.base.name), num_layers=recipe.base.num_layers)
    with naming_adapter(recipe.baseline):
        return count_parameters(apply_adapter(model, baseline, seed=0))[1]


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
    if recipe.base.quantize != "none":
        whole, _ = load_base(str(recipe.base.name), num_layers=1, quantize=recipe.base.quantize)
        report(f"of the base with one layer: {quantized_weights(whole)}")
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
        reference = _base_reference(recipe, chats, cache_dir)
        self.arms: dict[str, Arm] = {name: _ChatArm(recipe, name, chats, reference) for name in recipe.arms}

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
