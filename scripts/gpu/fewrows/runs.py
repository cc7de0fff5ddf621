"""Which runs there are, and in which order: what says most comes first, as the time ends before the list does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

# theta -> learning rates, from careful to too high; weights of L2-SP
RATES = {"full": (2e-5, 6e-5, 2e-4), "lora": (1e-4, 5e-4, 2e-3)}
PULLS = {"full": (0.003, 0.03, 0.3), "lora": (0.03, 0.3, 3.0)}
# rows -> updates of a short and a long run, of 8 rows each
LENGTHS = {16: (16, 48), 64: (24, 72), 256: (32, 96)}
PAPER_ROWS, PAPER_BATCH, BATCH = 512, 16, 8


@dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Attributes:
        study: `few` (float32, all weights or LoRA), `paper` (bf16, LoRA, cosine), or `start`: no training at all.
        rows, draw: how many training rows, and which draw of them; `draw` seeds everything.
        theta: `full` or `lora` (rank 8).
        method: `sft`, `l2sp` (`weight` of the pull) or `lfu` (LoRA auxiliary, alpha 0.1; `lam`: `auto` or a number).
        rate: peak learning rate.
        updates: of `batch` rows.
    """

    study: str
    rows: int
    draw: int
    theta: str
    method: str
    rate: float
    updates: int
    weight: float = 0.0
    lam: float | str = 0.0

    @property
    def batch(self) -> int:
        return PAPER_BATCH if self.study == "paper" else BATCH

    @property
    def cost(self) -> float:
        """About how long the training takes, in updates of SFT on all weights with 8 rows."""
        method, theta = 2.4 if self.method == "lfu" else 1.0, 1.7 if self.theta == "lora" else 1.0
        return self.updates * self.batch / BATCH * method * theta

    def record(self) -> dict[str, Any]:
        return asdict(self)


START = Run("start", 0, 0, "full", "sft", 0.0, 0)


def few(rows: int, draw: int) -> Iterator[Run]:
    """All methods on one draw of rows."""
    short, long = LENGTHS[rows]
    for theta in RATES:
        low, middle, high = RATES[theta]
        make = lambda method, rate, updates=long, theta=theta, **more: Run(
            "few", rows, draw, theta, method, rate, updates, **more
        )
        yield make("sft", middle)
        yield make("lfu", middle, lam="auto")
        yield make("sft", high)
        yield make("l2sp", high, weight=PULLS[theta][1])
        yield make("sft", low)
        yield make("l2sp", high, weight=PULLS[theta][2])
        yield make("lfu", high, lam="auto")
        yield make("l2sp", high, weight=PULLS[theta][0])
        yield make("sft", middle, short)


def paper(seed: int) -> Iterator[Run]:
    """LoRA r 8 in bf16, 3 epochs, batch 16, cosine; SFT, LfU with lam=auto and with the paper's 0.1 x 5."""
    updates = 3 * PAPER_ROWS // PAPER_BATCH
    for rate in (5e-4, 1e-4):
        yield Run("paper", PAPER_ROWS, seed, "lora", "sft", rate, updates)
        for lam in ("auto", 5.0):
            yield Run("paper", PAPER_ROWS, seed, "lora", "lfu", rate, updates, lam=lam)


def all_runs() -> list[Run]:
    """In order of what they say: the paper's protocol, which has not been run yet; then draws of few rows."""
    found = [START, *paper(0), *paper(1), *paper(2)]
    for draw in range(6):
        for rows in (64, 16, 256):
            found += few(rows, draw)
    return found
