"""The test bed's report: what each method gained and forgot, against all that plain SFT reaches."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lfu.report.blocks import Block, Figure, Heading, Paragraph, Table, View
from lfu.report.probe_figures import GRID, MARKERS, PALETTE, draw
from lfu.study.choose import pareto_front

Summary = dict[Any, Any]  # `family`, and (where, what) -> values over seeds
MEASURES = (
    ("target", "accuracy"),
    ("reworded", "accuracy"),
    ("others", "accuracy"),
    ("target", "nll"),
    ("others", "nll"),
)


def view(record: Mapping[str, Any]) -> View:
    """Title, verdict and blocks from a record of kind `testbed`."""
    runs, base = record["results"]["runs"], record["results"]["base"]
    summary = summarise(runs)
    chosen = _chosen_table(summary, base)
    at_chosen: list[Block] = [Heading("Each method at its chosen setting"), chosen] if chosen else []
    return View(
        title="Test bed: gain and forgetting, measured exactly",
        verdict=verdict(summary, base),
        blocks=[
            Paragraph(_what(record["settings"])),
            Figure(
                "gain_and_forgetting",
                draw((9, 6.4), lambda figure: _scatter(figure, summary, base)),
                "Accuracy on the target against accuracy on the other skills, one point a setting, one colour a method",
                "Means over seeds. Right: learned more. Up: kept more. The grey line is the front of all that SFT "
                "reaches by learning rate and epochs alone: a method earns its place above it.",
            ),
            *at_chosen,
            Heading("All settings"),
            _table(summary, base),
        ],
    )  # fmt: skip


def _what(settings: Mapping[str, Any]) -> str:
    return (
        f"A Llama of a million parameters learned seven skills from scratch ({settings['steps']:,} steps). An eighth, "
        f"the target, a composition of two of them, was then fine-tuned on {settings['rows']} rows, all weights, by "
        f"each setting, over {settings['seeds']} seeds (rows, order, all that is random; the base model is one). "
        "Target: new inputs of the target skill, asked as in training. Reworded: by its other two commands. Others: "
        "the mean over the seven other skills, which fine-tuning never sees, but for replay, which mixes rows "
        "of them in, other ones than are tested (and makes more updates, as epochs are equal). Accuracy: share of "
        "exactly right answers."
    )


def summarise(runs: list[Mapping[str, Any]]) -> dict[str, Summary]:
    """Setting -> `family`, and for each measure its values over seeds, in the order of the seeds."""
    found: dict[str, Summary] = {}
    for run in sorted(runs, key=lambda r: r["seed"]):
        entry = found.setdefault(run["name"], {"family": run["family"], **{measure: [] for measure in MEASURES}})
        for where, what in MEASURES:
            entry[where, what].append(run["scores"][where][what])
    return found


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other is at least as good in both and better in one; by the first coordinate."""
    labelled = {str(point): point for point in points}
    return [labelled[label] for label in pareto_front(labelled)]


def ahead_of_sft(summary: Mapping[str, Summary], base: Mapping[str, Any]) -> dict[str, list[float]]:
    """Setting -> for each seed, how far it is ahead of all that plain SFT reaches, in shares of 1.

    The yardstick is the seed's own front of plain SFT over learning rates and epochs, the untouched model at its left
    end, straight lines between. A setting is ahead by t if it could lose t of the target and t of the other skills
    before plain SFT does as well; behind by t (negative) if it would need t more of both. It is the additive epsilon
    indicator (Zitzler et al., IEEE Trans. Evol. Comput. 7, 2003), which is as fair where the front is steep as where
    it is flat. 0 for what lies on the front.
    """
    point = lambda entry, seed: (entry["target", "accuracy"][seed], entry["others", "accuracy"][seed])
    start = (base["target"]["accuracy"], base["others"]["accuracy"])
    plain = [entry for entry in summary.values() if entry["family"].startswith("sft")]
    found: dict[str, list[float]] = {name: [] for name in summary}
    for seed in range(len(summary["sft"]["target", "accuracy"])):
        edge = front([start, *(point(entry, seed) for entry in plain)])
        for name, entry in summary.items():
            found[name].append(_ahead(point(entry, seed), edge))
    return found


def _ahead(point: tuple[float, float], edge: list[tuple[float, float]]) -> float:
    """The t for which `point - (t, t)` lies on the edge, by bisection: moving down the diagonal crosses it once."""
    targets, others = [x for x, _ in edge], [y for _, y in edge]
    low, high = -1.0, 1.0
    for _ in range(40):
        t = (low + high) / 2
        x, y = point[0] - t, point[1] - t
        if x > targets[-1] or y > float(np.interp(x, targets, others)):
            low = t
        else:
            high = t
    return round((low + high) / 2, 9)


def chosen_of(family: str, summary: Mapping[str, Summary], ahead: Mapping[str, list[float]], choosing: int) -> str:
    """The family's setting that is highest ahead of SFT in the first `choosing` seeds, in the mean."""
    names = [name for name, entry in summary.items() if entry["family"] == family]
    return max(names, key=lambda name: fmean(ahead[name][:choosing]))


def families_of(summary: Mapping[str, Summary]) -> list[str]:
    """The curves of methods other than plain SFT, in order."""
    return list(dict.fromkeys(e["family"] for e in summary.values() if not e["family"].startswith("sft")))


def choosing_seeds(seeds: int) -> int:
    """How many of the seeds choose a setting; the others are what is reported. None where there is one alone."""
    return seeds // 3 or seeds // 2


def verdict(summary: Mapping[str, Summary], base: Mapping[str, Any]) -> list[str]:
    """What plain SFT forgot, and which methods, their settings chosen on other seeds, are ahead of it."""
    sft = summary["sft"]
    seeds = len(sft["target", "accuracy"])
    lines = [
        f"Plain SFT got {fmean(sft['target', 'accuracy']):.1%} of the target and kept "
        f"{fmean(sft['others', 'accuracy']):.1%} of the other skills (means over seeds)."
    ]
    first = choosing_seeds(seeds)
    if not first:
        return [*lines, "With one seed nothing can be chosen on other seeds than it is reported on."]
    ahead = ahead_of_sft(summary, base)
    picked = [chosen_of(family, summary, ahead, first) for family in families_of(summary)]
    sure = [name for name in picked if min(ahead[name][first:]) > 0]
    worse = [name for name in picked if max(ahead[name][first:]) < 0]
    gained = lambda name: f"{name} ({100 * fmean(ahead[name][first:]):+.1f} points)"
    told = f"in all {seeds - first} seeds that did not choose"
    lines.append(
        f"Ahead of all that plain SFT reaches by learning rate and epochs, {told}: "
        f"{', '.join(map(gained, sure)) or 'no method'}."
    )
    if worse:
        lines.append(f"Behind it, {told}: {', '.join(map(gained, worse))}.")
    return lines


def _scatter(figure: Any, summary: Mapping[str, Summary], base: Mapping[str, Any]) -> None:
    axis = figure.add_subplot()
    percent = lambda entry, where: 100 * fmean(entry[where, "accuracy"])
    plain = [
        (percent(e, "target"), percent(e, "others")) for e in summary.values() if e["family"].startswith("sft")
    ]  # fmt: skip
    start = (100 * base["target"]["accuracy"], 100 * base["others"]["accuracy"])
    edge = front([start, *plain])
    axis.plot(*zip(*edge), color=PALETTE[0], lw=6, alpha=0.3, label="front of plain SFT", zorder=1)
    axis.scatter(*zip(*plain), color=PALETTE[0], s=26, label="sft, all settings", zorder=2)
    families = families_of(summary)
    for number, family in enumerate(families):
        points = [(percent(e, "target"), percent(e, "others")) for e in summary.values() if e["family"] == family]
        axis.plot(
            *zip(*points), color=PALETTE[1 + number % (len(PALETTE) - 1)], marker=MARKERS[number % len(MARKERS)],
            lw=1, ms=6, label=family, zorder=3,
        )  # fmt: skip
    axis.scatter(*[[value] for value in start], marker="*", s=160, color="black", label="before fine-tuning", zorder=4)
    axis.set_xlabel("target skill: exactly right answers (%)")
    axis.set_ylabel("other skills: exactly right answers (%)")
    axis.grid(color=GRID, lw=0.8)
    axis.legend(frameon=False, fontsize=8, ncol=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _table(summary: Mapping[str, Summary], base: Mapping[str, Any]) -> Table:
    cell = lambda values, unit: f"{unit(fmean(values))} ± {unit(stdev(values)) if len(values) > 1 else '-'}"
    percent, plain = (lambda x: f"{100 * x:.1f}"), (lambda x: f"{x:.3f}")
    rows = [
        [
            "before fine-tuning",
            *(percent(base[w][m]) if m == "accuracy" else plain(base[w][m]) for w, m in MEASURES),
            "",
        ]
    ]
    ahead = ahead_of_sft(summary, base)
    for name, entry in summary.items():
        cells = [cell(entry[w, m], percent if m == "accuracy" else plain) for w, m in MEASURES]
        rows.append([name, *cells, cell(ahead[name], lambda x: f"{100 * x:+.1f}")])
    return Table(
        columns=["setting", "target %", "reworded %", "others %", "target NLL", "others NLL", "ahead of SFT"],
        rows=rows,
        caption="Mean ± standard deviation over seeds; NLL in nats a token.",
        note=_AHEAD,
    )


def _chosen_table(summary: Mapping[str, Summary], base: Mapping[str, Any]) -> Table | None:
    """Each method at the setting that the first seeds chose, on the other seeds."""
    ahead = ahead_of_sft(summary, base)
    seeds = len(ahead["sft"])
    first = choosing_seeds(seeds)
    if not first:
        return None
    rows = []
    for family in families_of(summary):
        name = chosen_of(family, summary, ahead, first)
        entry, gain = summary[name], ahead[name][first:]
        shares = [f"{100 * fmean(entry[where, 'accuracy'][first:]):.1f}" for where in ("target", "reworded", "others")]
        spread = f" ± {100 * stdev(gain):.1f}" if len(gain) > 1 else ""
        positive = f"{sum(x > 0 for x in gain)} of {len(gain)}"
        rows.append([name, *shares, f"{100 * fmean(gain):+.1f}{spread}", positive])
    return Table(
        columns=["setting", "target %", "reworded %", "others %", "ahead of SFT", "seeds ahead"],
        rows=rows,
        caption=f"Settings chosen on seeds 0 to {first - 1}, figures of the other {seeds - first}.",
        note=_AHEAD,
    )


_AHEAD = (
    "Ahead of SFT, in points: how much of the target and of the other skills at once a setting could lose before plain "
    "SFT, with the best of its learning rates and epochs in the same seed, does as well. Negative: behind."
)
