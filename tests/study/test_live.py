"""What a study shows on a terminal while it works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lfu.study import live
from lfu.study.live import WIDTH, Board, Clock, sparkline
from lfu.study.plan import UNTOUCHED, Run, Task
from lfu.study.settings import Setting

SFT, GEM = Run(Setting("sft"), 0, "1e-4", 10), Run(Setting("gem"), 0, "1e-4", 10)
TASKS = [Task(UNTOUCHED, "full"), Task(SFT, "full"), Task(GEM, "full")]


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns."""
    time = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: time[0])
    return time


def timed(clock: Clock, now: list[float], run: Run, what: str, count: int, each: float) -> None:
    """A stage that is done from its beginning to its end."""
    clock.begins(run, what, count)
    now[0] += count * each
    clock.advances(count)


def test_the_time_left_is_known_once_each_kind_of_stage_was_timed(now):
    clock = Clock()
    clock.tasks = TASKS
    assert clock.seconds() is None
    timed(clock, now, UNTOUCHED, "measuring", 20, 0.5)
    assert clock.left() == ""
    now[0] += 3  # saving
    clock.ends()
    clock.tasks = TASKS[1:]
    clock.begins(SFT, "training", 10)
    now[0] += 8
    clock.advances(4)
    # 6 steps and 20 items of this run, 10 and 20 of the next one, and what a run takes beside
    assert clock.seconds() == pytest.approx(6 * 2 + 10 + 20 + 10 + 3)
    assert clock.left() == "about 55 s left"


def test_a_slower_method_is_told_by_its_own_steps(now):
    clock = Clock()
    clock.tasks = TASKS[1:]
    timed(clock, now, SFT, "training", 10, 1.0)
    timed(clock, now, SFT, "measuring", 20, 0.5)
    clock.ends()
    clock.tasks = TASKS[2:]
    assert clock.seconds() == pytest.approx(10 + 10)
    clock.begins(GEM, "training", 10)
    now[0] += 6
    clock.advances(2)
    assert clock.seconds() == pytest.approx(8 * 3 + 10)
    clock.begins(GEM, "measuring", 20)
    assert clock.seconds() == pytest.approx(10)


def test_a_curve_in_one_line():
    assert sparkline([1.0]) == "▁"
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([1.0, float("inf"), 2.0, float("nan")]) == "▁█"
    assert sparkline([float("nan")]) == ""
    many = sparkline([float(i) for i in range(1000)])
    assert (len(many), many[0], many[-1]) == (WIDTH, "▁", "█")


def test_the_board_fits_a_narrow_terminal():
    board = Board(Console(file=io.StringIO(), width=80, force_terminal=True))
    board.tasks(TASKS[1:])
    board.stage(SFT, "training", 10)
    for loss in (2.0, 1.5, 1.25):
        board.advance()
        board.logged({"loss": loss, "lfu/sft_loss": loss / 2})
    board.logged({"forgetting/gained": 1, "forgetting/lost": 4, "forgetting/prose_rise": 0.25})
    board.console.print(board._drawn())
    lines = board.console.file.getvalue().splitlines()
    assert "sft, seed 0: training" in lines[0]
    assert "3 of 10" in lines[1]
    assert "1.000 → 0.625" in lines[2]  # the part that methods have in common
    assert lines[5].split()[-1] == "+0.250"


def test_nothing_is_drawn_where_nobody_looks():
    console = Console(file=io.StringIO())
    with Board(console) as board:
        board.stage(SFT, "training", 3)
        board.say("a [line] that stays")
    assert console.file.getvalue() == "a [line] that stays\n"
