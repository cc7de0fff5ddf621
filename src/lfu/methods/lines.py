"""LiNeS: after training, the change of the weights shrinks towards the lower layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lfu.methods.method import knob
from lfu.methods.wise import WiSE


@dataclass
class LiNeS(WiSE):
    """`theta_l = theta_start + (alpha + (1 - alpha) (l - 1) / (K - 1)) (theta_tuned - theta_start)` in block l of K.

    The last block keeps its change whole, the first one keeps alpha of it, and so do the weights outside the blocks
    (embeddings, final norm, head), as in the authors' code. `alpha="auto"` tries 0, 0.1, ..., 1 on the evaluation set
    as WiSE-FT does here and takes the smallest that is within `tolerance` of the best; the paper, too, chooses on
    validation data, with beta = 1 - alpha for one task.

    What WiSE-FT asks of an adapter holds here: plain LoRA that starts at zero, or full weights.
    """

    name: ClassVar[str] = "lines"
    summary: ClassVar[str] = "after training, a smaller change in lower layers (LiNeS)"
    source: ClassVar[str] = "Wang et al., ICLR 2025, arXiv 2410.17146"
    protects: ClassVar[str] = "the general features of the lower layers"
    once: ClassVar[str] = "eleven evaluations with alpha=auto, and a copy of theta in CPU memory"
    never_with: ClassVar[Mapping[str, str]] = WiSE.never_with
    zero: ClassVar[str] = "with alpha 0"

    alpha: str | float = knob("auto", "share of the change that the first block keeps; auto: by the evaluation set")

    def share(self, alpha: float, layer: int | None) -> float:
        return alpha if layer is None else alpha + (1 - alpha) * (layer - 1) / max(self._depth - 1, 1)

    def kept(self, alpha: float) -> str:
        return f"kept {alpha:g} of the change in the first block, all of it in the last"
