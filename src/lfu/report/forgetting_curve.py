"""The curves of a run that was measured while it trained: questions, prose, KL, and files of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from lfu.report.blocks import Block, Figure, Heading, Table
from lfu.report.probe_figures import GAINED, GRID, LOST, PALETTE, draw, finish
from lfu.report.probe_text import number


def blocks(results: Mapping[str, Any]) -> list[Block]:
    """The pictures, and every reading in a table."""
    points = results["curve"]
    panels = _panels(results)

    def paint(figure: Picture) -> None:
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            _panel(axis, points, panel, results)

    last = points[-1]
    alt = f"To step {last['step']}: {last['lost']} of {last['known']} known answers lost, {last['gained']} gained"
    caption = "Dotted: the budget. Grey: the step whose model is left. 0 is the untouched model."
    picture = Figure("curve", draw((4.2 * len(panels), 3.2), paint), alt, caption)
    return [Heading("While it was trained"), picture, _table(points)]


def _panels(results: Mapping[str, Any]) -> list[tuple[str, str, dict[str, tuple[str, float]], str]]:
    """(title, y label, figure -> (label, factor), name in the budget) of each panel."""
    points = results["curve"]
    shares = {"lost": ("lost", 1.0), "gained": ("gained", 1.0), "net_lost": ("net loss", 100.0)}
    found = [
        ("Questions", "% of the known ones", shares, "questions"),
        ("Prose", "rise of the loss, nats", {"prose_rise": ("prose", 1.0)}, "prose"),
    ]
    if all("kl" in point for point in points):
        found.append(("Text it once wrote", "KL, nats per token", {"kl": ("KL", 1.0)}, ""))
    for name in points[-1]:
        own, _, figure = name.rpartition("/")
        if own and figure == "rise":
            found.append((own, "rise of the loss, nats", {name: (own, 1.0)}, own))
        elif own and figure == "net_lost":
            found.append((own, "% of the known questions", {name: ("net loss", 100.0)}, own))
    return found


def _panel(axis: Axes, points: Sequence[Mapping[str, Any]], panel: Any, results: Mapping[str, Any]) -> None:
    title, unit, figures, measure = panel
    colours = {"lost": LOST, "gained": GAINED}
    steps = [0, *(point["step"] for point in points)]
    for name, (label, factor) in figures.items():
        values = [factor * _share(point, name) for point in points]
        axis.plot(steps, [0.0, *values], marker="o", ms=3.5, lw=2, label=label, color=colours.get(name, PALETTE[7]))
    if measure in results["budget"]:
        limit = results["budget"][measure] * max(factor for _, factor in figures.values())
        axis.axhline(limit, color=LOST, ls=":", lw=1.6)
    axis.axvline(results["kept_step"], color=GRID, lw=4, zorder=0)
    axis.axhline(0, color=PALETTE[0], lw=1)
    finish(axis, title, "step", unit, whole=False)
    if len(figures) > 1:
        axis.legend(frameon=False, fontsize=9)


def _share(point: Mapping[str, Any], name: str) -> float:
    """The figure; counts of questions as per cent of the known ones."""
    value = float(point[name])
    return 100 * value / max(1, point["known"]) if name in ("lost", "gained") else value


def _table(points: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for point in points:
        word = "beyond the noise" if point["shown"] else "within the noise" if point["over"] else ""
        over = f"{', '.join(point['over'])} ({word})" if word and point["over"] else ""
        kl = number(point["kl"], "{:.4f}") if "kl" in point else ""
        rows.append(
            [
                str(point["step"]), str(point["items"]), str(point["known"]), str(point["lost"]), str(point["gained"]),
                number(-100 * point["net_lost"], "{:+.1f}"), number(point["prose_rise"], "{:+.3f}"), kl, over,
            ]
        )  # fmt: skip
    columns = ["step", "questions", "known", "lost", "gained", "net, %", "prose, nats", "KL, nats", "over budget"]
    return Table(columns, rows, note="known: right by the untouched model. net: (gained - lost) / known.")
