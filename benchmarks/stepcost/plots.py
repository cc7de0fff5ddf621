"""Cost curves as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepcost.cases import AXES
from stepcost.curves import curve

NAMES = {
    "batch": "rows of the micro-batch",
    "length": "tokens per row",
    "size": "parameters",
    "layers": "layers",
    "rank": "rank of theta's LoRA",
}


def save_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """`step-cost-AXIS.png` for each axis with two points or more: ratio to SFT, and seconds. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for axis in AXES:
        found = curve(result, axis)
        if not found:
            continue
        figure, axes = plt.subplots(len(found), 2, figsize=(10, 3.6 * len(found)), squeeze=False)
        for (left, right), (theta, part) in zip(axes, found.items()):
            _lines(left, part, "ratio", axis, f"theta: {theta}, time over SFT's")
            left.plot(part["x"], part["floor_padded"], "k--", lw=1, label="floor, padded (FLOPs)")
            left.set_ylim(bottom=0)
            _lines(right, part, "seconds", axis, f"theta: {theta}, seconds")
            right.set_yscale("log")
            left.legend(fontsize=7, frameon=False)
        figure.tight_layout()
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"step-cost-{axis}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def _lines(axes: Any, part: dict[str, Any], what: str, axis: str, title: str) -> None:
    for name, ys in part[what].items():
        axes.plot(part["x"], ys, marker="o", ms=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(NAMES[axis])
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
