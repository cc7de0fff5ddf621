"""Time: interleaved rounds, each variant beside SFT, medians of paired ratios, and a deadline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stepcost.variants import Run


class Deadline:
    """`minutes` from now; None: never."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; infinite where there is no limit."""
        return float("inf") if self.end is None else self.end - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.left <= 0

    def within(self, seconds: float | None) -> Deadline:
        """The earlier of this one and `seconds` from now; None: this one."""
        return self if seconds is None else Deadline(min(self.left, seconds) / 60)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Run, model: Any, device: str = "cpu", clock: str = "wall") -> float:
    """Seconds of one micro-batch, the mean over a sample of them.

    Args:
        clock: `wall`, or `cpu`, this process's processor time: what a step costs on one thread of a machine that others
            use too. On a GPU neither: the time between two events, all kernels done.
    """
    model.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run.sample()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000 / run.calls
    now = CLOCKS[clock]
    start = now()
    run.sample()
    return (now() - start) / run.calls


def interleave(
    samples: Mapping[str, Callable[[], float]], rounds: int, deadline: Deadline, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Each of `samples` once a round; the first round warms up and is thrown away.

    A round that the deadline cuts is thrown away too, so that all lists stay paired. Lists may be empty.
    """
    taken: dict[str, list[float]] = {name: [] for name in samples}
    for round_ in range(rounds + 1):
        spent = {}
        for name, sample in samples.items():
            if deadline.passed:
                return taken
            spent[name] = sample()
            say(f"round {round_}/{rounds} {name:18} {spent[name]:8.3f} s")
        if round_:
            for name, value in spent.items():
                taken[name].append(value)
    return taken


def paired(taken: Mapping[str, list[float]], *to: str) -> dict[str, list[float]]:
    """Each one's time over that of `to` together in the same round, a value a round."""
    base = [sum(times) for times in zip(*(taken[name] for name in to))]
    return {name: [t / s for t, s in zip(times, base, strict=True)] for name, times in taken.items()}


def paired_ratios(taken: Mapping[str, list[float]], *to: str) -> dict[str, float]:
    """Median over rounds of `paired`."""
    return {name: statistics.median(ratios) for name, ratios in paired(taken, *to).items()}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one value that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
