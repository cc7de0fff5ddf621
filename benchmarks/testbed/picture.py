"""The frontier: what each method gains against what it keeps, beside all that plain SFT reaches."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from testbed.plan import LENGTHS
from testbed.setting import Setting

if TYPE_CHECKING:
    from testbed.report import Study

SHOWN = 3  # methods a panel beside the curves: the best ones, and LfU's three auxiliaries
LFU = ("LfU own", "LfU lora", "LfU steering")
CURVES = {"L2-SP": "tab:red", "L2-SP auto": "tab:blue"}  # all strengths at rate 1e-3
COLORS = ("tab:green", "tab:olive", "tab:cyan", "tab:purple", "tab:orange", "tab:pink", "tab:brown", "black")


def draw(study: Study, path: Path) -> None:
    """A column a number of rows; above, the target against the other skills; below, its rewording."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(study.sizes), figsize=(4.2 * len(study.sizes), 7.4), squeeze=False, sharex="col")
    chosen = {rows: _chosen(study, rows) for rows in study.sizes}
    names = [*LFU, *dict.fromkeys(s.method for settings in chosen.values() for s in settings if s.method not in LFU)]
    look = {name: (COLORS[n % len(COLORS)], "DDDsv^P*"[n % 8]) for n, name in enumerate(names)}
    for column, rows in enumerate(study.sizes):
        for row, label in enumerate(("target", "reworded")):
            panel = axes[row][column]
            _curves(panel, study, rows, row)
            for setting in chosen[rows]:
                _point(panel, study, setting, row, look[setting.method])
            panel.set_ylabel(f"{label}, % right" if column == 0 else "")
            panel.grid(alpha=0.25)
        axes[0][column].set_title(f"{rows} rows")
        axes[1][column].set_xlabel("other skills kept, % right")
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels())))
    order = sorted(handles, key=lambda name: (not name.startswith("SFT"), name.partition(",")[0] not in CURVES))
    figure.legend([handles[name] for name in order], order, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.035 + 0.025 * -(-len(order) // 5), 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _chosen(study: Study, rows: int) -> list[Setting]:
    """Each method where the mean of its axes was best on the choosing bases: the best methods, and LfU's."""
    found = [study.balanced(study.of(rows, method)) for method in study.methods(rows) if method not in CURVES]
    found.sort(key=lambda s: -study.points(s)[: study.choosing].mean())
    others = [s for s in found if s.method not in LFU]
    return others[:SHOWN] + [s for s in found if s.method in LFU]


def _curves(panel: Any, study: Study, rows: int, axis: int) -> None:
    lengths = defaultdict(list)
    for setting in study.of(rows, "SFT"):
        lengths[setting.steps].append(setting)
    for steps, settings in sorted(lengths.items()):
        n = list(LENGTHS[rows]).index(steps) if steps in LENGTHS.get(rows, ()) else 1
        look = dict(
            color="0.45", linestyle=("-.", "-", ":")[n], label=f"SFT, {('short', 'usual', 'long')[n]}: all rates"
        )
        _curve(panel, study, sorted(settings, key=lambda s: s.rate), axis, **look)
    for method, color in CURVES.items():
        settings = [s for s in study.of(rows, method) if s.rate == 1e-3]
        settings.sort(key=lambda s: s.pull + s.share)
        _curve(panel, study, settings, axis, color=color, label=f"{method}, rate 0.001: all strengths")


def _curve(panel: Any, study: Study, settings: list[Setting], axis: int, **look: Any) -> None:
    if settings:
        values = np.array([study.points(s)[study.choosing :].mean(0) for s in settings])
        panel.plot(values[:, 2], values[:, axis], marker=".", markersize=5, **look)


def _point(panel: Any, study: Study, setting: Setting, axis: int, look: tuple[str, str]) -> None:
    """With the standard error of its difference to SFT's best, over bases: that between bases is common to both."""
    points = study.points(setting)[study.choosing :]
    apart = points - study.points(study.balanced(study.of(setting.rows, "SFT")))[study.choosing :]
    middle, error = points.mean(0), apart.std(0, ddof=1) / np.sqrt(len(apart))
    bars = dict(xerr=error[2], yerr=error[axis], elinewidth=1, linestyle="", markersize=6)
    panel.errorbar(middle[2], middle[axis], color=look[0], marker=look[1], label=setting.method, **bars)
