"""The report of `lfu probe prompts`: scores under each template, their spread, and what was written."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from lfu.report.blocks import Figure, View
from lfu.report.figures import draw, look, row_names
from lfu.report.metric_text import change, estimated, turn, value
from lfu.report.template import view_of_template
from lfu.report.text import shorter, told
from lfu.study.metrics import Metric

READ = 3  # rows whose answers are shown: the first, not the nicest


METRICS = [
    Metric("accuracy", "accuracy", "share", "reworded", 1, 0),
    Metric("nll", "NLL of the answer", "nll", "reworded", -1, 0),
]


def view(record: Mapping[str, Any]) -> View:
    results = record["results"]
    known = [each for each in METRICS if each.key in next(iter(results["spread"].values()))]
    metrics = sorted(known, key=lambda each: each.key != results["metric"])
    return view_of_template(
        "prompts", record, metric=metrics[0], metrics=metrics, spread=_spread, by_template=_by_template,
        estimated=estimated, change=change, value=value, turn=turn, picture=_picture(results, metrics[0]),
        written=_written(results),
        texts=[{"name": name, "template": text} for name, text in results["templates"].items()],
    )  # fmt: skip


def _spread(results: Mapping[str, Any], metric: Metric) -> list[list[str]]:
    rows = [["", "mean", "deviation", "worst", "worst template", f"deviation, against {results['against']}"]]
    for label, spreads in results["spread"].items():
        s = spreads[metric.key]
        other = results["difference"].get(label, {}).get(metric.key)
        cells = [estimated(metric, s[key]) for key in ("mean", "std", "worst")]
        rows.append([label, *cells, s["worst_template"], change(metric, other["std"]) if other else "-"])
    return rows


def _by_template(results: Mapping[str, Any], metric: Metric) -> list[list[str]]:
    spreads = results["spread"]
    values = [spread[metric.key]["templates"] for spread in spreads.values()]
    rows = [[name, *(value(metric, each[name]) for each in values)] for name in results["templates"]]
    return [["template", *spreads], *rows]


def _written(results: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Model -> what it wrote or chose for the first rows, under every template."""
    found: dict[str, list[dict[str, str]]] = {}
    for label, scores in results["scores"].items():
        for i, row in enumerate(results["rows"][:READ]):
            reference = row["choices"][row["answer"]] if "choices" in row else row["answer"]
            answers = {
                f"under {name!r}": s["text"][i].strip() or "(nothing)" for name, s in scores.items() if s["text"]
            }
            if answers:
                item = {"question": row["question"], "reference": reference} | answers
                found.setdefault(label, []).append(item)
    return found


def _picture(results: Mapping[str, Any], metric: Metric) -> Figure:
    """A row a model, a dot a template, and mean with interval."""
    spreads = {label: each[metric.key] for label, each in results["spread"].items()}
    style, shown = look(spreads), metric.scale.shown

    def paint(axis: Axes) -> None:
        for height, (label, s) in enumerate(spreads.items()):
            values, colour = list(map(shown, s["templates"].values())), style[label]["color"]
            mean = {key: shown(s["mean"][key]) for key in ("value", "low", "high")}
            axis.plot([min(values), max(values)], [height, height], color=colour, lw=1, alpha=0.5, zorder=1)
            axis.plot([mean["low"], mean["high"]], [height + 0.26] * 2, color=colour, lw=2.6, zorder=2)
            axis.plot(mean["value"], height + 0.26, "D", color=colour, ms=7, zorder=3)
            up = [0.07 * values[:i].count(value) for i, value in enumerate(values)]  # equal ones are piled up
            axis.plot(values, [height - u for u in up], "o", mfc="none", mec=colour, mew=1.8, ms=9, zorder=3)
        row_names(axis, [shorter(label) for label in spreads])
        better = "better →" if metric.sign > 0 else "← better"
        axis.set(title="One dot per template", xlabel=f"{metric.title}, {metric.scale.unit}   {better}")

    each = lambda s: ", ".join(f"{template} {shown(v):.3g}" for template, v in s["templates"].items())
    alt = told({label: each(s) for label, s in spreads.items()})
    return Figure("prompts", draw((8, 1.7 + 0.8 * len(spreads)), paint), alt)
