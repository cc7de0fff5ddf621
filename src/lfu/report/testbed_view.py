"""The test bed's report: what each method gained and forgot, against all that plain SFT reaches."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from lfu.report.blocks import Figure, Heading, Paragraph, Table, View
from lfu.report.probe_figures import GRID, PALETTE, draw
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
    seeds = record["settings"]["seeds"]
    return View(
        title="Test bed: gain and forgetting, measured exactly",
        verdict=verdict(summary, seeds),
        blocks=[
            Paragraph(_what(record["settings"])),
            Figure(
                "gain_and_forgetting",
                draw((9, 6.4), lambda figure: _scatter(figure, summary, base)),
                "Accuracy on the target against accuracy on the other skills, one point a setting, one colour a method",
                "Means over seeds. Right: learned more. Up: kept more. The grey line is the front of all that SFT "
                "reaches by learning rate and epochs alone: a method earns its place above it.",
            ),
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
        "the mean over the seven other skills, which fine-tuning never sees. Accuracy: share of exactly right answers."
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


def above_front(point: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    """Whether none of `points` is at least as good in both coordinates."""
    return not any(q[0] >= point[0] and q[1] >= point[1] for q in points)


def verdict(summary: Mapping[str, Summary], seeds: int) -> list[str]:
    """What plain SFT forgot, and which methods reach what no SFT setting does."""
    point = lambda entry: (fmean(entry["target", "accuracy"]), fmean(entry["others", "accuracy"]))
    plain = [point(entry) for entry in summary.values() if entry["family"].startswith("sft")]
    better = [name for name, e in summary.items() if not e["family"].startswith("sft") and above_front(point(e), plain)]
    sft = summary["sft"]
    lines = [
        f"Plain SFT got {fmean(sft['target', 'accuracy']):.1%} of the target and kept "
        f"{fmean(sft['others', 'accuracy']):.1%} of the other skills (means over seeds)."
    ]
    if better:
        best = max(better, key=lambda name: sum(point(summary[name])))
        wins = sum(
            m > s for m, s in zip(summary[best]["others", "accuracy"], sft["others", "accuracy"])
        )  # fmt: skip
        target, others = point(summary[best])
        lines.append(
            f"{len(better)} of {len(summary) - len(plain)} settings of other methods reach what no SFT setting here "
            f"does in both at once. The best sum is {best}: {target:.1%} and {others:.1%}; it kept more than SFT in "
            f"{wins} of {seeds} seeds. (The best of many settings, picked on the test rows: what is possible, not what "
            "a search on other rows would find.)"
        )
    else:
        lines.append("No method reached what SFT with another learning rate or number of epochs does not.")
    return lines


def _scatter(figure: Any, summary: Mapping[str, Summary], base: Mapping[str, Any]) -> None:
    axis = figure.add_subplot()
    percent = lambda entry, where: 100 * fmean(entry[where, "accuracy"])
    plain = [
        (percent(e, "target"), percent(e, "others")) for e in summary.values() if e["family"].startswith("sft")
    ]  # fmt: skip
    edge = front(plain)
    axis.plot(*zip(*edge), color=PALETTE[0], lw=6, alpha=0.3, label="front of plain SFT", zorder=1)
    axis.scatter(*zip(*plain), color=PALETTE[0], s=26, label="sft, all settings", zorder=2)
    families = list(dict.fromkeys(e["family"] for e in summary.values() if not e["family"].startswith("sft")))
    markers = "os^Dv<>PX*"
    for number, family in enumerate(families):
        points = [(percent(e, "target"), percent(e, "others")) for e in summary.values() if e["family"] == family]
        axis.plot(
            *zip(*points), color=PALETTE[1 + number % (len(PALETTE) - 1)], marker=markers[number % len(markers)],
            lw=1, ms=6, label=family, zorder=3,
        )  # fmt: skip
    axis.scatter(
        [100 * base["target"]["accuracy"]], [100 * base["others"]["accuracy"]], marker="*", s=160, color="black",
        label="before fine-tuning", zorder=4,
    )  # fmt: skip
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
    sft = summary["sft"]["others", "accuracy"]
    for name, entry in summary.items():
        cells = [cell(entry[w, m], percent if m == "accuracy" else plain) for w, m in MEASURES]
        wins = sum(a > b for a, b in zip(entry["others", "accuracy"], sft))
        rows.append([name, *cells, "" if name == "sft" else f"{wins} of {len(sft)}"])
    return Table(
        columns=["setting", "target %", "reworded %", "others %", "target NLL", "others NLL", "kept more than SFT"],
        rows=rows,
        caption="Mean ± standard deviation over seeds; NLL in nats a token.",
        note="Kept more: seeds in which the other skills' accuracy is above that of setting sft.",
    )
