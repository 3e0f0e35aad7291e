"""What a person sees while models train: a bar on a terminal, a line now and then in a log, or nothing."""

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES_PER_RUN = 10


class ProgressReporter(Protocol):
    """Shows the progress of runs; one reporter may be given many runs, one after another."""

    def start_run(self, label: str, *, step: int, steps: int) -> None:
        """A run begins after `step` steps, more than 0 when it resumes, and goes on to `steps`."""
        ...

    def advance(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """The run has finished `step`."""
        ...

    def end_run(self) -> None:
        """The run is over, complete or not."""
        ...

    def note(self, text: str) -> None:
        """One line about what happens, between runs or during one."""
        ...


class SilentProgress:
    """Shows nothing."""

    def start_run(self, label: str, *, step: int, steps: int) -> None:
        """Nothing."""

    def advance(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Nothing."""

    def end_run(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class LineProgress:
    """Plain lines, about one every 10 % of a run: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        """Writes to `console`."""
        self.console = console
        self._label, self._first, self._steps, self._began = "", 0, 0, 0.0
        self._tenth = 0

    def start_run(self, label: str, *, step: int, steps: int) -> None:
        """Prints a line when the run resumes."""
        self._label, self._first, self._steps, self._began = label, step, steps, time.monotonic()
        self._tenth = step * LINES_PER_RUN // steps
        if step >= steps:
            self.note(f"{label}: done before")
        elif step:
            self.note(f"{label}: continues after step {step}")

    def advance(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Prints a line when another tenth is done."""
        tenth = step * LINES_PER_RUN // self._steps
        if tenth == self._tenth:
            return
        self._tenth = tenth
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, step - self._first) * (self._steps - step)
        self.note(
            f"{self._label}: step {step}/{self._steps}, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, "
            f"{_duration(left)} left"
        )

    def end_run(self) -> None:
        """Prints nothing, since the last line says that the run is complete."""

    def note(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class RichProgress:
    """A bar for the current run, and below it one for all runs; use it in a `with` block."""

    def __init__(self, console: Console, *, total_steps: int | None = None) -> None:
        """`total_steps` is the sum over all runs to come; None shows no overall bar."""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[details]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._run: TaskID | None = None
        self._step = 0
        self._overall = None
        if total_steps is not None:
            self._overall = self._progress.add_task("all runs", total=total_steps, details="")

    def __enter__(self) -> Self:
        """Shows the bars."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the bars."""
        self._progress.stop()

    def start_run(self, label: str, *, step: int, steps: int) -> None:
        """Adds the run's bar."""
        self._run = self._progress.add_task(label, total=steps, completed=step, details="")
        self._count(step, since=0)

    def advance(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Moves the bars."""
        if self._run is not None:
            details = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            self._progress.update(self._run, completed=step, details=details)
        self._count(step, since=self._step)

    def end_run(self) -> None:
        """Removes the run's bar."""
        if self._run is not None:
            self._progress.remove_task(self._run)
            self._run = None

    def note(self, text: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def _count(self, step: int, *, since: int) -> None:
        self._step = step
        if self._overall is not None:
            self._progress.advance(self._overall, step - since)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
