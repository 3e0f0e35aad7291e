"""The summary of a comparison: every number and sentence that the report adds to what was measured.

`summarize` is a pure function of the results; its value is stored with them under "summary", so that nothing is shown
that is not in the file. docs/report.md documents each field.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from mixtura.planning.advice import advise_on
from mixtura.planning.evidence import load_evidence
from mixtura.planning.question import LEAST_TOKENS, LEAST_WIDTH, Question
from mixtura.report.cautions import find_cautions
from mixtura.report.scope import list_limits
from mixtura.report.significance import (
    MOT_ANCHOR,
    Curve,
    crossing,
    equal_cost_difference,
    paired_difference,
    speed_up,
)
from mixtura.report.verdict import judge, write_rule, write_verdict
from mixtura.report.wording import FAMILY_WORDS, NBSP, Yardstick, expected_words, yardstick_of
from mixtura.results import ArmResult, ArmSummary, Results, RunResult, Summary
from mixtura.results.conclusions import (
    Anchor,
    Averages,
    Budget,
    Crossing,
    Differences,
    EqualCostDifference,
    Exclusion,
    MeanScore,
    Scores,
    SpeedUp,
    Verdict,
)


def summarize(results: Results) -> Summary:
    """Computes the summary of a comparison's results, without NaN; a summary in the results is ignored."""
    baseline, yardstick = results.baseline, yardstick_of(results)
    labels = _labels(results.arms)
    unjudged = {name: _summarize_arm(results, name, labels[name], yardstick) for name in results.arms}
    budget = Budget(
        tokens=results.data.tokens_per_run,
        tokens_per_step=results.data.tokens_per_step,
        steps=max((run.steps for arm in results.arms.values() for run in arm.runs), default=0),
        seeds=min(len(arm.seeds) for arm in unjudged.values()),
        rates_settled=all(_rate_settled(arm) for arm in results.arms.values()),
    )
    judgement = judge(unjudged, baseline, yardstick.measure)
    arms = {name: dataclasses.replace(arm, outcome=judgement.outcomes[name]) for name, arm in unjudged.items()}
    return Summary(
        measure=yardstick.measure,
        rule=write_rule(yardstick.measure),
        budget=budget,
        verdict=_with_advice(write_verdict(arms, judgement, baseline, budget, yardstick), results, yardstick),
        cautions=find_cautions(results, arms),
        limits=list_limits(results, budget),
        arms=arms,
        pairs=judgement.pairs,
        anchor=_anchor(arms, yardstick),
    )


_LONGER = 10
"""How many times a comparison's own tokens the advice is asked about as well."""


def _with_advice(verdict: Verdict, results: Results, yardstick: Yardstick) -> Verdict:
    """The verdict with what the runs behind `mixtura advise` say of this budget and of a longer one."""
    model, tokens = results.recipe.get("model"), results.data.tokens_per_run
    if not (yardstick.from_scratch and isinstance(model, dict)) or tokens < LEAST_TOKENS:
        return verdict
    width, layers = model.get("hidden_size"), model.get("num_hidden_layers")
    if not (isinstance(width, int) and isinstance(layers, int)) or width < LEAST_WIDTH:
        return verdict
    families = {arm.family for arm in results.arms.values()}
    now, later = (advise_on(Question(tokens=n * tokens, width=width, layers=layers)) for n in (1, _LONGER))
    after = {arm.arm: arm.at_equal_flops for arm in later.arms}
    said = [
        f"{arm.label} {expected_words(arm.at_equal_flops)} after this budget, "
        f"{expected_words(after[arm.arm])} after {_LONGER} times as much"
        for arm in now.arms
        if arm.arm in families and arm.at_equal_flops
    ]
    if not said:
        return verdict
    sentence = (
        f"The runs behind mixtura{NBSP}advise, with other text and {load_evidence().setting.experts} experts, expect "
        f"these nats minus dense's, with 95{NBSP}% intervals: {'; '.join(said)}."
    )
    named = [arm.extrapolated for arm in later.arms if arm.arm in families and arm.extrapolated]
    reasons = [*later.extrapolated, *named]
    beyond = f" Extrapolated: {'; '.join(reasons)}." if reasons else ""
    return dataclasses.replace(verdict, longer=[*verdict.longer, sentence + beyond])


def _anchor(arms: dict[str, ArmSummary], yardstick: Yardstick) -> Anchor | None:
    """The published curve is one of pretraining from scratch."""
    mixes = any(arm.family == "mixture_of_tokens" for arm in arms.values())
    return MOT_ANCHOR if mixes and yardstick.from_scratch else None


def _rate_settled(arm: ArmResult) -> bool:
    """Whether the arm ran at a searched learning rate that is not at the edge of its search."""
    search = arm.searched
    return search is not None and not search.at_edge and search.best == arm.learning_rate


def _labels(arms: dict[str, ArmResult]) -> dict[str, str]:
    """What each arm is called; never two alike."""
    labels = {name: _label(name, arm) for name, arm in arms.items()}
    names = list(labels.values())
    return {name: label if names.count(label) == 1 else f"{label} ({name})" for name, label in labels.items()}


def _label(name: str, arm: ArmResult) -> str:
    """The family's words where the label is only the family's key; else what the user wrote, underscores and all."""
    if arm.label in (arm.family, arm.family.replace("_", " ")):
        return FAMILY_WORDS.get(arm.family, name)
    return name if arm.label == name.replace("_", " ") else arm.label


def _summarize_arm(results: Results, name: str, label: str, yardstick: Yardstick) -> ArmSummary:
    """The summary of one arm without its outcome, which the rule gives once all arms are known."""
    arm, key = results.arms[name], yardstick.measure.key
    deployed, trained = arm.deployed_mode, arm.training_mode
    modes = {mode: _mode(arm.runs, mode) for mode in dict.fromkeys(m for run in arm.runs for m in run.final)}
    beside = _compare(results, name, yardstick)
    return ArmSummary(
        label=label,
        family=arm.family,
        baseline=name == results.baseline,
        outcome="excluded",
        seeds=[run.seed for run in arm.runs],
        training_mode=trained,
        deployed_mode=deployed,
        diverged=_diverged(arm, yardstick),
        excluded=_excluded(arm, yardstick),
        modes=modes,
        score=Scores(_score(modes, deployed, key), _score(modes, trained, key)),
        mode_gap=None
        if deployed in (None, trained)
        else paired_difference(_by_seed(arm, deployed, key), _by_seed(arm, trained, key)),
        parameters_total=arm.parameters_total,
        parameters_trainable=arm.parameters_trainable,
        flops_ratio=arm.flops_ratio,
        seconds_ratio=arm.seconds_ratio,
        peak_memory_bytes=arm.peak_memory_bytes,
        averages=_averages(arm.runs),
        difference=beside.difference,
        speed_up=beside.speed_up,
        equal_time=beside.equal_time,
        equal_flops=beside.equal_flops,
        crossing=beside.crossing,
    )


def _diverged(arm: ArmResult, yardstick: Yardstick) -> int:
    """Runs that ended without a finite measure; what needs decoding is measured as deployed alone."""
    mode, key = (
        (arm.training_mode, yardstick.loss.key)
        if arm.deployed_mode is None
        else (arm.deployed_mode, yardstick.measure.key)
    )
    return sum(_final(run, mode, key) is None for run in arm.runs)


def _excluded(arm: ArmResult, yardstick: Yardstick) -> Exclusion | None:
    """Why the verdict leaves an arm out."""
    if arm.deployed_mode is None:
        return "not_deployable"
    if arm.leaks.future and yardstick.causal:
        return "leaks_future"
    return "diverged" if _diverged(arm, yardstick) else None


def _score(modes: dict[str, dict[str, MeanScore]], mode: str | None, key: str) -> float | None:
    return modes[mode][key].mean if mode in modes and key in modes[mode] else None


@dataclass(frozen=True)
class _Comparison:
    """How an arm compares with the baseline; nothing for the baseline itself and without a deployed mode."""

    difference: Differences
    speed_up: SpeedUp | None = None
    equal_time: EqualCostDifference | None = None
    equal_flops: EqualCostDifference | None = None
    crossing: Crossing | None = None


def _compare(results: Results, name: str, yardstick: Yardstick) -> _Comparison:
    arm, baseline = results.arms[name], results.arms[results.baseline]
    if name == results.baseline or baseline.deployed_mode is None:
        return _Comparison(Differences(None, None))
    key = yardstick.measure.key
    base_scores = _by_seed(baseline, baseline.deployed_mode, key)
    trained = paired_difference(_by_seed(arm, arm.training_mode, key), base_scores)
    if arm.deployed_mode is None or _excluded(arm, yardstick) or _excluded(baseline, yardstick):
        return _Comparison(Differences(None, trained))
    curves, base_curves = _curves(arm, arm.deployed_mode), _curves(baseline, baseline.deployed_mode)
    ratio, flops_ratio = arm.seconds_ratio, arm.flops_ratio
    # Where FLOPs are matched, the difference at equal steps is the one at equal FLOPs.
    unmatched = yardstick.unmatched(flops_ratio)
    return _Comparison(
        difference=Differences(paired_difference(_by_seed(arm, arm.deployed_mode, key), base_scores), trained),
        speed_up=speed_up(curves, base_curves, seconds_ratio=ratio),
        equal_time=equal_cost_difference(curves, base_curves, cost_ratio=ratio) if ratio else None,
        equal_flops=equal_cost_difference(curves, base_curves, cost_ratio=flops_ratio) if unmatched else None,
        crossing=crossing(curves, base_curves, tokens_per_step=results.data.tokens_per_step),
    )


def _final(run: RunResult, mode: str, key: str) -> float | None:
    """A final measure of a run; None where it is no finite number, or was not taken in that mode."""
    value = run.final.get(mode, {}).get(key)
    return value if value is not None and math.isfinite(value) else None


def _by_seed(arm: ArmResult, mode: str | None, key: str) -> dict[int, float]:
    values = {} if mode is None else {run.seed: _final(run, mode, key) for run in arm.runs}
    return {seed: value for seed, value in values.items() if value is not None}


def _curves(arm: ArmResult, mode: str) -> dict[int, Curve]:
    return {
        run.seed: [(point.step, loss) for point in run.curve if (loss := point.loss.get(mode)) is not None]
        for run in arm.runs
    }


def _mode(runs: list[RunResult], mode: str) -> dict[str, MeanScore]:
    """Each measure in one mode over the seeds."""
    keys = dict.fromkeys(key for run in runs for key in run.final.get(mode, {}))
    values = {key: [_final(run, mode, key) for run in runs] for key in keys}
    return {key: MeanScore(_mean(of), of) for key, of in values.items()}


def _averages(runs: list[RunResult]) -> Averages:
    norms = [run.grad_norm for run in runs if run.grad_norm is not None]
    return Averages(
        load_imbalance=_mean(run.load_imbalance for run in runs),
        dropped_share=_mean(run.dropped_share for run in runs),
        router_entropy=_mean(run.router_entropy for run in runs),
        train_seconds=_mean(run.train_seconds for run in runs),
        grad_norm_mean=_mean(norm.mean for norm in norms),
        grad_norm_max=max(_known(norm.max for norm in norms), default=None),
        spikes_loss=sum(run.spikes.loss for run in runs),
        spikes_grad_norm=sum(run.spikes.grad_norm for run in runs),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
