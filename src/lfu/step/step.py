"""One micro-batch of Learning from the Undesirable (Eq. 6), in plain PyTorch, by the exact 2F+2B shortcut.

Written down naively the method costs three forwards and three backwards. But the auxiliary starts as an exact no-op,
so the SFT loss of theta and of theta_aux are one number, and one forward and backward with the zero auxiliary attached
gives both d l/d theta and d l/d aux. That graph is freed; one perturbed forward without the head, one backward: 2F+2B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lfu.model.anatomy import anatomy, layer_range, whole_shape
from lfu.model.precision import wide
from lfu.model.representations import Reader, answer_positions
from lfu.model.rng import Replay, draws_masks, generators
from lfu.parallel.processes import local, processes_of
from lfu.step.cheaper import Cheaper, cost, draw_layers, draw_rows, generator, within
from lfu.step.consistency import TokenSum, consistency_of, in_chunks
from lfu.step.first_order import Injection
from lfu.step.pieces import Rows, answered, in_pieces
from lfu.step.strength import SplitGradients, Strength, sample_of
from lfu.step.trim import trimmed
from lfu.support.choices import CHOICES, one_of
from lfu.undesirable import Auxiliary, LoRA, Own, Steering, ascend, auxiliary_of
from lfu.undesirable.ascent import global_norm

Batch = Mapping[str, Any]
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


@dataclass
class Record:
    """What happened in one micro-batch. Plain numbers; losses in nats a token.

    Attributes:
        sft_loss: mean over this micro-batch's answer tokens (Eq. 1).
        consistency: mean over its answer tokens and the compared layers (Eq. 5).
        consistency_per_layer: layer -> mean over answer tokens; layer K + 1 stands for the logits.
        displacement: layer -> ||h' - h|| / ||h||, Frobenius norms over the answer tokens.
        ascent_grad_norm: ||g|| of Eq. 2 at the first step, for the mean loss of the ascent batch.
        gradient_ratio: ||grad(lam * consistency)|| / ||grad(SFT)|| on (a sample of) theta.
        gradient_cosine: cosine between the two.
        resolution: machine epsilon of the hidden states' dtype, or of autocast's or quantised layers' where that is
            coarser; a displacement near it is rounding, not the ascent.
        rounded: share of the ascent step lost in the dtype of what it moves (`own` on 16-bit weights), an L2 norm.
        lam: the weight used; with `every=k` k times lam, and 0 where the consistency was not due.
        tokens: N, the answer tokens.
        pieces: in how many pieces of rows the perturbed pass was done; more than 1 where memory ran out.
        form: `exact`, `first-order` (`stale`: no gradient ratio, cosine and norm then), or `not due` (`every`).
        approximate: the approximate settings of the run, as in `every=4`; empty for the exact method.
        skipped: why the consistency (or, for a non-finite loss, everything) was left out; else None.
    """

    sft_loss: float = math.nan
    consistency: float = 0.0
    consistency_per_layer: dict[int, float] = field(default_factory=dict)
    displacement: dict[int, float] = field(default_factory=dict)
    ascent_grad_norm: float = 0.0
    gradient_ratio: float = 0.0
    gradient_cosine: float = 0.0
    resolution: float = 0.0
    rounded: float = 0.0
    lam: float = 0.0
    tokens: int = 0
    pieces: int = 1
    form: str = "exact"
    approximate: str = ""
    skipped: str | None = None

    @property
    def loss(self) -> float:
        """Eq. 6."""
        return self.sft_loss + self.lam * self.consistency


@dataclass(frozen=True)
class _Plan:
    """One micro-batch; what of it is compared (positions `where` `(N,)`, the reader's layers), `share` its weight.

    `second`: the decoder's inputs of the perturbed pass over it, and the compared positions in them.
    """

    batch: Batch
    where: torch.Tensor
    items: float | torch.Tensor
    index: int
    share: float
    reader: Reader
    replay: Replay
    second: tuple[Batch, torch.Tensor]


class BadBatch(ArithmeticError):
    """Raised under `on_bad_batch="raise"`; the gradients on theta are finite."""


class LfUStep:
    """Leaves the gradient of Eq. 6, `l_SFT(theta) + lam * l_cons`, on theta, for one micro-batch a call.

    ```python
    step = LfUStep(model, alpha=0.1, lam=5.0)
    for batch in loader:                 # input_ids, attention_mask, labels
        record = step(batch)             # forward, backward, ascent, perturbed forward, backward
        optimizer.step()
        optimizer.zero_grad()
    ```

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one. Theta is what requires a gradient.
        auxiliary: what the ascent moves: `lora`, `steering`, `own`, or an `Auxiliary` with options of its own.
        alpha: length of each normalised ascent step (Eq. 2), > 0.
        lam: weight of the consistency, >= 0 (0: plain SFT, nothing attached), or `auto`: see `strength`. The default
            here is the paper's fixed 5; that of `LfUConfig` and the command line is `auto`, which suits any model.
        consistency: `mse`, `cosine`, `contrastive`, `logit_kl`, or a module with the same call.
        layers: compared layers: `all`, `early`, `middle`, `late`, or a range such as `5-12`.
        final_norm: layer K is compared after the final norm, as transformers' hidden_states[K].
        positions: `predict` or `answer`, see `answer_positions`.
        direction: `perturbed`: through h' towards detach(h) (paper, 2F+2B). `clean`: through h towards detach(h')
            (the authors' RepS code, 3F+2B); its first-order effect has the opposite sign: it draws the model towards
            the undesirable.
        ascent_batch: `same`, or `independent`: each call is given a second batch for the ascent (3F+3B).
        ascent_steps: normalised ascent steps; each beyond the first costs a forward and a backward.
        same_dropout: the perturbed pass sees the clean pass's dropout masks and embedding noise. Otherwise h' - h is
            mostly the difference of two random masks, and the consistency trains against dropout, not the undesirable.
        trim: the second pass leaves out padding and what comes after the last compared token (see `trim.trimmed`): the
            same numbers, less work. Not while dropout or embedding noise is drawn: their masks belong to a shape.
        on_bad_batch: no labelled token, a zero ascent gradient, a non-finite value: `skip` the consistency and say so
            in the record, or `raise`. A non-finite loss leaves no gradient; of a non-finite gradient the measured
            tensors (see `strength.sample_of`) drop the broken part, and elsewhere its entries become zero.
        every: APPROXIMATE, as the next three: they cost less, are off by default, and `cheaper.Cheaper` tells of them.
        part: see `every`. Not with dropout or embedding noise, whose masks are the whole micro-batch's; with
            same_dropout=False it may be.
        stale: see `every`.
        random_layers: see `every`.
        budget: > 1: the wanted cost of a step as a multiple of SFT's; picks one of them (see `cheaper.within`), when
            the first batch tells the number of rows. `cheaper` then says which.
        strength: the gradient ratio that lam="auto" holds, on average. Its first micro-batch only measures, with a lam
            too small to act; what it has learned is in `state_dict`.
        seed: of the auxiliary's random parts.
        blocks: where the blocks are, if they can't be found (see `anatomy`).
        loss_fn: `(model, batch, num_items) -> scalar`, Eq. 1.
        backward: runs a backward pass on a scalar; `accelerator.backward` in a Trainer.
        autocast: makes the context for the perturbed forward, which goes round the model's own wrappers.
        second_pass: makes the context round the perturbed forward: activation offloading.
        grad_scaler: a `torch.amp.GradScaler` whose scale the gradients carry; it then looks after non-finite ones.
        ascent_scope: for a `model` wrapped by DDP or FSDP2 (see lfu/parallel/processes.py): `global`, one ascent by the
            gradient of all processes' parts together, or `local`, each process its own.

    Raises:
        ValueError: any argument outside its range, a layer range outside the model, nothing to attach to, a model that
            torch.compile has (modules without a linear layer of a block in them may be compiled).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        auxiliary: str | Auxiliary = "lora",
        alpha: float = 0.1,
        lam: float | str = 5.0,
        consistency: str | nn.Module = "mse",
        layers: str = "all",
        final_norm: bool = True,
        positions: str = "predict",
        direction: str = "perturbed",
        ascent_batch: str = "same",
        ascent_steps: int = 1,
        same_dropout: bool = True,
        trim: bool = True,
        on_bad_batch: str = "skip",
        every: int = 1,
        part: float = 1.0,
        stale: int = 0,
        random_layers: int = 0,
        budget: float | None = None,
        strength: float = 0.5,
        seed: int = 42,
        blocks: str | None = None,
        loss_fn: Loss = sft_loss,
        backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        second_pass: Callable[[], AbstractContextManager[Any]] = nullcontext,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_scope: str = "global",
    ):
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
        if lam != "auto" and not (isinstance(lam, (int, float)) and math.isfinite(lam) and lam >= 0):
            raise ValueError(f"lam must be a finite number >= 0 or 'auto', got {lam!r}")
        if ascent_steps < 1:
            raise ValueError(f"ascent_steps must be at least 1, got {ascent_steps!r}")
        self.model, self.alpha, self.ascent_steps, self.seed = model, alpha, ascent_steps, seed
        self.positions, self.direction, self.ascent_batch = positions, direction, ascent_batch
        self.same_dropout, self.trim, self.on_bad_batch = same_dropout, trim, on_bad_batch
        self.ascent_scope = ascent_scope
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), choices)
        self.second_pass = second_pass
        self.loss_fn, self.backward, self.autocast, self.grad_scaler = loss_fn, backward, autocast, grad_scaler
        self.processes = processes_of(model, ascent_scope)
        self.anatomy = anatomy(self.processes.unwrapped(model), blocks)
        if (place := self.anatomy.compiled(model)) is not None:
            raise ValueError(
                f"{f'the module {place!r}' if place else 'the model'} is compiled: LfU attaches and removes hooks "
                "inside it in every step, which would compile it anew each time; give the model as it was before "
                "torch.compile"
            )
        self.consistency = consistency_of(consistency)
        compared = layer_range(layers, self.depth)
        self.reads_logits = getattr(self.consistency, "reads", "layers") == "logits"
        self.reader = Reader(
            self.anatomy, [self.depth] if self.reads_logits else compared, final_norm or self.reads_logits
        )
        self.auxiliary = auxiliary_of(auxiliary)
        self.auxiliary.bind(self.anatomy)
        frozen_head = not any(p.requires_grad for p in self.anatomy.model.get_output_embeddings().parameters())
        # then the clean logits need not be kept, N x V
        self._head_stays = isinstance(self.auxiliary, (LoRA, Steering)) or (
            isinstance(self.auxiliary, Own) and frozen_head
        )
        # the first micro-batch of lam="auto" is to measure, not to act: a ratio far below the target
        self.strength = Strength(strength, start=1e-4 * strength / alpha) if lam == "auto" else None
        self._lam = 0.0 if lam == "auto" else float(lam)
        self.calls = 0
        self.cheaper = Cheaper(every, part, stale, random_layers)
        self.budget = budget
        if budget is not None and not self.cheaper.exact:
            raise ValueError(f"budget={budget:g} picks the approximate form itself: drop {self.cheaper}")
        if budget is not None:
            within(budget, full=True)  # refuses a budget out of its range
        self._refuse_cheaper()
        self.processes.check(isinstance(self.auxiliary, Own), self.reads_logits, self.cheaper.stale)
        self._direction: list[torch.Tensor] = []  # stale: the components that the last exact step moved
        self._random = True  # whether the last clean pass drew random numbers; unknown counts as yes

    def _refuse_cheaper(self) -> None:
        form, compared = self.cheaper, len(self.reader.layers)
        if form.random_layers and self.reads_logits:
            raise ValueError("random_layers chooses among compared layers, and logit_kl compares none: drop one")
        if form.random_layers >= compared and form.random_layers:
            raise ValueError(
                f"random_layers={form.random_layers} of {compared} compared layers leaves none out: give fewer"
            )
        if form.part < 1 and self.replays_masks:
            raise ValueError(self._part_saves_nothing())
        if not form.stale:
            return
        if self.direction == "clean":
            raise ValueError("stale is the first-order form of direction='perturbed': drop direction='clean'")
        if not self.auxiliary.can_be_kept:
            raise ValueError(
                f"stale needs an auxiliary with `kept` and `restore`, and {type(self.auxiliary).__name__} has none"
            )
        head = self.anatomy.model.get_output_embeddings()
        if self.reads_logits and (not self._head_stays or any(p.requires_grad for p in head.parameters())):
            raise ValueError("stale with logit_kl needs a head that is not trained, as under LoRA: drop one of the two")

    @property
    def replays_masks(self) -> bool:
        """Whether the second pass must see the clean pass's dropout masks. Embedding noise shows only when drawn."""
        return self.same_dropout and draws_masks(self.model, self.anatomy.model.config.get_text_config())

    @property
    def trains_all(self) -> bool:
        """Whether theta is most of the blocks' weights, not an adapter: then a backward costs two forwards."""
        weights = [p for block in self.anatomy.blocks for p in block.parameters()]
        sizes = [(whole_shape(p).numel(), p.requires_grad) for p in weights]
        return 2 * sum(size for size, trained in sizes if trained) > sum(size for size, _ in sizes)

    def settle_budget(self, rows: int, noise: bool = False) -> None:
        """`budget` becomes one of the forms, once. `noise`: the embeddings will have some, as NEFTune's."""
        stale = self.auxiliary.can_be_kept and self.direction == "perturbed" and not self.reads_logits
        stale = stale and self.processes.alone
        if self.replays_masks or (noise and self.same_dropout):
            rows = 1  # no `part`: the second pass keeps its shape
        assert self.budget is not None
        self.cheaper = within(
            self.budget, full=self.trains_all, rows=rows, layers=self.reader.layers, depth=self.depth, stale=stale
        )
        self.budget = None

    def cost(self, rows: int) -> float:
        """What a step costs as a multiple of an SFT step, counted: see `cheaper.cost`."""
        return cost(self.cheaper, full=self.trains_all, rows=rows, layers=self.reader.layers, depth=self.depth)

    @property
    def depth(self) -> int:
        """K, the number of layers."""
        return len(self.anatomy.blocks)

    @property
    def lam(self) -> float:
        """The weight the next micro-batch will use."""
        return self._lam if self.strength is None else self.strength.lam

    def state_dict(self) -> dict[str, float | torch.Tensor]:
        """What a resumed run needs: the number of calls, the auxiliary's state, the running estimate of lam="auto",
        the stale direction."""
        state: dict[str, float | torch.Tensor] = {"calls": float(self.calls)}
        state |= {f"auxiliary/{name}": value for name, value in self.auxiliary.state().items()}
        if self.strength is not None:
            state |= {"mean_log": self.strength.mean_log, "weight": self.strength.weight}
        if self._direction:
            state |= {"random": float(self._random)}
            state |= {f"direction/{i:05d}": t.cpu().clone() for i, t in enumerate(self._direction)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._direction = [state[name] for name in sorted(state) if name.startswith("direction/")]
        self._random = bool(state.get("random", True))
        self.calls = int(state["calls"])
        mark = "auxiliary/"
        self.auxiliary.load_state({n.removeprefix(mark): v for n, v in state.items() if n.startswith(mark)})
        if self.strength is not None and "weight" in state:
            self.strength.mean_log, self.strength.weight = float(state["mean_log"]), float(state["weight"])

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
                of a theta that is only sampled (see `strength.sample_of`) none, as they can't be told apart.
        """
        if (ascent_batch is not None) != (self.ascent_batch == "independent"):
            raise ValueError("pass `ascent_batch` to the call if, and only if, the step has ascent_batch='independent'")
        if "labels" not in batch:
            raise ValueError("the batch has no `labels` (B, T): LfU needs to know which tokens are the answer's")
        index, self.calls = self.calls if index is None else index, self.calls + 1
        where = answer_positions(batch["labels"], self.positions)
        items = max(self.processes.mean(len(where)), 1) if num_items is None else num_items
        if self.budget is not None:
            self.settle_budget(len(batch["labels"]))
        record = Record(tokens=len(where), lam=self.lam * self.cheaper.every, approximate=str(self.cheaper))
        run_first = first_pass or (lambda: self._sft_pass(batch, items))
        if self.lam == 0:
            self._keep_loss(record, run_first(), items)
        elif (index if update is None else update) % self.cheaper.every:
            record.form, record.lam = "not due", 0.0
            self._keep_loss(record, run_first(), items)
            self._check_finite(record, self.anatomy.theta())
            self.processes.share(record)
        else:
            plan = self._plan(batch, where, items, index)
            if self.cheaper.stale and self._direction and index % self.cheaper.stale and len(where):
                self._run_first_order(record, plan, run_first)
            else:
                self._run(record, plan, ascent_batch, run_first)
        if record.skipped and self.on_bad_batch == "raise":
            raise BadBatch(f"micro-batch {index}: {record.skipped}")
        return record

    def _plan(self, batch: Batch, where: torch.Tensor, items: float | torch.Tensor, index: int) -> _Plan:
        """What this micro-batch compares: all, or what `part` and `random_layers` draw."""
        source = generator(self.seed, index)
        share, reader = 1.0, self.reader
        if self.cheaper.part < 1:
            where, share = draw_rows(where, batch["labels"].shape[1], self.cheaper.part, source)
        if self.cheaper.random_layers:
            layers = draw_layers(reader.layers, self.cheaper.random_layers, source)
            reader = Reader(self.anatomy, layers, reader.final_norm)
        devices = (p.device for p in self.anatomy.model.parameters())
        # now, with nothing under way: it looks at masks and positions, and a GPU would have to catch up first
        second = self._smaller(Rows(batch, where, {}))
        return _Plan(batch, where, items, index, share, reader, Replay(devices, self.same_dropout), second)

    def _run(
        self, record: Record, plan: _Plan, ascent_batch: Batch | None, run_first: Callable[[], torch.Tensor]
    ) -> None:
        """The clean pass, the ascent, the perturbed pass; whatever happens, nothing is left attached or set aside."""
        theta, items, replay = self.anatomy.theta(), plan.items, plan.replay
        self.auxiliary.reset(generators(self.seed, plan.index))
        own = isinstance(self.auxiliary, Own)  # it ascends on theta: this micro-batch's gradient must stand alone
        processes = self.processes
        split = processes.split(theta, own)
        keep: int | None = None  # of the parts: all
        try:
            with processes.deferred():
                with self._zero_auxiliary(), plan.reader.reading(plan.where, detach=True) as clean:
                    self._keep_loss(record, run_first(), items)
                self._random = replay.drew()
                if record.skipped is None and record.tokens == 0:
                    record.skipped = "no labelled token"
                target = clean
                if active := processes.anyone(record):
                    target = self._target(clean)
                    gradients = self._first_gradients(ascent_batch, items, replay)
                    gradients = processes.direction(gradients, self.auxiliary.parameters())
                    split.set_aside()
                    self._ascend(record, gradients, ascent_batch or plan.batch, items, replay)
                    del gradients
                    if own:
                        split.narrow(sample_of(theta))
            if active and processes.anyone(record):
                if self.cheaper.stale:
                    self._direction = self.auxiliary.kept()
                self._consistency_pass(record, plan, clean, target, split)
            keep = self._sound_parts(record)
        except BaseException:
            split.abandon(theta)
            raise
        finally:
            try:
                self.auxiliary.discard()
            finally:
                split.join(keep)
        processes.settle(plan.batch, self.anatomy.decoder, self.backward)
        if record.skipped is not None or not split.all_finite(theta):
            self._check_finite(record, theta)
        processes.share(record)

    def _run_first_order(self, record: Record, plan: _Plan, run_first: Callable[[], torch.Tensor]) -> None:
        """`stale`: the perturbed forward without a graph, then the clean pass with its gradient injected (2F+1B)."""
        record.form = "first-order"
        theta = self.anatomy.theta()
        split = SplitGradients(sample_of(theta))
        keep: int | None = None
        try:
            self.auxiliary.restore(self._direction)
            with self.auxiliary.attached(), torch.no_grad():
                moved = self._read_second(plan, Rows(plan.batch, plan.where, {}))
            self.auxiliary.discard()
            scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
            injection = Injection(
                moved, plan.where, self._first_order_consistency,
                scale * record.lam * plan.share / len(moved) / plan.items,
            )  # fmt: skip
            with plan.reader.reading(plan.where, detach=True, visit=injection) as clean:
                self._keep_loss(record, run_first(), plan.items)
            self._random = plan.replay.drew()
            if record.skipped is None and record.tokens == 0:
                record.skipped = "no labelled token"
            if record.skipped is None:
                self._add_layers(record, plan, self._numbered(injection.sums))
                record.displacement = _displacement(clean, moved)
                record.resolution = self._resolution(next(iter(clean.values())))
                if not math.isfinite(record.consistency):
                    record.skipped = "non-finite consistency"  # and nothing of it was injected
                elif not injection.reached:
                    record.skipped = "theta lies above the compared layers"
            # a broken sum of the two: the measured tensors keep what earlier micro-batches gave
            sound = self.grad_scaler is not None or math.isfinite(global_norm([p.grad for p in split.measured]))
            record.skipped = record.skipped or (None if sound else "non-finite gradient")
            keep = None if sound else 1
        except BaseException:
            split.abandon(theta)
            raise
        finally:
            try:
                self.auxiliary.discard()
            finally:
                split.join(keep)
        self._check_finite(record, theta)

    def _first_order_consistency(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """A value a token of h and h' (of a range of layers, or, under logit_kl, of what the head makes of them)."""
        if not self.reads_logits:
            return self.consistency(target, moving)
        vocabulary = self.anatomy.model.get_output_embeddings().weight.shape[0]
        return torch.stack(in_chunks(self._logit_piece, vocabulary, target, moving))

    def _numbered(self, sums: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Logits count as layer K + 1."""
        return {layer + 1: value for layer, value in sums.items()} if self.reads_logits else sums

    # -- the clean pass (Eq. 1, Eq. 3) ---------------------------------------------------------------------------------

    def _sft_pass(self, batch: Batch, items: float | torch.Tensor) -> torch.Tensor:
        loss = self.loss_fn(self.model, batch, items)
        if self.processes.finite(loss):
            self.backward(loss)
            return loss.detach()
        if not self.processes.alone:
            self.backward(self.processes.nothing(batch, self.anatomy.theta()))
        return torch.full_like(loss.detach(), math.nan)

    def _zero_auxiliary(self) -> AbstractContextManager[None]:
        """With an independent ascent batch the clean pass owes the auxiliary nothing."""
        return self.auxiliary.attached() if self.ascent_batch == "same" else nullcontext()

    def _keep_loss(self, record: Record, loss: torch.Tensor, items: float | torch.Tensor) -> None:
        record.sft_loss = float(loss) * float(items) / max(record.tokens, 1)
        if not math.isfinite(record.sft_loss):
            record.skipped = "non-finite loss"

    def _target(self, clean: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """What h' is compared with: h, or, where the ascent may move the head too, the clean logits `(N, V)`."""
        if not self.reads_logits or self._head_stays:
            return clean
        with torch.no_grad(), self.autocast():
            return {layer: self.anatomy.logits(h) for layer, h in clean.items()}

    def _second_batch(self, plan: _Plan, rows: Rows) -> tuple[Batch, torch.Tensor]:
        """The decoder's inputs of the perturbed pass over all rows or a piece, and the compared positions in them."""
        if self.same_dropout and self._random:
            if self.cheaper.part < 1:
                raise ValueError(self._part_saves_nothing())
            return rows.batch, rows.where
        return plan.second if rows.batch is plan.batch else self._smaller(rows)

    def _smaller(self, rows: Rows) -> tuple[Batch, torch.Tensor]:
        """Without the rows that `part` left out, and, with `trim`, without padding and what comes after."""
        if self.cheaper.part < 1:
            rows = answered(rows)
        return trimmed(rows.batch, rows.where, self.anatomy) if self.trim else (rows.batch, rows.where)

    def _part_saves_nothing(self) -> str:
        return (
            f"part={self.cheaper.part:g} with dropout or embedding noise saves nothing, as the second pass draws the "
            "masks of the whole micro-batch: use every or random_layers, take the noise away, or set same_dropout=False"
        )

    # -- the ascent (Eq. 2) --------------------------------------------------------------------------------------------

    def _first_gradients(
        self, ascent_batch: Batch | None, items: float | torch.Tensor, replay: Replay
    ) -> list[torch.Tensor | None]:
        if ascent_batch is None:
            return self.auxiliary.take_gradients()  # the clean backward left them
        return self._ascent_gradients(ascent_batch, items, replay)

    def _ascent_gradients(self, batch: Batch, items: float | torch.Tensor, replay: Replay) -> list[torch.Tensor | None]:
        """One forward and backward for the auxiliary alone; theta's gradients are not touched."""
        with self.auxiliary.attached():
            with replay():
                loss = self.loss_fn(self.model, batch, items)
            if self.grad_scaler is not None:
                loss = self.grad_scaler.scale(loss)  # the normalised step does not see it, fp16 gradients need it
            return list(torch.autograd.grad(loss, list(self.auxiliary.parameters()), allow_unused=True))

    def _ascend(
        self, record: Record, gradients: list, batch: Batch, items: float | torch.Tensor, replay: Replay
    ) -> None:
        norm = ascend(self.auxiliary, gradients, self.alpha)
        record.rounded = self.auxiliary.rounded
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        same = self.ascent_batch == "same"  # then its tokens are counted already
        count = record.tokens if same else len(answer_positions(batch["labels"]))
        record.ascent_grad_norm = norm * float(items) / max(self.processes.total(count), 1) / scale
        for _ in range(self.ascent_steps - 1):
            if norm == 0 or not math.isfinite(norm):
                break
            gradients = self._ascent_gradients(batch, items, replay)
            norm = ascend(self.auxiliary, self.processes.direction(gradients, self.auxiliary.parameters()), self.alpha)
        if norm == 0:
            record.skipped = "zero ascent gradient"
        elif not math.isfinite(norm):
            record.skipped = "non-finite ascent gradient"

    # -- the perturbed pass (Eq. 4, Eq. 5) -----------------------------------------------------------------------------

    def _consistency_pass(
        self,
        record: Record,
        plan: _Plan,
        clean: dict[int, torch.Tensor],
        target: dict[int, torch.Tensor],
        split: SplitGradients,
    ) -> None:
        self.auxiliary.freeze()
        through = self._through_moved if self.direction == "perturbed" else self._through_clean
        displaced = in_pieces(
            lambda pieces: through(record, plan, pieces),
            Rows(plan.batch, plan.where, target),
            inexact=self._inexact_in_pieces(plan.replay),
            undo=split.undo,
        )
        if record.skipped not in ("non-finite consistency", "theta lies above the compared layers"):  # the backward ran
            self._compare(record, split)
        record.displacement = _displacement(clean, displaced)
        record.resolution = self._resolution(next(iter(clean.values())))

    def _resolution(self, hidden: torch.Tensor) -> float:
        """Machine epsilon of what the layers add up: float32 hidden states may carry 16-bit outputs.

        Those of autocast, or of quantised layers, which multiply in a dtype of their own.
        """
        device = hidden.device.type
        dtypes = {hidden.dtype, *self.anatomy.multiplies_in}
        with self.autocast():
            if torch.is_autocast_enabled(device):
                dtypes.add(torch.get_autocast_dtype(device))
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _inexact_in_pieces(self, replay: Replay) -> str | None:
        """Why a pass in pieces of rows would not leave the gradients of the whole; None if it would."""
        if not self.processes.alone:
            return "the other processes would not know of it"
        if not getattr(self.consistency, "token_sum", False):
            return f"the consistency {type(self.consistency).__name__} compares tokens of different rows, or may do so"
        if self.direction == "clean":
            return "direction='clean' has let go of the undesirable model by then"
        if replay.drew():
            return "dropout or embedding noise would draw other masks for the pieces"
        return None

    def _through_moved(self, record: Record, plan: _Plan, pieces: list[Rows]) -> dict[int, torch.Tensor]:
        """The gradient flows through h' (Eq. 5). Returns the displaced h', detached."""
        record.pieces, record.consistency_per_layer = len(pieces), {}
        displaced: list[dict[int, torch.Tensor]] = []
        with self.auxiliary.attached():
            for piece in pieces:
                moved = self._read_second(plan, piece)
                displaced.append({layer: moved[layer].detach() for layer in moved})
                self._consistency_backward(record, plan, piece.target, moved)
        if len(displaced) == 1:
            return displaced[0]
        return {layer: torch.cat([part[layer] for part in displaced]) for layer in displaced[0]}

    def _through_clean(self, record: Record, plan: _Plan, pieces: list[Rows]) -> dict[int, torch.Tensor]:
        """The gradient flows through h, towards detach(h'). Returns the displaced h'."""
        (rows,) = pieces
        record.consistency_per_layer = {}
        with self.auxiliary.attached(), torch.no_grad():
            displaced = self._read_second(plan, rows)
            target = self._target(displaced)
        self.auxiliary.discard()
        self._consistency_backward(record, plan, target, self._read_second(plan, rows))
        return displaced

    def _read_second(self, plan: _Plan, rows: Rows) -> dict[int, torch.Tensor]:
        """The second forward, up to the last compared layer: layer -> `(N, d)`."""
        batch, where = self._second_batch(plan, rows)
        with (
            plan.replay(),
            self.autocast(),
            self.second_pass(),
            plan.reader.reading(where, detach=False, stop=True) as found,
        ):
            self.processes.through(batch, lambda: plan.reader.run(batch))
        return found

    def _token_sums(self, target: dict[int, torch.Tensor], moving: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Layer -> the consistency summed over tokens, a scalar in the graph of `moving`."""
        if not self.reads_logits:
            return {layer: TokenSum.apply(moving[layer], target[layer], self.consistency) for layer in moving}
        vocabulary = self.anatomy.model.get_output_embeddings().weight.shape[0]
        sums = {n: in_chunks(self._logit_piece, vocabulary, target[n], h) for n, h in moving.items()}
        return self._numbered({layer: torch.stack(pieces).sum() for layer, pieces in sums.items()})

    def _logit_piece(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Eq. 7 summed over a chunk of tokens, `(n, d)` h' and h (or the clean logits, see `_target`)."""
        with self.autocast():
            logits = self.anatomy.logits(moving)
            if self._head_stays:
                with torch.no_grad():
                    target = self.anatomy.logits(target)
        return self.consistency(target, logits).sum()

    def _consistency_backward(
        self,
        record: Record,
        plan: _Plan,
        target: dict[int, torch.Tensor],
        moving: dict[int, torch.Tensor],
    ) -> None:
        """Eq. 5 and its backward: token sums over layers, divided by `items` and the number of layers."""
        device = self.anatomy.device
        sums = {layer: value.to(device) for layer, value in self._token_sums(target, moving).items()}
        total = torch.stack(list(sums.values())).sum() * plan.share / len(sums) / plan.items
        self._add_layers(record, plan, sums)
        if not self.processes.finite(total.detach()):
            record.skipped = "non-finite consistency"
        elif not total.requires_grad:
            record.skipped = "theta lies above the compared layers"
        else:
            self.backward(self.processes.joined(record.lam * total, record))

    def _compare(self, record: Record, split: SplitGradients) -> None:
        """The two gradients beside each other, once both are there."""
        sft, cons, record.gradient_cosine = split.compare()
        record.gradient_ratio = cons / sft if sft > 0 else math.inf
        if not math.isfinite(sft):
            record.skipped = "non-finite gradient"
        elif not math.isfinite(cons):
            record.skipped = "non-finite consistency gradient"
        elif self.strength is not None:
            self.strength.update(record.gradient_ratio / record.lam)

    def _add_layers(self, record: Record, plan: _Plan, sums: dict[int, torch.Tensor]) -> None:
        """The token sums of the layers, of all rows or one piece, as means; read off the device at once."""
        device = self.anatomy.device
        means = torch.stack([s.detach().to(device).double() for s in sums.values()]) * (
            plan.share / max(record.tokens, 1)
        )
        for layer, mean in zip(sums, means.tolist()):
            record.consistency_per_layer[layer] = record.consistency_per_layer.get(layer, 0.0) + mean
        record.consistency = math.fsum(record.consistency_per_layer.values()) / len(sums)

    # -- never NaN in the weights --------------------------------------------------------------------------------------

    def _sound_parts(self, record: Record) -> int | None:
        """How many parts of the measured gradients to keep: all (None), not the consistency's, or the earlier alone.

        Under fp16 all: the GradScaler must see what overflowed, to skip the update and lower its scale.
        """
        if self.grad_scaler is not None:
            return None
        broken = {
            "non-finite ascent gradient": 1,
            "non-finite gradient": 1,
            "non-finite consistency": 2,  # of a piece; those before it had their backward
            "non-finite consistency gradient": 2,
        }
        return broken.get(record.skipped or "")

    def _check_finite(self, record: Record, theta: list[nn.Parameter]) -> None:
        """The last word, over all of theta: entries that are not finite become zero, and the record says so."""
        if self.grad_scaler is not None:
            return
        gradients = [local(p.grad) for p in theta if p.grad is not None]
        if not math.isfinite(global_norm(gradients)):
            record.skipped = record.skipped or "non-finite gradient"
            for g in gradients:
                g.nan_to_num_(0.0, 0.0, 0.0)


def _displacement(clean: dict[int, torch.Tensor], moved: dict[int, torch.Tensor]) -> dict[int, float]:
    """Layer -> ||h' - h|| / ||h||, read off the device at once."""
    device = next(iter(clean.values())).device
    with torch.no_grad():
        ratios = [(_norm(moved[layer] - h) / _norm(h)).to(device) for layer, h in clean.items()]
    return dict(zip(clean, torch.stack(ratios).tolist()))


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=wide(tensor[:0]).dtype)
