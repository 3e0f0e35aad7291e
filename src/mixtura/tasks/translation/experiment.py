"""Comparisons of translation models: from scratch with mixtures as feed-forward layers, or adapters on a base model.

All arms see the same sentence pairs in the same order, and are scored on the same test sentences by the same decoding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.pretrained import load_base
from mixtura.config import TranslationRecipe, UserError
from mixtura.config.requests import MOST_PAIR_TOKENS, Amounts, with_batches_for, with_experts_of
from mixtura.data.parallel import ParallelCorpus, load_parallel
from mixtura.data.prepare import load_tokenizer
from mixtura.results import ArmDescription
from mixtura.results.document import AcrossArms, PairedTest
from mixtura.tasks.translation import comet
from mixtura.tasks.translation.arms import make_arm
from mixtura.tasks.translation.batches import encode_pairs
from mixtura.tasks.translation.chrf import paired_bootstrap
from mixtura.tasks.translation.encoder_decoder import AnyPrompts, prompts_for
from mixtura.tasks.translation.prompts import (
    Prompts,
    add_prompt_tokens,
    train_translation_tokenizer,
)
from mixtura.tasks.translation.task import OUTPUTS_FILE, TranslationData, read_outputs
from mixtura.tasks.translation.teacher import with_teacher
from mixtura.training.interface import Arm, Experiment


def make_translation(
    recipe: TranslationRecipe,
    *,
    cache_dir: Path | None,
    on_progress: Callable[[str], None] | None = None,
) -> "TranslationExperiment":
    """Reads the sentence pairs of a recipe, and makes its arms.

    Args:
        recipe: the comparison.
        cache_dir: where a trained tokenizer is kept; None keeps none.
        on_progress: called with a phrase when a slow part begins, such as "reading".

    Raises:
        UserError: the data, the base model or an arm's settings cannot be used.
    """
    report = on_progress or (lambda _: None)
    if recipe.evaluation.comet is not None:
        comet.check_comet(recipe.evaluation.comet)
    report("reading")
    corpus = load_parallel(recipe.data)
    recipe = dataclasses.replace(recipe, data=corpus.config)
    if recipe.data.teacher is not None:
        corpus = with_teacher(
            corpus, recipe.data.teacher, num_beams=recipe.num_beams, cache_dir=cache_dir, on_progress=report
        )
    prompts = _prompts(recipe, corpus, cache_dir, report)
    report("encoding")
    encoded = _encode(recipe, corpus, prompts)
    return TranslationExperiment(_fitted(recipe, encoded), encoded)


def _fitted(recipe: TranslationRecipe, encoded: TranslationData) -> TranslationRecipe:
    """The recipe with a length, batches and experts that fit the sentence pairs."""
    amounts = Amounts(*(len(split.sentences) for split in (encoded.train, encoded.validation, encoded.test)))
    data = dataclasses.replace(recipe.data, max_length=encoded.max_length)
    recipe = with_experts_of(dataclasses.replace(recipe, data=data), encoded.directions)
    return with_batches_for(recipe, amounts)


@final
class TranslationExperiment(Experiment):
    """Everything a comparison of translation models runs."""

    recipe: TranslationRecipe

    def __init__(self, recipe: TranslationRecipe, translation: TranslationData) -> None:
        """Makes the recipe's arms for encoded data."""
        self.recipe, self.translation = recipe, translation
        self.data = translation.facts
        self.data_digest = translation.digest
        self.arms: dict[str, Arm] = {name: make_arm(recipe, name, translation) for name in recipe.arms}

    def held_equal(self, described: Mapping[str, ArmDescription]) -> list[str]:
        """Data and its order, steps, decoding, and what every arm costs or trains, with the largest difference."""
        training = self.recipe.training
        rows = training.steps * training.batch_size * training.gradient_accumulation_steps
        tokens = rows * float(self.translation.train.length_N.mean())
        phrases = [
            f"{rows:,} sentence pairs ({tokens:,.0f} tokens) in the same order",
            "the same prompt, tokenizer, test sentences and decoding",
        ]
        if self.recipe.base.name is None:
            spread = max(abs(arm.flops_ratio - 1) for arm in described.values())
            return [*phrases, f"FLOPs a token, routing and mixing counted (within {100 * spread:.1f} %)"]
        trained = sorted({arm.parameters_trainable for arm in described.values()})
        sizes = f"{trained[0]:,}" if len(trained) == 1 else f"from {trained[0]:,} to {trained[-1]:,}"
        return [*phrases, f"the base model {self.recipe.base.name}; trained parameters: {sizes}"]

    def across_arms(self, out: Path) -> AcrossArms:
        """Paired bootstrap of every arm against the baseline in chrF, and in COMET where asked, for each direction.

        The difference is the mean over seeds. The p-value is the largest over seeds, so that a difference counts as
        sure only where every seed shows it.
        """
        found: dict[str, dict[str, PairedTest]] = {}
        by_comet: dict[str, dict[str, PairedTest]] = {}
        for name in self.arms:
            # A run that diverged has translated nothing.
            seeds = [seed for seed in self.recipe.seeds if self._translated(out, self.recipe.baseline, name, seed=seed)]
            if name != self.recipe.baseline and seeds:
                found[name] = _over_seeds([self._bootstrap(out, name, seed) for seed in seeds])
                if self.recipe.evaluation.comet is not None:
                    by_comet[name] = _over_seeds([self._bootstrap_comet(out, name, seed) for seed in seeds])
        return AcrossArms(found, by_comet)

    def _translated(self, out: Path, *arms: str, seed: int) -> bool:
        return all((out / "arms" / arm / f"seed{seed}" / OUTPUTS_FILE).exists() for arm in arms)

    def _bootstrap(self, out: Path, name: str, seed: int) -> dict[str, PairedTest]:
        arms = (self.recipe.baseline, name)
        before, after = (read_outputs(out / "arms" / arm / f"seed{seed}" / OUTPUTS_FILE) for arm in arms)
        result = {}
        for direction in dict.fromkeys(record.pair for record in before):
            pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.pair == direction]
            result[direction] = paired_bootstrap(
                [b.output for b, _ in pairs], [a.output for _, a in pairs], [b.reference for b, _ in pairs]
            )
        return result

    def _bootstrap_comet(self, out: Path, name: str, seed: int) -> dict[str, PairedTest]:
        paths = [out / "arms" / arm / f"seed{seed}" / OUTPUTS_FILE for arm in (self.recipe.baseline, name)]
        directions = [record.pair for record in read_outputs(paths[0])]
        before, after = map(comet.read_scores, paths)
        rows = [row for row in zip(directions, before, after, strict=True) if None not in row]
        return {
            direction: comet.paired_bootstrap(*zip(*(row[1:] for row in rows if row[0] == direction), strict=True))
            for direction in dict.fromkeys(row[0] for row in rows)
        }


def _over_seeds(tests: Sequence[Mapping[str, PairedTest]]) -> dict[str, PairedTest]:
    """For each direction the mean difference, and the largest p-value; 1 where seeds differ in who is ahead.

    The p-values are two-sided: two seeds, each sure of another winner, would both have small ones.
    """
    found = {}
    for direction in tests[0]:
        differences = [test[direction].difference for test in tests]
        agree = min(differences) > 0 or max(differences) < 0
        p_value = max(test[direction].p_value for test in tests) if agree else 1.0
        found[direction] = PairedTest(difference=sum(differences) / len(differences), p_value=p_value)
    return found


def _prompts(
    recipe: TranslationRecipe, corpus: ParallelCorpus, cache_dir: Path | None, report: Callable[[str], None]
) -> AnyPrompts:
    """The base model's tokenizer and words, or our own tokens."""
    data = recipe.data
    if recipe.base.name is not None:
        model, tokenizer = load_base(recipe.base.name, num_layers=1)
        if not model.config.is_encoder_decoder:
            return Prompts("instruction", tokenizer)
        prompts = prompts_for(tokenizer, model.config)
        prompts.languages.check(data.pairs)
        return prompts
    languages = sorted({pair.target_language for pair in corpus.train})
    if data.tokenizer == "train":
        report("training tokenizer")
        texts = [text for pair in corpus.train for text in (pair.source, pair.target)]
        return Prompts(
            "tokens",
            train_translation_tokenizer(texts, languages, vocab_size=data.vocab_size, cache_dir=cache_dir),
        )
    tokenizer = load_tokenizer(data.tokenizer)
    add_prompt_tokens(tokenizer, languages)
    return Prompts("tokens", tokenizer)


def _encode(recipe: TranslationRecipe, corpus: ParallelCorpus, prompts: AnyPrompts) -> TranslationData:
    sides = (corpus.train, corpus.validation, corpus.test)
    longest = _longest(recipe)
    max_length = min(recipe.data.max_length or longest, longest)
    if recipe.data.max_length is None:
        found = [encode_pairs(pairs, prompts, max_length=longest).length_N.max(initial=0) for pairs in sides]
        max_length = min(longest, -(-int(max(found)) // 8) * 8)
    splits = {
        name: encode_pairs(pairs, prompts, max_length=max_length)
        for name, pairs in zip(("train", "validation", "test"), sides, strict=True)
    }
    for name, split in splits.items():
        if not split.sentences:
            advice = "raise 'data.max_length', or hold out more source sentences"
            if recipe.base.name is not None and longest != recipe.data.max_length:
                advice = "give shorter sentences, or a base model with more positions"
            raise UserError(
                f"No sentence pair is left for {name} ({split.too_long} have more than {max_length or longest} "
                f"tokens): {advice}."
            )
    train = splits["train"]
    facts = {
        "description": corpus.description,
        "pairs": corpus.counts,
        "rows_skipped": corpus.skipped,
        "tokens_train": len(train.tokens_T),
        "targets_train": train.num_targets,
        "vocab_size": max(prompts.tokenizer.get_vocab().values()) + 1,
        "prompt": prompts.kind,
        **{f"sentences_{name}": len(split.sentences) for name, split in splits.items()},
        **{f"too_long_{name}": split.too_long for name, split in splits.items()},
    }
    # In the recipe's order, as far as there are pairs.
    known = {pair.pair for split in splits.values() for pair in split.sentences}
    named = recipe.data.pairs
    directions = tuple([name for name in named if name in known] + sorted(known - set(named)))
    return TranslationData(prompts=prompts, directions=directions, max_length=max_length, facts=facts, **splits)


def _longest(recipe: TranslationRecipe) -> int:
    """The most tokens that a prompt and its translation may have: at most the positions of the base model."""
    given = recipe.data.max_length or MOST_PAIR_TOKENS
    if recipe.base.name is None:
        return given
    config: Any = load_base(recipe.base.name, num_layers=1)[0].config
    return min(given, getattr(config, "max_position_embeddings", None) or given)
