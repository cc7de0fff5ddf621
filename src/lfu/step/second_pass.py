"""The perturbed forward (Eq. 4): the decoder alone, without padding, up to the last compared layer, same masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from lfu.model.anatomy import Anatomy
from lfu.model.representations import Reader
from lfu.model.rng import Replay, draws_masks
from lfu.step.cheaper import Cheaper, draw_layers, draw_rows, generator
from lfu.step.pieces import Rows, answered
from lfu.step.term import Hidden
from lfu.step.trim import trimmed

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Micro:
    """One micro-batch; what of it is compared (positions `where` `(N,)`, the reader's layers), `share` its weight.

    `items`: what token sums are divided by. `second`: the decoder's inputs of the perturbed pass over it, and the
    compared positions in them.
    """

    batch: Batch
    where: torch.Tensor
    items: float | torch.Tensor
    index: int
    share: float
    reader: Reader
    replay: Replay
    second: tuple[Batch, torch.Tensor]

    @property
    def rows(self) -> Rows:
        return Rows(self.batch, self.where, {})


class SecondPass:
    """Runs it, and knows what may be left out.

    Args:
        anatomy: the model's parts.
        form: what `part` and `random_layers` draw.
        same_dropout, trim: see `StepSettings`.
        autocast, offload: contexts round it.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        form: Cheaper,
        *,
        same_dropout: bool,
        trim: bool,
        autocast: Callable[[], AbstractContextManager[None]],
        offload: Callable[[], AbstractContextManager[Any]],
    ):
        self.anatomy, self.form, self.same_dropout, self.trim = anatomy, form, same_dropout, trim
        self.autocast, self.offload = autocast, offload
        self.random = True  # whether the last clean pass drew random numbers; unknown counts as yes

    @property
    def replays_masks(self) -> bool:
        """Whether it must see the clean pass's dropout masks. Embedding noise shows only when drawn."""
        model = self.anatomy.model
        return self.same_dropout and draws_masks(model, model.config.get_text_config())

    def plan(
        self, batch: Batch, where: torch.Tensor, items: float | torch.Tensor, index: int, reader: Reader, seed: int
    ) -> Micro:
        """What this micro-batch compares: all, or what `part` and `random_layers` draw."""
        source, share = generator(seed, index), 1.0
        if self.form.part < 1:
            where, share = draw_rows(where, batch["labels"].shape[1], self.form.part, source)
        if self.form.random_layers:
            layers = draw_layers(reader.layers, self.form.random_layers, source)
            reader = Reader(self.anatomy, layers, reader.final_norm)
        devices = (p.device for p in self.anatomy.model.parameters())
        # now, with nothing under way: it looks at masks and positions, and a GPU would have to catch up first
        second = self.smaller(Rows(batch, where, {}))
        return Micro(batch, where, items, index, share, reader, Replay(devices, self.same_dropout), second)

    def smaller(self, rows: Rows) -> tuple[Batch, torch.Tensor]:
        """Without the rows that `part` left out, and, with `trim`, without padding and what comes after."""
        if self.form.part < 1:
            rows = answered(rows)
        return trimmed(rows.batch, rows.where, self.anatomy) if self.trim else (rows.batch, rows.where)

    def read(self, micro: Micro, rows: Rows, through: Callable[[Batch, Callable[[], Any]], Any]) -> Hidden:
        """h': layer -> `(N, d)`, of all rows or a piece of them.

        Args:
            through: runs the forward with all that a wrapper of several processes does round one.
        """
        batch, where = self._inputs(micro, rows)
        with (
            micro.replay(),
            self.autocast(),
            self.offload(),
            micro.reader.reading(where, detach=False, stop=True) as found,
        ):
            through(batch, lambda: micro.reader.run(batch))
        return found

    def _inputs(self, micro: Micro, rows: Rows) -> tuple[Batch, torch.Tensor]:
        """The decoder's inputs, and the compared positions in them."""
        if self.same_dropout and self.random:  # masks belong to a shape
            if self.form.part < 1:
                raise ValueError(self.part_saves_nothing())
            return rows.batch, rows.where
        return micro.second if rows.batch is micro.batch else self.smaller(rows)

    def part_saves_nothing(self) -> str:
        return (
            f"part={self.form.part:g} with dropout or embedding noise saves nothing, as the second pass draws the "
            "masks of the whole micro-batch: use every or random_layers, take the noise away, or set same_dropout=False"
        )
