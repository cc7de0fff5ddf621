"""The report of `lfu probe noise`: cosine similarity of clean and noisy hidden states by layer, one line per model."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from matplotlib.axes import Axes

from lfu.report.blocks import Figure, View
from lfu.report.figures import GRID, draw, finish, legend, line, look
from lfu.report.template import view_of_template
from lfu.report.text import estimate, shorter


def view(record: Mapping[str, Any]) -> View:
    results = record["results"]
    by_layer, against = results["by_layer"], results["against"]
    summary = [["", "mean cosine", f"against {against}", "rise of the answer's NLL, nats per token"]]
    for label, overall in results["overall"].items():
        difference = results["difference"].get(label)
        rise = estimate(results["nll_rise"][label], "+.4f")
        summary.append([label, estimate(overall, ".4f"), estimate(difference, "+.4f") if difference else "-", rise])
    rows = zip_longest(*([estimate(each, ".4f") for each in values] for values in by_layer.values()), fillvalue="-")
    layers = [["layer", *by_layer], *([str(layer), *row] for layer, row in enumerate(rows, start=1))]
    return view_of_template("noise", record, summary=summary, layers=layers, picture=_picture(by_layer))


def _picture(by_layer: Mapping[str, Any]) -> Figure:
    style = look(by_layer)
    same = len({len(values) for values in by_layer.values()}) == 1  # else depth is counted from 0 to 1

    def paint(axis: Axes) -> None:
        for label, values in by_layer.items():
            x = [(i + 1) if same else (i + 1) / len(values) for i in range(len(values))]
            line(axis, x, values, style[label], shorter(label))
        axis.axhline(1, color=GRID, lw=1.2, zorder=0)
        title = "Hidden states with and without input noise"
        finish(axis, title, "layer" if same else "depth (layer / layers)", "cosine similarity", whole=same)
        legend(axis)

    alt = "cosine similarity of clean and noisy hidden states by layer, one line per model"
    return Figure("noise-by-layer", draw((8, 4), paint), alt)
