"""One way to fine-tune: the method, its strength, the learning rate, the length and the number of rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What a run is decided by, beside its base model and its draw of rows. A strength of 0 switches its term off.

    Every run trains with AdamW (betas 0.9 and 0.999, no weight decay), a linear schedule to zero, clipping at 1, and
    batches of `batch` rows or all rows if they are fewer.

    Args:
        rows: how many rows are fine-tuned on.
        steps: updates.
        rate: learning rate.
        lora: theta is a LoRA of rank 8 on every linear layer, `W0 + 2 B A`, instead of all weights.
        auxiliary: LfU with this auxiliary, `own`, `lora` or `steering`; "" for none.
        strength: gradient ratio at which LfU's lam is held (`lam="auto"`).
        alpha: length of LfU's ascent; negative descends instead, towards the desirable.
        positions: of LfU's consistency: `answer` (those that predict answer tokens), `prompt` or `all`.
        layers: which of the layers (1 is the first) LfU's consistency compares; () for all.
        pull: L2-SP's weight; of `pull_kind`: in the gradient (`coupled`), beside Adam as AdamW's decay (`decoupled`),
            in Fisher's metric (`fisher`, EWC), towards the moving average of the weights (`average`), or falling with
            the schedule (`fading`).
        share: L2-SP's `weight="auto"`: the pull's norm at update t of T is this share of `t / T` times the mean norm of
            the gradient so far; with `pull_kind="current"` of the norm of this very gradient, whatever t.
        rho: SAM's radius.
        kl: weight of KL(untouched || tuned) on the training rows.
        anchor: weight of the same KL on 4 rows a step of `anchor_text`: `own` (the untouched model writes them from a
            random first token), `noise` (random tokens) or `old` (rows of the skills to be kept: data that a user may
            not have). `anchor_on="hidden"` takes the mean square of hidden states of all layers instead.
        replay: share of the batch that is rows of the old skills, added to it and trained on.
        weighting: of the tokens' losses: `dft` (by their probability), `eaft` (by the model's entropy there), `talr`
            (by how easy they are now), `flow` (rows, by how easy they were for the untouched model), `stm` (without
            tokens that it finds unlikely), `psft` (until a token is 1.28 times as likely as eight updates before at
            most); each with its source's values.
        wise: share of the change that is kept after training (WiSE-FT).
        lines: share of it that the first layer keeps, the last one keeping all (LiNeS).
    """

    rows: int
    steps: int
    rate: float
    batch: int = 16
    lora: bool = False
    auxiliary: str = ""
    strength: float = 0.0
    alpha: float = 0.1
    positions: str = "answer"
    layers: tuple[int, ...] = ()
    pull: float = 0.0
    pull_kind: str = "coupled"
    share: float = 0.0
    rho: float = 0.0
    kl: float = 0.0
    anchor: float = 0.0
    anchor_text: str = "own"
    anchor_on: str = "logits"
    replay: float = 0.0
    weighting: str = ""
    wise: float = 1.0
    lines: float = 1.0

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults: what identifies the setting."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def key(self) -> str:
        """The same for equal settings and for no others."""
        return json.dumps(self.changed(), sort_keys=True)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Setting:
        """From what `changed` gave, after a trip through JSON."""
        fields_: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        return cls(**fields_)

    @property
    def trained(self) -> Setting:
        """What is trained: the setting without what is done to the weights afterwards."""
        return replace(self, wise=1.0, lines=1.0)

    @property
    def method(self) -> str:
        """Its row in the tables: settings of one method differ in rate, length and strength alone."""
        parts = []
        if self.auxiliary:
            more = [] if self.positions == "answer" else [f"{self.positions} tokens"]
            more += [f"layers {'+'.join(map(str, self.layers))}"] if self.layers else []
            more += ["desirable"] if self.alpha < 0 else []
            parts.append(" ".join([f"LfU {self.auxiliary}", *more]))
        if self.pull or self.share:
            kind = {
                "coupled": "",
                "current": " of the current gradient",
                "fisher": " in Fisher's metric (EWC)",
                "average": " towards the average",
            }
            parts.append("L2-SP" + (" auto" if self.share else "") + kind.get(self.pull_kind, f" {self.pull_kind}"))
        parts += ["SAM"] if self.rho else []
        parts += ["KL on the rows"] if self.kl else []
        if self.anchor:
            parts.append(f"anchor {self.anchor_text}" + (" hidden" if self.anchor_on == "hidden" else ""))
        parts += ["replay"] if self.replay else []
        parts += [self.weighting.upper()] if self.weighting else []
        parts += ["WiSE"] if self.wise < 1 else []
        parts += ["LiNeS"] if self.lines < 1 else []
        return " + ".join(parts or ["SFT"]) + (", LoRA" if self.lora else "")

    @property
    def place(self) -> str:
        """Where on the method's curve it lies: its strengths, rate and length."""
        named = {"strength": self.strength, "pull": self.pull, "share": self.share, "rho": self.rho, "kl": self.kl,
                 "anchor": self.anchor, "replay": self.replay}  # fmt: skip
        parts = [f"{name} {value:g}" for name, value in named.items() if value]
        parts += [f"alpha {abs(self.alpha):g}"] if self.auxiliary else []
        parts += [f"kept {min(self.wise, self.lines):g}"] if self.trained != self else []
        return ", ".join([*parts, f"rate {self.rate:g}", f"{self.steps} updates"])
