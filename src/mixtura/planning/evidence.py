"""The runs that advice stands on: small decoders of every family, trained at several budgets (docs/results.md).

`evidence.json` is made of the committed results by `python benchmarks/evidence.py`, and holds nothing else.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev

from mixtura.planning.laws import BASELINE, RunEnd

FEWEST_TOKENS = 900_000
"""Runs on fewer count as searches of a scale: after so few steps losses have hardly begun to follow a law."""
UNKNOWN_STEP_NOISE = 0.07
"""How ratios of steps scatter, in the logarithm, where there is one: as those at width 64 do."""
FILE = Path(__file__).with_name("evidence.json")
HIDDEN_MULTIPLE = 12
"""Parameters of a decoder layer as a multiple of D^2: four projections of attention, and 8 D^2 of the feed-forward."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all the runs share."""

    layers: int
    vocabulary: int
    context: int
    tokens_per_step: int
    experts: int
    top_k: int
    group_size: int
    text: str
    machine: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run at one budget."""

    arm: str
    """A family, or one of its controls."""
    width: int
    tokens: int
    seed: int
    loss: float
    """Held-out nats a token, as deployed: mixtures of tokens with two mixtures a token, in the better of the modes
    `population` and `alone`."""
    in_groups: float | None
    """Of mixtures of tokens as they train; None for the other families."""
    alone: float | None
    """The same in `alone` mode with two mixtures a token."""
    parameters: int
    """All of them, embeddings and every expert too."""
    seconds_per_step: float
    """Processor seconds on one thread."""
    processor: str
    """On which it was trained."""

    def loss_of(self, *, in_groups: bool) -> float:
        """The loss as deployed, or, of mixtures of tokens, as they train."""
        return self.in_groups if in_groups and self.in_groups is not None else self.loss


@dataclass(frozen=True, kw_only=True)
class StepRatio:
    """A step's time over that of a dense one."""

    ratio: float
    error: float
    """Standard error of its logarithm."""
    width: int | None
    """At which it was measured; None of a time that was planned."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The runs and what they share."""

    setting: Setting
    rows: tuple[Row, ...]

    def of(self, arm: str, *, width: int | None = None) -> list[Row]:
        """The rows of an arm, of one width or of all."""
        return [row for row in self.rows if row.arm == arm and width in (None, row.width)]

    def arms(self) -> list[str]:
        """The names of all arms, dense first."""
        return sorted({row.arm for row in self.rows}, key=lambda arm: (arm != BASELINE, arm))

    def ends(self, arms: Sequence[str], *, in_groups: bool = False) -> list[RunEnd]:
        """What laws are fitted to.

        Args:
            arms: which arms.
            in_groups: take mixtures of tokens as they train instead of as deployed.
        """
        return [
            RunEnd(
                arm=row.arm,
                parameters=body_parameters(row.width, layers=self.setting.layers),
                tokens=row.tokens,
                seed=row.seed,
                loss=row.loss_of(in_groups=in_groups),
            )
            for row in self.rows
            if row.arm in arms
        ]

    def step_ratio(self, arm: str, *, width: int) -> StepRatio:
        """A step's time over that of a dense one, at the measured width nearest to `width`.

        Only times of one processor are divided: those of the same seed and budget where there are any, else by the mean
        of dense on that processor. The ratio is their median.
        """
        paired, means = {}, defaultdict(list)
        for row in self.of(BASELINE):
            paired[row.width, row.processor, row.seed, row.tokens] = row.seconds_per_step
            means[row.width, row.processor].append(row.seconds_per_step)
        rows = [row for row in self.of(arm) if (row.width, row.processor) in means]
        nearest = min(sorted({row.width for row in rows}), key=lambda other: abs(other - width))
        rows = [row for row in rows if row.width == nearest]
        pairs = [(row, paired.get((row.width, row.processor, row.seed, row.tokens))) for row in rows]
        pairs = [(row, dense) for row, dense in pairs if dense is not None] or [
            (row, fmean(means[row.width, row.processor])) for row in rows
        ]
        logs = [math.log(row.seconds_per_step / dense) for row, dense in pairs]
        # Budgets of one run share most of their steps.
        runs = len({(row.processor, row.seed) for row, _ in pairs})
        scatter = stdev(logs) if len(logs) > 1 else UNKNOWN_STEP_NOISE
        return StepRatio(ratio=math.exp(median(logs)), error=scatter / math.sqrt(runs), width=nearest)


def body_parameters(width: int, *, layers: int) -> int:
    """Parameters of a dense decoder without embeddings, head and norms."""
    return HIDDEN_MULTIPLE * layers * width * width


@cache
def load_evidence(path: Path = FILE) -> Evidence:
    """The evidence that comes with the package, or that of another file."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    names = stored["columns"]
    return Evidence(
        setting=Setting(**stored["setting"]),
        rows=tuple(Row(**dict(zip(names, row, strict=True))) for row in stored["rows"]),
    )
