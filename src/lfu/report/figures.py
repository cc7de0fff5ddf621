"""What all pictures have in common: the house style, colours, lines, intervals, and the bytes of a PNG."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lfu.report.text import shorter

GRID = "#e5e7eb"
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
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
# Okabe and Ito's, safe for colour-blind readers, the grey first: it is the base model's. Then four more, which
# differ from them and from each other in lightness, too.
PALETTE = (
    "#6b7280", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111827",
    "#7b3294", "#8c510a", "#8fc31f", "#b3001b",
)  # fmt: skip
DASHES = ("-", "--", "-.", ":")
MARKERS = "oD^vP*XpshH<>"  # 13, and 11 colours: together they repeat after 143
LOST, GAINED, INK = PALETTE[1], PALETTE[2], PALETTE[7]
DPI = 160


def draw(size: tuple[float, float], paint: Callable[..., None], across: int = 1, down: int = 1, **grid: Any) -> bytes:
    """A figure of that size in inches as PNG, whose axes are painted in the house style by `paint(*axes)`.

    Without pyplot, whose backend is the user's: a notebook that draws after a report has been written still shows it.
    """
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(*figure.subplots(down, across, squeeze=False, gridspec_kw=grid).flat)
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def look(models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label -> colour and dashes of its line; the first model, the one compared with, is alone in being grey."""
    grey, *colours = PALETTE
    first, *others = models
    looks = [{"color": colour, "ls": dashes} for dashes in DASHES for colour in colours]
    return {first: {"color": grey, "ls": "-"}} | dict(zip(others, cycle(looks)))


@dataclass(frozen=True)
class Panel:
    """A plot of lines, label -> (x, y) of each point; mappings with value, low and high as y are drawn with a band."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, Any]]]
    across: float | None = None  # where a grey line lies across
    most: float | None = None  # where a dotted line says how much is allowed
    marked: float | None = None  # the x of a broad line
    whole: bool = True  # whether x is counted


def panels(plots: Sequence[Panel], looks: Mapping[str, Mapping[str, Any]], **grid: Any) -> bytes:
    """Plots of lines beside each other as PNG, with one legend below. Points are marked unless they are many."""

    def paint(*axes: Axes) -> None:
        for axis, plot in zip(axes, plots):
            for label, points in plot.lines.items():
                x, y = zip(*points)
                values = [each["value"] if isinstance(each, Mapping) else each for each in y]
                axis.plot(x, values, lw=2, marker="o" if len(x) <= 40 else "", ms=3.5, label=label, **looks[label])
                if isinstance(y[0], Mapping):
                    low, high = ([each[end] for each in y] for end in ("low", "high"))
                    axis.fill_between(x, low, high, color=looks[label]["color"], alpha=0.18, lw=0)
            if plot.across is not None:
                axis.axhline(plot.across, color=GRID, lw=1.2, zorder=0)
            if plot.most is not None:
                axis.axhline(plot.most, color=LOST, ls=":", lw=1.6)
            if plot.marked is not None:
                axis.axvline(plot.marked, color=GRID, lw=4, zorder=0)
            finish(axis, plot.title, plot.x, plot.y, whole=plot.whole)
        legend(*axes)

    labels = {label for plot in plots for label in plot.lines}
    return draw((6 + 2 * len(plots), 3.4 + 0.25 * (len(labels) // 4)), paint, len(plots), **grid)


def finish(axis: Axes, title: str, x: str, y: str, *, whole: bool = True) -> None:
    """Title, labels, grid; whole numbers on the x axis."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(axis="y")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=whole, min_n_ticks=1))


def row_names(axis: Axes, labels: Sequence[str], *, zero: bool = False) -> None:
    """A name for each row of the y axis, the first on top, and a grid for the x axis; with a line at zero if wanted."""
    axis.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    if zero:
        axis.axvline(0, color=PALETTE[0], lw=1.4, zorder=1)


def whisker(axis: Axes, y: float, interval: Mapping[str, float], color: str, **more: Any) -> None:
    """A value as a dot on the bar of its interval, across."""
    axis.plot([interval["low"], interval["high"]], [y, y], color=color, lw=2.4, solid_capstyle="butt", zorder=3)
    axis.plot(interval["value"], y, "o", **{"color": color, "ms": 7, "zorder": 4} | more)


def legend(*axes: Axes) -> None:
    """One legend below the axes, each label once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if found:
        place: Any = {"loc": "outside lower center", "ncols": min(4, len(found))}
        axes[0].figure.legend(found.values(), [shorter(label, 22) for label in found], **place)
