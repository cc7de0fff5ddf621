"""The report of `lfu evaluate`: scores by category and task, the rank, what was gained and lost, what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from lfu.report.blocks import Figure, View
from lfu.report.figures import draw, legend, look, row_names, whisker
from lfu.report.template import view_of_template
from lfu.report.text import and_, by_chance, estimate, number, p_value, shorter, sign, told

SMALL = 400  # items: below, the 95 % interval of a share is up to 10 points wide and more


def view(record: Mapping[str, Any]) -> View:
    results, labels = record["results"], list(record["models"])
    ranked = sorted((results["ranks"] or {}).items(), key=lambda pair: pair[1])
    ranks = [[label, f"{rank:.2f}"] for label, rank in ranked]
    tasks, forgotten = results["tasks"], results["forgetting"]

    def answers(label: str, lost: Mapping[str, Any]) -> list[dict[str, str]]:
        return [
            {"question": one["question"], "expected": one["expected"], f"{results['base']} gave": one["before"],
             f"{label} gave": one["after"]}
            for one in lost["items"]
        ]  # fmt: skip

    return view_of_template(
        "evaluate", record, labels=labels, SMALL=SMALL, turns=_turns, over=_over(results), answers=answers,
        ranked=", ".join(f"{label} {rank}" for label, rank in ranks),
        ranks=[["", "average rank"], *ranks] if ranks else [],
        partial=[name for name, category in results["categories"].items() if category["missing"]],
        fewest=min((row["items"] for row in tasks.values()), default=SMALL),
        categories=_categories(results, labels), tasks=_tasks(results, labels), changes=_changes(results),
        cut=[name for name, row in tasks.items() if any(row["truncated"].values())],
        chance=by_chance(sum(map(len, forgotten.values()))), picture=_picture(results, labels),
        missing=[["", "for", "why"], *([one["task"], one["label"] or "all", one["why"]] for one in results["missing"])],
    )  # fmt: skip


def _turns(changes: Mapping[str, Any]) -> str:
    """`higher on x (+3.0 [1.0, 5.0] points); no measurable difference on y and z`."""
    parts = []
    for turn, words in ((1, "higher on"), (-1, "lower on"), (0, "no measurable difference on")):
        found = {name: c["net"] for name, c in changes.items() if sign(c["net"]) == turn}
        told = [f"{n} ({estimate(c, '+.1f', 100)} points)" if turn else n for n, c in found.items()]
        parts += [f"{words} {and_(told)}"] if told else []
    return "; ".join(parts)


def _over(results: Mapping[str, Any]) -> str:
    """The categories that the rank is over, and the tasks of those that aren't whole."""
    whole = {name: category["complete"] for name, category in results["categories"].items()}
    return and_([name if whole[name] else f"{name} ({and_(of)} alone)" for name, of in results["ranked_over"].items()])


def _categories(results: Mapping[str, Any], labels: Sequence[str]) -> list[list[str]]:
    rows = [["", *labels, "mean over"]]
    for name, category in results["categories"].items():
        left = [f"without {', '.join(category['missing'])}"] if category["missing"] else []
        left += [f"not asked for: {', '.join(category['not_asked'])}"] if category["not_asked"] else []
        over = (", ".join(category["tasks"]) or "nothing") + (f" ({'; '.join(left)})" if left else "")
        scores = [category["scores"][label] for label in labels]
        cells = ["-" if score is None else number(100 * score) for score in scores]
        rows.append([name if category["complete"] else f"{name}, partial", *cells, over])
    return rows


def _tasks(results: Mapping[str, Any], labels: Sequence[str]) -> list[list[str]]:
    rows = [["", *labels, "metric", "items", "examples"]]
    for name, row in results["tasks"].items():
        scores = [row["scores"].get(label) for label in labels]
        cells = ["-" if score is None else estimate(score, scale=100) for score in scores]
        rows.append([name, *cells, row["metric"].removesuffix(",none"), str(row["items"]), str(row["fewshot"])])
    return rows


def _changes(results: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "kept", "lost", "gained", "never", "net, points", "McNemar's p"]]
    for label, changes in results["forgetting"].items():
        for name, c in changes.items():
            counts = [str(c.get(key, "-")) for key in ("kept", "lost", "gained", "never")]
            p = p_value(c["mcnemar_p"]).removeprefix("p = ").removeprefix("p ") if "mcnemar_p" in c else "-"
            rows.append([f"{label}: {name}", *counts, estimate(c["net"], "+.1f", 100), p])
    return rows


def _picture(results: Mapping[str, Any], labels: Sequence[str]) -> Figure:
    """Changes against the base where there is one, else the scores; one row per task."""
    base, tasks = results["base"], list(results["tasks"])
    if base:
        values = {label: {n: c["net"] for n, c in found.items()} for label, found in results["forgetting"].items()}
    else:
        scored = {name: row["scores"] for name, row in results["tasks"].items()}
        values = {label: {n: scores[label] for n, scores in scored.items() if label in scores} for label in labels}
    step, style = 0.7 / max(1, len(values)), look(labels)

    def paint(axis: Axes) -> None:
        for place, (label, found) in enumerate(values.items()):
            colour, up = style[label]["color"], (place - (len(values) - 1) / 2) * step
            for name, score in found.items():
                shown = {key: 100 * score[key] for key in ("low", "value", "high")}
                whisker(axis, tasks.index(name) + up, shown, colour)
            axis.plot([], [], "o-", color=colour, label=label)
        row_names(axis, [shorter(name) for name in tasks], zero=bool(base))
        axis.set_xlabel("← worse      change, percentage points      better →" if base else "score, %")
        if len(values) > 1:
            legend(axis)

    what = f"change against {base}, points" if base else "score, %"
    means = lambda found: ", ".join(f"{name} {number(100 * one['value'])}" for name, one in found.items())
    alt = f"{what}: {told({label: means(found) for label, found in values.items()})}"
    size = (9, 1.4 + (0.3 + 0.2 * len(values)) * len(tasks))
    return Figure("tasks", draw(size, paint), alt, f"{what[0].upper()}{what[1:]}, with 95 % intervals.")
