"""What is recommended, by the rows that choose, and how it differs from plain SFT on the rows that chose nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from lfu.evaluation.intervals import Interval
from lfu.study import metrics
from lfu.study.choose import Chosen, candidate, held_against
from lfu.study.plan import UNTOUCHED
from lfu.study.scores import Scores
from lfu.study.settings import Setting
from lfu.study.statistics import difference


@dataclass(frozen=True)
class Validation:
    """What the choosing rows say: the untouched model's loss, each setting by its label, and over which seeds."""

    untouched: float
    settings: dict[str, Chosen]
    seeds: list[int]


@dataclass(frozen=True)
class Recommendation:
    """The setting that the choosing rows prefer."""

    mode: str  # of the runs that it was chosen by
    candidate: str  # what was chosen
    yardstick: str  # the plain SFT that it is compared with
    learning_rate: str
    better: list[str]  # metrics, on the rows that chose nothing; as `worse` and `same`
    worse: list[str]
    same: list[str]
    sure: dict[str, Interval]  # metric -> the difference by which `better` is told
    label: str  # what is recommended: the candidate only if it is better in something
    seeds: int
    excluded: list[str]  # settings with a lower loss that forget more than they may
    runner_up: dict[str, Any] | None  # what would have been chosen else, and how much higher its loss is


@dataclass(frozen=True)
class Ahead:
    """Where settings are ahead of the plain SFT that each is compared with."""

    comparisons: int  # settings that are compared, times metrics
    level: float  # of the intervals, 1 - 0.05 / comparisons (Bonferroni)
    settings: dict[str, dict[str, Interval]]  # label -> metric -> the difference, where ahead beyond it


Changes = Mapping[str, Mapping[str, Interval]]  # metric -> label -> the difference to plain SFT, at 95 %


def ahead_of_sft(scores: Scores, against_sft: Changes) -> Ahead:
    """Where any setting is ahead."""
    comparisons = sum(map(len, against_sft.values()))
    level = 1 - 0.05 / max(1, comparisons)
    found: dict[str, dict[str, Interval]] = {}
    for metric, read in scores.readers.items():
        for label in (label for label, change in against_sft[metric.key].items() if metric.turn(change) > 0):
            change = scores.difference(label, scores.rival(label), read, level)
            if change and metric.turn(change) > 0:
                found.setdefault(label, {})[metric.key] = change
    return Ahead(comparisons, level, found)


def validation(scores: Scores) -> Validation | None:
    """What the choice goes by; None without scores of the untouched model. None is chosen of which a run failed."""
    if "validation" not in scores.base["measures"]:
        return None
    found = {one.label: _chosen(scores, one) for one in scores.settings if scores.records.get(one.label)}
    return Validation(metrics.validation(scores.base["measures"]).value, found, scores.ranked[1])


def _chosen(scores: Scores, setting: Setting) -> Chosen:
    label, (labels, seeds) = setting.label, scores.ranked
    samples = scores.of(label, metrics.validation)
    worse = {
        name: -1 if each["kind"] == "choice" else 1 for name, each in scores.base["measures"].get("kept", {}).items()
    }
    against: dict[str, dict[str, Interval]] = {}
    for rival in held_against(setting, scores.settings):
        changes = {name: scores.difference(label, rival, partial(metrics.kept, name, True)) for name in worse}
        known = {name: change for name, change in changes.items() if change is not None}
        against[rival.label if rival else UNTOUCHED.label] = known
    forgets_more = any(change.sign == worse[name] for each in against.values() for name, change in each.items())
    loss = fmean(samples[seed].value for seed in seeds) if seeds and label in labels else None
    return Chosen(label, setting.method, loss, forgets_more, against)


def recommended(
    scores: Scores, chosen: Validation, against_sft: Changes, rates: Mapping[Setting, str], mode: str
) -> Recommendation | None:
    """The setting that the choosing rows prefer; None where there is nothing to choose from.

    It is better where the interval of 1 - 0.05 / m leaves out zero, of m metrics (Bonferroni): being better in any of
    them is enough to be recommended, and by chance it happens in one study of twenty. It is worse where that of 95 %
    does (`against_sft`): the doubt is plain SFT's to gain.
    """
    judged = list(chosen.settings.values())
    best = candidate(judged)
    if best is None or best.loss is None:
        return None
    setting = next(one for one in scores.settings if one.label == best.label)
    rival = scores.rival(best.label) or setting
    level = 1 - 0.05 / max(1, len(scores.readers))
    each = {} if rival == setting else scores.readers
    found = {metric.key: scores.difference(best.label, rival, read, level) for metric, read in each.items()}
    sure = {key: interval for key, interval in found.items() if interval is not None}
    known = [(metric, against_sft[metric.key][best.label]) for metric in each if metric.key in sure]
    better = [metric.key for metric, _ in known if metric.turn(sure[metric.key]) > 0]
    worse = [metric.key for metric, change in known if metric.turn(change) < 0]
    return Recommendation(
        mode=mode,
        candidate=best.label,
        yardstick=rival.label,
        learning_rate=rates[setting],
        better=better,
        worse=worse,
        same=[key for key in sure if key not in (*better, *worse)],
        sure=sure,
        label=best.label if rival == setting or better else rival.label,
        seeds=len(chosen.seeds),
        excluded=[one.label for one in judged if one.forgets_more and one.loss is not None and one.loss < best.loss],
        runner_up=_runner_up(scores, best, judged, chosen.seeds),
    )


def _runner_up(scores: Scores, best: Chosen, judged: Sequence[Chosen], seeds: Sequence[int]) -> dict[str, Any] | None:
    """What would have been chosen without the best, and its loss on the validation rows minus the best's."""
    second = candidate([each for each in judged if each is not best])
    if second is None:
        return None
    losses = [scores.of(label, metrics.validation) for label in (second.label, best.label)]
    return {"label": second.label, **asdict(difference(*([each[seed] for seed in seeds] for each in losses)))}
