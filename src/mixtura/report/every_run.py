"""What the report shows run by run and side by side: scores of runs, pairs of arms, expert load, time of a step."""

from dataclasses import dataclass

from mixtura.report.measures import seconds_per_step, yardstick_of
from mixtura.report.tables import Cell, difference_cell
from mixtura.report.wording import NONE, duration, number, percent
from mixtura.results import ArmResult, ArmSummary, Measure, Results, Summary
from mixtura.results.run import LoadHistory


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


_EVEN = 1e-3


@dataclass(frozen=True)
class LoadMap:
    """The load of one layer's experts over training, 1 being an even share."""

    arm: str
    label: str
    layer: int
    steps: list[int]
    experts: int
    seeds: dict[str, list[list[float]]]
    """For each seed (experts, steps). Experts have no identity across seeds, so a page shows one seed at a time."""


def load_maps(results: Results, summary: Summary) -> list[LoadMap]:
    """A heat map for each arm and mixture layer; arms whose load is even throughout have none (see `is_even`)."""
    maps = []
    for name, arm in results.arms.items():
        loads = {} if is_even(arm) else _loads(arm)
        first = next(iter(loads.values()), None)
        for position, layer in enumerate(first.layers if first else []):
            seeds = {str(seed): _load_matrix(load, position) for seed, load in loads.items()}
            experts = len(next(iter(seeds.values())))
            maps.append(LoadMap(name, summary.arms[name].label, layer, first.steps if first else [], experts, seeds))
    return maps


def is_even(arm: ArmResult) -> bool:
    """Whether every expert had an even share at every evaluation, as Mixture of Tokens forces."""
    shares = [share * len(row) for load in _loads(arm).values() for step in load.share for row in step for share in row]
    return bool(shares) and max(abs(share - 1) for share in shares) < _EVEN


def _loads(arm: ArmResult) -> dict[int, LoadHistory]:
    """By seed, of the runs that have one."""
    return {run.seed: run.load for run in arm.runs if run.load is not None and run.load.steps}


def _load_matrix(load: LoadHistory, position: int) -> list[list[float]]:
    """(experts, steps): share of the load times the number of experts."""
    rows = [[share * len(step[position]) for share in step[position]] for step in load.share]
    return [[round(value, 4) for value in column] for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class TimeBar:
    """The step of one arm as a bar: its parts are (name, words, per cent of the longest step)."""

    arm: str
    text: str
    parts: list[tuple[str, str, float]]


def time_bars(results: Results) -> list[TimeBar]:
    """A bar for each arm whose step was timed in parts."""
    baseline = results.arms[results.baseline]
    seconds = {name: seconds_per_step(arm, baseline) for name, arm in results.arms.items()}
    longest = max((value for value in seconds.values() if value), default=0.0)
    bars = []
    for name, arm in results.arms.items():
        parts, own = arm.step_parts, seconds[name]
        if parts is None or own is None:
            continue
        shares = {"forward": parts.forward, "backward": parts.backward, "optimizer": parts.optimizer}
        bars.append(
            TimeBar(
                arm=name,
                text=duration(own),
                parts=[
                    (key, percent(share, 0), round(100 * share * own / longest, 2)) for key, share in shares.items()
                ],
            )
        )
    return bars
