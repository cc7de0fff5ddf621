"""One micro-batch of Learning from the Undesirable (Eq. 1 to 6), in plain PyTorch, by the exact 2F+2B shortcut.

Written down naively the method costs three forwards and three backwards. But the auxiliary starts as an exact no-op,
so the SFT loss of theta and of theta_aux are one number, and one forward and backward with the zero auxiliary attached
gives both d l/d theta and d l/d aux. That graph is freed; one perturbed forward without the head, one backward: 2F+2B.
`LfUStep.exact` is the method on one screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lfu.model.anatomy import anatomy, layer_range
from lfu.model.precision import wide
from lfu.model.representations import Reader, answer_positions
from lfu.model.rng import generators
from lfu.parallel.several import processes_of
from lfu.step import consistency_pass, first_order
from lfu.step.cheaper import cost, trains_all, within
from lfu.step.consistency import consistency_of
from lfu.step.gradients import SplitGradients, sample_of
from lfu.step.reach import PAPER, Reach
from lfu.step.record import Record, Skip
from lfu.step.refusals import refuse_compiled, refuse_form
from lfu.step.second_pass import Batch, Micro, SecondPass
from lfu.step.settings import StepSettings
from lfu.step.soundness import BadBatch, check_finite, sound_parts
from lfu.step.strength import Strength
from lfu.step.term import Term
from lfu.undesirable import Auxiliary, LoRA, Own, Steering, ascend, auxiliary_of

Loss = Callable[[nn.Module, Batch, "float | torch.Tensor"], torch.Tensor]


def sft_loss(model: nn.Module, batch: Batch, num_items: float | torch.Tensor) -> torch.Tensor:
    """Eq. 1: the token negative log-likelihood of the answer, summed and divided by `num_items`.

    Args:
        model: a causal language model that returns logits `(B, T, V)`.
        batch: `input_ids`, `labels` `(B, T)`, anything else the model takes.
        num_items: labelled tokens of all micro-batches of one update.

    Returns:
        a scalar in nats a token; in float32, or float64 if the logits are. Zero, still connected to the model, for a
        batch without a labelled token.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}
    logits = wide(model(**{**inputs, "use_cache": False}).logits[:, :-1])
    targets = batch["labels"][:, 1:].to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / num_items


class LfUStep:
    """Leaves the gradient of Eq. 6, `l_SFT(theta) + lam * l_cons`, on theta, for one micro-batch a call.

    ```python
    step = LfUStep(model, alpha=0.1, lam="auto")
    for batch in loader:                 # input_ids, attention_mask, labels
        record = step(batch)             # forward, backward, ascent, perturbed forward, backward
        optimizer.step()
        optimizer.zero_grad()
    ```

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one. Theta is what requires a gradient.
            It may be wrapped by DDP or FSDP2 (see lfu/parallel).
        settings: a `StepSettings`. Default: the paper's, with its fixed lam of 5 (`LfUConfig` and the command line have
            `lam="auto"`, which suits any model).
        auxiliary: what the ascent moves: `lora`, `steering`, `own`, or an `Auxiliary` with options of its own.
        consistency: `mse`, `cosine`, `contrastive`, `logit_kl`, or a module with the same call.
        loss_fn: `(model, batch, num_items) -> scalar`, Eq. 1.
        backward: runs a backward pass on a scalar; `accelerator.backward` in a Trainer.
        autocast: makes the context for the perturbed forward, which goes round the model's own wrappers.
        second_pass: makes the context round the perturbed forward: activation offloading.
        grad_scaler: a `torch.amp.GradScaler` whose scale the gradients carry; it then looks after non-finite ones.
        named: fields of `StepSettings` by name, as `alpha=0.01, layers="early"`; they win over `settings`.

    Raises:
        ValueError: any setting outside its range, a layer range outside the model, nothing to attach to, a model that
            torch.compile has (modules without a linear layer of a block in them may be compiled).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings | None = None,
        *,
        auxiliary: str | Auxiliary = "lora",
        consistency: str | nn.Module = "mse",
        loss_fn: Loss = sft_loss,
        backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        second_pass: Callable[[], AbstractContextManager[Any]] = nullcontext,
        grad_scaler: torch.amp.GradScaler | None = None,
        **named: Any,
    ):
        self.settings = s = replace(settings or StepSettings(), **named)
        self.model, self.seed, self.budget, self.calls = model, s.seed, s.budget, 0
        self.loss_fn, self.backward, self.autocast, self.grad_scaler = loss_fn, backward, autocast, grad_scaler
        self.processes = processes_of(model, s.ascent_scope)
        self.anatomy = anatomy(self.processes.unwrapped(model), s.blocks)
        refuse_compiled(self.anatomy, model)
        self.depth = len(self.anatomy.blocks)  # K
        self.auxiliary = auxiliary_of(auxiliary)
        self.auxiliary.bind(self.anatomy)
        self.ascends_theta = isinstance(self.auxiliary, Own)  # the micro-batch's own gradient must stand alone
        frozen_head = not any(p.requires_grad for p in self.anatomy.model.get_output_embeddings().parameters())
        head_stays = isinstance(self.auxiliary, (LoRA, Steering)) or (self.ascends_theta and frozen_head)
        self.term = Term(consistency_of(consistency), self.anatomy, head_stays, autocast)
        layers = layer_range(s.layers, self.depth)
        logits = self.term.reads_logits
        self.reader = Reader(self.anatomy, [self.depth] if logits else layers, s.final_norm or logits)
        self.second = SecondPass(
            self.anatomy, s.form, same_dropout=s.same_dropout, trim=s.trim, autocast=autocast, offload=second_pass
        )
        self.reach = Reach() if s.alpha == "auto" else None
        # the first micro-batch of lam="auto" is to measure, not to act: a ratio far below the target
        self.strength = Strength(s.strength, start=1e-4 * s.strength / self.alpha) if s.lam == "auto" else None
        # stale: the components that the last exact step moved, and how far
        self.direction: list[torch.Tensor] = []
        self.direction_alpha = self.alpha
        refuse_form(s, self.second, self.auxiliary, self.term, self.reader)
        self.processes.check(self.ascends_theta, logits, s.stale)

    # -- what it costs -------------------------------------------------------------------------------------------------

    @property
    def cheaper(self) -> Any:
        """The approximate form in use; with `budget`, the one that it has picked."""
        return self.second.form

    def settle_budget(self, rows: int, noise: bool = False, alone: bool = True) -> None:
        """`budget` becomes one of the forms, once.

        Args:
            rows: of a micro-batch.
            noise: the embeddings will have some, as NEFTune's.
            alone: the model won't be put into a wrapper of several processes, where `stale` can't run.
        """
        s = self.settings
        stale = self.auxiliary.can_be_kept and s.direction == "perturbed" and not self.term.reads_logits
        if self.second.replays_masks or (noise and s.same_dropout):
            rows = 1  # no `part`: the second pass keeps its shape
        assert self.budget is not None
        self.second.form = within(self.budget, stale=stale and alone and self.processes.alone, **self._sizes(rows))
        self.budget = None

    def cost(self, rows: int) -> float:
        """What a step costs as a multiple of an SFT step, counted: see `cheaper.cost`."""
        return cost(self.cheaper, **self._sizes(rows))

    def _sizes(self, rows: int) -> dict[str, Any]:
        return {"full": trains_all(self.anatomy), "rows": rows, "layers": self.reader.layers, "depth": self.depth}

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def longer(self) -> float:
        """By how much alpha="auto" lengthens the ascent; lam is divided by it, and the strength stays."""
        return 1.0 if self.reach is None else self.reach.times

    @property
    def alpha(self) -> float:
        """The length of the next micro-batch's ascent."""
        return float(self.settings.alpha) if self.reach is None else PAPER * self.reach.times

    @property
    def lam(self) -> float:
        """The weight the next micro-batch will use."""
        return (float(self.settings.lam) if self.strength is None else self.strength.lam) / self.longer

    def state_dict(self) -> dict[str, float | torch.Tensor]:
        """What a resumed run needs: the number of calls, the auxiliary's state, the running estimates of lam="auto"
        and alpha="auto", the stale direction."""
        state: dict[str, float | torch.Tensor] = {"calls": float(self.calls)}
        state |= {f"auxiliary/{name}": value for name, value in self.auxiliary.state().items()}
        if self.strength is not None:
            state |= {"mean_log": self.strength.mean_log, "weight": self.strength.weight}
        if self.reach is not None:
            state |= {f"reach/{name}": value for name, value in self.reach.state().items()}
        if self.direction:
            state |= {"random": float(self.second.random), "direction_alpha": self.direction_alpha}
            state |= {f"direction/{i:05d}": t.cpu().clone() for i, t in enumerate(self.direction)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.direction = [state[name] for name in sorted(state) if name.startswith("direction/")]
        self.direction_alpha = float(state.get("direction_alpha", self.alpha))
        self.second.random = bool(state.get("random", True))
        self.calls = int(state["calls"])
        mark = "auxiliary/"
        self.auxiliary.load_state({n.removeprefix(mark): v for n, v in state.items() if n.startswith(mark)})
        if self.strength is not None and "weight" in state:
            self.strength.mean_log, self.strength.weight = float(state["mean_log"]), float(state["weight"])
        kept = {name.removeprefix("reach/"): float(state[name]) for name in state if name.startswith("reach/")}
        self.reach = self.reach and Reach(**kept)  # none in checkpoints of versions without it

    # -- one micro-batch -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        batch: Batch,
        *,
        ascent_batch: Batch | None = None,
        num_items: float | torch.Tensor | None = None,
        first_pass: Callable[[], torch.Tensor] | None = None,
        index: int | None = None,
        update: int | None = None,
    ) -> Record:
        """Add the gradient of Eq. 6 to theta's `.grad`.

        Args:
            batch: `input_ids`, `labels` `(B, T)`, and anything else the model takes.
            ascent_batch: the second batch, for `ascent_batch="independent"`.
            num_items: what the token sums of both terms are divided by; with gradient accumulation the labelled tokens
                of all micro-batches of the update, so that they add up to one big batch. Default: this batch's own.
                Several processes: of all of them, divided by their number, as their gradients are averaged.
            first_pass: runs the SFT forward and backward in place of `loss_fn` and `backward`, and returns the loss;
                for a non-finite loss it must leave zero gradients.
            index: number of the micro-batch, from which the auxiliary's randomness is derived. Default: counts calls.
            update: number of the update, for `every`. Default: `index`, as without gradient accumulation.

        Raises:
            ValueError: `labels` missing; `ascent_batch` missing or not wanted.
            BadBatch: under `on_bad_batch="raise"`.
            Exception: any that the model, the loss, the auxiliary or the consistency raises. Nothing stays attached,
                theta and its flags are as they were, and of the gradients those of earlier micro-batches alone stay;
                of a theta that is only sampled (see `gradients.sample_of`) none, as they can't be told apart.
        """
        if (ascent_batch is not None) != (self.settings.ascent_batch == "independent"):
            raise ValueError("pass `ascent_batch` to the call if, and only if, the step has ascent_batch='independent'")
        if "labels" not in batch:
            raise ValueError("the batch has no `labels` (B, T): LfU needs to know which tokens are the answer's")
        index, self.calls = self.calls if index is None else index, self.calls + 1
        where = answer_positions(batch["labels"], self.settings.positions)
        items = max(self.processes.mean(len(where)), 1) if num_items is None else num_items
        if self.budget is not None:
            self.settle_budget(len(batch["labels"]))
        form = self.cheaper
        record = Record(tokens=len(where), alpha=self.alpha, lam=self.lam * form.every, approximate=str(form))
        first = first_pass or (lambda: self.sft_pass(batch, items))
        if self.lam == 0:
            self.keep_loss(record, first(), items)
        elif (index if update is None else update) % form.every:
            self.not_due(record, first, items)
        else:
            micro = self.second.plan(batch, where, items, index, self.reader, self.seed)
            if form.stale and self.direction and index % form.stale and len(where):
                first_order.run(self, record, micro, first)
            else:
                self.exact(record, micro, ascent_batch, first)
        if record.skipped and self.settings.on_bad_batch == "raise":
            raise BadBatch(f"micro-batch {index}: {record.skipped}")
        return record

    def exact(
        self, record: Record, micro: Micro, ascent_batch: Batch | None, first_pass: Callable[[], torch.Tensor]
    ) -> None:
        """Eq. 1 to 6. Processes agree on going on; what is not sound leaves theta's gradient."""
        processes, theta = self.processes, self.anatomy.theta()
        self.auxiliary.reset(generators(self.seed, micro.index))
        with self.apart(self._parts(theta)) as parts:
            with processes.deferred():
                h = self._clean(record, micro, first_pass)  # Eq. 1 and 3, and the gradients of theta and aux
                if going_on := processes.anyone(record.skipped is None):
                    target = self.term.target(h)
                    g = self._ascent_gradients(ascent_batch, micro)
                    parts.set_aside()  # SFT's gradient
                    self._ascend(record, g, ascent_batch or micro.batch, micro)  # Eq. 2
                    del g
                    if self.ascends_theta:
                        parts.narrow(sample_of(theta))
            if going_on and processes.anyone(record.skipped is None):
                if self.cheaper.stale:
                    self.direction, self.direction_alpha = self.auxiliary.kept(), record.alpha
                consistency_pass.run(self, record, micro, h, target, parts)  # Eq. 4 to 6
            parts.keep = None if self.grad_scaler else sound_parts(record)
        processes.settle(micro.batch, self.anatomy.decoder, self.backward)
        self._end(record, theta if record.skipped is not None else parts.unsure(theta))
        if self.reach is not None:
            self.reach.update(record)

    @contextmanager
    def apart(self, parts: Any) -> Iterator[Any]:
        """Keeps parts of theta's gradient apart inside; afterwards they are added up, and nothing is attached."""
        try:
            yield parts
        except BaseException:
            parts.abandon(self.anatomy.theta())
            raise
        finally:
            try:
                self.auxiliary.discard()
            finally:
                parts.join()

    def _parts(self, theta: list[nn.Parameter]) -> Any:
        """What tells SFT's gradient of theta from the consistency's."""
        if self.processes.alone:
            return SplitGradients(theta if self.ascends_theta else sample_of(theta), theta)
        return self.processes.taps(theta, sample_of(theta), self.ascends_theta)

    # -- the clean pass (Eq. 1, Eq. 3) ---------------------------------------------------------------------------------

    def _clean(self, record: Record, micro: Micro, first_pass: Callable[[], torch.Tensor]) -> dict[int, torch.Tensor]:
        """Forward and backward with the zero auxiliary: the loss, h, and the gradients on theta and the auxiliary.

        With an independent ascent batch the pass owes the auxiliary nothing.
        """
        own_batch = self.settings.ascent_batch == "independent"
        with (
            nullcontext() if own_batch else self.auxiliary.attached(),
            micro.reader.reading(micro.where, detach=True) as h,
        ):
            self.keep_loss(record, first_pass(), micro.items)
        self.second.random = micro.replay.drew()
        if record.tokens == 0:
            record.skip(Skip.NO_TOKEN)
        return h

    def sft_pass(self, batch: Batch, items: float | torch.Tensor) -> torch.Tensor:
        loss = self.loss_fn(self.model, batch, items)
        if self.processes.finite(loss):
            self.backward(loss)
            return loss.detach()
        if not self.processes.alone:
            self.backward(self.processes.nothing(batch, self.anatomy.theta()))
        return torch.full_like(loss.detach(), math.nan)

    def keep_loss(self, record: Record, loss: torch.Tensor, items: float | torch.Tensor) -> None:
        record.sft_loss = float(loss) * float(items) / max(record.tokens, 1)
        if not math.isfinite(record.sft_loss):
            record.skip(Skip.LOSS)

    def not_due(self, record: Record, first_pass: Callable[[], torch.Tensor], items: float | torch.Tensor) -> None:
        """`every`: plain SFT this time."""
        record.form, record.lam = "not due", 0.0
        self.keep_loss(record, first_pass(), items)
        self._end(record, self.anatomy.theta())

    # -- the ascent (Eq. 2) --------------------------------------------------------------------------------------------

    def _ascent_gradients(self, batch: Batch | None, micro: Micro, again: bool = False) -> list[torch.Tensor | None]:
        """d l_SFT / d aux: what the clean backward left, or of a further forward and backward for the auxiliary."""
        if batch is None and not again:
            gradients = self.auxiliary.take_gradients()
        else:
            with self.auxiliary.attached():
                with micro.replay():
                    loss = self.loss_fn(self.model, batch or micro.batch, micro.items)
                if self.grad_scaler is not None:
                    loss = self.grad_scaler.scale(loss)  # the normalised step does not see it, fp16 gradients need it
                gradients = list(torch.autograd.grad(loss, list(self.auxiliary.parameters()), allow_unused=True))
        return self.processes.direction(gradients, self.auxiliary.parameters())

    def _ascend(self, record: Record, gradients: list, batch: Batch, micro: Micro) -> None:
        s = self.settings
        norm = ascend(self.auxiliary, gradients, record.alpha)
        record.rounded = self.auxiliary.rounded
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        same = s.ascent_batch == "same"  # then its tokens are counted already
        count = record.tokens if same else len(answer_positions(batch["labels"]))
        record.ascent_grad_norm = norm * float(micro.items) / max(self.processes.total(count), 1) / scale
        for _ in range(s.ascent_steps - 1):
            if norm == 0 or not math.isfinite(norm):
                break
            norm = ascend(self.auxiliary, self._ascent_gradients(batch, micro, again=True), record.alpha)
        if norm == 0:
            record.skipped = Skip.NO_ASCENT
        elif not math.isfinite(norm):
            record.skipped = Skip.ASCENT

    def _end(self, record: Record, unsure: list[nn.Parameter]) -> None:
        """Looks at what may not be finite; the record of this process's part becomes that of all."""
        if self.grad_scaler is None:  # which must see what overflowed, to skip the update and lower its scale
            check_finite(record, unsure)
        if not self.processes.alone:
            record.become_everyones(self.processes.gathered(record.numbers()))
