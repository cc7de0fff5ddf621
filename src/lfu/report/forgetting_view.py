"""The report of `lfu probe forgetting`: questions gained and lost, to read too, and the perplexity of prose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from lfu.report.blocks import Block, Figure, Heading, Items, Paragraph, Table, View
from lfu.report.probe_figures import GAINED, LOST, PALETTE, draw, row_names, shorter
from lfu.report.probe_text import estimate, number, p_value, sign

MOST_ITEMS = 200  # to read on the page; record.json has them all


def view(record: Mapping[str, Any]) -> View:
    """The report, from the record alone."""
    results, base = record["results"], record["settings"]["base"]
    blocks: list[Block] = [
        *_curve(results),
        Heading("Questions"),
        _picture(results, base),
        _questions_table(results, base),
        Heading("Plain text"),
        _texts_table(results, base),
        Heading("To read"),
        Paragraph("A question is lost if the base model chose the right answer and the tuned one does not."),
    ]
    for label in results["forgetting"]:
        blocks += [_items(results, base, label, lost=True), _items(results, base, label, lost=False)]
    return View("What was gained, what was forgotten", _verdict(results, base), blocks)


def _curve(results: Mapping[str, Any]) -> list[Block]:
    """What `ForgettingCallback` saw on the way, if it was there."""
    if not results.get("curve"):
        return []
    from lfu.report.forgetting_curve import blocks

    return blocks(results)


def _verdict(results: Mapping[str, Any], base: str) -> list[str]:
    sentences = []
    for label, f in results["forgetting"].items():
        net = {1: "it knows more than before", -1: "it knows less than before", 0: "no change beyond the noise"}
        sentences.append(
            f"{label} lost {f['lost']} and gained {f['gained']} of {f['items']} questions against {base}: "
            f"{estimate(f['net'], '{:+.1f}', scale=100, unit='points')} net, McNemar {p_value(f['mcnemar_p'])}; "
            f"{net[sign(f['net'])]}."
        )
        p = results["perplexity"][label]
        ratio = {name: math.expm1(p["log_ratio"][name]) for name in ("value", "low", "high")}
        change = {1: "it forgot some of its prose", -1: "it reads prose better", 0: "no change beyond the noise"}
        sentences.append(
            f"{label}'s perplexity on plain text went from {p['before']:.1f} to {p['after']:.1f}, "
            f"{estimate(ratio, '{:+.1f}', scale=100)} %: {change[sign(p['log_ratio'])]}."
        )
    return sentences


def _questions_table(results: Mapping[str, Any], base: str) -> Table:
    rows = [
        [
            label, f"{100 * f['before']:.1f}", f"{100 * f['after']:.1f}", str(f["kept"]), str(f["lost"]),
            str(f["gained"]), str(f["never"]), estimate(f["net"], "{:+.1f}", scale=100), f"{f['mcnemar_p']:.3g}",
        ]
        for label, f in results["forgetting"].items()
    ]  # fmt: skip
    return Table(
        ["", f"{base}, % right", "now, % right", "kept", "lost", "gained", "never", "net, points", "McNemar's p"],
        rows,
        note="net: paired bootstrap over the questions, 95 %. p: exact two-sided McNemar test on lost against gained.",
    )


def _texts_table(results: Mapping[str, Any], base: str) -> Table:
    rows = []
    for label, p in results["perplexity"].items():
        ratio = {name: math.expm1(p["log_ratio"][name]) for name in ("value", "low", "high")}
        rows.append([label, f"{p['before']:.2f}", f"{p['after']:.2f}", estimate(ratio, "{:+.1f}", scale=100)])
    note = "Change: paired bootstrap over the texts of the log perplexity ratio, 95 %. Less is better."
    return Table(["", f"perplexity, {base}", "perplexity now", "change, %"], rows, note=note)


def _items(results: Mapping[str, Any], base: str, label: str, *, lost: bool) -> Items:
    """Questions whose answer turned from right to wrong, or from wrong to right, with what each model chose."""
    found = []
    pairs = zip(results["questions"], results["chosen"][base], results["chosen"][label])
    for row, before, after in pairs:
        was, now = before == row["answer"], after == row["answer"]
        if was != now and was == lost:
            choices = row["choices"]
            found.append(
                {
                    "question": row["question"], "right answer": choices[row["answer"]],
                    f"{base} chose": choices[before], f"{label} chose": choices[after],
                }
            )  # fmt: skip
    what = "lost" if lost else "gained"
    cut = f", the first {MOST_ITEMS} of {len(found)}" if len(found) > MOST_ITEMS else ""
    return Items(f"Questions that {label} {what}{cut}", found[:MOST_ITEMS])


# --- picture -------------------------------------------------------------------------------------------------------


def _picture(results: Mapping[str, Any], base: str) -> Figure:
    changes, texts = results["forgetting"], results["perplexity"]

    def paint(figure: Picture) -> None:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
        _bars(left, changes)
        _whiskers(right, texts)

    alt = "; ".join(f"{label}: {f['lost']} lost, {f['gained']} gained" for label, f in changes.items())
    png = draw((10, 2.1 + 0.75 * len(changes)), paint)
    caption = f"Left: questions against {base}; below a bar the net change with its 95 % interval. Right: plain text."
    return Figure("forgetting", png, alt, caption)


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
        axis.plot(
            [net["low"], net["high"]], [height + 0.3] * 2, color="#111827", lw=2.4, solid_capstyle="butt", zorder=3
        )
        axis.plot(net["value"], height + 0.3, "o", color="#111827", ms=7, zorder=4)
        reach = max(reach, f["lost"], f["gained"], -net["low"], net["high"])
    axis.set_xlim(-1.18 * reach, 1.18 * reach)
    row_names(axis, [shorter(label) for label in changes], zero=True)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.xaxis.set_major_formatter(lambda value, place: f"{abs(value):.0f}")
    axis.set_title("Questions")
    axis.set_xlabel("← lost      number      gained →")


def _whiskers(axis: Axes, texts: Mapping[str, Any]) -> None:
    """Change of the perplexity in per cent; the better is to the right, as it is for the questions."""
    ends = [0.0]
    for height, p in enumerate(texts.values()):
        value, low, high = (100 * math.expm1(p["log_ratio"][name]) for name in ("value", "low", "high"))
        colour = {1: LOST, -1: GAINED, 0: PALETTE[0]}[sign(p["log_ratio"])]
        axis.plot([low, high], [height, height], color=colour, lw=2.6, solid_capstyle="butt", zorder=3)
        axis.plot(value, height, "o", color=colour, ms=8, zorder=4)
        axis.annotate(
            number(value, "{:+.1f} %"), (value, height), (0, 9), textcoords="offset points", ha="center", color=colour,
            weight="bold",
        )  # fmt: skip
        ends += [low, high]
    margin = 0.25 * (max(ends) - min(ends) or 1.0)
    axis.set_xlim(max(ends) + margin, min(ends) - margin)  # turned round
    row_names(axis, [""] * len(texts), zero=True)
    axis.set_title("Perplexity of plain text")
    axis.set_xlabel("← worse      change, %      better →")
