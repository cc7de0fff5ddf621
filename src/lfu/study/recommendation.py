"""What is recommended, by the rows that choose, and how it differs from plain SFT on the rows that chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lfu.evaluation.intervals import Interval
from lfu.study import metrics
from lfu.study.choose import Candidate, candidate, compared_with, held_against
from lfu.study.kinds import turn
from lfu.study.metrics import Metric, Read
from lfu.study.plan import UNTOUCHED, Plan
from lfu.study.statistics import difference

Records = dict[str, dict[int, dict[str, Any]]]  # label -> seed -> a run's record


@dataclass(frozen=True)
class KeptChange:
    """The difference of a kept set to what a setting is held against; `sign` is +1 where more is better."""

    value: float
    low: float
    high: float
    level: float
    sign: int

    @property
    def worse(self) -> bool:
        """Whether it is so beyond the noise."""
        return self.high < 0 if self.sign > 0 else self.low > 0


@dataclass(frozen=True)
class Chosen:
    """What the choice goes by for one setting.

    Attributes:
        loss: on the validation rows, over the seeds that all settings have; None where a run failed.
        against: what it is held against -> kept set -> the change, on the items that choose.
    """

    loss: float | None
    against: dict[str, dict[str, KeptChange]]

    @property
    def forgets_more(self) -> bool:
        """Whether any kept set is worse, beyond the noise, than that of anything that it is held against."""
        return any(change.worse for each in self.against.values() for change in each.values())


@dataclass(frozen=True)
class Validation:
    """What the choosing rows say: the untouched model's loss, each setting's, and over which seeds."""

    untouched: float
    settings: dict[str, Chosen]
    seeds: list[int]


@dataclass(frozen=True)
class Recommendation:
    """The setting that the choosing rows prefer.

    Attributes:
        mode: of the runs that it was chosen by.
        candidate, yardstick: what was chosen, and the plain SFT that it is compared with.
        better, worse, same: metrics by how the candidate compares on the rows that chose nothing.
        sure: metric -> the difference with the interval by which `better` is told.
        label: what is recommended: the candidate only if it is better in something.
        excluded: settings with a lower loss that forget more than they may.
        runner_up: what would have been chosen without the candidate, and how much higher its loss is.
    """

    mode: str
    candidate: str
    yardstick: str
    learning_rate: str
    better: list[str]
    worse: list[str]
    same: list[str]
    sure: dict[str, Interval]
    label: str
    seeds: int
    excluded: list[str]
    runner_up: dict[str, Any] | None


def main_mode(gathered: Mapping[str, Records]) -> str:
    """The mode whose runs choose."""
    return "steps" if "steps" in gathered else "time"


def in_common(records: Records, failed: AbstractSet[str]) -> tuple[list[str], list[int]]:
    """(the settings that can be ranked: those of which no run failed; the seeds that all of them have finished).

    A mean over the seeds that survived is none over all of them: what failed may have failed because the seed was hard.
    """
    labels = [label for label in records if label not in failed]
    seeds = records[labels[0]] if labels else ()
    return labels, [seed for seed in seeds if all(seed in records[label] for label in labels)]


def samples(records: Mapping[int, Mapping[str, Any]], read: Read) -> dict[int, Any]:
    """seed -> the scores."""
    return {seed: read(record["measures"]) for seed, record in records.items()}


def paired(ours: Mapping[int, Any], theirs: Mapping[int, Any], level: float = 0.95) -> Interval | None:
    """Ours minus theirs on the seeds that both have finished; None where there are none."""
    seeds = [seed for seed in ours if seed in theirs]
    return difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], level=level) if seeds else None


def validation(plan: Plan, base: Mapping[str, Any], records: Records, failed: AbstractSet[str]) -> Validation | None:
    """What the choice goes by; None where the untouched model has no scores. A setting of which a run failed is not
    chosen."""
    if "validation" not in base["measures"]:
        return None
    labels, seeds = in_common(records, failed)
    found: dict[str, Chosen] = {}
    for setting in plan.settings:
        each = records.get(setting.label)
        if not each:
            continue
        against = {}
        for rival in held_against(setting, plan.settings):
            theirs = records.get(rival.label, {}) if rival else dict.fromkeys(each, base)
            against[rival.label if rival else UNTOUCHED.label] = _kept_changes(each, theirs)
        losses = [metrics.validation(each[seed]["measures"]).value for seed in seeds if setting.label in labels]
        found[setting.label] = Chosen(fmean(losses) if losses else None, against)
    return Validation(metrics.validation(base["measures"]).value, found, seeds)


def _kept_changes(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> dict[str, KeptChange]:
    """Kept set -> the difference on the items that choose."""
    found = {}
    for name, scores in next(iter(ours.values()))["measures"].get("kept", {}).items():
        read = metrics.kept_for_choice(name)
        change = paired(samples(ours, read), samples(theirs, read))
        if change is not None:
            found[name] = KeptChange(**asdict(change), sign=1 if scores["kind"] == "choice" else -1)
    return found


def recommended(
    plan: Plan, chosen: Validation | None, against_sft: Mapping[str, Mapping[str, Any]], records: Records, mode: str,
    readers: Mapping[Metric, Read],
) -> Recommendation | None:  # fmt: skip
    """The setting that the choosing rows prefer; None where there is nothing to choose from.

    It is better where the interval of 1 - 0.05 / m leaves out zero, of m metrics (Bonferroni): being better in any of
    them is enough to be recommended, and by chance it happens in one study of twenty. It is worse where that of 95 %
    does: the doubt is plain SFT's to gain.

    Args:
        against_sft: metric -> label -> the difference to plain SFT at 95 %.
        records: of the runs of `mode`.
    """
    judged = {label: one for label, one in (chosen.settings if chosen else {}).items() if one.loss is not None}
    by_label = {setting.label: setting for setting in plan.settings}
    candidates = [
        Candidate(label, by_label[label].method, one.loss or 0.0, one.forgets_more) for label, one in judged.items()
    ]
    best = candidate(candidates)
    if best is None or chosen is None:
        return None
    setting = by_label[best.label]
    rival = compared_with(setting, plan.settings) or setting
    differences = {key: each[best.label] for key, each in against_sft.items() if best.label in each}
    sure = _surely(records, best.label, rival.label, readers, 1 - 0.05 / max(1, len(readers)))
    by_key = {metric.key: metric.as_dict() for metric in readers}
    better = [key for key in differences if turn(by_key[key], asdict(sure[key])) > 0]
    worse = [key for key, each in differences.items() if turn(by_key[key], each) < 0]
    return Recommendation(
        mode=mode,
        candidate=best.label,
        yardstick=rival.label,
        learning_rate=plan.rates[setting],
        better=better,
        worse=worse,
        same=[key for key in differences if key not in (*better, *worse)],
        sure=sure,
        label=best.label if rival == setting or better else rival.label,
        seeds=len(chosen.seeds),
        excluded=[one.label for one in candidates if one.forgets_more and one.validation < best.validation],
        runner_up=_runner_up(records, best, candidates, chosen.seeds),
    )


def _surely(
    records: Records, ours: str, theirs: str, readers: Mapping[Metric, Read], level: float
) -> dict[str, Interval]:
    """Metric -> the difference of two settings with an interval of that level; none of a setting to itself."""
    if ours == theirs:
        return {}
    each = {
        metric.key: paired(samples(records.get(ours, {}), read), samples(records.get(theirs, {}), read), level)
        for metric, read in readers.items()
    }
    return {key: interval for key, interval in each.items() if interval is not None}


def _runner_up(
    records: Records, best: Candidate, candidates: Sequence[Candidate], seeds: Sequence[int]
) -> dict[str, Any] | None:
    """What would have been chosen without the best, and its loss on the validation rows minus the best's."""
    second = candidate([each for each in candidates if each.label != best.label])
    if second is None:
        return None
    losses = [
        [metrics.validation(records[label][seed]["measures"]) for seed in seeds] for label in (second.label, best.label)
    ]
    return {"label": second.label, **asdict(difference(*losses))}
