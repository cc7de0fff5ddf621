"""LfU with representation steering as the auxiliary: the paper's RepS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lfu.methods.lfu import LfU


@dataclass
class LfURepS(LfU):
    """LfU whose ascent moves one vector a layer, `h'[l] = h[l] + d_l` (paper: alpha and lam 0.1, `preset="reps"`)."""

    name: ClassVar[str] = "lfu_reps"
    summary: ClassVar[str] = "LfU with one steering vector a layer as the auxiliary"
    auxiliary: ClassVar[str | None] = "steering"
