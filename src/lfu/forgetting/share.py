"""How many items a run can afford: measuring takes at most a share of its time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST = 16  # items of a set that are always asked, if it has so many: fewer say nothing
TYPICAL = 256  # tokens of a training row, where nothing tells


@dataclass
class Share:
    """Keeps measuring within `share` of a run's time, by the part of the items that is asked.

    The untouched model may take a fifth of it. What it was asked is the most that a reading can ask. Each reading asks
    the part that fits into its share of the rest; to keep the curve steady, the part grows only by half or more.

    Attributes:
        share: of the run's time, between 0 and 1; None: ask everything, whatever it takes.
        sizes: name of a set -> number of its items; after `plan` of those that the untouched model is asked.
        part: of the items, 0 to 1.
        spent: seconds measured so far, in earlier sessions of a resumed run too.
        each: seconds per item asked, by the newest measurement.
    """

    share: float | None
    sizes: Mapping[str, int]
    part: float = 1.0
    spent: float = 0.0
    each: float = 0.0

    def begin(self) -> None:
        """The run's clock starts."""
        self._start, self._here = time.monotonic(), 0.0

    def counts(self) -> dict[str, int]:
        """Name -> number of items to ask."""
        return self._counts(self.part)

    def _counts(self, part: float) -> dict[str, int]:
        return {name: min(size, max(LEAST, int(part * size))) for name, size in self.sizes.items()}

    def _fitting(self, seconds: float) -> float:
        """The largest part that is asked in so many seconds; 0 where none is."""
        fits = lambda part: self.each * sum(self._counts(part).values()) <= seconds
        return max((i / 512 for i in range(513) if fits(i / 512)), default=0.0)

    def plan(self, run_seconds: float) -> None:
        """Decides what the untouched model is asked, which is all that there is from then on."""
        if self.share is not None:
            self.part = self._fitting(self.share * run_seconds / 5)
        self.sizes, self.part = self.counts(), 1.0

    def afford(self, steps_done: int, steps: int, readings: float) -> bool:
        """Sets the part to what the rest of the run allows; False if even the least is too much.

        Args:
            steps_done: since `begin`.
            steps: of the whole run.
            readings: measurements still to come, this one too.
        """
        if self.share is None or not steps_done:
            return True
        training = time.monotonic() - self._start - self._here
        left = max(0.0, self.share * training / steps_done * steps - self.spent) / max(1.0, readings)
        part = self._fitting(left)
        if part < self.part or part > 1.5 * self.part:
            self.part = part
        return self.each * sum(self.counts().values()) <= left

    def add(self, seconds: float, asked: int = 0, asking: float = 0.0) -> None:
        """A measurement took `seconds`; asking `asked` items took `asking` of them."""
        self.each = asking / asked if asked else self.each
        self.spent += seconds
        self._here += seconds

    def told(self) -> str:
        """What measuring took, for the user."""
        whole = time.monotonic() - self._start
        line = f"measuring took {self.spent:.1f} s"
        if self._here < self.spent:  # a resumed run does not know how long its earlier sessions took
            return f"{line}, {self._here:.1f} s of the last {whole:.1f} s of the run"
        line += f", {100 * self._here / whole:.1f} % of the run"
        over = self.share is not None and self._here > self.share * whole
        return f"{line} (more than asked for: even the fewest items that say something take longer)" if over else line


def tokens_per_step(args: Any, dataloader: Any) -> float:
    """Tokens that this process trains on in an update, by the first rows of the data; a guess where they don't tell."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    data: Any = getattr(dataloader, "dataset", None)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return rows * TYPICAL
    try:
        lengths = [_tokens(data[i]) for i in range(min(16, len(data)))]
    except Exception:  # a data set of the user's own: it may do anything when it is asked out of turn
        lengths = []
    known = [length for length in lengths if length]
    return rows * (sum(known) / len(known) if known else TYPICAL)


def _tokens(row: Any) -> int:
    """The longest list of token ids in a row: TRL's DPO rows have several."""
    lists = [value for name, value in row.items() if name.endswith("ids")] if isinstance(row, Mapping) else []
    return sum(len(value) for value in lists if hasattr(value, "__len__"))
