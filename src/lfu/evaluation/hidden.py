"""Hidden states of an in-memory model on chosen tokens: what drift and noise compare, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfu.evaluation.batching import Progress, batches, evaluating, pad_id, padded, prompt_tuned, tick
from lfu.evaluation.pieces import Piece
from lfu.model.anatomy import Anatomy, anatomy
from lfu.model.representations import Reader, answer_positions
from lfu.support.annotations import Model, Tokenizer


@dataclass(frozen=True)
class Hidden:
    """h[l, t] of layers 1..K (K after the final norm): layer -> `(N, d)`, float32 or wider, on the CPU.

    The N positions are those of the pieces, one piece after the other: `counts` says how many each has.
    """

    layers: dict[int, Tensor]
    counts: list[int]


def hidden_states(
    model: Model, tokenizer: Tokenizer, pieces: Sequence[Piece], *, batch_size: int = 8,
    progress: Progress | None = None,
) -> Hidden:  # fmt: skip
    """Reads the hidden states of every layer at the positions that count.

    Costs N x K x d x 4 bytes of memory for N positions. Works on a `PeftModel`, whose adapters take part. Leaves the
    model's train/eval state and every random generator as they were.

    Raises ValueError: no pieces; prompt tuning; hidden states that aren't finite.
    """
    counts = [piece.tokens for piece in pieces]
    layers: dict[int, Tensor] = {}

    def keep(batch: Batch) -> None:
        for layer, hidden in batch.read().items():
            if layer not in layers:
                layers[layer] = hidden.new_empty((sum(counts), hidden.shape[1]))
            places = layers[layer].split(counts)  # views
            for index, rows in zip(batch.indices, hidden.split([counts[i] for i in batch.indices])):
                places[index].copy_(rows)
        tick(progress, len(batch.indices))

    over_batches(model, tokenizer, pieces, batch_size, keep)
    return Hidden(layers, counts)


@dataclass(frozen=True)
class Batch:
    """Some of the pieces, right-padded to one length, on the model's device."""

    indices: list[int]  # into the pieces
    inputs: dict[str, Tensor]  # input_ids, attention_mask, labels; all (B, T)
    reader: Reader
    positions: Tensor  # (n,): flat indices of what is read

    @property
    def targets(self) -> Tensor:
        """The tokens that the read positions predict, `(n,)`, in the order of `read`."""
        return self.inputs["labels"].roll(-1, dims=1).flatten()[self.positions]

    def read(self) -> dict[int, Tensor]:
        """One forward pass: layer -> `(n, d)` on the CPU, piece by piece in the order of `indices`."""
        with self.reader.reading(self.positions, detach=True) as found:
            self.reader.run(self.inputs)
        layers = {n: h.to(torch.promote_types(h.dtype, torch.float32)).cpu() for n, h in found.items()}
        if broken := [layer for layer, hidden in layers.items() if not hidden.isfinite().all()]:
            raise ValueError(f"layer {min(broken)}: hidden states that are not finite numbers; the model is broken")
        return layers


def over_batches(
    model: Model, tokenizer: Tokenizer, pieces: Sequence[Piece], batch_size: int, work: Callable[[Batch], None]
) -> None:
    """Calls `work` on each batch, in eval mode and without gradients; ValueError as `hidden_states`."""
    if not pieces:
        raise ValueError("nothing to read")
    parts = parts_of(model)
    reader = Reader(parts, list(range(1, len(parts.blocks) + 1)))
    with evaluating(model), torch.no_grad():
        for indices in batches([len(piece.ids) for piece in pieces], batch_size):
            inputs = _right_pad([pieces[i] for i in indices], pad_id(tokenizer), parts.device)
            work(Batch(indices, inputs, reader, answer_positions(inputs["labels"])))


def parts_of(model: Model) -> Anatomy:
    """`anatomy(model)`; ValueError for prompt tuning, which has no weights or hidden states of its own to compare."""
    if prompt_tuned(model):
        raise ValueError("prompt tuning changes neither weights nor tokens: there is nothing to compare")
    return anatomy(model)


def _right_pad(pieces: Sequence[Piece], pad: int, device: Any) -> dict[str, Tensor]:
    """Causal attention never looks right, so padding there moves no position and needs no position ids."""
    return {
        "input_ids": padded([piece.ids for piece in pieces], pad, device),
        "attention_mask": padded([[1] * len(piece.ids) for piece in pieces], 0, device),
        "labels": padded([[-100] * piece.start + piece.ids[piece.start :] for piece in pieces], -100, device),
    }
