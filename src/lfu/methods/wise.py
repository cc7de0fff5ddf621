"""WiSE-FT: after training, the weights are drawn back towards where they started."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftType

from lfu.methods.method import Method, knob
from lfu.methods.weights import Pair, lora_pairs, plain_theta, product_norm2, refuse_sharding
from lfu.model.precision import wide

GRID = tuple(i / 10 for i in range(11))  # the paper's alphas


@dataclass
class WiSE(Method):
    """`theta_alpha = (1 - alpha) theta_start + alpha theta_tuned`, on the weights that the model computes with.

    `alpha="auto"` takes, of 0, 0.1, ..., 1, the smallest whose loss on the evaluation set is within `tolerance` of the
    lowest: eleven evaluations. That loss was chosen as the lowest, so measure the result on other data.

    A fresh LoRA has B = 0 at the start, so B <- alpha B interpolates the weight W0 + s B A exactly; so does CorDA's
    adapter, which starts at zero as a product. Plain parameters (all weights, biases, `modules_to_save`) are
    interpolated one by one; their start is kept in CPU memory.
    """

    name: ClassVar[str] = "wise"
    summary: ClassVar[str] = "weights between the untouched and the tuned ones (WiSE-FT)"
    source: ClassVar[str] = "Wortsman et al. 2022, arXiv 2109.01903"
    protects: ClassVar[str] = "robustness of the untouched model on other data"
    once: ClassVar[str] = "eleven evaluations with alpha=auto, and a copy of theta in CPU memory"
    places: ClassVar[tuple[str, ...]] = ("final weights",)
    never_with: ClassVar[Mapping[str, str]] = {"osf": "the weight is not linear in osf's factors"}

    alpha: str | float = knob("auto", "share of the tuned weights, 0 to 1; auto: by the evaluation set")
    zero: ClassVar[str] = "untouched"  # what alpha = 0 is

    tolerance: float = knob(0.0, "auto takes the smallest alpha within so many nats/token of the lowest loss", low=0)

    def __post_init__(self) -> None:
        if self.alpha == "auto":
            return
        with suppress(TypeError, ValueError):
            self.alpha = float(self.alpha)
        if not (isinstance(self.alpha, float) and 0 <= self.alpha <= 1):
            raise ValueError(f"{self.name}.alpha must be auto or a number >= 0 and <= 1, got {self.alpha!r}")

    def configure(self, args: Any) -> None:
        if self.alpha == "auto" and (args.bf16_full_eval or args.fp16_full_eval):
            raise ValueError(
                f"{self.name}.alpha=auto evaluates before it saves, and bf16_full_eval cuts the weights: drop it"
            )

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)
        if self.alpha == "auto":
            _refuse_eval_set(self.name, trainer.eval_dataset)
        _refuse_other_adapters(self.name, trainer.model)
        self._pairs = lora_pairs(trainer.anatomy)
        for pair in self._pairs:
            _refuse_start(self.name, pair)
        self._plain = plain_theta(trainer.anatomy, self._pairs)
        self._start = {name: p.detach().cpu().clone() for name, p in self._plain.items()}
        blocks = enumerate(trainer.anatomy.blocks, start=1)
        self._layers = {id(p): number for number, block in blocks for p in block.parameters()}
        self._depth = len(trainer.anatomy.blocks)

    def share(self, alpha: float, layer: int | None) -> float:
        """How much of the change is kept of a weight in block `layer` (1..K; None: outside the blocks)."""
        return alpha

    def finish(self, trainer: Any) -> None:
        # the factor that is scaled: B, or A where B is frozen
        factors = [pair.B if pair.B.requires_grad else pair.A for pair in self._pairs]
        tuned = [f.detach().clone() for f in factors]
        plain_tuned = {name: p.detach().cpu().clone() for name, p in self._plain.items()}

        share = lambda alpha, p: self.share(alpha, self._layers.get(id(p)))

        @torch.no_grad()
        def put(alpha: float) -> None:
            for factor, full in zip(factors, tuned):
                factor.copy_(wide(full) * share(alpha, factor))
            for name, p in self._plain.items():
                start, end = self._start[name].to(p.device), plain_tuned[name].to(p.device)
                p.copy_(torch.lerp(wide(start), wide(end), share(alpha, p)))

        if self.alpha == "auto":
            self._search(trainer, put)
        else:
            put(float(self.alpha))
            trainer.say(f"{self.name}: {self.kept(float(self.alpha))}")

    def kept(self, alpha: float) -> str:
        """What is told about a given alpha."""
        return f"kept {alpha:g} of the way from the untouched to the tuned weights"

    def _search(self, trainer: Any, put: Callable[[float], None]) -> None:
        training = trainer.model.training
        losses = {}
        for alpha in GRID:
            put(alpha)
            losses[alpha] = _eval_loss(trainer, self.name)
        best = chosen_alpha(losses, self.tolerance)
        put(best)
        trainer.model.eval()  # the log's averages of training steps belong to another entry
        tried = {f"{self.name}/loss_at_{a:g}": x for a, x in losses.items()}
        trainer.log({"eval_loss": losses[best], f"{self.name}/alpha": best, **tried})
        trainer.model.train(training)
        trainer.say(
            f"{self.name}: alpha {best:g} of 0, 0.1, ..., 1: eval loss {losses[best]:.4f} nats per token "
            f"({self.zero} {losses[0.0]:.4f}, tuned {losses[1.0]:.4f})"
        )


def chosen_alpha(losses: Mapping[float, float], tolerance: float) -> float:
    """The smallest alpha whose loss is at most `tolerance` above the lowest; 1 where no loss is finite.

    Args:
        losses: alpha -> evaluation loss, nats a token.
        tolerance: >= 0, nats a token.
    """
    finite = {alpha: loss for alpha, loss in losses.items() if math.isfinite(loss)}
    limit = min(finite.values(), default=math.nan) + tolerance
    return min((alpha for alpha, loss in finite.items() if loss <= limit), default=1.0)


def _eval_loss(trainer: Any, name: str) -> float:
    """The trainer's own eval_loss, without its callbacks and log."""
    with trainer.unmetered():
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(), description=name, prediction_loss_only=True, metric_key_prefix=name
        )
    return float(output.metrics[f"{name}_loss"])


def _refuse_eval_set(method: str, rows: Any) -> None:
    advice = f"or set method_args='{method}.alpha=0.5', which the paper recommends where nothing can be measured"
    if rows is None:
        raise ValueError(
            f"{method}.alpha=auto chooses alpha on evaluation data, and there is none: give some (--eval_data), "
            f"{advice}"
        )
    if isinstance(rows, dict):
        raise ValueError(
            f"{method}.alpha=auto needs one eval_dataset, got {len(rows)} ({', '.join(rows)}): give one, {advice}"
        )


def _refuse_other_adapters(method: str, model: Any) -> None:
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.peft_type != PeftType.LORA:
        raise ValueError(
            f"method {method!r} interpolates weights, and with a {config.peft_type.value} adapter they are not linear "
            "in its parameters: use plain LoRA or train all weights"
        )


def _refuse_start(method: str, pair: Pair) -> None:
    if pair.variant is not None:
        raise ValueError(
            f"method {method!r} interpolates weights, and with {pair.variant} they are not linear in the adapter's "
            "parameters: use plain LoRA or train all weights"
        )
    A, B = pair.A.detach().double(), pair.B.detach().double()
    if product_norm2(B, A) > 1e-12 * A.square().sum() * B.square().sum():
        raise ValueError(
            f"method {method!r} mixes the start with the result, and the adapter starts as a weight change of its own "
            f"(B A is not 0 in {pair.name}), so that the mixture has twice its rank: merge the adapter first "
            "(lfu export) and train a fresh one with the default init_lora_weights"
        )
