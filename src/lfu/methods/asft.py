"""ASFT: dynamic fine-tuning with a KL to the untouched model: `dft+kl` under its own name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lfu.methods.kl import KL


@dataclass
class ASFT(KL):
    """`l = - (1/N) sum_t stop(p_t) log p_t + weight * (1/N) sum_t KL(r_t || p_t)`, r the untouched model.

    `dft` and `kl` together, as `method="dft+kl"` is; see those two. LLaMA-Factory's weight is 0.1.
    """

    name: ClassVar[str] = "asft"
    summary: ClassVar[str] = "dft with a KL to the untouched model"
    source: ClassVar[str] = "Zhu et al. 2025, arXiv 2509.23753 (weight 0.05)"
    protects: ClassVar[str] = "what the model knows against answers that it finds unlikely"
    places: ClassVar[tuple[str, ...]] = ("token loss", "penalty")
    never_with: ClassVar[Mapping[str, str]] = {"kl": "asft has the same term already"}

    def configure(self, args: Any) -> None:
        args.loss_type = "dft"
