"""`LfUConfig`: TRL's `SFTConfig` plus the method and the settings of its step."""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union

import torch
from trl import SFTConfig

from lfu.methods import REGISTRY, methods_of, written_out
from lfu.step.consistency import KINDS as CONSISTENCIES
from lfu.step.settings import StepSettings, with_fields_of
from lfu.support.choices import BELOW_ONE, check_within, number, one_of, optional, refuse_unread, whole
from lfu.support.flags import option
from lfu.undesirable import KINDS as AUXILIARIES

# The strengths the paper reports, by one word (alpha, lambda: base models, instruct models, RepS).
PRESETS: dict[str, tuple[float, float]] = {"base": (0.1, 5.0), "instruct": (0.001, 500.0), "reps": (0.1, 0.1)}
KINDS: dict[str, Any] = {"auxiliary": AUXILIARIES, "consistency": CONSISTENCIES}
SETTLED = {"alpha": "auto", "auxiliary": "lora", "consistency": "mse"}  # what None comes to
# numbers of transformers' that it takes unchecked, to fail in the middle of a run or to train nonsense
LIMITS = {
    "learning_rate": number(zero=True), "weight_decay": number(zero=True), "num_train_epochs": number(),
    "max_steps": ("-1 or a whole number >= 1", lambda v: v == -1 or whole(1)[1](v)),
    "per_device_train_batch_size": whole(1), "per_device_eval_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1), "dataloader_num_workers": whole(0), "seed": whole(0),
    "data_seed": optional(whole(0)), "adam_epsilon": number(zero=True),
    "adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE,
    "max_grad_norm": ("a finite number (0: no clipping)", lambda v: v is None or math.isfinite(v)),
    "label_smoothing_factor": BELOW_ONE, "neftune_noise_alpha": optional(number(zero=True)),
}  # fmt: skip
NOT_OF_THE_STEP = {"method", "method_args", "preset", "lam", "advice"}


@dataclass
@with_fields_of(StepSettings)
class LfUConfig(SFTConfig):
    r"""Every field of `trl.SFTConfig`, and those below. Defaults are the paper's, training settings included.

    Left at `None`, `lam` and `alpha` are `"auto"`; `preset` sets both to values of the paper's. What is given
    explicitly wins.

    Raises:
        ValueError: for any value outside its documented range, naming the field and the allowed values.
    """

    # the paper's training settings
    learning_rate: float = option(1e-4, "Initial learning rate (paper: 1e-4, with LoRA).")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule (paper: cosine).")
    warmup_steps: float = option(0.1, "Number of warm-up steps; a value below 1 is a share of all steps (paper: 0.1).")
    num_train_epochs: float = option(3.0, "Number of epochs (paper: 3).")
    per_device_train_batch_size: int = option(4, "Micro-batch size per device (paper: 4).")
    gradient_accumulation_steps: int = option(4, "Micro-batches per update (paper: 4, so 16 rows per update).")
    max_length: int | None = option(2048, "Cut rows off at this many tokens (paper: 2048).")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")  # as TRL 1.x

    # Learning from the Undesirable
    method: str = option("lfu", f"Fine-tuning method: {', '.join(REGISTRY)}; several joined by +. See: lfu methods.")
    method_args: str | None = option(None, "Settings of methods other than LfU, such as 'gem.beta=0.5,kl.weight=0.1'.")
    preset: str | None = option(
        None, "Use the paper's fixed alpha and lam: base (0.1, 5), instruct (0.001, 500), reps (0.1, 0.1). Default: "
        "both auto.",
    )  # fmt: skip
    alpha: Union[float, str, None] = option(  # noqa: UP007 (HfArgumentParser reads this form as a string flag)
        None, "Length of the normalised ascent step (Eq. 2), > 0. 'auto': the paper's 0.1, or longer (with a smaller "
        "lam) if the dtype is too coarse for it (bfloat16). Default: the preset's, or auto.",
    )  # fmt: skip
    lam: Union[float, str, None] = option(  # noqa: UP007 (HfArgumentParser reads this form as a string flag)
        None, "Weight lambda of the consistency term (Eq. 6), >= 0; 0 is plain SFT; 'auto' keeps the gradient ratio at "
        "`strength`. Default: the preset's, or auto.",
    )  # fmt: skip
    auxiliary: str | None = option(
        None, "What the ascent changes: lora (default), steering, or own (the trained weights)."
    )
    aux_rank: int = option(8, "Rank of the LoRA auxiliary.")
    aux_scaling: float = option(2.0, "Scaling of the LoRA auxiliary (LoRA's alpha / rank).")
    aux_targets: str | None = option(
        None, "Which linear layers get a LoRA auxiliary: comma-separated name endings, such as 'q_proj,v_proj'. "
        "Default: every linear layer of every block.",
    )  # fmt: skip
    steering_norm: bool = option(False, "Steering keeps the norm, as in the authors' code, instead of h + d (paper).")
    consistency: str | None = option(
        None, "Consistency term (Eq. 5): mse (default), cosine, contrastive or logit_kl (Eq. 7)."
    )
    mse_reduction: str = option("mean", "mse over the hidden dimension: mean (authors' code) or sum (paper's text).")
    temperature: float = option(0.1, "Temperature of the contrastive consistency.")
    log_layers: bool = option(False, "Also log consistency and displacement of every compared layer.")
    advice: bool = option(True, "Warn, once each, if the logged figures look wrong.")

    def __post_init__(self) -> None:
        bf16: bool | None = self.bf16  # type: ignore[has-type]
        if bf16 is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.bf16 = False  # TRL's default bf16=True is some 20 times slower than float32 on most CPUs
        check_within(self, LIMITS)
        methods = methods_of(self.method, self.method_args)
        self.method_args = self.method_args and written_out(methods)  # a mapping becomes text that can be saved
        for method in methods:
            method.configure(self)
        _refuse_deepspeed(self.deepspeed)
        super().__post_init__()
        on = any(method.takes_step for method in methods)
        self.auxiliary = self.auxiliary or ("steering" if on and self.preset == "reps" else SETTLED["auxiliary"])
        self.consistency = self.consistency or SETTLED["consistency"]
        for what, kinds in KINDS.items():
            one_of(what, getattr(self, what), kinds)
            self.make(what)  # refuses values outside their range
        self._refuse_unread(on)
        self._settle_strength(on)
        for method in methods:
            method.check(self)

    @property
    def step(self) -> StepSettings:
        """How an LfU step is taken."""
        return StepSettings(**{f.name: getattr(self, f.name) for f in fields(StepSettings)})

    def _settle_strength(self, on: bool) -> None:
        """alpha and lam: what is given, or the preset's, or auto; lam is 0 where no LfU step is taken.

        Raises ValueError: a setting of the step out of range; a lam given though no step is taken.
        """
        if self.preset is not None:
            one_of("preset", self.preset, PRESETS)
        if not on and self.lam not in (None, 0, 0.0, "0", "0.0"):
            raise ValueError(f"method={self.method!r} means lam=0, got lam={self.lam!r}: drop one of the two")
        alpha, lam = PRESETS[self.preset] if on and self.preset else ("auto", "auto" if on else 0.0)
        self.alpha = alpha if self.alpha is None else _number(self.alpha)
        self.lam = lam if self.lam is None else _number(self.lam)
        _ = self.step  # refuses what is out of range

    def make(self, what: str) -> Any:
        """The `auxiliary` or the `consistency` that is named, with the settings that its class says it uses."""
        kind = KINDS[what][getattr(self, what)]
        return kind(**{argument: getattr(self, name) for name, argument in kind.settings.items()})

    def _refuse_unread(self, on: bool) -> None:
        """Raises ValueError for a setting that is given and that nothing in this run reads; `on`: LfU steps are taken.

        `preset` may be a recipe's, which says what kind of model it is for, whatever the method.
        """
        unread: dict[str, str] = {}
        for what, kinds in KINDS.items():
            chosen = getattr(self, what)
            others = {name for kind in kinds.values() for name in kind.settings} - set(kinds[chosen].settings)
            unread |= dict.fromkeys({*others, *kinds[chosen].ignores}, f"{what}={chosen!r} does not use it")
        if not on:
            shared = {f.name for f in fields(StepSettings) if f.metadata["shared"]}
            names = {f.name for f in fields(self)} - {f.name for f in fields(SFTConfig)} - shared - NOT_OF_THE_STEP
            unread = dict.fromkeys(names, f"method={self.method!r} takes no LfU step")
        refuse_unread(self, unread, SETTLED)


def _number(value: Any) -> Any:
    """A text as the number that it spells; anything else is left for the checks."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


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
