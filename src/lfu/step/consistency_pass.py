"""Eq. 4 to 6 after the ascent: the perturbed pass, the consistency and its gradient on theta, and what both show."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lfu.step.pieces import Rows, in_pieces
from lfu.step.record import Record, Skip
from lfu.step.second_pass import Micro
from lfu.step.term import Hidden, displacement

if TYPE_CHECKING:
    from lfu.step.step import LfUStep


def run(step: LfUStep, record: Record, micro: Micro, clean: Hidden, target: Hidden, parts: Any) -> None:
    """Leaves `lam` times the gradient of Eq. 5 on theta.

    Args:
        clean: h, layer -> `(N, d)`, detached.
        target: what h' is compared with, see `Term.target`.
        parts: tells this gradient from SFT's.
    """
    step.auxiliary.freeze()
    through = _through_moved if step.settings.direction == "perturbed" else _through_clean
    moved = in_pieces(
        partial(through, step, record, micro),
        Rows(micro.batch, micro.where, target),
        inexact=_inexact_in_pieces(step, micro),
        undo=parts.undo,
    )
    if record.skipped not in (Skip.CONSISTENCY, Skip.ABOVE):  # the backward ran
        _compare(step, record, parts)
    record.displacement = displacement(clean, moved)
    record.resolution = resolution(step, next(iter(clean.values())))


def _through_moved(step: LfUStep, record: Record, micro: Micro, pieces: list[Rows]) -> Hidden:
    """The gradient flows through h' (Eq. 5). Returns the displaced h', detached."""
    record.pieces, record.consistency_per_layer = len(pieces), {}
    displaced: list[Hidden] = []
    with step.auxiliary.attached():
        for piece in pieces:
            moved = step.second.read(micro, piece, step.processes.through)
            displaced.append({layer: h.detach() for layer, h in moved.items()})
            backward(step, record, micro, piece.target, moved)
    if len(displaced) == 1:
        return displaced[0]
    return {layer: torch.cat([part[layer] for part in displaced]) for layer in displaced[0]}


def _through_clean(step: LfUStep, record: Record, micro: Micro, pieces: list[Rows]) -> Hidden:
    """The gradient flows through h, towards detach(h'). Returns the displaced h'."""
    (rows,) = pieces
    record.consistency_per_layer = {}
    with step.auxiliary.attached(), torch.no_grad():
        displaced = step.second.read(micro, rows, step.processes.through)
        target = step.term.target(displaced)
    step.auxiliary.discard()
    backward(step, record, micro, target, step.second.read(micro, rows, step.processes.through))
    return displaced


def backward(step: LfUStep, record: Record, micro: Micro, target: Hidden, moving: Hidden) -> None:
    """Eq. 5 and its backward: token sums over layers, divided by `items` and the number of layers."""
    sums = {layer: value.to(step.anatomy.device) for layer, value in step.term.sums(target, moving).items()}
    consistency = torch.stack(list(sums.values())).sum() * micro.share / len(sums) / micro.items
    add_layers(record, micro, sums)
    if not step.processes.finite(consistency.detach()):
        record.skipped = Skip.CONSISTENCY
    elif not consistency.requires_grad:
        record.skipped = Skip.ABOVE
    else:
        step.backward(step.processes.joined(record.lam * consistency, record.skipped is None))  # Eq. 6


def _compare(step: LfUStep, record: Record, parts: Any) -> None:
    """The two gradients beside each other, once both are there."""
    sft, cons, record.gradient_cosine = parts.compare()
    record.gradient_ratio = cons / sft if sft > 0 else math.inf
    if not math.isfinite(sft):
        record.skipped = Skip.GRADIENT
    elif not math.isfinite(cons):
        record.skipped = Skip.CONSISTENCY_GRADIENT
    elif step.strength is not None:
        step.strength.update(record.gradient_ratio / record.lam / step.longer)


def add_layers(record: Record, micro: Micro, sums: Hidden) -> None:
    """The token sums of the layers, of all rows or one piece, as means; read off the device at once."""
    device = next(iter(sums.values())).device
    means = torch.stack([s.detach().to(device).double() for s in sums.values()]) * micro.share / max(record.tokens, 1)
    for layer, mean in zip(sums, means.tolist()):
        record.consistency_per_layer[layer] = record.consistency_per_layer.get(layer, 0.0) + mean
    record.consistency = math.fsum(record.consistency_per_layer.values()) / len(sums)


def resolution(step: LfUStep, hidden: torch.Tensor) -> float:
    """Machine epsilon of what the layers add up: float32 hidden states may carry 16-bit outputs.

    Those of autocast, or of quantised layers, which multiply in a dtype of their own.
    """
    device = hidden.device.type
    dtypes = {hidden.dtype, *step.anatomy.multiplies_in}
    with step.autocast():
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


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
