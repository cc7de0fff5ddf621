"""The report of `lfu evaluate`: scores by category and task, the rank, what was gained and lost, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from lfu.report.blocks import Block, Figure, Heading, Items, Paragraph, Table, View
from lfu.report.probe_figures import draw, look, row_names, shorter
from lfu.report.probe_text import and_, estimate, number, p_value, sign

SMALL = 400  # items: below, the 95 % interval of a share is up to 10 points wide and more


def view(record: Mapping[str, Any]) -> View:
    """The report, from the record alone."""
    results, labels = record["results"], list(record["models"])
    blocks: list[Block] = [Heading("By category"), _categories_table(results, labels)]
    if results["ranks"]:
        blocks.append(_ranks_table(results))
    blocks += [Heading("By task"), _tasks_table(results, labels), _picture(results, labels)]
    if results["forgetting"]:
        blocks += [Heading("Gained and lost"), _changes_table(results)]
        blocks += [_lost_items(results, label, name) for label, tasks in results["lost"].items() for name in tasks]
    if results["missing"]:
        blocks += [Heading("Not measured"), _missing_table(results)]
    blocks += [Heading("To check"), Paragraph(_how_to_check(record))]
    return View(f"Evaluation: {and_(labels)}", _verdict(results), blocks)


# --- sentences -------------------------------------------------------------------------------------------------------


def _verdict(results: Mapping[str, Any]) -> list[str]:
    sentences = [_against_base(results, label) for label in results["forgetting"]]
    if results["ranks"]:
        order = sorted(results["ranks"].items(), key=lambda pair: pair[1])
        ranked = ", ".join(f"{label} {rank:.2f}" for label, rank in order)
        sentences.append(f"Average rank over {_over(results)}: {ranked} (1 is best).")
    if not sentences:
        sentences.append(f"{len(results['tasks'])} tasks measured; with a base model (--base) the report compares.")
    if results["missing"]:
        partial = [name for name, category in results["categories"].items() if category["missing"]]
        names = dict.fromkeys(one["task"] for one in results["missing"])
        which = f": {and_(partial)} {'is' if len(partial) == 1 else 'are'} averaged without" if partial else ""
        sentences.append(f"Not measured: {and_(list(names))}{which}.")
    if few := [row["items"] for row in results["tasks"].values() if row["items"] < SMALL]:
        half = 100 / min(few) ** 0.5  # 1.96 sqrt(p (1 - p) / n) at p = 1/2
        many = "" if min(few) == 1 else "s"
        sentences.append(f"With {min(few)} item{many} the interval of a score reaches {half:.0f} points either way.")
    return sentences


def _against_base(results: Mapping[str, Any], label: str) -> str:
    """'tuned against base: higher on x (+3.0 [1.0, 5.0]); no difference beyond the noise on y and z.'"""
    parts = []
    for turn, words in ((1, "higher on"), (-1, "lower on"), (0, "no difference beyond the noise on")):
        changes = {name: c["net"] for name, c in results["forgetting"][label].items() if sign(c["net"]) == turn}
        if changes:
            told = [f"{n} ({estimate(c, '{:+.1f}', scale=100)} points)" if turn else n for n, c in changes.items()]
            parts.append(f"{words} {and_(told)}")
    return f"{label} against {results['base']}: {'; '.join(parts) or 'no task in common'}."


def _over(results: Mapping[str, Any]) -> str:
    """The categories that the rank is over, and the tasks of those that aren't whole."""
    told = []
    for name, tasks in results["ranked_over"].items():
        whole = results["categories"][name]["complete"]
        told.append(name if whole else f"{name} ({and_(tasks)} alone)")
    return and_(told)


def _how_to_check(record: Mapping[str, Any]) -> str:
    by_hand = record["settings"].get("same with the harness alone", "")
    return (
        "Prompts, scoring and metrics are lm-evaluation-harness's own. Its own command gives the same figures, but for "
        f"rounding where its batches are others (with batch size 1 exactly the same): {by_hand}"
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def _categories_table(results: Mapping[str, Any], labels: Sequence[str]) -> Table:
    rows = []
    for name, category in results["categories"].items():
        over = ", ".join(category["tasks"]) or "nothing"
        missing = [f"without {', '.join(category['missing'])}"] if category["missing"] else []
        not_asked = [f"not asked for: {', '.join(category['not_asked'])}"] if category["not_asked"] else []
        left = f" ({'; '.join(missing + not_asked)})" if missing or not_asked else ""
        scores = [category["scores"][label] for label in labels]
        cells = ["-" if score is None else number(100 * score) for score in scores]
        rows.append([name if category["complete"] else f"{name}, partial", *cells, f"{over}{left}"])
    return Table(
        ["", *labels, "mean over"], rows, caption="Category averages, %",
        note="The mean over the tasks that every model has. A partial category lacks some of its tasks: it can't be "
        "compared with a whole one.",
    )  # fmt: skip


def _ranks_table(results: Mapping[str, Any]) -> Table:
    rows = [[label, f"{rank:.2f}"] for label, rank in sorted(results["ranks"].items(), key=lambda pair: pair[1])]
    return Table(
        ["", "average rank"], rows, caption="The paper's rank",
        note=f"Mean of the ranks by category average, over {_over(results)}; ties share the better place, as in the "
        "paper's Table 1. A rank says nothing about the size of a difference, or about noise.",
    )  # fmt: skip


def _tasks_table(results: Mapping[str, Any], labels: Sequence[str]) -> Table:
    rows = []
    for name, row in results["tasks"].items():
        scores = [row["scores"].get(label) for label in labels]
        cells = ["-" if score is None else estimate(score, scale=100) for score in scores]
        rows.append([name, *cells, row["metric"].removesuffix(",none"), str(row["items"]), str(row["fewshot"])])
    cut = {
        name: max(row["truncated"].values()) for name, row in results["tasks"].items() if any(row["truncated"].values())
    }
    warning = f" Prompts that were too long lost their beginning in {and_(list(cut))}." if cut else ""
    return Table(
        ["", *labels, "metric", "items", "examples"], rows, caption="Scores, % [95 % interval]",
        note="Wilson's interval for right or wrong, else a bootstrap over the items. examples: worked examples in each "
        f"prompt.{warning}",
    )  # fmt: skip


def _changes_table(results: Mapping[str, Any]) -> Table:
    rows = []
    for label, changes in results["forgetting"].items():
        for name, c in changes.items():
            counts = [str(c[key]) if key in c else "-" for key in ("kept", "lost", "gained", "never")]
            net = estimate(c["net"], "{:+.1f}", scale=100)
            p = p_value(c["mcnemar_p"]).removeprefix("p = ").removeprefix("p ") if "mcnemar_p" in c else "-"
            rows.append([f"{label}: {name}", *counts, net, p])
    count = sum(len(changes) for changes in results["forgetting"].values())
    chance = f" Of {count} such intervals about {count / 20:.1g} leave out the truth by chance." if count > 4 else ""
    return Table(
        ["", "kept", "lost", "gained", "never", "net, points", "McNemar's p"], rows,
        caption=f"Items against {results['base']}",
        note="lost: right before, wrong now. net: paired bootstrap, 95 %; p: exact two-sided McNemar test. Where items "
        f"are not just right or wrong there is the net alone.{chance}",
    )  # fmt: skip


def _missing_table(results: Mapping[str, Any]) -> Table:
    rows = [[one["task"], one["label"] or "all", one["why"]] for one in results["missing"]]
    return Table(["", "for", "why"], rows)


def _lost_items(results: Mapping[str, Any], label: str, task: str) -> Items:
    lost, base = results["lost"][label][task], results["base"]
    items = [
        {
            "question": one["question"], "expected": one["expected"],
            f"{base} gave": one["before"], f"{label} gave": one["after"],
        }
        for one in lost["items"]
    ]  # fmt: skip
    cut = f", the first {len(items)} of {lost['count']}" if lost["count"] > len(items) else ""
    return Items(f"{task}: what {label} lost{cut}", items)


# --- picture ---------------------------------------------------------------------------------------------------------


def _picture(results: Mapping[str, Any], labels: Sequence[str]) -> Figure:
    """Changes against the base where there is one, else the scores; one row a task."""
    base, tasks = results["base"], list(results["tasks"])
    if base:
        values = {label: {n: c["net"] for n, c in found.items()} for label, found in results["forgetting"].items()}
    else:
        values = {
            label: {n: row["scores"][label] for n, row in results["tasks"].items() if label in row["scores"]}
            for label in labels
        }

    def paint(figure: Picture) -> None:
        _dots(figure.subplots(), tasks, values, look(labels), base)

    png = draw((9, 1.4 + (0.3 + 0.2 * len(values)) * len(tasks)), paint)
    what = f"change against {base}, points" if base else "score, %"
    told = [
        f"{label} {name} {number(100 * one['value'])}" for label, found in values.items() for name, one in found.items()
    ]
    return Figure("tasks", png, f"{what}: {'; '.join(told)}", f"{what[0].upper()}{what[1:]}, with 95 % intervals.")


def _dots(axis: Axes, tasks: Sequence[str], values: Mapping[str, Any], style: Mapping[str, Any], base: Any) -> None:
    step = 0.7 / max(1, len(values))
    for place, (label, found) in enumerate(values.items()):
        colour = style[label]["color"]
        for height, name in enumerate(tasks):
            if name not in found:
                continue
            y = height + (place - (len(values) - 1) / 2) * step
            low, value, high = (100 * found[name][key] for key in ("low", "value", "high"))
            axis.plot([low, high], [y, y], color=colour, lw=2.4, solid_capstyle="butt", zorder=3)
            axis.plot(value, y, "o", color=colour, ms=7, zorder=4)
        axis.plot([], [], "o-", color=colour, label=shorter(label))
    row_names(axis, [shorter(name) for name in tasks], zero=bool(base))
    axis.set_xlabel("← worse      change, percentage points      better →" if base else "score, %")
    if len(values) > 1:
        axis.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
