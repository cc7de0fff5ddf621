"""The measurements of one run: the untouched model once, then one reading after another."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfu.evaluation.batching import token_nll
from lfu.evaluation.pieces import Piece, encode, text_pieces
from lfu.evaluation.record import digest
from lfu.evaluation.score import multiple_choice
from lfu.forgetting.answers import Answers, compare
from lfu.forgetting.budget import beyond_noise, evidence, spent
from lfu.forgetting.deal import Dealer
from lfu.forgetting.items import PROSE, WRITTEN, ItemSet
from lfu.forgetting.keep import FILE, Memory, Reading
from lfu.forgetting.share import Share
from lfu.forgetting.unnoticed import unnoticed, unsloth, untouched
from lfu.forgetting.written import Written, divergence, seconds_to_write, write

TEXTS = 24  # that the untouched model writes
LONGEST, SHORT = 128, 32  # tokens of a text that are read; in a run that has no time for more
PILOT = 2  # items of a set that say how fast the model reads


class Measuring:
    """Asks the model of a run, within a share of its time; the arguments are those of `ForgettingCallback`."""

    def __init__(
        self, model: Any, tokenizer: Any, sets: Sequence[ItemSet], budget: Mapping[str, float],
        share_of_time: float | None, batch_size: int, seed: int,
    ):  # fmt: skip
        self.model, self.sets, self.budget, self.seed = model, sets, budget, seed
        self.dealer = Dealer(model)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.cached = not unsloth() and self.dealer.size == 1  # without a cache sharded processes make the same passes
        self.prose = next(each for each in sets if each.name == PROSE).items
        sizes = {each.name: len(each.items) for each in sets}
        # answers to other items, or to these in another order, can't be compared
        self.asked = {"seed": seed, "sets": {each.name: digest(each.items) for each in sets}}
        self.share = Share(share_of_time, sizes | {WRITTEN: TEXTS})
        self.memory: Memory

    def recall(self, folders: Sequence[Path], step: int) -> bool:
        """Takes up what an interrupted run knew at `step`, from the first folder that has it."""
        found = (Memory.load(folder / FILE, step) for folder in folders) if self.dealer.rank == 0 else ()
        memory = next((one for one in found if one is not None and one.asked == self.asked), None)
        memory = self.dealer.agreed(memory)
        if memory is not None:
            self.memory, self.share = memory, Share(self.share.share, **memory.share)
        return memory is not None

    def begin(self, tokens_per_step: float, step: int, steps: int) -> dict[str, float]:
        """Asks the untouched model what all later readings are compared with. Returns its own figures.

        `step` is the run's first, of so many `steps`; in each this process trains on `tokens_per_step`.
        """
        start, self.share.first, self.share.last = time.monotonic(), step, step
        with unnoticed(self.model), untouched(self.model):
            if self.share.share is not None:
                self._plan(tokens_per_step * (steps - step))
            counts = self.share.counts()
            starts, cached = self.prose[: counts[WRITTEN]], not unsloth()
            written = write(self.model, self.tokenizer, starts, self.dealer, seed=self.seed, cached=cached)
            before = self.ask(counts, written)
        self.share.measured(self.dealer.agreed(time.monotonic() - start))
        self.memory = Memory(self.asked, before, written)
        return compare(before, before, self.sets)

    def _plan(self, tokens: float) -> None:
        """Decides on the items of a run that trains on so many `tokens`, by a pilot."""
        self.ask({each.name: 1 for each in self.sets}, None)  # warms up
        pilot = {each.name: min(PILOT, len(each.items)) for each in self.sets}
        self.ask(pilot, None)
        self.share.each[WRITTEN] = self.share.each[PROSE]
        writing = seconds_to_write(self.model, -(-TEXTS // self.dealer.size))
        # forward and backward of a training token take some three times the forward of one that is asked
        texts = self.prose[: pilot[PROSE]]
        asked = sum(len(encode(self.tokenizer, text, special=True)[: self.longest]) for text in texts)
        seconds = 3 * tokens * pilot[PROSE] * self.share.each[PROSE] / asked
        self.share.plan(*self.dealer.agreed((seconds, writing)))

    def ask(self, counts: Mapping[str, int], written: Written | None) -> Answers:
        """The answers to the first `counts[name]` items of each set; remembers the seconds that an item took."""
        answers, seconds, begun = Answers(), {}, time.monotonic()

        def took(name: str) -> None:
            nonlocal begun
            seconds[name], begun = (time.monotonic() - begun) / counts[name], time.monotonic()

        for each in self.sets:
            items = each.items[: counts[each.name]]
            if each.choice:
                answers.chosen[each.name] = self.dealer.over(items, self._choose)
            else:
                answers.nll[each.name] = self.dealer.over(items, self._read)
            took(each.name)
        if written is not None and counts[WRITTEN]:
            answers.kl = divergence(self.model, written, counts[WRITTEN], self.batch_size, self.dealer)
            took(WRITTEN)
        self.share.each |= self.dealer.agreed(seconds)
        return answers

    @property
    def longest(self) -> int:
        """Tokens of a text that are read."""
        return SHORT if self.share.short else LONGEST

    def _choose(self, rows: list[Any]) -> list[int]:
        size, cached = self.batch_size, self.cached
        return multiple_choice(self.model, self.tokenizer, rows, batch_size=size, cached=cached).chosen

    def _read(self, texts: list[str]) -> list[float]:
        """Nats per token of the beginnings: one piece of each text, so that all processes make as many passes."""
        first: dict[int, Piece] = {}
        for piece in text_pieces(self.tokenizer, texts, self.longest, start=1):
            first.setdefault(piece.item, piece)
        pieces = list(first.values())
        nll = token_nll(self.model, self.tokenizer, pieces, self.batch_size, lambda index: None)
        return [value / piece.tokens for value, piece in zip(nll, pieces)]

    def due(self, step: int, steps: int, to_come: float, fewest: int, useful: bool) -> bool:
        """As `Share.due`, the same in all processes; `fewest` counts the readings so far."""
        due = self.share.due(step, steps, to_come, max(1, fewest - len(self.memory.readings)), useful)
        due, self.share.part = self.dealer.agreed((due, self.share.part))
        return due

    def read(self, step: int, epoch: float) -> Reading:
        """One reading of the model as it is now, remembered."""
        start, self.share.last = time.monotonic(), step
        with unnoticed(self.model):
            answers = self.ask(self.share.counts(), self.memory.written)
        self.share.measured(self.dealer.agreed(time.monotonic() - start))
        before, readings = self.memory.before, self.memory.readings
        reading = Reading(step, epoch, answers, compare(before, answers, self.sets))
        for each in self.sets:
            limit = self.budget.get(each.name)
            if limit is not None and not spent(before, answers, each) <= limit:  # NaN, as of a broken model, is over it
                reading.over.append(each.name)
                if beyond_noise(evidence(before, answers, each, limit), len(readings) + 1, len(self.budget)):
                    reading.shown.append(each.name)
        readings.append(reading)
        readings.sort(key=lambda each: each.step)  # the best model is back at the end of the run
        return reading

    def save(self, folder: Path) -> None:
        """Writes what is known into `folder`."""
        self.memory.share = self.share.kept()
        self.memory.save(folder / FILE)
