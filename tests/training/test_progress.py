import io

import pytest
from rich.console import Console

from mixtura.training.progress import LineProgress, RichProgress, SilentProgress


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def go(reporter, *, steps, first=0):
    reporter.start_run("dense, seed 0", step=first, steps=steps)
    for step in range(first + 1, steps + 1):
        reporter.advance(step, loss=1.25, tokens_per_second=1234.5)
    reporter.end_run()


@pytest.mark.parametrize(("steps", "lines"), [(500, 10), (10, 10), (3, 3), (997, 10)])
def test_a_log_gets_about_ten_lines(console, steps, lines):
    go(LineProgress(console), steps=steps)
    output = console.file.getvalue().splitlines()
    assert len(output) == lines
    assert output[-1] == f"dense, seed 0: step {steps}/{steps}, loss 1.250, 1,234 tokens/s, 0:00:00 left"


def test_a_log_says_where_a_resumed_run_continues(console):
    go(LineProgress(console), steps=100, first=50)
    assert console.file.getvalue().splitlines()[0] == "dense, seed 0: continues after step 50"


def test_a_log_shows_square_brackets_as_they_are(console):
    LineProgress(console).note("[arms.dense] 1/2")
    assert console.file.getvalue() == "[arms.dense] 1/2\n"


def test_the_bar_shows_label_loss_and_speed():
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    reporter = RichProgress(console, total_steps=8)
    with reporter:
        reporter.start_run("dense, seed 0", step=0, steps=4)
        reporter.advance(2, loss=1.25, tokens_per_second=1234.5)
        reporter._progress.refresh()
        reporter.note("half way")
    shown = console.file.getvalue()
    for expected in ("dense, seed 0", "2/4", "loss 1.250", "1,234 tokens/s", "all runs", "half way"):
        assert expected in shown


def test_the_overall_bar_counts_the_steps_of_all_runs_and_those_before_a_resumption():
    reporter = RichProgress(Console(file=io.StringIO()), total_steps=20)
    with reporter:
        go(reporter, steps=10)
        go(reporter, steps=10, first=4)
    assert reporter._progress.tasks[0].completed == 20
    assert len(reporter._progress.tasks) == 1


def test_silence_takes_every_call():
    go(SilentProgress(), steps=3)
    SilentProgress().note("nothing")
