"""Time: interleaved rounds, each variant beside SFT, medians of paired ratios, and a deadline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Callable[[], Any], model: Any, device: str = "cpu", calls: int = 1, clock: str = "wall") -> float:
    """Seconds of one micro-batch, the mean over `calls` of them.

    Args:
        clock: `wall`, or `cpu`, this process's processor time: what a step costs on one thread of a machine that others
            use too. On a GPU neither: the time between two events, all kernels done.
    """
    model.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000 / calls
    now = CLOCKS[clock]
    start = now()
    for _ in range(calls):
        run()
    return (now() - start) / calls


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


def paired_ratios(taken: Mapping[str, list[float]], to: str = "sft") -> dict[str, float]:
    """Median over rounds of each one's time over `to`'s in the same round."""
    pairs = {name: zip(times, taken[to], strict=True) for name, times in taken.items()}
    return {name: statistics.median(t / s for t, s in both) for name, both in pairs.items()}
