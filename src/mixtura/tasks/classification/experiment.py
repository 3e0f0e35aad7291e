"""Comparing text classifiers: which head, and how much of the pretrained model is tuned.

All arms share the texts, their order, the pretrained model and the classifier's first weights. Arms on a frozen model
read its pooled hidden states, computed once (`features.py`).
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.targets import count_parameters
from mixtura.config import ClassificationRecipe, HeadConfig, UserError
from mixtura.config.requests import MOST_TEXT_TOKENS, Amounts, common_length, with_batches_for
from mixtura.data.labelled import LabelledCorpus, LabelledText, load_labelled
from mixtura.files import write_json
from mixtura.results import ArmDescription, Facts
from mixtura.results.document import RESULT, AcrossArms, BudgetScore, budget_folder, read_run
from mixtura.tasks.classification.arms import ClassificationArm, Pretrained
from mixtura.tasks.classification.best_layer import BestLayer, choose_layer
from mixtura.tasks.classification.classifier import SavedClassifier, load_encoder
from mixtura.tasks.classification.features import (
    Examples,
    FeatureExamples,
    TokenExamples,
    encode_texts,
    few_of_each_class,
    hidden_states,
    pooled_features,
    weights_digest,
)
from mixtura.tasks.classification.heads import blends_tokens
from mixtura.tasks.classification.objectives import Lines, Objective, OneClass, SeveralLabels
from mixtura.tasks.classification.setfit import check_setfit, setfit_answers
from mixtura.tasks.classification.task import PREDICTIONS, Splits
from mixtura.tasks.tuning import naming_adapter
from mixtura.training.interface import Arm, Experiment

_PARTS = ("train", "validation", "test")


class ClassificationExperiment(Experiment):
    """A comparison of classifiers on one corpus and one pretrained model."""

    recipe: ClassificationRecipe

    def __init__(self, made: "_Prepared", arms: dict[str, Arm], data: Facts) -> None:
        """Puts together what `make_classification` prepared."""
        self.recipe, self.arms, self.data, self.data_digest = made.recipe, arms, data, made.digest
        self.objective, self.corpus, self.pretrained = made.objective, made.corpus, made.pretrained

    def held_equal(self, described: Mapping[str, ArmDescription]) -> list[str]:
        """What all classifiers share."""
        recipe = self.recipe
        phrases = [
            f"the pretrained model {recipe.base.name}",
            "the training texts, their order and their length of at most "
            f"{recipe.data.max_length} tokens ({self.data['truncated_percent']:.1f} % are cut)",
            "the first weights of the linear classifier",
            "optimizer, schedule and number of steps",
        ]
        if len({of.parameters_trainable for of in described.values()}) == 1:
            phrases.append("the number of trained parameters")
        normalizations = {arm.head.normalization for arm in recipe.arms.values()}
        if len(normalizations) == 1:
            phrases.append(f"how hidden states are normalised ({normalizations.pop()})")
        return phrases

    def across_arms(self, out: Path) -> AcrossArms:
        """Paired bootstrap over the test texts, each arm against the baseline, over the seeds that both have."""
        baseline = _answers(out / "arms" / self.recipe.baseline)
        compared = {}
        for name in self.arms:
            arm = {} if name == self.recipe.baseline else _answers(out / "arms" / name)
            seeds = sorted(arm.keys() & baseline.keys())
            if seeds:
                compared[name] = self.objective.compare(*([side[seed] for seed in seeds] for side in (arm, baseline)))
        return AcrossArms(compared, budgets=self._few_shot(out), references=self._references(out))

    def _few_shot(self, out: Path) -> dict[str, list[BudgetScore]]:
        """What the finished runs on few texts reached, as deployed."""
        found: dict[str, list[BudgetScore]] = {}
        for rows, name, seed in itertools.product(sorted(self.recipe.data.budgets), self.arms, self.recipe.seeds):
            run = read_run(out / budget_folder(rows, name, seed) / RESULT)
            score = None if run is None else run.final["alone"].get(self.objective.measure.key)
            if score is not None:
                found.setdefault(name, []).append(BudgetScore(rows, seed, score))
        return found

    def _references(self, out: Path) -> dict[str, list[BudgetScore]]:
        """SetFit on the same few texts, trained once and kept in the comparison's folder."""
        if not self.recipe.setfit:
            return {}
        found = []
        for rows, seed in itertools.product(sorted(self.recipe.data.budgets), self.recipe.seeds):
            file = out / "references" / "setfit" / str(rows) / f"seed{seed}.json"
            if not file.is_file():
                write_json(file, {self.objective.measure.key: self._setfit(rows, seed)})
            score = json.loads(file.read_text(encoding="utf-8"))[self.objective.measure.key]
            found.append(BudgetScore(rows, seed, score))
        return {"SetFit": found}

    def _setfit(self, rows: int, seed: int) -> float:
        """What it reaches on the test texts, in the verdict's measure."""
        train, test = (
            self.objective.labels(of, len(self.corpus.labels)) for of in (self.corpus.train, self.corpus.test)
        )
        few = few_of_each_class(train, rows, seed=seed)
        answered = setfit_answers(
            self.pretrained.model,
            self.pretrained.tokenizer,
            [self.corpus.train[row].text for row in few],
            train[few],
            [of.text for of in self.corpus.test],
            max_length=self.recipe.data.max_length or MOST_TEXT_TOKENS,
            seed=seed,
        )
        return self.objective.quality(answered, test)


def make_classification(
    recipe: ClassificationRecipe, *, cache_dir: Path | None, on_progress: Callable[[str], None]
) -> ClassificationExperiment:
    """Loads the pretrained model and the texts, and prepares every arm of a recipe.

    Args:
        recipe: the comparison.
        cache_dir: where the pooled features of frozen arms are kept; None keeps them in memory alone.
        on_progress: called with a phrase when a slow part begins.

    Raises:
        UserError: model, texts or an arm cannot be used.
    """
    _check(recipe)
    on_progress("reading")
    corpus = load_labelled(recipe.data)
    on_progress("loading the pretrained model")
    pretrained = _load_pretrained(recipe)
    on_progress("encoding")
    texts = [example.text for part in _PARTS for example in getattr(corpus, part)]
    recipe = _fitted(recipe, corpus, pretrained, texts)
    length = recipe.data.max_length or MOST_TEXT_TOKENS
    objective = SeveralLabels() if corpus.several else OneClass()
    examples = [example for part in _PARTS for example in getattr(corpus, part)]
    labels = objective.labels(examples, len(corpus.labels))
    tokens = encode_texts(texts, labels, pretrained.tokenizer, max_length=length)
    data, digest = _facts(corpus, tokens, pretrained.tokenizer), _digest(corpus)
    _check_budgets(recipe, corpus)
    made = _Prepared(
        recipe,
        corpus,
        pretrained,
        tokens,
        digest,
        length,
        _adapter_parameters(recipe, pretrained),
        objective,
        functools.cache(functools.partial(_examples, pretrained, tokens, cache_dir, on_progress)),
    )
    arms: dict[str, Arm] = {name: made.arm(name) for name in recipe.arms}
    return ClassificationExperiment(made, arms, data)


@dataclass(frozen=True)
class _Prepared:
    """What all arms are made of."""

    recipe: ClassificationRecipe
    corpus: LabelledCorpus
    pretrained: Pretrained
    tokens: TokenExamples
    digest: str
    length: int
    baseline_parameters: int | None
    objective: Objective
    examples: Callable[[HeadConfig | None], Examples]
    """All texts as tokens, or as features of the kind that a head asks for."""

    def arm(self, name: str, rows: int | None = None, seed: int = 0) -> ClassificationArm:
        """An arm on all training texts, or on so many of each class as the seed draws."""
        config = self.recipe.arms[name]
        features = config.tune == "frozen" and not blends_tokens(config.head)
        # Features depend on these two keys only, so arms that agree in them share one array.
        pooled = HeadConfig(pooling=config.head.pooling, normalization=config.head.normalization)
        best = self._best_layer(pooled, rows, seed) if config.head.kind == "best_layer" else None
        layer = -1 if best is None else best.layer
        return ClassificationArm(
            name,
            config,
            self.recipe,
            pretrained=self.pretrained,
            splits=self._split(pooled if features else None, rows, seed).with_layer(
                None if config.head.kind == "layer_mix" else layer
            ),
            saved=SavedClassifier(
                base=self.recipe.base.name or "",
                num_layers=self.recipe.base.num_layers,
                base_digest=self.pretrained.digest,
                tune=config.tune,
                head=config.head,
                adapter=config.adapter,
                baseline_parameters=self.baseline_parameters,
                num_states=self.pretrained.num_states,
                hidden_size=self.pretrained.hidden_size,
                labels=tuple(self.corpus.labels),
                max_length=self.length,
                tokenizer=self.pretrained.tokenizer,
                layer=layer,
                several=self.corpus.several,
                quantize=self.recipe.base.quantize,
            ),
            data_digest=self.digest if rows is None else f"{self.digest}-{rows}-{seed}",
            best_layer=best,
            at_budget=functools.partial(self.arm, name),
        )

    def _best_layer(self, pooled: HeadConfig, rows: int | None, seed: int) -> BestLayer:
        """The best hidden state for a head; attention is not trained yet, so layers are compared by their mean."""
        if pooled.pooling == "attention":
            pooled = dataclasses.replace(pooled, pooling="mean")
        splits = self._split(pooled, rows, seed)
        classes = len(self.corpus.labels)
        return choose_layer(splits.train, splits.validation, num_classes=classes, objective=self.objective)

    def _split(self, pooled: HeadConfig | None, rows: int | None, seed: int) -> Splits:
        whole, ends = self.examples(pooled), np.cumsum([0, *(len(getattr(self.corpus, part)) for part in _PARTS)])
        splits = Splits(*(whole.part(slice(start, end)) for start, end in itertools.pairwise(ends)))
        if rows is None:
            return splits
        return dataclasses.replace(
            splits, train=splits.train.chosen(few_of_each_class(splits.train.labels, rows, seed=seed))
        )


def _check_budgets(recipe: ClassificationRecipe, corpus: LabelledCorpus) -> None:
    most = max(Counter(label for example in corpus.train for label in example.labels).values())
    for rows in recipe.data.budgets:
        if rows >= most:
            raise UserError(
                f"'data.budgets' names {rows} rows of each class, but the largest class has {most:,} training texts: "
                "name smaller numbers."
            )


def _check(recipe: ClassificationRecipe) -> None:
    if recipe.setfit:
        check_setfit()
    if recipe.base.name is None:
        raise UserError("'base.name' is missing: name a model folder, a hub model, or 'minilm', which is a package.")
    for name, arm in recipe.arms.items():
        if (arm.tune == "adapter") != (arm.adapter is not None):
            fix = "add its 'adapter'" if arm.adapter is None else "set 'tune' to 'adapter', or remove its 'adapter'"
            raise UserError(f"Arm '{name}' has tune = '{arm.tune}': {fix}.")
        if arm.head.per_token and arm.head.kind != "layer_mix":
            raise UserError(f"Arm '{name}' has per_token but no layer mix: set its 'head.kind' to 'layer_mix'.")


def _load_pretrained(recipe: ClassificationRecipe) -> Pretrained:
    assert recipe.base.name is not None
    base = recipe.base
    model, tokenizer = load_encoder(recipe.base.name, num_layers=base.num_layers, quantize=base.quantize)
    one = torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        states = hidden_states(model, one, one)
    return Pretrained(model, tokenizer, weights_digest(model), len(states), states[-1].size(-1))


def _fitted(
    recipe: ClassificationRecipe, corpus: LabelledCorpus, pretrained: Pretrained, texts: list[str]
) -> ClassificationRecipe:
    """The recipe with lengths, batches and evaluations that the texts and the pretrained model can fill."""
    config: Any = pretrained.model.config
    tokenizer: Any = pretrained.tokenizer
    longest = getattr(config, "max_position_embeddings", None)
    length = corpus.config.max_length
    if length is None:
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        length = common_length([len(ids) for ids in encoded], most=MOST_TEXT_TOKENS)
    data = dataclasses.replace(corpus.config, max_length=min(length, longest or length))
    amounts = Amounts(*(len(getattr(corpus, part)) for part in _PARTS))
    return with_batches_for(dataclasses.replace(recipe, data=data), amounts)


def _examples(
    pretrained: Pretrained,
    tokens: TokenExamples,
    cache_dir: Path | None,
    on_progress: Callable[[str], None],
    head: HeadConfig | None,
) -> Examples:
    """All texts as tokens, or as features of the kind that a head asks for."""
    if head is None:
        return tokens
    features_NMD = pooled_features(pretrained.model, tokens, head, cache_dir=cache_dir, on_progress=on_progress)
    return FeatureExamples(features_NMD, tokens.labels, tokens.length_N)


def _adapter_parameters(recipe: ClassificationRecipe, pretrained: Pretrained) -> int | None:
    """Trained parameters of the baseline's adapter, to which adapters without a rank are matched."""
    adapter = recipe.arms[recipe.baseline].adapter
    if adapter is None or adapter.rank is None:
        return None
    with naming_adapter(recipe.baseline):
        return count_parameters(apply_adapter(copy.deepcopy(pretrained.model), adapter, seed=0))[1]


def _facts(corpus: LabelledCorpus, tokens: TokenExamples, tokenizer: Any) -> Facts:
    tested = {label for example in corpus.test for label in example.labels}
    untested = [name for label, name in enumerate(corpus.labels) if label not in tested]
    return {
        "description": corpus.description,
        "labels": list(corpus.labels),
        **({"labels_untested": untested} if untested else {}),
        **({"labels_unlearnt": list(corpus.unlearnt)} if corpus.unlearnt else {}),
        **{f"examples_{part}": len(getattr(corpus, part)) for part in _PARTS},
        "rows_skipped": corpus.skipped,
        "texts_truncated": tokens.truncated,
        "truncated_percent": 100 * tokens.truncated / len(tokens.labels),
        "tokens_per_example": float(tokens.length_N.mean()),
        "unknown_percent": _unknown_percent(tokens, tokenizer),
        **_blind(corpus),
    }


def _unknown_percent(tokens: TokenExamples, tokenizer: Any) -> float:
    """Tokens that stand for what the tokenizer does not know, such as the signs of a script that it never saw."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return 0.0  # tokenizers over bytes know everything, and name another token so
    return 100 * sum(int((ids == unknown).sum()) for ids in tokens.ids) / int(tokens.length_N.sum())


def _blind(corpus: LabelledCorpus) -> Facts:
    """What an answer that reads no text would score: the most frequent class, or always the same frequent labels."""
    common = Counter(label for example in corpus.train for label in example.labels).most_common()
    if not corpus.several:
        return {"majority_accuracy": 100 * sum(of.label == common[0][0] for of in corpus.test) / len(corpus.test)}

    def micro_f1(texts: list[LabelledText], number: int) -> float:
        given = {label for label, _ in common[:number]}
        answered = sum(len(given) + len(text.labels) for text in texts)
        return 200 * sum(len(given & set(text.labels)) for text in texts) / answered

    best = max(range(1, len(common) + 1), key=lambda number: micro_f1(corpus.train, number))
    return {"majority_micro_f1": micro_f1(corpus.test, best)}


def _digest(corpus: LabelledCorpus) -> str:
    digest, several = hashlib.blake2b(digest_size=16), corpus.several
    for part in _PARTS:
        rows: list[LabelledText] = getattr(corpus, part)
        digest.update(json.dumps([part, [[row.text, row.labels if several else row.label] for row in rows]]).encode())
    return digest.hexdigest()


def _answers(arm: Path) -> dict[str, Lines]:
    """The answers of each finished seed of an arm to all test texts."""
    files = sorted(arm.glob(f"seed*/{PREDICTIONS}"))
    return {
        path.parent.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files
    }
