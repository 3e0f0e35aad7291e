"""What a reader must know before believing the table: warnings drawn from the results, the gravest first.

Level "serious" means that a number does not mean what its name says; "warning", that the comparison may be unfair or
its winner dear; "note", a property of an arm worth knowing.
"""

import math
from typing import Literal, get_args

from mixtura.config.requests import is_far_share
from mixtura.planning.formulas import FLOPS_TOLERANCE
from mixtura.report.significance import paired_difference, smallest_visible
from mixtura.report.verdict import difference_words, judge_difference
from mixtura.report.wording import (
    NBSP,
    TIMES,
    Yardstick,
    capital,
    count,
    digits_for,
    listing,
    number,
    percent,
    rate,
    start,
    times,
    yardstick_of,
)
from mixtura.results import ArmResult, ArmSummary, Measure, Results
from mixtura.results.conclusions import Caution
from mixtura.results.run import TranslationDetails

SLOW_STEP = 1.25
"""Seconds a step over the baseline's, from which a reader is warned."""
TIMING_TOLERANCE = 0.1
"""How far two ways of comparing seconds a step may differ before the timing is called noisy."""
DROPPED_TOLERANCE = 0.01
MANY_EPOCHS = 4.0
"""Text repeated more often than this is worth clearly less than new text (Muennighoff et al., 2023)."""
MOST_OF_TEXT = 0.9
"""A run that reads a smaller part of the examples to fine-tune on leaves some of somebody's data unused."""
MOST_UNKNOWN, MOST_CUT = 5.0, 50.0
MOST_LABELS = 5
"""Labels that a caution names."""

Level = Literal["serious", "warning", "note"]
_LEVELS: tuple[Level, ...] = get_args(Level)


def find_cautions(results: Results, arms: dict[str, ArmSummary]) -> list[Caution]:
    """All warnings of a comparison.

    Args:
        results: see docs/report.md.
        arms: the summary's arms, which hold names and what excludes an arm.
    """
    yardstick = yardstick_of(results)
    found = [*_about_seeds(results, arms), *_about_data(results), *_about_search(results, arms, yardstick)]
    found += [*_about_resolution(results, arms, yardstick.measure), *_about_copying(results, arms)]
    found += [*_about_held_out(results), *_about_classes(results), *_about_guessing(results, arms, yardstick.measure)]
    found += about_controls(results, arms, yardstick.measure)
    for name, arm in results.arms.items():
        label = arms[name].label
        found += _about_validity(name, arm, label, arms[name], yardstick)
        found += _about_leaks(name, arm, label, yardstick)
        found += _about_cost(name, arm, label, arms[results.baseline].label, yardstick)
        found += _about_noise(name, arm, label, results.arms[results.baseline])
        found += _about_rate(name, arm, label)
        if (arms[name].averages.dropped_share or 0) > DROPPED_TOLERANCE:
            text = f"{start(label)} drops {percent(arms[name].averages.dropped_share)} of its routed rows."
            found.append(_caution("note", "dropped", name, text))
    # Unequal FLOPs come first among their like: every other number rests on them.
    return sorted(found, key=lambda caution: (_LEVELS.index(caution.level), caution.kind != "flops"))


def _caution(level: Level, kind: str, arm: str | None, text: str) -> Caution:
    return Caution(level, kind, arm, text)


def _about_seeds(results: Results, arms: dict[str, ArmSummary]) -> list[Caution]:
    fewest = min(len(arm.runs) for arm in results.arms.values())
    if fewest < 2:
        text = "One seed: there is no interval and no verdict. Add seeds to the recipe to get both."
        return [_caution("warning", "one_seed", None, text)]
    if fewest < 3:
        text = "Two seeds: an interval from two differences is very wide, so only large effects can show."
        return [_caution("note", "few_seeds", None, text)]
    if len({tuple(arm.seeds) for arm in arms.values()}) > 1:
        text = "Not every arm ran every seed: differences use the seeds that both sides share."
        return [_caution("warning", "missing_seeds", None, text)]
    return []


def _about_resolution(results: Results, arms: dict[str, ArmSummary], measure: Measure) -> list[Caution]:
    """How small a difference to the baseline these seeds could have decided."""
    seen = []
    for arm in arms.values():
        found = arm.difference.deployed
        least = None if found is None else smallest_visible(found)
        if found is not None and least:
            digits = digits_for(least, least=measure.digits)
            seen.append((arm.label, number(least, digits)))
    if not seen:
        return []
    unit = "" if not measure.unit else f" {'points' if measure.unit == '%' else measure.unit}"
    named = listing([f"{amount}{unit if place == 0 else ''} for {label}" for place, (label, amount) in enumerate(seen)])
    text = (
        f"The smallest difference to {arms[results.baseline].label} that these seeds would have decided in four cases "
        f"of five is {named}: more seeds or longer runs see smaller ones."
    )
    return [_caution("note", "resolution", None, text)]


def _about_copying(results: Results, arms: dict[str, ArmSummary]) -> list[Caution]:
    """Translation: arms that the source itself, left as it is, outscores."""
    behind, copied = [], 0.0
    for name, arm in results.arms.items():
        scores = [
            pair
            for run in arm.runs
            for pair in (run.details.pairs if isinstance(run.details, TranslationDetails) else {}).values()
        ]
        if not scores:
            continue
        copied = sum(pair.copy_chrf for pair in scores) / len(scores)
        if sum(pair.chrf for pair in scores) / len(scores) <= copied:
            behind.append(arms[name].label)
    if not behind:
        return []
    text = (
        f"Copying the source scores {number(copied, 1)} chrF, no less than {listing(behind)}: with so little training "
        "these are no translators yet, and a difference says who learns faster, not who translates."
    )
    return [_caution("warning", "below_copying", None, text)]


def _about_classes(results: Results) -> list[Caution]:
    """Classification: texts that the base cannot read or not whole, and classes that training or the test lacks."""
    found = []
    unknown = results.data.facts.get("unknown_percent")
    if isinstance(unknown, float) and unknown > MOST_UNKNOWN:
        text = f"The base model's tokenizer does not know {number(unknown, 0)} % of these texts: name another base."
        found.append(_caution("warning", "unknown_tokens", None, text))
    cut = results.data.facts.get("truncated_percent")
    if isinstance(cut, float) and cut > MOST_CUT:
        text = f"Of {number(cut, 0)} % of the texts only the start is read: raise 'data.max_length' if the base can."
        found.append(_caution("warning", "cut_texts", None, text))
    if untested := results.data.facts.get("labels_untested"):
        text = f"No test text has the label {_labels(untested)}: the scores say nothing of how well it is recognised."
        found.append(_caution("warning", "untested_class", None, text))
    if unlearnt := results.data.facts.get("labels_unlearnt"):
        text = f"No training text has the label {_labels(unlearnt)}: its texts were left out of the test as well."
        found.append(_caution("warning", "unlearnt_class", None, text))
    return found


def _about_guessing(results: Results, arms: dict[str, ArmSummary], measure: Measure) -> list[Caution]:
    """Classification: arms that one answer for every text outscores."""
    blind = results.data.facts.get(f"majority_{measure.key}")
    scores = [(arm.label, arm.score.deployed) for arm in arms.values()]
    behind = [label for label, score in scores if score is not None and isinstance(blind, float) and score <= blind]
    if not isinstance(blind, float) or not behind:
        return []
    text = (
        f"One answer for every text, that of the most frequent label, scores {number(blind, 1)} {measure.unit} "
        f"{measure.name}, no less than {listing(behind)}: as deployed, that tells no labels apart."
    )
    return [_caution("warning", "below_majority", None, text)]


def _labels(labels: object) -> str:
    assert isinstance(labels, list)
    shown = [f"'{label}'" for label in labels[:MOST_LABELS]]
    return f"{', '.join(shown)} or {len(labels) - len(shown)} more" if len(labels) > len(shown) else " or ".join(shown)


def _about_held_out(results: Results) -> list[Caution]:
    """Pretraining: a held-out side far from the share that was asked for."""
    table, facts = results.recipe.get("data"), results.data.facts
    asked = table.get("validation_fraction") if isinstance(table, dict) else None
    train, held_out = facts.get("bytes_train"), facts.get("bytes_validation")
    if not (isinstance(asked, float) and isinstance(train, int) and isinstance(held_out, int)):
        return []
    share = held_out / (train + held_out)
    if not is_far_share(share, asked):
        return []
    text = (
        f"{percent(share)} of the text is held out, not about {percent(asked)} as 'data.validation_fraction' asks: "
        "whole documents are held out, so give more of them, of more even sizes."
    )
    return [_caution("warning", "held_out_share", None, text)]


def _about_data(results: Results) -> list[Caution]:
    epochs = results.data.epochs or 0.0
    if 0 < epochs < MOST_OF_TEXT and results.task != "pretraining":
        steps = max(run.steps for arm in results.arms.values() for run in arm.runs)
        text = (
            f"A run reads {percent(epochs)} of the training examples: 'training.steps' of about "
            f"{math.ceil(steps / epochs):,} reads each once."
        )
        return [_caution("note", "unread", None, text)]
    if epochs <= MANY_EPOCHS:
        return []
    text = f"The training text is read {number(epochs, 1)} times: arms with more parameters may only remember more."
    return [_caution("warning", "epochs", None, text)]


def _about_search(results: Results, arms: dict[str, ArmSummary], yardstick: Yardstick) -> list[Caution]:
    missing = [arms[name].label for name, arm in results.arms.items() if arm.searched is None]
    if not missing:
        return []
    whose = "any arm" if len(missing) == len(arms) else listing(missing)
    what = "family" if yardstick.task == "pretraining" else "arm"
    text = (
        f"The learning rate was not searched for {whose}: a rate that suits one {what} can cost another more than "
        "the differences shown here. --set 'search.rate_multiples=[0.5, 1, 2]' tries three around each arm's own."
    )
    return [_caution("warning", "not_searched", None, text)]


def _about_validity(name: str, arm: ArmResult, label: str, judged: ArmSummary, yardstick: Yardstick) -> list[Caution]:
    found = []
    if arm.deployed_mode is None:
        text = (
            f"{start(label)} cannot be deployed: it needs other examples' tokens to compute a token's output. Its "
            f"{yardstick.short} as trained is listed, but it takes no part in the verdict."
        )
        found.append(_caution("serious", "not_deployable", name, text))
    if arm.leaks.future and yardstick.causal:
        text = (
            f"{start(label)} sees the future: a token's output depends on later tokens, so its loss is not a language "
            "model's loss, and it takes no part in the verdict."
        )
        found.append(_caution("serious", "leaks_future", name, text))
    if judged.diverged:
        text = (
            f"{start(label)} diverged in {judged.diverged} of {count(len(arm.runs), 'run')}: its mean would hide that, "
            "so it takes no part in the verdict."
        )
        found.append(_caution("serious", "diverged", name, text))
    return found


def _about_leaks(name: str, arm: ArmResult, label: str, yardstick: Yardstick) -> list[Caution]:
    if arm.leaks.batch_deployed:
        text = (
            f"{start(label)} leaks the batch even as deployed: the same text gets another loss beside other examples."
        )
        return [_caution("serious", "leaks_batch_deployed", name, text)]
    if arm.leaks.batch and arm.training_mode == arm.deployed_mode:
        text = (
            f"{start(label)} leaks the batch while it trains in groups: a token's output depends on other examples. "
            "The finished model has no groups, and its numbers are measured without."
        )
        return [_caution("note", "leaks_batch", name, text)]
    if arm.leaks.batch:
        text = (
            f"{start(label)} leaks the batch while it trains: a token's output depends on other examples. Its "
            f"{yardstick.short} in training mode ({arm.training_mode}) is measured with such neighbours and is never "
            "the headline."
        )
        return [_caution("note", "leaks_batch", name, text)]
    return []


def _about_cost(name: str, arm: ArmResult, label: str, baseline: str, yardstick: Yardstick) -> list[Caution]:
    found = []
    if (arm.seconds_ratio or 1.0) > SLOW_STEP:
        text = (
            f"A step of {label} takes {times(arm.seconds_ratio)} as long as one of {baseline} on this hardware: "
            "equal tokens and FLOPs are not equal time."
        )
        found.append(_caution("warning", "slow_step", name, text))
    if abs(arm.flops_ratio - 1) > FLOPS_TOLERANCE and arm.settings.get("control") != "shared_width":
        text = (
            f"{start(label)} uses {number(arm.flops_ratio, 3)}{TIMES} the FLOPs a token of {baseline}: not held equal."
        )
        # Arms of pretraining are to be matched in FLOPs; those of fine-tuning differ in what they train.
        found.append(_caution("warning" if yardstick.task == "pretraining" else "note", "flops", name, text))
    return found


def _about_noise(name: str, arm: ArmResult, label: str, base: ArmResult) -> list[Caution]:
    """Medians of the steps and the median of the paired ratios agree on a quiet machine."""
    if not (arm.seconds_per_step and base.seconds_per_step and arm.seconds_ratio):
        return []
    of_medians = arm.seconds_per_step / base.seconds_per_step
    if abs(of_medians / arm.seconds_ratio - 1) <= TIMING_TOLERANCE:
        return []
    text = (
        f"The time a step of {label} was measured on a busy machine: {times(arm.seconds_ratio)} the baseline's by "
        f"paired steps, {times(of_medians)} by medians. Do not trust its times before they are measured again."
    )
    return [_caution("warning", "noisy_timing", name, text)]


def _about_rate(name: str, arm: ArmResult, label: str) -> list[Caution]:
    search, found = arm.searched, []
    if search is None:
        return []
    if search.at_edge:
        rates = [trial.learning_rate for trial in search.trials]
        scales = [trial.scale for trial in search.trials if trial.scale is not None]
        what, best, tried = "learning rate", search.best, rates
        if search.best_scale is not None and (len(set(rates)) == 1 or min(rates) < search.best < max(rates)):
            what, best, tried = "initialisation scale", search.best_scale, scales
        end = "highest" if best >= max(tried) else "lowest"
        text = (
            f"{start(label)}'s best {what}, {rate(best)}, is the {end} of those tried: a better one may lie beyond, "
            f"so {label} may be shown worse than it is."
        )
        found.append(_caution("warning", "rate_at_edge", name, text))
    if arm.learning_rate != search.best:
        text = f"{start(label)} ran at {rate(arm.learning_rate)}, not at the searched best rate, {rate(search.best)}."
        found.append(_caution("warning", "rate_not_best", name, text))
    if search.steps and search.steps < arm.runs[0].steps:
        text = (
            f"{start(label)}'s learning rate was searched with {search.steps}{NBSP}steps, fewer than the run's "
            f"{arm.runs[0].steps}: the best rate of a longer run is often lower."
        )
        found.append(_caution("note", "short_search", name, text))
    return found


_WITHOUT = {
    "uniform_router": "the same with uniform routers",
    "random_routing": "the same with random, fixed routers",
    "shared_width": "dense layers as wide as its shared experts",
}


def about_controls(results: Results, arms: dict[str, ArmSummary], measure: Measure) -> list[Caution]:
    """A line for each control whose arm is there: a note where the arm beats it, a warning where that is not shown.

    Args:
        results: whose recipe says which arms are controls, and of which.
        arms: the summary's arms.
        measure: of the verdict.
    """
    tables = results.recipe.get("arms")
    found = []
    for name, table in tables.items() if isinstance(tables, dict) else ():
        of = table.get("control_of") if isinstance(table, dict) else None
        if name not in arms or of not in arms or arms[name].excluded or arms[of].excluded:
            continue
        difference = paired_difference(_deployed(arms[of], measure), _deployed(arms[name], measure))
        beats = judge_difference(difference, better=measure.better) == "beats"
        text = (
            f"{arms[of].label} minus its control {arms[name].label} ({_WITHOUT[table['control']]}): "
            f"{difference_words(difference, digits=measure.digits)}."
        )
        if not beats:
            text += f" So a gain of {arms[of].label} is not shown to come from that."
        found.append(Caution("note" if beats else "warning", "control", of, capital(text)))
    return found


def _deployed(arm: ArmSummary, measure: Measure) -> dict[int, float]:
    """The verdict's measure by seed, as deployed."""
    scores = arm.modes[str(arm.deployed_mode)][measure.key].values
    return {seed: value for seed, value in zip(arm.seeds, scores, strict=True) if value is not None}
