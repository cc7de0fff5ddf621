"""The curves of a run that was measured while it trained: questions, prose, KL, and files of the user's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from lfu.report.blocks import Figure
from lfu.report.figures import GAINED, INK, LOST, Panel, panels
from lfu.report.text import number

COUNTS = {"lost", "gained"}  # drawn as per cent of the known answers
LOOKS = {"lost": {"color": LOST}, "gained": {"color": GAINED}, "net loss": {"color": INK}, "": {"color": INK}}


def picture(results: Mapping[str, Any]) -> Figure:
    """One panel for each thing that was measured, over the steps."""
    points, budget = results["curve"], results["budget"]

    def panel(title: str, unit: str, lines: Mapping[str, str], factor: float = 1.0, limit: str = "") -> Panel:
        """`lines`: figure of a reading -> label; `limit`: what the budget calls it."""
        value = lambda point, name: factor * point[name] / (max(1, point["known"]) if name in COUNTS else 1)
        drawn = {
            label: [(0, 0.0), *((point["step"], value(point, name)) for point in points)]
            for name, label in lines.items()
        }
        most = factor * budget[limit] if limit in budget else None
        return Panel(title, "step", unit, drawn, across=0, most=most, marked=results["kept_step"])

    shares = {"lost": "lost", "gained": "gained", "net_lost": "net loss"}
    plots = [
        panel("Questions", "% of the known ones", shares, 100.0, "questions"),
        panel("Prose", "rise of the loss, nats", {"prose_rise": ""}, limit="prose"),
    ]
    if all("kl" in point for point in points):
        plots.append(panel("Text it once wrote", "KL, nats per token", {"kl": ""}))
    for name in points[-1]:
        own, _, figure = name.rpartition("/")
        if own and figure == "rise":
            plots.append(panel(own, "rise of the loss, nats", {name: ""}, limit=own))
        elif own and figure == "net_lost":
            plots.append(panel(own, "% of the known questions", {name: "net loss"}, 100.0, own))
    last = points[-1]
    alt = f"To step {last['step']}: {last['lost']} of {last['known']} known answers lost, {last['gained']} gained"
    return Figure("curve", panels(plots, LOOKS), alt)


def readings(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every reading, one row each."""
    rows = [["step", "questions", "known", "lost", "gained", "net, %", "prose, nats", "KL, nats", "over budget"]]
    for point in points:
        over = [f"{name} ({'beyond' if name in point['shown'] else 'within'} the noise)" for name in point["over"]]
        rows.append([
            *(str(point[name]) for name in ("step", "items", "known", "lost", "gained")),
            number(-100 * point["net_lost"], "+.1f"), number(point["prose_rise"], "+.3f"),
            number(point["kl"], ".4f") if "kl" in point else "", ", ".join(over),
        ])  # fmt: skip
    return rows
