"""One measurement: every set of items through the model, and what it says against the untouched model's answers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lfu.evaluation.batching import token_nll
from lfu.evaluation.intervals import transitions
from lfu.evaluation.pieces import Piece, encode, text_pieces
from lfu.evaluation.score import multiple_choice
from lfu.forgetting.deal import Dealer
from lfu.forgetting.items import PROSE, QUESTIONS, WRITTEN, ItemSet
from lfu.forgetting.written import Written, divergence

LONGEST = 128  # tokens of a text that are read


@dataclass
class Answers:
    """What one model said, item by item."""

    chosen: dict[str, list[int]] = field(default_factory=dict)  # set of questions -> index of each choice taken
    nll: dict[str, list[float]] = field(default_factory=dict)  # set of texts -> NLL of each, nats per token
    kl: list[float] = field(default_factory=list)  # KL(untouched || model) of each written text, nats per token


@dataclass(frozen=True)
class Asker:
    """Asks a model all sets of items, dealt over the processes."""

    tokenizer: Any
    sets: Sequence[ItemSet]
    batch_size: int
    cached: bool  # whether the model can go on from a key-value cache
    dealer: Dealer

    def ask(self, model: Any, counts: Mapping[str, int], written: Written | None) -> tuple[Answers, dict[str, float]]:
        """The answers to the first `counts[name]` items of each set, and the seconds that each set took."""
        answers, seconds, begun = Answers(), {}, time.monotonic()

        def took(name: str) -> None:
            nonlocal begun
            seconds[name], begun = time.monotonic() - begun, time.monotonic()

        for each in self.sets:
            said, work = (answers.chosen, self._choose) if each.choice else (answers.nll, self._read)
            said[each.name] = self.dealer.over(each.items[: counts[each.name]], partial(work, model))
            took(each.name)
        if written is not None and counts[WRITTEN]:
            answers.kl = divergence(model, written, counts[WRITTEN], self.batch_size, self.dealer)
            took(WRITTEN)
        return answers, seconds

    def tokens(self, name: str, count: int) -> int:
        """Tokens that are read of the first `count` texts of a set."""
        texts = next(each for each in self.sets if each.name == name).items[:count]
        return sum(len(encode(self.tokenizer, text, special=True)[:LONGEST]) for text in texts)

    def _choose(self, model: Any, rows: list[Any]) -> list[int]:
        return multiple_choice(model, self.tokenizer, rows, batch_size=self.batch_size, cached=self.cached).chosen

    def _read(self, model: Any, texts: list[str]) -> list[float]:
        """Nats per token of the beginnings: one piece of each text, so that all processes make as many passes."""
        first: dict[int, Piece] = {}
        for piece in text_pieces(self.tokenizer, texts, LONGEST, start=1):
            first.setdefault(piece.item, piece)
        pieces = list(first.values())
        nll = token_nll(model, self.tokenizer, pieces, self.batch_size, lambda index: None)
        return [value / piece.tokens for value, piece in zip(nll, pieces)]


def compare(before: Answers, after: Answers, sets: Sequence[ItemSet]) -> dict[str, float]:
    """Figures of `after` against `before` on the items that both were asked, by the name that trackers see.

    For questions: `items`, `known` (right before), `kept`, `lost`, `gained` and `net_lost`, (lost - gained) / known.
    For texts: `loss` (nats per token) and `rise` of it. `kl` on the text that the untouched model wrote. The built-in
    questions' figures carry no prefix, those of prose begin with `prose_`, those of a file with its name and a slash.
    """
    figures: dict[str, float] = {}
    for each in sets:
        prefix = {QUESTIONS: "", PROSE: "prose_"}.get(each.name, f"{each.name}/")
        if each.choice:
            figures |= {f"{prefix}{name}": value for name, value in _questions(before, after, each).items()}
        else:
            now, then = after.nll[each.name], before.nll[each.name]
            loss = sum(now) / len(now)
            figures |= {f"{prefix}loss": loss, f"{prefix}rise": loss - sum(then[: len(now)]) / len(now)}
    if after.kl:
        figures["kl"] = sum(after.kl) / len(after.kl)
    return figures


def right(answers: Answers, each: ItemSet) -> list[bool]:
    """Which of a set's questions were answered right."""
    return [choice == row["answer"] for choice, row in zip(answers.chosen[each.name], each.items)]


def _questions(before: Answers, after: Answers, each: ItemSet) -> dict[str, float]:
    now = right(after, each)
    counts = transitions(right(before, each)[: len(now)], now)
    known = counts["kept"] + counts["lost"]
    net = (counts["lost"] - counts["gained"]) / max(1, known)
    counts.pop("never")
    return {"items": len(now), "known": known, **counts, "net_lost": net}
