"""The report of `lfu probe noise`: cosine similarity of clean and noisy hidden states by layer, one line per model."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from lfu.report.blocks import Figure, View
from lfu.report.figures import Panel, look, panels
from lfu.report.template import view_of_template
from lfu.report.text import estimate


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
    same = len({len(values) for values in by_layer.values()}) == 1  # else depth is counted from 0 to 1
    points = lambda values: [(i if same else i / len(values), value) for i, value in enumerate(values, start=1)]
    lines = {label: points(values) for label, values in by_layer.items()}
    title, x = "Hidden states with and without input noise", "layer" if same else "depth (layer / layers)"
    plot = Panel(title, x, "cosine similarity", lines, across=1, whole=same)
    alt = "cosine similarity of clean and noisy hidden states by layer, one line per model"
    return Figure("noise-by-layer", panels([plot], look(by_layer)), alt)
