"""The finished runs of a study that can be compared with each other, and how a setting differs from another one."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from lfu.evaluation.intervals import Interval
from lfu.study.choose import compared_with
from lfu.study.metrics import Metric, Read
from lfu.study.settings import Setting
from lfu.study.statistics import Sample, difference

Record = Mapping[str, Any]
Records = dict[str, dict[int, Record]]  # label -> seed -> a run's record


@dataclass(frozen=True)
class Scores:
    """The finished runs of one mode (equal steps, or equal time)."""

    settings: Sequence[Setting]  # all that are compared, whether or not a run of theirs is finished
    base: Record  # the untouched model's
    records: Records
    failed: AbstractSet[str]  # labels of settings of which a run failed
    readers: Mapping[Metric, Read]  # how each metric is read

    @property
    def with_untouched(self) -> Records:
        return {"untouched": {0: self.base}, **self.records}

    @property
    def ranked(self) -> tuple[list[str], list[int]]:
        """(the settings of which no run failed; the seeds that all of them have finished).

        What failed may have failed because the seed was hard: a mean over those that survived is none over all.
        """
        labels = [label for label in self.records if label not in self.failed]
        seeds = self.records[labels[0]] if labels else ()
        return labels, [seed for seed in seeds if all(seed in self.records[label] for label in labels)]

    def rival(self, label: str) -> Setting | None:
        """The plain SFT that a setting is compared with; None: the untouched model."""
        return compared_with(next(one for one in self.settings if one.label == label), self.settings)

    def of(self, label: str, read: Read) -> dict[int, Sample]:
        """seed -> a setting's scores."""
        return {seed: read(record["measures"]) for seed, record in self.records.get(label, {}).items()}

    def difference(self, label: str, rival: Setting | None, read: Read, level: float = 0.95) -> Interval | None:
        """A setting minus a rival (None: the untouched model), on the seeds that both have finished; None without."""
        ours = self.of(label, read)
        theirs = self.of(rival.label, read) if rival else dict.fromkeys(ours, read(self.base["measures"]))
        pairs = [(one, theirs[seed]) for seed, one in ours.items() if seed in theirs]
        return difference(*map(list, zip(*pairs)), level=level) if pairs else None
