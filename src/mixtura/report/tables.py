"""The report's tables: groups of rows, a cell for each arm, ready for HTML and for Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mixtura.report.wording import (
    NBSP,
    NONE,
    TIMES,
    Yardstick,
    capital,
    compact,
    count,
    difference_unit,
    digits_for,
    duration,
    further_measure,
    interval,
    is_zero,
    memory,
    number,
    percent,
    rate,
    seconds_per_step,
    signed,
    signed_interval,
    times,
    yardstick_of,
)
from mixtura.results import ArmResult, ArmSummary, Interval, Measure, Results, Summary
from mixtura.results.conclusions import SpeedUp


@dataclass(frozen=True)
class Cell:
    """A number, and in smaller type what belongs to it."""

    text: str
    note: str = ""

    @property
    def both(self) -> str:
        """In one line."""
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Row:
    """A row of a table, with a cell for each arm in their order."""

    label: str
    cells: list[Cell]
    hint: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under one title."""

    title: str
    rows: list[Row]


RowRule = tuple[str, str, Callable[[ArmResult, ArmSummary], Cell]]
"""A row's label, a hint, and what makes an arm's cell of what was measured and what the summary holds of it."""


def main_table(results: Results, summary: Summary) -> list[Group]:
    """The main table."""
    yardstick = yardstick_of(results)
    rules = _pretraining_rows if yardstick.task == "pretraining" else _finetuning_rows
    pairs = [(results.arms[name], summary.arms[name]) for name in results.arms]
    return [
        Group(title, [Row(label, [cell(arm, judged) for arm, judged in pairs], hint) for label, hint, cell in of])
        for title, of in rules(results, summary, yardstick).items()
        if of
    ]


def _pretraining_rows(results: Results, summary: Summary, yardstick: Yardstick) -> dict[str, list[RowRule]]:
    base, spread = _base_and_spread(summary)
    return {
        "Held-out loss": [
            ("As deployed", "nats a token; the verdict's number", partial(_deployed, yardstick)),
            (f"Minus {base}'s", spread, partial(_difference, yardstick)),
            ("Bits per byte", "as deployed", _bits),
            ("As trained", "never the headline", partial(_trained, yardstick)),
            ("Deployed minus trained", "what leaving the training groups costs", partial(_mode_gap, yardstick)),
        ],
        "Time": _time_rows(results, base),
        "Size and cost": [
            ("Parameters, total", "", _parameters),
            ("Parameters, active", "used for one token as deployed", _active),
            ("FLOPs a token", "forward and backward, routing and mixing counted", _flops),
            *_equal_flops_rows(summary),
            ("Peak memory", "while training", _memory),
        ],
        "Experts": [*_expert_rows(), *_leak_rows(yardstick)],
        "Stability": _stability_rows(),
    }


def _equal_flops_rows(summary: Summary) -> list[RowRule]:
    """Only where arms are not matched in FLOPs."""
    if not any(arm.equal_flops for arm in summary.arms.values()):
        return []
    return [("Loss difference at equal FLOPs", "where the cheaper of the two ends", _equal_flops)]


def _finetuning_rows(results: Results, summary: Summary, yardstick: Yardstick) -> dict[str, list[RowRule]]:
    base, spread = _base_and_spread(summary)
    measure = yardstick.measure
    arms = results.arms.values()
    mixes = any(arm.deployed_mode not in (None, arm.training_mode) for arm in arms)
    routes = any(run.load for arm in arms for run in arm.runs)
    leaks = any(arm.leaks.batch or (yardstick.causal and arm.leaks.future) for arm in arms)
    name, deployed = capital(measure.name), _joined(measure.unit, "as deployed", "the verdict's number")
    as_trained: list[RowRule] = [
        (f"{name} as trained", "never the headline", partial(_trained, yardstick)),
        ("Deployed minus trained", "what leaving the training groups costs", partial(_mode_gap, yardstick)),
    ]
    return {
        "Quality": [
            (name, deployed, partial(_deployed, yardstick)),
            (f"Minus {base}'s", _joined(difference_unit(measure), spread), partial(_difference, yardstick)),
            *(as_trained if mixes else []),
            *_further_rows(results, yardstick),
        ],
        "Time": _time_rows(results, base),
        "Size and cost": [
            ("Parameters, trained", "gradient and optimizer state", _trainable),
            ("Parameters, total", "", _parameters),
            ("Parameters, active", "used for one token as deployed", _active),
            ("FLOPs a token", "forward and backward, routing and mixing counted", _flops),
            ("Peak memory", "while training", _memory),
            ("Optimizer state", "part of the peak", _optimizer),
        ],
        "Experts": _expert_rows() if routes else [],
        "Leaks": _leak_rows(yardstick) if routes or leaks else [],
        "Stability": _stability_rows(),
    }


def _base_and_spread(summary: Summary) -> tuple[str, str]:
    base = next(arm.label for arm in summary.arms.values() if arm.baseline)
    seeds = summary.budget.seeds
    return base, f"as deployed; 95{NBSP}% interval over seeds" if seeds > 1 else "as deployed"


def _further_rows(results: Results, yardstick: Yardstick) -> list[RowRule]:
    """What every run of every arm also measured in the end, in the mode that counts."""
    finals = [
        run.final.get(arm.deployed_mode or arm.training_mode, {}) for arm in results.arms.values() for run in arm.runs
    ]
    rows: list[RowRule] = []
    for key in finals[0] if finals else ():
        if key != yardstick.measure.key and all(key in final for final in finals):
            measure = further_measure(key, yardstick)
            rows.append((capital(measure.name), measure.unit, partial(_further, measure)))
    return rows


def _time_rows(results: Results, base: str) -> list[RowRule]:
    baseline = results.arms[results.baseline]
    split = any(arm.step_parts for arm in results.arms.values())
    return [
        ("Seconds a step", f"all arms side by side; {TIMES} {base}'s", partial(_pace, baseline)),
        *([("Forward, backward, optimizer", "shares of a step", _parts)] if split else []),
        ("Training time", "of a run, at that time a step", partial(_train_time, baseline)),
        (f"Steps to {base}'s final loss", "times fewer; on the sentences of the curves", _steps_to),
        (f"Time to {base}'s final loss", "times less", _time_to),
        ("Loss difference at equal time", "where the faster of the two ends", _equal_time),
    ]


def _expert_rows() -> list[RowRule]:
    return [
        ("Load imbalance", "busiest expert over the average; 1 is even", _imbalance),
        ("Dropped", "share of routed rows", _dropped),
        ("Router entropy", "1 is undecided, 0 is hard", _entropy),
    ]


def _leak_rows(yardstick: Yardstick) -> list[RowRule]:
    return [
        ("Leaks while training", "what a token's output depends on", partial(_leaks, yardstick)),
        ("Leaks as deployed", "", partial(_leaks_deployed, yardstick)),
    ]


def _stability_rows() -> list[RowRule]:
    return [
        ("Gradient norm", "mean, and largest", _gradient),
        ("Spikes", "of the loss, and of the gradient norm, over all seeds", _spikes),
        ("Learning rate", "peak, and where it comes from", _rate),
    ]


def _joined(*hints: str) -> str:
    return "; ".join(filter(None, hints))


def _deployed(yardstick: Yardstick, arm: ArmResult, judged: ArmSummary) -> Cell:
    if arm.deployed_mode is None:
        return Cell(NONE, "cannot be deployed")
    if judged.diverged:
        return Cell(NONE, f"{judged.diverged} of {count(len(judged.seeds), 'run')} diverged")
    return Cell(number(judged.score.deployed, yardstick.measure.digits), _mode_note(arm, arm.deployed_mode))


def _mode_note(arm: ArmResult, mode: str) -> str:
    """Named where the arm has another."""
    return "" if arm.deployed_mode == arm.training_mode else f"mode {mode}"


def difference_cell(difference: Interval | None, missing: str = "", *, digits: int = 3) -> Cell:
    """A difference with its interval; `missing` says why there is none."""
    if difference is None:
        return Cell(NONE, missing)
    digits = digits_for(difference.mean, difference.low, difference.high, least=digits)
    spread = "one seed" if difference.low is None else signed_interval(difference.low, difference.high, digits)
    return Cell("equal" if is_zero(difference) else signed(difference.mean, digits), spread)


def _difference(yardstick: Yardstick, arm: ArmResult, judged: ArmSummary) -> Cell:
    missing = "baseline" if judged.baseline else ""
    return difference_cell(judged.difference.deployed, missing, digits=yardstick.measure.digits)


def _bits(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(NONE if judged.diverged else number(_deployed_mean(arm, judged, "bits_per_byte")))


def _further(measure: Measure, arm: ArmResult, judged: ArmSummary) -> Cell:
    if judged.diverged:
        return Cell(NONE, "diverged")
    mode = arm.deployed_mode or arm.training_mode
    note = "" if arm.deployed_mode else "as trained"
    return Cell(number(judged.modes[mode][measure.key].mean, measure.digits), note)


def _deployed_mean(arm: ArmResult, judged: ArmSummary, key: str) -> float | None:
    score = judged.modes.get(arm.deployed_mode or "", {}).get(key)
    return None if score is None else score.mean


def _trained(yardstick: Yardstick, arm: ArmResult, judged: ArmSummary) -> Cell:
    if judged.diverged:
        return Cell(NONE, "diverged")
    return Cell(number(judged.score.trained, yardstick.measure.digits), _mode_note(arm, arm.training_mode))


def _mode_gap(yardstick: Yardstick, arm: ArmResult, judged: ArmSummary) -> Cell:
    missing = "" if arm.deployed_mode is None else "one mode"
    return difference_cell(judged.mode_gap, missing, digits=yardstick.measure.digits)


def _pace(baseline: ArmResult, arm: ArmResult, judged: ArmSummary) -> Cell:
    pace = seconds_per_step(arm, baseline)
    return Cell(number(pace, _pace_digits(pace)), _times_note(arm.seconds_ratio, judged))


def _pace_digits(pace: float | None) -> int:
    """Three decimals, and as many more as leave three digits that count."""
    return 3 if pace is None or pace >= 0.1 else 4 if pace >= 0.01 else 6


def _times_note(ratio: float | None, judged: ArmSummary, digits: int = 2) -> str:
    """A ratio to the baseline's; nothing at the baseline itself."""
    if judged.baseline or ratio is None:
        return ""
    return _times(ratio, digits)


def _parts(arm: ArmResult, judged: ArmSummary) -> Cell:
    parts = arm.step_parts
    if parts is None:
        return Cell(NONE)
    return Cell(
        " / ".join(number(100 * share, 0) for share in (parts.forward, parts.backward, parts.optimizer)) + f"{NBSP}%"
    )


def _ratio_cell(judged: ArmSummary, of: Callable[[SpeedUp], Interval | None]) -> Cell:
    speed = judged.speed_up
    if speed is None:
        return Cell(NONE, "baseline" if judged.baseline else "")
    if speed.ratio_steps is None:
        return Cell("not reached", f"in {speed.n - speed.reached} of {count(speed.n, 'seed')}")
    ratio = of(speed)
    return Cell(NONE) if ratio is None else Cell(_times(ratio.mean), _ratio_note(ratio))


def _times(ratio: float, digits: int = 2) -> str:
    return "equal" if number(ratio, digits) == number(1, digits) else times(ratio, digits)


def _ratio_note(ratio: Interval) -> str:
    return "one seed" if ratio.low is None else interval(ratio.low, ratio.high, 2)


def _steps_to(arm: ArmResult, judged: ArmSummary) -> Cell:
    return _ratio_cell(judged, lambda speed: speed.ratio_steps)


def _time_to(arm: ArmResult, judged: ArmSummary) -> Cell:
    return _ratio_cell(judged, lambda speed: speed.ratio_seconds)


def _equal_time(arm: ArmResult, judged: ArmSummary) -> Cell:
    return difference_cell(judged.equal_time, "baseline" if judged.baseline else "")


def _equal_flops(arm: ArmResult, judged: ArmSummary) -> Cell:
    return difference_cell(judged.equal_flops, "baseline" if judged.baseline else "")


def _train_time(baseline: ArmResult, arm: ArmResult, judged: ArmSummary) -> Cell:
    pace = seconds_per_step(arm, baseline)
    if pace is None:
        return Cell(duration(judged.averages.train_seconds), "as it ran")
    return Cell(duration(pace * arm.runs[0].steps))


def _trainable(arm: ArmResult, judged: ArmSummary) -> Cell:
    trained, total = arm.parameters_trainable, arm.parameters_total
    return Cell(compact(trained), percent(trained / total, 1 if trained > 0.01 * total else 2))


def _optimizer(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(memory(arm.optimizer_state_bytes))


def _parameters(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(compact(arm.parameters_total))


def _active(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(compact(arm.parameters_active))


def _flops(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(compact(arm.flops_per_token, "FLOP"), _times_note(arm.flops_ratio, judged, 3))


def _memory(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(memory(arm.peak_memory_bytes))


def _imbalance(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(number(judged.averages.load_imbalance, 2))


def _dropped(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(percent(judged.averages.dropped_share))


def _entropy(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(number(judged.averages.router_entropy, 2))


def _leaks(yardstick: Yardstick, arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(_leak_words(arm, arm.leaks.batch, yardstick))


def _leaks_deployed(yardstick: Yardstick, arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(NONE if arm.deployed_mode is None else _leak_words(arm, arm.leaks.batch_deployed, yardstick))


def _leak_words(arm: ArmResult, batch: bool | None, yardstick: Yardstick) -> str:
    found = ["later tokens"] if arm.leaks.future and yardstick.causal else []
    return " and ".join([*found, *(["other examples"] if batch else [])]) or "none"


def _gradient(arm: ArmResult, judged: ArmSummary) -> Cell:
    averages = judged.averages
    return Cell(number(averages.grad_norm_mean, 2), f"max {number(averages.grad_norm_max, 2)}")


def _spikes(arm: ArmResult, judged: ArmSummary) -> Cell:
    return Cell(f"{judged.averages.spikes_loss} / {judged.averages.spikes_grad_norm}")


def _rate(arm: ArmResult, judged: ArmSummary) -> Cell:
    if arm.searched is None:
        return Cell(rate(arm.learning_rate), "not searched")
    edge = ", at the edge" if arm.searched.at_edge else ""
    return Cell(rate(arm.learning_rate), f"searched{edge}")
