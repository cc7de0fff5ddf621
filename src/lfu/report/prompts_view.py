"""The report of `lfu probe prompts`: scores under each template, their spread, and what was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure as Picture

from lfu.report.blocks import Block, Figure, Heading, Items, Paragraph, Table, View
from lfu.report.probe_figures import draw, look, row_names, shorter
from lfu.report.probe_text import estimate, number, sign

# metric -> (name, unit, factor to that unit, form)
METRICS = {
    "accuracy": ("accuracy", "%", 100.0, "{:.1f}"),
    "nll": ("NLL of the answer", "nats per token", 1.0, "{:.3f}"),
}
READ = 3  # rows whose answers are shown: the first, not the nicest


def view(record: Mapping[str, Any]) -> View:
    """The report, from the record alone."""
    results = record["results"]
    metric = results["metric"]
    others = [name for name in METRICS if name != metric and name in next(iter(results["spread"].values()))]
    blocks: list[Block] = [Heading(f"Judged by: {METRICS[metric][0]}"), _picture(results, metric)]
    for name in (metric, *others):
        blocks += [_spread_table(results, name), _templates_table(results, name)]
    blocks += [
        Paragraph(
            "Deviation: the standard deviation over the templates (n - 1). Intervals: bootstrap over the rows, the "
            "same for all templates and models, 95 %; the templates are taken as given."
        ),
        Heading("To read"),
        Items("The templates", [{"name": name, "template": text} for name, text in results["templates"].items()]),
        *_written(results),
    ]
    return View("How much the wording matters", _verdict(results, metric), blocks)


def _verdict(results: Mapping[str, Any], metric: str) -> list[str]:
    name, unit, scale, form = METRICS[metric]
    points = "points" if metric == "accuracy" else unit
    sentences = []
    for label, spreads in results["spread"].items():
        s = spreads[metric]
        sentences.append(
            f"{label}: {name} {estimate(s['mean'], form, scale=scale)} {unit} on average over {len(s['templates'])} "
            f"templates, standard deviation {estimate(s['std'], form, scale=scale)} {points}, worst "
            f"{number(scale * s['worst']['value'], form)} ({s['worst_template']!r})."
        )
    words = {1: "more than", -1: "less than", 0: "no more or less, beyond the noise, than"}
    signed = form.replace(":", ":+")
    for label, difference in results["difference"].items():
        change = difference[metric]["std"]
        sentences.append(
            f"Wording moves {label} {words[sign(change)]} {results['against']}: its deviation differs by "
            f"{estimate(change, signed, scale=scale)} {points}."
        )
    return sentences


# --- tables and texts ----------------------------------------------------------------------------------------------


def _spread_table(results: Mapping[str, Any], metric: str) -> Table:
    name, unit, scale, form = METRICS[metric]
    rows = []
    for label, spreads in results["spread"].items():
        s = spreads[metric]
        difference = results["difference"].get(label, {}).get(metric)
        cells = [estimate(s[key], form, scale=scale) for key in ("mean", "std", "worst")]
        against = estimate(difference["std"], form.replace(":", ":+"), scale=scale) if difference else "-"
        rows.append([label, *cells, s["worst_template"], against])
    columns = ["", "mean", "deviation", "worst", "worst template", f"deviation, against {results['against']}"]
    return Table(columns, rows, caption=f"{name}, {unit}: over the templates")


def _templates_table(results: Mapping[str, Any], metric: str) -> Table:
    name, unit, scale, form = METRICS[metric]
    spreads = results["spread"]
    rows = [
        [template, *(number(scale * s[metric]["templates"][template], form) for s in spreads.values())]
        for template in results["templates"]
    ]
    return Table(["template", *spreads], rows, caption=f"{name}, {unit}: by template")


def _written(results: Mapping[str, Any]) -> list[Items]:
    """What each model wrote or chose for the first rows, under every template."""
    found = []
    for label, scores in results["scores"].items():
        items = []
        for i, row in enumerate(results["rows"][:READ]):
            reference = row["choices"][row["answer"]] if "choices" in row else row["answer"]
            answers = {
                f"under {name!r}": s["text"][i].strip() or "(nothing)" for name, s in scores.items() if s["text"]
            }
            if answers:
                items.append({"question": row["question"], "reference": reference} | answers)
        if items:
            found.append(Items(f"What {label} answered, first {len(items)} rows", items))
    return found


# --- picture -------------------------------------------------------------------------------------------------------


def _picture(results: Mapping[str, Any], metric: str) -> Figure:
    """A row a model, a dot a template, and mean with interval."""
    name, unit, scale, _ = METRICS[metric]
    spreads = {label: each[metric] for label, each in results["spread"].items()}
    style = look(spreads)

    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        for height, (label, s) in enumerate(spreads.items()):
            values, colour = [scale * v for v in s["templates"].values()], style[label]["color"]
            mean = {key: scale * s["mean"][key] for key in ("value", "low", "high")}
            axis.plot([min(values), max(values)], [height, height], color=colour, lw=1, alpha=0.5, zorder=1)
            axis.plot([mean["low"], mean["high"]], [height + 0.26] * 2, color=colour, lw=2.6, zorder=2)
            axis.plot(mean["value"], height + 0.26, "D", color=colour, ms=7, zorder=3)
            up = [0.07 * values[:i].count(value) for i, value in enumerate(values)]  # equal ones are piled up
            axis.plot(values, [height - u for u in up], "o", mfc="none", mec=colour, mew=1.8, ms=9, zorder=3)
        row_names(axis, [shorter(label) for label in spreads])
        axis.set_title("One dot a template")
        better = "better →" if metric == "accuracy" else "← better"
        axis.set_xlabel(f"{name}, {unit}   {better}")

    alt = "; ".join(
        f"{label}: " + ", ".join(f"{template} {scale * v:.3g}" for template, v in s["templates"].items())
        for label, s in spreads.items()
    )
    caption = "Circles: the templates. Diamond and bar: their mean and its 95 % interval over the rows."
    return Figure("prompts", draw((8, 1.7 + 0.8 * len(spreads)), paint), alt, caption)
