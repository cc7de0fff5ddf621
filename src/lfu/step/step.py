"""One micro-batch of Learning from the Undesirable (Eq. 1 to 6), in plain PyTorch, by the exact 2F+2B shortcut.

Written down naively the method costs three forwards and three backwards. But the auxiliary starts as an exact no-op,
so the SFT loss of theta and of theta_aux are one number, and one forward and backward with the zero auxiliary attached
gives both d l/d theta and d l/d aux. That graph is freed; one perturbed forward without the head, one backward: 2F+2B.
`LfUStep.exact` is the method on one screen.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lfu.step import first_order, second_pass
from lfu.step.cheaper import refuse_form, settle_budget
from lfu.step.consistency import Hidden, Term, consistency_of
from lfu.step.gradients import SOUND_PARTS, SplitGradients, check_finite, sample_of
from lfu.step.record import BadBatch, Record, Skip
from lfu.step.second_pass import Micro
from lfu.step.settings import StepSettings
from lfu.step.strength import PAPER, Reach, Strength
from lfu.step.trim import Batch
from lfu.undesirable import Auxiliary, ascend, auxiliary_of

Loss = Callable[[nn.Module, Batch, "float | torch.Tensor"], torch.Tensor]
FirstPass = Callable[[], torch.Tensor]


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
        self.model, self.loss_fn, self.backward, self.autocast = model, loss_fn, backward, autocast
        self.offload, self.grad_scaler = second_pass, grad_scaler
        self.processes = processes_of(model, s.ascent_scope)
        self.anatomy = anatomy(self.processes.unwrapped(model), s.blocks)
        self.anatomy.refuse_compiled(model)
        self.auxiliary = auxiliary_of(auxiliary)
        self.auxiliary.bind(self.anatomy)
        self.ascends_theta = self.auxiliary.of_theta  # the micro-batch's own gradient must stand alone
        frozen_head = not any(p.requires_grad for p in self.anatomy.model.get_output_embeddings().parameters())
        head_stays = self.auxiliary.in_blocks or (self.ascends_theta and frozen_head)
        self.term = Term(consistency_of(consistency), self.anatomy, head_stays, autocast)
        s.refuse_ignored(self.auxiliary, self.term.consistency)
        depth, logits = len(self.anatomy.blocks), self.term.reads_logits
        layers = layer_range(s.layers, depth)
        self.reader = Reader(self.anatomy, [depth] if logits else layers, s.final_norm or logits)
        # the approximate form in use; with `budget`, the one that it picks
        self.cheaper, self.budget = s.form, s.budget
        self.calls, self.random = 0, True  # whether the last clean pass drew random numbers; unknown counts as yes
        self.reach = Reach() if s.alpha == "auto" else None
        # the first micro-batch of lam="auto" is to measure, not to act: a ratio far below the target
        self.strength = Strength(s.strength, start=1e-4 * s.strength / self.alpha) if s.lam == "auto" else None
        self.direction = first_order.Direction()
        refuse_form(self)
        self.processes.check(self.ascends_theta, logits, s.stale)

    # -- one micro-batch -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        batch: Batch,
        *,
        ascent_batch: Batch | None = None,
        num_items: float | torch.Tensor | None = None,
        first_pass: FirstPass | None = None,
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
            settle_budget(self, len(batch["labels"]))
        form = self.cheaper
        record = Record(tokens=len(where), alpha=self.alpha, lam=self.lam * form.every, approximate=str(form))
        first_pass = first_pass or (lambda: self._sft_pass(batch, items))
        if self.lam == 0:
            self.keep_loss(record, first_pass(), items)
        elif (index if update is None else update) % form.every:
            record.form, record.lam = "not due", 0.0
            self.keep_loss(record, first_pass(), items)
            self.end(record, self.anatomy.theta())
        else:
            micro = second_pass.plan(self, batch, where, items, index)
            if form.stale and self.direction.components and index % form.stale and len(where):
                first_order.run(self, record, micro, first_pass)
            else:
                self.exact(record, micro, ascent_batch, first_pass)
        if record.skipped and self.settings.on_bad_batch == "raise":
            raise BadBatch(f"micro-batch {index}: {record.skipped}")
        return record

    def exact(self, record: Record, micro: Micro, ascent_batch: Batch | None, first_pass: FirstPass) -> None:
        """Eq. 1 to 6. Processes agree on going on; what is not sound leaves theta's gradient."""
        processes, theta = self.processes, self.anatomy.theta()
        self.auxiliary.reset(generators(self.settings.seed, micro.index))
        with self.apart(self._parts(theta)) as parts:
            with processes.deferred():
                h = self.clean(record, micro, first_pass)  # Eq. 1 and 3, and the gradients of theta and aux
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
                    self.direction.keep(self.auxiliary, record.alpha)
                second_pass.run(self, record, micro, h, target, parts)  # Eq. 4 to 6
            parts.keep = None if self.grad_scaler or record.skipped is None else SOUND_PARTS.get(Skip(record.skipped))
        processes.settle(micro.batch, self.anatomy.decoder, self.backward)
        self.end(record, theta if record.skipped is not None else parts.unsure())
        if self.reach is not None:
            self.reach.watch(record)

    @contextmanager
    def apart(self, parts: Any) -> Iterator[Any]:
        """Keeps parts of theta's gradient apart inside; afterwards they are added up, and nothing is attached."""
        try:
            yield parts
        except BaseException:
            parts.abandon()
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
        return self.processes.taps(sample_of(theta), theta, self.ascends_theta)

    def end(self, record: Record, unsure: Sequence[nn.Parameter]) -> None:
        """Looks at what may not be finite; the record of this process's part becomes that of all."""
        if self.grad_scaler is None:  # which must see what overflowed, to skip the update and lower its scale
            check_finite(record, unsure)
        if not self.processes.alone:
            record.become_everyones(self.processes.gathered(record.numbers()))

    # -- the clean pass (Eq. 1, Eq. 3) ---------------------------------------------------------------------------------

    def clean(
        self, record: Record, micro: Micro, first_pass: FirstPass, visit: Callable[..., None] | None = None
    ) -> Hidden:
        """Forward and backward with the zero auxiliary: the loss, h, and the gradients on theta and the auxiliary.

        With an independent ascent batch, and with a `visit` (first_order.py), the pass owes the auxiliary nothing.
        """
        owes = self.settings.ascent_batch == "same" and visit is None
        attached = self.auxiliary.attached() if owes else nullcontext()
        with attached, micro.reader.reading(micro.where, detach=True, visit=visit) as h:
            self.keep_loss(record, first_pass(), micro.items)
        self.random = micro.replay.drew()
        if record.tokens == 0:
            record.skip(Skip.NO_TOKEN)
        return h

    def _sft_pass(self, batch: Batch, items: float | torch.Tensor) -> torch.Tensor:
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
        norm = ascend(self.auxiliary, gradients, record.alpha)
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        # the tokens of the micro-batch are counted already
        count = record.tokens if batch is micro.batch else len(answer_positions(batch["labels"]))
        record.ascent_grad_norm = norm * float(micro.items) / max(self.processes.total(count), 1) / scale
        for _ in range(self.settings.ascent_steps - 1):
            if norm == 0 or not math.isfinite(norm):
                break
            norm = ascend(self.auxiliary, self._ascent_gradients(batch, micro, again=True), record.alpha)
        if norm == 0:
            record.skipped = Skip.NO_ASCENT
        elif not math.isfinite(norm):
            record.skipped = Skip.ASCENT

    # -- what changes over a run ---------------------------------------------------------------------------------------

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

    def _with_state(self) -> dict[str, Any]:
        parts = {"auxiliary": self.auxiliary, "lam": self.strength, "alpha": self.reach, "stale": self.direction}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs: the number of calls, the auxiliary's state, the running estimates of lam="auto"
        and alpha="auto", the stale direction."""
        state: dict[str, Any] = {"calls": self.calls, "random": self.random}
        for name, part in self._with_state().items():
            state |= {f"{name}/{key}": value for key, value in part.state().items()}
        number = lambda value: torch.tensor(float(value), dtype=torch.float64)
        return {name: value if isinstance(value, torch.Tensor) else number(value) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.calls, self.random = int(state["calls"]), bool(state["random"])
        for name, part in self._with_state().items():
            mark = f"{name}/"
            part.load_state({key.removeprefix(mark): value for key, value in state.items() if key.startswith(mark)})
