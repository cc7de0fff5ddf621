"""What the test bed compares: every method over a range of its own strength, and SFT over learning rates and epochs.

A method that forgets less may only have learned less: so the yardstick is not one SFT run but the curve of all that
plain SFT reaches with smaller steps or fewer of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LEARNING_RATE = 1e-3
EPOCHS = 30
# The curves that are run unless others are asked for.
SHORT = (
    "sft", "sft, learning rate", "sft, epochs", "lfu", "lfu_reps", "logit_kl", "sam", "neftune", "gem", "kl", "l2sp",
    "im", "replay",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One way to fine-tune: `family` is the curve it belongs to, `label` its place on it."""

    family: str
    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its runs are called."""
        return f"{self.family} {self.label}".strip()


def _curve(family: str, method: str, key: str, values: tuple[Any, ...], **fixed: Any) -> list[Setting]:
    knob = "." in key
    return [
        Setting(family, f"{key.rpartition('.')[2]} {value}", method,
                {**fixed, **({"method_args": f"{key}={value}"} if knob else {key: value})})
        for value in values
    ]  # fmt: skip


def _ablations() -> list[Setting]:
    """LfU's own knobs one by one, the others at their defaults; of `lam`, the paper's fixed weight, too."""
    auto: dict[str, Any] = {"lam": "auto"}
    return [
        *_curve("lfu, fixed lam", "lfu", "lam", (0.1, 1.0, 5.0, 50.0)),
        *[
            Setting("lfu, lam x alpha 0.5", f"alpha {alpha}", "lfu", {"alpha": alpha, "lam": 0.5 / alpha})
            for alpha in (0.001, 0.01, 1.0, 10.0)
        ],
        *_curve("lfu, layers", "lfu", "layers", ("early", "middle", "late"), **auto),
        *_curve("lfu, ascent steps", "lfu", "ascent_steps", (2, 4), **auto),
        *_curve("lfu, consistency", "lfu", "consistency", ("cosine", "contrastive"), **auto),
        *_curve("lfu, direction", "lfu", "direction", ("clean",), **auto),
        # the approximate forms, beside "lfu strength 0.5", which is exact
        *_curve("lfu, cheaper", "lfu", "every", (2, 4), **auto),
        *_curve("lfu, cheaper", "lfu", "part", (0.5, 0.25), **auto),
        *_curve("lfu, cheaper", "lfu", "stale", (2, 4), **auto),
        *_curve("lfu, cheaper", "lfu", "random_layers", (2,), **auto),
        *_curve("lfu, cheaper", "lfu", "budget", (1.3,), **auto),
    ]


def settings() -> list[Setting]:
    """All of them, SFT first."""
    ratios = (0.1, 0.5, 2.0)
    return [
        Setting("sft", "", "sft"),
        *_curve("sft, learning rate", "sft", "learning_rate", (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 2e-3)),
        *_curve("sft, epochs", "sft", "num_train_epochs", (3, 10, 60)),
        *_curve("lfu", "lfu", "strength", ratios, lam="auto"),
        *_curve("lfu alpha 0.001", "lfu", "strength", ratios, lam="auto", alpha=0.001),
        *_curve("lfu alpha 1", "lfu", "strength", ratios, lam="auto", alpha=1.0),
        *_curve("lfu own", "lfu", "strength", ratios, lam="auto", auxiliary="own"),
        *_curve("lfu independent batch", "lfu", "strength", ratios, lam="auto", ascent_batch="independent"),
        *_curve("lfu_reps", "lfu_reps", "strength", ratios, lam="auto"),
        *_curve("logit_kl", "logit_kl", "strength", ratios, lam="auto"),
        *_curve("lfu, learning rate", "lfu", "learning_rate", (2e-4, 5e-4), lam="auto"),
        *_curve("lfu_reps, learning rate", "lfu_reps", "learning_rate", (2e-4, 5e-4), lam="auto"),
        *_ablations(),
        *_curve("sam", "sam", "sam.rho", (0.05, 0.2, 1.0)),
        *_curve("neftune", "neftune", "neftune.alpha", (5.0, 15.0, 50.0)),
        *_curve("gem", "gem", "gem.beta", (0.5, 0.7, 0.9)),
        Setting("dft", "", "dft"),
        Setting("im", "", "im"),
        *_curve("replay", "replay", "replay.share", (0.1, 0.3, 0.5)),
        *_curve("kl", "kl", "kl.weight", (0.05, 0.5, 5.0)),
        *_curve("kl, learning rate", "kl", "learning_rate", (2e-4, 5e-4), method_args="kl.weight=0.5"),
        *_curve("l2sp", "l2sp", "l2sp.weight", (0.01, 0.1, 1.0)),
        *_curve("l1", "l1", "l1.weight", (0.05, 0.5)),
        *_curve("l2", "l2", "l2.weight", (0.01, 0.1)),
        *_curve("ema", "ema", "ema.decay", (0.99, 0.999)),
        *_curve("wise", "wise", "wise.alpha", (0.3, 0.5, 0.7)),
    ]
