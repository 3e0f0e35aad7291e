"""The summary of a comparison: every number and sentence that the report adds to what was measured.

`summarize` is a pure function of results.json; its value is stored there under "summary", so that nothing is shown that
is not in the file. docs/report.md documents each field.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from mixtura.report.cautions import find_cautions, is_searched, list_limits
from mixtura.report.measures import Yardstick, yardstick
from mixtura.report.significance import (
    MOT_ANCHOR,
    Curve,
    crossing,
    equal_cost_difference,
    paired_difference,
    speed_up,
)
from mixtura.report.verdict import judge, write_rule, write_verdict
from mixtura.report.wording import FAMILY_WORDS

SUMMARY_VERSION = 2


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Computes the summary of a comparison's results; values are plain JSON, without NaN.

    Args:
        results: the content of results.json; a "summary" in it is ignored.
    """
    baseline, stick = results["baseline"], yardstick(results)
    labels = _labels(results["arms"])
    arms = {name: {"label": labels[name], **_describe(results["arms"][name], stick)} for name in results["arms"]}
    for name, arm in arms.items():
        arm.update(_compare(results, arms, name, stick))
        arm["baseline"] = name == baseline
    budget = {
        "tokens": results["data"]["tokens_per_run"],
        "tokens_per_step": results["data"]["tokens_per_step"],
        "steps": max((run["steps"] for arm in results["arms"].values() for run in arm["runs"]), default=0),
        "seeds": min(len(arm["seeds"]) for arm in arms.values()),
        "rates_settled": all(_rate_settled(arm) for arm in results["arms"].values()),
    }
    judged = judge(arms, baseline, stick.measure)
    for name, arm in arms.items():
        arm["outcome"] = judged["outcomes"][name]
    return {
        "version": SUMMARY_VERSION,
        "measure": dataclasses.asdict(stick.measure),
        "rule": write_rule(stick.measure),
        "budget": budget,
        "verdict": {
            **write_verdict(arms, judged, baseline, budget, stick),
            **{k: judged[k] for k in ("best", "leader", "tied")},
        },
        "cautions": find_cautions(results, arms),
        "limits": list_limits(results, budget),
        "arms": arms,
        "pairs": judged["pairs"],
        "anchor": _anchor(arms, stick),
    }


def _anchor(arms: dict[str, Any], stick: Yardstick) -> dict[str, Any] | None:
    """The published curve is one of pretraining from scratch."""
    mixes = any(arm["family"] == "mixture_of_tokens" for arm in arms.values())
    return MOT_ANCHOR if mixes and stick.from_scratch else None


def _rate_settled(arm: dict[str, Any]) -> bool:
    """Whether the arm ran at a searched learning rate that is not at the edge of its search."""
    search: Any = arm.get("learning_rate_search")
    return is_searched(arm) and not search["at_edge"] and search["best"] == arm["learning_rate"]


def _labels(arms: dict[str, Any]) -> dict[str, str]:
    """What each arm is called: the family's words where the label is only the family's key; never two alike."""
    labels: dict[str, str] = {}
    for name, arm in arms.items():
        label, family = str(arm["label"]), str(arm["family"])
        labels[name] = FAMILY_WORDS.get(family, label) if label == family else label
    names = list(labels.values())
    return {name: label if names.count(label) == 1 else f"{label} ({name})" for name, label in labels.items()}


def _describe(arm: dict[str, Any], stick: Yardstick) -> dict[str, Any]:
    """What can be said of an arm without looking at the others."""
    deployed, trained, key = arm["deployed_mode"], arm["training_mode"], stick.measure.key
    # What needs decoding is measured as deployed alone.
    judged = (deployed, key) if deployed else (trained, stick.loss.key)
    diverged = sum(not _finite(run["final"], *judged) for run in arm["runs"])
    excluded = (
        "not_deployable"
        if deployed is None
        else "leaks_future"
        if arm["leaks"]["future"] and stick.causal
        else "diverged"
        if diverged
        else None
    )
    modes = {mode: _mode(arm["runs"], mode) for mode in dict.fromkeys(m for run in arm["runs"] for m in run["final"])}
    return {
        "family": arm["family"],
        "seeds": [run["seed"] for run in arm["runs"]],
        "training_mode": trained,
        "deployed_mode": deployed,
        "diverged": diverged,
        "excluded": excluded,
        "modes": modes,
        "score": {role: _score(modes, mode, key) for role, mode in (("deployed", deployed), ("trained", trained))},
        "mode_gap": None
        if deployed in (None, trained)
        else paired_difference(_by_seed(arm, deployed, key), _by_seed(arm, trained, key)),
        **{copied: arm[copied] for copied in _COPIED},
        "averages": _averages(arm["runs"]),
    }


_COPIED = ("parameters_total", "parameters_trainable", "flops_ratio", "seconds_ratio", "peak_memory_bytes")


def _score(modes: dict[str, Any], mode: str | None, key: str) -> float | None:
    return modes[mode][key]["mean"] if mode in modes and key in modes[mode] else None


def _compare(results: dict[str, Any], arms: dict[str, Any], name: str, stick: Yardstick) -> dict[str, Any]:
    """What can be said of an arm beside the baseline; all None for the baseline itself and without a deployed mode."""
    nothing = {
        "difference": {"deployed": None, "trained": None},
        "speed_up": None,
        "equal_time": None,
        "equal_flops": None,
        "crossing": None,
    }
    arm, baseline = results["arms"][name], results["arms"][results["baseline"]]
    if name == results["baseline"] or baseline["deployed_mode"] is None:
        return nothing
    key = stick.measure.key
    base_scores = _by_seed(baseline, baseline["deployed_mode"], key)
    trained = paired_difference(_by_seed(arm, arm["training_mode"], key), base_scores)
    if arms[name]["excluded"] or arms[results["baseline"]]["excluded"]:
        return {**nothing, "difference": {"deployed": None, "trained": trained}}
    curves, base_curves = (_curves(side, side["deployed_mode"]) for side in (arm, baseline))
    ratio, flops_ratio = arm["seconds_ratio"], arm["flops_ratio"]
    # Where FLOPs are matched, the difference at equal steps is the one at equal FLOPs.
    unmatched = stick.unmatched(flops_ratio)
    return {
        "difference": {
            "deployed": paired_difference(_by_seed(arm, arm["deployed_mode"], key), base_scores),
            "trained": trained,
        },
        "speed_up": speed_up(curves, base_curves, seconds_ratio=ratio),
        "equal_time": equal_cost_difference(curves, base_curves, cost_ratio=ratio) if ratio else None,
        "equal_flops": equal_cost_difference(curves, base_curves, cost_ratio=flops_ratio) if unmatched else None,
        "crossing": crossing(curves, base_curves, tokens_per_step=results["data"]["tokens_per_step"]),
    }


def _finite(final: dict[str, Any], mode: str, key: str) -> bool:
    value = final.get(mode, {}).get(key)
    return value is not None and math.isfinite(value)


def _by_seed(arm: dict[str, Any], mode: str, key: str) -> dict[int, float]:
    return {run["seed"]: run["final"][mode][key] for run in arm["runs"] if _finite(run["final"], mode, key)}


def _curves(arm: dict[str, Any], mode: str) -> dict[int, Curve]:
    return {
        run["seed"]: [
            (point["step"], point["loss"][mode]) for point in run["curve"] if point["loss"].get(mode) is not None
        ]
        for run in arm["runs"]
    }


def _mode(runs: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Means over seeds of each measure in one mode; `values` holds None for a seed that diverged."""
    keys = dict.fromkeys(key for run in runs for key in run["final"].get(mode, {}))
    values = {
        key: [run["final"][mode][key] if _finite(run["final"], mode, key) else None for run in runs] for key in keys
    }
    return {key: {"mean": _mean(of), "values": of} for key, of in values.items()}


def _averages(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{
            key: _mean(run.get(key) for run in runs)
            for key in ("load_imbalance", "dropped_share", "router_entropy", "train_seconds")
        },
        "grad_norm_mean": _mean(run["grad_norm"]["mean"] for run in runs),
        "grad_norm_max": max(_known(run["grad_norm"]["max"] for run in runs), default=None),
        "spikes_loss": sum(run["spikes"]["loss"] for run in runs),
        "spikes_grad_norm": sum(run["spikes"]["grad_norm"] for run in runs),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
