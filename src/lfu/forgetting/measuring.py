"""The measurements of one run: the untouched model once, then one reading after another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfu.forgetting.budget import beyond_noise, evidence, spent
from lfu.forgetting.deal import Dealer
from lfu.forgetting.items import PROSE, WRITTEN, ItemSet
from lfu.forgetting.keep import FILE, Memory, Reading
from lfu.forgetting.measure import Asker, compare
from lfu.forgetting.share import Share
from lfu.forgetting.unnoticed import unnoticed, unsloth, untouched
from lfu.forgetting.written import write

TEXTS = 24  # that the untouched model writes
PILOT = 4  # items of a set that say how fast the model reads


class Measuring:
    """Asks the model of a run, within a share of its time.

    Args:
        model: in training.
        tokenizer: a copy of its tokenizer.
        sets: what is asked.
        budget: measure -> how much of it may be spent.
        share_of_time: most of the run's time; None: no limit.
        batch_size: items per forward pass.
        seed: of the written text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sets: Sequence[ItemSet], budget: Mapping[str, float],
        share_of_time: float | None, batch_size: int, seed: int,
    ):  # fmt: skip
        self.model, self.sets, self.budget, self.seed = model, sets, budget, seed
        self.dealer = Dealer(model)
        cached = not unsloth() and self.dealer.size == 1  # without a cache sharded processes make the same passes
        self.asker = Asker(tokenizer, sets, batch_size, cached, self.dealer)
        sizes = {each.name: len(each.items) for each in sets} | {WRITTEN: TEXTS}
        self.share = Share(share_of_time, sizes)
        self.share.begin()
        self.memory: Memory

    @property
    def asked(self) -> dict[str, Any]:
        """What decides on the items."""
        return {"seed": self.seed, "sets": {each.name: len(each.items) for each in self.sets}}

    def recall(self, folders: Sequence[Path], step: int) -> bool:
        """Takes up what an interrupted run knew at `step`, from the first folder that has it."""
        found = (Memory.load(folder / FILE, step) for folder in folders) if self.dealer.rank == 0 else ()
        memory = next((one for one in found if one is not None and one.asked == self.asked), None)
        memory = self.dealer.agreed(memory)
        if memory is not None:
            self.memory = memory
            self.share.part, self.share.spent, self.share.each = memory.part, memory.spent, memory.each
            self.share.sizes = {name: self._asked_before(name) for name in self.share.sizes}
        return memory is not None

    def begin(self, tokens_per_step: float, steps: int) -> dict[str, float]:
        """Asks the untouched model what all later readings are compared with. Returns its own figures.

        Args:
            tokens_per_step: that this process trains on.
            steps: of the run.
        """
        start = time.monotonic()
        with unnoticed(self.model), untouched(self.model):
            self.asker.ask(self.model, {each.name: 1 for each in self.sets}, None)  # warms up
            pilot = {each.name: min(PILOT, len(each.items)) for each in self.sets}
            begun = time.monotonic()
            self.asker.ask(self.model, pilot, None)
            seconds = time.monotonic() - begun
            self.share.each = self.dealer.agreed(seconds) / sum(pilot.values())
            # forward and backward of a training token take some three times the forward of one that is asked
            each_token = self.share.each * sum(pilot.values()) / self.asker.tokens(pilot)
            self.share.plan(self.dealer.agreed(3 * each_token * tokens_per_step) * steps)
            counts = self.share.counts()
            prose = next(each for each in self.sets if each.name == PROSE)
            starts = prose.items[: counts[WRITTEN]]
            cached = not unsloth()
            written = write(self.model, self.asker.tokenizer, starts, self.dealer, seed=self.seed, cached=cached)
            begun = time.monotonic()
            before = self.asker.ask(self.model, counts, written)
        now = time.monotonic()
        seconds, asking = self.dealer.agreed((now - start, now - begun))
        self.share.add(seconds, sum(counts.values()), asking)
        self.memory = Memory(self.asked, before, written)
        return compare(before, before, self.sets)

    def affordable(self, steps_done: int, steps: int, readings: float) -> bool:
        """Whether a reading fits the share of time, of fewer items if need be (see `Share.afford`)."""
        fits = self.share.afford(steps_done, steps, readings)
        fits, self.share.part = self.dealer.agreed((fits, self.share.part))
        return fits

    def read(self, step: int, epoch: float) -> Reading:
        """One reading of the model as it is now, remembered."""
        start = time.monotonic()
        counts = self.share.counts()
        with unnoticed(self.model):
            answers = self.asker.ask(self.model, counts, self.memory.written)
        seconds = self.dealer.agreed(time.monotonic() - start)
        self.share.add(seconds, sum(counts.values()), seconds)
        reading = Reading(step, epoch, answers, compare(self.memory.before, answers, self.sets))
        number = len(self.memory.readings) + 1
        for each in self.sets:
            if each.name in self.budget:
                limit, before = self.budget[each.name], self.memory.before
                if spent(before, answers, each) > limit:
                    reading.over.append(each.name)
                if beyond_noise(evidence(before, answers, each, limit), number, len(self.budget)):
                    reading.shown.append(each.name)
        self.memory.readings.append(reading)
        return reading

    def save(self, folder: Path) -> None:
        """Writes what is known into `folder`."""
        memory = self.memory
        memory.part, memory.spent, memory.each = self.share.part, self.share.spent, self.share.each
        memory.save(folder / FILE)

    def _asked_before(self, name: str) -> int:
        before = self.memory.before
        return len(self.memory.written.ids if name == WRITTEN else before.chosen.get(name) or before.nll[name])
