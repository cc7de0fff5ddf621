"""A study on a terminal: the stage that it is in, the loss, what is gained and forgotten so far, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        self.clock.advances(count)

    def logged(self, logs: Mapping[str, Any]) -> None:
        """What the trainer logged after a step."""
        for name, (keys, _) in CURVES.items():
            value = next((logs[key] for key in keys if isinstance(logs.get(key), int | float)), None)
            if value is not None:
                self.curves.setdefault(name, []).append(float(value))

    def _drawn(self) -> Any:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right", no_wrap=True)
        left = self.clock.left() or "time left: known once training has begun"
        head.add_row(Text(self.title, style="bold"), Text(left, style="dim"))
        for stage in self.clock.stages[-1:]:
            bar = ProgressBar(total=max(1, stage.total), completed=stage.done)
            head.add_row(bar, f"{stage.done} of {stage.total}")
        lines = Table.grid(padding=(0, 2))
        for name, points in self.curves.items():
            form = CURVES[name][1]
            ends = form.format(points[0]) + (f" → {form.format(points[-1])}" if len(points) > 1 else "")
            lines.add_row(Text(name, style="dim"), Text(sparkline(points), style="cyan"), Text(ends))
        return Group(head, lines)


def sparkline(points: Sequence[float]) -> str:
    """A curve in one line of at most `WIDTH` characters, from its lowest value to its highest; NaN is left out."""
    points = list(filter(math.isfinite, points))
    if len(points) > WIDTH:
        points = [points[round(i * (len(points) - 1) / (WIDTH - 1))] for i in range(WIDTH)]
    low, high = min(points, default=0.0), max(points, default=0.0)
    return "".join(BARS[round((point - low) / (high - low) * 7)] if high > low else BARS[0] for point in points)


@dataclass
class Stage:
    """A part of a run: `training`, of so many steps, or `measuring`, of so many items."""

    what: str
    label: str
    total: int
    done: int = 0
    seconds: float = 0.0  # that these took


class Clock:
    """How long the rest takes: stages that were timed say how long those like them will take."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.before: list[Stage] = []  # those of runs that are over
        self.stages: list[Stage] = []  # of the run that goes on, the last of them now
        self.overhead = 0.0  # the most seconds of a run outside its stages: loading, saving
        self._begun = self._moved = 0.0

    def begins(self, run: Run, what: str, total: int) -> None:
        """A stage begins."""
        self._moved = time.monotonic()
        self._begun = self._begun if self.stages else self._moved
        self.stages.append(Stage(what, run.label, total))

    def advances(self, count: int) -> None:
        """So much more of the stage is done."""
        stage, now = self.stages[-1], time.monotonic()
        stage.done, stage.seconds, self._moved = stage.done + count, stage.seconds + now - self._moved, now

    def ends(self) -> None:
        """A run is over."""
        if self.stages:
            outside = time.monotonic() - self._begun - sum(stage.seconds for stage in self.stages)
            self.overhead = max(self.overhead, outside)
            self.before, self.stages = self.before + self.stages, []

    def pace(self, what: str, label: str) -> float | None:
        """Seconds for a step or an item; of a label that was not timed the slowest known."""
        timed = (stage for stage in self.before + self.stages if stage.what == what and stage.done)
        known = {stage.label: stage.seconds / stage.done for stage in timed}
        return known.get(label, max(known.values(), default=None))

    def seconds(self) -> float | None:
        """What all tasks still take; None while one of their parts has not been timed."""
        items = max((stage.total for stage in self.before + self.stages if stage.what == "measuring"), default=1)
        found = self.overhead * len(self.tasks[1:])
        for number, task in enumerate(self.tasks):
            left = {"training": task.run.steps, "measuring": items if task.level == "full" else 0}
            for stage in self.stages[-1:] if number == 0 else ():
                left |= {"training": 0, stage.what: stage.total - stage.done}
            for what, count in left.items():
                pace = self.pace(what, task.run.label) if count else 0.0
                if pace is None:
                    return None
                found += pace * count
        return found

    def left(self) -> str:
        """`about 2 min left`; empty while it is not known."""
        seconds = self.seconds()
        return "" if seconds is None else f"about {duration(seconds)} left"
