"""The finished runs of a study that can be compared with each other, and how a setting differs from another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from lfu.evaluation.intervals import Interval
from lfu.study.metrics import Metric, Read
from lfu.study.settings import Setting
from lfu.study.statistics import Sample, difference

Record = Mapping[str, Any]
Records = dict[str, dict[int, Record]]  # label -> seed -> a run's record


@dataclass(frozen=True)
class Scores:
    """The finished runs of one mode (equal steps, or equal time).

    Attributes:
        settings: all that are compared, whether or not a run of theirs is finished.
        base: the untouched model's record.
        failed: the labels of the settings of which a run failed.
        readers: the metrics, and how each is read.
    """

    settings: Sequence[Setting]
    base: Record
    records: Records
    failed: AbstractSet[str]
    readers: Mapping[Metric, Read]

    @property
    def ranked(self) -> tuple[list[str], list[int]]:
        """(the settings that can be ranked: those of which no run failed; the seeds that all of them have finished).

        A mean over the seeds that survived is none over all of them: what failed may have failed because the seed was
        hard.
        """
        labels = [label for label in self.records if label not in self.failed]
        seeds = self.records[labels[0]] if labels else ()
        return labels, [seed for seed in seeds if all(seed in self.records[label] for label in labels)]

    def of(self, label: str, read: Read) -> dict[int, Sample]:
        """seed -> a setting's scores."""
        return {seed: read(record["measures"]) for seed, record in self.records.get(label, {}).items()}

    def difference(self, label: str, rival: str | None, read: Read, level: float = 0.95) -> Interval | None:
        """A setting minus a rival, on the seeds that both have finished; None where there are none.

        Args:
            rival: None: the untouched model.
        """
        ours = self.of(label, read)
        base = dict.fromkeys(ours, read(self.base["measures"]))
        theirs = base if rival is None else self.of(rival, read)
        pairs = [(one, theirs[seed]) for seed, one in ours.items() if seed in theirs]
        return difference(*map(list, zip(*pairs)), level=level) if pairs else None
