"""WiSE-FT and LiNeS: after training, the weights are drawn back towards where they started."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lfu.methods.knobs import refuse_idle
from lfu.methods.method import Method, knob
from lfu.methods.run import Trainer
from lfu.methods.weights import Pair, form_of, lora_pairs, plain_theta, product_norm2
from lfu.model.precision import wide

GRID = tuple(i / 10 for i in range(11))  # the paper's alphas


class WiSE(Method):
    """`theta_alpha = (1 - alpha) theta_start + alpha theta_tuned`, on the weights that the model computes with.

    `alpha="auto"` takes, of 0, 0.1, ..., 1, the smallest whose loss on the evaluation set is within `tolerance` of the
    lowest: eleven evaluations. That loss was chosen as the lowest, so measure the result on other data.

    A fresh LoRA has B = 0 at the start, so B <- alpha B interpolates the weight W0 + s B A exactly; CorDA's adapter
    does as well. Plain parameters are interpolated one by one; their start is kept in CPU memory.
    """

    name = "wise"
    summary = "weights between the untouched and the tuned ones (WiSE-FT)"
    source = "Wortsman et al. 2022, arXiv 2109.01903"
    protects = "robustness of the untouched model on other data"
    once = "eleven evaluations with alpha=auto, and a copy of theta in CPU memory"
    places = ("final weights",)
    never_with = {"osf": "the weight is not linear in osf's factors"}  # noqa: RUF012 (declared in Method)
    whole_weights = True

    alpha: str | float = knob("auto", "share of the tuned weights; auto: by the evaluation set", low=0, high=1)
    tolerance: float = knob(0.0, "alpha=auto: how far above the lowest loss it may be, in nats per token (ours)", low=0)
    zero = "untouched"  # what alpha = 0 is

    def __post_init__(self) -> None:
        refuse_idle(self, "tolerance", by="alpha")

    def configure(self, args: Any) -> None:
        if self.alpha == "auto" and (args.bf16_full_eval or args.fp16_full_eval):
            raise ValueError(f"{self.name}.alpha=auto evaluates first, and bf16_full_eval cuts the weights: drop it")

    def check_adapter(self, config: Any, *, further: bool = False) -> None:
        _refuse_form(self.name, form_of(config))

    def setup(self, trainer: Trainer) -> None:
        rows = trainer.eval_dataset
        if self.alpha == "auto" and (rows is None or isinstance(rows, dict)):
            found = "there is none" if rows is None else f"there are {len(rows)} sets of them ({', '.join(rows)})"
            raise ValueError(
                f"{self.name}.alpha=auto chooses alpha on evaluation data, and {found}: give one set (--eval_data), "
                f"or set method_args='{self.name}.alpha=0.5', which the paper recommends where nothing can be measured"
            )
        pairs = lora_pairs(trainer.anatomy)
        _refuse_start(self.name, pairs, trainer.model)
        # of a pair B goes back to 0, or A where B is frozen
        factors = [pair.B if pair.B.requires_grad else pair.A for pair in pairs]
        plain = plain_theta(trainer.anatomy, pairs).values()
        self._start = [(f, torch.zeros_like(f, device="cpu")) for f in factors]
        self._start += [(p, p.detach().cpu().clone()) for p in plain]
        blocks = enumerate(trainer.anatomy.blocks, start=1)
        self._layers = {id(p): number for number, block in blocks for p in block.parameters()}
        self._depth = len(trainer.anatomy.blocks)

    def share(self, alpha: float, layer: int | None) -> float:
        """How much of the change is kept of a weight in block `layer` (1..K; None: outside the blocks)."""
        return alpha

    def kept(self, alpha: float) -> str:
        """What is told about a given alpha."""
        return f"kept {alpha:g} of the way from the untouched to the tuned weights"

    def finish(self, trainer: Trainer) -> None:
        tuned = [p.detach().cpu().clone() for p, _ in self._start]

        @torch.no_grad()
        def put(alpha: float) -> None:
            for (p, start), end in zip(self._start, tuned):
                share = self.share(alpha, self._layers.get(id(p)))
                p.copy_(torch.lerp(wide(start.to(p.device)), wide(end.to(p.device)), share))

        if self.alpha == "auto":
            self._search(trainer, put)
        else:
            put(float(self.alpha))
            trainer.say(f"{self.name}: {self.kept(float(self.alpha))}")

    def _search(self, trainer: Trainer, put: Callable[[float], None]) -> None:
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


class LiNeS(WiSE):
    """`theta_l = theta_start + (alpha + (1 - alpha) (l - 1) / (K - 1)) (theta_tuned - theta_start)` in block l of K.

    The last block keeps its change whole, the first one keeps alpha of it, and so do the weights outside the blocks
    (embeddings, final norm, head), as in the authors' code. alpha is chosen, and adapters are refused, as by WiSE-FT.
    """

    name = "lines"
    summary = "after training, a smaller change in lower layers (LiNeS)"
    source = "Wang et al., ICLR 2025, arXiv 2410.17146"
    protects = "the general features of the lower layers"
    zero = "with alpha 0"

    alpha: str | float = knob("auto", "share of its change that the first block keeps; auto: measured", low=0, high=1)

    def share(self, alpha: float, layer: int | None) -> float:
        return alpha if layer is None else alpha + (1 - alpha) * (layer - 1) / max(self._depth - 1, 1)

    def kept(self, alpha: float) -> str:
        return f"kept {alpha:g} of the change in the first block, all of it in the last"


def chosen_alpha(losses: Mapping[float, float], tolerance: float) -> float:
    """The smallest alpha whose loss (nats per token) is at most `tolerance` above the lowest; 1 if none is finite."""
    finite = {alpha: loss for alpha, loss in losses.items() if math.isfinite(loss)}
    limit = min(finite.values(), default=math.nan) + tolerance
    return min((alpha for alpha, loss in finite.items() if loss <= limit), default=1.0)


def _eval_loss(trainer: Trainer, name: str) -> float:
    """The trainer's own eval_loss, without its callbacks and log."""
    with trainer.unmetered():
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(), description=name, prediction_loss_only=True, metric_key_prefix=name
        )
    return float(output.metrics[f"{name}_loss"])


def _refuse_form(method: str, variant: str | None) -> None:
    if variant is not None:
        raise ValueError(
            f"method {method!r} interpolates weights, and with {variant} they are not linear in the adapter's "
            "parameters: use plain LoRA or train all weights"
        )


def _refuse_start(method: str, pairs: list[Pair], model: Any) -> None:
    """Raises ValueError for an adapter whose mixture with the start is no such adapter."""
    _refuse_form(method, form_of(getattr(model, "active_peft_config", None)))
    for pair in pairs:
        _refuse_form(method, pair.variant)
        A, B = pair.A.detach().cpu().double(), pair.B.detach().cpu().double()
        if product_norm2(B, A) > 1e-12 * A.square().sum() * B.square().sum():
            raise ValueError(
                f"method {method!r} mixes the start with the result, and the adapter starts as a weight change of its "
                f"own (B A is not 0 in {pair.name}), so that the mixture has twice its rank: merge the adapter first "
                "(lfu export) and train a fresh one with the default init_lora_weights"
            )
