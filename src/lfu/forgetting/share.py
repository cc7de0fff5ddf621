"""How many items are asked, and at which readings, so that measuring takes at most a share of the run's time."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lfu.forgetting.items import WRITTEN

LEAST = 16  # items of a set that are always asked, if it has so many: fewer say nothing
PAGE = 1.0  # seconds kept for the page
TYPICAL = 256  # tokens of a training row, where nothing tells


@dataclass
class Share:
    """Keeps measuring within `share` of a run's time: by fewer items, then by fewer readings.

    The untouched model may take a fifth of it. What it was asked is the most that a reading can ask. Each reading asks
    the part that fits into its share of the rest; to keep the curve steady, the part grows only by half or more. Where
    even the least part does not fit, readings are left out, and those that remain are spread evenly over the run.
    """

    share: float | None  # of the run's time, between 0 and 1; None: ask everything, whatever it takes
    sizes: dict[str, int]  # name of a set -> number of its items; after `plan` those that the untouched model is asked
    each: dict[str, float] = field(default_factory=dict)  # name of a set -> seconds per item, as last measured
    part: float = 1.0  # of the items, 0 to 1
    short: bool = False  # whether texts are cut short, too
    spent: float = 0.0  # seconds of measuring so far, earlier sessions of a resumed run among them
    trained: float = 0.0  # seconds of training, likewise
    first: int = 0  # the step at which the clock began
    last: int = 0  # that of the newest reading

    def __post_init__(self) -> None:
        self._since = time.monotonic()

    def kept(self) -> dict[str, Any]:
        """What a resumed run needs: the attributes, with the training up to now."""
        self.trained += time.monotonic() - self._since
        self._since = time.monotonic()
        return {name: value for name, value in vars(self).items() if name not in ("share", "_since")}

    def measured(self, seconds: float) -> None:
        """The last `seconds` went into measuring, and not into training."""
        self.spent += seconds
        self._since += seconds

    def counts(self, part: float | None = None) -> dict[str, int]:
        """Name -> number of items to ask."""
        part = self.part if part is None else part
        return {name: min(size, max(LEAST, int(part * size))) for name, size in self.sizes.items()}

    def seconds(self, part: float | None = None) -> float:
        """What asking them takes."""
        return sum(self.each[name] * count for name, count in self.counts(part).items())

    def plan(self, run_seconds: float, writing: float) -> None:
        """Decides what the untouched model is asked, which is all that there is from then on.

        It writes no text of its own where that takes more than a tenth of the share, and texts are cut short where
        there is no time for the fewest items at the start and the end. Both arguments are in seconds.
        """
        if self.share is not None:
            allowed = self.share * run_seconds - PAGE
            if writing > allowed / 10:
                self.sizes = self.sizes | {WRITTEN: 0}
            self.part, self.short = self._fitting(allowed / 5), 2 * self.seconds(0.0) > allowed
        self.sizes, self.part = self.counts(), 1.0

    def due(self, step: int, steps: int, to_come: float, fewest: int = 1, useful: bool = True) -> bool:
        """Whether there is time for a reading at `step` of `steps`. Sets the part to what the rest of the run allows.

        With this one the run would like to have `to_come` more; `fewest` are taken even if there is no time for them.
        One that is not `useful` is left out first.
        """
        if self.share is None or step <= self.first:
            return True
        training = self.trained + time.monotonic() - self._since
        whole = training / (step - self.first) * (steps - self.first)
        left = self.share * whole - self.spent - PAGE
        part = self._fitting(left / max(1.0, to_come))
        if part < self.part or part > 1.5 * self.part:
            self.part = part
        fit = int(left / self.seconds())
        return fit >= to_come or (useful and (step - self.last) * max(fewest, fit) >= steps - self.last)

    def _fitting(self, seconds: float) -> float:
        """The largest part that is asked in so many seconds; 0 where none is."""
        return max((i / 512 for i in range(513) if self.seconds(i / 512) <= seconds), default=0.0)

    def told(self) -> str:
        """What measuring took, for the user."""
        self.kept()
        part = self.spent / (self.trained + self.spent)
        line = f"measuring took {self.spent:.1f} s, {100 * part:.1f} % of the run"
        if self.share is None or part <= self.share:
            return line
        allows = math.ceil(100 * part) / 100
        return (
            f"{line}, more than the {100 * self.share:.3g} % asked for: in so short a run even the fewest and shortest "
            f"items that say something take longer; share_of_time={allows} (--forgetting_share {allows}) allows it"
        )


def tokens_per_step(args: Any, dataloader: Any) -> float:
    """Tokens that this process trains on in an update, by the first rows of the data; a guess where they don't tell."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    data: Any = getattr(dataloader, "dataset", None)
    try:
        lengths = [_tokens(data[i]) for i in range(min(16, len(data)))]
    except Exception:  # no length or index; or a data set of the user's own, which may do anything out of turn
        lengths = []
    known = [length for length in lengths if length]
    return rows * (sum(known) / len(known) if known else TYPICAL)


def _tokens(row: Any) -> int:
    """All token ids of a row: TRL's DPO rows have several lists."""
    lists = [value for name, value in row.items() if name.endswith("ids")] if isinstance(row, Mapping) else []
    return sum(len(value) for value in lists if hasattr(value, "__len__"))
