"""The report's tables: groups of rows, a cell for each arm, ready for HTML and for Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mixtura.report.measures import Yardstick, difference_unit, further_measure, yardstick
from mixtura.report.wording import (
    NBSP,
    NONE,
    TIMES,
    capital,
    compact,
    count,
    digits_for,
    duration,
    interval,
    memory,
    number,
    percent,
    rate,
    signed,
    times,
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
"""A row's label, a hint, and what makes an arm's cell of what was measured and what is said of it."""


def main_table(results: Results, summary: Summary) -> list[Group]:
    """The main table."""
    stick = yardstick(results)
    rules = _pretraining_rows if stick.task == "pretraining" else _finetuning_rows
    pairs = [(results.arms[name], summary.arms[name]) for name in results.arms]
    return [
        Group(title, [Row(label, [cell(arm, said) for arm, said in pairs], hint) for label, hint, cell in of])
        for title, of in rules(results, summary, stick).items()
        if of
    ]


def _pretraining_rows(results: Results, summary: Summary, stick: Yardstick) -> dict[str, list[RowRule]]:
    base, spread = _base_and_spread(summary)
    return {
        "Held-out loss": [
            ("As deployed", "nats a token; the verdict's number", partial(_deployed, stick)),
            (f"Minus {base}'s", spread, partial(_difference, stick)),
            ("Bits per byte", "as deployed", _bits),
            ("As trained", "never the headline", partial(_trained, stick)),
            ("Deployed minus trained", "what leaving the training groups costs", partial(_mode_gap, stick)),
        ],
        "Time": _time_rows(base),
        "Size and cost": [
            ("Parameters, total", "", _parameters),
            ("Parameters, active", "used for one token", _active),
            ("FLOPs a token", "forward and backward, routing and mixing counted", _flops),
            *_equal_flops_rows(summary),
            ("Peak memory", "while training", _memory),
        ],
        "Experts": [*_expert_rows(), *_leak_rows(stick)],
        "Stability": _stability_rows(),
    }


def _equal_flops_rows(summary: Summary) -> list[RowRule]:
    """Only where arms are not matched in FLOPs."""
    if not any(arm.equal_flops for arm in summary.arms.values()):
        return []
    return [("Loss difference at equal FLOPs", "where the cheaper of the two ends", _equal_flops)]


def _finetuning_rows(results: Results, summary: Summary, stick: Yardstick) -> dict[str, list[RowRule]]:
    base, spread = _base_and_spread(summary)
    measure = stick.measure
    arms = results.arms.values()
    mixes = any(arm.deployed_mode not in (None, arm.training_mode) for arm in arms)
    routes = any(run.load for arm in arms for run in arm.runs)
    leaks = any(arm.leaks.batch or (stick.causal and arm.leaks.future) for arm in arms)
    name, deployed = capital(measure.name), _joined(measure.unit, "as deployed", "the verdict's number")
    as_trained: list[RowRule] = [
        (f"{name} as trained", "never the headline", partial(_trained, stick)),
        ("Deployed minus trained", "what leaving the training groups costs", partial(_mode_gap, stick)),
    ]
    return {
        "Quality": [
            (name, deployed, partial(_deployed, stick)),
            (f"Minus {base}'s", _joined(difference_unit(measure), spread), partial(_difference, stick)),
            *(as_trained if mixes else []),
            *_further_rows(results, stick),
        ],
        "Time": _time_rows(base),
        "Size and cost": [
            ("Parameters, trained", "gradient and optimizer state", _trainable),
            ("Parameters, total", "", _parameters),
            ("Parameters, active", "used for one token", _active),
            ("FLOPs a token", "forward and backward, routing and mixing counted", _flops),
            ("Peak memory", "while training", _memory),
            ("Optimizer state", "part of the peak", _optimizer),
        ],
        "Experts": _expert_rows() if routes else [],
        "Leaks": _leak_rows(stick) if routes or leaks else [],
        "Stability": _stability_rows(),
    }


def _base_and_spread(summary: Summary) -> tuple[str, str]:
    base = next(arm.label for arm in summary.arms.values() if arm.baseline)
    seeds = summary.budget.seeds
    return base, f"as deployed; 95{NBSP}% interval over seeds" if seeds > 1 else "as deployed"


def _further_rows(results: Results, stick: Yardstick) -> list[RowRule]:
    """What every run of every arm also measured in the end, in the mode that counts."""
    finals = [
        run.final.get(arm.deployed_mode or arm.training_mode, {}) for arm in results.arms.values() for run in arm.runs
    ]
    rows: list[RowRule] = []
    for key in finals[0] if finals else ():
        if key != stick.measure.key and all(key in final for final in finals):
            measure = further_measure(key, stick)
            rows.append((capital(measure.name), measure.unit, partial(_further, measure)))
    return rows


def _time_rows(base: str) -> list[RowRule]:
    return [
        ("Seconds a step", f"side by side; {TIMES} {base}'s, by paired steps", _pace),
        (f"Steps to {base}'s final loss", "times fewer", _steps_to),
        (f"Time to {base}'s final loss", "times less", _time_to),
        ("Loss difference at equal time", "where the faster of the two ends", _equal_time),
        ("Training time", "mean of a run", _train_time),
    ]


def _expert_rows() -> list[RowRule]:
    return [
        ("Load imbalance", "busiest expert over the average; 1 is even", _imbalance),
        ("Dropped", "share of routed rows", _dropped),
        ("Router entropy", "1 is undecided, 0 is hard", _entropy),
    ]


def _leak_rows(stick: Yardstick) -> list[RowRule]:
    return [
        ("Leaks while training", "what a token's output depends on", partial(_leaks, stick)),
        ("Leaks as deployed", "", partial(_leaks_deployed, stick)),
    ]


def _stability_rows() -> list[RowRule]:
    return [
        ("Gradient norm", "mean, and largest", _gradient),
        ("Spikes", "of the loss, and of the gradient norm, over all seeds", _spikes),
        ("Learning rate", "peak, and where it comes from", _rate),
    ]


def _joined(*hints: str) -> str:
    return "; ".join(filter(None, hints))


def _deployed(stick: Yardstick, arm: ArmResult, said: ArmSummary) -> Cell:
    if arm.deployed_mode is None:
        return Cell(NONE, "cannot be deployed")
    if said.diverged:
        return Cell(NONE, f"{said.diverged} of {count(len(said.seeds), 'run')} diverged")
    return Cell(number(said.score.deployed, stick.measure.digits), _mode_note(arm, arm.deployed_mode))


def _mode_note(arm: ArmResult, mode: str) -> str:
    """Named where the arm has another."""
    return "" if arm.deployed_mode == arm.training_mode else f"mode {mode}"


def difference_cell(difference: Interval | None, missing: str = "", *, digits: int = 3) -> Cell:
    """A difference with its interval; `missing` says why there is none."""
    if difference is None:
        return Cell(NONE, missing)
    digits = digits_for(difference.mean, difference.low, difference.high, least=digits)
    spread = "one seed" if difference.low is None else interval(difference.low, difference.high, digits)
    return Cell(signed(difference.mean, digits), spread)


def _difference(stick: Yardstick, arm: ArmResult, said: ArmSummary) -> Cell:
    missing = "baseline" if said.baseline else ""
    return difference_cell(said.difference.deployed, missing, digits=stick.measure.digits)


def _bits(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(NONE if said.diverged else number(_deployed_mean(arm, said, "bits_per_byte")))


def _further(measure: Measure, arm: ArmResult, said: ArmSummary) -> Cell:
    if said.diverged:
        return Cell(NONE, "diverged")
    mode = arm.deployed_mode or arm.training_mode
    note = "" if arm.deployed_mode else "as trained"
    return Cell(number(said.modes[mode][measure.key].mean, measure.digits), note)


def _deployed_mean(arm: ArmResult, said: ArmSummary, key: str) -> float | None:
    score = said.modes.get(arm.deployed_mode or "", {}).get(key)
    return None if score is None else score.mean


def _trained(stick: Yardstick, arm: ArmResult, said: ArmSummary) -> Cell:
    if said.diverged:
        return Cell(NONE, "diverged")
    return Cell(number(said.score.trained, stick.measure.digits), _mode_note(arm, arm.training_mode))


def _mode_gap(stick: Yardstick, arm: ArmResult, said: ArmSummary) -> Cell:
    missing = "" if arm.deployed_mode is None else "one mode"
    return difference_cell(said.mode_gap, missing, digits=stick.measure.digits)


def _pace(arm: ArmResult, said: ArmSummary) -> Cell:
    pace = arm.seconds_per_step
    return Cell(number(pace, 3 if pace is None or pace >= 0.1 else 4), times(arm.seconds_ratio))


def _ratio_cell(said: ArmSummary, of: Callable[[SpeedUp], Interval | None]) -> Cell:
    speed = said.speed_up
    if speed is None:
        return Cell(NONE, "baseline" if said.baseline else "")
    if speed.ratio_steps is None:
        return Cell("not reached", f"in {speed.n - speed.reached} of {count(speed.n, 'seed')}")
    ratio = of(speed)
    return Cell(NONE) if ratio is None else Cell(times(ratio.mean), _ratio_note(ratio))


def _ratio_note(ratio: Interval) -> str:
    return "one seed" if ratio.low is None else interval(ratio.low, ratio.high, 2)


def _steps_to(arm: ArmResult, said: ArmSummary) -> Cell:
    return _ratio_cell(said, lambda speed: speed.ratio_steps)


def _time_to(arm: ArmResult, said: ArmSummary) -> Cell:
    return _ratio_cell(said, lambda speed: speed.ratio_seconds)


def _equal_time(arm: ArmResult, said: ArmSummary) -> Cell:
    return difference_cell(said.equal_time, "baseline" if said.baseline else "")


def _equal_flops(arm: ArmResult, said: ArmSummary) -> Cell:
    return difference_cell(said.equal_flops, "baseline" if said.baseline else "")


def _train_time(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(duration(said.averages.train_seconds))


def _trainable(arm: ArmResult, said: ArmSummary) -> Cell:
    trained, total = arm.parameters_trainable, arm.parameters_total
    return Cell(compact(trained), percent(trained / total, 1 if trained > 0.01 * total else 2))


def _optimizer(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(memory(arm.optimizer_state_bytes))


def _parameters(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(compact(arm.parameters_total))


def _active(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(compact(arm.parameters_active))


def _flops(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(compact(arm.flops_per_token, "FLOP"), times(arm.flops_ratio, 3))


def _memory(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(memory(arm.peak_memory_bytes))


def _imbalance(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(number(said.averages.load_imbalance, 2))


def _dropped(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(percent(said.averages.dropped_share))


def _entropy(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(number(said.averages.router_entropy, 2))


def _leaks(stick: Yardstick, arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(_leak_words(arm, arm.leaks.batch, stick))


def _leaks_deployed(stick: Yardstick, arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(NONE if arm.deployed_mode is None else _leak_words(arm, arm.leaks.batch_deployed, stick))


def _leak_words(arm: ArmResult, batch: bool | None, stick: Yardstick) -> str:
    found = ["later tokens"] if arm.leaks.future and stick.causal else []
    return " and ".join([*found, *(["other examples"] if batch else [])]) or "none"


def _gradient(arm: ArmResult, said: ArmSummary) -> Cell:
    averages = said.averages
    return Cell(number(averages.grad_norm_mean, 2), f"max {number(averages.grad_norm_max, 2)}")


def _spikes(arm: ArmResult, said: ArmSummary) -> Cell:
    return Cell(f"{said.averages.spikes_loss} / {said.averages.spikes_grad_norm}")


def _rate(arm: ArmResult, said: ArmSummary) -> Cell:
    if arm.searched is None:
        return Cell(rate(arm.learning_rate), "not searched")
    edge = ", at the edge" if arm.searched.at_edge else ""
    return Cell(rate(arm.learning_rate), f"searched{edge}")
