"""`LfUConfig`: TRL's `SFTConfig` plus the knobs of Learning from the Undesirable."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from trl import SFTConfig

from lfu.methods import REGISTRY, methods_of, written_out
from lfu.methods.lfu import LfU
from lfu.step.cheaper import Cheaper, within
from lfu.step.consistency import KINDS
from lfu.support.choices import CHOICES, one_of

# The strengths the paper reports, by one word (alpha, lambda: base models, instruct models, RepS).
PRESETS: dict[str, tuple[float, float | str]] = {
    "base": (0.1, 5.0),
    "instruct": (0.001, 500.0),
    "reps": (0.1, 0.1),
}


@dataclass
class LfUConfig(SFTConfig):
    r"""Every field of `trl.SFTConfig`, and those below. Defaults are the paper's, training settings included.

    Left at `None`, `lam` is `"auto"` and `alpha` the paper's 0.1; `preset` sets both to values of the paper's. What is
    given explicitly wins.

    Raises:
        ValueError: for any value outside its documented range, naming the field and the allowed values.
    """

    # -- the paper's training settings ---------------------------------------------------------------------------------
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate (paper: 1e-4, with LoRA)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule (paper: cosine)."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps; below 1 a share of all steps (paper: 0.1)."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of epochs (paper: 3)."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Micro-batch size per device (paper: 4)."})
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Micro-batches per update (paper: 4, so 16 rows an update)."}
    )
    max_length: int | None = field(default=2048, metadata={"help": "Cut-off length in tokens (paper: 2048)."})

    # -- Learning from the Undesirable ---------------------------------------------------------------------------------
    method: str = field(
        default="lfu",
        metadata={"help": f"Fine-tuning method: {', '.join(REGISTRY)}; several joined by +. See: lfu methods."},
    )
    method_args: str | None = field(
        default=None,
        metadata={"help": "Knobs of the methods other than LfU, as in 'gem.beta=0.5,kl.weight=0.1'."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "The paper's fixed alpha and lam in one word: base (0.1, 5), instruct (0.001, 500), "
            "reps (0.1, 0.1). Default: alpha 0.1 and lam auto."
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Length of the normalised ascent step (Eq. 2), > 0. Default: the preset's, or 0.1."},
    )
    lam: Union[float, str, None] = field(  # noqa: UP007 (HfArgumentParser reads this form as a string flag)
        default=None,
        metadata={
            "help": "Weight lambda of the consistency term (Eq. 6), >= 0; 0 is plain SFT; 'auto' holds the gradient "
            "ratio at `strength`. Default: the preset's, or auto."
        },
    )
    strength: float = field(
        default=0.5,
        metadata={"help": "Target of lam='auto': ||grad(lam * consistency)|| / ||grad(SFT)||, > 0."},
    )
    auxiliary: str | None = field(
        default=None, metadata={"help": "What the ascent moves: lora (default), steering or own."}
    )
    aux_rank: int = field(default=8, metadata={"help": "Rank of the LoRA auxiliary."})
    aux_scaling: float = field(default=2.0, metadata={"help": "Scaling of the LoRA auxiliary (LoRA's alpha / rank)."})
    aux_targets: str | None = field(
        default=None,
        metadata={
            "help": "Which linear layers get a LoRA auxiliary: comma-separated name endings, such as "
            "'q_proj,v_proj'. Default: every linear layer of every block."
        },
    )
    steering_norm: bool = field(
        default=False,
        metadata={"help": "Steering in the norm-preserving form of the authors' code instead of h + d (paper)."},
    )
    consistency: str | None = field(
        default=None,
        metadata={"help": "Consistency term (Eq. 5): mse (default), cosine, contrastive or logit_kl (Eq. 7)."},
    )
    mse_reduction: str = field(
        default="mean", metadata={"help": "Over the hidden dimension: mean (authors' code) or sum (paper's text)."}
    )
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the contrastive consistency."})
    layers: str = field(
        default="all", metadata={"help": "Compared layers: all, early, middle, late (thirds), or a range '5-12'."}
    )
    blocks: str | None = field(
        default=None,
        metadata={
            "help": "Where the model keeps its list of blocks, if it is not found: a dotted path inside the "
            "decoder, such as 'layers'."
        },
    )
    final_norm: bool = field(
        default=True,
        metadata={"help": "Compare the last layer after the final norm, as transformers' hidden_states[K] is."},
    )
    positions: str = field(
        default="predict",
        metadata={"help": "Compared tokens: predict (positions that predict answer tokens: paper) or answer (code)."},
    )
    direction: str = field(
        default="perturbed",
        metadata={
            "help": "Where the consistency gradient flows: perturbed (through h': paper) or clean (through h, as in "
            "the authors' RepS code; moves the model towards the undesirable)."
        },
    )
    ascent_batch: str = field(
        default="same", metadata={"help": "Batch of the ascent: same, or independent (a second, own shuffle)."}
    )
    ascent_steps: int = field(default=1, metadata={"help": "Normalised ascent steps (Eq. 2), >= 1."})
    ascent_scope: str = field(
        default="global",
        metadata={
            "help": "Several processes: the ascent (LfU's, SAM's) by the gradient of all their parts (global), "
            "or of each its own (local)."
        },
    )
    same_dropout: bool = field(
        default=True, metadata={"help": "Clean and perturbed pass see the same dropout masks and embedding noise."}
    )
    trim: bool = field(
        default=True,
        metadata={
            "help": "The second pass leaves out padding and what follows the last compared token: the same gradients, "
            "less work. Not while dropout or embedding noise is on."
        },
    )
    every: int = field(
        default=1,
        metadata={"help": "APPROXIMATE, cheaper: the consistency on every k-th update only, with k times the weight."},
    )
    part: float = field(
        default=1.0,
        metadata={"help": "APPROXIMATE, cheaper: perturbed pass on this share of a micro-batch's rows, drawn anew."},
    )
    stale: int = field(
        default=0,
        metadata={
            "help": "APPROXIMATE, cheaper: an exact step on every k-th micro-batch; between, its ascent direction "
            "again, in the first-order form (2F+1B). 0: off."
        },
    )
    random_layers: int = field(
        default=0,
        metadata={"help": "APPROXIMATE, cheaper: compare n neighbouring layers from a random one on. 0: off."},
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "APPROXIMATE, cheaper: wanted cost of a step as a multiple of SFT's, > 1; picks among the four "
            "above and says which."
        },
    )
    on_bad_batch: str = field(
        default="skip",
        metadata={"help": "No labelled token, zero ascent gradient, non-finite values: skip and record, or raise."},
    )
    log_layers: bool = field(
        default=False, metadata={"help": "Log consistency and displacement of every compared layer, too."}
    )
    advice: bool = field(default=True, metadata={"help": "Warn, once each, when the logged figures look wrong."})

    def __post_init__(self) -> None:
        bf16: bool | None = self.bf16  # type: ignore[has-type]
        if bf16 is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.bf16 = False  # TRL's default bf16=True is some 20 times slower than float32 on most CPUs
        methods = methods_of(self.method, self.method_args)
        self.method_args = self.method_args and written_out(methods)  # a mapping becomes text that can be saved
        for method in methods:
            method.configure(self)
        _refuse_deepspeed(self.deepspeed)
        super().__post_init__()
        self._resolve_strength(any(isinstance(method, LfU) for method in methods))
        self._check()

    def _resolve_strength(self, lfu: bool) -> None:
        self.auxiliary = self.auxiliary or ("steering" if self.preset == "reps" else "lora")
        self.consistency = self.consistency or "mse"
        if self.preset is not None:
            one_of("preset", self.preset, PRESETS)
        alpha, lam = PRESETS.get(str(self.preset), (0.1, "auto"))
        try:
            self.alpha = alpha if self.alpha is None else float(self.alpha)
        except (TypeError, ValueError):
            raise ValueError(f"alpha must be a finite number > 0, got {self.alpha!r}") from None
        if not lfu:
            if self.lam not in (None, 0, 0.0, "0", "0.0"):
                raise ValueError(f"method={self.method!r} means lam=0, got lam={self.lam!r}: drop one of the two")
            self.lam = 0.0
        elif self.lam is None:
            self.lam = lam
        elif self.lam != "auto":
            try:
                self.lam = float(self.lam)
            except (TypeError, ValueError):
                raise ValueError(f"lam must be a number >= 0 or 'auto', got {self.lam!r}") from None

    def _check(self) -> None:
        one_of("auxiliary", str(self.auxiliary), ("lora", "steering", "own"))
        one_of("consistency", str(self.consistency), KINDS)
        one_of("mse_reduction", self.mse_reduction, ("mean", "sum"))
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), choices)
        for name in ("alpha", "strength", "temperature", "aux_scaling"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        if self.lam != "auto" and not (math.isfinite(float(self.lam)) and float(self.lam) >= 0):  # type: ignore[arg-type]
            raise ValueError(f"lam must be a finite number >= 0 or 'auto', got {self.lam!r}")
        for name in ("aux_rank", "ascent_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        self._check_cheaper()

    def _check_cheaper(self) -> None:
        form = Cheaper(self.every, self.part, self.stale, self.random_layers)
        if self.budget is not None:
            within(self.budget, full=True)
            if not form.exact:
                raise ValueError(f"budget={self.budget:g} picks the approximate form itself: drop {form}")
        packed: bool = self.packing or self.padding_free
        if form.part < 1 and (packed or self.per_device_train_batch_size == 1):
            why = "a packed micro-batch is one row" if packed else "per_device_train_batch_size=1"
            raise ValueError(f"part={form.part:g} takes some rows of a micro-batch, and {why}: use every=k")
        if self.lam == 0 and not (form.exact and self.budget is None):
            raise ValueError(
                f"{form or f'budget={self.budget:g}'} makes LfU's second pass cheaper, and lam=0 has none: drop it"
            )


def _refuse_deepspeed(given: Any) -> None:
    """Raises ValueError for JSON that is no configuration; what is no JSON at all is transformers' to refuse."""
    if not isinstance(given, str):
        return
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8") if os.path.exists(given) else given)
    except (ValueError, OSError):
        return
    if not (isinstance(found, dict) and isinstance(found.get("zero_optimization", {}), dict)):
        raise ValueError(f"deepspeed={given[:60]!r}: give a JSON file with DeepSpeed's configuration, an object")
