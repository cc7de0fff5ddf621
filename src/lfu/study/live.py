"""A study on a terminal: the stage that it is in, the loss, what is gained and forgotten so far, and the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lfu.study.plan import Run, Task
from lfu.support.words import duration

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # points of a curve
# Curve -> where its value is in the trainer's logs: the first that is there; how the value is written.
CURVES = {
    "loss": (("lfu/sft_loss", "loss"), "{:.3f}"),
    "answers gained": (("forgetting/gained",), "{:.0f}"),
    "answers lost": (("forgetting/lost",), "{:.0f}"),
    "prose, rise of loss": (("forgetting/prose_rise",), "{:+.3f}"),
}


class Board:
    """Is told how a study goes; within `with` it draws that on standard error, if that is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.clock = Clock()
        self.title = ""
        self.curves: dict[str, list[float]] = {}
        self.screen = Live(console=self.console, transient=True, get_renderable=self._drawn, refresh_per_second=4)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.screen.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.screen.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def tasks(self, left: Sequence[Task]) -> None:
        """What is still to do; the first is next."""
        self.clock.tasks = list(left)

    def stage(self, run: Run, what: str, total: int) -> None:
        """A part of a run begins: `what` is a word for it, `total` how many steps or items it has."""
        self.clock.begins(run, what, total)
        name = "the untouched model" if run.setting is None else f"{run.label}, seed {run.seed}"
        self.title = f"{name}: {what}"
        if what == "training":
            self.curves = {}

    def advance(self, count: int = 1) -> None:
        """So many of them are done."""
        self.clock.advances(self.clock.done + count)

    def logged(self, logs: Mapping[str, Any]) -> None:
        """What the trainer logged after a step."""
        for name, (keys, _) in CURVES.items():
            value = next((logs[key] for key in keys if isinstance(logs.get(key), int | float)), None)
            if value is not None:
                self.curves.setdefault(name, []).append(float(value))

    def _drawn(self) -> Any:
        head = Table.grid(expand=True)
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text(self.title, style="bold"),
            Text(self.clock.left() or "time left: known once training has begun", style="dim"),
        )
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        done, total = self.clock.done, self.clock.total
        bar.add_row(ProgressBar(total=max(1, total), completed=done), f"{done} of {total}")
        lines = Table.grid(padding=(0, 2))
        for name, points in self.curves.items():
            form = CURVES[name][1]
            ends = form.format(points[0]) + (f" → {form.format(points[-1])}" if len(points) > 1 else "")
            lines.add_row(Text(name, style="dim"), Text(sparkline(points), style="cyan"), Text(ends))
        return Group(head, bar, lines)


def sparkline(points: Sequence[float]) -> str:
    """A curve in one line of at most `WIDTH` characters, from its lowest value to its highest."""
    if len(points) > WIDTH:
        points = [points[round(i * (len(points) - 1) / (WIDTH - 1))] for i in range(WIDTH)]
    low, high = min(points), max(points)
    return "".join(BARS[round((point - low) / (high - low) * 7)] if high > low else BARS[0] for point in points)


class Clock:
    """How long the rest takes: stages that were timed say how long those like them will take."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.stages: dict[tuple[str, str], tuple[float, int]] = {}  # (what, label) -> seconds, steps or items
        self.overhead: list[float] = []  # seconds of a run outside its stages: loading, saving
        self.stage: tuple[str, str] | None = None
        self.done = self.total = 0
        self._begun = self._moved = self._run_begun = self._in_stages = 0.0

    def begins(self, run: Run, what: str, total: int) -> None:
        """A stage begins."""
        now = time.monotonic()
        if self.stage is None:
            self._run_begun, self._in_stages = now, 0.0
        self._over()
        self.stage, self.done, self.total, self._begun = (what, run.label), 0, total, now

    def advances(self, done: int) -> None:
        """So much of the stage is done."""
        self.done, self._moved = done, time.monotonic()

    def ends(self) -> None:
        """A run is over."""
        if self.stage is not None:
            now = time.monotonic()
            self._over()
            self.overhead.append(max(0.0, now - self._run_begun - self._in_stages))
            self.stage = None

    def _over(self) -> None:
        if self.stage is not None and self.done:
            seconds = self._moved - self._begun
            self.stages[self.stage] = (seconds, self.done)
            self._in_stages += seconds

    def pace(self, what: str, label: str) -> float | None:
        """Seconds for a step or an item; of a label that was not timed the slowest known."""
        known = {key: seconds / count for key, (seconds, count) in self.stages.items() if key[0] == what}
        if self.stage is not None and self.stage[0] == what and self.done:
            known[self.stage] = (self._moved - self._begun) / self.done
        return known.get((what, label), max(known.values(), default=None))

    def seconds(self) -> float | None:
        """What all tasks still take; None while one of their parts has not been timed."""
        found = 0.0
        for number, task in enumerate(self.tasks):
            current = self.stage if number == 0 else None
            for what, count in self._parts(task):
                if current is not None and current[0] == "measuring" and what == "training":
                    continue  # it is over
                pace = self.pace(what, task.run.label)
                if pace is None:
                    return None
                found += pace * (max(0, self.total - self.done) if current and current[0] == what else count)
            found += max(self.overhead, default=0.0) if number else 0.0
        return found

    def _parts(self, task: Task) -> list[tuple[str, int]]:
        items = max((count for (what, _), (_, count) in self.stages.items() if what == "measuring"), default=self.total)
        training = [("training", task.run.steps)] if task.run.setting is not None else []
        return [*training, *([("measuring", items)] if task.level == "full" else [])]

    def left(self) -> str:
        """`about 2 min left`; empty while it is not known."""
        seconds = self.seconds()
        return "" if seconds is None else f"about {duration(seconds)} left"
