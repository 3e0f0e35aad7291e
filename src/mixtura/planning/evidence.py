"""The runs that advice stands on: small decoders of every family, trained at several budgets (docs/results.md).

`evidence.json` is made of the committed results by `python benchmarks/long_runs.py evidence`, and holds nothing else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from mixtura.planning.laws import BASELINE, RunEnd

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
    """Held-out nats a token, as deployed: mixtures of tokens in `population` mode with two mixtures a token."""
    in_groups: float | None
    """Of mixtures of tokens as they train; None for the other families."""
    alone: float | None
    """The same in `alone` mode with two mixtures a token."""
    parameters: int
    """All of them, embeddings and every expert too."""
    seconds_per_step: float
    """Processor seconds on one thread."""


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
                loss=row.in_groups if in_groups and row.in_groups is not None else row.loss,
            )
            for row in self.rows
            if row.arm in arms
        ]

    def step_ratio(self, arm: str, *, width: int) -> tuple[float, int]:
        """A step's time over that of a dense one, at the measured width nearest to `width`, and that width."""
        widths = {row.width for row in self.of(arm)} & {row.width for row in self.of(BASELINE)}
        nearest = min(widths, key=lambda other: abs(other - width))
        own, dense = (fmean(row.seconds_per_step for row in self.of(name, width=nearest)) for name in (arm, BASELINE))
        return own / dense, nearest


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
