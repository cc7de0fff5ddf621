"""The report of `lfu probe forgetting`: questions gained and lost, to read too, and the perplexity of prose."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lfu.report import forgetting_curve
from lfu.report.blocks import Figure, View
from lfu.report.figures import GAINED, INK, LOST, PALETTE, draw, row_names, whisker
from lfu.report.template import view_of_template
from lfu.report.text import estimate, number, shorter, sign, told

MOST_ITEMS = 200  # to read on the page; record.json has them all


def view(record: Mapping[str, Any]) -> View:
    results, base = record["results"], record["settings"]["base"]
    curve = results.get("curve")  # what `ForgettingCallback` saw on the way, if it was there

    def changed(label: str, what: str) -> list[dict[str, str]]:
        """Questions whose answer turned from right to wrong, or from wrong to right, with what each model chose."""
        found = []
        for row, before, after in zip(results["questions"], results["chosen"][base], results["chosen"][label]):
            choices, right = row["choices"], row["answer"]
            if (before == right, after == right) == (what == "lost", what == "gained"):
                asked = {"question": row["question"], "right answer": choices[right]}
                found.append(asked | {f"{base} chose": choices[before], f"{label} chose": choices[after]})
        return found

    return view_of_template(
        "forgetting", record, base=base, most=MOST_ITEMS, changed=changed, ratio=_ratio, picture=_picture(results),
        questions=_questions(results, base), texts=_texts(results, base),
        curve=forgetting_curve.picture(results) if curve else None,
        readings=forgetting_curve.readings(curve) if curve else [],
    )  # fmt: skip


def _ratio(perplexity: Mapping[str, Any]) -> dict[str, float]:
    """The change of the perplexity, in per cent."""
    return {name: 100 * math.expm1(perplexity["log_ratio"][name]) for name in ("value", "low", "high")}


def _questions(results: Mapping[str, Any], base: str) -> list[list[str]]:
    rows = [["", f"{base}, % right", "now, % right", "kept", "lost", "gained", "never", "net, points", "McNemar's p"]]
    for label, f in results["forgetting"].items():
        counts = [str(f[name]) for name in ("kept", "lost", "gained", "never")]
        shares = [f"{100 * f['before']:.1f}", f"{100 * f['after']:.1f}"]
        rows.append([label, *shares, *counts, estimate(f["net"], "+.1f", 100), f"{f['mcnemar_p']:.3g}"])
    return rows


def _texts(results: Mapping[str, Any], base: str) -> list[list[str]]:
    rows = [
        [label, f"{p['before']:.2f}", f"{p['after']:.2f}", estimate(_ratio(p), "+.1f")]
        for label, p in results["perplexity"].items()
    ]
    return [["", f"perplexity, {base}", "perplexity now", "change, %"], *rows]


def _picture(results: Mapping[str, Any]) -> Figure:
    changes, texts = results["forgetting"], results["perplexity"]

    def paint(left: Axes, right: Axes) -> None:
        _bars(left, changes)
        _whiskers(right, texts)

    alt = told({label: f"{f['lost']} lost, {f['gained']} gained" for label, f in changes.items()})
    return Figure("forgetting", draw((10, 2.1 + 0.75 * len(changes)), paint, 2, width_ratios=[1.5, 1]), alt)


def _bars(axis: Axes, changes: Mapping[str, Any]) -> None:
    """Lost to the left, gained to the right, the net below."""
    reach = 1.0
    for height, f in enumerate(changes.values()):
        for count, turn, colour in ((f["lost"], -1, LOST), (f["gained"], 1, GAINED)):
            axis.barh(height - 0.12, turn * count, height=0.46, color=colour, alpha=0.85, zorder=2)
            axis.annotate(
                f"{count}", (turn * count, height - 0.12), (turn * 4, 0), textcoords="offset points", va="center",
                ha="left" if turn > 0 else "right", color=colour, weight="bold",
            )  # fmt: skip
        net = {name: f["items"] * f["net"][name] for name in ("value", "low", "high")}
        whisker(axis, height + 0.3, net, INK)
        reach = max(reach, f["lost"], f["gained"], -net["low"], net["high"])
    row_names(axis, [shorter(label) for label in changes], zero=True)
    axis.set(title="Questions", xlabel="← lost      number      gained →", xlim=(-1.18 * reach, 1.18 * reach))
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.xaxis.set_major_formatter(lambda value, place: f"{abs(value):.0f}")


def _whiskers(axis: Axes, texts: Mapping[str, Any]) -> None:
    """Change of the perplexity in per cent; the better is to the right, as it is for the questions."""
    ends = [0.0]
    for height, p in enumerate(texts.values()):
        change = _ratio(p)
        colour = {1: LOST, -1: GAINED, 0: PALETTE[0]}[sign(p["log_ratio"])]
        whisker(axis, height, change, colour, ms=8)
        axis.annotate(
            f"{number(change['value'], '+.1f')} %", (change["value"], height), (0, 9), textcoords="offset points",
            ha="center", color=colour, weight="bold",
        )  # fmt: skip
        ends += [change["low"], change["high"]]
    margin = 0.25 * (max(ends) - min(ends) or 1.0)
    row_names(axis, [""] * len(texts), zero=True)
    axis.set(title="Perplexity of plain text", xlabel="← worse      change, %      better →")
    axis.set_xlim(max(ends) + margin, min(ends) - margin)  # turned round
