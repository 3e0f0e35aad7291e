"""The tables of every run and of every pair of arms, as plain values."""

from dataclasses import dataclass

from mixtura.report.measures import yardstick_of
from mixtura.report.tables import Cell, difference_cell
from mixtura.report.wording import NONE, number
from mixtura.results import ArmSummary, Measure, Results, Summary


@dataclass(frozen=True)
class SeedTable:
    """The final measure of every run: a column for each arm and mode, the deployed mode first."""

    columns: list[tuple[str, str]]
    """Name of the arm, and words for the mode."""
    rows: list[tuple[int, list[str]]]
    """Seed, and a cell for each column."""
    mean: list[str]


def seed_table(results: Results, summary: Summary) -> SeedTable:
    """The final measure of every run."""
    measure = yardstick_of(results).measure
    columns = [
        (name, mode)
        for name, arm in summary.arms.items()
        for mode in _ordered_modes(arm)
        if measure.key in arm.modes[mode]
    ]
    seeds = sorted({seed for arm in summary.arms.values() for seed in arm.seeds})
    return SeedTable(
        columns=[(name, _mode_words(summary.arms[name], mode)) for name, mode in columns],
        rows=[
            (seed, [_run_score(summary.arms[name], mode, seed, measure) for name, mode in columns]) for seed in seeds
        ],
        mean=[_mean_score(summary.arms[name], mode, measure) for name, mode in columns],
    )


def _ordered_modes(arm: ArmSummary) -> list[str]:
    return sorted(arm.modes, key=lambda mode: (mode != arm.deployed_mode, mode != arm.training_mode))


def _mode_words(arm: ArmSummary, mode: str) -> str:
    named = (("deployed", arm.deployed_mode), ("trained", arm.training_mode))
    roles = [word for word, own in named if own == mode]
    words = "alone, all experts" if mode == "alone_all" else mode
    return words if len(roles) != 1 else f"{words}, as {roles[0]}"


def _run_score(arm: ArmSummary, mode: str, seed: int, measure: Measure) -> str:
    if seed not in arm.seeds:
        return NONE
    value = arm.modes[mode][measure.key].values[arm.seeds.index(seed)]
    return "diverged" if value is None else number(value, measure.digits + 1)


def _mean_score(arm: ArmSummary, mode: str, measure: Measure) -> str:
    # The mean of the runs that did not diverge would flatter the arm.
    score = arm.modes[mode][measure.key]
    return NONE if None in score.values else number(score.mean, measure.digits + 1)


@dataclass(frozen=True)
class PairRow:
    """Two arms of the verdict, and their difference."""

    first: str
    second: str
    outcome: str
    """What stands between their names."""
    cell: Cell


def pair_table(results: Results, summary: Summary) -> list[PairRow]:
    """Every pair of arms in the verdict."""
    digits = yardstick_of(results).measure.digits
    words = {"beats": "beats", "loses": "loses to", "draw": "draws with", "one_seed": "against"}
    return [
        PairRow(pair.arm, pair.against, words.get(pair.outcome, NONE), difference_cell(pair.difference, digits=digits))
        for pair in summary.pairs
    ]
