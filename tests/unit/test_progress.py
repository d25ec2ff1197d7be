"""The bars: a rate that holds over rounds, bursts and changing totals, and numbers that no narrow
terminal cuts."""
import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from calib_prune import progress
from calib_prune.progress import Pace, terminal_bars


@pytest.fixture
def clock(monkeypatch):
    "A clock that stands still until it is set."
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def last_state(reports, clock, width=80):
    "The line that a stage's bar ends with, after reports of (seconds, stage, done, total)."
    out = io.StringIO()
    with terminal_bars(
        Console(file=out, width=width, force_terminal=True, color_system=None)
    ) as show:
        for clock.seconds, stage, done, total in reports: show(stage, done, total)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue()).strip().splitlines()[-1].strip()


def lines(reports, clock):
    "What reports of (seconds, stage, done, total) write where there is no terminal."
    out = io.StringIO()
    with terminal_bars(Console(file=out, width=80)) as show:
        for clock.seconds, stage, done, total in reports: show(stage, done, total)
    return [re.match(r"(.+?) \d:", o)[1] for o in out.getvalue().splitlines()]


def test_the_pace_goes_on_over_rounds(clock):
    pace = Pace()
    found = []
    for clock.seconds, done in (0, 0), (2, 100), (4, 300), (8, 20), (10, 100):
        found.append(pace.rate(done))
    assert found == [0, 50, 75, 40, 40]


def test_what_was_done_before_the_first_report_has_no_pace(clock):
    pace = Pace()
    assert pace.rate(16_000) == 0
    clock.seconds = 10
    assert pace.rate(16_500) == 50


def test_written_tokens_have_a_rate_and_the_time_left_follows(clock):
    # The total changes with every report: of such a bar rich knows neither.
    line = last_state([(0, "writing tokens", 0, 900), (2, "writing tokens", 100, 800),
                       (4, "writing tokens", 200, 700)], clock)
    assert "200/700" in line and "left 0:00:10" in line and line.endswith("50 tokens/s")


def test_a_stage_without_a_unit_has_no_rate(clock):
    assert last_state([(0, "pruning", 0, 3), (2, "pruning", 3, 3)], clock).endswith(
        "3/3 0:00:00 left 0:00:00"
    )


def test_nothing_written_yet_is_no_rate(clock):
    assert last_state([(0, "writing tokens", 0, 900)], clock).endswith("left -:--:--")


def test_a_narrow_terminal_cuts_no_number(clock):
    line = last_state(
        [(0, "writing tokens", 0, 65_536), (40, "writing tokens", 49_360, 65_536)], clock, width=80
    )
    assert "49360/65536" in line and line.endswith("left 0:00:14 1,234 tokens/s")


def test_the_time_left_is_plausible_from_the_first_tenth_on(clock):
    for stage in ("pruning", "scoring"):
        assert "left 0:00:54" in last_state(
            [(0, stage, 0, 30), (2, stage, 1, 30), (6, stage, 3, 30)], clock
        )


def test_a_stage_that_begins_anew_has_a_new_clock(clock):
    line = last_state([(0, "scoring", 0, 60), (2, "scoring", 60, 60), (100, "scoring", 0, 60),
                       (102, "scoring", 20, 60)], clock)
    assert line.endswith("left 0:00:04 10 tokens/s")


def test_off_a_terminal_a_stage_writes_a_line_each_half_minute(clock):
    found = lines([(i, "pruning", i, 100) for i in range(101)], clock)
    assert found == [f"pruning {i}/100" for i in (0, 30, 60, 90, 100)]


def test_each_stage_says_its_beginning_its_end_and_where_it_broke_off(clock):
    found = lines(
        [(0, "pruning", 0, 2), (1, "pruning", 2, 2), (2, "scoring", 0, 50), (3, "scoring", 20, 50)],
        clock,
    )
    assert found == ["pruning 0/2", "pruning 2/2", "scoring 0/50", "scoring 20/50"]


def test_nothing_is_written_twice(clock):
    assert lines([(0, "pruning", 1, 2), (60, "pruning", 1, 2), (120, "pruning", 1, 2)], clock) == [
        "pruning 1/2"
    ]
