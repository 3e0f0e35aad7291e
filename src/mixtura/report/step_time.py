"""Where the time of a training step goes, arm beside arm."""

from dataclasses import dataclass

from mixtura.report.measures import seconds_per_step
from mixtura.report.wording import duration, percent
from mixtura.results import Results


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
