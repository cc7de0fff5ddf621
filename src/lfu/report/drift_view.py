"""The report of `lfu probe drift`: how far weights and hidden states moved, by block, kind of module and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Picture

from lfu.report.blocks import Figure, Heading, Paragraph, Table, View
from lfu.report.probe_figures import GRID, draw, finish, legend, line, look, row_names, shorter
from lfu.report.probe_text import estimate


def view(record: Mapping[str, Any]) -> View:
    """The report, from the record alone."""
    results, base = record["results"], record["settings"]["base"]
    weights, hidden = results["weights"], results["representations"]
    style = look([base, *weights])
    return View(
        f"How far the models moved from {base}",
        [sentence for label in weights for sentence in _verdict(label, weights[label], hidden[label])],
        [
            Heading("Weights"),
            Paragraph(
                "Distance: the L2 norm of the change over the L2 norm of the base's weights; adapters count as merged."
            ),
            _blocks_picture(weights, style),
            _kinds_picture(weights, style),
            _parts_table(weights),
            Heading("Hidden states"),
            Paragraph(
                "On the same tokens: the mean cosine similarity, and linear CKA (Kornblith et al. 2019, feature-space "
                "form), which does not see rotations and scale. 1 means that nothing changed."
            ),
            _layers_picture(hidden, style),
            _layers_table(hidden),
        ],
    )


def _verdict(label: str, weights: Mapping[str, Any], hidden: Mapping[str, Any]) -> list[str]:
    overall = weights["overall"]
    if not overall["distance"]:
        first = f"{label}'s weights are the base's, bit for bit."
    else:
        block = max(weights["blocks"], key=lambda part: part["relative"] or 0)
        kind = max(weights["kinds"], key=lambda part: part["relative"] or 0)
        first = (
            f"{label}'s weights moved by {_percent(overall)} % of their norm: most in block {block['name']} "
            f"({_percent(block)} %), and among the kinds of module in {kind['name']} ({_percent(kind)} %)."
        )
    cosines = [interval["value"] for interval in hidden["cosine"]]
    layers = hidden["layers"]
    least, lowest = (min(range(len(layers)), key=values.__getitem__) for values in (cosines, hidden["cka"]))
    return [
        first,
        f"{label}'s hidden states on {hidden['tokens']:,} tokens: cosine similarity to the base's down to "
        f"{cosines[least]:.4f} (layer {layers[least]}), linear CKA down to {hidden['cka'][lowest]:.4f} "
        f"(layer {layers[lowest]}).",
    ]


def _percent(part: Mapping[str, Any]) -> str:
    """The relative distance in per cent, three digits."""
    return "from zero" if part["relative"] is None else f"{100 * part['relative']:.3g}"


# --- tables --------------------------------------------------------------------------------------------------------


def _parts_table(weights: Mapping[str, Any]) -> Table:
    """One row for the whole, each kind in the blocks, and each part outside them; one column a model."""
    labels = list(weights)
    groups = [[("all weights", weights[label]["overall"])] for label in labels]
    for group, label in zip(groups, labels):
        group += [(f"in blocks: {part['name']}", part) for part in weights[label]["kinds"]]
        group += [(f"outside: {part['name']}", part) for part in weights[label]["outside"]]
    known = [dict(group) for group in groups]
    names = list(dict.fromkeys(name for group in groups for name, _ in group))
    rows = [
        [
            name,
            next(f"{group[name]['parameters']:,}" for group in known if name in group),
            *(_percent(group[name]) if name in group else "-" for group in known),
        ]
        for name in names
    ]
    return Table(["", "parameters", *(f"{label}, %" for label in labels)], rows, caption="Distance in per cent")


def _layers_table(hidden: Mapping[str, Any]) -> Table:
    labels = list(hidden)
    columns = [column for label in labels for column in (f"{label}: cosine", f"{label}: CKA")]
    layers = hidden[labels[0]]["layers"]
    rows = []
    for i, layer in enumerate(layers):
        cells = [
            cell
            for label in labels
            for cell in (estimate(hidden[label]["cosine"][i], "{:.4f}"), f"{hidden[label]['cka'][i]:.4f}")
        ]
        rows.append([str(layer), *cells])
    note = "The last layer is after the final norm. Intervals: bootstrap over the texts, 95 %."
    return Table(["layer", *columns], rows, note=note)


# --- pictures ------------------------------------------------------------------------------------------------------


def _blocks_picture(weights: Mapping[str, Any], style: Mapping[str, Any]) -> Figure:
    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        for label, drift in weights.items():
            values = [100 * (part["relative"] or 0) for part in drift["blocks"]]
            line(axis, [int(part["name"]) for part in drift["blocks"]], values, style[label], shorter(label))
        finish(axis, "Weights: distance by block", "block", "distance, % of the norm")
        axis.set_ylim(bottom=0, top=1.1 * axis.get_ylim()[1])
        legend(axis)

    return Figure("weights-by-block", draw((8, 3.4), paint), "relative weight distance of each block, a line a model")


def _kinds_picture(weights: Mapping[str, Any], style: Mapping[str, Any]) -> Figure:
    names = [part["name"] for part in next(iter(weights.values()))["kinds"]]

    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        thickness = 0.8 / len(weights)
        for i, (label, drift) in enumerate(weights.items()):
            found = {part["name"]: 100 * (part["relative"] or 0) for part in drift["kinds"]}
            heights = [n + (i - (len(weights) - 1) / 2) * thickness for n in range(len(names))]
            axis.barh(
                heights, [found.get(name, 0.0) for name in names], height=0.9 * thickness, color=style[label]["color"],
                label=shorter(label),
            )  # fmt: skip
        row_names(axis, names)
        axis.set_title("Weights: distance by kind of module")
        axis.set_xlabel("distance, % of the norm")
        legend(axis)

    size = (8, 1.4 + len(names) * (0.26 + 0.09 * len(weights)))
    return Figure("weights-by-kind", draw(size, paint), "relative weight distance of each kind of module, bars a model")


def _layers_picture(hidden: Mapping[str, Any], style: Mapping[str, Any]) -> Figure:
    panels: Sequence[tuple[str, str]] = (
        ("cosine", "Cosine similarity to the base"),
        ("cka", "Linear CKA with the base"),
    )

    def paint(figure: Picture) -> None:
        for axis, (name, title) in zip(figure.subplots(1, 2), panels):
            for label, drift in hidden.items():
                line(axis, drift["layers"], drift[name], style[label], shorter(label))
            axis.axhline(1, color=GRID, lw=1.2, zorder=0)
            finish(axis, title, "layer", "")
            legend(axis)

    alt = "mean cosine similarity and linear CKA of base and tuned hidden states by layer, a line a model"
    caption = "Bands: 95 % bootstrap intervals over the texts."
    return Figure("hidden-states-by-layer", draw((10, 3.6), paint), alt, caption)
