"""The demo's pictures: gain against forgetting, and the training curves. Colours are safe for colour-blind readers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"base": "#6b7280", "sft": "#d55e00", "lfu": "#0072b2"}
NAMES = {"base": "untouched", "sft": "plain SFT", "lfu": "LfU"}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#374151",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "svg.hashsalt": "lfu",  # the same picture from the same numbers, byte for byte
}
# What each panel says: heading, and the axis' unit. The axes are turned so that better is always to the right.
PANELS = {
    "answers": ("Loss on unseen answers", "fall (nats per token)"),
    "match": ("Unseen problems solved", "rise (percentage points)"),
    "knowledge": ("General-knowledge questions", "rise (percentage points)"),
    "prose": ("Perplexity of plain prose", "fall (per cent)"),
}


def gain_and_loss(rows: Sequence[Mapping[str, Any]], path: Path, what: str) -> None:
    """The one picture: four panels, the upper ones what was learned, the lower ones what was kept. 1600 px wide.

    Args:
        what: the model and how it was trained, for the line below the heading.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.3))
        for axis, row in zip(axes.flat, rows):
            _change(axis, row)
        figure.subplots_adjust(left=0.11, right=0.97, top=0.80, bottom=0.10, hspace=0.85, wspace=0.32)
        figure.text(0.02, 0.955, "What fine-tuning gave, and what it took", size=17, weight="bold")
        below = f"{what}: change against the untouched model, with 95 % intervals over the test items."
        figure.text(0.02, 0.908, below, size=10.5, color="#4b5563")
        for height, label in ((0.855, "LEARNED: the task it was trained on"), (0.415, "KEPT: everything else")):
            figure.text(0.02, height, label, size=10.5, weight="bold", color="#6b7280")
        figure.savefig(path, dpi=160)
        plt.close(figure)


def change_panel(row: Mapping[str, Any]) -> str:
    """One panel of `gain_and_loss` as a data URI."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 1.95), layout="constrained")
        _change(axis, row)
        return _uri(figure)


def curve(histories: Mapping[str, Sequence[Mapping[str, float]]], key: str, title: str, **options: Any) -> str:
    """One training curve over the steps as a data URI.

    Args:
        histories: method (sft, lfu) -> the trainer's log, one mapping a step.
        key: which number of the log; methods whose log hasn't got it are left out.
        options: `log` for a logarithmic axis, `line` for a dotted reference line (value, label).
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        for who in ("sft", "lfu"):
            points = [(entry["step"], entry[key]) for entry in histories.get(who, ()) if entry.get(key) is not None]
            if points:
                axis.plot(*zip(*points), color=COLOURS[who], lw=1.8, label=NAMES[who], ls="-" if who == "lfu" else "--",
                          marker="o", ms=2.5)  # fmt: skip
        if options.get("log"):
            axis.set_yscale("log")
        if "line" in options:
            height, label = options["line"]
            axis.axhline(height, color="#6b7280", lw=1, ls=":", label=label)
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(axis="y", color="#e5e7eb", lw=0.8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=10)
        return _uri(figure)


def _change(axis: Axes, row: Mapping[str, Any]) -> None:
    """SFT's and LfU's change against the untouched model, with whiskers; better is to the right."""
    turn = 1 if row["higher_is_better"] else -1
    ends = [0.0]
    for height, who in ((1, "sft"), (0, "lfu")):
        d = row["differences"][f"{who}-base"]
        low, high = sorted((turn * d["low"], turn * d["high"]))
        value = turn * d["value"]
        axis.barh(height, value, height=0.5, color=COLOURS[who], alpha=0.28, zorder=2)
        axis.plot([low, high], [height, height], color=COLOURS[who], lw=2.6, solid_capstyle="butt", zorder=3)
        axis.plot(value, height, "o", color=COLOURS[who], ms=8, zorder=4)
        ends += [low, high]
    margin = 0.12 * (max(ends) - min(ends) or 1.0)
    axis.set_xlim(min(ends) - margin, max(ends) + margin)
    axis.set_ylim(-0.6, 1.6)
    axis.axvline(0, color=COLOURS["base"], lw=1.4, zorder=1)
    axis.set_yticks([1, 0], [NAMES["sft"], NAMES["lfu"]])
    for label, who in zip(axis.get_yticklabels(), ("sft", "lfu")):
        label.set(color=COLOURS[who], weight="bold")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e5e7eb", lw=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    title, unit = PANELS[row["key"]]
    axis.set_title(title)
    axis.set_xlabel(f"← worse   {unit}   better →", size=9.5)


def _uri(figure: Figure) -> str:
    """The figure as an SVG data URI: an <img> of its own, so that no two pictures share element ids."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
