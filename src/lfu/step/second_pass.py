"""Eq. 4 to 6: h' by a perturbed forward, its consistency with h, the gradient of that on theta, and what both show.

The forward is the decoder's alone: without padding, up to the last compared layer, with the clean pass's masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lfu.model.precision import widest
from lfu.model.representations import Reader
from lfu.model.rng import Replay
from lfu.model.row_attention import attention_in
from lfu.step.cheaper import draw_layers, draw_rows, generator, part_saves_nothing
from lfu.step.consistency import Hidden, displacement
from lfu.step.pieces import Rows, answered, in_pieces
from lfu.step.record import Record, Skip
from lfu.step.trim import Batch, Trimmed, trimmed

if TYPE_CHECKING:
    from lfu.step.step import LfUStep


@dataclass(frozen=True)
class Micro:
    """One micro-batch, and what of it is compared."""

    batch: Batch
    where: torch.Tensor  # the compared positions, `(N,)`
    items: float | torch.Tensor  # what token sums are divided by
    index: int
    share: float  # its weight
    reader: Reader  # of the compared layers
    replay: Replay
    second: Trimmed  # the decoder's inputs of the perturbed pass


def plan(step: LfUStep, batch: Batch, where: torch.Tensor, items: float | torch.Tensor, index: int) -> Micro:
    """What this micro-batch compares: all, or what `part` and `random_layers` draw."""
    form, reader, source, share = step.cheaper, step.reader, generator(step.settings.seed, index), 1.0
    if form.part < 1:
        where, share = draw_rows(where, batch["labels"].shape[1], form.part, source)
    if form.random_layers:
        reader = Reader(step.anatomy, draw_layers(reader.layers, form.random_layers, source), reader.final_norm)
    # now, with nothing under way: it looks at masks and positions, and a GPU would have to catch up first
    second = smaller(step, Rows(batch, where, {}))
    replay = Replay(step.anatomy.devices, step.settings.same_dropout)
    return Micro(batch, where, items, index, share, reader, replay, second)


def run(step: LfUStep, record: Record, micro: Micro, clean: Hidden, target: Hidden, parts: Any) -> None:
    """Leaves `lam` times the gradient of Eq. 5 on theta. `clean` is h, `target` what h' is compared with (`Term`)."""
    step.auxiliary.freeze()
    through = _through_moved if step.settings.direction == "perturbed" else _through_clean
    moved = in_pieces(
        partial(through, step, record, micro),
        Rows(micro.batch, micro.where, target),
        inexact=_inexact_in_pieces(step, micro),
        undo=parts.undo,
    )
    if record.skipped not in (Skip.CONSISTENCY, Skip.ABOVE):  # the backward ran
        compare(step, record, parts)
    note_move(step, record, clean, moved)


def _through_moved(step: LfUStep, record: Record, micro: Micro, pieces: list[Rows]) -> Hidden:
    """The gradient flows through h' (Eq. 5). Returns the displaced h', detached."""
    record.pieces, record.consistency_per_layer = len(pieces), {}
    displaced: list[Hidden] = []
    with step.auxiliary.attached():
        for piece in pieces:
            with read(step, micro, piece) as moved:
                displaced.append({layer: h.detach() for layer, h in moved.items()})
                backward(step, record, micro, piece.target, moved)
    if len(displaced) == 1:
        return displaced[0]
    return {layer: torch.cat([part[layer] for part in displaced]) for layer in displaced[0]}


def _through_clean(step: LfUStep, record: Record, micro: Micro, pieces: list[Rows]) -> Hidden:
    """The gradient flows through h, towards detach(h'). Returns the displaced h'."""
    (rows,) = pieces
    record.consistency_per_layer = {}
    with step.auxiliary.attached(), torch.no_grad(), read(step, micro, rows) as displaced:
        target = step.term.target(displaced)
    step.auxiliary.discard()
    with read(step, micro, rows) as clean:
        backward(step, record, micro, target, clean)
    return displaced


@contextmanager
def read(step: LfUStep, micro: Micro, rows: Rows) -> Iterator[Hidden]:
    """h' (Eq. 4): layer -> `(N, d)`, of all rows or a piece of them; its backward belongs inside.

    There gradient checkpointing runs blocks again, and they must attend as they did in the forward.
    """
    if step.settings.same_dropout and step.random:  # masks belong to a shape
        if step.cheaper.part < 1:
            raise ValueError(part_saves_nothing(step.cheaper.part))
        second = Trimmed(rows.batch, rows.where)
    else:
        second = micro.second if rows.batch is micro.batch else smaller(step, rows)
    reading = micro.reader.reading(second.where, detach=False, stop=True)
    with attention_in(second.rows, step.anatomy.model.config.get_text_config()):
        with micro.replay(), step.autocast(), step.offload(), reading as found:
            step.processes.through(second.batch, lambda: micro.reader.run(second.batch))
        yield found


def smaller(step: LfUStep, rows: Rows) -> Trimmed:
    """Without the rows that `part` left out, and, with `trim`, without padding and what comes after."""
    if step.cheaper.part < 1:
        rows = answered(rows)
    return trimmed(rows.batch, rows.where, step.anatomy) if step.settings.trim else Trimmed(rows.batch, rows.where)


def backward(step: LfUStep, record: Record, micro: Micro, target: Hidden, moving: Hidden) -> None:
    """Eq. 5 and its backward: token sums over layers, divided by `items` and the number of layers."""
    sums = {layer: value.to(step.anatomy.device) for layer, value in step.term.sums(target, moving).items()}
    consistency = torch.stack(list(sums.values())).sum() * micro.share / len(sums) / micro.items
    note_layers(record, micro, sums)
    if not step.processes.finite(consistency.detach()):
        record.skipped = Skip.CONSISTENCY
    elif not consistency.requires_grad:
        record.skipped = Skip.ABOVE
    else:
        step.backward(step.processes.joined(record.lam * consistency, record.skipped is None))  # Eq. 6


def compare(step: LfUStep, record: Record, parts: Any) -> None:
    """The two gradients beside each other, once both are there."""
    sft, cons, record.gradient_cosine = parts.compare()
    record.gradient_ratio = cons / sft if sft > 0 else math.inf
    if not math.isfinite(sft):
        record.skipped = Skip.GRADIENT
    elif not math.isfinite(cons):
        record.skipped = Skip.CONSISTENCY_GRADIENT
    elif step.strength is not None:
        step.strength.learn(record.gradient_ratio / record.lam / step.longer)


def note_layers(record: Record, micro: Micro, sums: Hidden) -> None:
    """The token sums of the layers, of all rows or one piece, as means; read off the device at once."""
    device = next(iter(sums.values())).device
    found = torch.stack([s.detach().to(device, widest(device)) for s in sums.values()])
    means = found * micro.share / max(record.tokens, 1)
    for layer, mean in zip(sums, means.tolist()):
        record.consistency_per_layer[layer] = record.consistency_per_layer.get(layer, 0.0) + mean
    record.consistency = math.fsum(record.consistency_per_layer.values()) / len(sums)


def note_move(step: LfUStep, record: Record, clean: Hidden, moved: Hidden) -> None:
    """How far h' is from h, and the machine epsilon of what the layers add up.

    float32 hidden states may carry 16-bit outputs: those of autocast, or of quantised layers, which multiply in a dtype
    of their own.
    """
    hidden = next(iter(clean.values()))
    dtypes = {hidden.dtype, *step.anatomy.multiplies_in}
    with step.autocast():
        if torch.is_autocast_enabled(hidden.device.type):
            dtypes.add(torch.get_autocast_dtype(hidden.device.type))
    record.displacement = displacement(clean, moved)
    record.resolution = max(torch.finfo(dtype).eps for dtype in dtypes)


def _inexact_in_pieces(step: LfUStep, micro: Micro) -> str | None:
    """Why a pass in pieces of rows would not leave the gradients of the whole; None if it would."""
    consistency = step.term.consistency
    if not step.processes.alone:
        return "the other processes would not know of it"
    if not getattr(consistency, "token_sum", False):
        return f"the consistency {type(consistency).__name__} compares tokens of different rows, or may do so"
    if step.settings.direction == "clean":
        return "direction='clean' has let go of the undesirable model by then"
    if micro.replay.drew():
        return "dropout or embedding noise would draw other masks for the pieces"
    return None
