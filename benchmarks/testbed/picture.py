"""The frontier: what each method gains against what it keeps, beside all that plain SFT reaches."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from testbed.report import Study

SHOWN = 7  # methods a panel: those furthest ahead, and LfU


def draw(study: Study, path: Path) -> None:
    """A column a number of rows; above, the target against the other skills; below, its rewording."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [rows for rows in study.sizes if study.of(rows, "SFT")]
    figure, axes = plt.subplots(2, len(sizes), figsize=(4.2 * len(sizes), 7.4), squeeze=False, sharex="col")
    chosen = {rows: _chosen(study, rows) for rows in sizes}
    names = list(dict.fromkeys(s.method for settings in chosen.values() for s in settings))
    look = {name: (f"C{n % 10}", "osD^vP*X<>"[n // 10 * 3 % 10 + n % 3]) for n, name in enumerate(names)}
    for column, rows in enumerate(sizes):
        for row, label in enumerate(("target", "reworded")):
            panel = axes[row][column]
            _sft(panel, study, rows, row)
            for setting in chosen[rows]:
                color, marker = look[setting.method]
                _point(panel, study.points(setting)[study.choosing :], row, color, marker, setting.method)
            panel.set_ylabel(f"{label}, % right" if column == 0 else "")
            panel.grid(alpha=0.25)
        axes[0][column].set_title(f"{rows} rows")
        axes[1][column].set_xlabel("other skills kept, % right")
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.04 + 0.025 * (len(handles) // 5), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _chosen(study: Study, rows: int) -> list[Any]:
    """The settings that the choosing bases chose: those furthest ahead there, and LfU's."""
    from testbed.frontier import lead

    surface = study.surface(rows)[: study.choosing].mean(0)
    found = [study.chosen(rows, method) for method in study.methods(rows)]
    found.sort(key=lambda s: -lead(study.points(s)[: study.choosing].mean(0), surface))
    best = found[:SHOWN]
    return best + [s for s in found[SHOWN:] if s.method.startswith("LfU own") and "+" not in s.method][:1]


def _sft(panel: Any, study: Study, rows: int, axis: int) -> None:
    lengths = defaultdict(list)
    for setting in study.of(rows, "SFT"):
        lengths[setting.steps].append(setting)
    for n, steps in enumerate(sorted(lengths)):
        settings = sorted(lengths[steps], key=lambda s: s.rate)
        values = np.array([study.points(s)[study.choosing :].mean(0) for s in settings])
        style = ("-", "--", ":")[n % 3]
        label = f"SFT, {('short', 'usual', 'long')[n % 3]} training" if len(lengths) == 3 else "SFT"
        panel.plot(values[:, 2], values[:, axis], style, color="0.45", marker=".", markersize=4, label=label)


def _point(panel: Any, points: np.ndarray, axis: int, color: str, marker: str, label: str) -> None:
    middle, error = points.mean(0), points.std(0, ddof=1) / np.sqrt(len(points))
    look: dict[str, Any] = dict(color=color, marker=marker, markersize=7, linestyle="", elinewidth=1, label=label)
    panel.errorbar(middle[2], middle[axis], xerr=error[2], yerr=error[axis], **look)
