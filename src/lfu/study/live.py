"""Told how a study goes, while it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfu.study.plan import Run, Task


class Live:
    """Does nothing. The command line overrides it, and draws what happens."""

    def tasks(self, left: Sequence[Task]) -> None:
        """What is still to do; the first is next."""

    def stage(self, run: Run, what: str, total: int) -> None:
        """A part of a run begins: `what` is a word for it, `total` how many steps or items it has."""

    def advance(self, count: int = 1) -> None:
        """So many of them are done."""

    def logged(self, step: int, logs: Mapping[str, Any]) -> None:
        """What the trainer logged after a step."""

    def left(self) -> str:
        """How long the tasks after this one will take, if that is known."""
        return ""

    def ends(self) -> None:
        """The last stage of a run is over."""
