"""The load of every expert over training, as maps for the page and the pictures."""

from dataclasses import dataclass

from mixtura.results import ArmResult, Results, Summary
from mixtura.results.run import LoadHistory

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
