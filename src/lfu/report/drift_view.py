"""The report of `lfu probe drift`: how far weights and hidden states moved, by block, kind of module and layer."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from lfu.report.blocks import Figure, View
from lfu.report.figures import Panel, draw, legend, look, panels, row_names
from lfu.report.template import view_of_template
from lfu.report.text import estimate


def view(record: Mapping[str, Any]) -> View:
    weights, hidden = record["results"]["weights"], record["results"]["representations"]
    style = look([record["settings"]["base"], *weights])
    return view_of_template(
        "drift", record, most={label: _most(found) for label, found in weights.items()},
        lowest={label: _lowest(found) for label, found in hidden.items()}, parts=_parts(weights),
        layers=_layers(hidden), percent=_percent, blocks=_blocks_picture(weights, style),
        kinds=_kinds_picture(weights, style), hidden=_layers_picture(hidden, style),
    )  # fmt: skip


def _most(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The block and the kind of module that moved most; empty where nothing did."""
    if not weights["overall"]["distance"]:
        return {}
    furthest = lambda parts: max(parts, key=lambda part: part["relative"] or 0)
    return {"block": furthest(weights["blocks"]), "kind": furthest(weights["kinds"])}


def _lowest(hidden: Mapping[str, Any]) -> str:
    """The lowest cosine similarity and the lowest CKA, with their layers."""
    cosines = [interval["value"] for interval in hidden["cosine"]]
    (cosine, at), (cka, there) = (min(zip(values, hidden["layers"])) for values in (cosines, hidden["cka"]))
    return f"{cosine:.4f} (layer {at}), linear CKA down to {cka:.4f} (layer {there})"


def _percent(part: Mapping[str, Any]) -> str:
    """The relative distance in per cent, three digits."""
    return "from zero" if part["relative"] is None else f"{100 * part['relative']:.3g}"


def _parts(weights: Mapping[str, Any]) -> list[list[str]]:
    """One row for the whole, each kind in the blocks, and each part outside them; one column per model."""
    known = [
        {"all weights": found["overall"]}
        | {f"in blocks: {part['name']}": part for part in found["kinds"]}
        | {f"outside: {part['name']}": part for part in found["outside"]}
        for found in weights.values()
    ]
    rows = [["", "parameters", *(f"{label}, %" for label in weights)]]
    for name in dict.fromkeys(name for parts in known for name in parts):
        size = next(parts[name]["parameters"] for parts in known if name in parts)
        rows.append([name, f"{size:,}", *(_percent(parts[name]) if name in parts else "-" for parts in known)])
    return rows


def _layers(hidden: Mapping[str, Any]) -> list[list[str]]:
    rows = [["layer", *(f"{label}: {what}" for label in hidden for what in ("cosine", "CKA"))]]
    for i, layer in enumerate(next(iter(hidden.values()))["layers"]):
        each = ((estimate(found["cosine"][i], ".4f"), f"{found['cka'][i]:.4f}") for found in hidden.values())
        rows.append([str(layer), *(cell for pair in each for cell in pair)])
    return rows


def _blocks_picture(weights: Mapping[str, Any], style: Mapping[str, Any]) -> Figure:
    point = lambda part: (int(part["name"]), 100 * (part["relative"] or 0))
    lines = {label: list(map(point, drift["blocks"])) for label, drift in weights.items()}
    plot = Panel("Weights: distance by block", "block", "distance, % of the norm", lines, across=0)
    alt = "relative weight distance of each block, one line per model"
    return Figure("weights-by-block", panels([plot], style), alt)


def _kinds_picture(weights: Mapping[str, Any], style: Mapping[str, Any]) -> Figure:
    names = [part["name"] for part in next(iter(weights.values()))["kinds"]]
    thickness = 0.8 / len(weights)

    def paint(axis: Axes) -> None:
        for i, (label, drift) in enumerate(weights.items()):
            found = {part["name"]: 100 * (part["relative"] or 0) for part in drift["kinds"]}
            heights = [n + (i - (len(weights) - 1) / 2) * thickness for n in range(len(names))]
            widths = [found.get(name, 0.0) for name in names]
            axis.barh(heights, widths, 0.9 * thickness, color=style[label]["color"], label=label)
        row_names(axis, names)
        axis.set(title="Weights: distance by kind of module", xlabel="distance, % of the norm")
        legend(axis)

    size = (8, 1.4 + len(names) * (0.26 + 0.09 * len(weights)))
    alt = "relative weight distance of each kind of module, one bar per model"
    return Figure("weights-by-kind", draw(size, paint), alt)


def _layers_picture(hidden: Mapping[str, Any], style: Mapping[str, Any]) -> Figure:
    titles = {"cosine": "Cosine similarity to the base", "cka": "Linear CKA with the base"}
    of = lambda name: {label: list(zip(drift["layers"], drift[name])) for label, drift in hidden.items()}
    plots = [Panel(title, "layer", "", of(name), across=1) for name, title in titles.items()]
    alt = "mean cosine similarity and linear CKA of base and tuned hidden states by layer, one line per model"
    return Figure("hidden-states-by-layer", panels(plots, style), alt)
