"""The perturbed pass in smaller pieces of rows, where the memory does not hold it whole."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-batch, as the perturbed pass takes them."""

    batch: Mapping[str, Any]  # `input_ids`, `labels` `(B, T)`, anything else the model takes
    where: torch.Tensor  # flat indices `(N,)` into the B*T positions, ascending
    target: dict[int, torch.Tensor]  # layer -> `(N, d)`, or the logits `(N, V)`, at these positions


def in_pieces(run: Callable[[list[Rows]], T], rows: Rows, *, inexact: str | None, undo: Callable[[], bool]) -> T:
    """`run([rows])`; out of memory, again with twice as many pieces half as large, down to single rows.

    Exact where the term is a sum over tokens: the sum over the pieces is the sum over the rows. `inexact` says why it
    is none; None if it is. `undo` takes a failed attempt's gradients back; False if it can't (`SplitGradients.undo`).

    Raises torch.OutOfMemoryError: even for the smallest pieces, or where pieces can't be taken; its note says why.
    """
    most = 1 if inexact else _most(rows.batch)
    count = 1
    while True:
        try:
            return run(cut(rows, count))
        except torch.OutOfMemoryError as error:
            why = inexact
            if count >= most:
                why = why or ("single rows don't fit either" if count > 1 else "the rows can't be taken apart")
            elif not undo():
                why = "its backward had begun, and of so large a theta gradients are kept apart for a sample only"
            if why:
                error.add_note(f"It was in LfU's perturbed pass, which can't be done in smaller pieces: {why}.")
                raise
        count = min(2 * count, most)  # outside the except: what the failed attempt held is free by now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory in LfU's perturbed pass: it is run in {count} pieces of rows, with the same gradients. "
            "A smaller micro-batch with more accumulation steps would spare the failed attempts",
            stacklevel=2,
        )


def answered(rows: Rows) -> Rows:
    """The rows with a compared token alone; all where there is none, or a tensor is not laid out by rows."""
    size, length = rows.batch["labels"].shape
    chosen = (rows.where // length).unique()
    return rows if len(chosen) in (0, size) or _most(rows.batch) < size else _taken(rows, chosen)


def cut(rows: Rows, count: int) -> list[Rows]:
    """`count` pieces of about as many rows each; without those that have nothing to compare."""
    if count == 1:
        return [rows]
    size = len(rows.batch["labels"])
    bounds = pairwise(size * i // count for i in range(count + 1))
    pieces = [_taken(rows, torch.arange(start, end, device=rows.where.device)) for start, end in bounds]
    return [piece for piece in pieces if len(piece.where)]


def _taken(rows: Rows, chosen: torch.Tensor) -> Rows:
    """The rows with these numbers, ascending."""
    size, length = rows.batch["labels"].shape
    row = rows.where // length
    inside = torch.isin(row, chosen)
    place = torch.searchsorted(chosen, row[inside])
    batch = {k: v.index_select(0, chosen) if _by_row(v, size) else v for k, v in rows.batch.items()}
    target = {layer: h[inside.to(h.device)] for layer, h in rows.target.items()}
    return Rows(batch, place * length + rows.where[inside] % length, target)


def _most(batch: Mapping[str, Any]) -> int:
    """Into how many pieces the rows can be cut: one where a tensor is not laid out by rows."""
    size = len(batch["labels"])
    tensors = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()]
    return size if all(_by_row(v, size) for v in tensors) else 1


def _by_row(value: Any, size: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == size
