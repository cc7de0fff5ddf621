"""The curves of a run that was measured while it trained: questions, prose, KL, and files of the user's own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from lfu.report.blocks import Figure
from lfu.report.figures import GAINED, GRID, INK, LOST, PALETTE, draw, finish
from lfu.report.text import number

COUNTS = {"lost": LOST, "gained": GAINED}  # drawn as per cent of the known answers


class Panel(NamedTuple):
    """One plot: its lines (figure of a reading -> label), their factor, and the name of its limit in the budget."""

    title: str
    unit: str
    lines: Mapping[str, str]
    factor: float = 1.0
    budget: str = ""


def picture(results: Mapping[str, Any]) -> Figure:
    """One panel for each thing that was measured, over the steps."""
    points, panels = results["curve"], _panels(results["curve"])

    def paint(*axes: Axes) -> None:
        for axis, panel in zip(axes, panels):
            _paint(axis, points, panel, results)

    last = points[-1]
    alt = f"To step {last['step']}: {last['lost']} of {last['known']} known answers lost, {last['gained']} gained"
    return Figure("curve", draw((4.2 * len(panels), 3.2), paint, len(panels)), alt)


def readings(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every reading, one row each."""
    rows = [["step", "questions", "known", "lost", "gained", "net, %", "prose, nats", "KL, nats", "over budget"]]
    for point in points:
        over = ", ".join(point["over"]) + f" ({'beyond' if point['shown'] else 'within'} the noise)"
        rows.append([
            *(str(point[name]) for name in ("step", "items", "known", "lost", "gained")),
            number(-100 * point["net_lost"], "+.1f"), number(point["prose_rise"], "+.3f"),
            number(point["kl"], ".4f") if "kl" in point else "", over if point["over"] else "",
        ])  # fmt: skip
    return rows


def _panels(points: Sequence[Mapping[str, Any]]) -> list[Panel]:
    shares = {"lost": "lost", "gained": "gained", "net_lost": "net loss"}
    found = [
        Panel("Questions", "% of the known ones", shares, 100.0, "questions"),
        Panel("Prose", "rise of the loss, nats", {"prose_rise": "prose"}, budget="prose"),
    ]
    if all("kl" in point for point in points):
        found.append(Panel("Text it once wrote", "KL, nats per token", {"kl": "KL"}))
    for name in points[-1]:
        own, _, figure = name.rpartition("/")
        if own and figure == "rise":
            found.append(Panel(own, "rise of the loss, nats", {name: own}, budget=own))
        elif own and figure == "net_lost":
            found.append(Panel(own, "% of the known questions", {name: "net loss"}, 100.0, own))
    return found


def _paint(axis: Axes, points: Sequence[Mapping[str, Any]], panel: Panel, results: Mapping[str, Any]) -> None:
    steps = [0, *(point["step"] for point in points)]
    for name, label in panel.lines.items():
        values = [panel.factor * point[name] / (max(1, point["known"]) if name in COUNTS else 1) for point in points]
        colour = COUNTS.get(name, INK)
        axis.plot(steps, [0.0, *values], marker="o", ms=3.5, lw=2, label=label, color=colour)
    if panel.budget in results["budget"]:
        axis.axhline(results["budget"][panel.budget] * panel.factor, color=LOST, ls=":", lw=1.6)
    axis.axvline(results["kept_step"], color=GRID, lw=4, zorder=0)
    axis.axhline(0, color=PALETTE[0], lw=1)
    finish(axis, panel.title, "step", panel.unit)
    if len(panel.lines) > 1:
        axis.legend(fontsize=9)
